// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// The addresses that mean the same on every Azure VM.
var (
	hostAgent = netip.MustParseAddr("168.63.129.16")   // answers secondaries un-SNATed: always direct
	imds      = netip.MustParseAddr("169.254.169.254") // drops secondaries: never direct
)

// defaultDirect is reached without SNAT when a policy names nothing; the NIC's
// subnets come on top.
var defaultDirect = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("100.64.0.0/10"),
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.168.0.0/16"),
}

// noRoute is never routed, so never SNATed: it reaches the bridge's other ports
// and ends there.
var noRoute = []netip.Prefix{
	netip.MustParsePrefix("224.0.0.0/4"),
	netip.MustParsePrefix("255.255.255.255/32"),
}

// text is the policy in one spelling, whatever the order its prefixes came in.
// Without SNAT nothing needs a list of what is reached without it.
func (p Policy) text() string {
	if p.Internal {
		return "internal"
	}
	if !p.SNAT {
		return "snat=off"
	}
	if p.Direct == nil {
		return "snat=on"
	}
	var words []string
	for _, d := range p.Direct {
		words = append(words, d.Masked().String())
	}
	slices.Sort(words)
	return "snat=on direct=" + strings.Join(slices.Compact(words), ",")
}

// id names the policy in aliases, chains and host.json.
func (p Policy) id() string {
	sum := sha256.Sum256([]byte(p.text()))
	return hex.EncodeToString(sum[:4])
}

// Learn writes down the policy of a network whose endpoints may stand already:
// should host.json have been lost, links tell its id and no more. The table then
// has what its endpoints need. A policy that is known costs a read.
func (h *Host) Learn(ctx context.Context, p Policy) error {
	s, err := h.state()
	if err != nil {
		return err
	}
	if _, known := s.Policies[p.id()]; known {
		return nil
	}
	unlock, err := h.lockExclusive(ctx, "learn a policy")
	if err != nil {
		return err
	}
	defer unlock()
	links, err := readLinks()
	if err != nil {
		return err
	}
	if err := h.note(ctx, p, links); err != nil {
		return err
	}
	for _, b := range links.bridges() {
		if _, err := h.syncTable(b); err != nil {
			return err
		}
	}
	return nil
}

// internalID is the id of every internal network's policy.
var internalID = Policy{Internal: true}.id()

// manyPolicies is how many a host may know that no endpoint has: each has its chain.
const manyPolicies = 32

// note writes a policy down. Where many are known, those that no link has are
// forgotten: whose network has no endpoint learns it again.
func (h *Host) note(ctx context.Context, p Policy, links linkTable) error {
	used := map[string]bool{}
	for _, l := range links {
		if a, ok := endpointOf(l); ok {
			used[a.policy] = true
		}
	}
	err := h.updateState(ctx, "learn a policy", func(s *hostState) error {
		if len(s.Policies) >= manyPolicies {
			maps.DeleteFunc(s.Policies, func(id string, _ Policy) bool { return !used[id] })
		}
		s.Policies[p.id()] = p
		return nil
	})
	if err != nil {
		return fmt.Errorf("write the policy down: %w", err)
	}
	return nil
}

// policyOf finds a policy by its id. host.json may be lost while links stand:
// the policies without a list are known by their ids alone, and any other is
// taken for the default.
func policyOf(policies map[string]Policy, id string) Policy {
	if p, ok := policies[id]; ok {
		return p
	}
	for _, p := range []Policy{{Internal: true}, {}} {
		if p.id() == id {
			return p
		}
	}
	return Policy{SNAT: true}
}

// span is the addresses from first to last, both included. uint64, so that what
// follows 255.255.255.255 has a number.
type span struct{ first, last uint64 }

func ip4Number(a netip.Addr) uint64 {
	b := a.As4()
	return uint64(binary.BigEndian.Uint32(b[:]))
}

func spanOf(p netip.Prefix) span {
	first := ip4Number(p.Masked().Addr())
	return span{first, first + 1<<(32-p.Bits()) - 1}
}

// spans is the prefixes' IPv4 addresses, ascending, with no two that touch.
func spans(prefixes ...netip.Prefix) []span {
	var all []span
	for _, p := range prefixes {
		if p.Addr().Is4() {
			all = append(all, spanOf(p))
		}
	}
	return merge(all)
}

func merge(all []span) []span {
	slices.SortFunc(all, func(a, b span) int { return cmp.Compare(a.first, b.first) })
	var out []span
	for _, s := range all {
		if n := len(out); n > 0 && s.first <= out[n-1].last+1 {
			out[n-1].last = max(out[n-1].last, s.last)
			continue
		}
		out = append(out, s)
	}
	return out
}

// subtract is a without b; both are ascending and disjoint.
func subtract(a, b []span) []span {
	var out []span
	for _, s := range a {
		for len(b) > 0 && b[0].last < s.first {
			b = b[1:]
		}
		for _, cut := range b {
			if cut.first > s.last || s.first > s.last {
				break
			}
			if cut.first > s.first {
				out = append(out, span{s.first, cut.first - 1})
			}
			s.first = cut.last + 1
		}
		if s.first <= s.last {
			out = append(out, s)
		}
	}
	return out
}

// hostRoute is where the host sends a prefix.
type hostRoute struct {
	dst    netip.Prefix
	metric int
	away   bool // through a link that is neither a bridge of ours nor its NIC
}

// awaySpans is what the routes send away, the most specific route deciding.
// Default routes do not count: they say where the rest goes, not whose a
// prefix is.
func awaySpans(routes []hostRoute) []span {
	// Prefixes nest or are apart, so in this order each lies in those on the
	// stack that have not ended.
	slices.SortFunc(routes, func(a, b hostRoute) int {
		return cmp.Or(a.dst.Addr().Compare(b.dst.Addr()), cmp.Compare(a.dst.Bits(), b.dst.Bits()), cmp.Compare(b.metric, a.metric))
	})
	var out []span
	type open struct {
		last uint64
		away bool
	}
	stack := []open{{1<<32 - 1, false}}
	at := uint64(0)
	upTo := func(end uint64) { // paints [at, end)
		if top := stack[len(stack)-1]; top.away && end > at {
			out = append(out, span{at, end - 1})
		}
		at = max(at, end)
	}
	for _, r := range routes {
		if !r.dst.Addr().Is4() || r.dst.Bits() == 0 {
			continue
		}
		s := spanOf(r.dst)
		for stack[len(stack)-1].last < s.first {
			upTo(stack[len(stack)-1].last + 1)
			stack = stack[:len(stack)-1]
		}
		upTo(s.first)
		stack = append(stack, open{s.last, r.away})
	}
	for len(stack) > 0 {
		upTo(stack[len(stack)-1].last + 1)
		stack = stack[:len(stack)-1]
	}
	return merge(out)
}

// direct is what a network of policy p reaches without SNAT, less the host
// agent, whose ports are looked at apart. subnets are the NIC's.
func (p Policy) direct(subnets []netip.Prefix, away []span) []span {
	list := p.Direct
	if list == nil {
		list = slices.Concat(defaultDirect, subnets)
	}
	never := spans(netip.PrefixFrom(imds, 32), netip.PrefixFrom(hostAgent, 32))
	return subtract(subtract(spans(slices.Concat(list, noRoute)...), away), never)
}
