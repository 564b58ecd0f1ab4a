// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"

	"azurevnet/bridge/internal/conntrack"
	"azurevnet/bridge/internal/rtnl"
	"azurevnet/bridge/internal/ruleset"
)

// Publish makes these ports of the host lead to owner's endpoint, and no others. Without ports, those that
// Attach claimed stay claimed and lead nowhere. Publish returns the ports that lead to the endpoint afterwards.
// A repeat changes nothing. The error is InUseError if another endpoint has a port.
func (h *Host) Publish(ctx context.Context, owner string, ports []PublishedPort) ([]PublishedPort, error) {
	wishes, err := normalizedPorts(ports)
	if err != nil {
		return nil, err
	}
	if l, err := netlink.LinkByName(hostEndOf(owner)); len(wishes) == 0 && (rtnl.IsNotExist(err) || err == nil && hasNoPorts(l)) {
		return nil, nil // nearly every container ends like this, and needs no lock
	}
	p := &publisher{host: h}
	defer func() { p.nft.Close(); p.flows.Close() }() // after the lock was given back, because closing takes long: see ruleset.Conn
	unlock, err := h.lockHost(ctx, "publish ports of "+owner)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := p.publishLocked(ctx, owner, wishes); err != nil {
		return nil, fmt.Errorf("publish ports of %s: %w", owner, err)
	}
	return notIdle(p.ports), nil
}

// publisher is one call of Publish.
type publisher struct {
	host     *Host
	endpoint endpoint
	before   []PublishedPort // what the endpoint had before
	ports    []PublishedPort // claimed from now on; those that are not idle lead to the endpoint
	nft      ruleset.Conn
	flows    conntrack.Conn
}

func (p *publisher) publishLocked(ctx context.Context, owner string, wishes []PublishedPort) error {
	v, err := p.host.readEndpoints()
	if err != nil {
		return err
	}
	i := slices.IndexFunc(v.endpoints, func(e endpoint) bool { return e.isOf(owner) })
	if i < 0 {
		if len(wishes) == 0 {
			return nil // the endpoint is gone, and its ports with it
		}
		return errors.New("it is not attached: start its container again")
	}
	p.endpoint, p.before = v.endpoints[i], v.publishedPorts()[v.endpoints[i].link.Name]
	for _, had := range p.before {
		had.Idle = true
		p.ports = append(p.ports, had)
	}
	if len(wishes) > 0 {
		if p.ports, err = v.choosePorts(owner, p.endpoint.nic, p.endpoint.link.Name, wishes); err != nil {
			return err
		}
	}
	// The alias comes first: host.json's ports of a link whose alias has none are void.
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"publish alias", p.writeAlias},
		{"publish claims", func() error { return p.host.claimPorts(ctx, v, p.endpoint.link.Name, p.ports) }},
		{"publish elements", func() error { return p.changeElements(v) }},
		{"publish flows", func() error { return deleteUDPFlows(&p.flows, slices.Concat(notIdle(p.before), notIdle(p.ports))) }},
	} {
		if err := p.host.beforeStep(step.name); err != nil {
			return err
		}
		if err := step.do(); err != nil {
			return err
		}
	}
	return nil
}

// writeAlias writes the number of ports into the alias if the alias has a lower one.
func (p *publisher) writeAlias() error {
	if p.endpoint.ports >= len(p.ports) {
		return nil
	}
	p.endpoint.ports = len(p.ports)
	return netlink.LinkSetAlias(&netlink.Device{LinkAttrs: *p.endpoint.link}, p.endpoint.alias.String())
}

// hostEndOf returns the name of the owner's host end.
func hostEndOf(owner string) string {
	name, _ := linkNames(owner)
	return name
}

// hasNoPorts reports whether a link is a whole host end without a published or claimed port.
func hasNoPorts(l netlink.Link) bool {
	a, whole := endpointAliasOf(l)
	return whole && a.ports == 0
}

// changeElements removes the elements of ports that the endpoint no longer has, and adds those of the others.
// If the kernel refuses an element, a killed process has left one for the port. Then the tables are written
// anew.
func (p *publisher) changeElements(v *view) error {
	of := func(ports []PublishedPort) ruleset.Endpoint {
		return v.rulesetEndpoint(p.endpoint.alias, p.endpoint.link.Name, ports)
	}
	over := slices.DeleteFunc(v.state.mayHaveElements(p.endpoint.link.Name, p.before), func(had PublishedPort) bool { return slices.Contains(p.ports, had) })
	if err := p.nft.RemovePorts(of(over)); err != nil {
		return err
	}
	if p.nft.AddPorts(of(p.ports)) == nil {
		return nil
	}
	v, err := p.host.readEndpoints()
	if err == nil {
		_, err = v.rulesetConfig().Sync()
	}
	return err
}

// mayHaveElements returns those ports of an endpoint that may have elements in the nft table, whatever
// host.json says: a Publish that died may have left the element of an idle port. An idle port that leads to
// another endpoint by now is left out, because the element is that endpoint's.
func (s *hostState) mayHaveElements(link string, ports []PublishedPort) (out []PublishedPort) {
	for _, p := range ports {
		elsewhere := false
		for other, theirs := range s.Ports {
			elsewhere = elsewhere || other != link && slices.ContainsFunc(theirs, func(o PublishedPort) bool { return !o.Idle && p.conflictsWith(o) })
		}
		if !p.Idle || !elsewhere {
			p.Idle = false
			out = append(out, p)
		}
	}
	return out
}

// notIdle returns the ports that lead to a container.
func notIdle(ports []PublishedPort) []PublishedPort {
	return slices.DeleteFunc(slices.Clone(ports), func(p PublishedPort) bool { return p.Idle })
}

// deleteUDPFlows deletes the flows to UDP ports of the host. A client that goes on sending would else still
// reach the container that had the port before.
func deleteUDPFlows(c *conntrack.Conn, ports []PublishedPort) error {
	var all []conntrack.Flows
	for _, p := range ports {
		if p.Proto == "udp" {
			all = append(all, conntrack.Flows{UDPPort: p.HostPort})
		}
	}
	return c.Delete(all...)
}
