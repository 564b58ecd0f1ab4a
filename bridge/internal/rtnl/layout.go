// Copyright (c) The azure-vnet authors. MIT licence.

package rtnl

import (
	"encoding/binary"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// This file has the layout of rtnetlink's messages. No other file of this package, and no file of
// package bridge, counts bytes.
//
// A message of rtnetlink is a fixed header and then attributes. Which header it is depends on the
// kind of the message: struct ifinfomsg for links, ndmsg for neighbour and forwarding entries,
// ifaddrmsg for addresses, rtmsg for routes and rules, netconfmsg for sysctls. All numbers are in
// the machine's byte order.

// Offsets in bytes from the start of a header.
const (
	familyOffset   = 0  // of every header: 1 byte
	indexOffset    = 4  // of ifinfomsg, ndmsg and ifaddrmsg: the link's index, 4 bytes
	flagsOffset    = 8  // of ifinfomsg: 4 bytes (IFF_UP and others)
	ndStateOffset  = 8  // of ndmsg: 2 bytes (NUD_PERMANENT and others)
	ndFlagsOffset  = 10 // of ndmsg: 1 byte (NTF_PROXY and others)
	protocolOffset = 5  // of rtmsg: 1 byte. A rule has its protocol in an attribute instead
)

// Numbers that golang.org/x/sys/unix does not name.
const (
	ndaMaster   = 9  // NDA_MASTER of linux/neighbour.h: the index of the bridge
	ndaProtocol = 12 // NDA_PROTOCOL: who made the neighbour entry

	sizeofNetconfmsg = 4  // bytes of struct netconfmsg of linux/netconf.h, with its padding
	netconfaIfindex  = 1  // NETCONFA_IFINDEX: the link of the sysctl
	netconfaAll      = -1 // NETCONFA_IFINDEX_ALL, the index that stands for all links

	attrTypeMask = 0x3fff // NLA_TYPE_MASK: an attribute's type without its flags
	attrAlign    = 4      // bytes: each attribute begins at a multiple of it
)

func familyOf(m []byte) byte { return m[familyOffset] }

// linkIndexOf reads the link's index from an ifinfomsg, an ndmsg or an ifaddrmsg.
func linkIndexOf(m []byte) int { return int(int32(binary.NativeEndian.Uint32(m[indexOffset:]))) }

func linkFlagsOf(m []byte) uint32 { return binary.NativeEndian.Uint32(m[flagsOffset:]) }

func entryStateOf(m []byte) uint16 { return binary.NativeEndian.Uint16(m[ndStateOffset:]) }

func entryFlagsOf(m []byte) byte { return m[ndFlagsOffset] }

// newEntryRequest is a request with a struct ndmsg as its header. Attributes follow.
func newEntryRequest(kind, flags int, family byte, link int, state uint16, entryFlags byte) *nl.NetlinkRequest {
	header := make(Bytes, unix.SizeofNdMsg)
	header[familyOffset] = family
	binary.NativeEndian.PutUint32(header[indexOffset:], uint32(link))
	binary.NativeEndian.PutUint16(header[ndStateOffset:], state)
	header[ndFlagsOffset] = entryFlags
	r := nl.NewNetlinkRequest(kind, flags)
	r.AddData(header)
	return r
}

// Bytes is a part of a message that is encoded already. A request sends it at the place where it
// was added. It sends its raw data (AddRawData) after all other parts.
type Bytes []byte

// Len returns the length in bytes.
func (b Bytes) Len() int { return len(b) }

// Serialize returns b itself.
func (b Bytes) Serialize() []byte { return b }

// Attributes calls yield for each attribute of a message whose fixed header has headerSize bytes.
// It ends at an attribute that is longer than the message.
func Attributes(message []byte, headerSize int) func(yield func(kind uint16, value []byte) bool) {
	return attributes(message[min(headerSize, len(message)):])
}

// attributes is Attributes for bytes without a header, such as the value of a nested attribute. An
// attribute is its length (2 bytes, with these 4), its type (2 bytes), and its value.
func attributes(b []byte) func(yield func(kind uint16, value []byte) bool) {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= unix.SizeofRtAttr {
			size := int(binary.NativeEndian.Uint16(b))
			if size < unix.SizeofRtAttr || size > len(b) {
				return
			}
			if !yield(binary.NativeEndian.Uint16(b[2:])&attrTypeMask, b[unix.SizeofRtAttr:size]) {
				return
			}
			aligned := (size + attrAlign - 1) &^ (attrAlign - 1)
			b = b[min(aligned, len(b)):]
		}
	}
}

// nested calls yield for each attribute within the message's attribute of the kind outer.
func nested(message []byte, headerSize int, outer uint16) func(yield func(kind uint16, value []byte) bool) {
	return func(yield func(uint16, []byte) bool) {
		for kind, value := range Attributes(message, headerSize) {
			if kind != outer {
				continue
			}
			for kind, value := range attributes(value) {
				if !yield(kind, value) {
					return
				}
			}
		}
	}
}
