// Copyright (c) The azure-vnet authors. MIT licence.

// Package nfnl asks nf_tables three questions that the nftables library cannot ask. Does one chain exist (without a
// list of all chains)? Which chains are on the forward hook? What do the rules of one chain do? A host with kube-proxy
// has thousands of chains, so a list of all chains with their rules would be slow. The package changes nothing.
package nfnl

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// The library determines the machine's byte order at the first use, without a lock. So it is used here once,
// before any goroutine exists.
var _ = nl.NativeEndian()

// noneErrors are the kernel's errors for an object that does not exist, and for a kernel without nf_tables.
var noneErrors = []error{unix.ENOENT, unix.EOPNOTSUPP, unix.EAFNOSUPPORT, unix.EPROTONOSUPPORT, unix.EINVAL}

// ChainExists reports whether a table has a chain. family is that of the table, such as unix.NFPROTO_IPV4. On a
// kernel without nf_tables it is false.
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
