// Copyright (c) The azure-vnet authors. MIT licence.

// Package rtnl speaks the parts of rtnetlink that the netlink library does not: veth pairs made in one
// message, bridge port flags, forwarding entries, neighbour entries with a protocol number, and events.
// Its lists are complete, because a list that the kernel interrupted is repeated. It works on the
// network namespace of the calling thread.
//
// It is not a model of the host: it knows no name and no mark of azure-vnet.
//
// Errors wrap the kernel's errno, so errors.Is finds unix.EEXIST and the others.
package rtnl

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"azurevnet/internal/dump"
)

// Links is one list of all links of the namespace.
type Links []netlink.Link

// ReadLinks lists all links of the namespace.
func ReadLinks() (Links, error) {
	all, err := dump.Whole(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list the host's links: %w", err)
	}
	return all, nil
}

// ByName returns the link of that name, or nil if there is none.
func (all Links) ByName(name string) netlink.Link {
	for _, l := range all {
		if l.Attrs().Name == name {
			return l
		}
	}
	return nil
}

// ByIndex returns the link with that index, or nil if there is none.
func (all Links) ByIndex(index int) netlink.Link {
	for _, l := range all {
		if l.Attrs().Index == index {
			return l
		}
	}
	return nil
}

// IsNotExist reports whether an error says that a link, route, rule, address or entry does not exist.
// The kernel has an errno of its own for each kind of object.
func IsNotExist(err error) bool {
	var link netlink.LinkNotFoundError
	return errors.As(err, &link) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) ||
		errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EADDRNOTAVAIL)
}

// execute sends a request and waits for the kernel's acknowledgement. The error wraps the errno.
func execute(r *nl.NetlinkRequest) error {
	_, err := r.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// ReadRoutes lists the IPv4 routes with that protocol number, in every table. Since Linux 4.20 the kernel
// filters them itself. This matters on a host where a routing daemon has added a million routes.
func ReadRoutes(protocol netlink.RouteProtocol) ([]netlink.Route, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	_ = h.SetStrictCheck(true) // an older kernel refuses this and lists all routes; then the library filters them
	all, err := dump.Whole(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_UNSPEC, Protocol: protocol}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
	})
	if err != nil {
		return nil, fmt.Errorf("list the host's routes: %w", err)
	}
	return all, nil
}
