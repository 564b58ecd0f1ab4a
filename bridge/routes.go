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

// Our routing tables, and the priorities of our routing rules. A lower number is asked first.
//
// The first rule leads to a table of containers alone. Without it, rules of others would take the packets to
// containers, such as "from <host> lookup T" in guides for several NICs. The table has routes to containers
// only, so the rule takes nothing from anybody.
//
// A packet of a container must leave by the container's NIC, because Azure drops a packet whose source address
// does not belong to the NIC that sends it. The table main does not see to this: Azure's default route is on
// the primary NIC, and the route to another NIC's subnet is on that NIC. So there are rules for packets from
// containers. Those for destinations outside of the VNet are just before main's rule, so that a VPN's rules
// keep their place.
//
// The rules lead to the NICs' subnets by Azure's gateway. By main, the host would hold a neighbour entry for
// each address that a container sends to. A container that sends to a thousand absent addresses would fill the
// kernel's one neighbour table (gc_thresh3). Then neither containers nor the host would reach a new peer.
const (
	containerTable    = 16863    // has a route to each container
	nicTables         = 16863000 // plus the NIC's index: the table with the way out by that NIC
	unreachableMetric = 1        // metric of the unreachable route in such a table. It counts only while the route with metric 0 is gone

	containerRule = 100 // to containers. At most: see containerPriority

	// For the bridge of the primary NIC.
	longerPrefixRule = 32761 // to destinations that main has a longer prefix for than a NIC's subnet, such as another plugin's pod
	subnetRule       = 32762 // to the NICs' subnets

	// For containers of a second NIC. Two more kinds of rule for them come right behind containerRule.
	secondMainRule = 32763 // main without its default route, which is the primary NIC's
	secondOutRule  = 32764 // all the rest

	// For transparent containers of the primary NIC, whose rules match the subnet of the source. A second NIC may
	// have the same subnet. So the rule that leads out by the primary NIC comes after all rules of second NICs.
	sourceMainRule   = 32763 // main for longer prefixes, as in longerPrefixRule, and main for packets that are no container's
	sourceSubnetRule = 32765 // to the NICs' subnets
)

// Offsets: containerPriority adds them to the priority of the rule that leads to containers, which makes 101 and 102
// at most. Such rules come before the rules of wg-quick, which ask main before its tunnel: main leads to the subnets
// and to Azure's services by the primary NIC.
const (
	nowhereOffset            = 1 // for every NIC that is gone or down: unreachable
	secondLongerPrefixOffset = 1 // for a second NIC: as longerPrefixRule, and to Azure's two services
	secondSubnetOffset       = 2 // for a second NIC: as subnetRule. It is the largest offset
)

// azureAddrs are the addresses of the host agent and of the metadata service.
var azureAddrs = []netip.Prefix{netip.MustParsePrefix("168.63.129.16/32"), netip.MustParsePrefix("169.254.169.254/32")}

// containerRoute is the route to a container in one of the two tables. It has the MTU of the container's link, in
// bytes. A bridge drops a packet that is too large for a port, and sends no error. With an MTU in the route, the host
// sends the error.
func (a alias) containerRoute(table, link, mtu int) netlink.Route {
	return netlink.Route{Table: table, Dst: ipNet(netip.PrefixFrom(a.addr.Addr(), 32)), LinkIndex: link, Scope: netlink.SCOPE_LINK, Protocol: ourProtocol, MTU: mtu, Type: unix.RTN_UNICAST}
}

// containerTables are the tables with routes to containers. The routes in main are for programs that look
// there.
var containerTables = []int{containerTable, unix.RT_TABLE_MAIN}

// putRoute adds the route. It replaces a route of ours to the same destination, and refuses if somebody else
// has one there.
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

// deleteRoute deletes the route. If there is none, that is success.
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

// samePlace reports whether two routes have the same table, destination, metric and link. The kernel has only
// one such route.
func samePlace(a, b netlink.Route) bool {
	return a.Table == b.Table && prefixOf(a.Dst) == prefixOf(b.Dst) && a.Priority == b.Priority && a.LinkIndex == b.LinkIndex
}

// wantedRoutes returns all routes that should have our protocol number.
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
		if !v.state.NICs[mac].Primary { // the route below goes when the NIC is down; then main's would lead out by the primary NIC
			all = append(all, netlink.Route{Table: nicTables + index, Dst: ipNet(prefixOf(nil)), Priority: unreachableMetric, Protocol: ourProtocol, Type: unix.RTN_UNREACHABLE})
		}
		// The kernel accepts no route by a link that is down. When the link is up again, a round adds the
		// route.
		if v.nics[mac].Attrs().Flags&net.FlagUp != 0 {
			all = append(all, netlink.Route{Table: nicTables + index, Dst: ipNet(prefixOf(nil)), LinkIndex: index, Gw: gateway.AsSlice(),
				Flags: int(netlink.FLAG_ONLINK), Protocol: ourProtocol, Type: unix.RTN_UNICAST})
		}
	}
	return all
}

// linkToContainer returns the index of the link that leads to the endpoint: its bridge, or its host end. It is
// 0 while the bridge is gone.
func (v *view) linkToContainer(e endpoint) int {
	if e.bridge == "" {
		return e.link.Index
	}
	if b := v.bridge(e.nic); b != nil && b.Name == e.bridge {
		return b.Index
	}
	return 0
}

// wayOut returns Azure's gateway for the NIC, which is the first address of its subnet. ok is false if the NIC
// needs no table: it is gone, nothing is asked of it, or its subnet is not known.
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

// needsOwnRules reports whether each transparent endpoint of the NIC has routing rules of its own. One rule for
// all cannot be: "iif azv+" would mean a link of that very name. The primary NIC's transparent endpoints have
// rules by their subnet instead, whose number does not grow with the containers.
func (s *hostState) needsOwnRules(mac string) bool {
	return s.NICs[mac].Transparent && !s.NICs[mac].Primary
}

// containerPriority returns the priority of the rule that leads to containers, plus the offset. The rule comes
// before all rules of others but the local table's. A rule that is added without a priority gets the lowest
// number. So if somebody adds a rule before ours, ours are added again below it, and then the old ones are
// deleted. At number 0 our rules are behind the local table's, in the order in which they were added.
func (v *view) containerPriority(offset int) int {
	return max(0, min(containerRule, v.lowestOtherPriority-1-secondSubnetOffset)+offset)
}

// wantedRules returns all routing rules that should have our protocol number.
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

// everywhere stands for no condition on an address.
var everywhere = netip.Prefix{}

// ruleList collects the routing rules that a view asks for.
type ruleList struct {
	v       *view
	subnets []netip.Prefix // of all NICs
	rules   []netlink.Rule
}

// addRule adds a rule. It ignores routes of its table whose prefix has suppress bits or fewer; with -1 it
// ignores none. A rule without a table makes the destination unreachable.
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

// addNowhere adds a rule for a NIC that is gone or down: what comes by the link reaches containers only.
func (w *ruleList) addNowhere(mac, link string) {
	if w.v.isGoneOrDown(mac) {
		w.addRule(w.v.containerPriority(nowhereOffset), unix.RT_TABLE_UNSPEC, -1, link, everywhere, everywhere)
	}
}

// addWayOut adds the rules by which packets from containers leave by their NIC. The packets come by the link.
func (w *ruleList) addWayOut(mac, link string, from netip.Prefix) {
	v := w.v
	if _, ok := v.wayOut(mac); !ok {
		return
	}
	table, primary := nicTables+v.nics[mac].Attrs().Index, v.state.NICs[mac].Primary
	longer, subnet := longerPrefixRule, subnetRule
	if !primary {
		longer, subnet = v.containerPriority(secondLongerPrefixOffset), v.containerPriority(secondSubnetOffset)
		for _, to := range azureAddrs {
			w.addRule(longer, table, -1, link, from, to)
		}
	}
	for _, to := range w.subnets {
		w.addRule(longer, unix.RT_TABLE_MAIN, to.Bits(), link, from, to)
		w.addRule(subnet, table, -1, link, from, to)
	}
	if !primary {
		w.addRule(secondMainRule, unix.RT_TABLE_MAIN, 0, link, from, everywhere)
		w.addRule(secondOutRule, table, -1, link, from, everywhere)
	}
}

// addForSubnets adds the rules by which packets from all transparent containers of the primary NIC leave by that NIC.
// The rules match the subnet of the source address. Two other kinds of packet have such a source, and keep their own
// way. The host's own packets do: the rules see them as coming by lo. Packets from the NICs, which the host forwards,
// do as well.
func (w *ruleList) addForSubnets(mac string) {
	if _, ok := w.v.wayOut(mac); !ok {
		return
	}
	for _, from := range w.v.subnets(mac) {
		for _, to := range w.subnets {
			w.addRule(sourceMainRule, unix.RT_TABLE_MAIN, to.Bits(), "", from, to)
			for _, link := range append([]string{"lo"}, w.v.rulesetConfig().NICs...) {
				w.addRule(sourceMainRule, unix.RT_TABLE_MAIN, -1, link, from, to)
			}
			w.addRule(sourceSubnetRule, nicTables+w.v.nics[mac].Attrs().Index, -1, "", from, to)
		}
	}
}

// sameRule compares what we set of a routing rule.
func sameRule(a, b netlink.Rule) bool {
	return a.Priority == b.Priority && a.Table == b.Table && a.SuppressPrefixlen == b.SuppressPrefixlen && a.IifName == b.IifName &&
		prefixOf(a.Src) == prefixOf(b.Src) && prefixOf(a.Dst) == prefixOf(b.Dst)
}

// ruleText writes the rule as ip rule does.
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
