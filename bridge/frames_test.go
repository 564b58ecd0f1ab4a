// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// This file spells frames and packets.

// Protocols of IP that golang.org/x/sys/unix does not name.
const (
	protoEIGRP = 88
	protoOSPF  = 89
	protoVRRP  = 112
)

// Flags of TCP.
const fin, syn, rst, push, ack byte = 1, 2, 4, 8, 16

var (
	toAll   = net.HardwareAddr{255, 255, 255, 255, 255, 255}
	zeroMAC = make(net.HardwareAddr, 6)
)

// ether is an Ethernet frame. It has at least the length of its header.
func ether(dst, src net.HardwareAddr, kind uint16, payload ...byte) []byte {
	return append(binary.BigEndian.AppendUint16(append(bytes.Clone(dst), src...), kind), payload...)
}

// tagged is the frame with a VLAN tag, behind which stands what the frame is.
func tagged(tpid, id uint16, frame []byte) []byte {
	tag := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, tpid), id)
	return append(append(bytes.Clone(frame[:12]), tag...), frame[12:]...)
}

// ether3 is a frame of IEEE 802.3: the type's place has the length.
func ether3(dst, src net.HardwareAddr, payload ...byte) []byte {
	return ether(dst, src, uint16(len(payload)), payload...)
}

// snap is the header of IEEE 802.2 that gives a frame of 802.3 the type of Ethernet.
func snap(kind uint16, payload []byte) []byte {
	return append([]byte{0xaa, 0xaa, 3, 0, 0, 0, byte(kind >> 8), byte(kind)}, payload...)
}

func arp(op uint16, sha net.HardwareAddr, sip netip.Addr, tha net.HardwareAddr, tip netip.Addr) []byte {
	b := binary.BigEndian.AppendUint16([]byte{0, 1, 8, 0, 6, 4}, op)
	return append(append(append(append(b, sha...), sip.AsSlice()...), tha...), tip.AsSlice()...)
}

func ip4(src, dst netip.Addr, proto byte, payload []byte) []byte {
	return ip4Options(src, dst, proto, nil, payload)
}

// ip4Options is an IPv4 packet with options, whose length is a multiple of 4.
func ip4Options(src, dst netip.Addr, proto byte, options, payload []byte) []byte {
	b := append(make([]byte, 20), options...)
	b[0], b[8], b[9] = 0x40|byte(len(b)/4), 64, proto
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)+len(payload)))
	copy(b[12:], src.AsSlice())
	copy(b[16:], dst.AsSlice())
	return append(withHeaderSum(b), payload...)
}

// withHeaderSum is an IPv4 header whose checksum is right.
func withHeaderSum(header []byte) []byte {
	binary.BigEndian.PutUint16(header[10:], 0)
	binary.BigEndian.PutUint16(header[10:], ^sum(header))
	return header
}

// fragment is a part of an IPv4 packet without options: the payload from offset, which is a multiple of 8, up to end.
// The last fragment ends where the payload does.
func fragment(packet []byte, id uint16, offset, end int) []byte {
	header, payload := bytes.Clone(packet[:20]), packet[20:]
	at := uint16(offset / 8)
	if end < len(payload) {
		at |= 0x2000 // more fragments follow
	}
	binary.BigEndian.PutUint16(header[2:], uint16(20+end-offset))
	binary.BigEndian.PutUint16(header[4:], id)
	binary.BigEndian.PutUint16(header[6:], at)
	return append(withHeaderSum(header), payload[offset:end]...)
}

func sum(b []byte) uint16 {
	var s uint32
	for ; len(b) > 1; b = b[2:] {
		s += uint32(binary.BigEndian.Uint16(b))
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

func udp4(from, to uint16, payload ...byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(payload)))
	return append(append(b, 0, 0), payload...)
}

// segment is one of TCP, with where it stands in its connection.
type segment struct {
	from, to netip.AddrPort
	seq, ack uint32
}

// packet is the segment in an IPv4 packet.
func (s segment) packet(flags byte, options []byte, payload ...byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, s.from.Port())
	b = binary.BigEndian.AppendUint16(b, s.to.Port())
	b = binary.BigEndian.AppendUint32(b, s.seq)
	b = binary.BigEndian.AppendUint32(b, s.ack)
	b = append(b, 5<<4, flags, 0xff, 0xff, 0, 0, 0, 0)
	b = append(b, payload...)
	pseudo := append(append(s.from.Addr().AsSlice(), s.to.Addr().AsSlice()...), 0, unix.IPPROTO_TCP, byte(len(b)>>8), byte(len(b)))
	binary.BigEndian.PutUint16(b[16:], ^sum(append(append(pseudo, b...), 0)))
	return ip4Options(s.from.Addr(), s.to.Addr(), unix.IPPROTO_TCP, options, b)
}

func icmp4(kind, code byte, rest ...byte) []byte {
	b := append([]byte{kind, code, 0, 0}, rest...)
	binary.BigEndian.PutUint16(b[2:], ^sum(append(bytes.Clone(b), 0)))
	return b
}

// echoRequest is a ping.
func echoRequest(payload ...byte) []byte {
	return icmp4(8, 0, append([]byte{0x7e, 0x57, 0, 1}, payload...)...)
}

// tooBig says of a packet that it must be no larger than mtu.
func tooBig(mtu uint16, packet []byte) []byte {
	return icmp4(3, 4, append([]byte{0, 0, byte(mtu >> 8), byte(mtu)}, packet...)...)
}

// ip6 is an ICMPv6 packet to all nodes of the link.
func ip6(payload ...byte) []byte { return ip6To("ff02::1", unix.IPPROTO_ICMPV6, payload...) }

// ip6To is an IPv6 packet from a link-local address.
func ip6To(dst string, next byte, payload ...byte) []byte {
	b := make([]byte, 40)
	b[0], b[4], b[5], b[6], b[7] = 0x60, byte(len(payload)>>8), byte(len(payload)), next, 255
	src, to := netip.MustParseAddr("fe80::bad"), netip.MustParseAddr(dst)
	copy(b[8:], src.AsSlice())
	copy(b[24:], to.AsSlice())
	if next == unix.IPPROTO_ICMPV6 {
		pseudo := append(bytes.Clone(b[8:40]), 0, 0, b[4], b[5], 0, 0, 0, next)
		payload = bytes.Clone(payload)
		binary.BigEndian.PutUint16(payload[2:], 0)
		binary.BigEndian.PutUint16(payload[2:], ^sum(append(append(pseudo, payload...), 0)))
	}
	return append(b, payload...)
}

// Options of IPv4, each as long as a multiple of 4.

// sourceRoute is the loose source route (131) or the strict one (137) by these routers.
func sourceRoute(kind byte, via ...netip.Addr) []byte {
	b := []byte{1, kind, byte(3 + 4*len(via)), 4}
	for _, a := range via {
		b = append(b, a.AsSlice()...)
	}
	return b
}

var (
	recordRoute = []byte{7, 11, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	timestamps  = []byte{68, 12, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	routerAlert = []byte{148, 4, 0, 0}
	security    = []byte{130, 11, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	noOptions   = []byte{1, 1, 1, 1, 1, 1, 1, 0}
)
