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

	"azurevnet/bridge/internal/rtnl"
	"azurevnet/internal/dump"
)

// ErrTaken is in the error for a host whose NIC is a port of a bridge, or of another link that hasPorts knows. The
// bridge is somebody else's, or was made by a build of azure-vnet that moved the NIC into it. Such a host is not
// changed.
var ErrTaken = errors.New("the NIC is a port of a bridge")

// errNoNIC is in the error for a MAC that no NIC of this host has. The text goes on with the MAC.
var errNoNIC = errors.New("no network interface of this host has")

// ErrNameTaken is in the error for a host where a bridge that is not ours has the name that the NIC's bridge is
// to have. That bridge is not changed. If a link of another kind or another NIC's bridge has the name, the error
// is a plain one.
var ErrNameTaken = errors.New("the bridge's name is another link's")

// notNICs are kinds of link that may have a NIC's MAC and are not the NIC.
var notNICs = []string{"bridge", "vlan", "macvlan", "macvtap", "ipvlan", "bond", "team", "vxlan", "ipoib"}

// findNIC finds the NIC with that MAC. The MAC alone does not tell: under accelerated networking the virtual
// function has the MAC of the NIC above it, and a container may have been given the NIC's MAC. So the kind of
// link counts too. If several links remain, the NIC is the one with the given name, which the NIC had last. The
// error is errNoNIC if no link has the MAC.
func findNIC(links rtnl.Links, mac, name string) (netlink.Link, error) {
	hw, err := parseMAC(mac)
	if err != nil {
		return nil, err
	}
	var found []netlink.Link
	for _, l := range links {
		a := l.Attrs()
		if a.HardwareAddr.String() != hw.String() || a.Flags&net.FlagLoopback != 0 || slices.Contains(notNICs, l.Type()) ||
			strings.HasPrefix(a.Name, hostPrefix) || strings.HasPrefix(a.Name, peerPrefix) {
			continue
		}
		if m := links.ByIndex(a.MasterIndex); a.MasterIndex != 0 && (m == nil || !hasPorts(m)) {
			continue // a virtual function is a port of the NIC that it belongs to
		}
		found = append(found, l)
	}
	if i := slices.IndexFunc(found, func(l netlink.Link) bool { return l.Attrs().Name == name }); i >= 0 {
		return found[i], nil
	}
	if len(found) > 1 {
		found = slices.DeleteFunc(found, func(l netlink.Link) bool { return l.Type() == "veth" })
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return nil, fmt.Errorf("%w the MAC %s: ip -br link shows which it has", errNoNIC, hw)
	}
	return nil, fmt.Errorf("%s and %s both have the MAC %s: which is the NIC cannot be told; give the other one another MAC", found[0].Attrs().Name, found[1].Attrs().Name, hw)
}

// nicByName finds the NIC by the name that it had last, without a list of all links. It returns nil if another
// link has that name now, or the link is a port of something.
func nicByName(s *hostState, mac string) netlink.Link {
	name := s.NICs[mac].Name
	if name == "" {
		return nil
	}
	l, err := netlink.LinkByName(name)
	if err != nil || l.Attrs().HardwareAddr.String() != mac || l.Attrs().MasterIndex != 0 || slices.Contains(notNICs, l.Type()) {
		return nil
	}
	return l
}

// hasPorts reports whether links of this kind have ports, such as a bridge or a bond. A NIC with a virtual
// function under it is a master too, and no such kind.
func hasPorts(l netlink.Link) bool {
	return slices.Contains([]string{"bridge", "bond", "team", "openvswitch", "vrf"}, l.Type())
}

// refuseTaken returns an error if the NIC is a port of any link that hasPorts knows: a bridge, a bond, a team, Open
// vSwitch's or a VRF. The program that put the NIC there relies on it. A NIC's packets go either to that link or to
// the host's IP layer, not to both.
func refuseTaken(links rtnl.Links, nic netlink.Link) error {
	m := links.ByIndex(nic.Attrs().MasterIndex)
	if m == nil || !hasPorts(m) {
		return nil
	}
	name, master := nic.Attrs().Name, m.Attrs().Name
	if strings.HasPrefix(m.Attrs().Alias, formerAlias) {
		return fmt.Errorf("%w: %s is in %s, where an earlier build of azure-vnet put it. Nothing was changed, and the containers that run keep their network. Drain this VM. Then run that build's own uninstall; or disable that build (docker plugin disable -f azure-vnet:latest, or remove its conflist) and reboot", ErrTaken, name, master)
	}
	return fmt.Errorf("%w: %s is in %s, a %s that is not ours, such as an older azure-vnet's. Nothing was changed. Drain this VM and reboot it without whatever makes %s", ErrTaken, name, master, m.Type(), master)
}

// refuseNamesake returns the error for a link of others that has the name of a bridge of ours. Azure's own
// azure-vnet leaves such a bridge behind. While the bridge has ports or an address, somebody may rely on it, so
// the remedy is another one.
func refuseNamesake(links rtnl.Links, l netlink.Link) error {
	name := l.Attrs().Name
	if l.Type() != "bridge" {
		return fmt.Errorf("%s exists already as a link of type %s: give the network's bridge another name", name, l.Type())
	}
	refuse := func(remedy string) error {
		return fmt.Errorf("%w: %s is a bridge that is not ours. Nothing was changed. %s, or give the network's bridge another name", ErrNameTaken, name, remedy)
	}
	addrs, err := dump.Whole(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_V4) })
	hasPort := slices.ContainsFunc(links, func(p netlink.Link) bool { return p.Attrs().MasterIndex == l.Attrs().Index })
	if err != nil || len(addrs) > 0 || hasPort {
		return refuse("It has ports or addresses: drain this VM and reboot it without whatever makes " + name)
	}
	return refuse("It has no port and no address, such as one that an older azure-vnet left behind: ip link del " + name)
}

// ErrNotPermitted is in the error for a process that may not change the host's network.
var ErrNotPermitted = errors.New("the host's network may not be changed")

// CheckPermitted returns ErrNotPermitted if this process may not change the host's network, so that Ensure and
// Attach would fail.
func (h *Host) CheckPermitted() error {
	if rtnl.HasNetAdmin() {
		return nil
	}
	return fmt.Errorf("%w: azure-vnet runs without CAP_NET_ADMIN over the host's network, as in a rootless container engine, whose user namespace has no right to that network: run the container runtime as root of the host", ErrNotPermitted)
}

// CheckPresent returns an error if no NIC in the calling thread's network namespace has that MAC.
func (h *Host) CheckPresent(ctx context.Context, mac string) error {
	links, err := rtnl.ReadLinks()
	if err != nil {
		return err
	}
	s, err := h.readState()
	if err != nil {
		return err
	}
	if _, err = findNIC(links, mac, s.NICs[mac].Name); errors.Is(err, errNoNIC) {
		err = fmt.Errorf("%w the MAC %s, which has the addresses: azure-vnet must run in the host's own network namespace, where the NIC is, and not in one of a container or of a rootless engine", errNoNIC, mac)
	}
	return err
}

// BridgeName returns the name of the bridge that the NIC has, or that Ensure would give it. The error is
// ErrNameTaken if a bridge that is not ours has that name. BridgeName changes nothing.
func (h *Host) BridgeName(ctx context.Context, spec Spec) (string, error) {
	links, err := rtnl.ReadLinks()
	if err != nil {
		return "", err
	}
	s, err := h.readState()
	if err != nil {
		return "", err
	}
	nic, err := findNIC(links, spec.MAC, s.NICs[spec.MAC].Name)
	if err != nil {
		return "", err
	}
	return chooseBridge(links, spec, nic, s)
}

// CheckReady returns nil if containers could be attached to the NICs with these MACs. Without MACs, it checks
// every NIC in host.json. The error is ErrTaken if one of the NICs is a port of a bridge, or if a build of ours
// that moved the NIC left its bridge. If none of the NICs is found, it is also ErrTaken if a bridge named azure…
// that is not ours has a port.
func (h *Host) CheckReady(ctx context.Context, macs ...string) error {
	links, err := rtnl.ReadLinks()
	if err != nil {
		return err
	}
	s, err := h.readState()
	if err != nil {
		return err
	}
	if len(macs) == 0 {
		for mac := range s.NICs {
			macs = append(macs, mac)
		}
		slices.Sort(macs)
	}
	known := false
	for _, mac := range macs {
		if nic, err := findNIC(links, mac, s.NICs[mac].Name); err == nil {
			if err := refuseHost(links, nic); err != nil {
				return err
			}
			known = true
		}
	}
	if known { // a bridge named azure… with other ports is somebody's own, and no obstacle
		return refuseFormer(links)
	}
	return refuseBridges(links, func(name, alias string) bool {
		return strings.HasPrefix(alias, formerAlias) || strings.HasPrefix(name, "azure")
	})
}

// refuseHost returns an error for a host that must not be changed: the NIC is a port of a bridge, or an earlier
// build of ours moved any NIC into a bridge.
func refuseHost(links rtnl.Links, nic netlink.Link) error {
	if err := refuseTaken(links, nic); err != nil {
		return err
	}
	return refuseFormer(links)
}

// refuseFormer returns an error if an earlier build of ours has moved any NIC into a bridge. It goes by the bridge, so
// the NIC need not be known.
func refuseFormer(links rtnl.Links) error {
	return refuseBridges(links, func(_, alias string) bool { return strings.HasPrefix(alias, formerAlias) })
}

// refuseBridges looks at the bridges that choose selects by name and alias, other than ours. It returns an error if
// such a bridge has a port that is not a container's: the port may be the NIC.
func refuseBridges(links rtnl.Links, choose func(name, alias string) bool) error {
	for _, l := range links {
		_, ours := bridgeAliasOf(l)
		if l.Type() != "bridge" || ours || !choose(l.Attrs().Name, l.Attrs().Alias) {
			continue
		}
		for _, p := range links {
			if p.Attrs().MasterIndex == l.Attrs().Index && !strings.HasPrefix(p.Attrs().Name, hostPrefix) {
				return refuseTaken(links, p)
			}
		}
	}
	return nil
}

// NIC returns the name and the MAC of a NIC that somebody names: by its name, by its MAC, or by the name of its
// bridge. The empty string is the NIC that the default route leaves by.
func (h *Host) NIC(ctx context.Context, nameOrMAC string) (name, mac string, err error) {
	links, err := rtnl.ReadLinks()
	if err != nil {
		return "", "", err
	}
	l := links.ByName(nameOrMAC)
	if nameOrMAC == "" {
		index, err := defaultRouteLink()
		if err != nil {
			return "", "", fmt.Errorf("read the default route: %w", err)
		}
		if l = links.ByIndex(index); l == nil {
			return "", "", errors.New("the host has no default route to tell its NIC by: name the NIC, as master")
		}
	}
	if l == nil {
		if _, bad := parseMAC(nameOrMAC); bad != nil {
			return "", "", fmt.Errorf("no network interface of this host is named %q: ip -br link shows their names", nameOrMAC)
		}
		if l, err = findNIC(links, nameOrMAC, ""); err != nil {
			return "", "", err
		}
	} else if nic, ours := bridgeAliasOf(l); ours {
		if l, err = findNIC(links, nic, ""); err != nil {
			return "", "", err
		}
	} else if err := refuseBridges(links, func(name, _ string) bool { return name == nameOrMAC }); err != nil {
		return "", "", err
	}
	a := l.Attrs()
	if m := links.ByIndex(a.MasterIndex); m != nil && !hasPorts(m) {
		return m.Attrs().Name, m.Attrs().HardwareAddr.String(), nil
	}
	if len(a.HardwareAddr) != 6 || slices.Contains(notNICs, l.Type()) || a.Flags&net.FlagLoopback != 0 {
		return "", "", fmt.Errorf("%s is no NIC but a link of type %s: name the NIC under it", a.Name, l.Type())
	}
	return a.Name, a.HardwareAddr.String(), nil
}

// bridgeAliasOf reads the NIC's MAC from the alias of a bridge. ours is false for a link that is no bridge of
// ours.
func bridgeAliasOf(l netlink.Link) (nic string, ours bool) {
	nic, ours = strings.CutPrefix(l.Attrs().Alias, bridgeAlias)
	return nic, ours && l.Type() == "bridge"
}

// Bridges lists our bridges, as the kernel has them.
func (h *Host) Bridges(ctx context.Context) ([]Bridge, error) {
	links, err := rtnl.ReadLinks()
	return ourBridges(links), err
}

func ourBridges(links rtnl.Links) []Bridge {
	var out []Bridge
	for _, l := range links {
		mac, ours := bridgeAliasOf(l)
		if !ours {
			continue
		}
		b := Bridge{Name: l.Attrs().Name, MAC: l.Attrs().HardwareAddr, MTU: l.Attrs().MTU, NICMAC: mac}
		if nic, err := findNIC(links, mac, ""); err == nil {
			b.NIC = nic.Attrs().Name
		}
		out = append(out, b)
	}
	return out
}

// parseMAC reads an Ethernet address as people and Azure write it: with colons, with hyphens, or with nothing
// between the digits.
func parseMAC(s string) (net.HardwareAddr, error) {
	if len(s) == 12 {
		s = s[0:2] + ":" + s[2:4] + ":" + s[4:6] + ":" + s[6:8] + ":" + s[8:10] + ":" + s[10:12]
	}
	mac, err := net.ParseMAC(s)
	if err == nil && len(mac) != 6 {
		err = fmt.Errorf("%q is no Ethernet address such as 00:0d:3a:04:75:98", s)
	}
	return mac, err
}
