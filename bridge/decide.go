// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/rtnl"
	"azurevnet/bridge/internal/ruleset"
)

// prepareParts finds out what the endpoint needs, and refuses what it cannot have: the NIC and its bridge, the address
// and the MAC, the ports of the host. It also sees to what the parts rest on: claims of ports and the policy in host.json,
// and nft tables that have the policy. If a half-made link holds the MAC, it deletes the link.
//
// If it fails, it takes back the claims, and the endpoint's elements of the nft tables. The policy stays in host.json, and
// a half-made link stays deleted: neither is of use to this endpoint alone, and the link was nobody's.
//
// Nearly every attach is decided from a few reads. Only if these do not suffice, all links and addresses are read.
func (a *attacher) prepareParts(ctx context.Context) error {
	v, tablesExist, enough, err := a.readLittle()
	if err != nil {
		return err
	}
	if enough {
		return a.decideFromView(v)
	}
	if v, err = a.host.readEndpoints(); err != nil {
		return err
	}
	if err := a.prepareFromAll(ctx, v, tablesExist); err != nil {
		return errors.Join(err, a.undoAll())
	}
	return nil
}

// readLittle reads as little as nearly every attach needs. The view has the NIC and its bridge only.
// tablesExist reports whether the nft tables have the endpoint's policy. enough reports whether nothing else
// has to be read: the tables exist, no route leads to the address, and no port of the host is asked for.
func (a *attacher) readLittle() (v *view, tablesExist, enough bool, err error) {
	state, err := a.host.readState()
	if err != nil {
		return nil, false, false, err
	}
	v = &view{state: state, nics: map[string]netlink.Link{}}
	part := ruleset.ForTransparent
	if a.alias.bridge != "" {
		part = ruleset.ForBridges
	}
	if _, known := state.Policies[a.alias.policy]; !known {
		return v, false, false, nil
	}
	if tablesExist, err = ruleset.TablesExist(a.wish.Policy.rulesetPolicy(), part); !tablesExist || err != nil {
		return v, false, false, err
	}
	nic := nicByName(state, a.alias.nic)
	if nic == nil || len(a.wish.Ports) > 0 {
		return v, true, false, nil
	}
	v.links, v.nics[a.alias.nic] = rtnl.Links{nic}, nic
	if a.alias.bridge != "" {
		l, err := netlink.LinkByName(a.alias.bridge)
		if err != nil {
			return v, true, false, ignoreMissing(err)
		}
		v.links = append(v.links, l)
	}
	enough, err = addressIsFree(a.alias.addr.Addr())
	return v, true, enough, err
}

// prepareFromAll is prepareParts with a view that has all endpoints and addresses.
func (a *attacher) prepareFromAll(ctx context.Context, v *view, tablesExist bool) error {
	if err := a.refuseUsedAddress(v); err != nil {
		return err
	}
	if err := a.claimPorts(ctx, v); err != nil {
		return err
	}
	if _, known := v.state.Policies[a.alias.policy]; !known {
		if err := a.host.recordPolicy(ctx, a.wish.Policy, v.links); err != nil {
			return err
		}
		v.state.Policies[a.alias.policy] = a.wish.Policy
	}
	if err := a.decideFromView(v); err != nil || tablesExist {
		return err
	}
	a.undo = append(a.undo, func() error { return a.nft.RemoveEndpoint(a.rulesetConfig(), a.rulesetEndpoint) })
	return a.syncTables(v)
}

// refuseUsedAddress refuses an address that another endpoint, a container of another plugin, or the host itself has.
func (a *attacher) refuseUsedAddress(v *view) error {
	addr := a.alias.addr.Addr()
	for _, e := range v.endpoints {
		if e.addr.Addr() == addr {
			return &InUseError{Owner: e.owner, text: fmt.Sprintf("%s has the address %s (link %s): end that container first, or ask for another address", e.ownerText(), addr, e.link.Name)}
		}
	}
	if err := refuseForeignRoute(addr); err != nil {
		return err
	}
	if dev := v.linkWithAddress(addr); dev != "" {
		return fmt.Errorf("%s itself has the address %s: ip addr del %[2]s dev %[1]s, or have it reclaimed: RECLAIM=on of the Docker plugin, reclaim of the CNI configuration", dev, addr)
	}
	return nil
}

// claimPorts chooses the ports of the host that the endpoint asks for, and claims them in host.json.
func (a *attacher) claimPorts(ctx context.Context, v *view) (err error) {
	if len(a.wish.Ports) == 0 {
		return nil
	}
	if a.ports, err = v.choosePorts(a.wish.Owner, a.wish.NIC, a.hostEnd, a.wish.Ports); err != nil {
		return err
	}
	if err := a.host.beforeStep("ports"); err != nil {
		return err
	}
	if err := a.host.claimPorts(ctx, v, a.hostEnd, a.ports); err != nil {
		return err
	}
	a.undo = append(a.undo, func() error { return a.host.releasePorts(context.WithoutCancel(ctx), a.hostEnd) })
	return nil
}

// decideFromView takes from the view what the endpoint's parts depend on: the NIC, the MTU, and the bridge. The view needs
// no more than these links.
func (a *attacher) decideFromView(v *view) error {
	nic := v.nics[a.alias.nic]
	if nic == nil {
		return fmt.Errorf("no network interface of this host has the MAC %s: ip -br link shows which it has", a.alias.nic)
	}
	if err := refuseHost(v.links, nic); err != nil {
		return err
	}
	a.mtu = nic.Attrs().MTU
	if a.wish.MTU > a.mtu {
		return fmt.Errorf("an MTU of %d bytes is more than the %d of %s: larger packets would vanish; ask for at most that, or leave the MTU out", a.wish.MTU, a.mtu, nic.Attrs().Name)
	}
	if a.wish.MTU != 0 {
		a.mtu = a.wish.MTU
	}
	if a.alias.bridge != "" {
		l := v.links.ByName(a.alias.bridge)
		if l == nil {
			return fmt.Errorf("there is no bridge %s any more: try again, which makes it", a.alias.bridge)
		}
		if mac, ours := bridgeAliasOf(l); !ours || mac != a.alias.nic {
			return fmt.Errorf("%s is not azure-vnet's bridge of the NIC %s: give the network's bridge another name", a.alias.bridge, a.alias.nic)
		}
		a.bridgeIndex = l.Attrs().Index
		if err := a.refuseUsedMAC(); err != nil {
			return err
		}
	}
	a.rulesetEndpoint = v.rulesetEndpoint(a.alias, a.hostEnd, a.ports)
	p := a.wish.Policy
	a.rulesetEndpoint.Internal, a.rulesetEndpoint.NoMetadata = p.Internal, p.NoMetadata
	a.secondNIC = !v.state.NICs[a.alias.nic].Primary
	return nil
}

// refuseUsedMAC refuses a MAC that the bridge has already. The kernel would move the MAC to the new port, and
// the other container would be cut off. A half-made link is no reason to refuse: it is deleted.
func (a *attacher) refuseUsedMAC() error {
	f, found, err := rtnl.FindForwarding(a.bridgeIndex, a.alias.mac)
	if err != nil || !found {
		return err
	}
	holder, owner := fmt.Sprintf("link %d", f.Port), ""
	if l, err := netlink.LinkByIndex(f.Port); err == nil {
		if halfMade(l) { // a detach is about to delete this link, or died before it could
			return deleteLink(l)
		}
		holder = l.Attrs().Name
		if other, ok := endpointAliasOf(l); ok {
			holder, owner = fmt.Sprintf("%s (%s)", other.owner, other.label()), other.owner
		}
	}
	return &InUseError{Owner: owner, text: fmt.Sprintf("the MAC %s is that of %s on %s already: ask for another, or for none", a.alias.mac, holder, a.alias.bridge)}
}

// addressIsFree reports whether no route leads to the address alone. The kernel has such a route for each
// address of the host and of a container.
func addressIsFree(addr netip.Addr) (bool, error) {
	_, found, err := routeTo(addr)
	return !found, err
}

// refuseForeignRoute refuses an address that a route of somebody else leads to alone. Such a route is to a
// container of another plugin.
func refuseForeignRoute(addr netip.Addr) error {
	r, found, err := routeTo(addr)
	if err != nil || !found || r.Protocol == ourProtocol || r.Type != unix.RTN_UNICAST {
		return err
	}
	return fmt.Errorf("a route to %s is there that is not ours (ip route show table %d %[1]s): whoever made it uses that address; end that, or ask for another address", addr, r.Table)
}

// routeTo finds the route to that one address (/32), in any table that the kernel asks.
func routeTo(addr netip.Addr) (r netlink.Route, found bool, err error) {
	routes, err := netlink.RouteGetWithOptions(net.IP(addr.AsSlice()), &netlink.RouteGetOptions{FIBMatch: true})
	if rtnl.IsNotExist(err) || errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) {
		return r, false, nil
	}
	if err != nil {
		return r, false, fmt.Errorf("look for a route to %s: %w", addr, err)
	}
	for _, r := range routes {
		if r.Dst != nil && prefixOf(r.Dst).Bits() == 32 {
			return r, true, nil
		}
	}
	return r, false, nil
}
