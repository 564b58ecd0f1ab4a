// Copyright (c) The azure-vnet authors. MIT licence.

package conntrack

import (
	"cmp"
	"encoding/binary"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// This file has the layout of ctnetlink's messages. The numbers are of linux/netfilter/nfnetlink_conntrack.h,
// and no library here names them. CTA_FILTER says which fields of the tuples in a message select flows; the
// kernel ignores the other fields.
const (
	ctaFilter           = 25     // CTA_FILTER
	ctaFilterOrigFlags  = 1      // CTA_FILTER_ORIG_FLAGS: fields of the first packet's tuple
	ctaFilterReplyFlags = 2      // CTA_FILTER_REPLY_FLAGS: fields of the answers' tuple
	ctaFilterIPSrc      = 1 << 0 // source address
	ctaFilterIPDst      = 1 << 1 // destination address
	ctaFilterProto      = 1 << 3 // protocol
	ctaFilterDstPort    = 1 << 5 // destination port
)

// deleteRequest is a request that deletes all selected flows in one message. Linux does this since 6.9.
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

// untranslatedRequest completes the request for Untranslated: datagrams from the address, answered at the
// address.
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
