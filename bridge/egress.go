// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Azure's default route stands on the primary NIC alone. What endpoints of
// another NIC's bridge send through the host, and what the host gives back to
// them, must use that NIC: Azure drops an address that leaves by a NIC that has
// it not.
const (
	egressPriority = 16863    // of the rules: before main, and after local
	egressTables   = 16863000 // the number of a bridge's table, less the index of its NIC
)

// egress is the policy routing of one bridge: all that comes up from it and is
// not for the host leaves by it, but for what the host routes to other links.
type egress struct {
	bridge string
	table  int
	link   int          // the bridge's index
	subnet netip.Prefix // of its NIC; the first address is Azure's gateway. Zero: no such routing
	away   []span       // left to the host's other routes
}

// isEgress tells a rule that egress made.
func isEgress(rule message) bool {
	v := rules.attr(rule, unix.FRA_PROTOCOL)
	return len(v) == 1 && v[0] == ourProtocol
}

// egress is the step that lets the bridge's endpoints leave by its NIC.
func (m *move) egress(ctx context.Context) error {
	b, err := m.asBridge()
	if err != nil {
		return err
	}
	in, err := m.h.tableInput(b)
	if err != nil {
		return err
	}
	e := egress{bridge: m.name, table: egressTables + m.nic.index}
	if subnets := in.subnets[m.name]; in.egress[m.name] && len(subnets) > 0 {
		e.link, e.subnet = m.bridge.index, subnets[0]
		e.away = merge(append(in.away, spans(netip.PrefixFrom(imds, 32))...)) // IMDS answers on the primary NIC
		// Strict filtering would look for answers from the internet on the
		// primary NIC.
		if _, err := m.h.setSysctl("ipv4/conf/"+m.name+"/rp_filter", "2"); err != nil {
			return fmt.Errorf("let answers come in by %s: %w", m.name, err)
		}
	}
	changed, err := e.sync()
	if changed {
		m.mend("the routing of what leaves by %s was not as it should be", m.name)
	}
	return err
}

// sync makes the kernel's policy routing of the bridge e, and reports whether it
// had to. The rule comes after the routes that it leads to, and goes before them.
func (e egress) sync() (changed bool, err error) {
	for _, part := range []func() (bool, error){e.dropRules, e.syncRoutes, e.addRule} {
		did, err := part()
		if changed = changed || did; err != nil {
			return changed, err
		}
	}
	return changed, nil
}

// rules are those that egress made for the bridge.
func (e egress) rules() ([]netlink.Rule, error) {
	all, err := whole(func() ([]netlink.Rule, error) { return netlink.RuleList(unix.AF_INET) })
	if err != nil {
		return nil, fmt.Errorf("list rules: %w", err)
	}
	return slices.DeleteFunc(all, func(r netlink.Rule) bool { return r.Protocol != ourProtocol || r.IifName != e.bridge }), nil
}

func (e egress) right(r netlink.Rule) bool {
	return e.subnet.IsValid() && r.Table == e.table && r.Priority == egressPriority
}

func (e egress) dropRules() (changed bool, err error) {
	all, err := e.rules()
	if err != nil {
		return false, err
	}
	for _, r := range all {
		if e.right(r) {
			continue
		}
		changed = true
		if err := netlink.RuleDel(&r); err != nil {
			return changed, fmt.Errorf("delete the rule for what comes from %s: %w", e.bridge, err)
		}
	}
	return changed, nil
}

func (e egress) addRule() (changed bool, err error) {
	all, err := e.rules()
	if err != nil || !e.subnet.IsValid() || slices.ContainsFunc(all, e.right) {
		return false, err
	}
	r := netlink.NewRule()
	r.Family, r.Priority, r.Table, r.IifName, r.Protocol = unix.AF_INET, egressPriority, e.table, e.bridge, ourProtocol
	if err := netlink.RuleAdd(r); err != nil {
		return true, fmt.Errorf("add the rule for what comes from %s: %w", e.bridge, err)
	}
	return true, nil
}

// routes are those of the bridge's table. The subnet's is here too, else another
// NIC in the same subnet may be taken.
func (e egress) routes() []netlink.Route {
	if !e.subnet.IsValid() {
		return nil
	}
	route := netlink.Route{Table: e.table, Protocol: ourProtocol, Family: unix.AF_INET}
	home, out := route, route
	home.LinkIndex, home.Scope, home.Type, home.Dst = e.link, netlink.SCOPE_LINK, unix.RTN_UNICAST, ipNet(e.subnet)
	out.LinkIndex, out.Type, out.Flags, out.Gw = e.link, unix.RTN_UNICAST, int(netlink.FLAG_ONLINK), e.subnet.Addr().Next().AsSlice()
	out.Dst = &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	all := []netlink.Route{home, out}
	for _, s := range e.away {
		for _, p := range s.prefixes() {
			route.Type, route.Dst = unix.RTN_THROW, ipNet(p)
			all = append(all, route)
		}
	}
	return all
}

func (e egress) syncRoutes() (changed bool, err error) {
	have, err := whole(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(unix.AF_INET, &netlink.Route{Table: e.table}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return false, fmt.Errorf("list routes of table %d: %w", e.table, err)
	}
	want := e.routes()
	for _, r := range want {
		if slices.ContainsFunc(have, func(h netlink.Route) bool { return routeKey(h) == routeKey(r) }) {
			continue
		}
		changed = true
		if err := netlink.RouteReplace(&r); err != nil {
			return changed, fmt.Errorf("route %s in table %d: %w", r.Dst, e.table, err)
		}
	}
	for _, h := range have {
		if slices.ContainsFunc(want, func(r netlink.Route) bool { return routeKey(r) == routeKey(h) }) ||
			slices.ContainsFunc(want, func(r netlink.Route) bool { return r.Dst.String() == h.Dst.String() }) { // replaced
			continue
		}
		changed = true
		if err := netlink.RouteDel(&h); err != nil && !errors.Is(err, unix.ESRCH) {
			return changed, fmt.Errorf("delete route %s of table %d: %w", h.Dst, e.table, err)
		}
	}
	return changed, nil
}

func routeKey(r netlink.Route) string {
	return fmt.Sprintf("%v %v %d %d", r.Dst, r.Gw, r.LinkIndex, r.Type)
}

// prefixes are the addresses of s, as few as can be.
func (s span) prefixes() []netip.Prefix {
	var out []netip.Prefix
	for at := s.first; at <= s.last; {
		size := uint64(1) << min(bits.TrailingZeros64(at|1<<32), bits.Len64(s.last-at+1)-1)
		ip := netip.AddrFrom4([4]byte{byte(at >> 24), byte(at >> 16), byte(at >> 8), byte(at)})
		out = append(out, netip.PrefixFrom(ip, 33-bits.Len64(size)))
		at += size
	}
	return out
}
