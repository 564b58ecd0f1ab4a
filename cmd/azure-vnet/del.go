// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/invoke"

	"azurevnet/bridge"
	"azurevnet/internal/cni"
	"azurevnet/internal/lender"
)

// del serves DEL: it removes the link, and then ends the lease. The owner alone says what belongs to the container. So
// DEL needs no namespace, no earlier result and no valid configuration.
func del(ctx context.Context, c *cni.Call) error {
	l, err := lender.Open(c)
	if err != nil {
		return err
	}
	attached, linked, err := l.Host.Attachment(ctx, c.Owner())
	if err != nil {
		return err
	}
	if linked {
		c.Note("link", attached.Link)
	}
	// The leases are ended whatever IPAM the configuration names now: at the time of ADD it may have been azure-vnet-ipam.
	if err := removeOwners(ctx, c, l, c.Owners()...); err != nil {
		return err
	}
	if !linked {
		if err := removeUpstreamLink(ctx, c, l); err != nil {
			return err
		}
	}
	if lendsHere(c) || c.Conf.IPAM.Type == "" {
		return nil
	}
	if !linked {
		sweepLinkless(ctx, c, l)
	}
	return delegateVerb(ctx, c, invoke.DelegateDel)
}

// removeOwners removes the owners' links, and then ends their leases. If one link cannot be removed, its owner keeps its
// lease, and the other owners are removed all the same.
//
// An owner may have a lease and no link: the link is gone with the container's namespace, or was never made. The
// routes and rules of such an owner may still stand. Without the link, nothing tells them from those of other owners.
// So the host is reconciled as a whole, once for all such owners.
func removeOwners(ctx context.Context, c *cni.Call, l *lender.Lender, owners ...string) error {
	leases, err := l.LeasesOf(ctx, func(owner string) bool { return slices.Contains(owners, owner) })
	if err != nil {
		return err
	}
	leased := map[string][]netip.Addr{}
	for _, lease := range leases {
		leased[lease.Owner] = append(leased[lease.Owner], lease.Addr)
	}
	var errs []error
	var detached, linkless []string // the owners with leases: their link was removed now, or was gone before
	var lost []netip.Addr           // the addresses of linkless
	for _, owner := range owners {
		_, linked, err := l.Host.Attachment(ctx, owner)
		if err == nil {
			err = l.Host.Detach(ctx, owner)
		}
		switch {
		case err != nil:
			errs = append(errs, err)
		case leased[owner] == nil:
		case linked:
			detached = append(detached, owner)
		default:
			linkless, lost = append(linkless, owner), append(lost, leased[owner]...)
		}
	}
	if len(lost) > 0 {
		reconcileHost(ctx, c, l)
		if err := l.Host.DeleteFlows(lost...); err != nil {
			errs, linkless = append(errs, err), nil // their flows would mislead the next containers, so the leases stay
		}
	}
	if gone := slices.Concat(detached, linkless); len(gone) > 0 {
		errs = append(errs, l.EndLeases(ctx, gone...))
	}
	return errors.Join(errs...)
}

// reconcileHost reconciles the whole host. If that fails, the call goes on: the next round mends what is left.
func reconcileHost(ctx context.Context, c *cni.Call, l *lender.Lender) {
	if _, err := l.Host.Reconcile(ctx); err != nil {
		c.Warn("reconcile the host: " + err.Error())
	}
}

// sweepLinkless removes the routes, rules and flows of a container whose link is gone and whose address another IPAM
// gave. That IPAM gives the address to another container as soon as its DEL was called, so sweepLinkless comes before.
// azure-vnet has no lease of the address: prevResult tells it, if the runtime sends one.
func sweepLinkless(ctx context.Context, c *cni.Call, l *lender.Lender) {
	reconcileHost(ctx, c, l)
	prev, err := c.PrevResult()
	if err != nil {
		return
	}
	for _, ip := range prev.IPs {
		if addr, ok := netip.AddrFromSlice(ip.Address.IP); ok {
			if err := l.Host.DeleteFlows(addr.Unmap()); err != nil {
				c.Warn(err.Error())
			}
		}
	}
}

// removeUpstreamLink removes the link by which Azure's own azure-vnet attached the container, if it did. A container that
// is older than this plugin's installation has such a link.
func removeUpstreamLink(ctx context.Context, c *cni.Call, l *lender.Lender) error {
	namespace, name, _ := strings.Cut(c.Pod, "/")
	link, err := l.Host.RemoveUpstreamLink(ctx, bridge.UpstreamContainer{
		Network: c.Conf.Network, ContainerID: c.ContainerID, IfName: c.IfName, PodNamespace: namespace, PodName: name, Netns: c.Netns,
	})
	if link != "" {
		c.Note("removed", link)
	}
	return err
}
