// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
)

// fabricMAC answers for every address of a VNet.
var fabricMAC = net.HardwareAddr{0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc}

// bridgeAlias begins the alias of every bridge of ours; the NIC's name and MAC
// follow it.
const bridgeAlias = "azv1 bridge "

// linkTable is one reading of the host's links.
type linkTable []netlink.Link

// readLinks lists the links. A dump that a change cut short is asked for again.
func readLinks() (linkTable, error) {
	for try := 0; ; try++ {
		all, err := netlink.LinkList()
		if errors.Is(err, netlink.ErrDumpInterrupted) && try < 20 {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list the host's links: %w", err)
		}
		return all, nil
	}
}

func (t linkTable) named(name string) netlink.Link {
	return t.find(func(l netlink.Link) bool { return l.Attrs().Name == name })
}

func (t linkTable) at(index int) netlink.Link {
	return t.find(func(l netlink.Link) bool { return l.Attrs().Index == index })
}

func (t linkTable) find(is func(netlink.Link) bool) netlink.Link {
	if i := slices.IndexFunc(t, is); i >= 0 {
		return t[i]
	}
	return nil
}

// notNICs are kinds of link that carry a NIC's MAC and are not the NIC.
var notNICs = []string{"bridge", "vlan", "macvlan", "macvtap", "ipvlan", "bond", "team", "vxlan", "ipoib"}

// nic finds the NIC with that MAC: by kind too, for under accelerated
// networking the virtual function has the MAC of its master, and a bridge of
// ours has it always.
func (t linkTable) nic(mac net.HardwareAddr) (netlink.Link, error) {
	var found []netlink.Link
	for _, l := range t {
		a := l.Attrs()
		if a.HardwareAddr.String() != mac.String() || a.Flags&net.FlagLoopback != 0 ||
			slices.Contains(notNICs, l.Type()) || strings.HasPrefix(a.Name, "azv") {
			continue
		}
		if m := t.at(a.MasterIndex); a.MasterIndex != 0 && (m == nil || !isMaster(m)) {
			continue // a virtual function under its netvsc device
		}
		found = append(found, l)
	}
	if len(found) > 1 { // a container's veth may have been given the MAC of the NIC
		found = slices.DeleteFunc(found, func(l netlink.Link) bool { return l.Type() == "veth" })
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return nil, fmt.Errorf("no network interface of this host has the MAC %s", mac)
	}
	return nil, fmt.Errorf("%s and %s both have the MAC %s: which is the NIC cannot be told", found[0].Attrs().Name, found[1].Attrs().Name, mac)
}

// isMaster tells links whose business it is to have ports from a NIC that has
// a virtual function under it.
func isMaster(l netlink.Link) bool {
	return slices.Contains([]string{"bridge", "bond", "team"}, l.Type())
}

// bridges lists the bridges of ours, by their alias.
func (t linkTable) bridges() []Bridge {
	var out []Bridge
	for _, l := range t {
		a := l.Attrs()
		words, ours := strings.CutPrefix(a.Alias, bridgeAlias)
		if nic, _, ok := strings.Cut(words, " "); ours && ok && l.Type() == "bridge" {
			out = append(out, Bridge{Name: a.Name, NIC: nic, MAC: a.HardwareAddr, MTU: a.MTU})
		}
	}
	return out
}

// Bridges lists the bridges of ours, from the kernel.
func (h *Host) Bridges(ctx context.Context) ([]Bridge, error) {
	t, err := readLinks()
	return t.bridges(), err
}

// NIC resolves a NIC's name or MAC, or the name of a bridge of ours, to the NIC:
// its name and its MAC, lower case with colons.
func (h *Host) NIC(ctx context.Context, nameOrMAC string) (name, mac string, err error) {
	t, err := readLinks()
	if err != nil {
		return "", "", err
	}
	if l := t.named(nameOrMAC); l != nil {
		a := l.Attrs()
		for _, b := range t.bridges() {
			if b.Name == a.Name {
				return b.NIC, b.MAC.String(), nil
			}
		}
		if m := t.at(a.MasterIndex); m != nil && !isMaster(m) {
			return m.Attrs().Name, m.Attrs().HardwareAddr.String(), nil
		}
		if len(a.HardwareAddr) != 6 || slices.Contains(notNICs, l.Type()) || a.Flags&net.FlagLoopback != 0 {
			return "", "", fmt.Errorf("%s is no NIC but a link of type %s: name the NIC under it", a.Name, l.Type())
		}
		return a.Name, a.HardwareAddr.String(), nil
	}
	hw, err := parseMAC(nameOrMAC)
	if err != nil {
		return "", "", fmt.Errorf("no network interface of this host is named %q", nameOrMAC)
	}
	l, err := t.nic(hw)
	if err != nil {
		return "", "", err
	}
	return l.Attrs().Name, l.Attrs().HardwareAddr.String(), nil
}

// parseMAC reads an Ethernet address as people and Azure write it: with colons,
// hyphens or nothing between the digits.
func parseMAC(s string) (net.HardwareAddr, error) {
	if len(s) == 12 {
		s = s[0:2] + ":" + s[2:4] + ":" + s[4:6] + ":" + s[6:8] + ":" + s[8:10] + ":" + s[10:12]
	}
	mac, err := net.ParseMAC(s)
	if err == nil && len(mac) != 6 {
		err = fmt.Errorf("%q is no Ethernet address", s)
	}
	return mac, err
}

// checkName refuses what the kernel, a path or a line of text would not bear as
// the name of a link.
func checkName(name string) error {
	if name == "" || len(name) > 15 || name == "." || name == ".." || strings.HasPrefix(name, "azv") ||
		strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune(`/\:"'%*?[];`, r) }) {
		return fmt.Errorf("%q cannot be the name of a bridge: 1 to 15 letters, digits, '-', '_' or '.', and not azv…, which are endpoints", name)
	}
	return nil
}
