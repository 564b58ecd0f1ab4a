// Copyright (c) The azure-vnet authors. MIT licence.

package nfnl

import (
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Commits tells whether anybody has committed a transaction of nf_tables in this namespace. The zero value is
// ready for use.
type Commits struct {
	socket *nl.SocketHandle
}

// Count returns a number that changes with each commit (the generation id). It is 0 if the kernel does not tell
// it.
func (c *Commits) Count() uint32 {
	if c.socket == nil {
		s, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_NETFILTER)
		if err != nil {
			return 0
		}
		c.socket = &nl.SocketHandle{Socket: s}
		_ = s.SetReceiveTimeout(&nl.SocketTimeoutTv)
	}
	r := newRequest(unix.NFT_MSG_GETGEN, 0, unix.AF_UNSPEC)
	r.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_NETFILTER: c.socket}
	messages, err := r.Execute(unix.NETLINK_NETFILTER, 0)
	if err != nil {
		return 0
	}
	for _, m := range messages {
		for kind, value := range attributesOf(m) {
			if kind == unix.NFTA_GEN_ID && len(value) == 4 {
				return uint32Of(value)
			}
		}
	}
	return 0
}

// Close closes the socket.
func (c *Commits) Close() {
	if c.socket != nil {
		c.socket.Close()
		c.socket = nil
	}
}
