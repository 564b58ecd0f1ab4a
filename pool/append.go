// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"encoding/json"
	"maps"
	"net/netip"
	"slices"
	"strconv"
)

// Append writes the state as package json would, leases by address: the other
// half of Scan, and for the same reason. What there are few of is left to
// package json.
func (s *state) Append(b []byte) ([]byte, error) {
	few := *s
	few.Leases, few.Freed = nil, nil
	body, err := json.Marshal(&few)
	if err != nil {
		return b, err
	}
	b = slices.Grow(b, len(body)+256*(len(s.Leases)+1)+64*len(s.Freed))
	b = append(b, body[:len(body)-1]...) // a version always comes first, so a comma follows
	if len(s.Leases) > 0 {
		b = appendEntries(append(b, `,"leases":`...), s.Leases, appendRecord)
	}
	if len(s.Freed) > 0 {
		b = appendEntries(append(b, `,"freed":`...), s.Freed, appendRest)
	}
	return append(b, '}'), nil
}

func appendEntries[T any](b []byte, m map[netip.Addr]T, each func([]byte, T) []byte) []byte {
	sep := byte('{')
	for _, addr := range slices.SortedFunc(maps.Keys(m), netip.Addr.Compare) {
		b = append(b, sep, '"')
		b = append(addr.AppendTo(b), `":`...)
		b = each(b, m[addr])
		sep = ','
	}
	return append(b, '}')
}

func appendRecord(b []byte, r record) []byte {
	b = appendText(append(b, `{"owner":`...), r.Owner)
	b = appendText(append(b, `,"mac":`...), r.MAC)
	b = append(b, `,"prefix":"`...)
	if r.Prefix.IsValid() {
		b = r.Prefix.AppendTo(b)
	}
	b = strconv.AppendInt(append(b, `","since":`...), int64(r.Since), 10)
	if r.Linkless {
		b = append(b, `,"linkless":true`...)
	}
	if r.Early {
		b = append(b, `,"early":true`...)
	}
	if r.Confirmed != 0 {
		b = strconv.AppendInt(append(b, `,"confirmed":`...), int64(r.Confirmed), 10)
	}
	return append(b, '}')
}

func appendRest(b []byte, r rest) []byte {
	b = strconv.AppendInt(append(b, `{"at":`...), int64(r.At), 10)
	b = strconv.AppendInt(append(b, `,"until":`...), int64(r.Until), 10)
	return append(b, '}')
}

func appendText(b []byte, s string) []byte {
	for _, c := range []byte(s) {
		if c-' ' > '~'-' ' || c == '"' || c == '\\' {
			quoted, _ := json.Marshal(s) // a string never fails
			return append(b, quoted...)
		}
	}
	b = append(append(b, '"'), s...)
	return append(b, '"')
}
