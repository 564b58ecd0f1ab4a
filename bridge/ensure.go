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

// Ensure makes what endpoints of the NIC need: the NIC's bridge, unless spec is for transparent endpoints, and
// the host's rules. If all of it was made before, Ensure costs a few reads and takes no lock. On a host where
// no round runs, Ensure does one once a minute. If the first call for a NIC fails, it leaves nothing of what it
// made.
//
// The error is ErrTaken for a NIC that is in a bridge, and ErrNameTaken if a bridge that is not ours has the name
// of the NIC's bridge.
func (h *Host) Ensure(ctx context.Context, spec Spec) (Bridge, error) {
	mended := h.reconcileIfNobodyDoes(ctx)
	b, stands := h.findPrepared(spec)
	if !stands {
		unlock, err := h.lockHost(ctx, "prepare the NIC "+spec.MAC)
		if err != nil {
			return Bridge{}, err
		}
		defer unlock()
		// Of many calls at once, the first may have made all of it while the others waited for the lock. A round of each of
		// them would take longer than the last ones wait.
		if b, stands = h.findPrepared(spec); !stands {
			if b, err = h.ensureLocked(ctx, spec); err != nil {
				return Bridge{}, fmt.Errorf("prepare the NIC %s: %w", spec.MAC, err)
			}
		}
	}
	b.Mended = mended
	return b, nil
}

// findPrepared reports whether the host has all that spec asks for, and returns the NIC's bridge. It reads no
// more than it must: host.json, the NIC, the bridge, and whether the nft tables exist.
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
		ok, err := ruleset.TablesExist(ruleset.Policy{}, ruleset.ForTransparent)
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
	ok, err := ruleset.TablesExist(ruleset.Policy{}, ruleset.ForBridges)
	return b, err == nil && ok
}

// ensureLocked records in host.json what spec asks for, and does a round, which makes it. The caller holds the
// lock.
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
	h.noteRound() // at the first call, reconcileIfNobodyDoes had no directory to note its round in
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

// recordAsked writes into host.json what spec asks of the NIC. Prepared is false until a round has made it.
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

// notePrepared notes in host.json that the host has all that was asked of the NIC. An Ensure that dies before
// this may leave a table or a bridge. Its repeat must not take these for all that is needed.
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

// withdrawAsked takes back the wish for a NIC without endpoints, and removes the parts that were made for it. before
// is the earlier wish.
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

// chooseBridge returns the name of the NIC's bridge: the bridge that the NIC has, else the name that spec asks
// for, else a name of ours. It refuses a second bridge for one NIC, and a name that another link has.
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
