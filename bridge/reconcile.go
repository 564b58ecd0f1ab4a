// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/vishvananda/netlink"

	"azurevnet/bridge/internal/rtnl"
)

// maxPasses bounds how often a round reads and mends. A bridge that is half made is deleted, then
// made, then its ports are plugged in, then their flags are set, and the last pass finds nothing.
const maxPasses = 6

// mendHost makes everything stand as it should, and says what it mended. The caller holds the
// lock. It works on after an error. hostErr is of what containers cannot do without, and bearableErr
// of the rest.
func (h *Host) mendHost(ctx context.Context) (mended []string, hostErr, bearableErr error) {
	failed := map[string]bool{}
	z := h.readZones(ctx)
	for range maxPasses {
		v, err := h.readView()
		if err != nil {
			return mended, err, nil
		}
		all, err := h.listFaults(v, z)
		if err != nil {
			return mended, err, nil
		}
		did := false
		for _, f := range all {
			if f.mend == nil || failed[f.what] || slices.Contains(mended, f.what) {
				continue
			}
			if err := ctx.Err(); err != nil {
				return mended, errors.Join(hostErr, err), bearableErr
			}
			err := h.beforeStep("mend: " + f.what)
			if err == nil {
				err = f.mend()
			}
			if err != nil {
				failed[f.what] = true
				if err = fmt.Errorf("%s: %w", f.what, err); f.bearable {
					bearableErr = errors.Join(bearableErr, err)
				} else {
					hostErr = errors.Join(hostErr, err)
				}
				continue
			}
			mended, did = append(mended, f.what), true
		}
		if !did {
			break
		}
	}
	return mended, hostErr, bearableErr
}

// Reconcile makes everything of ours stand as it should, whoever broke it, and finishes what a
// crash left. It returns a sentence for each thing that it mended, none when all stood. It works
// on after an error, and returns all of them.
func (h *Host) Reconcile(ctx context.Context) (mended []string, err error) {
	if used, err := h.inUse(); err != nil || !used {
		return nil, err // nor is a lock made on a host that has nothing of ours
	}
	unlock, err := h.lockHost(ctx, "reconcile")
	if err != nil {
		return nil, err
	}
	defer unlock()
	h.noteRound()
	mended, hostErr, bearableErr := h.mendHost(ctx)
	if err := errors.Join(hostErr, bearableErr); err != nil {
		return mended, fmt.Errorf("reconcile: %w", err)
	}
	return mended, nil
}

// inUse reports whether anything of ours stands or was asked for since the boot.
func (h *Host) inUse() (bool, error) {
	s, err := h.readState()
	if err != nil || s.isAsked() {
		return err == nil, err
	}
	links, err := rtnl.ReadLinks()
	return slices.ContainsFunc(links, func(l netlink.Link) bool {
		_, bridge := bridgeAliasOf(l)
		_, end := endpointAliasOf(l)
		return bridge || end || halfMade(l)
	}), err
}

// brokenLockWait bounds how long Broken waits for those who are changing the host.
const brokenLockWait = 3 * time.Second

// Broken names what is not as it should be, in sentences, and changes nothing: what Reconcile
// would mend, and what only a person can. It holds the lock meanwhile, since what is half made
// is not broken. The error names who keeps it waiting.
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

// faultsOfOurs names the faults, and returns the NICs that something was asked of.
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
	all, err := h.listFaults(v, h.readZones(ctx))
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

// faultsBeforeFirstUse names what would be in the way of the first container of a host, of which nothing is asked yet.
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

// The plugin, or a timer, reconciles every 30 s. Where there is neither, whoever attaches does:
// see Ensure.
const roundEvery = time.Minute

// roundTime bounds what a call that attaches spends on a round.
const roundTime = 5 * time.Second

// reconcileIfNobodyDoes reconciles a host that nobody reconciles, and returns what it mended. Of
// many calls at once one does it. Its failure keeps no container away that can do without.
func (h *Host) reconcileIfNobodyDoes(ctx context.Context) (mended []string) {
	if used, err := h.inUse(); err != nil || !used || h.roundIsRecent() {
		return nil
	}
	h.noteRound()
	ctx, cancel := context.WithTimeout(ctx, roundTime)
	defer cancel()
	mended, _ = h.Reconcile(ctx)
	return mended
}

// noteRound notes that a round runs now. Where it cannot be noted, the next call costs more.
func (h *Host) noteRound() {
	_ = os.WriteFile(h.path("reconciled"), nil, 0o600)
	_ = os.Chtimes(h.path("reconciled"), time.Now(), time.Now())
}

func (h *Host) roundIsRecent() bool {
	info, err := os.Stat(h.path("reconciled"))
	if err != nil {
		return false
	}
	age := time.Since(info.ModTime())
	return age >= 0 && age < roundEvery
}
