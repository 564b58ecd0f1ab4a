// Copyright (c) The azure-vnet authors. MIT licence.

package listen

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/rtnl"
)

// This file has the layout of sock_diag's messages, of linux/inet_diag.h, which no library here names.
// Ports and addresses are in network byte order, all other numbers in the machine's.

// The request, struct inet_diag_req_v2. Offsets in bytes.
const (
	requestSize         = 56
	requestFamilyOffset = 0 // 1 byte: AF_INET or AF_INET6
	requestProtoOffset  = 1 // 1 byte: IPPROTO_TCP or IPPROTO_UDP
	requestStatesOffset = 4 // 4 bytes: one bit for each state of a socket that is asked for
)

// The answer, struct inet_diag_msg. Attributes follow.
const (
	answerSize         = 72
	answerFamilyOffset = 0  // 1 byte
	answerPortOffset   = 4  // 2 bytes
	answerAddrOffset   = 8  // 16 bytes, of which IPv4 uses 4
	answerUIDOffset    = 64 // 4 bytes
)

const skV6Only = 11 // INET_DIAG_SKV6ONLY, an attribute: 1 for a socket of IPv6 that receives no IPv4

// Bits of a request's states.
const (
	tcpListen      = 1 << 10 // TCP_LISTEN
	udpUnconnected = 1 << 7  // TCP_CLOSE, which a socket of UDP is in unless it is connected to one peer
)

// encodeRequest asks for the sockets of a family and a protocol that are in one of the states.
func encodeRequest(family, proto byte, states uint32) []byte {
	b := make([]byte, requestSize)
	b[requestFamilyOffset], b[requestProtoOffset] = family, proto
	binary.NativeEndian.PutUint32(b[requestStatesOffset:], states)
	return b
}

// parseSocket decodes an answer. It is not ok for a socket that receives no IPv4. A socket of IPv6 may
// receive IPv4: where its address is unspecified or an IPv4 address in IPv6's form.
func parseSocket(proto string, m []byte) (s Socket, ok bool) {
	if len(m) < answerSize {
		return Socket{}, false
	}
	s = Socket{Proto: proto, UID: binary.NativeEndian.Uint32(m[answerUIDOffset:])}
	port := binary.BigEndian.Uint16(m[answerPortOffset:])
	if m[answerFamilyOffset] == unix.AF_INET {
		s.Addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte(m[answerAddrOffset:])), port)
		return s, port != 0
	}
	addr := netip.AddrFrom16([16]byte(m[answerAddrOffset:])).Unmap()
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
