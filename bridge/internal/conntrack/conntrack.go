// Copyright (c) The azure-vnet authors. MIT licence.

// Package conntrack deletes flows of the kernel's connection tracking. It does
// not read flows. A kernel without connection tracking is success.
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

// Flows describes the flows to delete: those that agree with each field that is
// set.
type Flows struct {
	From     netip.Addr // sent the first packet
	Answerer netip.Addr // sends the answers, whatever address the first packet was sent to
	UDPPort  uint16     // of a datagram's first destination; only where no address is set

	Untranslated netip.Addr // sent the first datagram, and is answered at this address; alone
}

// Conn is a socket for deletions. Its zero value is ready for use.
//
// Close waits until all that nf_tables transactions of this namespace deleted is
// destroyed, 8 to 17 ms after a deletion (nft_rcv_nl_event in Linux), and keeps
// other transactions waiting meanwhile. So close it last, without any lock.
type Conn struct {
	socket *nl.SocketHandle
}

// Close gives the socket back.
func (c *Conn) Close() {
	if c.socket != nil {
		c.socket.Close()
		c.socket = nil
	}
}

// Delete deletes the flows that agree with any of all. None is success.
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

// deleteOneByOne is for older kernels, which delete by a whole tuple only. It reads the whole table, once.
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

func noConntrack(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS)
}
