// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// identity is what makes a link the host's own: all that must follow when the
// host moves from a NIC to a bridge or back. Its messages are in normal form.
type identity struct {
	Addresses  []message `json:"addresses,omitempty"`
	Routes     []message `json:"routes,omitempty"`     // of every table but local, which the kernel keeps itself
	Rules      []message `json:"rules,omitempty"`      // that name the link
	Neighbours []message `json:"neighbours,omitempty"` // permanent ones
	DNS        *linkDNS  `json:"dns,omitempty"`        // what systemd-resolved knows of the link
}

// capture reads the identity of l. Neighbours only when asked: those of a
// bridge are the containers', which are no part of the host.
func capture(l link, withNeighbours bool) (identity, error) {
	var id identity
	for _, part := range []struct {
		noun   noun
		normal func(message, link) []message
		into   *[]message
	}{
		{addresses, normalAddress, &id.Addresses},
		{routes, normalRoute, &id.Routes},
		{rules, normalRule, &id.Rules},
		{neighbours, normalNeighbour, &id.Neighbours},
	} {
		if part.noun == neighbours && !withNeighbours {
			continue
		}
		all, err := part.noun.dump(unix.AF_UNSPEC)
		if err != nil {
			return identity{}, fmt.Errorf("read the identity of %s: %w", l.name, err)
		}
		for _, m := range all {
			*part.into = append(*part.into, part.normal(m, l)...)
		}
	}
	id.sort()
	return id, nil
}

// sort puts routes that need no gateway first: the others are reached by them.
func (id *identity) sort() {
	slices.SortStableFunc(id.Routes, func(a, b message) int { return depth(a) - depth(b) })
}

func depth(route message) int {
	for a := range routes.attrs(route) {
		if a == unix.RTA_GATEWAY || a == unix.RTA_MULTIPATH || a == unix.RTA_VIA {
			return 1
		}
	}
	return 0
}

// merge is id and what of more it lacks.
func (id identity) merge(more identity) identity {
	out := identity{
		Addresses:  slices.Clone(id.Addresses),
		Routes:     union(id.Routes, more.Routes),
		Rules:      union(id.Rules, more.Rules),
		Neighbours: union(id.Neighbours, more.Neighbours),
		DNS:        id.DNS,
	}
	for _, a := range more.Addresses {
		if !slices.ContainsFunc(out.Addresses, a.sameAddress) {
			out.Addresses = append(out.Addresses, a)
		}
	}
	if out.DNS == nil {
		out.DNS = more.DNS
	}
	out.sort()
	return out
}

// less is id without what known holds.
func (id identity) less(known identity) identity {
	return identity{
		Addresses: slices.DeleteFunc(slices.Clone(id.Addresses), func(m message) bool {
			return slices.ContainsFunc(known.Addresses, m.sameAddress)
		}),
		Routes:     slices.DeleteFunc(slices.Clone(id.Routes), func(m message) bool { return contains(known.Routes, m) }),
		Rules:      slices.DeleteFunc(slices.Clone(id.Rules), func(m message) bool { return contains(known.Rules, m) }),
		Neighbours: slices.DeleteFunc(slices.Clone(id.Neighbours), func(m message) bool { return contains(known.Neighbours, m) }),
		DNS:        id.DNS,
	}
}

// beyond is id without the prefix routes that the kernel made of addresses that
// known has: whoever adds an address again means no new route.
func (id identity) beyond(known identity) identity {
	id.Routes = slices.DeleteFunc(slices.Clone(id.Routes), func(m message) bool {
		dst := netip.PrefixFrom(ipOf(routes.attr(m, unix.RTA_DST)), int(m[1]))
		return m[5] == unix.RTPROT_KERNEL && slices.ContainsFunc(known.Addresses, func(a message) bool { return addressOf(a).Masked() == dst })
	})
	return id
}

// without is id less an address and the routes that leave with it: the kernel
// drops those with the address.
func (id identity) without(addr netip.Addr) identity {
	id.Addresses = slices.DeleteFunc(slices.Clone(id.Addresses), func(m message) bool { return addressOf(m).Addr() == addr })
	id.Routes = slices.DeleteFunc(slices.Clone(id.Routes), func(m message) bool {
		return ipOf(routes.attr(m, unix.RTA_PREFSRC)) == addr
	})
	return id
}

// apart is each part of id by itself.
func (id identity) apart() []identity {
	var out []identity
	for _, m := range id.Addresses {
		out = append(out, identity{Addresses: []message{m}})
	}
	for _, m := range id.Routes {
		out = append(out, identity{Routes: []message{m}})
	}
	for _, m := range id.Rules {
		out = append(out, identity{Rules: []message{m}})
	}
	for _, m := range id.Neighbours {
		out = append(out, identity{Neighbours: []message{m}})
	}
	return out
}

// texts names the parts of id that a person would miss.
func (id identity) texts() []string {
	var out []string
	for _, part := range []struct {
		noun noun
		all  []message
	}{{addresses, id.Addresses}, {routes, id.Routes}, {rules, id.Rules}, {neighbours, id.Neighbours}} {
		for _, m := range part.all {
			out = append(out, part.noun.text(m))
		}
	}
	return out
}

func union(a, b []message) []message {
	out := slices.Clone(a)
	for _, m := range b {
		if !contains(out, m) {
			out = append(out, m)
		}
	}
	return out
}

// putAddresses gives l the addresses and the permanent neighbours of id. On a
// bridge bare is set: the kernel then makes no prefix route of its own, for the
// routes that stood come by putRoutes.
func (id identity) putAddresses(l link, bare bool) error {
	for _, m := range id.Addresses {
		if err := addresses.put(addressOn(m, l, bare), unix.NLM_F_REPLACE); err != nil {
			return fmt.Errorf("give %s its %w", l.name, err)
		}
	}
	for _, m := range id.Neighbours {
		if err := neighbours.put(neighbourOn(m, l), unix.NLM_F_REPLACE); err != nil {
			return fmt.Errorf("give %s its %w", l.name, err)
		}
	}
	return nil
}

// putRoutes gives l the routes and rules of id. A route put with neither
// "replace" nor "append" goes before its equals, so it is used at once, and one
// that another NIC has to the same destination is not lost.
func (id identity) putRoutes(l link) error {
	for _, m := range id.Routes {
		m = routeOn(m, l)
		err := routes.send(routes.add, m, unix.NLM_F_CREATE)
		if errors.Is(err, unix.EEXIST) {
			if err = routes.remove(m); err == nil {
				err = routes.put(m, 0)
			}
		}
		if err != nil {
			return fmt.Errorf("give %s its %w", l.name, err)
		}
	}
	for _, m := range id.Rules {
		if err := rules.put(ruleOn(m, l), unix.NLM_F_EXCL); err != nil {
			return fmt.Errorf("give %s its %w", l.name, err)
		}
	}
	return nil
}

// clear takes id off l, and nothing else that l may have got since. Addresses
// go in reverse, for with the first of a subnet the kernel drops its others.
func (id identity) clear(l link) error {
	for _, m := range id.Rules {
		if err := rules.remove(ruleOn(m, l)); err != nil {
			return fmt.Errorf("take from %s its %w", l.name, err)
		}
	}
	for _, m := range slices.Backward(id.Routes) {
		if err := routes.remove(routeOn(m, l)); err != nil {
			return fmt.Errorf("take from %s its %w", l.name, err)
		}
	}
	for _, m := range slices.Backward(id.Addresses) {
		if err := addresses.remove(addressOn(m, l, true)); err != nil {
			return fmt.Errorf("take from %s its %w", l.name, err)
		}
	}
	for _, m := range id.Neighbours {
		if err := neighbours.remove(neighbourOn(m, l)); err != nil {
			return fmt.Errorf("take from %s its %w", l.name, err)
		}
	}
	return nil
}
