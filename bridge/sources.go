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

// A container may have several interfaces of ours, on one NIC or on two. Its main table leads
// to most destinations by the first of them. Each interface may send its own address alone, so
// an answer from the second address would be dropped there. So each address of such a
// container has a rule and a table of its own in the container's namespace, which lead out by
// the interface that has the address. A container with one interface has neither.
const (
	sourceTables = 16864000 // and the interface's index: the way out by that interface
	sourceRule   = 32765    // just before the kernel's rule for main
)

// routeBySource has what is sent from each address of ours in the container leave by the
// interface that has it, if there is more than one.
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
		return nil // the others are somebody else's
	}
	rules, err := dump.Whole(func() ([]netlink.Rule, error) { return in.RuleList(netlink.FAMILY_V4) })
	if err != nil {
		return fmt.Errorf("list the routing rules: %w", err)
	}
	for _, r := range rules { // of interfaces that are gone. Other rules of our protocol may be of an azure-vnet in the container
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

// addSourceTable gives an address its table, with all routes that its interface has in the main one,
// and its rule. It may be repeated.
func addSourceTable(in *netlink.Handle, from netip.Addr, index int) error {
	l := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}}
	routes, err := dump.Whole(func() ([]netlink.Route, error) { return in.RouteList(l, netlink.FAMILY_V4) })
	if err != nil {
		return err
	}
	slices.SortStableFunc(routes, func(a, b netlink.Route) int { return len(a.Gw) - len(b.Gw) }) // the next hops' routes first
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
