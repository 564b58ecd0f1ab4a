// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Reclaim takes addrs, which must be none of the host's own, off the NIC with
// that MAC and off its bridge, and returns those that were there. What cloud-init
// put on the host is then free for containers. An address that a default route
// leaves from is refused, for it is the host's own.
func (h *Host) Reclaim(ctx context.Context, mac string, addrs []netip.Addr) (removed []netip.Addr, err error) {
	unlock, err := h.lockExclusive(ctx, "reclaim")
	if err != nil {
		return nil, err
	}
	defer unlock()
	s, err := h.known()
	if err != nil {
		return nil, fmt.Errorf("reclaim: %w", err)
	}
	t, err := readLinks()
	if err != nil {
		return nil, fmt.Errorf("reclaim: %w", err)
	}
	hw, err := parseMAC(mac)
	if err != nil {
		return nil, fmt.Errorf("reclaim: %w", err)
	}
	nic, err := t.nic(hw)
	if err != nil {
		return nil, fmt.Errorf("reclaim: %w", err)
	}
	on := []link{{nic.Attrs().Index, nic.Attrs().Name}}
	name, st := s.of(hw.String())
	if l := t.named(name); st != nil && l != nil {
		on = append(on, link{l.Attrs().Index, name})
	}
	for i, l := range on {
		gone, err := h.takeOff(l, addrs, i == len(on)-1)
		if err != nil {
			return removed, fmt.Errorf("reclaim: %w", err)
		}
		removed = append(removed, gone...)
	}
	if st == nil || len(removed) == 0 {
		return removed, nil
	}
	err = h.updateState(ctx, "reclaim", func(s *hostState) error {
		st.forget(removed)
		s.Bridges[name] = st
		return nil
	})
	for _, b := range t.bridges() {
		if err == nil && b.Name == name {
			_, err = h.syncTable(b)
		}
	}
	if err != nil {
		return removed, fmt.Errorf("reclaim: %w", err)
	}
	return removed, nil
}

// forget takes addrs out of the identity that a bridge carries.
func (st *bridgeState) forget(addrs []netip.Addr) {
	for _, a := range addrs {
		st.Moved, st.Joined = st.Moved.without(a), st.Joined.without(a)
	}
}

// takeOff takes addrs off l and returns those it had. home says that the host
// lives on l, whose last address is then its own. With the first address of a
// subnet the kernel would drop the others, unless told to promote them.
func (h *Host) takeOff(l link, addrs []netip.Addr, home bool) (gone []netip.Addr, err error) {
	has, err := capture(l, false)
	if err != nil {
		return nil, err
	}
	for _, m := range has.Addresses {
		a := addressOf(m).Addr()
		if !slices.Contains(addrs, a) {
			continue
		}
		if slices.ContainsFunc(has.Routes, func(r message) bool {
			return r[1] == 0 && tableOf(r) == unix.RT_TABLE_MAIN && has.source(r) == a
		}) || home && len(has.Addresses) == 1 {
			return gone, fmt.Errorf("%s is the host's own address on %s and stays there", a, l.name)
		}
		if _, err := h.setSysctl("ipv4/conf/"+l.name+"/promote_secondaries", "1"); err != nil {
			return gone, fmt.Errorf("keep the other addresses of %s: %w", l.name, err)
		}
		if err := addresses.remove(addressOn(m, l, true)); err != nil {
			return gone, fmt.Errorf("take from %s its %w", l.name, err)
		}
		gone = append(gone, a)
	}
	return gone, nil
}

// source is the address that packets of the host leave with by route r: the
// one that it names, else the first that shares a subnet with its gateway.
func (id identity) source(r message) netip.Addr {
	if named := ipOf(routes.attr(r, unix.RTA_PREFSRC)); named.IsValid() {
		return named
	}
	via := ipOf(routes.attr(r, unix.RTA_GATEWAY))
	for _, m := range id.Addresses {
		if a := addressOf(m); a.Masked().Contains(via) {
			return a.Addr()
		}
	}
	return netip.Addr{}
}
