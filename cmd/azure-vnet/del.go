// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"

	"azurevnet/bridge"
	"azurevnet/internal/cni"
	"azurevnet/internal/lender"
	"azurevnet/pool"
)

// del takes the link away, then the lease. It asks for no namespace and no
// result of before: the owner tells what is the container's, and nothing else is.
func del(ctx context.Context, c *cni.Call) error {
	l, err := lender.Open(c)
	if err != nil {
		return err
	}
	at, linked, err := l.Host.Attachment(ctx, c.Owner())
	if err != nil {
		return err
	}
	if linked {
		c.Note("link", at.Link)
	}
	// Whatever IPAM is configured now: it may have been ours at the time of ADD.
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

// sweepLinkless takes away what a link left that went with its container's namespace, and that no lease of ours tells of: the
// other IPAM gives the address to another container as soon as it is told of the end.
func sweepLinkless(ctx context.Context, c *cni.Call, l *lender.Lender) {
	if _, err := l.Host.Reconcile(ctx); err != nil {
		c.Warn("look the host over: " + err.Error())
	}
	prev, err := c.PrevResult()
	if err != nil {
		return // it need not be told
	}
	for _, ip := range prev.IPs {
		if addr, ok := netip.AddrFromSlice(ip.Address.IP); ok {
			if err := l.Host.DeleteFlows(addr.Unmap()); err != nil {
				c.Warn(err.Error())
			}
		}
	}
}

// removeUpstreamLink takes away what Azure's own azure-vnet attached the container to, if it
// did: the container is older than this plugin's installation.
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

// removeOwners takes the owners' links away, then their leases. One that fails keeps none of
// the others, and keeps its lease. A link that went with the container's namespace, or
// was never made, cannot tell what else was made for it: then the whole host is looked
// over, once for all of them.
func removeOwners(ctx context.Context, c *cni.Call, l *lender.Lender, owners ...string) error {
	held, err := l.LeasesOf(ctx, func(owner string) bool { return slices.Contains(owners, owner) })
	if err != nil {
		return err
	}
	leased := map[string][]netip.Addr{}
	for _, lease := range held {
		leased[lease.Owner] = append(leased[lease.Owner], lease.Addr)
	}
	var errs []error
	var linked, linkless []string // owners with leases whose link is gone now, or was before
	var lost []netip.Addr         // of the latter
	for _, owner := range owners {
		_, found, err := l.Host.Attachment(ctx, owner)
		if err == nil {
			err = l.Host.Detach(ctx, owner)
		}
		switch {
		case err != nil:
			errs = append(errs, err)
		case leased[owner] == nil:
		case found:
			linked = append(linked, owner)
		default:
			linkless, lost = append(linkless, owner), append(lost, leased[owner]...)
		}
	}
	if len(lost) > 0 {
		if _, err := l.Host.Reconcile(ctx); err != nil {
			c.Warn("look the host over: " + err.Error())
		}
		if err := l.Host.DeleteFlows(lost...); err != nil {
			errs, linkless = append(errs, err), nil
		}
	}
	if gone := slices.Concat(linked, linkless); len(gone) > 0 {
		errs = append(errs, l.EndLeases(ctx, gone...))
	}
	return errors.Join(errs...)
}

// gc does for all that is not listed what DEL would. One that fails keeps none
// of the others. An interface that another call works on is left to that call.
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
	all, err := listOwners(ctx, l, stale, c.IsAttached)
	if err != nil {
		return err
	}
	var mine []string
	for _, owner := range all.gone {
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
		c.Note("of", all.nameSome(mine))
	}
	if !lendsHere(c) {
		if err := c.AddValid(all.kept); err != nil {
			return errors.Join(append(errs, err)...)
		}
		errs = append(errs, delegateVerb(ctx, c, invoke.DelegateGC))
	}
	return errors.Join(errs...)
}

// gcOwners are those of leases and of links, as a GC finds them.
type gcOwners struct {
	gone []string          // stale
	kept []string          // of the word attach, which no runtime knows and may collect
	pods map[string]string // by owner, as far as they are known; of the others ""
}

// listOwners lists them. An owner that did not fit its link stands there as a hash, and in
// the lease as it is.
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
	for _, at := range links {
		if !strings.HasPrefix(at.Owner, "sha256:") {
			all.pods[at.Owner] = at.Pod
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
			all.gone = append(all.gone, owner)
		}
	}
	return all, nil
}

// nameSome names some owners in the log, with their pods: not more than a line has room for.
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

// status tells whether an ADD could succeed. A process that may not change the network goes
// before all other reasons, and then a NIC that is in somebody's bridge, for nothing else helps
// there. So does a bridge of others that has the name of the NIC's.
func status(ctx context.Context, c *cni.Call) error {
	l, err := lender.Open(c)
	if err != nil {
		return err
	}
	if err := l.Host.CheckPermitted(); err != nil {
		return err
	}
	nic, primary, err := checkCanAddress(ctx, c, l)
	var macs []string // none: the NICs that were asked for since the boot
	if nic != "" {
		macs = []string{nic}
	}
	if taken := l.Host.CheckReady(ctx, macs...); taken != nil {
		return taken
	}
	if nic != "" {
		if bad := l.Host.CheckPresent(ctx, nic); bad != nil {
			return cni.Errorf(types.ErrPluginNotAvailable, "%v", bad)
		}
	}
	if nic != "" && c.Conf.Mode != cni.ModeTransparent {
		_, bad := l.Host.BridgeName(ctx, bridge.Spec{MAC: nic, Name: c.Conf.Bridge, Primary: primary})
		if errors.Is(bad, bridge.ErrNameTaken) {
			return bad
		}
	}
	if err != nil {
		return err
	}
	return checkChained(ctx, c)
}

// checkCanAddress is an error if no container can be given an address. nic is the MAC of
// the NIC that an ADD would take, empty if it is not known, and primary whether it is
// the VM's primary one.
func checkCanAddress(ctx context.Context, c *cni.Call, l *lender.Lender) (nic string, primary bool, err error) {
	if lendsHere(c) {
		nic, err = l.CheckCanLend(ctx)
		nics, _ := l.KnownNICs(ctx) // none: then err says why
		primary = slices.ContainsFunc(nics, func(n pool.NIC) bool { return n.MAC == nic && n.Primary })
		return nic, primary, err
	}
	nic, primary, err = findMaster(ctx, c, l.Host)
	return nic, primary, errors.Join(err, delegateVerb(ctx, c, invoke.DelegateStatus))
}
