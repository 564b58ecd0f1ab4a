// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
)

// Port is a port of the host that leads to one of a container.
type Port struct {
	Proto       string     `json:"proto"`                 // tcp or udp
	HostAddr    netip.Addr `json:"hostAddr,omitzero"`     // of the host; none: each of its IPv4 addresses, 127.0.0.1 too
	HostPort    uint16     `json:"hostPort"`              // 0 in a wish: a free one of 32768 to 60999
	HostPortEnd uint16     `json:"hostPortEnd,omitempty"` // in a wish: the first free one from HostPort to this; 0: HostPort alone
	Port        uint16     `json:"port"`                  // the container's
}

// String is the port as docker ps writes it.
func (p Port) String() string {
	host := p.HostAddr
	if !host.IsValid() {
		host = netip.IPv4Unspecified()
	}
	return fmt.Sprintf("%s:%d->%d/%s", host, p.HostPort, p.Port, p.Proto)
}

// The range that engines take free host ports from, and Linux its own.
const firstFree, lastFree = 32768, 60999

// spelt checks the wish and spells it in one way.
func (p Port) spelt() (Port, error) {
	p.HostAddr = p.HostAddr.Unmap()
	if p.HostAddr == netip.IPv4Unspecified() {
		p.HostAddr = netip.Addr{}
	}
	p.HostPortEnd = cmp.Or(p.HostPortEnd, p.HostPort)
	switch {
	case p.Proto != "tcp" && p.Proto != "udp":
		return p, fmt.Errorf("port %d: tcp and udp can be published, and %q cannot", p.Port, p.Proto)
	case p.Port == 0:
		return p, fmt.Errorf("port 0 of a container cannot be published")
	case p.HostAddr.IsValid() && !p.HostAddr.Is4():
		return p, fmt.Errorf("port %d: the host address %s is not IPv4, and IPv6 is not served yet", p.Port, p.HostAddr)
	case p.HostPortEnd < p.HostPort || p.HostPort == 0 && p.HostPortEnd != 0:
		return p, fmt.Errorf("port %d: %d-%d is no range of host ports", p.Port, p.HostPort, p.HostPortEnd)
	}
	return p, nil
}

func spelt(ports []Port) ([]Port, error) {
	var out []Port
	for _, p := range ports {
		p, err := p.spelt()
		if err != nil {
			return nil, fmt.Errorf("publish: %w", err)
		}
		out = append(out, p)
	}
	return out, nil
}

// meets tells whether both want the same port of one address.
func (p Port) meets(o Port) bool {
	return p.Proto == o.Proto && p.HostPort == o.HostPort && (p.HostAddr == o.HostAddr || !p.HostAddr.IsValid() || !o.HostAddr.IsValid())
}

// claimPorts writes down which ports of the host the endpoint gets: of two that
// want one, the first to write has it. Where another has it, a claim that is not
// alone on the host is slow: the other may be what a crash left. standing is then
// nil, else every endpoint there is.
func (at *attaching) claimPorts(ctx context.Context, standing map[string]alias) error {
	if len(at.e.Ports) == 0 {
		return nil
	}
	if err := at.checkHostAddrs(); err != nil {
		return err
	}
	heard, err := listeners()
	if err != nil {
		return err
	}
	if err := at.h.at("ports"); err != nil {
		return err
	}
	at.undo = append(at.undo, func() error { return at.h.disclaimPorts(ctx, at.host) })
	return at.h.updateState(ctx, "publish ports of "+at.e.Owner, func(s *hostState) error {
		if standing != nil {
			maps.DeleteFunc(s.Ports, func(host string, _ []Port) bool { return standing[host].ports == 0 })
		}
		var mine []Port
		for i, wish := range at.e.Ports {
			got, err := at.choose(wish, i, func(p Port) error {
				if i := slices.IndexFunc(mine, p.meets); i >= 0 {
					return fmt.Errorf("it is asked for twice, for %d and %d", mine[i].Port, p.Port)
				}
				return errors.Join(s.published(p, at.host, standing), heard.on(p))
			})
			if err != nil {
				return err
			}
			mine = append(mine, got)
		}
		s.Ports[at.host] = mine
		at.ports = mine
		return nil
	})
}

// choose finds the wished host port, or the first of several, that taken has
// nothing against. Where any will do, the search begins at a place that depends
// on the owner, so that a repeat finds the same.
func (at *attaching) choose(wish Port, nth int, taken func(Port) error) (Port, error) {
	first, last := uint32(wish.HostPort), uint32(wish.HostPortEnd)
	skip, any := uint32(0), wish.HostPort == 0
	if any {
		first, last = firstFree, lastFree
		sum := fnv.New32a()
		fmt.Fprintf(sum, "%s %d", at.e.Owner, nth)
		skip = sum.Sum32()
	}
	wish.HostPortEnd = 0
	var why error
	for n, count := uint32(0), last-first+1; n < count; n++ {
		wish.HostPort = uint16(first + (skip%count+n)%count)
		if why = taken(wish); why == nil || errors.Is(why, errSlow) && !any {
			break
		}
	}
	switch {
	case why == nil || errors.Is(why, errSlow):
		return wish, why
	case first == last:
		return wish, fmt.Errorf("publish port %d/%s of the host: %w; publish another, or none: containers are reached at their own addresses", wish.HostPort, wish.Proto, why)
	}
	return wish, fmt.Errorf("publish a port %d-%d/%s of the host: none is free; of the last, %w", first, last, wish.Proto, why)
}

// published says who has p already, but for the endpoint with that host veth.
func (s *hostState) published(p Port, but string, standing map[string]alias) error {
	for host, ports := range s.Ports {
		if host == but || !slices.ContainsFunc(ports, p.meets) {
			continue
		}
		if standing == nil {
			return errSlow
		}
		return fmt.Errorf("it is published to %s already (%s)", standing[host].addr.Addr(), standing[host].owner)
	}
	return nil
}

// checkHostAddrs refuses addresses that are not the host's.
func (at *attaching) checkHostAddrs() error {
	var held []netip.Addr
	for _, p := range at.e.Ports {
		if !p.HostAddr.IsValid() || p.HostAddr.IsLoopback() {
			continue
		}
		if held == nil {
			all, err := whole(func() ([]netlink.Addr, error) { return at.nl.AddrList(nil, netlink.FAMILY_V4) })
			if err != nil {
				return fmt.Errorf("list addresses: %w", err)
			}
			for _, a := range all {
				ip, _ := netip.AddrFromSlice(a.IP.To4())
				held = append(held, ip)
			}
		}
		if !slices.Contains(held, p.HostAddr) {
			return fmt.Errorf("publish port %d: %s is not an address of this host, which has %v", p.Port, p.HostAddr, held)
		}
	}
	return nil
}

// publish makes the claimed ports lead to the container, which is reached from
// here on. Datagrams that came before would else go on to where they went.
func (at *attaching) publish() error {
	if at.a.ports == 0 {
		return nil
	}
	if err := at.h.at("publish"); err != nil {
		return err
	}
	sets := publishedElements(at.a, at.ports)
	at.undo = append(at.undo, func() error {
		return errors.Join(at.nf.deleteElements(sets), at.nf.forgetFlows(repliesOf(at.a.addr.Addr())))
	})
	if at.alone == nil {
		if !at.nf.addElements(sets) {
			return errSlow
		}
	} else if _, err := at.h.syncTableWith(*at.alone, &at.a); err != nil {
		return err
	}
	return at.nf.forgetDatagrams(at.ports)
}

func (n *netfilter) forgetDatagrams(ports []Port) error {
	for _, p := range ports {
		if p.Proto == "udp" {
			if err := n.forgetFlows(datagramsTo(p.HostPort)); err != nil {
				return err
			}
		}
	}
	return nil
}

// publishedBy are an endpoint's elements in the table of published ports.
func (h *Host) publishedBy(host string, a alias) ([]*tableSet, error) {
	if a.ports == 0 {
		return nil, nil
	}
	s, err := h.state()
	if err != nil {
		return nil, err
	}
	return publishedElements(a, s.Ports[host]), nil
}

// disclaimPorts forgets the claim of an endpoint. None is success.
func (h *Host) disclaimPorts(ctx context.Context, host string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	return h.updateState(ctx, "forget ports of "+host, func(s *hostState) error {
		delete(s.Ports, host)
		return nil
	})
}

// portsOf are the ports that endpoints have. host.json knows them; where it was
// lost, the table still does.
func (s *hostState) portsOf(endpoints map[string]alias) (map[string][]Port, error) {
	out := map[string][]Port{}
	var table map[netip.Addr][]Port
	for host, a := range endpoints {
		if a.ports == 0 {
			continue
		}
		ports, known := s.Ports[host]
		if !known {
			if table == nil {
				var err error
				if table, err = readPublished(); err != nil {
					return nil, err
				}
			}
			ports = table[a.addr.Addr()]
		}
		out[host] = ports
	}
	return out, nil
}

// keepPorts makes host.json say what is published, no more and no less: it
// forgets what a crash left, and learns again from the table what it lost. The
// caller holds the exclusive lock.
func (h *Host) keepPorts(ctx context.Context) error {
	links, err := readLinks()
	if err != nil {
		return err
	}
	s, err := h.state()
	if err != nil {
		return err
	}
	endpoints := map[string]alias{}
	for _, l := range links {
		if a, ok := endpointOf(l); ok {
			endpoints[l.Attrs().Name] = a
		}
	}
	ports, err := s.portsOf(endpoints)
	if err != nil {
		return err
	}
	var lost []error
	maps.DeleteFunc(ports, func(host string, known []Port) bool {
		if len(known) == 0 {
			lost = append(lost, fmt.Errorf("the published ports of %s (%s) are not known any more: restart its container", endpoints[host].owner, endpoints[host].addr.Addr()))
		}
		return len(known) == 0
	})
	if !maps.EqualFunc(s.Ports, ports, slices.Equal) {
		if err := h.updateState(ctx, "keep ports", func(s *hostState) error { s.Ports = ports; return nil }); err != nil {
			return err
		}
	}
	return errors.Join(lost...)
}
