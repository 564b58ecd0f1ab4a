// Copyright (c) The azure-vnet authors. MIT licence.

package ruleset

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"slices"
)

// addrRange is the IPv4 addresses from first to last, both included. The numbers are uint64, so that the
// address behind 255.255.255.255 has a number too.
type addrRange struct{ first, last uint64 }

// rangesOf returns the addresses of the prefixes in ascending order. It joins ranges that overlap or touch.
func rangesOf(prefixes ...netip.Prefix) []addrRange {
	var all []addrRange
	for _, p := range prefixes {
		if !p.Addr().Is4() {
			continue
		}
		b := p.Masked().Addr().As4()
		first := uint64(binary.BigEndian.Uint32(b[:]))
		all = append(all, addrRange{first, first + 1<<(32-p.Bits()) - 1})
	}
	slices.SortFunc(all, func(a, b addrRange) int { return cmp.Compare(a.first, b.first) })
	var out []addrRange
	for _, s := range all {
		if n := len(out); n > 0 && s.first <= out[n-1].last+1 {
			out[n-1].last = max(out[n-1].last, s.last)
			continue
		}
		out = append(out, s)
	}
	return out
}

// subtractRanges returns the addresses of a that are not in b. Both are ascending and do not overlap.
func subtractRanges(a, b []addrRange) []addrRange {
	var out []addrRange
	for _, s := range a {
		for _, cut := range b {
			if cut.last < s.first || cut.first > s.last || s.first > s.last {
				continue
			}
			if cut.first > s.first {
				out = append(out, addrRange{s.first, cut.first - 1})
			}
			s.first = cut.last + 1
		}
		if s.first <= s.last {
			out = append(out, s)
		}
	}
	return out
}
