// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"fmt"
	"os"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// netfilter is what one call says to nf_tables and conntrack. Its sockets stay
// open until the call has done all else. For whoever closes one waits until all
// that transactions of the namespace left is destroyed, a grace period long, and
// holds up every transaction meanwhile (nft_rcv_nl_event in Linux): closed last,
// there is little left to wait for, and of 30 detaches at once one waits for all.
// The zero value is ready for use.
type netfilter struct {
	tables *nftables.Conn
	flows  *nl.SocketHandle
}

// close comes after the call has given back its lock.
func (n *netfilter) close() {
	if n.tables != nil {
		_ = n.tables.CloseLasting()
	}
	if n.flows != nil {
		n.flows.Close()
	}
	*n = netfilter{}
}

// commit sends what fill buffers as one transaction.
func (n *netfilter) commit(fill func(*nftables.Conn) error) (err error) {
	if n.tables == nil {
		if n.tables, err = nftables.New(nftables.AsLasting()); err != nil {
			return err
		}
	}
	if err = fill(n.tables); err == nil {
		err = n.tables.Flush()
	}
	if err != nil { // more answers to what failed may be on their way
		_ = n.tables.CloseLasting()
		n.tables = nil
	}
	return err
}

// addElements adds an endpoint's elements to a table as it stands, in one
// transaction. It is false where the table lacks what the elements lead to, or has
// others in their place: then the table is to be made whole.
func (n *netfilter) addElements(sets []*tableSet) bool {
	return n.commit(func(c *nftables.Conn) error {
		for _, s := range sets {
			if err := s.change(c, nil); err != nil {
				return err
			}
		}
		return nil
	}) == nil
}

// deleteElements takes an endpoint's elements out of a table. None is success.
func (n *netfilter) deleteElements(sets []*tableSet) error {
	without := func(sets ...*tableSet) error {
		return n.commit(func(c *nftables.Conn) error {
			for _, s := range sets {
				if err := s.without().change(c, s.elems); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if without(sets...) == nil {
		return nil
	}
	for _, s := range sets { // one that lacks undoes the transaction: one by one, then
		if err := without(s); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("nft table %s: take elements out of %s: %w", tableName, s.name, err)
		}
	}
	return nil
}

// conntrack sends req on the call's socket.
func (n *netfilter) conntrack(req *nl.NetlinkRequest) error {
	if n.flows == nil {
		s, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_NETFILTER)
		if err != nil {
			return err
		}
		n.flows = &nl.SocketHandle{Socket: s}
		if err := s.SetReceiveTimeout(&nl.SocketTimeoutTv); err != nil {
			return err
		}
	}
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_NETFILTER: n.flows}
	_, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	return err
}
