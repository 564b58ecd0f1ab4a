// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
)

// The steps of a move up: the bridge gets what the NIC has.

// journal writes down what is about to move, before anything does. What the
// NIC holds while the bridge stands came there since (a DHCP client, a restarted
// networkd, cloud-init) and moves too.
func (m *move) journal(ctx context.Context) error {
	if _, err := m.asBridge(); err != nil {
		return err
	}
	was := *m.st
	if err := m.yield(ctx); err != nil {
		return err
	}
	if m.st.Moved.DNS == nil {
		m.held.DNS = m.h.readDNS(ctx, m.nic.index)
	}
	m.st.Moved = m.st.Moved.merge(m.held.beyond(m.st.Moved))
	m.st.NIC = m.nic.name
	if !m.whole {
		m.st.Phase = moving
	}
	if !equalJSON(was, *m.st) || !m.whole || m.st.unsaved {
		if err := m.save(ctx); err != nil {
			return err
		}
	}
	return m.h.keepOff(ctx)
}

// yield takes off the host what an endpoint holds, such as an address that
// cloud-init put there: the host would answer for it in the container's place.
func (m *move) yield(ctx context.Context) error {
	all, err := m.h.Attachments(ctx)
	if err != nil {
		return err
	}
	var lent []netip.Addr
	for _, a := range all {
		lent = append(lent, a.Addr.Addr())
	}
	for _, l := range []link{m.nic, m.bridge} {
		if l.index == 0 || len(lent) == 0 {
			continue
		}
		gone, err := m.h.takeOff(l, lent, (l == m.bridge) == m.whole)
		for _, a := range gone {
			m.held = m.held.without(a)
			m.mend("%s held %s, which is an endpoint's", l.name, a)
		}
		m.st.forget(gone)
		if err != nil {
			return err
		}
	}
	return nil
}

// save writes the journal.
func (m *move) save(ctx context.Context) error {
	return m.record(ctx, "move "+m.name, func(s *hostState) error {
		s.Bridges[m.name] = m.st
		return nil
	})
}

// record changes the journal. On the way home from a failed walk nothing waits
// for it: what is on disk says that the host moves, which leads home too.
func (m *move) record(ctx context.Context, who string, change func(*hostState) error) error {
	if !m.undoing {
		return m.h.updateState(ctx, who, change)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_ = m.h.updateState(ctx, who, change)
	return nil
}

func (m *move) rules(ctx context.Context) error {
	b, err := m.asBridge()
	if err != nil {
		return err
	}
	all, err := m.h.Bridges(ctx)
	if err != nil {
		return err
	}
	mended, err := m.h.ensureRules(append(others(all, m.name), b))
	m.mended = append(m.mended, mended...)
	if m.whole { // what ails iptables must keep neither the host's addresses nor the table from being mended
		m.ailing = err
		return nil
	}
	return err
}

func (m *move) table(ctx context.Context) error {
	b, err := m.asBridge()
	if err != nil {
		return err
	}
	changed, err := m.h.syncTable(b)
	if changed {
		m.mend("the nft table of %s was not as it should be", m.name)
	}
	return err
}

// makeBridge makes the bridge, or what it lacks.
func (m *move) makeBridge(ctx context.Context) error {
	want, err := m.asBridge()
	if err != nil {
		return err
	}
	if m.bridge.index == 0 {
		if err := createBridge(want); err != nil {
			return err
		}
		m.mend("%s was gone", m.name)
	}
	l, err := netlink.LinkByName(m.name)
	if err != nil {
		return fmt.Errorf("read %s: %w", m.name, err)
	}
	m.bridge = link{l.Attrs().Index, m.name}
	return m.mendBridge(l, want)
}

func (m *move) mendBridge(l netlink.Link, want Bridge) error {
	a := l.Attrs()
	if alias := bridgeAlias + want.NIC + " " + want.MAC.String(); a.Alias != alias {
		if err := netlink.LinkSetAlias(l, alias); err != nil {
			return fmt.Errorf("mark %s as ours: %w", want.Name, err)
		}
	}
	if a.HardwareAddr.String() != want.MAC.String() {
		if err := netlink.LinkSetHardwareAddr(l, want.MAC); err != nil {
			return fmt.Errorf("give %s the MAC %s: %w", want.Name, want.MAC, err)
		}
		m.mend("%s had the MAC %s", want.Name, a.HardwareAddr)
	}
	if a.MTU != want.MTU {
		if err := netlink.LinkSetMTU(l, want.MTU); err != nil {
			return fmt.Errorf("give %s an MTU of %d: %w", want.Name, want.MTU, err)
		}
		m.mend("%s had an MTU of %d bytes", want.Name, a.MTU)
	}
	if err := m.sysctls(); err != nil {
		return err
	}
	if a.Flags&net.FlagUp == 0 {
		if err := netlink.LinkSetUp(l); err != nil {
			return fmt.Errorf("set %s up: %w", want.Name, err)
		}
		m.mend("%s was down", want.Name)
	}
	return nil
}

// sysctls are set before the bridge is up: it must make no link-local address
// of its own, for it gets the NIC's, and must heed no router advertisement.
// A redirect would only tell containers the gateway they have; the kernel sends
// them if either "all" or the link says so.
func (m *move) sysctls() error {
	for _, s := range sysctlsOf(m.name) {
		changed, err := m.h.setSysctl(s.name, s.value)
		if err != nil && !(isNotExist(err) && strings.HasPrefix(s.name, "ipv6/")) { // a kernel without IPv6
			return fmt.Errorf("set %s to %s: %w", s.name, s.value, err)
		}
		if changed {
			m.mend("%s was not %s", s.name, s.value)
		}
	}
	return nil
}

type sysctl struct{ name, value string }

func sysctlsOf(bridge string) []sysctl {
	return []sysctl{
		{"ipv6/conf/" + bridge + "/accept_ra", "0"},
		{"ipv6/conf/" + bridge + "/addr_gen_mode", "1"},
		{"ipv4/conf/" + bridge + "/send_redirects", "0"},
		{"ipv4/conf/all/send_redirects", "0"},
		{"ipv4/ip_forward", "1"},
	}
}

// addresses gives the bridge what it lacks of the host's addresses, and the
// neighbours that the NIC knows, lest the first packets wait for ARP.
func (m *move) addresses(ctx context.Context) error {
	lacks, joined, err := m.lacks()
	if err != nil {
		return err
	}
	lacks.Routes, lacks.Rules = nil, nil
	m.miss(lacks)
	if err := lacks.putAddresses(m.bridge, true); err != nil {
		return err
	}
	joined.Routes, joined.Rules = nil, nil
	m.rejoin(joined, func(one identity) error { return one.putAddresses(m.bridge, true) })
	if m.whole {
		return nil
	}
	return seed(m.nic, m.bridge)
}

// lacks is what of the host's identity the bridge does not have, and, when it
// is made again, what others had given it.
func (m *move) lacks() (moved, joined identity, err error) {
	has, err := capture(m.bridge, true)
	if err != nil {
		return identity{}, identity{}, err
	}
	if !m.whole {
		joined = m.st.Joined.less(has)
	}
	return m.st.Moved.less(has), joined, nil
}

// rejoin puts what others had given the bridge, each part alone: one that does
// not fit any more, such as a route by a link that is gone, is told and no more.
func (m *move) rejoin(joined identity, put func(identity) error) {
	for _, one := range joined.apart() {
		if err := put(one); err != nil {
			m.ailing = errors.Join(m.ailing, err)
			continue
		}
		m.miss(one)
	}
}

// port puts the NIC into the bridge. The static entry keeps the fabric's MAC,
// which every frame from outside has, from moving to another port.
func (m *move) port(ctx context.Context) error {
	nic, err := netlink.LinkByIndex(m.nic.index)
	if err != nil {
		return fmt.Errorf("read %s: %w", m.nic.name, err)
	}
	if nic.Attrs().MasterIndex != m.bridge.index {
		lacks, _, err := m.lacks()
		if err == nil {
			err = cross(m.nic, m.bridge.index, lacks.Routes, m.bridge)
		}
		if err != nil {
			return fmt.Errorf("put %s into %s: %w", m.nic.name, m.name, err)
		}
		m.mend("%s was not in %s", m.nic.name, m.name)
	}
	if nic.Attrs().Flags&net.FlagUp == 0 {
		if err := netlink.LinkSetUp(nic); err != nil {
			return fmt.Errorf("set %s up: %w", m.nic.name, err)
		}
		m.mend("%s was down", m.nic.name)
	}
	changed, err := ensureFabric(m.nic, m.bridge)
	if changed {
		m.mend("the forwarding entry of the fabric on %s was gone", m.nic.name)
	}
	if err != nil {
		return err
	}
	return m.keepUnknown(nic)
}

// keepUnknown keeps unicast to a MAC that nobody has from the fabric, which
// delivers by its own MAC alone: a container goes on for a while to send to one
// of its VM that has just been removed.
func (m *move) keepUnknown(nic netlink.Link) error {
	flags, err := readPortFlags()
	if err != nil {
		return fmt.Errorf("read port flags: %w", err)
	}
	if flags[m.nic.index][nl.IFLA_BRPORT_UNICAST_FLOOD] == 0 {
		return nil
	}
	if err := netlink.LinkSetFlood(nic, false); err != nil {
		return fmt.Errorf("keep unknown unicast from %s: %w", m.nic.name, err)
	}
	m.mend("%s sent out what was for nobody", m.nic.name)
	return nil
}

func (m *move) routes(ctx context.Context) error {
	lacks, joined, err := m.lacks()
	if err != nil {
		return err
	}
	lacks.Addresses, lacks.Neighbours = nil, nil
	m.miss(lacks)
	if err := lacks.putRoutes(m.bridge); err != nil {
		return err
	}
	joined.Addresses, joined.Neighbours = nil, nil
	m.rejoin(joined, func(one identity) error { return one.putRoutes(m.bridge) })
	return nil
}

func (m *move) miss(lacks identity) {
	for _, text := range lacks.texts() {
		m.mend("%s lacked its %s", m.name, text)
	}
}

func (m *move) clear(ctx context.Context) error {
	for _, text := range m.held.texts() {
		m.mend("%s held %s beside %s", m.nic.name, text, m.name)
	}
	return m.held.clear(m.nic)
}

func (m *move) verifyUp(ctx context.Context) error {
	lacks, _, err := m.lacks()
	if err != nil {
		return err
	}
	if left := lacks.texts(); len(left) > 0 {
		return fmt.Errorf("%s did not get its %s", m.name, strings.Join(left, ", "))
	}
	if m.whole {
		return nil
	}
	return m.st.Moved.verifyGateways(ctx, m.bridge)
}

// endpoints mends the ports. One that cannot be mended is told and no more: the
// host and the other containers must not lose their network for it.
func (m *move) endpoints(ctx context.Context) error {
	b, err := m.asBridge()
	if err != nil {
		return err
	}
	mended, err := m.h.syncPorts(b)
	m.mended = append(m.mended, mended...)
	m.ailing = errors.Join(m.ailing, err)
	if m.whole && len(m.mended) == 0 {
		return nil
	}
	_, err = m.h.syncTable(b) // once more: what is direct follows the host's routes, which have moved
	return err
}

// dns is best effort: the host finds names by /etc/resolv.conf meanwhile.
func (m *move) dns(ctx context.Context) error {
	changed, err := m.h.writeDNS(ctx, m.bridge.index, m.st.Moved.DNS)
	if changed || err != nil && !m.whole {
		m.mend("systemd-resolved knew no DNS servers of %s%s", m.name, because(err))
	}
	return nil
}

// stand ends the journal. What the bridge has beyond what moved is remembered,
// to be brought back should the bridge get lost.
func (m *move) stand(ctx context.Context) error {
	has, err := capture(m.bridge, false)
	if err != nil {
		return err
	}
	joined := has.less(m.st.Moved)
	joined.DNS = nil
	if m.st.Phase == standing && equalJSON(joined, m.st.Joined) {
		return nil
	}
	m.st.Phase, m.st.Joined = standing, joined
	return m.save(ctx)
}
