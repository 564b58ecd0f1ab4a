// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"azurevnet/internal/vnetsim"
)

// model is what is attached to a host, as the runtimes of its containers know it. Its methods are the rules by which an
// endpoint is refused, and what the kernel is to have of each. history_test.go has the histories that it is compared
// with.
type model struct {
	endpoints map[string]*attached // by owner
	harmed    bool                 // somebody changed the host since the last round, so a call may fail
	left      bool                 // a call that died, or a container that ended by itself, has left something since the last round
	recorded  bool                 // host.json was not lost since the last round
	lost      bool                 // host.json was lost since the boot: of policies, it has those that were learnt since
}

// attached is an endpoint that exists.
type attached struct {
	Endpoint                    // as it was asked for; Ports are those that the host knows still
	asked       []PublishedPort // all ports that it was given
	inContainer bool
	bare        bool // it may lack elements of the nft tables until the next round
}

// heal notes that a round ran.
func (m *model) heal() {
	m.harmed, m.left, m.recorded = false, false, true
	for _, e := range m.endpoints {
		e.bare = false
	}
}

// conflict reports whether both ports are one port of the host. A port that leads nowhere yields to one that leads to a
// container.
func conflict(wish, taken PublishedPort) bool {
	same := wish.Proto == taken.Proto && wish.HostPort == taken.HostPort
	return same && (wish.Idle || !taken.Idle) && (wish.HostAddr == taken.HostAddr || !wish.HostAddr.IsValid() || !taken.HostAddr.IsValid())
}

// portHolder returns the owner of another endpoint that has one of the ports.
func (m *model) portHolder(owner string, wishes []PublishedPort) string {
	for _, other := range slices.Sorted(maps.Keys(m.endpoints)) {
		for _, wish := range wishes {
			if other != owner && slices.ContainsFunc(m.endpoints[other].Ports, func(p PublishedPort) bool { return conflict(wish, p) }) {
				return other
			}
		}
	}
	return ""
}

// addrHolder returns the owner of another endpoint that has the address.
func (m *model) addrHolder(e Endpoint) string {
	for owner, o := range m.endpoints {
		if owner != e.Owner && o.Addr.Addr() == e.Addr.Addr() {
			return owner
		}
	}
	return ""
}

// refusal says why the endpoint is refused: ErrAttached, an InUseError, or nil.
func (m *model) refusal(e Endpoint) error {
	if old := m.endpoints[e.Owner]; old != nil && old.inContainer {
		return ErrAttached
	}
	if holder := cmp.Or(m.addrHolder(e), m.portHolder(e.Owner, e.Ports)); holder != "" {
		return &InUseError{Owner: holder}
	}
	return nil
}

// loseFile is what becomes of the ports when host.json is lost: the nft table has those that lead to a container.
// Without the table, all are lost.
func (m *model) loseFile(table bool) {
	for _, e := range m.endpoints {
		if e.Ports = notIdle(e.Ports); !table {
			e.Ports = nil
		}
	}
	m.recorded, m.lost, m.harmed = false, true, true
}

// complaints are the sentences of Broken after a round: nobody but the runtime knows ports that are lost.
func (m *model) complaints() (all []string) {
	for _, e := range m.endpoints {
		if len(e.asked) > 0 && len(e.Ports) == 0 {
			all = append(all, fmt.Sprintf("the published ports of %s (", e.Owner))
		}
	}
	slices.Sort(all)
	return all
}

// facts is all that the kernel has of the endpoint, one fact on a line. nic is the name of its NIC.
func (e *attached) facts(nic string, second bool) (all []string) {
	fact := func(format string, args ...any) { all = append(all, fmt.Sprintf(format, args...)) }
	addr, mac, link := e.Addr.Addr(), MACFor(e.Addr.Addr()).String(), hostEndOf(e.Owner)
	way := cmp.Or(e.Bridge, link)
	fact("route to %s by %s in 254", addr, way)
	fact("route to %s by %s in 16863", addr, way)
	fact("neighbour %s is %s by %s", addr, mac, way)
	if e.Bridge != "" {
		to := bridgeMAC(mustMAC(e.NIC))
		fact("link %s in %s, group 16862, up", link, e.Bridge)
		fact("forwarding of %s to %s", mac, link)
		fact("bridge own: %q . %s . %s . %s", link, mac, to, addr)
		fact("bridge own_arp: %q . %s . %s . %s . %s", link, mac, to, mac, addr)
		fact("bridge own_arp: %q . %s . ff:ff:ff:ff:ff:ff . %s . %s", link, mac, mac, addr)
	} else {
		fact("link %s in nothing, group 16863, up", link)
		fact("arp own: %q . %s . %s", link, mac, addr)
		fact("ip own: %q . %s . %s", link, mac, addr)
		if second {
			fact("routing rules for %s", link)
		}
	}
	if e.Policy.Internal {
		fact("ip internal: %s", addr)
	} else if e.Policy.SNAT {
		fact("ip sources: %s : goto snat_%s", addr, e.Policy.id())
	}
	if e.Policy.NoMetadata {
		fact("ip no_metadata: %s", addr)
	}
	for _, p := range notIdle(e.Ports) {
		if to := fmt.Sprintf("%s . %d : %s . %d", p.Proto, p.HostPort, addr, p.Port); p.HostAddr.IsValid() {
			fact("ip published_at: %s . %s", p.HostAddr, to)
		} else {
			fact("ip published: %s", to)
			fact("ip published_by: %q . %s", nic, to)
		}
	}
	if len(notIdle(e.Ports)) > 0 {
		fact("ip self: %s . %s", addr, addr)
	}
	return all
}

// nicNumber returns the number of the endpoint's NIC.
func (e *attached) nicNumber(nics []vnetsim.NIC) int {
	return slices.IndexFunc(nics, func(n vnetsim.NIC) bool { return n.MAC == e.NIC })
}

// isDocker reports whether the endpoint is one of Docker's: its container end is moved after the attach, and its ports
// are claimed first and published later.
func (e *attached) isDocker() bool { return strings.HasPrefix(e.Owner, "docker/") }
