// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/rtnl"
	"azurevnet/internal/dump"
)

// ourProtocol is the protocol number of the routes, rules and neighbour entries that we make. It is our mark on
// them.
const ourProtocol = 168

// mainRule is the priority of the kernel's own rule that leads to the table main.
const mainRule = 32766

// view is one reading of the host, with each kind of kernel state once. Rounds list faults from it, Attach chooses an
// endpoint's parts from it, and the wanted nft tables and FORWARD are built from it. Settings and files that only one
// decision needs are not in it: sysctls, the nft tables, FORWARD and drop-ins are read by the function that lists
// their faults. If host.json has lost published ports, publishedPorts also reads the nft table, each time that it is
// called.
//
// A view is filled to one of these degrees. A method that needs more than a view has sees nothing there, and no
// error tells it.
//
//   - readView fills all but the zones. Rounds, Check and Broken need it: the functions named Faults,
//     wantedRules and containerPriority.
//   - readEndpoints fills state, links, addrs, nics, endpoints and unrecorded. That is enough for the nft tables
//     (rulesetConfig), for published ports (choosePorts), and for subnets, bridge and linkWithAddress.
//   - readLittle fills state, one NIC, and that NIC's bridge. That is enough for decideFromView. A detacher's view
//     has state, one endpoint, and its NIC, which is enough for rulesetEndpoint and publishedPorts.
type view struct {
	state               *hostState // host.json, completed from the links if the file was lost
	links               rtnl.Links
	addrs               []netlink.Addr  // IPv4
	ourRoutes           []netlink.Route // those with our protocol number, in every table
	ourRoutingRules     []netlink.Rule  // those with our protocol number
	lowestOtherPriority int             // the lowest priority of a rule of others; the local table's rule does not count
	neighbours          []rtnl.Neighbour
	forwardingEntries   []rtnl.ForwardingEntry
	portFlags           map[int]rtnl.PortFlags      // of the ports of every bridge, by link index
	bridgeSettings      map[int]rtnl.BridgeSettings // of our bridges, by link index

	zones zoneReading // of firewalld; only a round and Broken read them

	nics       map[string]netlink.Link // by MAC; a NIC that is gone is missing
	endpoints  []endpoint
	unrecorded []string // MACs of the NICs for which the links tell more than host.json does: see stateFaults
}

// endpoint is a host end whose alias says what it is for.
type endpoint struct {
	alias
	link *netlink.LinkAttrs
}

// readEndpoints reads host.json, links and addresses only. The view then has the endpoints, but not how the
// host leads to them.
func (h *Host) readEndpoints() (v *view, err error) {
	v = &view{nics: map[string]netlink.Link{}}
	if v.state, err = h.readState(); err != nil {
		return nil, err
	}
	if v.links, err = rtnl.ReadLinks(); err != nil {
		return nil, err
	}
	if v.addrs, err = dump.Whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_V4) }); err != nil {
		return nil, fmt.Errorf("list the host's addresses: %w", err)
	}
	return v, v.completeFromLinks()
}

// readView reads all of the view but the zones. The caller holds the host's lock, unless it changes nothing and
// can bear to see an endpoint that another call has half made.
func (h *Host) readView() (*view, error) {
	v, err := h.readEndpoints()
	if err != nil {
		return nil, err
	}
	if v.ourRoutes, err = rtnl.ReadRoutes(ourProtocol); err != nil {
		return nil, err
	}
	rules, err := dump.Whole(func() ([]netlink.Rule, error) { return netlink.RuleList(netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list the host's routing rules: %w", err)
	}
	v.lowestOtherPriority = mainRule
	for _, r := range rules {
		if r.Table == unix.RT_TABLE_UNSPEC {
			r.Type = unix.RTN_UNREACHABLE // the library does not read the type. It is set, since RuleDel would else also match a rule of another type
		}
		if r.Protocol == ourProtocol {
			v.ourRoutingRules = append(v.ourRoutingRules, r)
		} else if r.Priority > 0 { // the local table's rule has priority 0
			v.lowestOtherPriority = min(v.lowestOtherPriority, r.Priority)
		}
	}
	if v.neighbours, err = rtnl.ReadNeighbours(); err != nil {
		return nil, fmt.Errorf("list the host's neighbour entries: %w", err)
	}
	if v.forwardingEntries, err = rtnl.ReadForwarding(); err != nil {
		return nil, fmt.Errorf("list the bridges' forwarding entries: %w", err)
	}
	if v.portFlags, err = rtnl.ReadPortFlags(); err != nil {
		return nil, fmt.Errorf("list the bridges' ports: %w", err)
	}
	v.bridgeSettings = map[int]rtnl.BridgeSettings{}
	for _, l := range v.links {
		if _, ours := bridgeAliasOf(l); !ours {
			continue
		}
		if v.bridgeSettings[l.Attrs().Index], err = rtnl.ReadBridgeSettings(l.Attrs().Index); ignoreMissing(err) != nil {
			return nil, fmt.Errorf("read the settings of %s: %w", l.Attrs().Name, err)
		}
	}
	return v, nil
}

// completeFromLinks lists the endpoints, and completes the state from the links: host.json may be lost, and the
// links then tell most of it. It also finds the NICs. It writes no file: a round adopts what is unrecorded.
func (v *view) completeFromLinks() error {
	for _, l := range v.links {
		if a, ok := endpointAliasOf(l); ok {
			v.endpoints = append(v.endpoints, endpoint{a, l.Attrs()})
		}
	}
	ask := func(mac string, want func(*nicState)) {
		was := v.state.NICs[mac]
		n := was
		want(&n)
		v.state.NICs[mac] = n
		if (n.Bridge != was.Bridge || n.Transparent != was.Transparent) && !slices.Contains(v.unrecorded, mac) {
			v.unrecorded = append(v.unrecorded, mac)
		}
	}
	for _, b := range ourBridges(v.links) {
		ask(b.NICMAC, func(n *nicState) {
			if n.Bridge == "" {
				n.Bridge = b.Name
			}
		})
	}
	for _, e := range v.endpoints {
		ask(e.nic, func(n *nicState) {
			n.Transparent = n.Transparent || e.bridge == ""
			if n.Bridge == "" {
				n.Bridge = e.bridge
			}
		})
	}
	for mac, n := range v.state.NICs {
		nic, err := findNIC(v.links, mac, n.Name)
		if err == nil {
			v.nics[mac] = nic
		} else if !errors.Is(err, errNoNIC) {
			return err // two links may be the NIC. Nothing is changed by a guess
		}
	}
	if len(v.nics) == 0 || v.knowsPrimary() {
		return nil
	}
	link, err := defaultRouteLink()
	for mac, nic := range v.nics {
		if nic.Attrs().Index == link {
			ask(mac, func(n *nicState) { n.Primary = true })
		}
	}
	return err
}

func (v *view) knowsPrimary() bool {
	for _, n := range v.state.NICs {
		if n.Primary {
			return true
		}
	}
	return false
}

// defaultRouteLink returns the index of the link that the host's best default route leaves by, or 0 if there is
// no default route. Azure's default route is on the primary NIC.
func defaultRouteLink() (int, error) {
	all, err := dump.Whole(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Dst: ipNet(prefixOf(nil))}, netlink.RT_FILTER_DST)
	})
	if err != nil || len(all) == 0 {
		return 0, err
	}
	return slices.MinFunc(all, func(a, b netlink.Route) int { return a.Priority - b.Priority }).LinkIndex, nil
}

// macs returns the MACs of the NICs in host.json, sorted, so that every reading takes them in the same order.
func (v *view) macs() []string { return slices.Sorted(maps.Keys(v.state.NICs)) }

// nicName returns the NIC's name, or "" if the NIC is gone.
func (v *view) nicName(mac string) string {
	if nic := v.nics[mac]; nic != nil {
		return nic.Attrs().Name
	}
	return ""
}

// bridge returns the NIC's bridge, or nil if the NIC has none. A bridge of that name without our alias is not
// the NIC's bridge.
func (v *view) bridge(mac string) *netlink.LinkAttrs {
	l := v.links.ByName(v.state.NICs[mac].Bridge)
	if l == nil {
		return nil
	}
	if nic, ours := bridgeAliasOf(l); !ours || nic != mac {
		return nil
	}
	return l.Attrs()
}

// subnets returns the IPv4 subnets of the virtual network that the NIC is in, sorted. They are the subnet in
// host.json, which the last Ensure wrote there, and the subnets of the NIC's containers. If an address of the
// NIC has a prefix that contains one of them, the prefix takes its place. If there is none of them, all
// prefixes of the NIC's addresses are its subnets. So a prefix that somebody adds to the NIC from elsewhere is
// a subnet only while nothing better is known.
func (v *view) subnets(mac string) []netip.Prefix {
	var on, out []netip.Prefix
	if nic := v.nics[mac]; nic != nil {
		for _, a := range v.addrs {
			if p := prefixOf(a.IPNet).Masked(); a.LinkIndex == nic.Attrs().Index && p.Bits() < 32 {
				on = append(on, p)
			}
		}
	}
	add := func(p netip.Prefix) {
		if i := slices.IndexFunc(on, func(o netip.Prefix) bool { return o.Bits() <= p.Bits() && o.Contains(p.Addr()) }); i >= 0 && !slices.Contains(on, p) {
			p = on[i]
		}
		if p.Bits() < 32 {
			out = append(out, p)
		}
	}
	if told := v.state.NICs[mac].Subnet; told.IsValid() {
		add(told)
	}
	for _, e := range v.endpoints {
		if e.nic == mac {
			add(e.addr.Masked())
		}
	}
	if len(out) == 0 {
		out = on
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return slices.Compact(out)
}

// linkWithAddress returns the name of the host's link that has the address, or "" if no link has it.
func (v *view) linkWithAddress(addr netip.Addr) string {
	for _, a := range v.addrs {
		if prefixOf(a.IPNet).Addr() == addr {
			if l := v.links.ByIndex(a.LinkIndex); l != nil {
				return l.Attrs().Name
			}
		}
	}
	return ""
}

// prefixOf converts an IPv4 prefix of the netlink library. nil is 0.0.0.0/0, as in a default route.
func prefixOf(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	addr, _ := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(addr.Unmap(), bits)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}
}
