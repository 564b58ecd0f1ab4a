// Copyright (c) The azure-vnet authors. MIT licence.

// Package listen tells which sockets of the host receive what comes to a port,
// by sock_diag(7). It binds nothing: a port bound only to find out would be taken
// from whoever tries meanwhile, and a TCP port in TIME_WAIT would seem taken.
package listen

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/rtnl"
	"azurevnet/internal/dump"
)

// Socket is a socket of the host that receives IPv4.
type Socket struct {
	Proto string         // tcp or udp
	Addr  netip.AddrPort // IPv4; the unspecified address for every address of the host
	UID   uint32         // of its owner
}

// String names the socket and tells how to find its program.
func (s Socket) String() string {
	return fmt.Sprintf("%s (uid %d; ss -%clnp names the program)", s.Addr, s.UID, s.Proto[0])
}

// Of linux/inet_diag.h, which no library here names.
const (
	requestSize = 56 // bytes of struct inet_diag_req_v2
	answerSize  = 72 // bytes of struct inet_diag_msg
	skV6Only    = 11 // INET_DIAG_SKV6ONLY
	tcpListen   = 1 << 10
	udpUnbound  = 1 << 7 // not connected: it receives from anywhere
)

// ReadSockets lists the sockets that receive IPv4. A kernel that cannot tell gives an
// empty list.
func ReadSockets() ([]Socket, error) {
	var all []Socket
	for _, q := range []struct {
		proto  string
		number byte
		states uint32
	}{{"tcp", unix.IPPROTO_TCP, tcpListen}, {"udp", unix.IPPROTO_UDP, udpUnbound}} {
		for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
			body := make([]byte, requestSize)
			body[0], body[1] = family, q.number
			binary.NativeEndian.PutUint32(body[4:], q.states)
			messages, err := dump.Whole(func() ([][]byte, error) {
				r := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
				r.AddRawData(body)
				return r.Execute(unix.NETLINK_INET_DIAG, nl.SOCK_DIAG_BY_FAMILY)
			})
			if errors.Is(err, unix.ENOENT) { // no sock_diag, or no IPv6
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("list the host's %s sockets: %w", q.proto, err)
			}
			for _, m := range messages {
				if s, ok := parseSocket(q.proto, m); ok {
					all = append(all, s)
				}
			}
		}
	}
	return all, nil
}

// parseSocket reads a struct inet_diag_msg. It is not ok for a socket that receives no
// IPv4.
func parseSocket(proto string, m []byte) (s Socket, ok bool) {
	if len(m) < answerSize {
		return Socket{}, false
	}
	s = Socket{Proto: proto, UID: binary.NativeEndian.Uint32(m[64:])}
	port := binary.BigEndian.Uint16(m[4:])
	if m[0] == unix.AF_INET {
		s.Addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte(m[8:12])), port)
		return s, port != 0
	}
	addr := netip.AddrFrom16([16]byte(m[8:24])).Unmap()
	for kind, value := range rtnl.Attributes(m, answerSize) {
		if kind == skV6Only && len(value) > 0 && value[0] != 0 {
			return Socket{}, false
		}
	}
	if addr.IsUnspecified() {
		addr = netip.IPv4Unspecified()
	}
	s.Addr = netip.AddrPortFrom(addr, port)
	return s, port != 0 && addr.Is4()
}
