// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"fmt"

	"github.com/vishvananda/netlink"
)

// move is one walk of the host's identity between a NIC and its bridge, up or
// down. Every step finds what stands and does what lacks, so that the same walk
// makes a bridge, mends it, adopts it, and finishes what a crash left.
type move struct {
	h      *Host
	name   string // of the bridge
	st     *bridgeState
	nic    link
	bridge link // index 0 until it exists

	held    identity // on the NIC as the walk begins
	whole   bool     // the host was on the bridge as the walk begins
	undoing bool     // the walk is the way back from a failed one
	gone    bool     // the bridge was deleted on the way
	mended  []string // what was found wanting, in sentences
	ailing  error    // what could not be mended, and does not end the walk
}

// step is a named step of a walk.
type step struct {
	name string
	do   func(ctx context.Context) error
}

func (m *move) walk(ctx context.Context, steps []step) error {
	for _, s := range steps {
		err := ctx.Err()
		if err == nil && m.h.step != nil {
			err = m.h.step(s.name)
		}
		if err == nil {
			err = s.do(ctx)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}

func (m *move) mend(format string, args ...any) {
	m.mended = append(m.mended, fmt.Sprintf(format, args...))
}

// up is make-before-break: until "port" the host lives on the NIC alone; from
// there what comes in is the bridge's, which has the addresses already, while
// what goes out may use either; "clear" then takes what the bridge has off the NIC.
func (m *move) up() []step {
	return []step{
		{"journal", m.journal},
		{"rules", m.rules},
		{"table", m.table},
		{"bridge", m.makeBridge},
		{"addresses", m.addresses},
		{"port", m.port},
		{"routes", m.routes},
		{"egress", m.egress},
		{"clear", m.clear},
		{"verify", m.verifyUp},
		{"endpoints", m.endpoints},
		{"dns", m.dns},
		{"stand", m.stand},
	}
}

// down is up's mirror.
func (m *move) down() []step {
	return []step{
		{"journal", m.leave},
		{"addresses", m.addressesBack},
		{"routes", m.routesBack},
		{"port", m.portBack},
		{"verify", m.verifyDown},
		{"bridge", m.dropBridge},
		{"dns", m.dnsBack}, // before what may fail: with the bridge its name servers are gone
		{"table", m.dropTable},
		{"rules", m.dropRules},
		{"forget", m.forget},
	}
}

// undo is the part of down that brings the host home and keeps the wish for
// the bridge in the journal.
func (m *move) undo() []step {
	return []step{
		{"addresses", m.addressesBack},
		{"routes", m.routesBack},
		{"port", m.portBack},
		{"verify", m.verifyDown},
		{"bridge", m.dropBridge},
		{"dns", m.dnsBack},
	}
}

// newMove reads where the identity is. The NIC must exist.
func (h *Host) newMove(name string, st *bridgeState) (*move, error) {
	m := &move{h: h, name: name, st: st}
	t, err := readLinks()
	if err != nil {
		return nil, err
	}
	mac, err := parseMAC(st.MAC)
	if err != nil {
		return nil, err
	}
	nic, err := t.nic(mac)
	if err != nil {
		return nil, err
	}
	m.nic = link{nic.Attrs().Index, nic.Attrs().Name}
	if l := t.named(name); l != nil {
		if l.Type() != "bridge" {
			return nil, fmt.Errorf("%s exists already as a link of type %s: give the bridge another name", name, l.Type())
		}
		m.bridge = link{l.Attrs().Index, name}
	}
	if m.held, err = capture(m.nic, true); err != nil {
		return nil, err
	}
	m.whole = m.bridge.index != 0 && nic.Attrs().MasterIndex == m.bridge.index && st.Phase == standing
	return m, nil
}

// asBridge is the bridge as it is to stand.
func (m *move) asBridge() (Bridge, error) {
	nic, err := netlink.LinkByIndex(m.nic.index)
	if err != nil {
		return Bridge{}, fmt.Errorf("read %s: %w", m.nic.name, err)
	}
	b := Bridge{Name: m.name, NIC: m.nic.name, MAC: nic.Attrs().HardwareAddr, MTU: nic.Attrs().MTU}
	if m.st.MTU > b.MTU {
		return Bridge{}, fmt.Errorf("an MTU of %d bytes is more than the %d of %s: larger packets would vanish", m.st.MTU, b.MTU, b.NIC)
	}
	if m.st.MTU != 0 {
		b.MTU = m.st.MTU
	}
	return b, nil
}

func others(all []Bridge, name string) []Bridge {
	var out []Bridge
	for _, b := range all {
		if b.Name != name {
			out = append(out, b)
		}
	}
	return out
}

func because(err error) string {
	if err == nil {
		return ""
	}
	return ": " + err.Error()
}
