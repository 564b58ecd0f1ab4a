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

// decide finds what the endpoint needs and makes sure that it can have it: the NIC and its bridge, the
// address and the MAC, the ports, and tables that have its policy. secondNIC: the container's NIC is not
// the primary one, so act must also make the routing rules of that NIC.
func (at *attach) decide(ctx context.Context) (secondNIC bool, err error) {
	v, tables, enough, err := at.look()
	if err != nil {
		return false, err
	}
	if enough {
		return at.settle(v)
	}
	if v, err = at.h.readEndpoints(); err != nil {
		return false, err
	}
	secondNIC, err = at.prepare(ctx, v, tables)
	if err != nil {
		err = errors.Join(err, at.undoAll())
	}
	return secondNIC, err
}

// look reads as little as nearly every attach needs: v has the NIC and its bridge. tables says that the nft tables
// stand with the endpoint's policy. enough: nothing more has to be read. The tables stand, no route leads to the
// address, and no port is asked for.
func (at *attach) look() (v *view, tables, enough bool, err error) {
	state, err := at.h.state()
	if err != nil {
		return nil, false, false, err
	}
	v = &view{state: state, nics: map[string]netlink.Link{}}
	part := ruleset.ForTransparent
	if at.a.bridge != "" {
		part = ruleset.ForBridges
	}
	if _, known := state.Policies[at.a.policy]; !known {
		return v, false, false, nil
	}
	if tables, err = ruleset.Stands(at.e.Policy.network(), part); !tables || err != nil {
		return v, false, false, err
	}
	nic := nicByName(state, at.a.nic)
	if nic == nil || len(at.e.Ports) > 0 {
		return v, true, false, nil
	}
	v.links, v.nics[at.a.nic] = rtnl.Links{nic}, nic
	if at.a.bridge != "" {
		l, err := netlink.LinkByName(at.a.bridge)
		if err != nil {
			return v, true, false, ignoreMissing(err)
		}
		v.links = append(v.links, l)
	}
	enough, err = addressIsFree(at.a.addr.Addr())
	return v, true, enough, err
}

// prepare refuses what another endpoint or the host has, claims the ports, and, unless the tables stand, makes them
// what the endpoint's policy needs.
func (at *attach) prepare(ctx context.Context, v *view, tables bool) (secondNIC bool, err error) {
	addr := at.a.addr.Addr()
	for _, e := range v.endpoints {
		if e.addr.Addr() == addr {
			return false, &HeldError{Owner: e.owner, text: fmt.Sprintf("%s has the address %s (link %s): end that container first, or ask for another address", e.holder(), addr, e.link.Name)}
		}
	}
	if err := refuseForeignRoute(addr); err != nil {
		return false, err
	}
	if dev := v.holds(addr); dev != "" {
		return false, fmt.Errorf("%s itself has the address %s: ip addr del %[2]s dev %[1]s, or have it reclaimed: RECLAIM=on of the Docker plugin, reclaim of the CNI configuration", dev, addr)
	}
	if len(at.e.Ports) > 0 {
		if at.ports, err = v.choosePorts(at.e.Owner, at.e.NIC, at.link, at.e.Ports); err != nil {
			return false, err
		}
		if err := at.h.hook("ports"); err != nil {
			return false, err
		}
		if err := at.h.claimPorts(ctx, v, at.link, at.ports); err != nil {
			return false, err
		}
	}
	if len(at.ports) > 0 {
		at.undo = append(at.undo, func() error { return at.h.releasePorts(context.WithoutCancel(ctx), at.link) })
	}
	if _, known := v.state.Policies[at.a.policy]; !known {
		if err := at.h.note(ctx, at.e.Policy, v.links); err != nil {
			return false, err
		}
		v.state.Policies[at.a.policy] = at.e.Policy
	}
	if secondNIC, err = at.settle(v); err != nil || tables {
		return secondNIC, err
	}
	at.undo = append(at.undo, func() error { return at.nft.Remove(at.config(), at.rules) })
	return secondNIC, at.syncTables(v)
}

// settle takes from the view what the endpoint's parts rest on.
func (at *attach) settle(v *view) (secondNIC bool, err error) {
	nic := v.nics[at.a.nic]
	if nic == nil {
		return false, fmt.Errorf("no network interface of this host has the MAC %s: ip -br link shows which it has", at.a.nic)
	}
	if err := refuseHost(v.links, nic); err != nil {
		return false, err
	}
	at.mtu = nic.Attrs().MTU
	if at.e.MTU > at.mtu {
		return false, fmt.Errorf("an MTU of %d bytes is more than the %d of %s: larger packets would vanish; ask for at most that, or leave the MTU out", at.e.MTU, at.mtu, nic.Attrs().Name)
	}
	if at.e.MTU != 0 {
		at.mtu = at.e.MTU
	}
	if at.a.bridge != "" {
		l := v.links.Named(at.a.bridge)
		if l == nil {
			return false, fmt.Errorf("there is no bridge %s any more: try again, which makes it", at.a.bridge)
		}
		if mac, ours := bridgeOf(l); !ours || mac != at.a.nic {
			return false, fmt.Errorf("%s is not azure-vnet's bridge of the NIC %s: give the network's bridge another name", at.a.bridge, at.a.nic)
		}
		at.bridge = l.Attrs().Index
		if err := at.macIsFree(); err != nil {
			return false, err
		}
	}
	at.rules = v.rulesOf(at.a, at.link, at.ports)
	p := at.e.Policy
	at.rules.Internal, at.rules.NoMetadata = p.Internal, p.NoMetadata
	return !v.state.NICs[at.a.nic].Primary, nil
}

// macIsFree refuses a MAC that the bridge has already: the kernel would move it to the new port, and
// the other container would be cut off.
func (at *attach) macIsFree() error {
	f, found, err := rtnl.FindForwarding(at.bridge, at.a.mac)
	if err != nil || !found {
		return err
	}
	holder, owner := fmt.Sprintf("link %d", f.Port), ""
	if l, err := netlink.LinkByIndex(f.Port); err == nil {
		if halfMade(l) { // a detach is about to delete it, or died before it could
			return delLink(l)
		}
		holder = l.Attrs().Name
		if a, ok := endpointOf(l); ok {
			holder, owner = fmt.Sprintf("%s (%s)", a.owner, a.label()), a.owner
		}
	}
	return &HeldError{Owner: owner, text: fmt.Sprintf("the MAC %s is that of %s on %s already: ask for another, or for none", at.a.mac, holder, at.a.bridge)}
}

// addressIsFree asks the kernel's routes, which know of every address that the host or a container has.
func addressIsFree(addr netip.Addr) (bool, error) {
	_, found, err := routeTo(addr)
	return !found, err
}

// refuseForeignRoute refuses an address that a route of somebody else leads to: it is a container's of theirs.
func refuseForeignRoute(addr netip.Addr) error {
	r, found, err := routeTo(addr)
	if err != nil || !found || r.Protocol == ourProtocol || r.Type != unix.RTN_UNICAST {
		return err
	}
	return fmt.Errorf("a route to %s is there that is not ours (ip route show table %d %[1]s): whoever made it uses that address; end that, or ask for another address", addr, r.Table)
}

// routeTo is the route to that one address, if there is one.
func routeTo(addr netip.Addr) (r netlink.Route, found bool, err error) {
	routes, err := netlink.RouteGetWithOptions(net.IP(addr.AsSlice()), &netlink.RouteGetOptions{FIBMatch: true})
	if rtnl.NotThere(err) || errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) {
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
