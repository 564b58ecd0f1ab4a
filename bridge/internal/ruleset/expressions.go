// Copyright (c) The azure-vnet authors. MIT licence.

package ruleset

import (
	"encoding/binary"
	"slices"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// This file spells nft's statements as the kernel's expressions. It is the only file that knows registers and the
// offsets of header fields.
//
// The kernel has 16 slots of 4 bytes for data, which it numbers from 8 to 23. The numbers 1 to 4 are older names of the
// slots 8, 12, 16 and 20. When a rule is read back, the kernel names these four slots by the older numbers. So the rules
// here do it too, else a rule that is read back would differ from the one that is wanted.
//
// The key of a set consists of fields in consecutive slots. Each field is rounded up to whole slots: a link's name takes
// four slots, a MAC two, an address, a protocol and a port one each.
const (
	firstSlot, slotSize = 8, 4

	// key and mask, the conditions and the values of look-ups all use the first slot. A later expression of the same rule
	// overwrites it.
	firstRegister = 1
	// A look-up in a map of type "address . port" writes the address into the first slot and the port into the second.
	secondRegister = 9
)

// registerOf returns the kernel's number of a slot, for firstSlot and the slots behind it.
func registerOf(slot int) uint32 {
	if n := slot - firstSlot; n%4 == 0 {
		return uint32(firstRegister + n/4)
	}
	return uint32(slot)
}

// field is a part of a packet, or of what the kernel knows of it, that a rule can load into a register.
type field struct {
	size int // bytes
	load func(register uint32) expr.Any
}

func metaField(k expr.MetaKey, size int) field {
	return field{size, func(register uint32) expr.Any { return &expr.Meta{Key: k, Register: register} }}
}

func headerField(base expr.PayloadBase, offset, size int) field {
	return field{size, func(register uint32) expr.Any {
		return &expr.Payload{DestRegister: register, Base: base, Offset: uint32(offset), Len: uint32(size)}
	}}
}

const (
	linkHeader      = expr.PayloadBaseLLHeader
	networkHeader   = expr.PayloadBaseNetworkHeader
	transportHeader = expr.PayloadBaseTransportHeader
)

// The fields, named as nft names them.
var (
	iifname     = metaField(expr.MetaKeyIIFNAME, unix.IFNAMSIZ)
	oifname     = metaField(expr.MetaKeyOIFNAME, unix.IFNAMSIZ)
	iifgroup    = metaField(expr.MetaKeyIIFGROUP, 4)
	oifgroup    = metaField(expr.MetaKeyOIFGROUP, 4)
	iiftype     = metaField(expr.MetaKeyIIFTYPE, 2)
	metaL4proto = metaField(expr.MetaKeyL4PROTO, 1)

	etherDaddr    = headerField(linkHeader, 0, 6)
	etherSaddr    = headerField(linkHeader, 6, 6)
	etherType     = headerField(linkHeader, 12, 2)
	ipSaddr       = headerField(networkHeader, 12, 4)
	ipDaddr       = headerField(networkHeader, 16, 4)
	arpSaddrEther = headerField(networkHeader, 8, 6)
	arpSaddrIP    = headerField(networkHeader, 14, 4)
	icmpType      = headerField(transportHeader, 0, 1)
	thDport       = headerField(transportHeader, 2, 2) // of TCP and of UDP
)

// rule joins the expressions of statements to those of one rule.
func rule(parts ...[]expr.Any) []expr.Any { return slices.Concat(parts...) }

func oneExpression(e expr.Any) []expr.Any { return []expr.Any{e} }

// key loads fields into consecutive slots, where a look-up takes them from. nft writes it "a . b . c".
func key(fields ...field) (all []expr.Any) {
	slot := firstSlot
	for _, f := range fields {
		all = append(all, f.load(registerOf(slot)))
		slot += (f.size + slotSize - 1) / slotSize
	}
	return all
}

// fieldEquals loads a field and compares it. A rule ends at a comparison that fails.
func fieldEquals(f field, value []byte) []expr.Any { return rule(key(f), equals(value)) }

// equals compares the first register.
func equals(value []byte) []expr.Any {
	return oneExpression(&expr.Cmp{Op: expr.CmpOpEq, Register: firstRegister, Data: value})
}

// masked loads an address, and compares the part of it that the mask selects.
func masked(f field, mask, value [4]byte) []expr.Any {
	and := &expr.Bitwise{SourceRegister: firstRegister, DestRegister: firstRegister, Len: 4, Mask: mask[:], Xor: make([]byte, 4)}
	return rule(key(f), oneExpression(and), equals(value[:]))
}

// isLoopback compares an address with 127.0.0.0/8.
func isLoopback(f field) []expr.Any {
	return masked(f, [4]byte{255, 0, 0, 0}, [4]byte{127, 0, 0, 0})
}

func isProtocol(number byte) []expr.Any    { return fieldEquals(metaL4proto, []byte{number}) }
func isEtherType(number uint16) []expr.Any { return fieldEquals(etherType, bigEndian16(number)) }
func fromGroup(group uint32) []expr.Any    { return fieldEquals(iifgroup, hostEndian32(group)) }
func toGroup(group uint32) []expr.Any      { return fieldEquals(oifgroup, hostEndian32(group)) }
func isICMPRedirect() []expr.Any {
	return rule(isProtocol(unix.IPPROTO_ICMP), fieldEquals(icmpType, []byte{icmpRedirect}))
}

// The set links has both groups of our links.
func fromOurs() []expr.Any    { return rule(key(iifgroup), inSet("links")) }
func toOurs() []expr.Any      { return rule(key(oifgroup), inSet("links")) }
func notFromOurs() []expr.Any { return rule(key(iifgroup), notInSet("links")) }
func notToOurs() []expr.Any   { return rule(key(oifgroup), notInSet("links")) }

// isEthernet is what nft writes before it looks at a MAC outside of the bridge family.
func isEthernet() []expr.Any {
	return fieldEquals(iiftype, binaryutil.NativeEndian.PutUint16(unix.ARPHRD_ETHER))
}

// toThisHost asks the routing table whether the destination is an address of this host.
func toThisHost() []expr.Any {
	fib := oneExpression(&expr.Fib{Register: firstRegister, FlagDADDR: true, ResultADDRTYPE: true})
	return rule(fib, equals(hostEndian32(rtnLocal)))
}

// Numbers that no library here names.
const (
	rtnLocal     = 2 // RTN_LOCAL of linux/rtnetlink.h
	icmpRedirect = 5 // ICMP_REDIRECT of linux/icmp.h
)

// inSet and the three below look up the key in a set or a map of the same table. A rule ends where inSet, valueFrom or
// verdictFrom find nothing.
func inSet(name string) []expr.Any {
	return oneExpression(&expr.Lookup{SourceRegister: firstRegister, SetName: name})
}

func notInSet(name string) []expr.Any {
	return oneExpression(&expr.Lookup{SourceRegister: firstRegister, SetName: name, Invert: true})
}

// valueFrom writes the value into the first register and those behind it, for dnat.
func valueFrom(name string) []expr.Any {
	return oneExpression(&expr.Lookup{SourceRegister: firstRegister, DestRegister: firstRegister, IsDestRegSet: true, SetName: name})
}

// verdictFrom takes the verdict that the map has for the key.
func verdictFrom(name string) []expr.Any {
	return oneExpression(&expr.Lookup{SourceRegister: firstRegister, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: name})
}

func masquerade() []expr.Any { return oneExpression(&expr.Masq{}) }

// dnat leads the packet to the address and the port that valueFrom loaded.
func dnat() []expr.Any {
	return oneExpression(&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: firstRegister, RegAddrMax: firstRegister,
		RegProtoMin: secondRegister, RegProtoMax: secondRegister, Specified: true})
}

func verdict(kind expr.VerdictKind, chain string) []expr.Any {
	return oneExpression(&expr.Verdict{Kind: kind, Chain: chain})
}

func acceptVerdict() []expr.Any        { return verdict(expr.VerdictAccept, "") }
func dropVerdict() []expr.Any          { return verdict(expr.VerdictDrop, "") }
func returnVerdict() []expr.Any        { return verdict(expr.VerdictReturn, "") }
func gotoChain(name string) []expr.Any { return verdict(expr.VerdictGoto, name) }

func bigEndian16(n uint16) []byte  { return binary.BigEndian.AppendUint16(nil, n) }
func hostEndian32(n uint32) []byte { return binaryutil.NativeEndian.PutUint32(n) }
