// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"context"
	"fmt"
	"strings"
)

// Census counts the ipconfigs of a NIC in one subnet. Each ipconfig is counted once: Own, Free, Held, Kept, Cooling,
// OnHost and Routed add up to Configs.
type Census struct {
	Configs   int `json:"ipconfigs"` // all ipconfigs
	Own       int `json:"own"`       // the NIC's primary one, which is never lent
	Free      int `json:"free"`      // can be lent now
	Held      int `json:"held"`      // leased to containers that azure-vnet attached
	Kept      int `json:"kept"`      // leased without a link: a network's auxiliary address, or another main plugin's container
	Cooling   int `json:"cooling"`   // released lately; lent only if nothing is free
	OnHost    int `json:"onHost"`    // held by a link of the host; not lent
	Routed    int `json:"led"`       // not leased, but a route leads to a container that has it, such as another plugin's; not lent
	Withdrawn int `json:"withdrawn"` // leased, though the source lists them no more; not counted in Configs
}

// countSubnet counts the ipconfigs of a subnet of the NIC with the MAC.
func (v *snapshot) countSubnet(mac string, sub Subnet) Census {
	c := Census{Configs: len(sub.Secondary)}
	if sub.Primary.IsValid() {
		c.Configs++
		c.Own = 1
	}
	listed := secondarySet([]NIC{{Subnets: []Subnet{sub}}})
	for a := range listed {
		switch is := v.lendabilityOf(a); {
		case is == isFresh || is == isRested:
			c.Free++
		case is == isCooling:
			c.Cooling++
		case is == isLeased && v.Leases[a].Linkless:
			c.Kept++
		case is == isLeased:
			c.Held++
		case is == isOnHost:
			c.OnHost++
		case is == isRouted:
			c.Routed++
		}
	}
	for a, l := range v.Leases {
		if l.MAC == mac && l.Prefix == sub.Prefix && !listed[a] {
			c.Withdrawn++
		}
	}
	return c
}

// String returns the census in one line, such as "6 ipconfigs: 1 the NIC's own, 5 held". It leaves out counts of 0.
func (c Census) String() string {
	var parts []string
	for _, part := range []struct {
		n    int
		what string
	}{
		{c.Own, "the NIC's own"}, {c.Held, "held"}, {c.Kept, "kept for networks (auxiliary addresses) or another main plugin's containers"},
		{c.Cooling, "cooling"}, {c.OnHost, "on the host"}, {c.Routed, "of other containers"}, {c.Free, "free"},
	} {
		if part.n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", part.n, part.what))
		}
	}
	text := plural(c.Configs, "ipconfig") + ": " + strings.Join(parts, ", ")
	if c.Withdrawn > 0 {
		text += fmt.Sprintf("; and %d held that Azure lists no more", c.Withdrawn)
	}
	return text
}

// CountIPConfigs returns the VM's NICs with the counts of their ipconfigs. It asks no source. It uses the newest answer
// of any source, even of one that this pool does not ask. Without an answer it returns no NIC.
func (p *Pool) CountIPConfigs(ctx context.Context) ([]NICStatus, error) {
	s, err := p.readState(ctx, "count ipconfigs")
	var has occupied
	if err == nil {
		has, err = p.occupied()
	}
	if err != nil {
		return nil, fmt.Errorf("count ipconfigs: %w", err)
	}
	v := snapshot{state: &s, occupied: has, now: p.clock()}
	for _, a := range s.Answers {
		if len(a.NICs) > 0 && (len(v.answer.NICs) == 0 || a.newerThan(v.answer)) {
			v.answer = a
		}
	}
	var all []NICStatus
	for _, n := range v.answer.NICs {
		all = append(all, v.nicStatus(n))
	}
	return all, nil
}
