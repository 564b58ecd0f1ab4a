// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// violations are what a port counts: offences that no VM's own boot commits
// and that Azure would drop in silence.
var violations = []string{
	"source_mac",  // a frame from another MAC than the NIC's
	"arp_mac",     // an ARP packet that names another MAC as its sender's
	"arp_ip",      // an ARP packet that names an address as its sender's that is not the NIC's
	"source_ip",   // an IPv4 packet from an address that is not the NIC's
	"multicast",   // an IPv4 frame to a multicast or broadcast MAC, but for DHCP
	"destination", // a frame to a MAC that is not the fabric's
	"ipv6",        // IPv6 from another link-local address than the NIC's own
	"protocol",    // neither ARP nor IP
	"host_agent",  // HTTP to the host agent from a secondary address
}

// Violations counts the frames that the fabric refused because they break
// Azure's rules, by kind, over all VMs. It leaves out kinds without any. The
// kinds are source_mac, arp_mac, arp_ip, source_ip, multicast, destination,
// ipv6, protocol and host_agent. What a VM's NIC says in IPv6 about its own
// link-local address is not one.
func (v *VNet) Violations() (map[string]uint64, error) { return v.violations("") }

// Violations counts those of this VM alone. They survive power cuts.
func (m *VM) Violations() (map[string]uint64, error) { return m.vnet.violations(m.Name) }

// Accepted counts the IPv4 frames that the ports accepted from VMs, by source
// address, over all VMs. It leaves out addresses without any. A port accepts
// a frame that breaks no rule of Violations and that is not DHCP. The fabric may
// drop it later: on the way to the internet, or because nobody has its
// destination. Segments that offload keeps in one frame count as one.
func (v *VNet) Accepted() (map[netip.Addr]uint64, error) { return v.sources("", "accepted") }

// Accepted counts those of this VM alone. They survive power cuts.
func (m *VM) Accepted() (map[netip.Addr]uint64, error) { return m.vnet.sources(m.Name, "accepted") }

// Strangers counts the frames of Violations' kind source_ip, by source address,
// over all VMs.
func (v *VNet) Strangers() (map[netip.Addr]uint64, error) { return v.sources("", "strangers") }

// ResetViolations sets all counters to zero: those of Violations, Accepted and
// Strangers.
func (v *VNet) ResetViolations() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	rules := "reset counters\n"
	for port := range v.ports {
		rules += fmt.Sprintf("flush set netdev %[1]s accepted\nflush set netdev %[1]s strangers\n", port)
	}
	return v.fabric.nft(rules)
}

// violations adds the counters of a VM up, of all VMs for an empty name.
func (v *VNet) violations(vm string) (map[string]uint64, error) {
	tables, err := v.portTables(vm, "counters")
	if err != nil {
		return nil, err
	}
	sum := map[string]uint64{}
	for _, t := range tables {
		if c := t.Counter; c.Packets > 0 && slices.Contains(violations, c.Name) {
			sum[c.Name] += c.Packets
		}
	}
	return sum, nil
}

// sources adds up what a set counts of a VM by source address, of all VMs for an
// empty name.
func (v *VNet) sources(vm, set string) (map[netip.Addr]uint64, error) {
	// "list sets" does not print elements in every version of nft.
	tables, err := v.portTables(vm, "ruleset")
	if err != nil {
		return nil, err
	}
	sum := map[netip.Addr]uint64{}
	for _, t := range tables {
		if t.Set.Name != set {
			continue
		}
		var elems []struct {
			Elem struct {
				Val     netip.Addr
				Counter struct{ Packets uint64 }
			}
		}
		if len(t.Set.Elem) > 0 {
			if err := json.Unmarshal(t.Set.Elem, &elems); err != nil {
				return nil, fmt.Errorf("read the fabric's counters: %w", err)
			}
		}
		for _, e := range elems {
			sum[e.Elem.Val] += e.Elem.Counter.Packets
		}
	}
	return sum, nil
}

// tableEntry is an object in the table of a port. Those that are neither
// counters nor sets have no names here.
type tableEntry struct {
	Counter struct {
		Table, Name string
		Packets     uint64
	}
	Set struct {
		Table, Name string
		Elem        json.RawMessage // its form is the set's
	}
}

// portTables lists "counters" or the whole "ruleset" of all ports that a VM
// has or had, of all VMs for an empty name.
func (v *VNet) portTables(vm, what string) ([]tableEntry, error) {
	args := []string{"-j", "list", what}
	if what == "ruleset" {
		args = append(args, "netdev")
	}
	out, err := v.fabric.feed("", "nft", args...)
	if err != nil {
		return nil, err
	}
	var list struct{ Nftables []tableEntry }
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return nil, fmt.Errorf("read the fabric's counters: %w", err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.DeleteFunc(list.Nftables, func(t tableEntry) bool {
		owner, ok := v.ports[t.Counter.Table+t.Set.Table] // one of the two is empty
		return !ok || vm != "" && owner != vm
	}), nil
}

// Proved returns an error if the fabric refused a frame, which Azure would drop, or carried none from one of the addresses:
// then nothing was shown of that address.
func (v *VNet) Proved(used ...netip.Addr) error {
	refused, err := v.Violations()
	if err != nil {
		return err
	}
	carried, err := v.Accepted()
	if err != nil {
		return err
	}
	if len(refused) > 0 {
		err = fmt.Errorf("the fabric refused frames that break Azure's rules: %v", refused)
	}
	for _, addr := range used {
		if carried[addr] == 0 {
			err = errors.Join(err, fmt.Errorf("the fabric carried nothing from %s: its rules were not tried", addr))
		}
	}
	return err
}
