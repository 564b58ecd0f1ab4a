// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"cmp"
	"context"
	"fmt"
	"hash/fnv"
	"maps"
	"net/netip"
	"slices"

	"azurevnet/bridge/internal/listen"
	"azurevnet/bridge/internal/ruleset"
)

// PublishedPort is a port of the host that leads to a port of a container. In a wish, the host's port may be
// left open.
type PublishedPort struct {
	Proto       string     `json:"proto"`                 // tcp or udp
	HostAddr    netip.Addr `json:"hostAddr,omitzero"`     // IPv4 address of the host; none: every address of the host, 127.0.0.1 too, but no address of another NIC than the container's
	HostPort    uint16     `json:"hostPort"`              // 0 in a wish: a free port of 32768 to 60999
	HostPortEnd uint16     `json:"hostPortEnd,omitempty"` // in a wish: the first free port from HostPort to this one; 0: HostPort alone
	Port        uint16     `json:"port"`                  // of the container
	Idle        bool       `json:"idle,omitempty"`        // claimed for the container, and leads nowhere
}

// String writes the port as docker ps does.
func (p PublishedPort) String() string {
	host := p.HostAddr
	if !host.IsValid() {
		host = netip.IPv4Unspecified()
	}
	return fmt.Sprintf("%s:%d->%d/%s", host, p.HostPort, p.Port, p.Proto)
}

// The range that container engines take free ports of the host from. Linux takes its own from it too.
const firstFree, lastFree = 32768, 60999

// normalized checks the wish, and gives equal wishes the same spelling.
func (p PublishedPort) normalized() (PublishedPort, error) {
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

func normalizedPorts(ports []PublishedPort) ([]PublishedPort, error) {
	var out []PublishedPort
	for _, p := range ports {
		p, err := p.normalized()
		if err != nil {
			return nil, fmt.Errorf("publish: %w", err)
		}
		out = append(out, p)
	}
	return out, nil
}

// conflictsWith reports whether p wants a port of the host that o has. An idle claim yields to a port that is to
// lead to a container: the default route of the idle port's container is on another network.
func (p PublishedPort) conflictsWith(o PublishedPort) bool {
	return (!o.Idle || p.Idle) && p.Proto == o.Proto && p.HostPort == o.HostPort && (p.HostAddr == o.HostAddr || !p.HostAddr.IsValid() || !o.HostAddr.IsValid())
}

// choosePorts finds ports of the host for the endpoint with that host end. A port that the endpoint has already
// is not checked for programs that listen there: the listener may be the plugin itself, for this port.
func (v *view) choosePorts(owner, nic, link string, wishes []PublishedPort) ([]PublishedPort, error) {
	for _, p := range wishes {
		if err := v.checkHostAddr(p, nic); err != nil {
			return nil, err
		}
	}
	sockets, err := listen.ReadSockets()
	if err != nil {
		return nil, err
	}
	taken := v.publishedPorts()
	had := taken[link]
	delete(taken, link)
	var mine []PublishedPort
	for i, wish := range wishes {
		if n := slices.IndexFunc(had, wish.isMetBy); n >= 0 {
			got := had[n]
			got.Idle = wish.Idle
			if err := v.refusePublished(got, taken); err != nil { // another endpoint took it while it was idle
				return nil, refusedPort(got, err)
			}
			had, mine = slices.Delete(slices.Clone(had), n, n+1), append(mine, got)
			continue
		}
		got, err := choosePort(wish, owner, i, func(p PublishedPort) error {
			if i := slices.IndexFunc(mine, p.conflictsWith); i >= 0 {
				return fmt.Errorf("it is asked for twice, for %d and %d", mine[i].Port, p.Port)
			}
			if err := v.refusePublished(p, taken); err != nil {
				return err
			}
			return refuseListening(sockets, p)
		})
		if err != nil {
			return nil, err
		}
		mine = append(mine, got)
	}
	return mine, nil
}

// claimPorts writes into host.json that the endpoint with that host end has the ports. Claims that a crash has
// left are forgotten by this.
func (h *Host) claimPorts(ctx context.Context, v *view, link string, ports []PublishedPort) error {
	taken := v.publishedPorts()
	if taken[link] = ports; len(ports) == 0 { // of an endpoint whose ports were lost, a Publish without ports claims none
		delete(taken, link)
	}
	return h.updateState(ctx, "claim ports for "+link, func(s *hostState) error { s.Ports = taken; return nil })
}

// isMetBy reports whether a port that the endpoint has already fulfils the wish p.
func (p PublishedPort) isMetBy(existing PublishedPort) bool {
	return p.Proto == existing.Proto && p.HostAddr == existing.HostAddr && p.Port == existing.Port && (p.HostPort == 0 || p.HostPort <= existing.HostPort && existing.HostPort <= p.HostPortEnd)
}

// choosePort returns the first port of the wished range that refuse has nothing against. If any port will do,
// the search begins at a place that derives from the owner, so that a repeat finds the same port.
func choosePort(wish PublishedPort, owner string, nth int, refuse func(PublishedPort) error) (PublishedPort, error) {
	first, last, skip := uint32(wish.HostPort), uint32(wish.HostPortEnd), uint32(0)
	if wish.HostPort == 0 {
		first, last = firstFree, lastFree
		sum := fnv.New32a()
		fmt.Fprintf(sum, "%s %d", owner, nth)
		skip = sum.Sum32()
	}
	wish.HostPortEnd = 0
	var why error
	for n, count := uint32(0), last-first+1; n < count; n++ {
		wish.HostPort = uint16(first + (skip%count+n)%count)
		if why = refuse(wish); why == nil {
			return wish, nil
		}
	}
	if first == last {
		return wish, refusedPort(wish, why)
	}
	return wish, fmt.Errorf("publish a port %d-%d/%s of the host: none is free; of the last, %w", first, last, wish.Proto, why)
}

func refusedPort(p PublishedPort, why error) error {
	return fmt.Errorf("publish port %d/%s of the host: %w; publish another, or none: containers are reached at their own addresses", p.HostPort, p.Proto, why)
}

// refusePublished returns an InUseError if another endpoint has the port.
func (v *view) refusePublished(p PublishedPort, taken map[string][]PublishedPort) error {
	for link, ports := range taken {
		if !slices.ContainsFunc(ports, p.conflictsWith) {
			continue
		}
		for _, e := range v.endpoints {
			if e.link.Name == link {
				return &InUseError{Owner: e.owner, text: fmt.Sprintf("it is published to %s already (%s)", e.addr.Addr(), e.ownerText())}
			}
		}
	}
	return nil
}

// refuseListening returns an error if a program of the host listens at the port.
func refuseListening(sockets []listen.Socket, p PublishedPort) error {
	for _, s := range sockets {
		if s.Proto != p.Proto || s.Addr.Port() != p.HostPort {
			continue
		}
		if s.Addr.Addr().IsUnspecified() || !p.HostAddr.IsValid() || s.Addr.Addr() == p.HostAddr {
			return fmt.Errorf("the host itself listens at %s", s)
		}
	}
	return nil
}

// checkHostAddr refuses an address that the host does not have, and an address of another NIC than the
// container's. In the second case the answers would leave by the container's NIC, with an address that Azure
// drops there.
func (v *view) checkHostAddr(p PublishedPort, nic string) error {
	if !p.HostAddr.IsValid() || p.HostAddr.IsLoopback() {
		return nil
	}
	dev := v.linkWithAddress(p.HostAddr)
	if dev == "" {
		var ownAddrs []netip.Addr
		for _, a := range v.addrs {
			ownAddrs = append(ownAddrs, prefixOf(a.IPNet).Addr())
		}
		return fmt.Errorf("publish port %d: %s is not an address of this host, which has %v", p.Port, p.HostAddr, ownAddrs)
	}
	for mac := range v.state.NICs {
		if mac != nic && v.nicName(mac) == dev {
			return fmt.Errorf("publish port %d: %s is an address of %s, and the container's address is of %s: answers would leave by another NIC than the questions came by, and Azure drops them; publish at an address of %s, or at none", p.Port, p.HostAddr, dev, v.nicName(nic), v.nicName(nic))
		}
	}
	return nil
}

// publishedPorts returns the published and claimed ports of all endpoints, by host end. They are in host.json.
// If the file was lost, the nft table still has those that lead to a container.
func (v *view) publishedPorts() map[string][]PublishedPort {
	out := map[string][]PublishedPort{}
	var table map[netip.Addr][]ruleset.Port
	for _, e := range v.endpoints {
		if e.ports == 0 {
			continue
		}
		ports, known := v.state.Ports[e.link.Name]
		if !known {
			if table == nil {
				table, _ = ruleset.ReadPublished() // without an answer, publishedPortFaults says which ports are lost
			}
			for _, p := range table[e.addr.Addr()] {
				ports = append(ports, PublishedPort{Proto: map[bool]string{true: "udp", false: "tcp"}[p.UDP], HostAddr: p.HostAddr, HostPort: p.HostPort, Port: p.Port})
			}
		}
		if len(ports) > 0 {
			out[e.link.Name] = ports
		}
	}
	return out
}

// publishedPortFaults are differences between host.json and the endpoints: claims left by a crash, ports in the nft
// table alone, and lost ports.
func (h *Host) publishedPortFaults(v *view) (all []fault) {
	ports := v.publishedPorts()
	if !maps.EqualFunc(v.state.Ports, ports, slices.Equal) {
		all = append(all, fault{what: "host.json does not say which ports are published", mend: func() error {
			return h.updateState(context.Background(), "keep ports", func(s *hostState) error { s.Ports = ports; return nil })
		}})
	}
	for _, e := range v.endpoints {
		if e.ports > 0 && len(ports[e.link.Name]) == 0 {
			all = append(all, fault{what: fmt.Sprintf("the published ports of %s (%s) are not known any more: restart its container", e.owner, e.label())})
		}
	}
	return all
}

// releasePorts deletes the claims of the endpoint with that host end. If there are none, that is success.
func (h *Host) releasePorts(ctx context.Context, link string) error {
	return h.updateState(ctx, "forget ports of "+link, func(s *hostState) error {
		delete(s.Ports, link)
		return nil
	})
}
