// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"fmt"
	"strings"

	"github.com/vishvananda/netlink"
)

// The steps of a move down: the NIC gets back what the bridge has.

// leave writes down that the host goes home, and what it takes along: what came
// from the NIC and what the bridge was given since.
func (m *move) leave(ctx context.Context) error {
	m.st.Moved = m.st.Moved.merge(m.st.Joined)
	m.st.Joined = identity{}
	if m.bridge.index != 0 {
		has, err := capture(m.bridge, false)
		if err != nil {
			return err
		}
		m.st.Moved = m.st.Moved.merge(has)
	}
	m.st.Phase = leaving
	return m.save(ctx)
}

func (m *move) addressesBack(ctx context.Context) error {
	home := m.st.Moved
	home.Routes, home.Rules = nil, nil
	if err := home.putAddresses(m.nic, false); err != nil {
		return err
	}
	if m.bridge.index == 0 {
		return nil
	}
	return seed(m.bridge, m.nic)
}

func (m *move) routesBack(ctx context.Context) error {
	home := m.st.Moved
	home.Addresses, home.Neighbours = nil, nil
	nic, err := netlink.LinkByIndex(m.nic.index)
	if err != nil {
		return fmt.Errorf("read %s: %w", m.nic.name, err)
	}
	if m.bridge.index != 0 && nic.Attrs().MasterIndex == m.bridge.index {
		if err := cross(m.nic, 0, home.Routes, m.nic); err != nil {
			return fmt.Errorf("take %s out of %s: %w", m.nic.name, m.name, err)
		}
	}
	return home.putRoutes(m.nic)
}

func (m *move) portBack(ctx context.Context) error {
	nic, err := netlink.LinkByIndex(m.nic.index)
	if err != nil {
		return fmt.Errorf("read %s: %w", m.nic.name, err)
	}
	if m.bridge.index == 0 || nic.Attrs().MasterIndex != m.bridge.index {
		return nil
	}
	if err := netlink.LinkSetNoMaster(nic); err != nil {
		return fmt.Errorf("take %s out of %s: %w", m.nic.name, m.name, err)
	}
	return nil
}

func (m *move) verifyDown(ctx context.Context) error {
	has, err := capture(m.nic, true)
	if err != nil {
		return err
	}
	if left := m.st.Moved.less(has).texts(); len(left) > 0 {
		return fmt.Errorf("%s did not get its %s", m.nic.name, strings.Join(left, ", "))
	}
	if m.bridge.index == 0 || m.undoing {
		return nil // whoever answers or not, the host is home
	}
	return m.st.Moved.verifyGateways(ctx, m.nic)
}

// dropBridge deletes the bridge, and with it its addresses and routes; a rule
// only names it and must go by itself.
func (m *move) dropBridge(ctx context.Context) error {
	if _, err := (egress{bridge: m.name, table: egressTables + m.nic.index}).sync(); err != nil {
		return err
	}
	if m.bridge.index == 0 {
		return nil
	}
	if err := (identity{Rules: m.st.Moved.Rules}).clear(m.bridge); err != nil {
		return err
	}
	l, err := netlink.LinkByIndex(m.bridge.index)
	if isNoLink(err) {
		return nil
	}
	if err == nil {
		err = netlink.LinkDel(l)
	}
	if err != nil {
		return fmt.Errorf("delete %s: %w", m.name, err)
	}
	m.gone = true
	return nil
}

func (m *move) dropTable(ctx context.Context) error {
	return m.h.dropTable(Bridge{Name: m.name, NIC: m.nic.name})
}

// dropRules drops the rules of the host with its last bridge.
func (m *move) dropRules(ctx context.Context) error {
	all, err := m.h.Bridges(ctx)
	if err != nil {
		return err
	}
	if left := others(all, m.name); len(left) > 0 {
		_, err = m.h.ensureRules(left)
		return err
	}
	return m.h.dropRules()
}

func (m *move) dnsBack(ctx context.Context) error {
	_, _ = m.h.writeDNS(ctx, m.nic.index, m.st.Moved.DNS)
	return nil
}

// forget ends the journal of a bridge that is no more.
func (m *move) forget(ctx context.Context) error {
	err := m.record(ctx, "forget "+m.name, func(s *hostState) error {
		delete(s.Bridges, m.name)
		return nil
	})
	if err != nil {
		return err
	}
	return m.h.keepOff(ctx)
}
