// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/vishvananda/netlink"

	"azurevnet/bridge/internal/rtnl"
	"azurevnet/bridge/internal/ruleset"
)

// Ensure makes what endpoints of the NIC need: its bridge, unless spec is for transparent ones,
// and the host's rules. Where that stands it costs a few reads and no lock. On a host that nobody
// reconciles it does so once a minute. A failure of the first call for a NIC leaves nothing of it.
//
// The error is ErrTaken for a NIC that is in a bridge.
func (h *Host) Ensure(ctx context.Context, spec Spec) (Bridge, error) {
	mended := h.reconcileIfNobodyDoes(ctx)
	b, stands := h.findPrepared(spec)
	if !stands {
		unlock, err := h.lockHost(ctx, "prepare the NIC "+spec.MAC)
		if err != nil {
			return Bridge{}, err
		}
		defer unlock()
		if b, err = h.ensureLocked(ctx, spec); err != nil {
			return Bridge{}, fmt.Errorf("prepare the NIC %s: %w", spec.MAC, err)
		}
	}
	b.Mended = mended
	return b, nil
}

// findPrepared reports whether all that spec asks for stands, from as few reads as can tell.
func (h *Host) findPrepared(spec Spec) (Bridge, bool) {
	s, err := h.readState()
	if err != nil || slices.ContainsFunc(spec.NICs, func(mac string) bool { _, known := s.NICs[mac]; return !known }) {
		return Bridge{}, false
	}
	n := s.NICs[spec.MAC]
	if !n.Prepared {
		return Bridge{}, false
	}
	if spec.Mode == ModeTransparent && !n.Transparent || spec.Mode != ModeTransparent && n.Bridge == "" || spec.Primary && !n.Primary || spec.Subnet.IsValid() && n.Subnet != spec.Subnet {
		return Bridge{}, false
	}
	nic := nicByName(s, spec.MAC)
	if nic == nil {
		return Bridge{}, false
	}
	b := Bridge{MTU: nic.Attrs().MTU, NIC: nic.Attrs().Name, NICMAC: spec.MAC}
	if spec.Mode == ModeTransparent {
		ok, err := ruleset.TablesExist(ruleset.Network{}, ruleset.ForTransparent)
		return b, err == nil && ok
	}
	l, err := netlink.LinkByName(n.Bridge)
	if err != nil || spec.Name != "" && spec.Name != n.Bridge {
		return Bridge{}, false
	}
	mac, ours := bridgeAliasOf(l)
	if a := l.Attrs(); !ours || mac != spec.MAC || a.HardwareAddr.String() != bridgeMAC(nic.Attrs().HardwareAddr).String() ||
		a.Flags&net.FlagUp == 0 || a.MTU != b.MTU {
		return Bridge{}, false
	}
	b.Name, b.MAC = n.Bridge, l.Attrs().HardwareAddr
	ok, err := ruleset.TablesExist(ruleset.Network{}, ruleset.ForBridges)
	return b, err == nil && ok
}

func (h *Host) ensureLocked(ctx context.Context, spec Spec) (Bridge, error) {
	links, err := rtnl.ReadLinks()
	if err != nil {
		return Bridge{}, err
	}
	hw, err := parseMAC(spec.MAC)
	if err != nil {
		return Bridge{}, err
	}
	mac := hw.String()
	s, err := h.readState()
	if err != nil {
		return Bridge{}, err
	}
	nic, err := findNIC(links, mac, s.NICs[mac].Name)
	if err != nil {
		return Bridge{}, err
	}
	if err := refuseHost(links, nic); err != nil {
		return Bridge{}, err
	}
	before := s.NICs[mac]
	name := ""
	if spec.Mode != ModeTransparent {
		if name, err = chooseBridge(links, spec, nic, s); err != nil {
			return Bridge{}, err
		}
	}
	if err := h.beforeStep("ask"); err != nil {
		return Bridge{}, err
	}
	if err := h.recordAsked(ctx, nic, name, spec); err != nil {
		return Bridge{}, err
	}
	h.noteRound() // this is one, and the first call of a host found no directory to note its own in
	err = h.doRound(ctx).hostErr
	if err == nil {
		err = h.notePrepared(ctx, mac)
	}
	if err != nil && before.Bridge == "" && !before.Transparent {
		err = errors.Join(err, h.withdrawAsked(context.WithoutCancel(ctx), mac, before))
	}
	if err != nil {
		return Bridge{}, err
	}
	b := Bridge{Name: name, MTU: nic.Attrs().MTU, NIC: nic.Attrs().Name, NICMAC: mac}
	if name != "" {
		b.MAC = bridgeMAC(hw)
	}
	return b, nil
}

// recordAsked writes down what spec asks for.
func (h *Host) recordAsked(ctx context.Context, nic netlink.Link, bridge string, spec Spec) error {
	mac := nic.Attrs().HardwareAddr.String()
	return h.updateState(ctx, "prepare the NIC "+mac, func(s *hostState) error {
		for _, other := range spec.NICs {
			if _, known := s.NICs[other]; !known {
				s.NICs[other] = nicState{}
			}
		}
		n := s.NICs[mac]
		n.Name, n.Prepared = nic.Attrs().Name, false
		n.Primary = n.Primary || spec.Primary
		n.Transparent = n.Transparent || spec.Mode == ModeTransparent
		if spec.Subnet.IsValid() {
			n.Subnet = spec.Subnet
		}
		if bridge != "" {
			n.Bridge = bridge
		}
		s.NICs[mac] = n
		return nil
	})
}

// notePrepared notes that all that was asked for stands. An Ensure that dies before
// leaves a table or a bridge, and its repeat must not take these for all of it.
func (h *Host) notePrepared(ctx context.Context, mac string) error {
	if err := h.beforeStep("note"); err != nil {
		return err
	}
	return h.updateState(ctx, "prepare the NIC "+mac, func(s *hostState) error {
		n := s.NICs[mac]
		n.Prepared = true
		s.NICs[mac] = n
		return nil
	})
}

// withdrawAsked takes back what was asked of a NIC that nothing is attached to, with all that was made for
// it. The errors of those who failed to make it say enough.
func (h *Host) withdrawAsked(ctx context.Context, mac string, before nicState) error {
	v, err := h.readView()
	if err != nil || slices.ContainsFunc(v.endpoints, func(e endpoint) bool { return e.nic == mac }) {
		return err
	}
	b := v.bridge(mac)
	if err := h.updateState(ctx, "take back what was asked of "+mac, func(s *hostState) error { s.NICs[mac] = before; return nil }); err != nil {
		return err
	}
	if err := h.beforeStep("unask"); err != nil {
		return err
	}
	if b != nil {
		if err := deleteLink(&netlink.Device{LinkAttrs: *b}); err != nil {
			return err
		}
	}
	return h.removeUnasked(ctx)
}

// firstBridge is the name of the primary NIC's bridge, unless another is asked for.
const firstBridge = "azure0"

// chooseBridge names the bridge of the NIC: the one it has, or a new one.
func chooseBridge(links rtnl.Links, spec Spec, nic netlink.Link, s *hostState) (string, error) {
	mac, name := nic.Attrs().HardwareAddr.String(), spec.Name
	has := s.NICs[mac].Bridge
	for _, b := range ourBridges(links) {
		if has == "" && b.NICMAC == mac {
			has = b.Name
		}
	}
	switch {
	case has != "" && (name == "" || name == has):
		return has, nil
	case has != "":
		return "", fmt.Errorf("%s has the bridge %s already and cannot have %s too: one NIC has one bridge; ask for %[2]s, or leave the name out", nic.Attrs().Name, has, name)
	case name == "" && spec.Primary:
		name = firstBridge
	case name == "":
		name = fmt.Sprintf("azure%d", nic.Attrs().Index)
	}
	if err := CheckBridgeName(name); err != nil {
		return "", fmt.Errorf("bridge %q: %w", name, err)
	}
	for other, n := range s.NICs {
		if other != mac && n.Bridge == name {
			return "", fmt.Errorf("%s is the bridge of the NIC %s already: give this one another name", name, other)
		}
	}
	l := links.ByName(name)
	if l == nil || halfMade(l) {
		return name, nil
	}
	if mac, ours := bridgeAliasOf(l); ours {
		return "", fmt.Errorf("%s is the bridge of the NIC %s already: give this one another name", name, mac)
	}
	return "", refuseNamesake(links, l)
}
