// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"crypto/sha256"
	"encoding/hex"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// The host's end of an endpoint is hostPrefix and eleven hex digits of its
// owner's hash; the container's end, while it lies here, is peerPrefix and the same.
const (
	hostPrefix = "azv"
	peerPrefix = "azc"
)

// linkNames are the names of both ends of owner's veth. A name of 14 bytes fits
// IFNAMSIZ, and 44 bits keep the few hundred owners of a host apart.
func linkNames(owner string) (host, peer string) {
	sum := sha256.Sum256([]byte(owner))
	digits := hex.EncodeToString(sum[:])[:11]
	return hostPrefix + digits, peerPrefix + digits
}

const (
	aliasVersion = "azv1"
	aliasMax     = 255 // bytes: IFALIASZ less the terminating NUL
)

// alias is what the host's end of an endpoint says about it. It is written when
// all else of an attach is done: a link without one is half made.
type alias struct {
	addr   netip.Prefix
	mac    net.HardwareAddr
	bridge string
	policy string // its id
	owner  string // itself, or hashed
	lease  string // itself, or hashed
	ports  int    // how many are published; host.json says which
}

// internal tells an endpoint that nothing passes to or from the NIC.
func (a alias) internal() bool { return a.policy == internalID }

// hashed stands for an owner that does not fit an alias.
func hashed(owner string) string {
	sum := sha256.Sum256([]byte(owner))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// String is the alias as the link carries it, at most 255 bytes. The owner gives
// way before the lease, for it also names the link.
func (a alias) String() string {
	write := func(owner, lease string) string {
		s := aliasVersion + " addr=" + a.addr.String() + " mac=" + a.mac.String() +
			" br=" + a.bridge + " net=" + a.policy + " owner=" + owner
		if lease != owner {
			s += " lease=" + lease
		}
		if a.ports > 0 {
			s += " ports=" + strconv.Itoa(a.ports)
		}
		return s
	}
	s := write(a.owner, a.lease)
	if len(s) > aliasMax {
		s = write(hashed(a.owner), a.lease)
	}
	if len(s) > aliasMax {
		s = write(hashed(a.owner), hashed(a.lease))
	}
	return s
}

// parseAlias reads what String wrote. Keys that it does not know are a newer
// release's and are passed over; an alias of anybody else is not ok.
func parseAlias(s string) (a alias, ok bool) {
	version, rest, _ := strings.Cut(s, " ")
	if version != aliasVersion {
		return alias{}, false
	}
	var err error
	for field := range strings.SplitSeq(rest, " ") {
		key, value, _ := strings.Cut(field, "=")
		switch key {
		case "addr":
			a.addr, err = netip.ParsePrefix(value)
		case "mac":
			a.mac, err = net.ParseMAC(value)
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
		}
		if err != nil {
			return alias{}, false
		}
	}
	if a.lease == "" {
		a.lease = a.owner
	}
	ok = a.addr.Addr().Is4() && len(a.mac) == 6 && a.bridge != "" && a.policy != "" && a.owner != ""
	if !ok {
		return alias{}, false
	}
	return a, true
}

// MACFor is the MAC of a container's interface that has addr, unless another is
// asked for: 02:42 and the address, so that a reused address keeps its MAC and
// no neighbour that learnt it is wrong.
func MACFor(addr netip.Addr) net.HardwareAddr {
	b := addr.Unmap().As4()
	return net.HardwareAddr{0x02, 0x42, b[0], b[1], b[2], b[3]}
}

// hostMAC is the MAC of the host's end of addr's veth. Only its being given
// matters: udev rewrites a MAC that the kernel drew.
func hostMAC(addr netip.Addr) net.HardwareAddr {
	mac := MACFor(addr)
	mac[0] = 0xfe
	return mac
}
