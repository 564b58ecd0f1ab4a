// Copyright (c) The azure-vnet authors. MIT licence.

// Package lender lends addresses to the calls of both CNI plugins. It opens the pool that a call's configuration
// describes, and makes room in it when no address is free. It does not attach containers: that is package main of
// cmd/azure-vnet.
package lender

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"azurevnet/bridge"
	"azurevnet/internal/cni"
	"azurevnet/internal/upkeep"
	"azurevnet/pool"
)

// Lender is the pool that one call lends from, with the host whose links prove the leases.
type Lender struct {
	Pool *pool.Pool
	Host *bridge.Host
	call *cni.Call
}

// Open opens the pool that the call's configuration describes. It does no I/O. Its error has the code of a wrong
// configuration.
func Open(c *cni.Call) (*Lender, error) {
	host := bridge.New(bridge.Config{})
	p, err := pool.New(pool.Config{
		Dir: cni.StateDir, Source: c.Conf.IPAM.Source, QueryURL: c.Conf.IPAM.QueryURL, QueryInterval: c.Conf.IPAM.Interval,
		Reclaim: c.Conf.Reclaim, Links: upkeep.ProvenLeases(host),
	})
	if err != nil {
		return nil, cni.Errorf(types.ErrInvalidNetworkConfig, "the configuration of network %s: %v", c.Conf.Network, err)
	}
	return &Lender{Pool: p, Host: host, call: c}, nil
}

// LeasesOf lists the leases whose owner is wanted, by address. It asks no source.
func (l *Lender) LeasesOf(ctx context.Context, wanted func(owner string) bool) ([]pool.Lease, error) {
	all, err := l.Pool.Leases(ctx)
	return slices.DeleteFunc(all, func(lease pool.Lease) bool { return !wanted(lease.Owner) }), err
}

// master returns the MAC of the NIC that the configuration names with "master". It is "" if the configuration names
// none: then any NIC will do.
func (l *Lender) master(ctx context.Context) (mac string, err error) {
	if l.call.Conf.Master == "" {
		return "", nil
	}
	if _, mac, err = l.Host.NIC(ctx, l.call.Conf.Master); err != nil {
		return "", cni.Errorf(types.ErrInvalidNetworkConfig, "master: %v", err)
	}
	return mac, nil
}

// Lend leases an address to the call's owner. The address is one of the NIC that the configuration names, or else of
// the first NIC that has the subnet. linkless says that no link of the host will prove the lease.
//
// If no address is free, Lend first frees the addresses that leaked, and those that the host holds and should not. A
// CNI host may have no plugin that does so in the background.
func (l *Lender) Lend(ctx context.Context, linkless bool) (pool.Lease, error) {
	c := l.call
	mac, err := l.master(ctx)
	if err != nil {
		return pool.Lease{}, err
	}
	r := pool.Request{Owner: c.Owner(), MAC: mac, Prefix: c.Conf.IPAM.Subnet, Addr: c.Conf.Addr, Pod: c.Pod, Linkless: linkless}
	lease, err := l.leaseForOwner(ctx, r)
	if errors.Is(err, pool.ErrExhausted) || errors.Is(err, pool.ErrNotOurs) && c.Conf.Reclaim {
		freed, bad := l.freeAddresses(ctx)
		if bad != nil {
			return lease, errors.Join(err, bad)
		}
		if freed {
			lease, err = l.leaseForOwner(ctx, r)
		}
	}
	if c.Conf.AddrBy != "" && (errors.Is(err, pool.ErrInUse) || errors.Is(err, pool.ErrNotOurs)) {
		err = fmt.Errorf("%s asks for %s: %w", c.Conf.AddrBy, c.Conf.Addr, err)
	}
	if err != nil {
		return lease, err
	}
	c.Note("address", lease.Addr.String())
	if lease.Early {
		c.Warn("the address was released a moment ago and is lent again, for no other is left: give the NIC more ipconfigs")
	}
	return lease, nil
}

// leaseForOwner leases an address. Its error names the owner, and so the container.
func (l *Lender) leaseForOwner(ctx context.Context, r pool.Request) (pool.Lease, error) {
	lease, err := l.Pool.Lease(ctx, r)
	if err != nil {
		return pool.Lease{}, fmt.Errorf("lease for %s: %w", r.Owner, err)
	}
	return lease, nil
}

// Confirm is pool.Confirm. Its error names the address and the owner.
func (l *Lender) Confirm(ctx context.Context, lease pool.Lease) error {
	if err := l.Pool.Confirm(ctx, lease); err != nil {
		return fmt.Errorf("confirm %s for %s: %w", lease.Addr, lease.Owner, err)
	}
	return nil
}

// Return is pool.Return, and a success too if the lease has ended. Its error names the address and the owner.
func (l *Lender) Return(ctx context.Context, lease pool.Lease) error {
	if _, err := l.Pool.Return(ctx, lease); err != nil {
		return fmt.Errorf("return %s of %s: %w", lease.Addr, lease.Owner, err)
	}
	return nil
}

// Release is pool.Release, and a success too if the owner does not hold the address. Its error names both.
func (l *Lender) Release(ctx context.Context, owner string, addr netip.Addr) error {
	if _, err := l.Pool.Release(ctx, owner, addr); err != nil {
		return fmt.Errorf("release %s of %s: %w", addr, owner, err)
	}
	return nil
}

// freeAddresses ends leaked leases. If the configuration says reclaim, it also takes secondary addresses off the
// host's NICs. freed reports whether a lease may find an address now: a lease ended, an address left a NIC, or the
// round mended something. A mended fault may be a route that kept an address from being lent.
func (l *Lender) freeAddresses(ctx context.Context) (freed bool, err error) {
	leaked, err := upkeep.ReleaseLeaked(ctx, l.Host, l.Pool)
	for _, lease := range leaked {
		l.call.Warn(fmt.Sprintf("%s was held by %s, which has no link any more: released", lease.Addr, lease.Holder()))
	}
	freed = len(leaked) > 0
	if freed || l.someAreRouted(ctx) {
		round, cancel := context.WithTimeout(ctx, reconcileTime)
		defer cancel()
		mended, bad := l.Host.Reconcile(round)
		if bad != nil {
			l.call.Warn("reconcile the host: " + bad.Error())
		}
		freed = freed || len(mended) > 0
	}
	if err != nil || !l.call.Conf.Reclaim {
		return freed, err
	}
	nics, err := l.Pool.NICs(ctx)
	if err != nil {
		return false, err
	}
	err = upkeep.Reclaim(ctx, l.Host, nics, func(nic string, addrs []netip.Addr) {
		freed = true
		l.call.Warn(fmt.Sprintf("took %v off the host's NIC %s", addrs, nic))
	})
	return freed, err
}

// reconcileTime bounds the round of a call that finds no free address. The round holds the bridge's lock. Calls that would
// free an address wait for this lock.
const reconcileTime = 5 * time.Second

// someAreRouted reports whether a route of the host leads to an address that nobody leases. Such an address is not lent. A
// crash may have left the route, or a DEL whose Reconcile failed.
func (l *Lender) someAreRouted(ctx context.Context) bool {
	nics, _ := l.Pool.CountIPConfigs(ctx) // if the counts cannot be read, the lease has failed for the same reason
	return slices.ContainsFunc(nics, func(nic pool.NICStatus) bool {
		return slices.ContainsFunc(nic.Subnets, func(s pool.SubnetStatus) bool { return s.Routed > 0 })
	})
}

// EndLeases releases all addresses that the owners hold, and notes them in the call's log line. It is a success if they
// hold none.
func (l *Lender) EndLeases(ctx context.Context, owners ...string) error {
	addrs, err := l.Pool.ReleaseOwners(ctx, owners...)
	if len(addrs) > 0 {
		l.call.Note("released", fmt.Sprint(addrs))
	}
	return err
}

// Result returns a lease as the result of an IPAM plugin: the address, its gateway and a default route.
func Result(lease pool.Lease) *current.Result {
	gateway := net.IP(lease.Prefix.Addr().Next().AsSlice()) // Azure's gateway is the first address of the subnet
	address := IPNet(netip.PrefixFrom(lease.Addr, lease.Prefix.Bits()))
	return &current.Result{
		IPs:    []*current.IPConfig{{Address: address, Gateway: gateway}},
		Routes: []*types.Route{{Dst: IPNet(netip.PrefixFrom(netip.IPv4Unspecified(), 0)), GW: gateway}},
	}
}

// IPNet returns an IPv4 prefix as package net has it. It keeps the host bits.
func IPNet(p netip.Prefix) net.IPNet {
	return net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}
}
