// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"

	"azurevnet/bridge"
	"azurevnet/internal/cni"
	"azurevnet/internal/lender"
)

// add leases an address, makes the interface and confirms the lease. In this order a
// crash leaks a lease at worst, and no address is ever lent twice. An add that fails
// leaves nothing.
func add(ctx context.Context, c *cni.Call) (*current.Result, error) {
	if err := c.CheckOwner(); err != nil {
		return nil, err
	}
	l, err := lender.Open(c)
	if err != nil {
		return nil, err
	}
	if err := l.Host.CheckPermitted(); err != nil { // before an address is lent in vain
		return nil, err
	}
	if err := checkNetns(c); err != nil {
		return nil, err
	}
	if err := removeLeftover(ctx, c, l); err != nil {
		return nil, err
	}
	given, err := getAddress(ctx, c, l)
	if err != nil {
		return nil, err
	}
	result, attached, err := attachContainer(ctx, c, l.Host, given)
	if err == nil {
		return result, nil
	}
	undo, cancel := cni.Undo(ctx)
	defer cancel()
	if attached { // else a link of the container is another call's
		if bad := l.Host.Detach(undo, c.Owner()); bad != nil {
			return nil, errors.Join(err, bad) // the address stays lent while it may be in use
		}
	}
	return nil, errors.Join(err, given.release(undo))
}

// removeLeftover refuses an interface that the container has already, and leaves it as
// it is. It takes away what a killed ADD left.
func removeLeftover(ctx context.Context, c *cni.Call, l *lender.Lender) error {
	at, found, err := l.Host.Attachment(ctx, c.Owner())
	if err != nil {
		return err
	}
	if found && at.InContainer {
		return cni.Errorf(cni.CodeAttached, "interface %s of container %s has %s already, and keeps it: DEL it first", c.IfName, c.ContainerID, at.Addr.Addr())
	}
	if c.Conf.IPAM.Type != cni.IPAMType {
		return nil
	}
	left, err := l.LeasesOf(ctx, func(owner string) bool { return owner == c.Owner() })
	if err != nil || len(left) == 0 {
		return err
	}
	return removeOwners(ctx, c, l, c.Owner())
}

// attachContainer makes the container's interface and says what came of it. attached says that this call made the interface,
// so that after an error it is this call's to take away.
func attachContainer(ctx context.Context, c *cni.Call, host *bridge.Host, g *grant) (result *current.Result, attached bool, err error) {
	br, err := host.Ensure(ctx, bridge.Spec{MAC: g.nic, Primary: g.primary, Mode: bridge.Mode(c.Conf.Mode), Name: c.Conf.Bridge, Subnet: g.addr.Masked(), NICs: g.nics})
	if err != nil {
		return nil, false, codeMisnamed(ctx, c, host, g.nic, err)
	}
	for _, what := range br.Mended {
		c.Warn("mended: " + what)
	}
	if c.Conf.MTU > br.MTU {
		return nil, false, cni.Errorf(types.ErrInvalidNetworkConfig, "mtu is %d, and the NIC %s has an MTU of %d bytes: larger packets would vanish; write at most that, or leave mtu out", c.Conf.MTU, br.NIC, br.MTU)
	}
	at, err := host.Attach(ctx, bridge.Endpoint{
		Owner: c.Owner(), Pod: c.Pod, NIC: g.nic, Bridge: br.Name, Addr: g.addr, Gateway: g.gateway, MAC: c.Conf.MAC, MTU: c.Conf.MTU,
		Policy: policyOf(c.Conf), Netns: c.Netns, IfName: c.IfName, Ports: portsOf(c.Conf),
	})
	if err != nil {
		return nil, false, err
	}
	if err := addRoutes(c, g); err != nil {
		return nil, true, err
	}
	if err := g.confirm(ctx); err != nil {
		return nil, true, err
	}
	if err := ctx.Err(); err != nil {
		return nil, true, err // an answer after the deadline reaches nobody
	}
	veth, err := netlink.LinkByName(at.Link)
	if err != nil {
		return nil, true, fmt.Errorf("read %s: %w", at.Link, err)
	}
	result = &current.Result{Interfaces: listInterfaces(br, veth, at, c), Routes: g.routes, DNS: c.Conf.DNS}
	result.IPs = []*current.IPConfig{{Interface: current.Int(len(result.Interfaces) - 1), Address: ipNet(g.addr), Gateway: net.IP(g.gateway.AsSlice())}}
	if c.Conf.DNS.IsEmpty() {
		result.DNS = g.dns
	}
	return result, true, nil
}

// listInterfaces lists the bridge, if there is one, the host end and last the container's
// interface.
func listInterfaces(br bridge.Bridge, veth netlink.Link, at bridge.Attachment, c *cni.Call) []*current.Interface {
	all := []*current.Interface{
		{Name: at.Link, Mac: veth.Attrs().HardwareAddr.String(), Mtu: at.MTU},
		{Name: c.IfName, Mac: at.MAC.String(), Mtu: at.MTU, Sandbox: c.Netns},
	}
	if at.Bridge == "" {
		return all
	}
	return append([]*current.Interface{{Name: br.Name, Mac: br.MAC.String(), Mtu: br.MTU}}, all...)
}
