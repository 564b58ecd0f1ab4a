// Copyright (c) The azure-vnet authors. MIT licence.

// Package rtnl speaks the parts of rtnetlink that the netlink library does not:
// dumps that are complete, veth pairs made in one message, bridge port flags,
// forwarding entries and neighbours with a protocol. It works on the namespace
// of the calling thread. It is not a model of the host: it knows no name and no
// mark of azure-vnet.
//
// Errors wrap the kernel's errno, so errors.Is finds unix.EEXIST and the others.
package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"azurevnet/internal/dump"
)

// Links is one reading of the namespace's links.
type Links []netlink.Link

// ReadLinks lists all links.
func ReadLinks() (Links, error) {
	all, err := dump.Whole(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list the host's links: %w", err)
	}
	return all, nil
}

// ByName returns the link of that name, nil if there is none.
func (all Links) ByName(name string) netlink.Link {
	for _, l := range all {
		if l.Attrs().Name == name {
			return l
		}
	}
	return nil
}

// ByIndex returns the link of that index, nil if there is none.
func (all Links) ByIndex(index int) netlink.Link {
	for _, l := range all {
		if l.Attrs().Index == index {
			return l
		}
	}
	return nil
}

// IsNotExist reports whether an error says that a link, route, rule or entry does
// not exist.
func IsNotExist(err error) bool {
	var link netlink.LinkNotFoundError
	return errors.As(err, &link) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) ||
		errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EADDRNOTAVAIL)
}

// newRequest is a message of rtnetlink with its fixed header; attributes follow.
func newRequest(kind, flags int, header []byte) *nl.NetlinkRequest {
	r := nl.NewNetlinkRequest(kind, flags)
	r.AddData(Bytes(header))
	return r
}

// Bytes is a part of a message that is spelled already. A request puts it where it was added, unlike its raw
// data, which come last.
type Bytes []byte

// Len is in bytes.
func (b Bytes) Len() int { return len(b) }

// Serialize returns b itself.
func (b Bytes) Serialize() []byte { return b }

// execute sends r and waits for its acknowledgement.
func execute(r *nl.NetlinkRequest) error {
	_, err := r.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// attrTypeMask removes the flags from an attribute's type (NLA_TYPE_MASK).
const attrTypeMask = 0x3fff

// attributes calls yield for each netlink attribute in b.
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
			b = b[min((size+3)&^3, len(b)):]
		}
	}
}

// Attributes calls yield for each attribute of an rtnetlink message whose fixed
// header has that many bytes.
func Attributes(message []byte, header int) func(yield func(kind uint16, value []byte) bool) {
	return attributes(message[min(header, len(message)):])
}

// ReadRoutes lists the IPv4 routes of that protocol in every table. The kernel chooses
// them where it can (since Linux 4.20): a routing daemon may have made a million others.
func ReadRoutes(protocol netlink.RouteProtocol) ([]netlink.Route, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	_ = h.SetStrictCheck(true) // an older kernel lists all, and they are chosen here
	all, err := dump.Whole(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_UNSPEC, Protocol: protocol}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
	})
	if err != nil {
		return nil, fmt.Errorf("list the host's routes: %w", err)
	}
	return all, nil
}
