// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/rtnl"
	"azurevnet/internal/dump"
)

// Reclaim takes addresses off the NIC with that MAC, and returns those that the NIC had. cloud-init puts
// secondary addresses on the NIC; afterwards containers can have them. Reclaim refuses an address that the host
// itself uses: one that a default route names as its source, and the last address of the NIC.
//
// It is the only method that changes a NIC's addresses. An administrator asks for it.
func (h *Host) Reclaim(ctx context.Context, mac string, addrs []netip.Addr) (removed []netip.Addr, err error) {
	unlock, err := h.lockHost(ctx, "reclaim")
	if err != nil {
		return nil, err
	}
	defer unlock()
	if removed, err = h.reclaimLocked(mac, addrs); err != nil {
		return removed, fmt.Errorf("reclaim: %w", err)
	}
	return removed, nil
}

func (h *Host) reclaimLocked(mac string, addrs []netip.Addr) (removed []netip.Addr, err error) {
	links, err := rtnl.ReadLinks()
	if err != nil {
		return nil, err
	}
	nic, err := findNIC(links, mac, "")
	if err != nil {
		return nil, err
	}
	has, err := dump.Whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nic, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list the addresses of %s: %w", nic.Attrs().Name, err)
	}
	own, err := hostSourceOf(nic, has)
	if err != nil {
		return nil, err
	}
	for _, a := range has {
		addr := prefixOf(a.IPNet).Addr()
		if !slices.Contains(addrs, addr) {
			continue
		}
		if addr == own || len(removed) == len(has)-1 {
			return removed, fmt.Errorf("%s is the host's own address on %s and stays there: no container can have it", addr, nic.Attrs().Name)
		}
		if err := h.deleteAddr(nic, a); err != nil {
			return removed, fmt.Errorf("take %s off %s: %w", addr, nic.Attrs().Name, err)
		}
		removed = append(removed, addr)
	}
	return removed, nil
}

// deleteAddr deletes one address of the NIC. If the address is the first of its subnet, the kernel deletes the
// subnet's other addresses with it, unless promote_secondaries is 1. So the setting is 1 for this moment.
func (h *Host) deleteAddr(nic netlink.Link, a netlink.Addr) (err error) {
	promote := sysctl{"ipv4/conf/" + nic.Attrs().Name + "/promote_secondaries", "1"}
	before := h.readSysctl(promote.name)
	if a.Flags&unix.IFA_F_SECONDARY == 0 && before == "0" {
		if err := h.setSysctl(promote); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, h.setSysctl(sysctl{promote.name, before})) }()
	}
	a.Label = "" // the kernel compares the label if it is given
	return ignoreMissing(netlink.AddrDel(nic, &a))
}

// hostSourceOf returns the address that the host's packets leave with by the NIC's default route. It is the
// source that the route names, else the first address in the subnet of the route's gateway. Without a default
// route it is the zero Addr.
func hostSourceOf(nic netlink.Link, has []netlink.Addr) (netip.Addr, error) {
	routes, err := dump.Whole(func() ([]netlink.Route, error) { return netlink.RouteList(nic, netlink.FAMILY_V4) })
	if err != nil {
		return netip.Addr{}, fmt.Errorf("list the routes of %s: %w", nic.Attrs().Name, err)
	}
	for _, r := range routes {
		if prefixOf(r.Dst).Bits() != 0 {
			continue
		}
		if src, ok := netip.AddrFromSlice(r.Src); ok {
			return src.Unmap(), nil
		}
		for _, a := range has {
			if a.Contains(r.Gw) {
				return prefixOf(a.IPNet).Addr(), nil
			}
		}
	}
	return netip.Addr{}, nil
}
