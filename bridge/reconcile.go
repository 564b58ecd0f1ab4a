// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"
)

// Reconcile makes everything of ours stand as it should, whoever broke it, and
// finishes what a crash left. It returns a sentence for each thing it mended,
// none when all stood. It works on after an error, and returns all of them.
func (h *Host) Reconcile(ctx context.Context) (mended []string, err error) {
	unlock, err := h.lockExclusive(ctx, "reconcile")
	if err != nil {
		return nil, err
	}
	defer unlock()
	h.lookedOver()
	s, err := h.known()
	if err != nil {
		return nil, fmt.Errorf("reconcile: %w", err)
	}
	var errs []error
	if err := h.keepPorts(ctx); err != nil {
		errs = append(errs, fmt.Errorf("reconcile: %w", err))
	}
	for _, name := range s.names() {
		what, err := h.reconcile(ctx, name, s.Bridges[name])
		mended = append(mended, what...)
		if err != nil {
			errs = append(errs, fmt.Errorf("reconcile %s: %w", name, err))
		}
	}
	return mended, errors.Join(errs...)
}

// The plugin, or a timer, looks the host over each 30 s. Where there is neither,
// whoever attaches does: see Ensure.
const lookEvery = time.Minute

// lookTime bounds what a call that attaches gives to the host.
const lookTime = 5 * time.Second

// lookOver reconciles a host that nobody reconciles, and returns what it mended. Of
// many calls at once one does it; what ails, and who holds the lock, keeps no
// container away that can do without.
func (h *Host) lookOver(ctx context.Context) (mended []string) {
	if h.reconciled() {
		return nil
	}
	h.lookedOver()
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	mended, _ = h.Reconcile(ctx)
	return mended
}

// lookedOver notes that somebody looks the host over now. That it cannot be noted
// costs time and no more.
func (h *Host) lookedOver() {
	_ = os.WriteFile(h.path("reconciled"), nil, 0o600)
	_ = os.Chtimes(h.path("reconciled"), time.Now(), time.Now())
}

// reconciled tells whether somebody looks the host over.
func (h *Host) reconciled() bool {
	info, err := os.Stat(h.path("reconciled"))
	if err != nil {
		return false
	}
	age := time.Since(info.ModTime())
	return age >= 0 && age < lookEvery
}

func (s *hostState) names() []string {
	var out []string
	for name := range s.Bridges {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

func (h *Host) reconcile(ctx context.Context, name string, st *bridgeState) ([]string, error) {
	if st.Phase == leaving {
		if err := h.lower(ctx, name, st); err != nil {
			return nil, err
		}
		return []string{"the removal of " + name + " had not been finished"}, nil
	}
	m, err := h.raise(ctx, name, st)
	if m == nil {
		return nil, err
	}
	return m.mended, errors.Join(err, m.ailing)
}
