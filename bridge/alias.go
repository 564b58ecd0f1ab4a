// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"crypto/sha256"
	"encoding/hex"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"

	"azurevnet/bridge/internal/ruleset"
)

// The names of both ends of an endpoint's veth are a prefix and the same eleven hex digits of the owner's hash.
// The container end has such a name only while it is in the host's namespace.
const (
	hostPrefix = "azv"
	peerPrefix = "azc"
)

// linkNames returns the names of the host end and of the container end of owner's veth. 44 bits of a hash keep
// the few hundred owners of a host apart.
func linkNames(owner string) (host, peer string) {
	sum := sha256.Sum256([]byte(owner))
	digits := hex.EncodeToString(sum[:])[:11]
	return hostPrefix + digits, peerPrefix + digits
}

const (
	aliasVersion = "azv2"
	bridgeAlias  = aliasVersion + " bridge " // the NIC's MAC follows
	formerAlias  = "azv1 "                   // of earlier builds, which moved the NIC into its bridge
	aliasMax     = 255                       // bytes: IFALIASZ less the terminating NUL
)

// alias is the text on a host end that says which endpoint it is for. An attach writes it when everything else
// is done, but for the routing rules of a second NIC: see makeParts. A detach clears it when everything but the
// link is gone. So a link of ours without an alias is half made or half removed, and belongs to nobody.
type alias struct {
	addr   netip.Prefix
	mac    net.HardwareAddr
	nic    string // the NIC's MAC, lower case with colons
	bridge string // name of the bridge; empty: transparent
	policy string // the policy's id. Its key in the text is net=, because links of running containers have that
	owner  string // the owner, or hashed(owner)
	lease  string // the owner of the lease, or its hash
	ports  int    // how many ports are published or claimed; host.json says which
	pod    string // namespace/name; empty: none
}

// hashed returns what an alias has in place of an owner that does not fit into it.
func hashed(owner string) string {
	sum := sha256.Sum256([]byte(owner))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// isOf reports whether the alias is for that owner. The alias may have the owner's hash.
func (a alias) isOf(owner string) bool { return a.owner == owner || a.owner == hashed(owner) }

// String returns the text that the link has, of at most 255 bytes. It leaves out what can be derived. If the
// text is too long, the pod is left out first, because only people read it. Then the owner becomes a hash,
// because the link's name derives from it too. Then the lease's owner becomes a hash.
func (a alias) String() string {
	write := func(owner, lease string) string {
		s := aliasVersion + " addr=" + a.addr.String()
		if a.mac.String() != MACFor(a.addr.Addr()).String() {
			s += " mac=" + a.mac.String()
		}
		s += " nic=" + a.nic
		if a.bridge != "" {
			s += " br=" + a.bridge
		}
		s += " net=" + a.policy + " owner=" + owner
		if lease != owner {
			s += " lease=" + lease
		}
		if a.ports > 0 {
			s += " ports=" + strconv.Itoa(a.ports)
		}
		return s
	}
	s := write(a.owner, a.lease)
	if with := s + " pod=" + a.pod; a.pod != "" && len(with) <= aliasMax {
		return with
	}
	if len(s) > aliasMax {
		s = write(hashed(a.owner), a.lease)
	}
	if len(s) > aliasMax {
		s = write(hashed(a.owner), hashed(a.lease))
	}
	return s
}

// parseAlias reads what String wrote. It ignores keys that it does not know, which a newer release may have
// added. ok is false for any other text.
func parseAlias(s string) (a alias, ok bool) {
	version, rest, _ := strings.Cut(s, " ")
	if version != aliasVersion {
		return alias{}, false
	}
	for field := range strings.SplitSeq(rest, " ") {
		var err error
		key, value, _ := strings.Cut(field, "=")
		switch key {
		case "addr":
			a.addr, err = netip.ParsePrefix(value)
		case "mac":
			a.mac, err = net.ParseMAC(value)
		case "nic":
			a.nic = value
		case "br":
			a.bridge = value
		case "net":
			a.policy = value
		case "owner":
			a.owner = value
		case "lease":
			a.lease = value
		case "ports":
			a.ports, err = strconv.Atoi(value)
		case "pod":
			a.pod = value
		}
		if err != nil {
			return alias{}, false
		}
	}
	if !a.addr.Addr().Is4() || a.nic == "" || a.policy == "" || a.owner == "" {
		return alias{}, false
	}
	if a.mac == nil {
		a.mac = MACFor(a.addr.Addr())
	}
	if a.lease == "" {
		a.lease = a.owner
	}
	return a, len(a.mac) == 6
}

// label says which endpoint this is, for brackets behind the name of a link or an owner: "10.240.0.7", or
// "10.240.0.7, pod default/web".
func (a alias) label() string {
	if a.pod == "" {
		return a.addr.Addr().String()
	}
	return a.addr.Addr().String() + ", pod " + a.pod
}

// ownerText names the owner in a sentence, with its pod if the pod is known.
func (a alias) ownerText() string {
	if a.pod == "" {
		return a.owner
	}
	return a.owner + " (pod " + a.pod + ")"
}

// group returns the link group that the host end must have.
func (a alias) group() uint32 {
	if a.bridge == "" {
		return ruleset.GroupTransparent
	}
	return ruleset.GroupBridge
}

// endpointAliasOf reads the alias of a link. ok is false for a link that is not the host end of an endpoint.
func endpointAliasOf(l netlink.Link) (alias, bool) {
	a, ok := parseAlias(l.Attrs().Alias)
	return a, ok && strings.HasPrefix(l.Attrs().Name, hostPrefix)
}

// halfMade reports whether l is a link of ours without an alias. Such a link was left by a call that died: an
// attach before its last step, a detach after it cleared the alias, or the making of a bridge. The link has its
// group from its first moment. The group tells it from links of another plugin, whose names may be the same.
func halfMade(l netlink.Link) bool {
	a := l.Attrs()
	if a.Alias != "" {
		return false
	}
	if l.Type() == "bridge" {
		return a.Group == ruleset.GroupBridge
	}
	ours := a.Group == ruleset.GroupBridge || a.Group == ruleset.GroupTransparent
	return ours && l.Type() == "veth" && strings.HasPrefix(a.Name, hostPrefix)
}

// MACFor returns the MAC of a container's interface with that address, unless Endpoint.MAC asks for another:
// 02:42 and the four bytes of the address. So an address that is used again has the same MAC, and neighbour
// entries of others stay right.
func MACFor(addr netip.Addr) net.HardwareAddr {
	b := addr.Unmap().As4()
	return net.HardwareAddr{0x02, 0x42, b[0], b[1], b[2], b[3]}
}

// hostMAC returns the MAC of the host end of addr's veth. It is derived, because udev changes a MAC that the
// kernel chose, and because a transparent container has it as its gateway's MAC.
func hostMAC(addr netip.Addr) net.HardwareAddr {
	mac := MACFor(addr)
	mac[0] = 0xfe
	return mac
}

// bridgeMAC returns the MAC of a NIC's bridge. Containers have it as their gateway's MAC. It is derived, so
// that it stays the same when the bridge is made again. The first byte is one that no NIC's MAC has: locally
// administered, and different from a NIC's own locally administered MAC.
func bridgeMAC(nic net.HardwareAddr) net.HardwareAddr {
	mac := append(net.HardwareAddr(nil), nic...)
	mac[0] = mac[0]&0xfc | 0x02 ^ 0x04
	return mac
}
