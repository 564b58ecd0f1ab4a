// Copyright (c) The azure-vnet authors. MIT licence.

package statefile

import (
	"bytes"
	"encoding/json"
	"reflect"
)

// mergeUnknown returns next, the new value, with the unknown keys of raw. raw is the file, which a program of another
// version wrote. known is what this program read of it. A key is unknown if raw has it and known lacks it. A key that
// known has and next lacks was deleted, and stays deleted.
//
// An unknown key is kept if the object around it is found in next. In an object, a value is found by its key. In a list,
// an element is found if it did not change, or if the list kept its length. So state whose unknown keys matter should be
// in objects.
func mergeUnknown(raw, known, next []byte) ([]byte, error) {
	var trees [3]any
	for i, body := range [][]byte{raw, known, next} {
		d := json.NewDecoder(bytes.NewReader(body))
		d.UseNumber() // an unknown number keeps its digits
		if err := d.Decode(&trees[i]); err != nil {
			return nil, err
		}
	}
	return json.Marshal(graftValue(trees[0], trees[1], trees[2]))
}

// graftValue is mergeUnknown for one value of any kind.
func graftValue(raw, known, next any) any {
	switch next := next.(type) {
	case map[string]any:
		r, ok := raw.(map[string]any)
		if !ok {
			return next
		}
		k, _ := known.(map[string]any) // nil if this program knows no key of raw
		return graftObject(r, k, next)
	case []any:
		r, _ := raw.([]any)
		k, _ := known.([]any)
		if len(r) != len(k) {
			return next
		}
		return graftList(r, k, next)
	}
	return next
}

// graftObject is mergeUnknown for objects.
func graftObject(raw, known, next map[string]any) any {
	for key, value := range next {
		next[key] = graftValue(raw[key], known[key], value)
	}
	for key, value := range raw {
		_, kept := next[key]
		if _, understood := known[key]; !kept && !understood {
			next[key] = value
		}
	}
	return next
}

// graftList is mergeUnknown for lists.
func graftList(raw, known, next []any) any {
	for i, value := range next {
		from := -1
		if len(next) == len(known) {
			from = i
		}
		for j := range known {
			if reflect.DeepEqual(known[j], value) {
				from = j
				break
			}
		}
		if from >= 0 {
			next[i] = graftValue(raw[from], known[from], value)
		}
	}
	return next
}
