// Copyright (c) The azure-vnet authors. MIT licence.

// Package upkeep keeps the leases and the links of a host in agreement. Its callers are the managed plugin and the
// timer, every 30 s, a CNI call that finds no free address, and both uninstalls. It knows neither Docker nor CNI, and
// logs nothing.
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

// LeaseOf returns the lease that an attachment proves.
func LeaseOf(link bridge.Attachment) pool.Lease {
	return pool.Lease{Addr: link.Addr.Addr(), Owner: link.Lease, Pod: link.Pod, MAC: link.NIC, Prefix: link.Addr}
}

// ProvenLeases returns a function that lists the leases that the host's links prove, for pool.Config.Links.
func ProvenLeases(host *bridge.Host) func(context.Context) ([]pool.Lease, error) {
	return func(ctx context.Context) ([]pool.Lease, error) {
		return leasesOf(ctx, host, func(bridge.Attachment) bool { return true })
	}
}

// leasesOf lists the leases that the wanted links prove.
func leasesOf(ctx context.Context, host *bridge.Host, wanted func(bridge.Attachment) bool) (leases []pool.Lease, err error) {
	all, err := host.Attachments(ctx)
	for _, link := range all {
		if wanted(link) {
			leases = append(leases, LeaseOf(link))
		}
	}
	return leases, err
}

// ReleaseLeaked ends the leases that no container has any more, and returns them. It also deletes the flows that the
// kernel still tracks of their addresses. On a host with containers of a former build it ends nothing and is an error:
// the links of these containers do not say who has which address.
func ReleaseLeaked(ctx context.Context, host *bridge.Host, addresses *pool.Pool) (released []pool.Lease, err error) {
	released, err = addresses.Collect(ctx, host.AddrsInContainers)
	for _, lease := range released {
		err = errors.Join(err, host.DeleteFlows(lease.Addr))
	}
	return released, err
}

// AdoptLost leases again the addresses that running containers have and nobody holds, and returns the new leases.
func AdoptLost(ctx context.Context, host *bridge.Host, addresses *pool.Pool) (adopted []pool.Lease, err error) {
	return addresses.AdoptLost(ctx, func(ctx context.Context) ([]pool.Lease, error) {
		return leasesOf(ctx, host, func(link bridge.Attachment) bool { return link.InContainer })
	})
}

// Reclaim takes the secondary addresses of the NICs off the host. While the host has such an address, it answers in the
// place of a container. Reclaim calls taken for each NIC that it took addresses from, with the NIC's MAC.
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

// PluginLock returns the path of the lock that the managed plugin holds while it runs. run is the host's /run.
func PluginLock(run string) string { return filepath.Join(run, "azure-vnet", "plugin.lock") }

// Removal says what an uninstall removes besides the state of bridge and pool.
type Removal struct {
	Run   string                // the host's /run, which has the directory of our state
	Keeps func(pool.Lease) bool // reports whether a linkless lease forbids the uninstall
	Files func() error          // removes the files that lie elsewhere
}

// Uninstall removes all bridges, rules and files, and returns the names of the bridges. It also removes a link that no
// container took, and a link that came back from a container.
//
// In each of these cases Uninstall removes nothing and is an error:
//
//   - A container is attached.
//   - A linkless address is held: without its lease it would be lent again.
//   - The managed plugin runs: it would make everything again.
//   - A bridge of a former build stands: the leases of its containers would be forgotten.
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
	if !slices.ContainsFunc(attached, func(link bridge.Attachment) bool { return link.InContainer }) { // if a container is attached, RemoveAll refuses and names it
		for _, link := range attached {
			if err := host.Detach(ctx, link.Owner); err != nil {
				return nil, err
			}
		}
	}
	return host.RemoveAll(ctx, func() error {
		if err := refuseLinkless(ctx, addresses, r.Keeps); err != nil { // an ADD may have come before the bridge's lock was taken
			return err
		}
		return errors.Join(r.Files(), os.RemoveAll(filepath.Join(r.Run, "azure-vnet")))
	})
}

// refuseLinkless is an error if a linkless lease is one that keeps. RemoveAll looks at the leases with links.
func refuseLinkless(ctx context.Context, addresses *pool.Pool, keeps func(pool.Lease) bool) error {
	all, err := addresses.Leases(ctx)
	if err != nil {
		return err
	}
	var linkless []string
	for _, lease := range all {
		if lease.Linkless && keeps(lease) {
			linkless = append(linkless, fmt.Sprintf("%s (%s)", lease.Holder(), lease.Addr))
		}
	}
	if len(linkless) == 0 {
		return nil
	}
	return fmt.Errorf("addresses are held that no link of azure-vnet shows: %s: end these containers first, so that their runtime calls DEL, and remove these networks of Docker's", strings.Join(linkless, ", "))
}
