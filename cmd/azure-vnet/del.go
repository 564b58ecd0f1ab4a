// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/containernetworking/cni/pkg/invoke"

	"azurevnet/internal/cni"
)

// del takes the link away, then the lease. It asks for no namespace and no
// result of before: the owner tells what is the container's, and nothing else is.
func del(ctx context.Context, c *cni.Call) error {
	l, err := c.Lender()
	if err != nil {
		return err
	}
	// Whatever IPAM is configured now: it may have been ours at the time of ADD.
	if err := takeAway(ctx, c, l, c.Owner()); err != nil {
		return err
	}
	if own(c) || c.Conf.IPAM.Type == "" {
		return nil
	}
	return delegated(ctx, c, invoke.DelegateDel)
}

// takeAway takes owner's link away, then its lease. A link that went with the
// container's namespace, or was never made, cannot tell what else was made for
// it: then the whole host is looked over.
func takeAway(ctx context.Context, c *cni.Call, l *cni.Lender, owner string) error {
	held, err := l.Held(ctx, func(o string) bool { return o == owner })
	if err != nil {
		return err
	}
	_, linked, err := l.Host.Attachment(ctx, owner)
	if err != nil {
		return err
	}
	if err := l.Host.Detach(ctx, owner); err != nil {
		return err
	}
	if len(held) == 0 {
		return nil
	}
	if !linked {
		if _, err := l.Host.Reconcile(ctx); err != nil {
			c.Warn("look the host over: " + err.Error())
		}
		for _, lease := range held {
			if err := l.Host.Forget(lease.Addr); err != nil {
				return err
			}
		}
	}
	return l.Free(ctx, owner)
}

// gc does for all that is not listed what DEL would. One that fails keeps none
// of the others.
func gc(ctx context.Context, c *cni.Call) error {
	stale, err := c.Stale()
	if err != nil {
		return err
	}
	l, err := c.Lender()
	if err != nil {
		return err
	}
	owners, err := staleOwners(ctx, l, stale)
	if err != nil {
		return err
	}
	var errs []error
	for owner := range owners {
		errs = append(errs, takeAway(ctx, c, l, owner))
	}
	if len(owners) > 0 {
		c.Note("collected", len(owners))
	}
	if !own(c) {
		errs = append(errs, delegated(ctx, c, invoke.DelegateGC))
	}
	return errors.Join(errs...)
}

// staleOwners are those of leases and of links. An owner that did not fit its
// link stands there as a hash, and in the lease as it is.
func staleOwners(ctx context.Context, l *cni.Lender, stale func(string) bool) (map[string]bool, error) {
	leases, err := l.Held(ctx, stale)
	if err != nil {
		return nil, err
	}
	links, err := l.Host.Attachments(ctx)
	if err != nil {
		return nil, fmt.Errorf("list what is attached: %w", err)
	}
	owners := map[string]bool{}
	for _, lease := range leases {
		owners[lease.Owner] = true
	}
	for _, at := range links {
		if !strings.HasPrefix(at.Owner, "sha256:") && stale(at.Owner) {
			owners[at.Owner] = true
		}
	}
	return owners, nil
}

// status tells whether an ADD could succeed. A NIC that is in somebody's bridge goes
// before all other reasons, for nothing else helps there.
func status(ctx context.Context, c *cni.Call) error {
	l, err := c.Lender()
	if err != nil {
		return err
	}
	nic, err := addressable(ctx, c, l)
	var macs []string // none: the NICs that were asked for since the boot
	if nic != "" {
		macs = []string{nic}
	}
	if taken := l.Host.Ready(ctx, macs...); taken != nil {
		return taken
	}
	return err
}

// addressable is an error if no container can be given an address. nic is the MAC of
// the NIC that an ADD would take, empty if it is not known.
func addressable(ctx context.Context, c *cni.Call, l *cni.Lender) (nic string, err error) {
	if own(c) {
		return l.Ready(ctx)
	}
	nic, _, err = master(ctx, c, l.Host)
	return nic, errors.Join(err, delegated(ctx, c, invoke.DelegateStatus))
}
