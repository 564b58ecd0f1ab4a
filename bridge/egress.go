// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Azure's default route stands on the primary NIC alone. What endpoints of
// another NIC's bridge send up to be SNATed, and the answers to it, must use
// that NIC: Azure drops an address that leaves by a NIC that has it not.
const (
	egressProtocol = 168      // marks rules and routes as ours
	egressPriority = 16863    // of the rules: before main and whatever else knows no mark of ours
	egressTables   = 16863000 // the number of a bridge's table, less the index of its NIC
)

// egress is the policy routing of one bridge. The zero value but for the
// bridge's name has none.
type egress struct {
	bridge string
	table  int
	link   int          // the bridge's index
	subnet netip.Prefix // of its NIC; the first address is Azure's gateway
}

// isEgress tells a rule that egress made.
func isEgress(rule message) bool {
	v := rules.attr(rule, unix.FRA_PROTOCOL)
	return len(v) == 1 && v[0] == egressProtocol
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
	e := egress{bridge: m.name}
	if subnets := in.subnets[m.name]; in.egress[m.name] && len(subnets) > 0 {
		e = egress{m.name, egressTables + m.nic.index, m.bridge.index, subnets[0]}
		// Strict filtering would ask the main table where answers from the
		// internet should have come in.
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

// sync makes the kernel's policy routing of the bridge e, routes before the
// rules that lead to them, and reports whether it had to.
func (e egress) sync() (changed bool, err error) {
	have, err := whole(func() ([]netlink.Rule, error) { return netlink.RuleList(unix.AF_INET) })
	if err != nil {
		return false, fmt.Errorf("list rules: %w", err)
	}
	stand := map[string]bool{}
	for _, r := range have {
		if r.Protocol != egressProtocol || r.IifName != e.bridge {
			continue
		}
		stand[ruleKey(r)] = true
	}
	if changed, err = e.syncRoutes(); err != nil {
		return changed, err
	}
	want := map[string]bool{}
	for _, r := range e.rules() {
		want[ruleKey(*r)] = true
		if !stand[ruleKey(*r)] {
			changed = true
			if err := netlink.RuleAdd(r); err != nil {
				return changed, fmt.Errorf("add the rule that what comes from %s leaves by its NIC: %w", e.bridge, err)
			}
		}
	}
	for _, r := range have {
		if r.Protocol != egressProtocol || r.IifName != e.bridge || want[ruleKey(r)] {
			continue
		}
		changed = true
		if err := netlink.RuleDel(&r); err != nil {
			return changed, fmt.Errorf("delete the rule that what comes from %s leaves by its NIC: %w", e.bridge, err)
		}
	}
	return changed, nil
}

// rules lead what is marked, and answers to it, to the bridge's own table.
func (e egress) rules() []*netlink.Rule {
	if e.table == 0 {
		return nil
	}
	rule := func() *netlink.Rule {
		r := netlink.NewRule()
		r.Family, r.Priority, r.Table, r.IifName, r.Protocol = unix.AF_INET, egressPriority, e.table, e.bridge, egressProtocol
		return r
	}
	mask := uint32(egressMark)
	marked, home := rule(), rule()
	marked.Mark, marked.Mask = egressMark, &mask
	home.Dst = ipNet(e.subnet) // else a NIC in the same subnet may be taken for it
	return []*netlink.Rule{marked, home}
}

func ruleKey(r netlink.Rule) string {
	mask := uint32(0)
	if r.Mask != nil {
		mask = *r.Mask
	}
	return fmt.Sprintf("%d %d %x/%x %v", r.Priority, r.Table, r.Mark, mask, r.Dst)
}

// syncRoutes makes the table's routes. The kernel drops them with the bridge.
func (e egress) syncRoutes() (changed bool, err error) {
	if e.table == 0 {
		return false, nil
	}
	have, err := whole(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(unix.AF_INET, &netlink.Route{Table: e.table}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return false, fmt.Errorf("list routes of table %d: %w", e.table, err)
	}
	stand := map[string]bool{}
	for _, r := range have {
		stand[routeKey(r)] = true
	}
	home := netlink.Route{LinkIndex: e.link, Table: e.table, Protocol: egressProtocol, Scope: netlink.SCOPE_LINK, Dst: ipNet(e.subnet)}
	out := netlink.Route{LinkIndex: e.link, Table: e.table, Protocol: egressProtocol, Flags: int(netlink.FLAG_ONLINK),
		Dst: &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, Gw: e.subnet.Addr().Next().AsSlice()}
	for _, r := range []netlink.Route{home, out} {
		if stand[routeKey(r)] {
			continue
		}
		changed = true
		if err := netlink.RouteReplace(&r); err != nil {
			return changed, fmt.Errorf("route %s by %s in table %d: %w", r.Dst, e.bridge, e.table, err)
		}
	}
	return changed, nil
}

func routeKey(r netlink.Route) string { return fmt.Sprintf("%v %v %d", r.Dst, r.Gw, r.LinkIndex) }
