// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/rtnl"
	"azurevnet/internal/dump"
)

// Routing tables and rules of ours.
//
// The first rule leads to a table of containers alone: rules of others, such as those of
// multi-NIC guides (from <host> lookup T), would else take what goes to containers. It
// takes nothing from anybody.
//
// What a container sends must leave by its own NIC, because Azure drops a packet whose
// source address does not belong to the NIC that sends it. The main table does not see to
// that: Azure's default route is on the primary NIC alone, and the route to another NIC's
// subnet is on that NIC. So containers have rules of their own. Those for what is not the
// VNet's stand just before main's, so that a VPN's keep their place.
//
// The rules lead to the NICs' subnets by Azure's gateway. By the main table the host would
// hold a neighbour entry for each address that a container sends to, and a container that
// sends to a thousand absent ones would fill the kernel's one neighbour table (gc_thresh3):
// nobody would reach a new peer any more, nor would the host itself.
const (
	containerTable    = 16863    // a route to each container
	nicTables         = 16863000 // and the NIC's index: the way out by that NIC
	unreachableMetric = 1        // the metric of such a table's route to nowhere, which is for when the other one (0) is gone

	containerRule = 100   // at most: see containerPriority
	hostRule      = 32761 // to what the host has a narrower route to than to a NIC's subnet, such as a pod of another plugin
	subnetRule    = 32762 // to the NICs' subnets
	// Two kinds. Of a second NIC: main, but for its default route, which is the primary NIC's. Of the primary NIC's
	// transparent containers: main, for routes that are longer than a subnet's; lastRule has the rest.
	otherRule = 32763
	outRule   = 32764 // not of the primary NIC, to all the rest
	// Of the primary NIC's transparent containers, to the NICs' subnets. It goes by subnet: where a second NIC has the
	// same one, that NIC's rules must match first, and so have lower numbers.
	lastRule = 32765

	// These are added to the first rule's number, and so are 101 and 102. They come before the rules of wg-quick, which
	// ask main before its tunnel: main leads to the subnets and to Azure's services by the primary NIC.
	secondHostRule   = 1 // of a second NIC: as hostRule, and to the host agent and the metadata service; of every NIC that is gone or down: nowhere
	secondSubnetRule = 2 // of a second NIC: as subnetRule
)

var azureAddrs = []netip.Prefix{netip.MustParsePrefix("168.63.129.16/32"), netip.MustParsePrefix("169.254.169.254/32")}

// containerRoute is a route to a container, in one of the two tables that have it. It has the
// container's MTU: a bridge drops a packet that is too large for a port without a word.
func (a alias) containerRoute(table, link, mtu int) netlink.Route {
	return netlink.Route{Table: table, Dst: ipNet(netip.PrefixFrom(a.addr.Addr(), 32)), LinkIndex: link, Scope: netlink.SCOPE_LINK, Protocol: ourProtocol, MTU: mtu, Type: unix.RTN_UNICAST}
}

// containerTables are where a container's route stands. The main table has it for others
// who look there.
var containerTables = []int{containerTable, unix.RT_TABLE_MAIN}

// putRoute makes the route, in place of another one of ours. One of somebody else's to the
// same destination is not replaced.
func putRoute(r netlink.Route) error {
	err := netlink.RouteAdd(&r)
	if !errors.Is(err, unix.EEXIST) {
		return wrapRoute(r, err)
	}
	same, err := dump.Whole(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: r.Table, Dst: r.Dst}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
	})
	if err != nil {
		return wrapRoute(r, err)
	}
	for _, s := range same {
		if s.Protocol != ourProtocol {
			return fmt.Errorf("a route to %s is there that is not ours (ip route show table %d %s): whoever made it uses that address; end that, or ask for another address", prefixOf(r.Dst), r.Table, prefixOf(r.Dst))
		}
	}
	return wrapRoute(r, netlink.RouteReplace(&r))
}

func wrapRoute(r netlink.Route, err error) error {
	if err != nil {
		return fmt.Errorf("route to %s in table %d: %w", prefixOf(r.Dst), r.Table, err)
	}
	return nil
}

func deleteRoute(r netlink.Route) error {
	if err := netlink.RouteDel(&r); err != nil && !rtnl.IsNotExist(err) {
		return fmt.Errorf("delete the route to %s in table %d: %w", prefixOf(r.Dst), r.Table, err)
	}
	return nil
}

// sameRoute compares what we set of a route.
func sameRoute(a, b netlink.Route) bool {
	return samePlace(a, b) && a.Gw.Equal(b.Gw) && a.MTU == b.MTU
}

// samePlace reports whether one of the two would stand where the other does, or lead by the same link.
func samePlace(a, b netlink.Route) bool {
	return a.Table == b.Table && prefixOf(a.Dst) == prefixOf(b.Dst) && a.Priority == b.Priority && a.LinkIndex == b.LinkIndex
}

// wantedRoutes are all that our protocol number may stand on.
func (v *view) wantedRoutes() []netlink.Route {
	var all []netlink.Route
	for _, e := range v.endpoints {
		if link := v.linkToContainer(e); link != 0 {
			for _, table := range containerTables {
				all = append(all, e.containerRoute(table, link, e.link.MTU))
			}
		}
	}
	for _, mac := range v.macs() {
		gateway, ok := v.wayOut(mac)
		if !ok {
			continue
		}
		index := v.nics[mac].Attrs().Index
		if !v.state.NICs[mac].Primary { // with its link, the route below goes, and main's would lead out by the primary NIC
			all = append(all, netlink.Route{Table: nicTables + index, Dst: ipNet(prefixOf(nil)), Priority: unreachableMetric, Protocol: ourProtocol, Type: unix.RTN_UNREACHABLE})
		}
		// The kernel takes no route by a link that is down. When the link is up, a round adds it.
		if v.nics[mac].Attrs().Flags&net.FlagUp != 0 {
			all = append(all, netlink.Route{Table: nicTables + index, Dst: ipNet(prefixOf(nil)), LinkIndex: index, Gw: gateway.AsSlice(),
				Flags: int(netlink.FLAG_ONLINK), Protocol: ourProtocol, Type: unix.RTN_UNICAST})
		}
	}
	return all
}

// linkToContainer is the index of the link that leads to the endpoint; 0 while its bridge is gone.
func (v *view) linkToContainer(e endpoint) int {
	if e.bridge == "" {
		return e.link.Index
	}
	if b := v.bridge(e.nic); b != nil && b.Name == e.bridge {
		return b.Index
	}
	return 0
}

// wayOut is the gateway of a NIC whose containers have rules of their own; not ok for any other
// NIC.
func (v *view) wayOut(mac string) (gateway netip.Addr, ok bool) {
	n, subnets := v.state.NICs[mac], v.subnets(mac)
	if v.nics[mac] == nil || n.Bridge == "" && !n.Transparent || len(subnets) == 0 {
		return netip.Addr{}, false
	}
	return subnets[0].Addr().Next(), true
}

// isGoneOrDown reports whether the NIC is gone or down.
func (v *view) isGoneOrDown(mac string) bool {
	nic := v.nics[mac]
	return nic == nil || nic.Attrs().Flags&net.FlagUp == 0
}

// needsOwnRules reports whether each transparent endpoint of the NIC has rules: a rule that names azv+ would mean a
// link of that very name. The primary NIC's have rules by their subnet instead, which are as many for 250
// containers as for one.
func (s *hostState) needsOwnRules(mac string) bool {
	return s.NICs[mac].Transparent && !s.NICs[mac].Primary
}

// containerPriority is that of the rule that leads to containers: before every rule of others but
// the local table's. A rule that is added without a priority comes before all that are there. If
// somebody adds a rule before ours, ours are added again below that rule, and the old ones deleted. behind is how many
// numbers a rule is behind the first one. With number 0, they stand behind the local table's, in the order in which
// they were added.
func (v *view) containerPriority(behind int) int {
	return max(0, min(containerRule, v.lowestOtherPriority-1-secondSubnetRule)+behind)
}

// wantedRules are all that our protocol number may stand on.
func (v *view) wantedRules() []netlink.Rule {
	w := &ruleList{v: v}
	for _, mac := range v.macs() {
		w.subnets = append(w.subnets, v.subnets(mac)...)
	}
	slices.SortFunc(w.subnets, netip.Prefix.Compare)
	w.subnets = slices.Compact(w.subnets)
	if v.state.isAsked() {
		w.addRule(v.containerPriority(0), containerTable, -1, "", everywhere, everywhere)
	}
	for _, mac := range v.macs() {
		if bridge := v.state.NICs[mac].Bridge; bridge != "" {
			w.addWayOut(mac, bridge, everywhere)
			w.addNowhere(mac, bridge)
		}
		if n := v.state.NICs[mac]; n.Primary && n.Transparent {
			w.addForSubnets(mac)
		}
	}
	for _, e := range v.endpoints {
		if e.bridge != "" {
			continue
		}
		if v.state.needsOwnRules(e.nic) {
			w.addWayOut(e.nic, e.link.Name, netip.PrefixFrom(e.addr.Addr(), 32))
		}
		w.addNowhere(e.nic, e.link.Name)
	}
	return w.rules
}

// everywhere is no condition of a rule.
var everywhere = netip.Prefix{}

// ruleList collects the rules that a view wants.
type ruleList struct {
	v       *view
	subnets []netip.Prefix // of all NICs
	rules   []netlink.Rule
}

// addRule adds a rule. The rule ignores routes of its table whose prefix has suppress bits or fewer; -1: it ignores none.
// A rule without a table makes the destination unreachable.
func (w *ruleList) addRule(priority, table, suppress int, iif string, from, to netip.Prefix) {
	r := netlink.NewRule()
	r.Family, r.Protocol, r.Priority, r.Table, r.SuppressPrefixlen, r.IifName = unix.AF_INET, ourProtocol, priority, table, suppress, iif
	if table == unix.RT_TABLE_UNSPEC {
		r.Type = unix.RTN_UNREACHABLE
	}
	if from != everywhere {
		r.Src = ipNet(from)
	}
	if to != everywhere {
		r.Dst = ipNet(to)
	}
	w.rules = append(w.rules, *r)
}

// addNowhere adds a rule for a NIC that is gone or down. Containers behind the link then reach only containers.
func (w *ruleList) addNowhere(mac, link string) {
	if w.v.isGoneOrDown(mac) {
		w.addRule(w.v.containerPriority(secondHostRule), unix.RT_TABLE_UNSPEC, -1, link, everywhere, everywhere)
	}
}

// addWayOut adds the rules that lead packets from containers of the NIC out by that NIC. The packets come in by the link.
func (w *ruleList) addWayOut(mac, link string, from netip.Prefix) {
	v := w.v
	if _, ok := v.wayOut(mac); !ok {
		return
	}
	table, primary := nicTables+v.nics[mac].Attrs().Index, v.state.NICs[mac].Primary
	host, subnet := hostRule, subnetRule
	if !primary {
		host, subnet = v.containerPriority(secondHostRule), v.containerPriority(secondSubnetRule)
		for _, to := range azureAddrs {
			w.addRule(host, table, -1, link, from, to)
		}
	}
	for _, to := range w.subnets {
		w.addRule(host, unix.RT_TABLE_MAIN, to.Bits(), link, from, to)
		w.addRule(subnet, table, -1, link, from, to)
	}
	if !primary {
		w.addRule(otherRule, unix.RT_TABLE_MAIN, 0, link, from, everywhere)
		w.addRule(outRule, table, -1, link, from, everywhere)
	}
}

// addForSubnets adds the rules that lead packets from all transparent containers of the primary NIC out by that NIC. The
// rules match the subnet of the source address. Two kinds of packets have such a source and keep their own way: those
// that the host itself sends, for which the rules see the link lo, and those that the host forwards from its NICs.
func (w *ruleList) addForSubnets(mac string) {
	if _, ok := w.v.wayOut(mac); !ok {
		return
	}
	for _, from := range w.v.subnets(mac) {
		for _, to := range w.subnets {
			w.addRule(otherRule, unix.RT_TABLE_MAIN, to.Bits(), "", from, to)
			for _, link := range append([]string{"lo"}, w.v.rulesetConfig().NICs...) {
				w.addRule(otherRule, unix.RT_TABLE_MAIN, -1, link, from, to)
			}
			w.addRule(lastRule, nicTables+w.v.nics[mac].Attrs().Index, -1, "", from, to)
		}
	}
}

func sameRule(a, b netlink.Rule) bool {
	return a.Priority == b.Priority && a.Table == b.Table && a.SuppressPrefixlen == b.SuppressPrefixlen && a.IifName == b.IifName &&
		prefixOf(a.Src) == prefixOf(b.Src) && prefixOf(a.Dst) == prefixOf(b.Dst)
}

func ruleText(r netlink.Rule) string {
	text := fmt.Sprintf("%d:", r.Priority)
	if r.Src != nil {
		text += " from " + prefixOf(r.Src).String()
	}
	if r.Dst != nil {
		text += " to " + prefixOf(r.Dst).String()
	}
	if r.IifName != "" {
		text += " iif " + r.IifName
	}
	if r.Table <= unix.RT_TABLE_UNSPEC {
		return text + " unreachable"
	}
	return fmt.Sprintf("%s lookup %d", text, r.Table)
}
