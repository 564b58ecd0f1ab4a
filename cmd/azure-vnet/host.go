// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"azurevnet/bridge"
	"azurevnet/internal/cni"
)

const callIPTables = "/proc/sys/net/bridge/bridge-nf-call-iptables"

// serveServices has bridged frames pass iptables, where kube-proxy and portmap
// turn a service's address into a container's.
func serveServices() error {
	if err := serviceable(); err != nil {
		return err
	}
	is, err := os.ReadFile(callIPTables)
	if err == nil && strings.TrimSpace(string(is)) != "1" {
		err = os.WriteFile(callIPTables, []byte("1"), 0)
	}
	if err != nil {
		return fmt.Errorf("have bridged frames pass iptables: %w", err)
	}
	return nil
}

// serviceable tells whether the kernel can do that.
func serviceable() error {
	_, err := os.Stat(callIPTables)
	if errors.Is(err, fs.ErrNotExist) {
		return types.NewError(types.ErrPluginNotAvailable, "the kernel module br_netfilter is not loaded, without which services have no way to bridged containers: modprobe br_netfilter, and write br_netfilter into /etc/modules-load.d/azure-vnet.conf for the next boot", "")
	}
	if err != nil {
		return fmt.Errorf("have bridged frames pass iptables: %w", err)
	}
	return nil
}

// master is the NIC of a network whose addresses come from another IPAM: the one
// that is named, else the one that the default route leaves by.
func master(ctx context.Context, c *cni.Call, host *bridge.Host) (mac string, primary bool, err error) {
	byRoute, err := defaultLink()
	if err != nil {
		return "", false, err
	}
	if byRoute != "" {
		_, mac, err = host.NIC(ctx, byRoute)
	}
	if c.Conf.Master == "" {
		if err == nil && byRoute == "" {
			err = errors.New("the host has no default route to tell its NIC by: name it with \"master\"")
		}
		return mac, true, err
	}
	_, named, err := host.NIC(ctx, c.Conf.Master)
	if err != nil {
		return "", false, types.NewError(types.ErrInvalidNetworkConfig, "master: "+err.Error(), "")
	}
	return named, named == mac, nil
}

// defaultLink names the link that the best default route leaves by; "" if there is none.
func defaultLink() (string, error) {
	any4 := &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Dst: any4}, netlink.RT_FILTER_DST)
	if err != nil {
		return "", fmt.Errorf("read the default route: %w", err)
	}
	best := -1
	for i, r := range routes {
		if best < 0 || r.Priority < routes[best].Priority {
			best = i
		}
	}
	if best < 0 {
		return "", nil
	}
	l, err := netlink.LinkByIndex(routes[best].LinkIndex)
	if err != nil {
		return "", fmt.Errorf("read the default route's link: %w", err)
	}
	return l.Attrs().Name, nil
}

// misnamed gives err, of a bridge that does not stand, the code of a wrong
// configuration where its "bridge" can never be that of the NIC.
func misnamed(ctx context.Context, c *cni.Call, host *bridge.Host, nic string, err error) error {
	if c.Conf.Bridge == "" {
		return err
	}
	all, bad := host.Bridges(ctx)
	if bad != nil {
		return err
	}
	ours := false
	for _, b := range all {
		named := b.Name == c.Conf.Bridge
		if ours = ours || named; named != (b.MAC.String() == nic) {
			return types.NewError(types.ErrInvalidNetworkConfig, err.Error(), "")
		}
	}
	if _, bad := netlink.LinkByName(c.Conf.Bridge); bad == nil && !ours {
		return types.NewError(types.ErrInvalidNetworkConfig, err.Error(), "")
	}
	return err
}

// inside opens a socket in the container's namespace.
func inside(path string) (*netlink.Handle, error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return nil, fmt.Errorf("the container's network namespace: %w", &os.PathError{Op: "open", Path: path, Err: err})
	}
	defer ns.Close()
	return netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
}

// addRoutes adds what another IPAM wants beyond the default route.
func addRoutes(c *cni.Call, g *given) error {
	if len(g.routes) < 2 {
		return nil
	}
	in, err := inside(c.Netns)
	if err != nil {
		return err
	}
	defer in.Close()
	l, err := in.LinkByName(c.IfName)
	if err != nil {
		return fmt.Errorf("find %s in %s: %w", c.IfName, c.Netns, err)
	}
	for _, r := range g.routes[1:] {
		route := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: &r.Dst, Gw: r.GW, MTU: r.MTU, AdvMSS: r.AdvMSS, Priority: r.Priority}
		if r.GW == nil {
			route.Gw = g.gateway.AsSlice()
		}
		if r.Table != nil {
			route.Table = *r.Table
		}
		if r.Scope != nil {
			route.Scope = netlink.Scope(*r.Scope)
		}
		err := in.RouteAdd(route)
		if errors.Is(err, unix.EEXIST) && r.Priority == 0 { // of another interface of the container, and goes before
			route.Priority = l.Attrs().Index
			err = in.RouteAdd(route)
		}
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("route %s in %s: %w", &r.Dst, c.Netns, err)
		}
	}
	return nil
}
