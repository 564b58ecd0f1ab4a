// Copyright (c) The azure-vnet authors. MIT licence.

// Package nfnl asks nf_tables what the nftables library does not: whether a chain
// exists, without a list of all chains; which chains are on the forward hook; and what
// the rules of one chain do, whatever their conditions. A host with kube-proxy has
// thousands of chains. It changes nothing.
package nfnl

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// The library finds the machine's byte order at its first use, without a lock.
// Here that use is before any goroutine is.
var _ = nl.NativeEndian()

// noneErrors are the kernel's for what is not there, and of a kernel without nf_tables.
var noneErrors = []error{unix.ENOENT, unix.EOPNOTSUPP, unix.EAFNOSUPPORT, unix.EPROTONOSUPPORT, unix.EINVAL}

// ChainExists reports whether the table of that family, such as unix.NFPROTO_IPV4, has
// the chain. A kernel without nf_tables has none.
func ChainExists(family byte, table, chain string) (bool, error) {
	r := newRequest(unix.NFT_MSG_GETCHAIN, unix.NLM_F_ACK, family)
	r.AddData(nl.NewRtAttr(unix.NFTA_CHAIN_TABLE, nl.ZeroTerminated(table)))
	r.AddData(nl.NewRtAttr(unix.NFTA_CHAIN_NAME, nl.ZeroTerminated(chain)))
	_, err := r.Execute(unix.NETLINK_NETFILTER, 0)
	for _, none := range noneErrors {
		if errors.Is(err, none) {
			return false, nil
		}
	}
	if err != nil {
		return false, fmt.Errorf("look for the nft chain %s of %s: %w", chain, table, err)
	}
	return true, nil
}
