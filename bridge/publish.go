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

// Publish has ports of the host lead to owner's endpoint, and no others. For none, those that Attach claimed stay
// claimed and lead nowhere. A repeat changes nothing. It returns the ports that lead to the endpoint now.
func (h *Host) Publish(ctx context.Context, owner string, ports []Port) ([]Port, error) {
	wishes, err := normalPorts(ports)
	if err != nil {
		return nil, err
	}
	if l, err := netlink.LinkByName(hostEndOf(owner)); len(wishes) == 0 && (rtnl.NotThere(err) || err == nil && hasNoPorts(l)) {
		return nil, nil // as nearly always, at the end of a container
	}
	p := &publish{h: h}
	defer func() { p.nft.Close(); p.flows.Close() }() // after the lock was given back: see ruleset.Conn
	unlock, err := h.lock(ctx, "publish ports of "+owner)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := p.run(ctx, owner, wishes); err != nil {
		return nil, fmt.Errorf("publish ports of %s: %w", owner, err)
	}
	return live(p.ports), nil
}

// publish is one Publish on its way.
type publish struct {
	h     *Host
	e     endpoint
	had   []Port
	ports []Port // claimed from now on
	nft   ruleset.Conn
	flows conntrack.Conn
}

func (p *publish) run(ctx context.Context, owner string, wishes []Port) error {
	v, err := p.h.readEndpoints()
	if err != nil {
		return err
	}
	i := slices.IndexFunc(v.endpoints, func(e endpoint) bool { return e.is(owner) })
	if i < 0 {
		if len(wishes) == 0 {
			return nil // it is gone, and its ports with it
		}
		return errors.New("it is not attached: start its container again")
	}
	p.e, p.had = v.endpoints[i], v.ports()[v.endpoints[i].link.Name]
	for _, had := range p.had {
		had.Idle = true
		p.ports = append(p.ports, had)
	}
	if len(wishes) > 0 {
		if p.ports, err = v.choosePorts(owner, p.e.nic, p.e.link.Name, wishes); err != nil {
			return err
		}
	}
	// The alias tells that there are ports before host.json has them: what it does not tell of is void.
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"publish alias", p.sign},
		{"publish claims", func() error { return p.h.claimPorts(ctx, v, p.e.link.Name, p.ports) }},
		{"publish elements", func() error { return p.elements(v) }},
		{"publish flows", func() error { return forgetDatagrams(&p.flows, slices.Concat(live(p.had), live(p.ports))) }},
	} {
		if err := p.h.hook(step.name); err != nil {
			return err
		}
		if err := step.do(); err != nil {
			return err
		}
	}
	return nil
}

// sign says in the alias how many ports there are, where it says fewer.
func (p *publish) sign() error {
	if p.e.ports >= len(p.ports) {
		return nil
	}
	p.e.ports = len(p.ports)
	return netlink.LinkSetAlias(&netlink.Device{LinkAttrs: *p.e.link}, p.e.alias.String())
}

func hostEndOf(owner string) string {
	name, _ := linkNames(owner)
	return name
}

// hasNoPorts reports whether a link is a whole host end without a published or claimed port.
func hasNoPorts(l netlink.Link) bool {
	a, whole := endpointOf(l)
	return whole && a.ports == 0
}

// elements takes away the elements of ports that do not lead to the endpoint any more, and adds those of the ones that
// do. host.json does not tell which of these stand: who died here wrote it before.
func (p *publish) elements(v *view) error {
	of := func(ports []Port) ruleset.Endpoint { return v.rulesOf(p.e.alias, p.e.link.Name, ports) }
	over := slices.DeleteFunc(v.state.leadable(p.e.link.Name, p.had), func(had Port) bool { return slices.Contains(p.ports, had) })
	if err := p.nft.RemovePorts(of(over)); err != nil {
		return err
	}
	if p.nft.AddPorts(of(p.ports)) == nil {
		return nil
	}
	// An element that a killed process left for such a port is in the way.
	v, err := p.h.readEndpoints()
	if err == nil {
		_, err = v.ruleset().Sync()
	}
	return err
}

// leadable are those ports of an endpoint whose elements may lead to it, whatever host.json says of them: a Publish that
// died may have left the element of one that is idle. An idle one that leads to another endpoint by now is not among them.
func (s *hostState) leadable(link string, ports []Port) (out []Port) {
	for _, p := range ports {
		elsewhere := false
		for other, theirs := range s.Ports {
			elsewhere = elsewhere || other != link && slices.ContainsFunc(theirs, func(o Port) bool { return !o.Idle && p.conflicts(o) })
		}
		if !p.Idle || !elsewhere {
			p.Idle = false
			out = append(out, p)
		}
	}
	return out
}

// live are the ports that lead to a container.
func live(ports []Port) []Port {
	return slices.DeleteFunc(slices.Clone(ports), func(p Port) bool { return p.Idle })
}

// forgetDatagrams deletes the flows of datagrams to UDP ports. Else a client that keeps sending would reach whoever had
// the port before.
func forgetDatagrams(c *conntrack.Conn, ports []Port) error {
	var all []conntrack.Flows
	for _, p := range ports {
		if p.Proto == "udp" {
			all = append(all, conntrack.Flows{UDPPort: p.HostPort})
		}
	}
	return c.Delete(all...)
}
