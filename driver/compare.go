// Copyright (c) The azure-vnet authors. MIT licence.

package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"azurevnet/internal/statefile"
)

// missingAge is how long an engine must leave a network out of its lists before
// it is forgotten: longer than any CreateNetwork, after which the engine lists it.
const missingAge = time.Minute

// ForgetUnlisted takes the ids of all networks that the engine has, and forgets those
// that it has left out for a minute, in two lists at least: their DeleteNetwork
// was lost. It returns their ids, ascending. What a list left out is remembered
// in memory alone, so a restart only makes it wait longer.
func (d *Driver) ForgetUnlisted(ctx context.Context, listed map[string]bool) ([]string, error) {
	gone := map[string]Network{}
	err := d.changeNetworks(ctx, "compare networks", func(all map[string]Network) error {
		d.mu.Lock()
		defer d.mu.Unlock()
		now := time.Now()
		missing := map[string]time.Time{}
		for id, n := range all {
			since, before := d.missing[id]
			switch {
			case listed[id]:
			case !before:
				missing[id] = now
			case now.Sub(since) < missingAge:
				missing[id] = since
			default:
				gone[id] = n
			}
		}
		d.missing = missing
		if len(gone) == 0 {
			return statefile.ErrUnchanged
		}
		for id := range gone {
			delete(all, id)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	var errs []error
	for id, n := range gone {
		if err := d.releaseAux(ctx, n); err != nil {
			errs = append(errs, fmt.Errorf("network %.12s is no more: %w", id, err))
		}
	}
	return slices.Sorted(maps.Keys(gone)), errors.Join(errs...)
}

// unmarkMissing ends what Compare holds against a network: swarm creates one again
// by the same id.
func (d *Driver) unmarkMissing(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.missing, id)
}
