// Copyright (c) The azure-vnet authors. MIT licence.

package ruleset

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// This file has the bytes of set elements: the keys and values as the kernel has them. A key is its fields one after the
// other. Each field is padded with zeros to a multiple of 4 bytes, as in registers (see expressions.go).

// elemKey is the key of an element. end marks the first address after an interval.
type elemKey struct {
	bytes string
	end   bool
}

// Sizes in bytes of the keys and values that are read back.
const (
	addrSize     = 4
	protoSize    = 4                               // 1 byte and padding
	portSize     = 4                               // 2 bytes and padding
	portKeySize  = protoSize + portSize            // of published: protocol . port
	addrPortSize = addrSize + protoSize + portSize // of published_at: address . protocol . port
	targetSize   = addrSize + portSize             // values of all three: address . port
)

func nameKey(name string) string {
	var b [unix.IFNAMSIZ]byte
	copy(b[:], name)
	return string(b[:])
}

func groupKey(group uint32) string { return string(hostEndian32(group)) }

func macKey(mac net.HardwareAddr) string { return string(mac) + "\x00\x00" }

func ipKey(a netip.Addr) string { b := a.As4(); return string(b[:]) }

func numberKey(n uint64) string { return string(binary.BigEndian.AppendUint32(nil, uint32(n))) }

func protoKey(udp bool) string {
	if udp {
		return string([]byte{unix.IPPROTO_UDP, 0, 0, 0})
	}
	return string([]byte{unix.IPPROTO_TCP, 0, 0, 0})
}

func portKey(port uint16) string { return string(append(bigEndian16(port), 0, 0)) }

// parsePublished decodes an element of published, or of published_at if withAddr is true: the port of the host, and the
// container that it leads to. It is not ok for an element of another size, which another release may have made.
func parsePublished(key, value string, withAddr bool) (p Port, container netip.Addr, ok bool) {
	if withAddr {
		if len(key) != addrPortSize {
			return p, container, false
		}
		p.HostAddr, _ = netip.AddrFromSlice([]byte(key[:addrSize]))
		key = key[addrSize:]
	}
	if len(key) != portKeySize || len(value) != targetSize {
		return p, container, false
	}
	container, _ = netip.AddrFromSlice([]byte(value[:addrSize]))
	p.UDP, p.HostPort, p.Port = key[0] == unix.IPPROTO_UDP, parsePort(key[protoSize:]), parsePort(value[addrSize:])
	return p, container, true
}

func parsePort(key string) uint16 { return uint16(key[0])<<8 | uint16(key[1]) }

// The values of a map of verdicts, in nft's words. The chain's name follows.
const jumpWord, gotoWord = "jump", "goto"

// element is an element of the set as the library takes it. value is empty for a set that is no map.
func (s *set) element(k elemKey, value string) nftables.SetElement {
	e := nftables.SetElement{Key: []byte(k.bytes), IntervalEnd: k.end}
	word, chain, _ := strings.Cut(value, " ")
	switch {
	case k.end || s.data.Name == "":
	case s.data.Name != nftables.TypeVerdict.Name:
		e.Val = []byte(value)
	case word == jumpWord:
		e.VerdictData = &expr.Verdict{Kind: expr.VerdictJump, Chain: chain}
	default:
		e.VerdictData = &expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}
	}
	return e
}

// valueOf spells the value of an element that was read as set.elems does. The kernel gives a verdict as nested
// attributes, which the library does not decode.
func valueOf(s *nftables.Set, e nftables.SetElement) string {
	if len(e.Val) == 0 || s.DataType.Name != "" { // the library leaves the name empty for verdicts
		return string(e.Val)
	}
	attrs, err := netlink.UnmarshalAttributes(e.Val)
	if err != nil {
		return ""
	}
	word, chain := gotoWord, ""
	for _, a := range attrs {
		switch a.Type {
		case unix.NFTA_VERDICT_CODE:
			if len(a.Data) == 4 && int32(binaryutil.BigEndian.Uint32(a.Data)) == unix.NFT_JUMP {
				word = jumpWord
			}
		case unix.NFTA_VERDICT_CHAIN:
			chain = unix.ByteSliceToString(a.Data)
		}
	}
	return word + " " + chain
}
