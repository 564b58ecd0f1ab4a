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

// missingAge is how long an engine's lists must lack a network before it is forgotten. An engine lists a network only
// after CreateNetwork, and no CreateNetwork takes that long.
const missingAge = time.Minute

// ForgetUnlisted forgets the networks that the engine does not have any more: the engine removed them while the plugin was
// away. listed has the ids of all networks in the engine's list. A network is forgotten when two lists or more, a minute
// apart, lack it. ForgetUnlisted returns the forgotten ids, ascending.
//
// The names of missing networks are in memory only. After a restart of the plugin the minute begins anew.
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

// unmarkMissing says that a network is not missing: it is being created. Swarm creates a network again by the same id.
func (d *Driver) unmarkMissing(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.missing, id)
}
