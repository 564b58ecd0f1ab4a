// Copyright (c) The azure-vnet authors. MIT licence.

package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"azurevnet/internal/dump"
)

// Neighbour is a permanent neighbour entry of IPv4.
type Neighbour struct {
	Link     int // index of the link
	Addr     netip.Addr
	MAC      net.HardwareAddr
	Protocol byte // who made the entry; 0: not told
}

// PutNeighbour adds the entry. It replaces another entry for the same address on the same link.
func PutNeighbour(n Neighbour) error {
	return execute(neighbourRequest(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, n))
}

// DeleteNeighbour deletes the entry. If there is none, the error is one that IsNotExist reports.
func DeleteNeighbour(n Neighbour) error {
	return execute(neighbourRequest(unix.RTM_DELNEIGH, 0, n))
}

func neighbourRequest(kind, flags int, n Neighbour) *nl.NetlinkRequest {
	r := newEntryRequest(kind, flags|unix.NLM_F_ACK, unix.AF_INET, n.Link, unix.NUD_PERMANENT, 0)
	r.AddData(nl.NewRtAttr(unix.NDA_DST, n.Addr.AsSlice()))
	r.AddData(nl.NewRtAttr(unix.NDA_LLADDR, n.MAC))
	r.AddData(nl.NewRtAttr(ndaProtocol, []byte{n.Protocol}))
	return r
}

// ReadNeighbours lists the permanent entries of IPv4, without those of proxy ARP.
func ReadNeighbours() ([]Neighbour, error) {
	messages, err := dumpNeighbours(unix.AF_INET)
	if err != nil {
		return nil, err
	}
	var all []Neighbour
	for _, m := range messages {
		if entryStateOf(m) != unix.NUD_PERMANENT || entryFlagsOf(m)&unix.NTF_PROXY != 0 {
			continue
		}
		n := Neighbour{Link: linkIndexOf(m)}
		for kind, value := range Attributes(m, unix.SizeofNdMsg) {
			switch {
			case kind == unix.NDA_DST:
				n.Addr, _ = netip.AddrFromSlice(value)
			case kind == unix.NDA_LLADDR:
				n.MAC = net.HardwareAddr(value)
			case kind == ndaProtocol && len(value) == 1:
				n.Protocol = value[0]
			}
		}
		all = append(all, n)
	}
	return all, nil
}

// ForwardingEntry is a static entry of a bridge's forwarding table: the bridge sends frames to the MAC out by
// the port.
type ForwardingEntry struct {
	Port   int // the port's link index
	Bridge int // the bridge's link index; only reading sets it
	MAC    net.HardwareAddr
}

// AddForwarding adds the entry. If the bridge has the MAC already, on any port, the error is unix.EEXIST and
// nothing changes.
func AddForwarding(e ForwardingEntry) error {
	r := newEntryRequest(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK, unix.AF_BRIDGE, e.Port, unix.NUD_NOARP, unix.NTF_MASTER)
	r.AddData(nl.NewRtAttr(unix.NDA_LLADDR, e.MAC))
	return execute(r)
}

// DeleteForwarding deletes the entry. If there is none, the error is one that IsNotExist reports.
func DeleteForwarding(e ForwardingEntry) error {
	r := newEntryRequest(unix.RTM_DELNEIGH, unix.NLM_F_ACK, unix.AF_BRIDGE, e.Port, unix.NUD_NOARP, unix.NTF_MASTER)
	r.AddData(nl.NewRtAttr(unix.NDA_LLADDR, e.MAC))
	return execute(r)
}

// FindForwarding looks up the MAC in the forwarding table of the bridge with that link index. Linux before 5.0
// has no such request: found is then false, and AddForwarding reports a duplicate as EEXIST.
func FindForwarding(bridge int, mac net.HardwareAddr) (e ForwardingEntry, found bool, err error) {
	r := newEntryRequest(unix.RTM_GETNEIGH, 0, unix.AF_BRIDGE, 0, 0, 0)
	r.AddData(nl.NewRtAttr(unix.NDA_LLADDR, mac))
	r.AddData(nl.NewRtAttr(ndaMaster, nl.Uint32Attr(uint32(bridge))))
	messages, err := r.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWNEIGH)
	if IsNotExist(err) || errors.Is(err, unix.EOPNOTSUPP) || err == nil && len(messages) == 0 {
		return ForwardingEntry{}, false, nil
	}
	if err != nil {
		return ForwardingEntry{}, false, fmt.Errorf("look for %s in the forwarding table: %w", mac, err)
	}
	if len(messages[0]) < unix.SizeofNdMsg {
		return ForwardingEntry{}, false, unix.EBADMSG
	}
	return ForwardingEntry{Port: linkIndexOf(messages[0]), Bridge: bridge, MAC: mac}, true, nil
}

// ReadForwarding lists the permanent and the static entries of every bridge, as far as they have no VLAN. It
// does not list entries that a bridge has learnt.
func ReadForwarding() ([]ForwardingEntry, error) {
	messages, err := dumpNeighbours(unix.AF_BRIDGE)
	if err != nil {
		return nil, err
	}
	var all []ForwardingEntry
	for _, m := range messages {
		if entryStateOf(m)&(unix.NUD_NOARP|unix.NUD_PERMANENT) == 0 {
			continue
		}
		e := ForwardingEntry{Port: linkIndexOf(m)}
		tagged := false
		for kind, value := range Attributes(m, unix.SizeofNdMsg) {
			switch {
			case kind == unix.NDA_LLADDR:
				e.MAC = net.HardwareAddr(value)
			case kind == ndaMaster && len(value) == 4:
				e.Bridge = int(binary.NativeEndian.Uint32(value))
			case kind == unix.NDA_VLAN:
				tagged = true
			}
		}
		if !tagged && e.Bridge != 0 {
			all = append(all, e)
		}
	}
	return all, nil
}

func dumpNeighbours(family byte) ([][]byte, error) {
	messages, err := dump.Whole(func() ([][]byte, error) {
		return newEntryRequest(unix.RTM_GETNEIGH, unix.NLM_F_DUMP, family, 0, 0, 0).Execute(unix.NETLINK_ROUTE, unix.RTM_NEWNEIGH)
	})
	for _, m := range messages {
		if len(m) < unix.SizeofNdMsg {
			return nil, unix.EBADMSG
		}
	}
	return messages, err
}

// Equal reports whether both entries have the same link, address, MAC and protocol.
func (n Neighbour) Equal(o Neighbour) bool {
	return n.Link == o.Link && n.Addr == o.Addr && n.MAC.String() == o.MAC.String() && n.Protocol == o.Protocol
}
