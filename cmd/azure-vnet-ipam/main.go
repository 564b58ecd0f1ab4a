// Copyright (c) The azure-vnet authors. MIT licence.

// Command azure-vnet-ipam is the CNI IPAM plugin that lends addresses of the Azure virtual network to any main plugin.
// The main plugin azure-vnet does not run it, because azure-vnet lends addresses in its own process.
package main

import (
	"context"
	"net/netip"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"azurevnet/internal/cni"
	"azurevnet/internal/lender"
	"azurevnet/pool"
)

// version is set when linking.
var version = "devel"

func main() {
	cni.Main(cni.Plugin{
		Name: cni.IPAMType, Version: version, Code: lender.Code,
		Add: add, Del: del, Check: check, GC: gc, Status: status,
	})
}

// add serves ADD: it leases an address. If the interface holds one already, that is an error, and the lease stays as it
// is: the address may be in use.
func add(ctx context.Context, c *cni.Call) (*current.Result, error) {
	if err := c.CheckOwner(); err != nil {
		return nil, err
	}
	l, err := lender.Open(c)
	if err != nil {
		return nil, err
	}
	leases, err := l.LeasesOf(ctx, func(owner string) bool { return owner == c.Owner() })
	if err != nil {
		return nil, err
	}
	if len(leases) > 0 {
		return nil, cni.Errorf(cni.CodeAttached, "interface %s of container %s holds %s already, and keeps it: DEL it first", c.IfName, c.ContainerID, leases[0].Addr)
	}
	lease, err := l.Lend(ctx, true)
	if err != nil {
		return nil, err
	}
	return lender.Result(lease), nil
}

// del serves DEL: it releases all addresses of the interface. It is a success if there is none.
func del(ctx context.Context, c *cni.Call) error {
	return releaseAll(ctx, c, func(owner string) bool { return owner == c.Owner() })
}

// gc serves GC: it releases the addresses of the network's interfaces that the runtime's list lacks.
func gc(ctx context.Context, c *cni.Call) error {
	stale, err := c.Stale()
	if err != nil {
		return err
	}
	return releaseAll(ctx, c, stale)
}

// releaseAll releases the linkless leases of the owners that are wanted. A lease with a link is azure-vnet's, which
// removes the link before it releases the address.
func releaseAll(ctx context.Context, c *cni.Call, wanted func(owner string) bool) error {
	l, err := lender.Open(c)
	if err != nil {
		return err
	}
	leases, err := l.LeasesOf(ctx, wanted)
	if err != nil {
		return err
	}
	var freed []string
	for _, lease := range leases {
		if !lease.Linkless {
			continue
		}
		if err := l.Release(ctx, lease.Owner, lease.Addr); err != nil {
			return err
		}
		text := lease.Addr.String()
		if lease.Owner != c.Owner() { // GC releases: its line in the log does not name the container otherwise
			text += " of " + lease.Holder()
		}
		freed = append(freed, text)
	}
	if freed != nil {
		c.Note("released", strings.Join(freed, ", "))
	}
	return nil
}

// check serves CHECK: it is an error if the interface does not hold the addresses that prevResult has.
func check(ctx context.Context, c *cni.Call) error {
	l, err := lender.Open(c)
	if err != nil {
		return err
	}
	leases, err := l.LeasesOf(ctx, func(owner string) bool { return owner == c.Owner() })
	if err != nil {
		return err
	}
	if len(leases) == 0 {
		return cni.Errorf(types.ErrUnknownContainer, "interface %s of container %s holds no address", c.IfName, c.ContainerID)
	}
	prev, err := c.PrevResult()
	if err != nil {
		return err
	}
	return checkLeases(leases, prev)
}

// checkLeases is an error if prevResult lacks the address of a lease. prevResult may have addresses of other plugins too.
func checkLeases(leases []pool.Lease, prev *current.Result) error {
	told := map[netip.Addr]bool{}
	for _, ip := range prev.IPs {
		if addr, ok := netip.AddrFromSlice(ip.Address.IP); ok {
			told[addr.Unmap()] = true
		}
	}
	for _, lease := range leases {
		if !told[lease.Addr] {
			return cni.Errorf(cni.CodeChanged, "the container holds %s, and prevResult does not say so", lease.Addr)
		}
	}
	return nil
}

// status serves STATUS: it is an error if no container could be given an address.
func status(ctx context.Context, c *cni.Call) error {
	l, err := lender.Open(c)
	if err != nil {
		return err
	}
	_, err = l.CheckCanLend(ctx)
	return err
}
