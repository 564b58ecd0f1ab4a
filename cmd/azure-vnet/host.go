// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"azurevnet/bridge"
	"azurevnet/internal/cni"
)

// findMaster is the NIC of a network whose addresses come from another IPAM: the one
// that is named, else the one that the default route leaves by.
func findMaster(ctx context.Context, c *cni.Call, host *bridge.Host) (mac string, primary bool, err error) {
	_, mac, err = host.NIC(ctx, "")
	if c.Conf.Master == "" {
		return mac, true, err
	}
	_, named, err := host.NIC(ctx, c.Conf.Master)
	if err != nil {
		return "", false, cni.Errorf(types.ErrInvalidNetworkConfig, "master: %v", err)
	}
	return named, named == mac, nil
}

// codeMisnamed gives err, with which Ensure failed, the code of a wrong configuration if
// the bridge that it names can never be the NIC's.
func codeMisnamed(ctx context.Context, c *cni.Call, host *bridge.Host, nic string, err error) error {
	if c.Conf.Bridge == "" || errors.Is(err, bridge.ErrTaken) || errors.Is(err, bridge.ErrNameTaken) {
		return err
	}
	all, bad := host.Bridges(ctx)
	if bad != nil {
		return err
	}
	ours := false
	for _, b := range all {
		named := b.Name == c.Conf.Bridge
		if ours = ours || named; named != (b.NICMAC == nic) {
			return cni.Errorf(types.ErrInvalidNetworkConfig, "%v", err)
		}
	}
	if _, bad := netlink.LinkByName(c.Conf.Bridge); bad == nil && !ours {
		return cni.Errorf(types.ErrInvalidNetworkConfig, "%v", err)
	}
	return err
}

// checkNetns refuses what is no container's network namespace, before anything is lent or made for it.
func checkNetns(c *cni.Call) error {
	ns, err := bridge.OpenNetns(c.Netns)
	if err != nil {
		return err
	}
	return ns.Close()
}

// openContainer opens a socket in the container's namespace.
func openContainer(path string) (*netlink.Handle, error) {
	ns, err := bridge.OpenNetns(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	return netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
}

// addRoutes adds the routes that another IPAM wants beyond the default route.
func addRoutes(c *cni.Call, g *grant) error {
	if len(g.routes) < 2 {
		return nil
	}
	in, err := openContainer(c.Netns)
	if err != nil {
		return err
	}
	defer in.Close()
	l, err := in.LinkByName(c.IfName)
	if err != nil {
		return fmt.Errorf("find %s in %s: %w", c.IfName, c.Netns, err)
	}
	for _, r := range g.routes[1:] {
		if g.isAttachs(r) {
			continue
		}
		route := g.kernelRoute(r, l.Attrs().Index)
		err := in.RouteAdd(route)
		if errors.Is(err, unix.EEXIST) && r.Priority == 0 { // another interface of the container has it, and goes before
			route.Priority = l.Attrs().Index
			err = in.RouteAdd(route)
		}
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("route %s in %s: %w", &r.Dst, c.Netns, err)
		}
	}
	return nil
}

// isAttachs reports whether bridge.Attach gives every container that route: to the
// gateway, or to the subnet by the gateway.
func (g *grant) isAttachs(r *types.Route) bool {
	if r.Table != nil || r.Priority != 0 || r.GW != nil && !r.GW.Equal(g.gateway.AsSlice()) {
		return false
	}
	dst := prefixOf(&r.Dst)
	return dst == g.addr.Masked() || dst == netip.PrefixFrom(g.gateway, 32)
}

// kernelRoute is a wished route as the kernel takes it. A route without a next hop goes by
// the gateway, unless its scope says that the destination is on the link. A next hop
// other than the gateway is onlink: the container has no connected route that covers it,
// and the host answers ARP for it.
func (g *grant) kernelRoute(r *types.Route, link int) *netlink.Route {
	route := &netlink.Route{LinkIndex: link, Dst: &r.Dst, Gw: r.GW, MTU: r.MTU, AdvMSS: r.AdvMSS, Priority: r.Priority}
	if r.Table != nil {
		route.Table = *r.Table
	}
	if r.Scope != nil {
		route.Scope = netlink.Scope(*r.Scope)
	}
	switch gateway := net.IP(g.gateway.AsSlice()); {
	case r.GW == nil && route.Scope < netlink.SCOPE_LINK:
		route.Gw = gateway
	case r.GW != nil && !r.GW.Equal(gateway):
		route.SetFlag(netlink.FLAG_ONLINK)
	}
	return route
}
