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

// Detach removes owner's interface. If there is none, that is success.
//
// The nft elements go first: without them the container can send nothing. The alias is cleared when everything
// but the link is gone. From then on the link is nobody's, and whoever meets it may delete it. The link goes
// last and without the lock, because the kernel takes some 20 ms for it.
func (h *Host) Detach(ctx context.Context, owner string) error {
	d := &detacher{host: h}
	defer d.closeSockets()
	if err := d.detachOwner(ctx, owner); err != nil {
		return fmt.Errorf("detach %s: %w", owner, err)
	}
	return nil
}

// detacher is one call of Detach.
type detacher struct {
	host  *Host
	link  netlink.Link
	alias alias
	nft   ruleset.Conn
	flows conntrack.Conn
}

// closeSockets runs after the lock was given back, because closing a netfilter socket takes long: see
// ruleset.Conn. Rare work closes its sockets under the lock: the making and deletion of nft tables, and
// RemoveUpstreamLink.
func (d *detacher) closeSockets() {
	d.nft.Close()
	d.flows.Close()
}

// detachOwner removes the parts under the lock, and then the link without it.
func (d *detacher) detachOwner(ctx context.Context, owner string) error {
	err := d.lockAndRemoveParts(ctx, owner)
	if err != nil || d.link == nil {
		return err
	}
	if err := d.host.beforeStep("detach link"); err != nil {
		return err
	}
	return deleteLink(d.link)
}

// lockAndRemoveParts takes the lock, finds the owner's link and removes its parts. Afterwards d.link is nil if
// there is no link to delete.
func (d *detacher) lockAndRemoveParts(ctx context.Context, owner string) error {
	unlock, err := d.host.lockHost(ctx, "detach "+owner)
	if err != nil {
		return err
	}
	defer unlock() // also after a panic, which the plugin's handlers recover from
	name, _ := linkNames(owner)
	if d.link, err = netlink.LinkByName(name); err != nil {
		d.link = nil
		return ignoreMissing(err)
	}
	var whole bool
	switch d.alias, whole = endpointAliasOf(d.link); {
	case whole && d.alias.isOf(owner):
		return d.removeParts(ctx)
	case !halfMade(d.link): // the link is not ours, or belongs to an owner with the same hash
		d.link = nil
	}
	return nil
}

// removeParts removes all that was attached with the link, and clears the alias last. The caller holds the
// lock.
func (d *detacher) removeParts(ctx context.Context) error {
	state, err := d.host.readState()
	if err != nil {
		return err
	}
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"detach elements", func() error { return d.removeElements(state) }},
		{"detach routes", func() error { return d.removeRoutes(state) }},
		{"detach flows", d.deleteFlows},
		{"detach ports", func() error {
			if d.alias.ports == 0 {
				return nil
			}
			return d.host.releasePorts(ctx, d.link.Attrs().Name)
		}},
		{"detach alias", d.clearAlias},
	} {
		if err := d.host.beforeStep(step.name); err != nil {
			return err
		}
		if err := step.do(); err != nil && !rtnl.IsNotExist(err) {
			return err
		}
	}
	return nil
}

// removeElements removes the endpoint's elements from the nft tables. It makes a view with this endpoint alone,
// since the elements derive from a view.
func (d *detacher) removeElements(state *hostState) error {
	v := &view{state: state}
	nic := nicByName(state, d.alias.nic)
	if nic == nil && d.alias.ports > 0 { // the NIC was renamed, or host.json was lost. The keys of published ports have the NIC's name
		if links, err := rtnl.ReadLinks(); err == nil {
			nic, _ = findNIC(links, d.alias.nic, state.NICs[d.alias.nic].Name)
		}
	}
	if nic != nil {
		v.nics = map[string]netlink.Link{d.alias.nic: nic}
	}
	n := policyOf(state.Policies, d.alias.policy).rulesetPolicy()
	n.ID = d.alias.policy
	v.endpoints = []endpoint{{d.alias, d.link.Attrs()}}
	ports := state.mayHaveElements(d.link.Attrs().Name, v.publishedPorts()[d.link.Attrs().Name])
	return d.nft.RemoveEndpoint(ruleset.Config{Policies: []ruleset.Policy{n}}, v.rulesetEndpoint(d.alias, d.link.Attrs().Name, ports))
}

// removeRoutes removes the host's way to the container, and the routing rules that a transparent endpoint of a
// second NIC has of its own.
func (d *detacher) removeRoutes(state *hostState) error {
	link := d.link.Attrs().Index
	if d.alias.bridge != "" {
		b, err := netlink.LinkByName(d.alias.bridge)
		if rtnl.IsNotExist(err) {
			return nil // the bridge is gone, and the kernel deleted its routes with it
		}
		if err != nil {
			return err
		}
		link = b.Attrs().Index
	}
	for _, table := range containerTables {
		if err := deleteRoute(d.alias.containerRoute(table, link, 0)); err != nil {
			return err
		}
	}
	n := rtnl.Neighbour{Link: link, Addr: d.alias.addr.Addr(), MAC: d.alias.mac, Protocol: ourProtocol}
	if err := ignoreMissing(rtnl.DeleteNeighbour(n)); err != nil {
		return fmt.Errorf("delete the neighbour entry of %s: %w", n.Addr, err)
	}
	if d.alias.bridge != "" || !state.needsOwnRules(d.alias.nic) {
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

// deleteFlows deletes the flows of the container's address.
func (d *detacher) deleteFlows() error { return deleteFlows(&d.flows, d.alias.addr.Addr()) }

// clearAlias says that the link is nobody's. From then on the group is the link's only mark, so it must be right.
func (d *detacher) clearAlias() error {
	if group := d.alias.group(); d.link.Attrs().Group != group {
		if err := netlink.LinkSetGroup(d.link, int(group)); err != nil {
			return err
		}
	}
	return netlink.LinkSetAlias(d.link, "")
}
