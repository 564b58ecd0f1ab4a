// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/invoke"

	"azurevnet/internal/cni"
	"azurevnet/internal/lender"
	"azurevnet/pool"
)

// gc serves GC: it removes every owner of the network that the runtime's list lacks, as DEL would. If one cannot be
// removed, the others are removed all the same. gc skips an interface that another call works on.
func gc(ctx context.Context, c *cni.Call) error {
	stale, err := c.Stale()
	if err != nil {
		return err
	}
	l, err := lender.Open(c)
	if err != nil {
		return err
	}
	if err := moveEarlierResults(); err != nil {
		c.Warn("look for what an earlier build attached: " + err.Error())
	}
	owners, err := listOwners(ctx, l, stale, c.AttachedByWord)
	if err != nil {
		return err
	}
	var mine []string
	for _, owner := range owners.stale {
		unlock, ok, err := cni.TryLockOwner("azure-vnet", owner)
		if err != nil {
			return err
		}
		if ok {
			defer unlock()
			mine = append(mine, owner)
		}
	}
	var errs []error
	if len(mine) > 0 {
		errs = append(errs, removeOwners(ctx, c, l, mine...))
		c.Note("collected", len(mine))
		c.Note("of", owners.nameSome(mine))
	}
	if !lendsHere(c) {
		if err := c.AddValid(owners.kept); err != nil {
			return errors.Join(append(errs, err)...)
		}
		errs = append(errs, delegateVerb(ctx, c, invoke.DelegateGC))
	}
	return errors.Join(errs...)
}

// gcOwners are the owners of leases and links, as GC sorts them.
type gcOwners struct {
	stale []string          // the runtime's list lacks them
	kept  []string          // the word attach attached them: no runtime lists them, and none may collect them
	pods  map[string]string // by owner: the pod; "" if it is not known
}

// listOwners lists the owners of the host's leases and links. A link whose alias has no room for the owner has the hash
// of the owner. Such a link is left out: the lease that azure-vnet gave has the owner itself. With another IPAM
// there is no such lease, and only DEL finds the link.
func listOwners(ctx context.Context, l *lender.Lender, stale, attached func(string) bool) (gcOwners, error) {
	leases, err := l.LeasesOf(ctx, func(string) bool { return true })
	if err != nil {
		return gcOwners{}, err
	}
	links, err := l.Host.Attachments(ctx)
	if err != nil {
		return gcOwners{}, fmt.Errorf("list what is attached: %w", err)
	}
	all := gcOwners{pods: map[string]string{}}
	for _, link := range links {
		if !strings.HasPrefix(link.Owner, "sha256:") {
			all.pods[link.Owner] = link.Pod
		}
	}
	for _, lease := range leases {
		all.pods[lease.Owner] = cmp.Or(lease.Pod, all.pods[lease.Owner])
	}
	for _, owner := range slices.Sorted(maps.Keys(all.pods)) {
		switch {
		case attached(owner) || stale(owner) && hasOurResult(owner):
			all.kept = append(all.kept, owner)
		case stale(owner):
			all.stale = append(all.stale, owner)
		}
	}
	return all, nil
}

// nameSome names owners for the log, with their pods. It names 20 at most, so that the line stays short.
func (all gcOwners) nameSome(some []string) string {
	const most = 20
	var names []string
	for _, owner := range some[:min(len(some), most)] {
		names = append(names, pool.Lease{Owner: owner, Pod: all.pods[owner]}.Holder())
	}
	if more := len(some) - most; more > 0 {
		names = append(names, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(names, ", ")
}
