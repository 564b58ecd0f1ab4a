// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// syncTable makes the nft table what the links' aliases, the host's addresses
// and routes and the known policies ask for, in one transaction, and reports
// whether it had to. b stands in it even if its bridge is not made yet. The
// caller holds the exclusive lock: an attach in flight has no alias yet, and its
// elements would be swept away.
func (h *Host) syncTable(b Bridge) (changed bool, err error) {
	return h.syncTableWith(b, nil)
}

// syncTableWith is syncTable with an endpoint that is about to be made.
func (h *Host) syncTableWith(b Bridge, coming *alias) (bool, error) {
	in, err := h.tableInput(b)
	if err != nil {
		return false, fmt.Errorf("nft table %s: %w", tableName, err)
	}
	in.bridges = append(in.bridges, b)
	if coming != nil {
		host, _ := linkNames(coming.owner)
		in.endpoints[host] = *coming
		if coming.ports > 0 {
			in.ports[host] = in.claimed[host]
		}
	}
	changed, err := writeTable(in.table())
	if err != nil {
		return false, fmt.Errorf("nft table %s: %w", tableName, err)
	}
	served, err := h.syncPublished(in)
	if err != nil {
		return changed, fmt.Errorf("published ports: %w", err)
	}
	return changed || served, nil
}

// dropTable takes b's part out of the table, and the table with the last bridge.
func (h *Host) dropTable(b Bridge) error {
	in, err := h.tableInput(b)
	if err != nil {
		return fmt.Errorf("nft table %s: %w", tableName, err)
	}
	if len(in.bridges) == 0 {
		err = deleteTable(bridgeTable)
	} else {
		_, err = writeTable(in.table())
	}
	if err == nil {
		_, err = h.syncPublished(in)
	}
	if err != nil {
		return fmt.Errorf("nft table %s: take out %s: %w", tableName, b.Name, err)
	}
	return nil
}

// tableInput is all that the table derives from.
type tableInput struct {
	bridges   []Bridge
	endpoints map[string]alias // by host veth
	policies  map[string]Policy
	ports     map[string][]Port         // published, by host veth
	claimed   map[string][]Port         // the same and those of attaches in flight
	held      []netip.Addr              // the host's addresses
	subnets   map[string][]netip.Prefix // of the host's addresses, by bridge
	away      []span                    // what the host routes away from every NIC
	egress    map[string]bool           // bridges whose NIC the host's default route does not take, but another NIC
}

// tableInput reads the host; b, which comes or goes, is left out of the bridges.
func (h *Host) tableInput(b Bridge) (tableInput, error) {
	in := tableInput{endpoints: map[string]alias{}, subnets: map[string][]netip.Prefix{}, egress: map[string]bool{}}
	links, err := readLinks()
	if err != nil {
		return in, err
	}
	bridges := links.bridges()
	in.bridges = others(bridges, b.Name)
	state, err := h.state()
	if err != nil {
		return in, err
	}
	in.policies, in.claimed = state.Policies, state.Ports

	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return in, err
	}
	defer nl.Close()
	near := map[int]string{} // NICs and bridges, with the bridge's name: what goes there goes to the VNet
	for _, mac := range state.NICs {
		if hw, err := parseMAC(mac); err == nil {
			if l, err := links.nic(hw); err == nil {
				near[l.Attrs().Index] = ""
			}
		}
	}
	for _, l := range links {
		if a, ok := endpointOf(l); ok {
			in.endpoints[l.Attrs().Name] = a
		}
		for _, b := range append(bridges, b) {
			if l.Attrs().Name == b.Name || l.Attrs().Name == b.NIC {
				near[l.Attrs().Index] = b.Name
			}
		}
	}
	if in.ports, err = state.portsOf(in.endpoints); err != nil {
		return in, err
	}
	return in, in.readAddresses(nl, near)
}

// endpointOf is the alias of a link that is the host's end of an endpoint.
func endpointOf(l netlink.Link) (alias, bool) {
	a, ok := parseAlias(l.Attrs().Alias)
	if !ok {
		return alias{}, false
	}
	name := l.Attrs().Name
	return a, len(name) > len(hostPrefix) && name[:len(hostPrefix)] == hostPrefix
}

// readAddresses reads what the host holds and where it routes the rest.
func (in *tableInput) readAddresses(nl *netlink.Handle, near map[int]string) error {
	addrs, err := whole(func() ([]netlink.Addr, error) { return nl.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	var routes []hostRoute
	for _, a := range addrs {
		ip, ok := netip.AddrFromSlice(a.IP.To4())
		if !ok || ip.IsLoopback() {
			continue
		}
		in.held = append(in.held, ip)
		if name, ok := near[a.LinkIndex]; ok {
			bits, _ := a.Mask.Size()
			in.subnets[name] = append(in.subnets[name], netip.PrefixFrom(ip, bits).Masked())
		} else {
			// A service address on a dummy link has no route but the local table's.
			routes = append(routes, hostRoute{dst: netip.PrefixFrom(ip, 32), away: true})
		}
	}
	table := &netlink.Route{Table: unix.RT_TABLE_MAIN}
	list, err := whole(func() ([]netlink.Route, error) {
		return nl.RouteListFiltered(netlink.FAMILY_V4, table, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	var defaults []netlink.Route
	for _, r := range list {
		if r.Dst == nil || r.Type != unix.RTN_UNICAST || r.LinkIndex == 0 {
			continue
		}
		ip, _ := netip.AddrFromSlice(r.Dst.IP.To4())
		bits, _ := r.Dst.Mask.Size()
		if bits == 0 {
			defaults = append(defaults, r)
		}
		_, ours := near[r.LinkIndex]
		routes = append(routes, hostRoute{netip.PrefixFrom(ip, bits), r.Priority, !ours})
	}
	in.away = awaySpans(routes)
	if len(defaults) == 0 {
		return nil
	}
	first := slices.MinFunc(defaults, func(a, b netlink.Route) int { return a.Priority - b.Priority })
	if taken, ours := near[first.LinkIndex]; ours {
		for _, name := range near {
			in.egress[name] = name != taken
		}
	}
	return nil
}

// whole repeats a listing that a change interrupted (NLM_F_DUMP_INTR).
func whole[T any](list func() ([]T, error)) (all []T, err error) {
	for range 20 {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

// deleteTable removes a table; none is success. It looks first: a transaction that
// fails makes the kernel wait for all readers.
func deleteTable(table *nftables.Table) error {
	if there, err := tableStands(table); !there {
		return err
	}
	c, err := dialTable()
	if err != nil {
		return err
	}
	c.DelTable(table)
	if err := c.Flush(); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// networks is the policies that endpoints of bridge have, and those that are
// known: the next endpoint of one then finds its chain. An internal network's
// rests on sets that are there with its endpoints.
func (in *tableInput) networks(bridge string) []string {
	ids := map[string]bool{}
	for id, p := range in.policies {
		ids[id] = !p.Internal
	}
	for _, a := range in.endpoints {
		if a.bridge == bridge {
			ids[a.policy] = true
		}
	}
	maps.DeleteFunc(ids, func(_ string, wanted bool) bool { return !wanted })
	return slices.Sorted(maps.Keys(ids))
}
