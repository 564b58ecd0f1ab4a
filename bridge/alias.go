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

// The host end of an endpoint is hostPrefix and eleven hex digits of its owner's
// hash. The container end, while it lies here, is peerPrefix and the same digits.
const (
	hostPrefix = "azv"
	peerPrefix = "azc"
)

// linkNames are the names of both ends of owner's veth. 44 bits keep the few hundred
// owners of a host apart.
func linkNames(owner string) (host, peer string) {
	sum := sha256.Sum256([]byte(owner))
	digits := hex.EncodeToString(sum[:])[:11]
	return hostPrefix + digits, peerPrefix + digits
}

const (
	aliasVersion = "azv2"
	bridgeAlias  = aliasVersion + " bridge " // the NIC's MAC follows
	formerAlias  = "azv1 "                   // of builds that moved the NIC into its bridge
	aliasMax     = 255                       // bytes: IFALIASZ less the terminating NUL
)

// alias is what the host end of an endpoint says about it. It is written when all
// else of an attach is done. A detach clears it when all but the link is gone. A
// link of ours without an alias is half made, or half removed.
type alias struct {
	addr   netip.Prefix
	mac    net.HardwareAddr
	nic    string // MAC, lower case with colons
	bridge string // empty: transparent
	policy string // its id
	owner  string // itself, or hashed
	lease  string // itself, or hashed
	ports  int    // how many are published; host.json says which
	pod    string // empty: none
}

// hashed stands for an owner that does not fit an alias.
func hashed(owner string) string {
	sum := sha256.Sum256([]byte(owner))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// isOf reports whether the alias is of that owner.
func (a alias) isOf(owner string) bool { return a.owner == owner || a.owner == hashed(owner) }

// String is the alias as the link carries it, at most 255 bytes. What can be derived
// is left out. The pod gives way first, for it is there for people only. The owner gives
// way before the lease, for it also names the link.
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

// parseAlias reads what String wrote. Keys that it does not know are a newer
// release's and are passed over. Any other text is not ok.
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

// label says in brackets, behind the name of a link or of an owner, which endpoint that is:
// "10.240.0.7", or "10.240.0.7, pod default/web".
func (a alias) label() string {
	if a.pod == "" {
		return a.addr.Addr().String()
	}
	return a.addr.Addr().String() + ", pod " + a.pod
}

// ownerText names the owner in a sentence, with the pod if it is known.
func (a alias) ownerText() string {
	if a.pod == "" {
		return a.owner
	}
	return a.owner + " (pod " + a.pod + ")"
}

// group is the link group of an endpoint's host end.
func (a alias) group() uint32 {
	if a.bridge == "" {
		return ruleset.GroupTransparent
	}
	return ruleset.GroupBridge
}

// endpointAliasOf reads the alias of a link that is the host end of an endpoint.
func endpointAliasOf(l netlink.Link) (alias, bool) {
	a, ok := parseAlias(l.Attrs().Alias)
	return a, ok && strings.HasPrefix(l.Attrs().Name, hostPrefix)
}

// halfMade reports whether l is a link of ours without an alias. It is the host end
// of an endpoint whose attach died before its last step, or whose detach died after
// the alias was cleared, or a bridge whose maker died. The group is a mark that a
// link has from its first moment. It tells our links from those of another plugin,
// which may have the same names.
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

// MACFor is the MAC of a container's interface that has addr, unless another is asked
// for: 02:42 and the address. So a reused address keeps its MAC, and what others have
// learnt of it stays right.
func MACFor(addr netip.Addr) net.HardwareAddr {
	b := addr.Unmap().As4()
	return net.HardwareAddr{0x02, 0x42, b[0], b[1], b[2], b[3]}
}

// hostMAC is the MAC of the host end of addr's veth. It is given because udev
// rewrites a MAC that the kernel chose, and because a transparent container holds it
// as its gateway's.
func hostMAC(addr netip.Addr) net.HardwareAddr {
	mac := MACFor(addr)
	mac[0] = 0xfe
	return mac
}

// bridgeMAC is the MAC of the bridge of a NIC. It is derived, so that containers that
// hold it as their gateway's are right when the bridge was made again. The first byte
// makes it no NIC's.
func bridgeMAC(nic net.HardwareAddr) net.HardwareAddr {
	mac := append(net.HardwareAddr(nil), nic...)
	mac[0] = mac[0]&0xfc | 0x02 ^ 0x04
	return mac
}
