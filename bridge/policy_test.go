// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// A policy has one id however it is written, and another policy another.
func TestPolicyID(t *testing.T) {
	same := func(a, b Policy, want bool) {
		t.Helper()
		if (a.id() == b.id()) != want {
			t.Errorf("%q and %q have the ids %s and %s", a.text(), b.text(), a.id(), b.id())
		}
	}
	same(Policy{SNAT: true, Direct: prefixes("10.0.0.0/8", "172.16.0.0/12")}, Policy{SNAT: true, Direct: prefixes("172.16.9.9/12", "10.1.0.0/8", "10.0.0.0/8")}, true)
	same(Policy{}, Policy{Direct: prefixes("10.0.0.0/8")}, true)
	same(Policy{}, Policy{SNAT: true}, false)
	same(Policy{SNAT: true}, Policy{SNAT: true, Direct: prefixes()}, false)
}

// ranges spells spans as nft does.
func ranges(list []span) []string {
	out := []string{}
	for _, s := range list {
		at := func(n uint64) netip.Addr {
			return netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
		}
		out = append(out, fmt.Sprintf("%s-%s", at(s.first), at(s.last)))
	}
	return out
}

// What is direct is exactly what was asked for, less what the host routes away.
func TestDirect(t *testing.T) {
	routes := []hostRoute{
		{dst: netip.MustParsePrefix("0.0.0.0/0"), away: true}, // not the VNet's way out, but no statement about 10/8
		{dst: netip.MustParsePrefix("10.8.0.0/16"), away: true},
		{dst: netip.MustParsePrefix("10.8.4.0/24")},                           // back from the VPN
		{dst: netip.MustParsePrefix("10.8.4.7/32"), away: true},               // and to it
		{dst: netip.MustParsePrefix("192.168.0.0/16"), metric: 9, away: true}, // loses
		{dst: netip.MustParsePrefix("192.168.0.0/16"), metric: 1},
	}
	got := ranges(Policy{SNAT: true}.direct(prefixes("20.0.0.0/24"), awaySpans(routes)))
	want := []string{
		"10.0.0.0-10.7.255.255", "10.8.4.0-10.8.4.6", "10.8.4.8-10.8.4.255", "10.9.0.0-10.255.255.255", "20.0.0.0-20.0.0.255",
		"100.64.0.0-100.127.255.255", "172.16.0.0-172.31.255.255", "192.168.0.0-192.168.255.255",
		"224.0.0.0-239.255.255.255", "255.255.255.255-255.255.255.255",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	got = ranges(Policy{SNAT: true, Direct: prefixes("168.63.129.16/31", "169.254.169.254/32")}.direct(nil, nil))
	if diff := cmp.Diff([]string{"168.63.129.17-168.63.129.17", "224.0.0.0-239.255.255.255", "255.255.255.255-255.255.255.255"}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// Each address of a small space is direct, or away, as a look at every route by
// itself says.
func TestSpansAgreeWithRoutes(t *testing.T) {
	prefix := rapid.Custom(func(t *rapid.T) netip.Prefix {
		addr := netip.AddrFrom4([4]byte{255, 255, 255, rapid.Byte().Draw(t, "addr")})
		return netip.PrefixFrom(addr, rapid.IntRange(24, 32).Draw(t, "bits")).Masked()
	})
	route := rapid.Custom(func(t *rapid.T) hostRoute {
		return hostRoute{dst: prefix.Draw(t, "dst"), metric: rapid.IntRange(0, 1000).Draw(t, "metric"), away: rapid.Bool().Draw(t, "away")}
	})
	in := func(list []span, n uint64) bool {
		for _, s := range list {
			if s.first <= n && n <= s.last {
				return true
			}
		}
		return false
	}
	rapid.Check(t, func(t *rapid.T) {
		routes := rapid.SliceOfNDistinct(route, 0, 12, func(r hostRoute) string { return fmt.Sprint(r.dst, r.metric) }).Draw(t, "routes")
		list := rapid.SliceOfN(prefix, 0, 5).Draw(t, "direct")
		away := awaySpans(routes)
		direct := subtract(spans(list...), away)
		for n := range uint64(256) {
			addr := netip.AddrFrom4([4]byte{255, 255, 255, byte(n)})
			best := hostRoute{metric: 1 << 20}
			for _, r := range routes {
				if r.dst.Contains(addr) && (r.dst.Bits() > best.dst.Bits() || !best.dst.IsValid() || r.dst.Bits() == best.dst.Bits() && r.metric < best.metric) {
					best = r
				}
			}
			listed := false
			for _, p := range list {
				listed = listed || p.Contains(addr)
			}
			at := 1<<32 - 256 + n
			if in(away, at) != best.away || in(direct, at) != (listed && !best.away) {
				t.Fatalf("%s: away %v, direct %v; the route is %v, listed %v", addr, in(away, at), in(direct, at), best, listed)
			}
		}
	})
}

func TestPrefixesOfASpan(t *testing.T) {
	for _, c := range []struct {
		span span
		want []netip.Prefix
	}{
		{span{0, 1<<32 - 1}, prefixes("0.0.0.0/0")},
		{span{1<<32 - 1, 1<<32 - 1}, prefixes("255.255.255.255/32")},
		{span{0, 0}, prefixes("0.0.0.0/32")},
		{spanOf(netip.MustParsePrefix("172.17.0.0/16")), prefixes("172.17.0.0/16")},
		{span{0xac110001, 0xac110006}, prefixes("172.17.0.1/32", "172.17.0.2/31", "172.17.0.4/31", "172.17.0.6/32")},
	} {
		if got := c.span.prefixes(); !slices.Equal(got, c.want) {
			t.Errorf("%x: %v, want %v", c.span, got, c.want)
		}
	}
}
