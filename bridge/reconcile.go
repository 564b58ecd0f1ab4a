// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/vishvananda/netlink"

	"azurevnet/bridge/internal/rtnl"
)

// maxPasses bounds how often a round reads the host. The longest chain of repairs takes five passes: a
// half-made bridge is deleted, then made again, then host ends become its ports, then the ports get their
// flags, and the last pass finds nothing.
const maxPasses = 6

// Reconcile mends everything of ours that is not as it should be, whoever broke it, and finishes what a crash
// left. It returns a sentence for each thing that it mended, and none if nothing was broken. After an error it
// works on, and it returns all errors. On a host that has nothing of ours it does nothing, and makes no file.
func (h *Host) Reconcile(ctx context.Context) (mended []string, err error) {
	if used, err := h.inUse(); err != nil || !used {
		return nil, err
	}
	unlock, err := h.lockHost(ctx, "reconcile")
	if err != nil {
		return nil, err
	}
	defer unlock()
	h.noteRound()
	r := h.doRound(ctx)
	if err := errors.Join(r.hostErr, r.bearableErr); err != nil {
		return r.mended, fmt.Errorf("reconcile: %w", err)
	}
	return r.mended, nil
}

// round is what one round has done.
type round struct {
	mended      []string        // sentences, in the order of mending
	failed      map[string]bool // faults that could not be mended; they are not tried twice
	hostErr     error           // of faults without which no container can be attached
	bearableErr error           // of all other faults
}

// doRound makes everything stand as it should. The caller holds the host's lock. Each pass reads the host into a view,
// lists the view's faults and mends them, until a pass mends nothing. A quiet round is one pass. Firewalld's zones are
// read once for all passes, so that a bus that hangs is waited for once.
func (h *Host) doRound(ctx context.Context) *round {
	r := &round{failed: map[string]bool{}}
	zones := h.readZones(ctx)
	for range maxPasses {
		v, err := h.readView()
		if err != nil {
			r.hostErr, r.bearableErr = err, nil
			return r
		}
		v.zones = zones
		faults, err := h.listFaults(v)
		if err != nil {
			r.hostErr, r.bearableErr = err, nil
			return r
		}
		if !h.mendFaults(ctx, faults, r) {
			return r
		}
	}
	return r
}

// mendFaults mends the faults in their order, notes in r what it did, and reports whether the host has to be read again.
// It works on after a fault that it cannot mend, and stops when ctx ends. It does not try again what an earlier pass
// has tried. Two faults of one pass may have one text, such as two stray routes to one destination: both are mended.
func (h *Host) mendFaults(ctx context.Context, faults []fault, r *round) (again bool) {
	tried := maps.Clone(r.failed)
	for _, what := range r.mended {
		tried[what] = true
	}
	for _, f := range faults {
		if f.needsPerson() || tried[f.what] {
			continue
		}
		if err := ctx.Err(); err != nil {
			r.hostErr = errors.Join(r.hostErr, err)
			return false
		}
		err := h.beforeStep("mend: " + f.what)
		if err == nil {
			err = f.mend()
		}
		if err == nil {
			r.mended, again = append(r.mended, f.what), true
			continue
		}
		r.failed[f.what] = true
		if err = fmt.Errorf("%s: %w", f.what, err); f.bearable {
			r.bearableErr = errors.Join(r.bearableErr, err)
		} else {
			r.hostErr = errors.Join(r.hostErr, err)
		}
	}
	return again
}

// inUse reports whether the host has anything of ours, or anything was asked of it since its boot.
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

// roundEvery is how old the last round may be before a call that attaches does one itself. The plugin and the
// timer do a round every 30 s, so this matters only on a host with neither.
const roundEvery = time.Minute

// roundTime bounds how long a call that attaches spends on a round.
const roundTime = 5 * time.Second

// reconcileIfNobodyDoes does a round if no round ran for a minute, and returns what it mended. Of many calls at
// once, one does the round. An error of the round is not returned: the attach may work in spite of it, and
// fails by itself if not.
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

// noteRound sets the time of the last round. If that fails, the next attach does one round more.
func (h *Host) noteRound() {
	_ = os.WriteFile(h.path("reconciled"), nil, 0o600)
	_ = os.Chtimes(h.path("reconciled"), time.Now(), time.Now())
}

// roundIsRecent reports whether a round began less than a minute ago. A time in the future does not count: the
// clock was set back.
func (h *Host) roundIsRecent() bool {
	info, err := os.Stat(h.path("reconciled"))
	if err != nil {
		return false
	}
	age := time.Since(info.ModTime())
	return age >= 0 && age < roundEvery
}
