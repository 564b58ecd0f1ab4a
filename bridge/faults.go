// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/conntrack"
	"azurevnet/bridge/internal/forward"
	"azurevnet/bridge/internal/rtnl"
	"azurevnet/bridge/internal/ruleset"
)

var errForward = errors.New("iptables may drop what containers send and receive: see to it that iptables can read and change the chain FORWARD")

// fault is one thing that is not as it should be.
type fault struct {
	what     string       // in a sentence's words: "azure0 is down"
	mend     func() error // nil: only a person can
	bearable bool         // containers can be attached in spite of it
}

// listFaults says what is wrong with the host. This is the one place that says what ought to
// stand: Ensure, Reconcile, Check and status all go by it. Mending a fault may bring others
// to light, such as the ports of a bridge that was gone, so whoever mends reads again.
//
// The order is that of mending: what restricts comes before what opens.
func (h *Host) listFaults(v *view, z zoneReading) (all []fault, err error) {
	add := func(more ...fault) { all = append(all, more...) }
	for _, l := range v.links {
		if halfMade(l) {
			add(fault{what: fmt.Sprintf("%s is half made and nobody's", l.Attrs().Name), mend: func() error { return deleteLink(l) }})
		}
	}
	if !v.state.isAsked() {
		return all, nil
	}
	for _, mac := range v.macs() {
		add(h.nicFaults(v, mac)...)
	}
	add(h.sysctlFault(ipForward)...)
	tables, err := v.rulesetConfig().Differences()
	if err != nil {
		return all, err
	}
	for _, what := range tables {
		add(fault{what: what, mend: func() error { return mendTables(v) }})
	}
	for _, mac := range v.macs() {
		add(h.bridgeFaults(v, mac)...)
	}
	add(routingFaults(v)...)
	addBearable := func(more ...fault) {
		for _, f := range more {
			f.bearable = true
			add(f)
		}
	}
	for _, e := range v.endpoints {
		addBearable(h.endpointFaults(v, e)...)
	}
	addBearable(strayFaults(v)...)
	addBearable(h.stateFaults(v)...)
	addBearable(h.publishedPortFaults(v)...)
	accepts, err := v.forwardConfig().Differences()
	for _, what := range accepts {
		add(fault{what: what, mend: func() error { _, err := v.forwardConfig().Sync(); return err }})
	}
	if errors.Is(err, forward.ErrUnreadable) {
		add(fault{what: err.Error()})
	} else if err != nil { // Other repairs go on. New containers are refused only if FORWARD's policy is DROP.
		add(fault{what: err.Error(), mend: func() error { return errForward }, bearable: !forward.PolicyDrops()})
	}
	addBearable(h.zoneFaults(v, z)...)
	chains, err := v.forwardConfig().DroppingChains()
	for _, what := range chains {
		addBearable(fault{what: what})
	}
	if err != nil {
		addBearable(fault{what: err.Error()})
	}
	addBearable(h.dropInFaults(v)...)
	return all, nil
}

// mendTables makes the nft tables what they should be. The kernel decides on SNAT and DNAT once for a flow. A datagram
// flow that began while the tables were gone would go on without them for as long as it is used. So such flows are
// deleted, and the kernel decides on the next datagram. A TCP client begins a new connection by itself.
func mendTables(v *view) error {
	c := v.rulesetConfig()
	if _, err := c.Sync(); err != nil {
		return err
	}
	var flows conntrack.Conn
	defer flows.Close()
	var all []conntrack.Flows
	for _, e := range c.Endpoints {
		all = append(all, conntrack.Flows{Untranslated: e.Addr})
		for _, p := range e.Ports {
			if p.UDP {
				all = append(all, conntrack.Flows{UDPPort: p.HostPort})
			}
		}
	}
	return flows.Delete(all...)
}

// nicFaults are those of a NIC that has containers, or is to have some.
func (h *Host) nicFaults(v *view, mac string) []fault {
	if n := v.state.NICs[mac]; n.Bridge == "" && !n.Transparent {
		return nil
	}
	nic := v.nics[mac]
	if nic == nil {
		return []fault{{what: fmt.Sprintf("the NIC with the MAC %s is gone: its containers reach nobody until it is attached again", mac)}}
	}
	if err := refuseTaken(v.links, nic); err != nil {
		return []fault{{what: err.Error()}}
	}
	return h.sysctlFault(sysctl{"ipv4/conf/" + nic.Attrs().Name + "/forwarding", "1"})
}

var ipForward = sysctl{"ipv4/ip_forward", "1"}

// sysctlFault is a setting that is not s. One that the kernel does not have is none.
func (h *Host) sysctlFault(s sysctl) []fault {
	if is := h.readSysctl(s.name); is == "" || is == s.value {
		return nil
	}
	return []fault{{what: fmt.Sprintf("net.%s is not %s", strings.ReplaceAll(s.name, "/", "."), s.value), mend: func() error { return h.setSysctl(s) }}}
}

// linkSysctls are the settings of a link that leads to containers. It answers ARP in Azure's
// place and at once. It takes from a container only what has the container's address. It speaks
// no IPv6, which is not served yet. With route_localnet the host reaches published ports at
// 127.0.0.1, ours and those of a chained portmap; the nft rules keep containers from 127.0.0.1.
func linkSysctls(link string) []sysctl {
	conf := "ipv4/conf/" + link
	return []sysctl{
		noIPv6(link),
		{conf + "/rp_filter", "1"},
		{conf + "/forwarding", "1"},
		{conf + "/proxy_arp", "1"},
		{conf + "/proxy_arp_pvlan", "1"},
		{"ipv4/neigh/" + link + "/proxy_delay", "0"}, // the kernel's default is 0.8 s
		{conf + "/send_redirects", "0"},
		{conf + "/route_localnet", "1"},
	}
}

// noIPv6 has the host neither speak IPv6 by the link nor believe what comes by it.
func noIPv6(link string) sysctl { return sysctl{"ipv6/conf/" + link + "/disable_ipv6", "1"} }

// bridgeFaults are those of a NIC's bridge.
func (h *Host) bridgeFaults(v *view, mac string) (all []fault) {
	name, nic := v.state.NICs[mac].Bridge, v.nics[mac]
	if name == "" {
		return nil
	}
	hw, err := parseMAC(mac)
	if err != nil {
		return []fault{{what: err.Error()}}
	}
	want := bridgeMAC(hw)
	l := v.links.ByName(name)
	switch {
	case l == nil && nic == nil:
		return nil // said already
	case l == nil:
		return []fault{{what: name + " is gone", mend: func() error { return h.createBridge(name, mac, want, nic.Attrs().MTU) }}}
	case halfMade(l):
		return nil // said already; it is made when that one is gone
	case v.bridge(mac) == nil:
		return []fault{{what: refuseNamesake(v.links, l).Error()}}
	}
	a := l.Attrs()
	add := func(wrong bool, what string, mend func() error) {
		if wrong {
			all = append(all, fault{what: what, mend: mend})
		}
	}
	add(a.Group != ruleset.GroupBridge, name+" is not in its link group", func() error { return netlink.LinkSetGroup(l, ruleset.GroupBridge) })
	add(a.HardwareAddr.String() != want.String(), fmt.Sprintf("%s has the MAC %s and not %s", name, a.HardwareAddr, want), func() error { return netlink.LinkSetHardwareAddr(l, want) })
	if nic != nil {
		mtu := nic.Attrs().MTU
		add(a.MTU != mtu, fmt.Sprintf("%s has an MTU of %d bytes and not the %d of %s", name, a.MTU, mtu, nic.Attrs().Name), func() error { return netlink.LinkSetMTU(l, mtu) })
	}
	br := l.(*netlink.Bridge)
	add(br.MulticastSnooping != nil && *br.MulticastSnooping, name+" snoops multicast", func() error {
		attrs := netlink.NewLinkAttrs() // of the link as it was read, the kernel refuses to change some
		attrs.Name, attrs.Index = name, a.Index
		return netlink.BridgeSetMcastSnoop(&netlink.Bridge{LinkAttrs: attrs}, false)
	})
	is := v.bridgeSettings[a.Index]
	add(is.STP, name+" speaks the spanning tree protocol, and holds new containers up for 30 s", func() error { return rtnl.StopSTP(a.Index) })
	add(is.VLANFiltering, name+" filters VLANs, and has no way to containers in any", func() error { return rtnl.StopVLANFiltering(a.Index) })
	add(a.MasterIndex != 0, name+" is in "+v.nameOf(a.MasterIndex), func() error { return netlink.LinkSetNoMaster(l) })
	for _, s := range linkSysctls(name) {
		all = append(all, h.sysctlFault(s)...)
	}
	add(a.RawFlags&unix.IFF_NOARP != 0, name+" answers no ARP", func() error { return netlink.LinkSetARPOn(l) })
	add(a.Flags&net.FlagUp == 0, name+" is down", func() error { return netlink.LinkSetUp(l) })
	return append(all, addressFaults(v, l)...)
}

// createBridge makes a bridge. A bridge copies its ports' MTU until its own MTU is changed.
// Setting the value that it already has does not count, so it is made one byte smaller and
// then set.
func (h *Host) createBridge(name, nic string, mac net.HardwareAddr, mtu int) error {
	if err := h.beforeStep("bridge"); err != nil {
		return err
	}
	off := false
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr, attrs.MTU, attrs.Group = name, mac, mtu-1, ruleset.GroupBridge
	l := &netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &off}
	if err := netlink.LinkAdd(l); err != nil {
		if errors.Is(err, unix.EOPNOTSUPP) {
			err = fmt.Errorf("%w: the kernel has no bridges: load the module bridge", err)
		}
		return fmt.Errorf("make the bridge %s: %w", name, err)
	}
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"bridge alias", func() error { return netlink.LinkSetAlias(l, bridgeAlias+nic) }},
		{"bridge MTU", func() error { return netlink.LinkSetMTU(l, mtu) }},
		{"bridge sysctls", func() error {
			for _, s := range linkSysctls(name) {
				if err := h.setSysctl(s); err != nil {
					return err
				}
			}
			return nil
		}},
		{"bridge up", func() error { return netlink.LinkSetUp(l) }},
	} {
		err := h.beforeStep(step.name)
		if err == nil {
			err = step.do()
		}
		if err != nil {
			return errors.Join(fmt.Errorf("set up the bridge %s: %w", name, err), deleteLink(l))
		}
	}
	return nil
}

// addressFaults are the addresses of a link. Links of ours must have no address. With the last
// one the kernel deletes the link's routes and neighbour entries. While there is one,
// conf.all.rp_filter=2 makes the link's source check loose.
func addressFaults(v *view, l netlink.Link) (all []fault) {
	for _, a := range v.addrs {
		if a.LinkIndex == l.Attrs().Index {
			all = append(all, fault{what: fmt.Sprintf("%s has the address %s", l.Attrs().Name, a.IPNet), mend: func() error {
				if err := netlink.AddrDel(l, &a); err != nil && !rtnl.IsNotExist(err) {
					return err
				}
				return nil
			}})
		}
	}
	return all
}

// routingFaults are those of the rules, and of the tables that lead out by other NICs.
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

// strayFaults are routes and neighbour entries of ours that no link speaks for. In bridge mode
// they name the bridge, and do not die with the container's link.
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

func deleteLink(l netlink.Link) error {
	if err := netlink.LinkDel(l); err != nil && !rtnl.IsNotExist(err) {
		return fmt.Errorf("delete %s: %w", l.Attrs().Name, err)
	}
	return nil
}

// mendRouting makes the rules and the ways out by other NICs what they should be.
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
