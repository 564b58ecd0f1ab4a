// Copyright (c) The azure-vnet authors. MIT licence.

package cni

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
	"azurevnet/internal/upkeep"
	"azurevnet/pool"
)

// stateDir is where the processes of the host meet: see pool.Config.
const stateDir = "/run/azure-vnet"

// undoTime bounds the way back from a failed call, whose own time may be up.
const undoTime = 10 * time.Second

// Undo is a context for the way back.
func Undo(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), undoTime)
}

// Lender is the pool as a call lends from it, with the host's links, which prove
// leases and show leaks.
type Lender struct {
	*pool.Pool
	Host *bridge.Host
	call *Call
}

// Lender opens the pool that the call's configuration describes. It does no I/O.
func (c *Call) Lender() (*Lender, error) {
	host := bridge.New(bridge.Config{})
	p, err := pool.New(pool.Config{
		Dir: stateDir, Source: c.Conf.IPAM.Source, QueryURL: c.Conf.IPAM.QueryURL, QueryInterval: c.Conf.IPAM.Interval,
		Reclaim: c.Conf.Reclaim, Links: upkeep.ProvenLeases(host),
	})
	if err != nil {
		return nil, wrong(types.ErrInvalidNetworkConfig, "the configuration of network %s: %v", c.Conf.Network, err)
	}
	return &Lender{p, host, c}, nil
}

// Held lists the leases of owners that want chooses.
func (l *Lender) Held(ctx context.Context, want func(owner string) bool) ([]pool.Lease, error) {
	all, err := l.Leases(ctx)
	return slices.DeleteFunc(all, func(held pool.Lease) bool { return !want(held.Owner) }), err
}

// master is the MAC of the NIC that the configuration names; empty: any.
func (l *Lender) master(ctx context.Context) (mac string, err error) {
	if l.call.Conf.Master == "" {
		return "", nil
	}
	if _, mac, err = l.Host.NIC(ctx, l.call.Conf.Master); err != nil {
		return "", wrong(types.ErrInvalidNetworkConfig, "master: %v", err)
	}
	return mac, nil
}

// Lend lends the call's owner an address of the NIC that is named, or of the
// first that has the subnet. Where none is free, what leaked and what the host
// should not hold is freed first: on a host without our daemon, who needs an
// address is who heals.
func (l *Lender) Lend(ctx context.Context, linkless bool) (pool.Lease, error) {
	c := l.call
	mac, err := l.master(ctx)
	if err != nil {
		return pool.Lease{}, err
	}
	r := pool.Request{Owner: c.Owner(), MAC: mac, Prefix: c.Conf.IPAM.Subnet, Addr: c.Conf.Addr, Pod: c.Pod, Linkless: linkless}
	lease, err := l.Pool.Lease(ctx, r)
	if errors.Is(err, pool.ErrExhausted) || errors.Is(err, pool.ErrNotOurs) && c.Conf.Reclaim {
		freed, bad := l.free(ctx)
		if bad != nil {
			return lease, errors.Join(err, bad)
		}
		if freed {
			lease, err = l.Pool.Lease(ctx, r)
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

// free ends leaked leases and, where that is wished, takes secondary addresses
// off the host. It tells whether there were any.
func (l *Lender) free(ctx context.Context) (freed bool, err error) {
	leaked, err := upkeep.Release(ctx, l.Host, l.Pool)
	for _, lost := range leaked {
		l.call.Warn(fmt.Sprintf("%s was held by %s, which has no link any more: released", lost.Addr, lost.Holder()))
	}
	freed = len(leaked) > 0
	if freed || l.someAreLed(ctx) {
		round, cancel := context.WithTimeout(ctx, roundTime)
		defer cancel()
		mended, bad := l.Host.Reconcile(round)
		if bad != nil {
			l.call.Warn("look the host over: " + bad.Error())
		}
		freed = freed || len(mended) > 0
	}
	if err != nil || !l.call.Conf.Reclaim {
		return freed, err
	}
	nics, err := l.NICs(ctx)
	if err != nil {
		return false, err
	}
	err = upkeep.Reclaim(ctx, l.Host, nics, func(nic string, addrs []netip.Addr) {
		freed = true
		l.call.Warn(fmt.Sprintf("took %v off the host's NIC %s", addrs, nic))
	})
	return freed, err
}

// roundTime bounds the round of a call that finds no free address. The round holds the bridge's lock. Calls that would
// free an address wait for this lock.
const roundTime = 5 * time.Second

// someAreLed reports whether a route of the host leads to an address that nobody leases. Such an address is not lent. A
// crash may have left the route, or a DEL whose Reconcile failed.
func (l *Lender) someAreLed(ctx context.Context) bool {
	nics, _ := l.Counts(ctx) // unreadable: the lease said so
	return slices.ContainsFunc(nics, func(nic pool.NICStatus) bool {
		return slices.ContainsFunc(nic.Subnets, func(s pool.SubnetStatus) bool { return s.Led > 0 })
	})
}

// Free releases all that the owners hold. None is success.
func (l *Lender) Free(ctx context.Context, owners ...string) error {
	addrs, err := l.ReleaseOwners(ctx, owners...)
	if len(addrs) > 0 {
		l.call.Note("released", fmt.Sprint(addrs))
	}
	return err
}

// Result is a lease as an IPAM plugin tells it.
func Result(l pool.Lease) *current.Result {
	gateway := net.IP(l.Prefix.Addr().Next().AsSlice())
	return &current.Result{
		IPs:    []*current.IPConfig{{Address: ipNet(netip.PrefixFrom(l.Addr, l.Prefix.Bits())), Gateway: gateway}},
		Routes: []*types.Route{{Dst: net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, GW: gateway}},
	}
}

func ipNet(p netip.Prefix) net.IPNet {
	return net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
