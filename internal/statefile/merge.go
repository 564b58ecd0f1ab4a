// Copyright (c) The azure-vnet authors. MIT licence.

package statefile

import (
	"bytes"
	"encoding/json"
	"reflect"
)

// mergeUnknown returns next with everything in raw that the program did not know: raw
// is the file as another version wrote it, known what this program understood
// of it, next what this program wants in its place. What known has and next has
// not was deleted, and stays deleted with all that was below it.
//
// Objects are followed by key. Elements of a list have no name: one that did not
// change is followed wherever it went, one that did only while the list keeps
// its length. State whose unknown fields matter belongs in objects.
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

func graftValue(raw, known, next any) any {
	switch next := next.(type) {
	case map[string]any:
		r, ok := raw.(map[string]any)
		if !ok {
			return next
		}
		k, _ := known.(map[string]any) // nil: all that was known in it was empty
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
