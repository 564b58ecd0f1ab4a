// Copyright (c) The azure-vnet authors. MIT licence.

package rtnl

import (
	"encoding/binary"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// This file decodes events: messages that the kernel sends to a socket which has joined a group of
// rtnetlink, such as RTNLGRP_LINK. Each function is for some kinds of message. It returns ok false for
// a message that is too short.

// LinkEvent says what a link is now, or that it is gone. RTM_NEWLINK and RTM_DELLINK give it.
type LinkEvent struct {
	Index       int
	Deleted     bool
	Up          bool // the administrator's state, not the carrier's
	Name, Alias string
	Group       uint32
	Master      int // index of the bridge; 0: none
	MTU         uint32
	MAC         string // lower case with colons

	// ByBridge: the event comes from the bridge of the link, and tells only of the link as its port.
	ByBridge  bool
	PortFlags PortFlags
}

// ParseLinkEvent decodes an event of a link or of a bridge port. It is not ok for families other than
// those two.
func ParseLinkEvent(m syscall.NetlinkMessage) (e LinkEvent, ok bool) {
	if len(m.Data) < unix.SizeofIfInfomsg {
		return e, false
	}
	e.Index, e.Deleted, e.Up = linkIndexOf(m.Data), m.Header.Type == unix.RTM_DELLINK, linkFlagsOf(m.Data)&unix.IFF_UP != 0
	switch familyOf(m.Data) {
	case unix.AF_BRIDGE:
		e.ByBridge, e.PortFlags = true, parsePortFlags(m.Data)
		return e, true
	case unix.AF_UNSPEC:
	default:
		return e, false
	}
	for kind, value := range Attributes(m.Data, unix.SizeofIfInfomsg) {
		switch kind {
		case unix.IFLA_IFNAME:
			e.Name = unix.ByteSliceToString(value)
		case unix.IFLA_IFALIAS:
			e.Alias = unix.ByteSliceToString(value)
		case unix.IFLA_GROUP:
			e.Group = binary.NativeEndian.Uint32(value)
		case unix.IFLA_MASTER:
			e.Master = int(binary.NativeEndian.Uint32(value))
		case unix.IFLA_MTU:
			e.MTU = binary.NativeEndian.Uint32(value)
		case unix.IFLA_ADDRESS:
			e.MAC = net.HardwareAddr(value).String()
		}
	}
	return e, true
}

// EntryEvent says that a neighbour entry or a forwarding entry came, changed or went. RTM_NEWNEIGH and
// RTM_DELNEIGH give it.
type EntryEvent struct {
	Link       int // index; of a forwarding entry: of the port
	Deleted    bool
	Forwarding bool // a forwarding entry of a bridge, and no neighbour entry
	Bridge     int  // of a forwarding entry: the index of its bridge
	Protocol   byte // of a neighbour entry: who made it; 0: not told
}

// ParseEntryEvent decodes an event of a neighbour or forwarding entry.
func ParseEntryEvent(m syscall.NetlinkMessage) (e EntryEvent, ok bool) {
	if len(m.Data) < unix.SizeofNdMsg {
		return e, false
	}
	e.Link, e.Deleted, e.Forwarding = linkIndexOf(m.Data), m.Header.Type == unix.RTM_DELNEIGH, familyOf(m.Data) == unix.AF_BRIDGE
	for kind, value := range Attributes(m.Data, unix.SizeofNdMsg) {
		switch {
		case kind == ndaProtocol && len(value) == 1:
			e.Protocol = value[0]
		case kind == ndaMaster && len(value) == 4:
			e.Bridge = int(int32(binary.NativeEndian.Uint32(value)))
		}
	}
	return e, true
}

// AllLinks is the index by which SysctlEventLink names a sysctl of all links (net.ipv4.conf.all).
const AllLinks = netconfaAll

// SysctlEventLink returns the index of the link whose sysctl changed, or AllLinks. RTM_NEWNETCONF
// gives it. The kernel tells of forwarding, rp_filter, proxy_arp and a few others, and of no more.
func SysctlEventLink(m syscall.NetlinkMessage) (index int, ok bool) {
	for kind, value := range Attributes(m.Data, sizeofNetconfmsg) {
		if kind == netconfaIfindex && len(value) == 4 {
			return int(int32(binary.NativeEndian.Uint32(value))), true
		}
	}
	return 0, false
}

// AddrEventLink returns the index of the link that got or lost an address. RTM_NEWADDR and
// RTM_DELADDR give it.
func AddrEventLink(m syscall.NetlinkMessage) (index int, ok bool) {
	if len(m.Data) < unix.SizeofIfAddrmsg {
		return 0, false
	}
	return linkIndexOf(m.Data), true
}

// EventProtocol returns who made the route or the rule of an event. RTM_NEWROUTE, RTM_DELROUTE,
// RTM_NEWRULE and RTM_DELRULE give it. It is 0 for a rule without the attribute.
func EventProtocol(m syscall.NetlinkMessage) (protocol byte, ok bool) {
	if len(m.Data) < unix.SizeofRtMsg {
		return 0, false
	}
	if m.Header.Type != unix.RTM_NEWRULE && m.Header.Type != unix.RTM_DELRULE {
		return m.Data[protocolOffset], true
	}
	for kind, value := range Attributes(m.Data, unix.SizeofRtMsg) {
		if kind == unix.FRA_PROTOCOL && len(value) == 1 {
			return value[0], true
		}
	}
	return 0, true
}
