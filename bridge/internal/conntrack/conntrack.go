// Copyright (c) The azure-vnet authors. MIT licence.

// Package conntrack deletes flows from the kernel's connection tracking. It does not list flows. On a kernel
// without connection tracking, every deletion is success.
package conntrack

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"azurevnet/internal/dump"
)

// Flows selects the flows to delete. One of From, Answerer, UDPPort and Untranslated is set.
type Flows struct {
	From     netip.Addr // the address that sent the first packet
	Answerer netip.Addr // the address that sends the answers. Where DNAT applies, the first packet was sent to another one
	UDPPort  uint16     // the first destination port of a flow of UDP

	Untranslated netip.Addr // sent the first datagram of a flow of UDP, and receives the answers at the same address: the flow has no SNAT
}

// Conn is a socket for deletions. The zero value is ready for use.
//
// Close waits until the kernel has destroyed all that nf_tables transactions of this namespace deleted, which
// takes 8 to 17 ms after a deletion (nft_rcv_nl_event in Linux). Meanwhile other transactions wait too. So
// close it last, and hold no lock.
type Conn struct {
	socket *nl.SocketHandle
}

// Close closes the socket. It may wait: see Conn.
func (c *Conn) Close() {
	if c.socket != nil {
		c.socket.Close()
		c.socket = nil
	}
}

// Delete deletes the flows that any of the selections matches. If there are none, that is success.
func (c *Conn) Delete(all ...Flows) error {
	for _, f := range all {
		err := c.execute(f.deleteRequest())
		if err == nil || noConntrack(err) {
			continue
		}
		if err := deleteOneByOne(all); err != nil {
			return fmt.Errorf("delete flows from the connection tracking: %w", err)
		}
		return nil
	}
	return nil
}

// deleteOneByOne is for kernels before 6.9, which delete only by a flow's whole tuple. It lists all flows of
// the host, once.
func deleteOneByOne(all []Flows) error {
	var filters []netlink.CustomConntrackFilter
	for _, f := range all {
		filter := &netlink.ConntrackFilter{}
		var err error
		switch {
		case f.Untranslated.IsValid():
			err = errors.Join(filter.AddProtocol(unix.IPPROTO_UDP), filter.AddIP(netlink.ConntrackOrigSrcIP, f.Untranslated.AsSlice()),
				filter.AddIP(netlink.ConntrackReplyDstIP, f.Untranslated.AsSlice()))
		case f.From.IsValid():
			err = filter.AddIP(netlink.ConntrackOrigSrcIP, f.From.AsSlice())
		case f.Answerer.IsValid():
			err = filter.AddIP(netlink.ConntrackReplySrcIP, f.Answerer.AsSlice())
		default:
			if err = filter.AddProtocol(unix.IPPROTO_UDP); err == nil {
				err = filter.AddPort(netlink.ConntrackOrigDstPort, f.UDPPort)
			}
		}
		if err != nil {
			return err
		}
		filters = append(filters, filter)
	}
	_, err := dump.Whole(func() (none []Flows, err error) {
		_, err = netlink.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, filters...)
		return nil, err
	})
	if noConntrack(err) || errors.Is(err, unix.EINVAL) {
		return nil
	}
	return err
}

// execute sends a request, by the socket that earlier requests used.
func (c *Conn) execute(r *nl.NetlinkRequest) error {
	if c.socket == nil {
		s, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_NETFILTER)
		if err != nil {
			return err
		}
		c.socket = &nl.SocketHandle{Socket: s}
		if err := s.SetReceiveTimeout(&nl.SocketTimeoutTv); err != nil {
			return err
		}
	}
	r.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_NETFILTER: c.socket}
	_, err := r.Execute(unix.NETLINK_NETFILTER, 0)
	return err
}

// noConntrack reports whether an error means that the kernel has no such flow, or no connection tracking.
func noConntrack(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS)
}
