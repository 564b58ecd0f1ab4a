// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Of linux/netfilter/nfnetlink_conntrack.h, which no library here spells.
const (
	ctaFilter           = 25
	ctaFilterOrigFlags  = 1
	ctaFilterReplyFlags = 2
	ctaFilterIPSrc      = 1 << 0
	ctaFilterProto      = 1 << 3
	ctaFilterDstPort    = 1 << 5
)

// flows are those that agree with all that is set.
type flows struct {
	from    netip.Addr // began them
	answers netip.Addr // answers them, whomever they were sent to
	proto   byte       // with port
	port    uint16     // they were sent to it
}

func flowsFrom(addr netip.Addr) flows { return flows{from: addr} }
func repliesOf(addr netip.Addr) flows { return flows{answers: addr} }
func datagramsTo(port uint16) flows   { return flows{proto: unix.IPPROTO_UDP, port: port} }

// forgetFlows deletes flows: one that outlives its container black-holes the
// next that has the address. No conntrack is success.
func (n *netfilter) forgetFlows(f flows) error {
	err := n.conntrack(f.deletion())
	if err == nil || noConntrack(err) {
		return nil
	}
	// Kernels before 6.9 delete by a whole tuple only: list them, then.
	filter := &netlink.ConntrackFilter{}
	switch {
	case f.from.IsValid():
		err = filter.AddIP(netlink.ConntrackOrigSrcIP, f.from.AsSlice())
	case f.answers.IsValid():
		err = filter.AddIP(netlink.ConntrackReplySrcIP, f.answers.AsSlice())
	default:
		if err = filter.AddProtocol(f.proto); err == nil {
			err = filter.AddPort(netlink.ConntrackOrigDstPort, f.port)
		}
	}
	if err != nil {
		return err
	}
	_, err = netlink.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, filter)
	if err != nil && !noConntrack(err) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("delete flows: %w", err)
	}
	return nil
}

// deletion has the kernel do it in one message.
func (f flows) deletion() *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_CTNETLINK<<8|nl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_INET, Version: nl.NFNETLINK_V0})
	kind, direction, flags := nl.CTA_TUPLE_ORIG, ctaFilterOrigFlags, ctaFilterIPSrc
	if f.answers.IsValid() {
		kind, direction = nl.CTA_TUPLE_REPLY, ctaFilterReplyFlags
	}
	tuple := nl.NewRtAttr(unix.NLA_F_NESTED|kind, nil)
	if addr := cmp.Or(f.from, f.answers); addr.IsValid() {
		tuple.AddRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_IP, nil).AddRtAttr(nl.CTA_IP_V4_SRC, addr.AsSlice())
	} else {
		flags = ctaFilterProto | ctaFilterDstPort
		proto := tuple.AddRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_PROTO, nil)
		proto.AddRtAttr(nl.CTA_PROTO_NUM, []byte{f.proto})
		proto.AddRtAttr(nl.CTA_PROTO_DST_PORT, be16(f.port))
	}
	req.AddData(tuple)
	filter := nl.NewRtAttr(unix.NLA_F_NESTED|ctaFilter, nil)
	filter.AddRtAttr(direction, nl.Uint32Attr(uint32(flags)))
	req.AddData(filter)
	return req
}

func noConntrack(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS)
}
