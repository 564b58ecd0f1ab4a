// Copyright (c) The azure-vnet authors. MIT licence.

// Package upkeep keeps the addresses and the links of a host in agreement, whoever asks for it:
// the managed plugin and a timer every 30 s, a CNI call that finds no free address, an uninstall.
// It knows neither Docker nor CNI, and logs nothing.
package upkeep

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"azurevnet/bridge"
	"azurevnet/internal/statefile"
	"azurevnet/pool"
)

// LeaseOf is the lease that a link proves.
func LeaseOf(at bridge.Attachment) pool.Lease {
	return pool.Lease{Addr: at.Addr.Addr(), Owner: at.Lease, Pod: at.Pod, MAC: at.NIC, Prefix: at.Addr}
}

// ProvenLeases lists the leases that the host's links prove: see pool.Config.Links.
func ProvenLeases(host *bridge.Host) func(context.Context) ([]pool.Lease, error) {
	return func(ctx context.Context) ([]pool.Lease, error) {
		return leasesOf(ctx, host, func(bridge.Attachment) bool { return true })
	}
}

func leasesOf(ctx context.Context, host *bridge.Host, want func(bridge.Attachment) bool) (leases []pool.Lease, err error) {
	all, err := host.Attachments(ctx)
	for _, at := range all {
		if want(at) {
			leases = append(leases, LeaseOf(at))
		}
	}
	return leases, err
}

// ReleaseLeaked ends the leases that no container has any more, and deletes what the host still has of their
// addresses. It ends no lease on a host with containers of a former build, whose links cannot be read.
func ReleaseLeaked(ctx context.Context, host *bridge.Host, addresses *pool.Pool) (released []pool.Lease, err error) {
	released, err = addresses.Collect(ctx, host.AddrsInContainers)
	for _, lease := range released {
		err = errors.Join(err, host.DeleteFlows(lease.Addr))
	}
	return released, err
}

// AdoptLost leases again the addresses that running containers have and nobody holds.
func AdoptLost(ctx context.Context, host *bridge.Host, addresses *pool.Pool) (adopted []pool.Lease, err error) {
	return addresses.AdoptLost(ctx, func(ctx context.Context) ([]pool.Lease, error) {
		return leasesOf(ctx, host, func(at bridge.Attachment) bool { return at.InContainer })
	})
}

// Reclaim takes the secondary addresses of the NICs off the host. The host would answer in the place of a
// container that has such an address. Reclaim calls taken for each NIC that it took addresses from.
func Reclaim(ctx context.Context, host *bridge.Host, nics []pool.NIC, taken func(nic string, addrs []netip.Addr)) error {
	for _, nic := range nics {
		addrs, err := host.Reclaim(ctx, nic.MAC, nic.Secondaries())
		if len(addrs) > 0 {
			taken(nic.MAC, addrs)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// PluginLock is the lock that the managed plugin holds while it runs. run is the host's /run.
func PluginLock(run string) string { return filepath.Join(run, "azure-vnet", "plugin.lock") }

// Removal says what an uninstall removes besides what the host and its pool have.
type Removal struct {
	Run   string                // the host's /run, with our directory of state
	Keeps func(pool.Lease) bool // of a lease that no link proves: it keeps everything
	Files func() error          // removes the files that lie elsewhere
}

// Uninstall removes all bridges, rules and files, and returns the names of the bridges. A link that no
// container took, or that came back from a container, is removed too.
//
// Uninstall removes nothing, and is an error, in each of these cases. A container is attached. An address is
// held that no link proves, and would be lent again. The managed plugin runs, and would make everything
// again. A bridge of a former build stands, and the leases of its containers would be forgotten.
func Uninstall(ctx context.Context, host *bridge.Host, addresses *pool.Pool, r Removal) (removed []string, err error) {
	unlock, ok, err := statefile.TryLock(PluginLock(r.Run), "uninstall")
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, errors.New("the managed Docker plugin runs, and would make it all again: docker plugin disable -f azure-vnet:latest first, or make uninstall")
	}
	defer unlock()
	if _, err := host.AddrsInContainers(ctx); err != nil {
		return nil, err
	}
	if err := refuseLinkless(ctx, addresses, r.Keeps); err != nil {
		return nil, err
	}
	attached, err := host.Attachments(ctx)
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(attached, func(at bridge.Attachment) bool { return at.InContainer }) { // else RemoveAll refuses, and names them
		for _, at := range attached {
			if err := host.Detach(ctx, at.Owner); err != nil {
				return nil, err
			}
		}
	}
	return host.RemoveAll(ctx, func() error {
		if err := refuseLinkless(ctx, addresses, r.Keeps); err != nil { // an ADD may have come before the lock
			return err
		}
		return errors.Join(r.Files(), os.RemoveAll(filepath.Join(r.Run, "azure-vnet")))
	})
}

// refuseLinkless is an error while addresses are lent that no link proves. The others are their links',
// which RemoveAll looks at.
func refuseLinkless(ctx context.Context, addresses *pool.Pool, keeps func(pool.Lease) bool) error {
	all, err := addresses.Leases(ctx)
	if err != nil {
		return err
	}
	var held []string
	for _, lease := range all {
		if lease.Linkless && keeps(lease) {
			held = append(held, fmt.Sprintf("%s (%s)", lease.Holder(), lease.Addr))
		}
	}
	if len(held) == 0 {
		return nil
	}
	return fmt.Errorf("addresses are held that no link of azure-vnet shows: %s: end these containers first, so that their runtime calls DEL, and remove these networks of Docker's", strings.Join(held, ", "))
}
