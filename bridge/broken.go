// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"slices"
	"time"

	"github.com/vishvananda/netlink"

	"azurevnet/bridge/internal/rtnl"
)

// brokenLockWait bounds how long Broken waits for calls that are changing the host.
const brokenLockWait = 3 * time.Second

// Broken returns a sentence for each fault, and changes nothing. The faults are those that Reconcile would
// mend, and those that only a person can mend. Broken holds the host's lock while it reads, because what
// another call has half made is not a fault. If it cannot get the lock, the error names the call that has it.
func (h *Host) Broken(ctx context.Context) ([]string, error) {
	var out []string
	taken := h.CheckReady(ctx)
	if taken != nil {
		out = append(out, taken.Error())
	}
	used, err := h.inUse()
	if err != nil || !used && taken != nil {
		return out, err
	}
	if !used {
		return h.faultsBeforeFirstUse()
	}
	faults, nics, err := h.faultsOfOurs(ctx)
	for _, what := range faults {
		if !slices.Contains(out, what) {
			out = append(out, what)
		}
	}
	return append(out, upstreamRules(nics)...), err
}

// faultsOfOurs returns the faults of a host that something was asked of, and the NICs that it was asked of.
func (h *Host) faultsOfOurs(ctx context.Context) (out []string, nics []netlink.Link, err error) {
	wait, cancel := context.WithTimeout(ctx, brokenLockWait)
	defer cancel()
	unlock, err := h.lockHost(wait, "look for what is broken")
	if err != nil {
		return nil, nil, err
	}
	defer unlock()
	v, err := h.readView()
	if err != nil {
		return nil, nil, err
	}
	v.zones = h.readZones(ctx)
	all, err := h.listFaults(v)
	for _, e := range v.endpoints {
		all = append(all, e.containerFaults()...)
	}
	for _, f := range all {
		out = append(out, f.what)
	}
	for _, mac := range v.macs() {
		if nic := v.nics[mac]; nic != nil {
			nics = append(nics, nic)
		}
	}
	return out, nics, err
}

// faultsBeforeFirstUse returns what would be in the way of the first container of a host that nothing was asked
// of yet.
func (h *Host) faultsBeforeFirstUse() (out []string, err error) {
	links, err := rtnl.ReadLinks()
	if err != nil {
		return nil, err
	}
	if l := links.ByName(firstBridge); l != nil {
		out = append(out, refuseNamesake(links, l).Error())
	}
	primary, err := defaultRouteLink()
	if err != nil {
		return out, err
	}
	if nic := links.ByIndex(primary); nic != nil {
		out = append(out, upstreamRules([]netlink.Link{nic})...)
	}
	return out, nil
}
