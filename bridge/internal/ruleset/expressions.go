// Copyright (c) The azure-vnet authors. MIT licence.

package ruleset

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// This file spells nft's statements in the kernel's expressions.
//
// Registers are slots of 4 bytes, 8 to 23. 1 to 4 are older names of the slots 8, 12, 16
// and 20. The kernel tells those slots by the older names; so we use them too, or a rule
// that is read back would differ. A key of several parts lies in consecutive slots, each
// part rounded up: a link's name takes four, a MAC two, an address, a protocol and a port
// one each. A name, two MACs and an address are 1, 2, 14 and 3. A condition compares
// slot 1, which the next one overwrites.

func rule(parts ...[]expr.Any) []expr.Any { return slices.Concat(parts...) }

func oneExpression(e expr.Any) []expr.Any { return []expr.Any{e} }

func loadMeta(k expr.MetaKey, reg uint32) []expr.Any {
	return oneExpression(&expr.Meta{Key: k, Register: reg})
}

func iifname(reg uint32) []expr.Any { return loadMeta(expr.MetaKeyIIFNAME, reg) }
func oifname(reg uint32) []expr.Any { return loadMeta(expr.MetaKeyOIFNAME, reg) }
func l4proto(reg uint32) []expr.Any { return loadMeta(expr.MetaKeyL4PROTO, reg) }

func iifgroup(group uint32) []expr.Any {
	return rule(loadMeta(expr.MetaKeyIIFGROUP, 1), equal(be32host(group)))
}
func oifgroup(group uint32) []expr.Any {
	return rule(loadMeta(expr.MetaKeyOIFGROUP, 1), equal(be32host(group)))
}

func fromOurs() []expr.Any    { return rule(loadMeta(expr.MetaKeyIIFGROUP, 1), inSet("links")) }
func toOurs() []expr.Any      { return rule(loadMeta(expr.MetaKeyOIFGROUP, 1), inSet("links")) }
func notFromOurs() []expr.Any { return rule(loadMeta(expr.MetaKeyIIFGROUP, 1), notInSet("links")) }
func notToOurs() []expr.Any   { return rule(loadMeta(expr.MetaKeyOIFGROUP, 1), notInSet("links")) }

// ethernet is what nft writes before it looks at a MAC outside the bridge family.
func ethernet() []expr.Any {
	return rule(loadMeta(expr.MetaKeyIIFTYPE, 1), equal(binaryutil.NativeEndian.PutUint16(unix.ARPHRD_ETHER)))
}

func compare(op expr.CmpOp, data []byte) []expr.Any {
	return oneExpression(&expr.Cmp{Op: op, Register: 1, Data: data})
}
func equal(data []byte) []expr.Any { return compare(expr.CmpOpEq, data) }

func mask(bytes ...byte) []expr.Any {
	return oneExpression(&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(len(bytes)), Mask: bytes, Xor: make([]byte, len(bytes))})
}

const (
	llHeader = expr.PayloadBaseLLHeader
	nhHeader = expr.PayloadBaseNetworkHeader
	thHeader = expr.PayloadBaseTransportHeader
)

func loadPayload(base expr.PayloadBase, offset, length, reg uint32) []expr.Any {
	return oneExpression(&expr.Payload{DestRegister: reg, Base: base, Offset: offset, Len: length})
}

func etherType(t uint16) []expr.Any       { return rule(loadPayload(llHeader, 12, 2, 1), equal(be16(t))) }
func etherDaddr(reg uint32) []expr.Any    { return loadPayload(llHeader, 0, 6, reg) }
func etherSaddr(reg uint32) []expr.Any    { return loadPayload(llHeader, 6, 6, reg) }
func ipSaddr(reg uint32) []expr.Any       { return loadPayload(nhHeader, 12, 4, reg) }
func ipDaddr(reg uint32) []expr.Any       { return loadPayload(nhHeader, 16, 4, reg) }
func arpSaddrEther(reg uint32) []expr.Any { return loadPayload(nhHeader, 8, 6, reg) }
func arpSaddrIP(reg uint32) []expr.Any    { return loadPayload(nhHeader, 14, 4, reg) }
func destPort(reg uint32) []expr.Any      { return loadPayload(thHeader, 2, 2, reg) }

func icmpType(t byte) []expr.Any {
	return rule(l4proto(1), equal([]byte{unix.IPPROTO_ICMP}), loadPayload(thHeader, 0, 1, 1), equal([]byte{t}))
}

// fibDaddrType is the kind of route that the destination has here, such as rtnLocal.
func fibDaddrType() []expr.Any {
	return oneExpression(&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true})
}

func inSet(name string) []expr.Any {
	return oneExpression(&expr.Lookup{SourceRegister: 1, SetName: name})
}
func notInSet(name string) []expr.Any {
	return oneExpression(&expr.Lookup{SourceRegister: 1, SetName: name, Invert: true})
}
func valueFrom(name string) []expr.Any {
	return oneExpression(&expr.Lookup{SourceRegister: 1, DestRegister: 1, IsDestRegSet: true, SetName: name})
}
func verdictFrom(name string) []expr.Any {
	return oneExpression(&expr.Lookup{SourceRegister: 1, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: name})
}

func masquerade() []expr.Any { return oneExpression(&expr.Masq{}) }

// dnat leads to the address and port that a look-up put into registers 8 and 9.
func dnat() []expr.Any {
	return oneExpression(&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegAddrMax: 1, RegProtoMin: 9, RegProtoMax: 9, Specified: true})
}

func be16(n uint16) []byte     { return binary.BigEndian.AppendUint16(nil, n) }
func be32host(n uint32) []byte { return binaryutil.NativeEndian.PutUint32(n) }

// What follows spells the parts of set keys.

func nameKey(name string) string {
	var b [unix.IFNAMSIZ]byte
	copy(b[:], name)
	return string(b[:])
}

func macKey(mac net.HardwareAddr) string { return string(mac) + "\x00\x00" }

func ipKey(a netip.Addr) string { b := a.As4(); return string(b[:]) }

func protoKey(udp bool) string {
	if udp {
		return string([]byte{unix.IPPROTO_UDP, 0, 0, 0})
	}
	return string([]byte{unix.IPPROTO_TCP, 0, 0, 0})
}

func portKey(port uint16) string { return string(append(be16(port), 0, 0)) }

// Kinds of base chains.
const (
	filterType = nftables.ChainTypeFilter
	natType    = nftables.ChainTypeNAT
)
