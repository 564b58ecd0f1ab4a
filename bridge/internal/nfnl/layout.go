// Copyright (c) The azure-vnet authors. MIT licence.

package nfnl

import (
	"encoding/binary"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/rtnl"
)

// This file has the layout of nf_tables' messages. A message is a struct nfgenmsg and then attributes.
// Numbers in attributes are in network byte order, in contrast to rtnetlink's.

// Numbers of linux/netfilter.h and linux/netfilter/nf_tables.h that no library here names.
const (
	nfInetForward = 2 // NF_INET_FORWARD, the number of the forward hook

	nfDrop    = 0  // NF_DROP, a verdict and a chain's policy
	nfAccept  = 1  // NF_ACCEPT
	nftJump   = -3 // NFT_JUMP
	nftGoto   = -4 // NFT_GOTO
	nftReturn = -5 // NFT_RETURN

	// The attribute with the table's name has this number in every message about a table or about
	// an object of one: NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE, NFTA_SET_TABLE.
	tableAttr = 1

	messageTypeMask = 0xff // NFNL_MSG_TYPE: a header's type without the subsystem's number
)

// subsystem is nf_tables' number in the type of a message (NFNL_SUBSYS_NFTABLES, in the high byte).
const subsystem = unix.NFNL_SUBSYS_NFTABLES << 8

// newRequest is a request to nf_tables for one family, such as unix.NFPROTO_IPV4. kind is the type of
// message, such as unix.NFT_MSG_GETCHAIN. Attributes follow.
func newRequest(kind, flags int, family byte) *nl.NetlinkRequest {
	r := nl.NewNetlinkRequest(subsystem|kind, flags)
	r.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
	return r
}

// attributesOf yields the attributes of a message.
func attributesOf(message []byte) func(yield func(kind uint16, value []byte) bool) {
	return rtnl.Attributes(message, nl.SizeofNfgenmsg)
}

// nested yields the attributes within the value of an attribute.
func nested(value []byte) func(yield func(kind uint16, value []byte) bool) {
	return rtnl.Attributes(value, 0)
}

// uint32Of decodes an attribute's value. It is 0 for a value of another length.
func uint32Of(value []byte) uint32 {
	if len(value) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(value)
}

// EventTable returns the family and the name of the table that an event of nf_tables is about
// (NFNLGRP_NFTABLES). It is not ok for two kinds of event: the end of a transaction, and an element of a
// set.
func EventTable(m syscall.NetlinkMessage) (family byte, table string, ok bool) {
	switch m.Header.Type & messageTypeMask {
	case unix.NFT_MSG_NEWGEN, unix.NFT_MSG_NEWSETELEM, unix.NFT_MSG_DELSETELEM:
		return 0, "", false
	}
	for kind, value := range attributesOf(m.Data) {
		if kind == tableAttr {
			return m.Data[0], unix.ByteSliceToString(value), true // the family is the header's first byte
		}
	}
	return 0, "", false
}
