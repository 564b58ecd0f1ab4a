// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
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

// checkNetns refuses a path that is not the network namespace of a container.
func checkNetns(c *cni.Call) error {
	ns, err := bridge.OpenNetns(c.Netns)
	if err != nil {
		return err
	}
	return ns.Close()
}

// openContainer opens a netlink socket in the network namespace at path. The caller closes it.
func openContainer(path string) (*netlink.Handle, error) {
	ns, err := bridge.OpenNetns(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	return netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
}

// addRoutes adds the routes that another IPAM wishes for beyond the default route, which Attach has made.
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
		if g.attachMade(r) {
			continue
		}
		route := g.kernelRoute(r, l.Attrs().Index)
		err := in.RouteAdd(route)
		// Another interface of the container may have the same route. That route keeps its priority, and this one comes after.
		if errors.Is(err, unix.EEXIST) && r.Priority == 0 {
			route.Priority = l.Attrs().Index
			err = in.RouteAdd(route)
		}
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("route %s in %s: %w", &r.Dst, c.Netns, err)
		}
	}
	return nil
}

// attachMade reports whether r is one of the routes that bridge.Attach gives every container: to the gateway, and to the
// subnet by the gateway.
func (g *grant) attachMade(r *types.Route) bool {
	if r.Table != nil || r.Priority != 0 || r.GW != nil && !r.GW.Equal(g.gateway.AsSlice()) {
		return false
	}
	dst := prefixOf(&r.Dst)
	return dst == g.addr.Masked() || dst == netip.PrefixFrom(g.gateway, 32)
}

// kernelRoute returns the wished route r as the kernel takes it. link is the index of the container's interface. A route
// without a next hop goes by the gateway, unless its scope says that the destination is on the link. A next hop other
// than the gateway is onlink: the container has no connected route that covers it, and the host answers ARP for it.
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
