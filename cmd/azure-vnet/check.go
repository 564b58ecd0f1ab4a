// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"azurevnet/bridge"
	"azurevnet/internal/cni"
	"azurevnet/internal/dump"
	"azurevnet/internal/lender"
)

// check serves CHECK: it compares the host's side of the interface, the container's side and the lease with what ADD
// made. It changes nothing.
func check(ctx context.Context, c *cni.Call) error {
	l, err := lender.Open(c)
	if err != nil {
		return err
	}
	attached, found, err := l.Host.Attachment(ctx, c.Owner())
	if err != nil {
		return err
	}
	if !found {
		return cni.Errorf(types.ErrUnknownContainer, "container %s has no interface %s of network %s", c.ContainerID, c.IfName, c.Conf.Network)
	}
	prev, err := c.PrevResult()
	if err != nil {
		return err
	}
	if err := l.Host.Check(ctx, c.Owner()); err != nil {
		return changed("%v", err)
	}
	if err := checkInside(c, attached, prev); err != nil {
		return err
	}
	if !lendsHere(c) {
		return delegateVerb(ctx, c, invoke.DelegateCheck)
	}
	lease, held, err := l.Pool.FindLease(ctx, attached.Addr.Addr())
	if err != nil {
		return err
	}
	if !held || lease.Owner != c.Owner() {
		return changed("%s is not lent to the container any more", attached.Addr.Addr())
	}
	return nil
}

// remedy is what an operator can do about any fault that CHECK finds.
const remedy = "azure-vnet reconcile mends what is the host's; else end the container and start it again"

// changed returns the error of CHECK about something that is not as ADD left it.
func changed(format string, args ...any) error {
	return types.NewError(cni.CodeChanged, fmt.Sprintf(format, args...), remedy)
}

// checkInside compares the interface in the container's namespace with the result of ADD.
func checkInside(c *cni.Call, attached bridge.Attachment, prev *current.Result) error {
	in, err := openContainer(c.Netns)
	if err != nil {
		return changed("%v", err)
	}
	defer in.Close()
	l, err := in.LinkByName(c.IfName)
	if err != nil {
		return changed("interface %s in %s: %v", c.IfName, c.Netns, err)
	}
	if l.Attrs().Flags&net.FlagUp == 0 {
		return changed("interface %s in %s is down", c.IfName, c.Netns)
	}
	mine := slices.IndexFunc(prev.Interfaces, func(i *current.Interface) bool { return i.Name == c.IfName && i.Sandbox != "" })
	if mine < 0 {
		return changed("prevResult has no interface %s of a container: hand back the result of ADD", c.IfName)
	}
	if told := prev.Interfaces[mine]; told.Mac != "" && told.Mac != l.Attrs().HardwareAddr.String() {
		return changed("interface %s in %s has the MAC %s, and not %s", c.IfName, c.Netns, l.Attrs().HardwareAddr, told.Mac)
	}
	if !slices.Equal(l.Attrs().HardwareAddr, attached.MAC) { // this holds even if a chained plugin told the runtime another MAC
		return changed("interface %s in %s has the MAC %s, and not %s: all that it sends is dropped", c.IfName, c.Netns, l.Attrs().HardwareAddr, attached.MAC)
	}
	has, err := dump.Whole(func() ([]netlink.Addr, error) { return in.AddrList(l, netlink.FAMILY_V4) })
	if err != nil {
		return fmt.Errorf("read the addresses in %s: %w", c.Netns, err)
	}
	wanted := false
	for _, ip := range prev.IPs {
		if ip.Interface != nil && *ip.Interface != mine {
			continue
		}
		addr, _ := netip.AddrFromSlice(ip.Address.IP)
		wanted = wanted || addr.Unmap() == attached.Addr.Addr()
		if !slices.ContainsFunc(has, func(a netlink.Addr) bool { return a.IP.Equal(ip.Address.IP) && slices.Equal(a.Mask, ip.Address.Mask) }) {
			return changed("interface %s in %s lacks the address %s", c.IfName, c.Netns, &ip.Address)
		}
	}
	if !wanted {
		return changed("the container's link has %s, and prevResult does not say so", attached.Addr.Addr())
	}
	return errors.Join(checkRoutes(in, l, c, attached.Addr.Addr(), prev.Routes), checkGateway(in, l, c, attached, prev))
}

// checkGateway compares the MAC that the container has for its gateway with the MAC of the bridge, or in transparent mode
// with that of the host end. All that a container sends goes to this MAC. A missing neighbour entry is no error, because
// the host answers ARP for the gateway.
func checkGateway(in *netlink.Handle, l netlink.Link, c *cni.Call, attached bridge.Attachment, prev *current.Result) error {
	next, err := netlink.LinkByName(cmp.Or(attached.Bridge, attached.Link))
	if err != nil {
		return changed("%s: %v", cmp.Or(attached.Bridge, attached.Link), err)
	}
	entries, err := dump.Whole(func() ([]netlink.Neigh, error) { return in.NeighList(l.Attrs().Index, netlink.FAMILY_V4) })
	if err != nil {
		return fmt.Errorf("read the neighbour entries in %s: %w", c.Netns, err)
	}
	want := next.Attrs().HardwareAddr
	for _, e := range entries {
		gateway := slices.ContainsFunc(prev.IPs, func(ip *current.IPConfig) bool { return ip.Gateway.Equal(e.IP) })
		if gateway && len(e.HardwareAddr) > 0 && !slices.Equal(e.HardwareAddr, want) {
			return changed("%s in %s has the MAC %s for the gateway %s, and not %s of %s", c.IfName, c.Netns, e.HardwareAddr, e.IP, want, next.Attrs().Name)
		}
	}
	return nil
}

// checkRoutes is an error if the container lacks an IPv4 route that the result of ADD has. ADD puts them into the main
// table. A chained plugin such as sbr may move them to a table that all packets from the container's address go by.
func checkRoutes(in *netlink.Handle, l netlink.Link, c *cni.Call, addr netip.Addr, want []*types.Route) error {
	tables, err := bridge.TablesOfOthers(in, addr)
	if err != nil {
		return fmt.Errorf("in %s: %w", c.Netns, err)
	}
	tables = append(tables, unix.RT_TABLE_MAIN)
	has, err := dump.Whole(func() ([]netlink.Route, error) {
		return in.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{LinkIndex: l.Attrs().Index}, netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE) // all tables
	})
	if err != nil {
		return fmt.Errorf("read the routes in %s: %w", c.Netns, err)
	}
	for _, w := range want {
		if w.Dst.IP.To4() == nil || w.Table != nil {
			continue
		}
		there := slices.ContainsFunc(has, func(r netlink.Route) bool {
			return slices.Contains(tables, r.Table) && prefixOf(r.Dst) == prefixOf(&w.Dst) && (w.GW == nil || r.Gw.Equal(w.GW))
		})
		if !there {
			return changed("interface %s in %s lacks the route to %s via %s", c.IfName, c.Netns, &w.Dst, w.GW)
		}
	}
	return nil
}

// prefixOf returns the destination of a route. A route without one leads to every address.
func prefixOf(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	addr, _ := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(addr.Unmap(), bits).Masked()
}
