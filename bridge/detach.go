// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"

	"azurevnet/bridge/internal/conntrack"
	"azurevnet/bridge/internal/rtnl"
	"azurevnet/bridge/internal/ruleset"
	"azurevnet/internal/dump"
)

// Detach takes owner's interface away. None is success. The container sends nothing any more as soon as
// its elements are gone. When all else is gone the alias is cleared: from there on the link is nobody's, and
// whoever comes deletes it. The link itself goes last and without the lock, since the kernel takes some 20 ms.
func (h *Host) Detach(ctx context.Context, owner string) error {
	d := &detach{h: h}
	defer d.close()
	if err := d.run(ctx, owner); err != nil {
		return fmt.Errorf("detach %s: %w", owner, err)
	}
	return nil
}

type detach struct {
	h     *Host
	link  netlink.Link
	a     alias
	nft   ruleset.Conn
	flows conntrack.Conn
}

// close comes after the lock was given back: see ruleset.Conn.
func (d *detach) close() {
	d.nft.Close()
	d.flows.Close()
}

func (d *detach) run(ctx context.Context, owner string) error {
	err := d.clearLocked(ctx, owner)
	if err != nil || d.link == nil {
		return err
	}
	if err := d.h.hook("detach link"); err != nil {
		return err
	}
	return delLink(d.link)
}

// clearLocked finds the owner's link, and clears it under the lock. d.link is nil if there is none.
func (d *detach) clearLocked(ctx context.Context, owner string) error {
	unlock, err := d.h.lock(ctx, "detach "+owner)
	if err != nil {
		return err
	}
	defer unlock() // also where a panic passes, which a handler of the plugin recovers
	name, _ := linkNames(owner)
	if d.link, err = netlink.LinkByName(name); err != nil {
		d.link = nil
		return ignoreMissing(err)
	}
	var whole bool
	switch d.a, whole = endpointOf(d.link); {
	case whole && d.a.is(owner):
		return d.removeParts(ctx)
	case !halfMade(d.link): // not ours, or of an owner with the same hash
		d.link = nil
	}
	return nil
}

// removeParts takes away all that was attached with the link, and the alias. The caller holds the lock.
func (d *detach) removeParts(ctx context.Context) error {
	state, err := d.h.state()
	if err != nil {
		return err
	}
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"detach elements", func() error { return d.removeElements(state) }},
		{"detach routes", func() error { return d.removeRoutes(state) }},
		{"detach flows", d.forgetFlows},
		{"detach ports", func() error {
			if d.a.ports == 0 {
				return nil
			}
			return d.h.releasePorts(ctx, d.link.Attrs().Name)
		}},
		{"detach alias", func() error { return netlink.LinkSetAlias(d.link, "") }},
	} {
		if err := d.h.hook(step.name); err != nil {
			return err
		}
		if err := step.do(); err != nil && !rtnl.NotThere(err) {
			return err
		}
	}
	return nil
}

func (d *detach) removeElements(state *hostState) error {
	v := &view{state: state}
	nic := nicByName(state, d.a.nic)
	if nic == nil && d.a.ports > 0 { // renamed, or host.json was lost: the ports' elements have the NIC's name
		if links, err := rtnl.ReadLinks(); err == nil {
			nic, _ = findNIC(links, d.a.nic, state.NICs[d.a.nic].Name)
		}
	}
	if nic != nil {
		v.nics = map[string]netlink.Link{d.a.nic: nic}
	}
	n := policyOf(state.Policies, d.a.policy).network()
	n.ID = d.a.policy
	v.endpoints = []endpoint{{d.a, d.link.Attrs()}}
	ports := state.leadable(d.link.Attrs().Name, v.ports()[d.link.Attrs().Name])
	return d.nft.Remove(ruleset.Config{Networks: []ruleset.Network{n}}, v.rulesOf(d.a, d.link.Attrs().Name, ports))
}

// removeRoutes takes away the host's way to the container, and the rules that a transparent one has of its
// own.
func (d *detach) removeRoutes(state *hostState) error {
	link := d.link.Attrs().Index
	if d.a.bridge != "" {
		b, err := netlink.LinkByName(d.a.bridge)
		if rtnl.NotThere(err) {
			return nil // and its routes with it
		}
		if err != nil {
			return err
		}
		link = b.Attrs().Index
	}
	for _, table := range containerTables {
		if err := delRoute(d.a.route(table, link, 0)); err != nil {
			return err
		}
	}
	n := rtnl.Neighbour{Link: link, Addr: d.a.addr.Addr(), MAC: d.a.mac, Protocol: ourProtocol}
	if err := ignoreMissing(rtnl.DelNeighbour(n)); err != nil {
		return fmt.Errorf("delete the neighbour entry of %s: %w", n.Addr, err)
	}
	if d.a.bridge != "" || !state.needsOwnRules(d.a.nic) {
		return nil
	}
	rules, err := dump.Whole(func() ([]netlink.Rule, error) { return netlink.RuleList(netlink.FAMILY_V4) })
	var errs []error
	for _, r := range rules {
		if r.Protocol == ourProtocol && r.IifName == d.link.Attrs().Name {
			errs = append(errs, ignoreMissing(netlink.RuleDel(&r)))
		}
	}
	return errors.Join(append(errs, err)...)
}

func (d *detach) forgetFlows() error { return forgetFlows(&d.flows, d.a.addr.Addr()) }
