// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"fmt"
	"net"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/rtnl"
)

// bridgePortFlags are the flags by which a container's bridge port differs from a new port.
//
// The port learns no MAC, and frames are not flooded to it: the container's MAC has a static forwarding entry.
// With hairpin, br_netfilter can lead a packet for a service back to the container that sent it.
//
// group_fwd_mask has one bit for each of the reserved groups 01:80:c2:00:00:00 to 0f. With the mask, frames to
// these groups take the way of all frames, where the nft rules drop them. Without it, the kernel hands such a
// frame to the host by the port itself, past every rule: a router advertisement in one would give the host a
// default route. Bit 1, PAUSE, is always dropped by the kernel and cannot be set.
var bridgePortFlags = []rtnl.PortFlag{
	{Kind: nl.IFLA_BRPORT_MODE, Name: "hairpin", Value: 1},
	{Kind: nl.IFLA_BRPORT_LEARNING, Name: "learning", Value: 0},
	{Kind: nl.IFLA_BRPORT_UNICAST_FLOOD, Name: "flood", Value: 0},
	{Kind: nl.IFLA_BRPORT_MCAST_FLOOD, Name: "mcast_flood", Value: 0},
	{Kind: nl.IFLA_BRPORT_BCAST_FLOOD, Name: "bcast_flood", Value: 0},
	{Kind: nl.IFLA_BRPORT_GROUP_FWD_MASK, Name: "group_fwd_mask", Value: 0xfffd},
}

// bridgePortDefaults are flags that a new port has and that a container's port must keep. A kernel that does
// not know such a flag does not tell it. With br_netfilter, the bridge itself may lead a packet for a service
// from one port to another; an isolated port would not get it.
var bridgePortDefaults = []rtnl.PortFlag{{Kind: nl.IFLA_BRPORT_ISOLATED, Name: "isolated", Value: 0}}

// portForwards is BR_STATE_FORWARDING, the state of a port that passes frames.
const portForwards = 3

// bridgePortFaults are the faults of a host end as a port of its bridge. add collects them.
func (e endpoint) bridgePortFaults(v *view, add func(wrong bool, what string, mend func() error)) {
	has := v.portFlags[e.link.Index]
	for _, f := range bridgePortFlags {
		if is, ok := has[f.Kind]; !ok || is != f.Value {
			add(true, "port flag "+f.Name+" changed", func() error { return rtnl.SetPortFlags(e.link.Index, bridgePortFlags) })
			break
		}
	}
	for _, f := range bridgePortDefaults {
		add(has[f.Kind] != f.Value, "port flag "+f.Name+" changed", func() error { return rtnl.SetPortFlags(e.link.Index, bridgePortDefaults) })
	}
	state, told := has[nl.IFLA_BRPORT_STATE]
	blocked := told && state != portForwards && e.link.OperState == netlink.OperUp // while the container end is down, the port is blocked, and nothing is wrong
	add(blocked && !v.bridgeSettings[e.link.MasterIndex].STP, "its port does not forward", func() error {
		return rtnl.SetPortFlags(e.link.Index, []rtnl.PortFlag{{Kind: nl.IFLA_BRPORT_STATE, Value: portForwards}})
	})
}

// containerFaults are the faults within the endpoint's container. Nobody can mend them from outside.
func (e endpoint) containerFaults() []fault {
	if e.link.NetNsID < 0 {
		return nil
	}
	name, mac, found, err := rtnl.ReadLinkInNamespace(e.link.NetNsID, e.link.ParentIndex)
	if err != nil || !found || mac.String() == e.mac.String() {
		return nil // without an answer nothing is said: the container may be ending
	}
	return []fault{{what: fmt.Sprintf("%s (%s): %s in its container has the MAC %s and not %s, so all that it sends is dropped: where a plugin such as tuning gave it that MAC, ask azure-vnet for it, by the capability mac or by CNI_ARGS",
		e.link.Name, e.label(), name, mac, e.mac)}}
}

// endpointFaults are the faults of one container's interface, as far as the host has it.
func (h *Host) endpointFaults(v *view, e endpoint) (all []fault) {
	name, addr := e.link.Name, e.addr.Addr()
	l := &netlink.Device{LinkAttrs: *e.link}
	add := func(wrong bool, what string, mend func() error) {
		if wrong {
			all = append(all, fault{what: name + " (" + e.label() + "): " + what, mend: mend})
		}
	}
	if dev := v.linkWithAddress(addr); dev != "" && !v.isOurs(dev) {
		add(true, fmt.Sprintf("%s holds its address too, so the host answers in its place: ip addr del %s dev %s, or have it reclaimed: RECLAIM=on of the Docker plugin, reclaim of the CNI configuration", dev, addr, dev), nil)
	}
	if nic := v.nics[e.nic]; nic != nil && e.link.MTU > nic.Attrs().MTU {
		add(true, fmt.Sprintf("its MTU of %d bytes is more than the %d of %s, so larger packets to it vanish: restart its container", e.link.MTU, nic.Attrs().MTU, nic.Attrs().Name), nil)
	}
	hw := hostMAC(addr)
	add(e.link.HardwareAddr.String() != hw.String(), fmt.Sprintf("the host end has the MAC %s and not %s", e.link.HardwareAddr, hw), func() error { return netlink.LinkSetHardwareAddr(l, hw) })
	add(e.link.Group != e.group(), "not in its link group", func() error { return netlink.LinkSetGroup(l, int(e.group())) })
	if e.bridge == "" {
		add(e.link.MasterIndex != 0, "in a bridge", func() error { return netlink.LinkSetNoMaster(l) })
		for _, s := range linkSysctls(name) {
			all = append(all, h.sysctlFault(s)...)
		}
		add(e.link.RawFlags&unix.IFF_NOARP != 0, "answers no ARP", func() error { return netlink.LinkSetARPOn(l) })
	} else {
		br := v.bridge(e.nic)
		if br == nil || br.Name != e.bridge {
			return all // bridgeFaults names the bridge
		}
		all = append(all, h.sysctlFault(noIPv6(name))...)
		joined := e.link.MasterIndex == br.Index
		add(!joined, "not in "+e.bridge, func() error { return netlink.LinkSetMasterByIndex(l, br.Index) })
		if joined {
			e.bridgePortFaults(v, add)
			what, mend := e.forwardingFault(v, br)
			add(what != "", what, mend)
		}
	}
	all = append(all, addressFaults(v, l)...)
	add(e.link.Flags&net.FlagUp == 0, "down", func() error { return netlink.LinkSetUp(l) })
	n := rtnl.Neighbour{Link: v.linkToContainer(e), Addr: addr, MAC: e.mac, Protocol: ourProtocol}
	add(!slices.ContainsFunc(v.neighbours, n.Equal), "no neighbour entry", func() error { return rtnl.PutNeighbour(n) })
	for _, table := range containerTables {
		r := e.containerRoute(table, n.Link, e.link.MTU)
		there := slices.ContainsFunc(v.ourRoutes, func(o netlink.Route) bool { return sameRoute(r, o) })
		add(!there, fmt.Sprintf("no route in table %d", table), func() error { return putRoute(r) })
	}
	return all
}

// isOurs reports whether the link of that name is a bridge or a host end of ours.
func (v *view) isOurs(name string) bool {
	l := v.links.ByName(name)
	if l == nil {
		return false
	}
	_, ours := bridgeAliasOf(l)
	_, end := endpointAliasOf(l)
	return ours || end
}

// forwardingFault says what is wrong with the forwarding entry that leads the bridge's frames to the container,
// and how to mend it. Without a fault, what is empty. If another link rightly has the MAC, mend is nil.
func (e endpoint) forwardingFault(v *view, br *netlink.LinkAttrs) (what string, mend func() error) {
	i := slices.IndexFunc(v.forwardingEntries, func(f rtnl.ForwardingEntry) bool {
		return f.Bridge == br.Index && f.MAC.String() == e.mac.String()
	})
	own := rtnl.ForwardingEntry{Port: e.link.Index, MAC: e.mac}
	switch {
	case i < 0:
		return "no forwarding entry", func() error { return rtnl.AddForwarding(own) }
	case v.forwardingEntries[i].Port != e.link.Index:
		other := v.forwardingEntries[i]
		what = fmt.Sprintf("its MAC %s is %s's", e.mac, v.nameOf(other.Port))
		if v.hasMAC(other.Port, e.mac) {
			return what, nil
		}
		return what, func() error { // somebody has moved the entry to a port whose MAC it is not
			if err := rtnl.DeleteForwarding(other); err != nil && !rtnl.IsNotExist(err) {
				return err
			}
			return rtnl.AddForwarding(own)
		}
	}
	return "", nil
}

// hasMAC reports whether a port rightly has the MAC: it is the MAC of the link, or of the container behind it.
func (v *view) hasMAC(port int, mac net.HardwareAddr) bool {
	l := v.links.ByIndex(port)
	if l == nil {
		return true
	}
	a, ours := endpointAliasOf(l)
	return ours && a.mac.String() == mac.String() || l.Attrs().HardwareAddr.String() == mac.String()
}

// nameOf returns the name of the link with that index, or "link" and the index if there is none.
func (v *view) nameOf(index int) string {
	if l := v.links.ByIndex(index); l != nil {
		return l.Attrs().Name
	}
	return fmt.Sprintf("link %d", index)
}
