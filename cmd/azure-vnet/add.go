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

// add serves ADD: it leases an address, ensures the bridge, attaches the container, and confirms the lease. If it fails,
// it leaves nothing.
//
// The order matters if the process is killed between two steps. The address is leased before the kernel has it, so
// another call never gets it too. Before the link has its alias, the worst that is left is a lease without a link,
// which heals within minutes. After that, a whole link is left with its lease: the DEL that follows removes both.
func add(ctx context.Context, c *cni.Call) (*current.Result, error) {
	l, err := checkAdd(c)
	if err != nil {
		return nil, err
	}
	if err := removeLeftover(ctx, c, l); err != nil {
		return nil, err
	}
	g, err := getAddress(ctx, c, l)
	if err != nil {
		return nil, err
	}
	br, err := ensureBridge(ctx, c, l.Host, g)
	if err != nil {
		return nil, undoAdd(ctx, c, l.Host, g, false, err)
	}
	attached, err := attachContainer(ctx, c, l.Host, g, br)
	if err != nil { // Attach has undone what it did. A link of the container is then another call's
		return nil, undoAdd(ctx, c, l.Host, g, false, err)
	}
	result, err := finishAdd(ctx, c, g, br, attached)
	if err != nil {
		return nil, undoAdd(ctx, c, l.Host, g, true, err)
	}
	return result, nil
}

// checkAdd refuses a call that cannot succeed, before an address is lent for it in vain.
func checkAdd(c *cni.Call) (*lender.Lender, error) {
	if err := c.CheckOwner(); err != nil {
		return nil, err
	}
	l, err := lender.Open(c)
	if err != nil {
		return nil, err
	}
	if err := l.Host.CheckPermitted(); err != nil {
		return nil, err
	}
	return l, checkNetns(c)
}

// removeLeftover removes what a killed ADD left of this interface. If the container has the interface, that is an error,
// and the interface stays as it is.
func removeLeftover(ctx context.Context, c *cni.Call, l *lender.Lender) error {
	attached, found, err := l.Host.Attachment(ctx, c.Owner())
	if err != nil {
		return err
	}
	if found && attached.InContainer {
		return cni.Errorf(cni.CodeAttached, "interface %s of container %s has %s already, and keeps it: DEL it first", c.IfName, c.ContainerID, attached.Addr.Addr())
	}
	if !lendsHere(c) {
		return nil
	}
	left, err := l.LeasesOf(ctx, func(owner string) bool { return owner == c.Owner() })
	if err != nil || len(left) == 0 {
		return err
	}
	return removeOwners(ctx, c, l, c.Owner())
}

// ensureBridge makes the bridge of the address's NIC and the host's rules, as far as they are missing. It checks the
// container's MTU against the NIC's.
func ensureBridge(ctx context.Context, c *cni.Call, host *bridge.Host, g *grant) (bridge.Bridge, error) {
	br, err := host.Ensure(ctx, bridge.Spec{
		MAC: g.nic, Primary: g.primary, Mode: bridge.Mode(c.Conf.Mode), Name: c.Conf.Bridge, Subnet: g.addr.Masked(), NICs: g.nics,
	})
	if err != nil {
		return br, codeMisnamed(ctx, c, host, g.nic, err)
	}
	for _, what := range br.Mended {
		c.Warn("mended: " + what)
	}
	if c.Conf.MTU > br.MTU {
		return br, cni.Errorf(types.ErrInvalidNetworkConfig, "mtu is %d, and the NIC %s has an MTU of %d bytes: larger packets would vanish; write at most that, or leave mtu out", c.Conf.MTU, br.NIC, br.MTU)
	}
	return br, nil
}

// codeMisnamed gives an error of Ensure the code of a wrong configuration, if the configuration names a bridge that
// this NIC can never have. Such a bridge is another NIC's, or not azure-vnet's, or the NIC has a bridge of another
// name.
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

// attachContainer makes the container's interface with the address. After an error no interface is left.
func attachContainer(ctx context.Context, c *cni.Call, host *bridge.Host, g *grant, br bridge.Bridge) (bridge.Attachment, error) {
	return host.Attach(ctx, bridge.Endpoint{
		Owner: c.Owner(), Pod: c.Pod, NIC: g.nic, Bridge: br.Name, Addr: g.addr, Gateway: g.gateway, MAC: c.Conf.MAC, MTU: c.Conf.MTU,
		Policy: policyOf(c.Conf), Netns: c.Netns, IfName: c.IfName, Ports: portsOf(c.Conf),
	})
}

// finishAdd adds the routes that another IPAM wishes for, confirms the lease, and returns the result of ADD.
func finishAdd(ctx context.Context, c *cni.Call, g *grant, br bridge.Bridge, attached bridge.Attachment) (*current.Result, error) {
	if err := addRoutes(c, g); err != nil {
		return nil, err
	}
	if err := g.confirm(ctx); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err // the runtime has given up by now, and would not know of the interface
	}
	veth, err := netlink.LinkByName(attached.Link)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", attached.Link, err)
	}
	result := &current.Result{Interfaces: listInterfaces(c, br, veth, attached), Routes: g.routes, DNS: c.Conf.DNS}
	container := len(result.Interfaces) - 1
	result.IPs = []*current.IPConfig{{Interface: &container, Address: lender.IPNet(g.addr), Gateway: net.IP(g.gateway.AsSlice())}}
	if c.Conf.DNS.IsEmpty() {
		result.DNS = g.dns
	}
	return result, nil
}

// listInterfaces lists the bridge, if the container has one, the host end, and last the container's interface.
func listInterfaces(c *cni.Call, br bridge.Bridge, veth netlink.Link, attached bridge.Attachment) []*current.Interface {
	all := []*current.Interface{
		{Name: attached.Link, Mac: veth.Attrs().HardwareAddr.String(), Mtu: attached.MTU},
		{Name: c.IfName, Mac: attached.MAC.String(), Mtu: attached.MTU, Sandbox: c.Netns},
	}
	if attached.Bridge == "" {
		return all
	}
	return append([]*current.Interface{{Name: br.Name, Mac: br.MAC.String(), Mtu: br.MTU}}, all...)
}

// undoAdd gives the address back after an ADD that failed with err. If this ADD attached the container, undoAdd detaches
// it first. If it cannot be detached, the address stays leased, because the container may still use it.
func undoAdd(ctx context.Context, c *cni.Call, host *bridge.Host, g *grant, attached bool, err error) error {
	ctx, cancel := cni.Undo(ctx)
	defer cancel()
	if attached {
		if bad := host.Detach(ctx, c.Owner()); bad != nil {
			return errors.Join(err, bad)
		}
	}
	return errors.Join(err, g.release(ctx))
}
