// Copyright (c) The azure-vnet authors. MIT licence.

// Package conntrack deletes flows of the kernel's connection tracking. It does
// not read flows. A kernel without connection tracking is success.
package conntrack

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"azurevnet/internal/dump"
)

// Of linux/netfilter/nfnetlink_conntrack.h, which no library here names.
const (
	ctaFilter           = 25
	ctaFilterOrigFlags  = 1
	ctaFilterReplyFlags = 2
	ctaFilterIPSrc      = 1 << 0
	ctaFilterIPDst      = 1 << 1
	ctaFilterProto      = 1 << 3
	ctaFilterDstPort    = 1 << 5
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

// deleteRequest has the kernel delete the flows in one message, which Linux does since
// 6.9.
func (f Flows) deleteRequest() *nl.NetlinkRequest {
	r := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_CTNETLINK<<8|nl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK)
	r.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_INET, Version: nl.NFNETLINK_V0})
	if f.Untranslated.IsValid() {
		return f.untranslatedRequest(r)
	}
	kind, direction, flags := nl.CTA_TUPLE_ORIG, ctaFilterOrigFlags, ctaFilterIPSrc
	if f.Answerer.IsValid() {
		kind, direction = nl.CTA_TUPLE_REPLY, ctaFilterReplyFlags
	}
	tuple := nl.NewRtAttr(unix.NLA_F_NESTED|kind, nil)
	if addr := cmp.Or(f.From, f.Answerer); addr.IsValid() {
		tuple.AddRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_IP, nil).AddRtAttr(nl.CTA_IP_V4_SRC, addr.AsSlice())
	} else {
		flags = ctaFilterProto | ctaFilterDstPort
		proto := tuple.AddRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_PROTO, nil)
		proto.AddRtAttr(nl.CTA_PROTO_NUM, []byte{unix.IPPROTO_UDP})
		proto.AddRtAttr(nl.CTA_PROTO_DST_PORT, binary.BigEndian.AppendUint16(nil, f.UDPPort))
	}
	r.AddData(tuple)
	filter := nl.NewRtAttr(unix.NLA_F_NESTED|ctaFilter, nil)
	filter.AddRtAttr(direction, nl.Uint32Attr(uint32(flags)))
	r.AddData(filter)
	return r
}

func (f Flows) untranslatedRequest(r *nl.NetlinkRequest) *nl.NetlinkRequest {
	addr := f.Untranslated.AsSlice()
	orig := nl.NewRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_ORIG, nil)
	orig.AddRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_IP, nil).AddRtAttr(nl.CTA_IP_V4_SRC, addr)
	orig.AddRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_PROTO, nil).AddRtAttr(nl.CTA_PROTO_NUM, []byte{unix.IPPROTO_UDP})
	reply := nl.NewRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_REPLY, nil)
	reply.AddRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_IP, nil).AddRtAttr(nl.CTA_IP_V4_DST, addr)
	filter := nl.NewRtAttr(unix.NLA_F_NESTED|ctaFilter, nil)
	filter.AddRtAttr(ctaFilterOrigFlags, nl.Uint32Attr(ctaFilterIPSrc|ctaFilterProto))
	filter.AddRtAttr(ctaFilterReplyFlags, nl.Uint32Attr(ctaFilterIPDst))
	r.AddData(orig)
	r.AddData(reply)
	r.AddData(filter)
	return r
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
