// Copyright (c) The azure-vnet authors. MIT licence.

// Command azure-vnet-ipam is the CNI IPAM plugin that lends addresses of the
// Azure virtual network to whatever main plugin calls it. Under azure-vnet it
// is not run: that lends by itself.
package main

import (
	"context"
	"fmt"
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

// add lends an address. A repeat is an error, for the first is in use: it is
// left as it is.
func add(ctx context.Context, c *cni.Call) (*current.Result, error) {
	if err := c.CheckOwner(); err != nil {
		return nil, err
	}
	l, err := lender.Open(c)
	if err != nil {
		return nil, err
	}
	held, err := l.LeasesOf(ctx, func(owner string) bool { return owner == c.Owner() })
	if err != nil {
		return nil, err
	}
	if len(held) > 0 {
		return nil, cni.Errorf(cni.CodeAttached, "interface %s of container %s holds %s already, and keeps it: DEL it first", c.IfName, c.ContainerID, held[0].Addr)
	}
	lease, err := l.Lend(ctx, true)
	if err != nil {
		return nil, err
	}
	return lender.Result(lease), nil
}

// del releases what the container holds. None is success.
func del(ctx context.Context, c *cni.Call) error {
	return releaseAll(ctx, c, func(owner string) bool { return owner == c.Owner() })
}

// gc releases what the network's containers hold that are not listed.
func gc(ctx context.Context, c *cni.Call) error {
	stale, err := c.Stale()
	if err != nil {
		return err
	}
	return releaseAll(ctx, c, stale)
}

// releaseAll releases leases without a link only: one with a link is in use by
// azure-vnet, which takes the link away first.
func releaseAll(ctx context.Context, c *cni.Call, of func(owner string) bool) error {
	l, err := lender.Open(c)
	if err != nil {
		return err
	}
	held, err := l.LeasesOf(ctx, of)
	if err != nil {
		return err
	}
	var freed []string
	for _, lease := range held {
		if !lease.Linkless {
			continue
		}
		if _, err := l.Release(ctx, lease.Owner, lease.Addr); err != nil {
			return fmt.Errorf("%s: %w", lease.Holder(), err)
		}
		text := lease.Addr.String()
		if lease.Owner != c.Owner() { // of GC, whose line names no container
			text += " of " + lease.Holder()
		}
		freed = append(freed, text)
	}
	if freed != nil {
		c.Note("released", strings.Join(freed, ", "))
	}
	return nil
}

// check tells whether the container holds the addresses that its result says.
func check(ctx context.Context, c *cni.Call) error {
	l, err := lender.Open(c)
	if err != nil {
		return err
	}
	held, err := l.LeasesOf(ctx, func(owner string) bool { return owner == c.Owner() })
	if err != nil {
		return err
	}
	if len(held) == 0 {
		return cni.Errorf(types.ErrUnknownContainer, "interface %s of container %s holds no address", c.IfName, c.ContainerID)
	}
	prev, err := c.PrevResult()
	if err != nil {
		return err
	}
	return checkLeases(held, prev)
}

// checkLeases wants every lease in the result, which may have other addresses too.
func checkLeases(held []pool.Lease, prev *current.Result) error {
	told := map[netip.Addr]bool{}
	for _, ip := range prev.IPs {
		if addr, ok := netip.AddrFromSlice(ip.Address.IP); ok {
			told[addr.Unmap()] = true
		}
	}
	for _, lease := range held {
		if !told[lease.Addr] {
			return cni.Errorf(cni.CodeChanged, "the container holds %s, and prevResult does not say so", lease.Addr)
		}
	}
	return nil
}

func status(ctx context.Context, c *cni.Call) error {
	l, err := lender.Open(c)
	if err != nil {
		return err
	}
	_, err = l.CheckCanLend(ctx)
	return err
}
