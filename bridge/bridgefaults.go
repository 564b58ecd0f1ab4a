// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/rtnl"
	"azurevnet/bridge/internal/ruleset"
)

// bridgeFaults are the faults of the NIC's bridge. A NIC that has transparent endpoints only has none.
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
		return nil // nicFaults names the NIC that is gone
	case l == nil:
		return []fault{{what: name + " is gone", mend: func() error { return h.createBridge(name, mac, want, nic.Attrs().MTU) }}}
	case halfMade(l):
		return nil // halfMadeFaults names the bridge. When it is deleted, the next pass makes it
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
		attrs := netlink.NewLinkAttrs() // a new value: the kernel refuses to change some attributes of the link as it was read
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

// createBridge makes a bridge for the NIC with the MAC nic, and sets it up. If a step fails, it deletes the
// bridge. mtu is in bytes.
//
// A bridge takes over the MTU of its ports until somebody changes its own MTU. To set the value that it already
// has is no change. So the bridge is made with one byte less, and then set.
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

// addressFaults are the addresses of a link of ours, which must have none. When the last address of a link
// goes, the kernel deletes the link's routes and neighbour entries. While there is an address,
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
