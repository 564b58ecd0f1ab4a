// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"slices"
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
