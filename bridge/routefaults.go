// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/rtnl"
)

// routingFaults are routing rules and routes of the NICs' tables that are missing, and rules of ours that
// nothing asks for.
func routingFaults(v *view) (all []fault) {
	want := v.wantedRules()
	for _, r := range v.wantedRoutes() {
		if r.Table > nicTables && !slices.ContainsFunc(v.ourRoutes, func(o netlink.Route) bool { return sameRoute(r, o) }) {
			way := "out by " + v.nameOf(r.LinkIndex)
			if r.Type == unix.RTN_UNREACHABLE {
				way = "to nowhere"
			}
			all = append(all, fault{what: fmt.Sprintf("no route %s in table %d", way, r.Table), mend: func() error { return putRoute(r) }})
		}
	}
	for _, r := range want {
		if !slices.ContainsFunc(v.ourRoutingRules, func(o netlink.Rule) bool { return sameRule(r, o) }) {
			all = append(all, fault{what: "no routing rule " + ruleText(r), mend: func() error {
				if err := netlink.RuleAdd(&r); err != nil && !errors.Is(err, unix.EEXIST) {
					return fmt.Errorf("add the routing rule %s: %w", ruleText(r), err)
				}
				return nil
			}})
		}
	}
	seen := []netlink.Rule{}
	for _, r := range v.ourRoutingRules {
		same := func(o netlink.Rule) bool { return sameRule(r, o) }
		if !slices.ContainsFunc(want, same) || slices.ContainsFunc(seen, same) {
			all = append(all, fault{what: "the routing rule " + ruleText(r) + " is nobody's", mend: func() error {
				if err := netlink.RuleDel(&r); err != nil && !rtnl.IsNotExist(err) {
					return fmt.Errorf("delete the routing rule %s: %w", ruleText(r), err)
				}
				return nil
			}})
		}
		seen = append(seen, r)
	}
	return all
}

// strayFaults are routes and neighbour entries with our protocol number that no endpoint needs. In bridge mode
// a container's route names the bridge, so the kernel does not delete it with the host end.
func strayFaults(v *view) (all []fault) {
	routes := v.wantedRoutes()
	for _, r := range v.ourRoutes {
		if !slices.ContainsFunc(routes, func(w netlink.Route) bool { return samePlace(w, r) }) {
			all = append(all, fault{what: fmt.Sprintf("the route to %s in table %d is nobody's", prefixOf(r.Dst), r.Table), mend: func() error { return deleteRoute(r) }})
		}
	}
	for _, n := range v.neighbours {
		wanted := slices.ContainsFunc(v.endpoints, func(e endpoint) bool { return e.addr.Addr() == n.Addr && v.linkToContainer(e) == n.Link })
		if n.Protocol == ourProtocol && !wanted {
			all = append(all, fault{what: fmt.Sprintf("the neighbour entry of %s on %s is nobody's", n.Addr, v.nameOf(n.Link)), mend: func() error {
				if err := rtnl.DeleteNeighbour(n); err != nil && !rtnl.IsNotExist(err) {
					return err
				}
				return nil
			}})
		}
	}
	return all
}

// mendRouting mends the routing rules and the NICs' tables alone. An attach on a second NIC needs them at once.
func (h *Host) mendRouting() error {
	v, err := h.readView()
	if err != nil {
		return err
	}
	for _, f := range routingFaults(v) {
		if err := f.mend(); err != nil {
			return err
		}
	}
	return nil
}
