// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/rtnl"
	"azurevnet/internal/dump"
)

// A container may have several interfaces of ours, on one NIC or on two. Its table main leads to most
// destinations by the first of them. But an interface may send only with its own address, so an answer from the
// second address would be dropped. So each address of such a container has a rule and a table in the
// container's namespace, which lead out by the interface with the address. A container with one interface has
// neither.
const (
	sourceTables = 16864000 // plus the interface's index: the table with the way out by that interface
	sourceRule   = 32765    // just before the kernel's rule for main
)

// routeBySource sees to it that packets from each address of ours in the container leave by the interface with
// that address. It does nothing if the container has one interface.
func (a *attacher) routeBySource(in *netlink.Handle) error {
	addrs, err := dump.Whole(func() ([]netlink.Addr, error) { return in.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return fmt.Errorf("list the addresses: %w", err)
	}
	other := func(o netlink.Addr) bool { return o.LinkIndex != a.containerEndIndex && !o.IP.IsLoopback() }
	if !slices.ContainsFunc(addrs, other) {
		return nil
	}
	v, err := a.host.readEndpoints()
	if err != nil {
		return err
	}
	indexes := map[netip.Addr]int{a.wish.Addr.Addr(): a.containerEndIndex}
	for _, e := range v.endpoints {
		if e.link.NetNsID == a.nsID {
			indexes[e.addr.Addr()] = e.link.ParentIndex
		}
	}
	if len(indexes) == 1 {
		return nil // the other interfaces are not ours
	}
	rules, err := dump.Whole(func() ([]netlink.Rule, error) { return in.RuleList(netlink.FAMILY_V4) })
	if err != nil {
		return fmt.Errorf("list the routing rules: %w", err)
	}
	for _, r := range rules { // delete those of interfaces that are gone. An azure-vnet in the container may have other rules with our protocol number
		ours := r.Protocol == ourProtocol && r.Priority == sourceRule && r.Table > sourceTables && r.Src != nil
		if ours && indexes[prefixOf(r.Src).Addr()] != r.Table-sourceTables {
			if err := in.RuleDel(&r); err != nil && !rtnl.IsNotExist(err) {
				return fmt.Errorf("delete the routing rule %s: %w", ruleText(r), err)
			}
		}
	}
	for addr, index := range indexes {
		if err := addSourceTable(in, addr, index); err != nil {
			return fmt.Errorf("the way of answers from %s: %w", addr, err)
		}
	}
	return nil
}

// addSourceTable adds a table for an address, with all routes that its interface has in main, and the rule that
// leads to the table. It can be repeated.
func addSourceTable(in *netlink.Handle, from netip.Addr, index int) error {
	l := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}}
	routes, err := dump.Whole(func() ([]netlink.Route, error) { return in.RouteList(l, netlink.FAMILY_V4) })
	if err != nil {
		return err
	}
	slices.SortStableFunc(routes, func(a, b netlink.Route) int { return len(a.Gw) - len(b.Gw) }) // routes without a gateway first, since the gateways must be reachable
	for _, r := range routes {
		way := netlink.Route{Table: sourceTables + index, LinkIndex: index, Dst: r.Dst, Gw: r.Gw, Scope: r.Scope, Src: r.Src, MTU: r.MTU, AdvMSS: r.AdvMSS,
			Protocol: ourProtocol, Type: unix.RTN_UNICAST}
		if r.Gw != nil {
			way.SetFlag(netlink.FLAG_ONLINK)
		}
		if err := in.RouteReplace(&way); err != nil {
			return fmt.Errorf("route to %s: %w", prefixOf(r.Dst), err)
		}
	}
	rule := netlink.NewRule()
	rule.Family, rule.Protocol, rule.Priority, rule.Table, rule.Src = unix.AF_INET, ourProtocol, sourceRule, sourceTables+index, ipNet(netip.PrefixFrom(from, 32))
	if err := in.RuleAdd(rule); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("routing rule: %w", err)
	}
	return nil
}

// TablesOfOthers returns the routing tables in a container to which a rule of another program, such as the chained CNI
// plugin sbr, leads all packets from the address. Tables of ours are not among them: they are copies of what is in main.
func TablesOfOthers(in *netlink.Handle, from netip.Addr) (tables []int, err error) {
	rules, err := dump.Whole(func() ([]netlink.Rule, error) { return in.RuleList(netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list the routing rules: %w", err)
	}
	for _, r := range rules {
		all := netlink.Rule{Priority: r.Priority, Table: r.Table, SuppressPrefixlen: -1, Src: ipNet(netip.PrefixFrom(from, 32))}
		if r.Protocol != ourProtocol && !isForSomePackets(r) && sameRule(r, all) {
			tables = append(tables, r.Table)
		}
	}
	return tables, nil
}

// isForSomePackets reports whether a rule asks for more than addresses and a link by which packets come.
func isForSomePackets(r netlink.Rule) bool {
	return r.Invert || r.Mark != 0 || r.Mask != nil && *r.Mask != 0 || r.OifName != "" || r.Tos != 0 || r.TunID != 0 || r.IPProto != 0 ||
		r.Sport != nil || r.Dport != nil || r.UIDRange != nil || r.Goto >= 0 || r.SuppressIfgroup >= 0
}
