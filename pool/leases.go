// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
)

// Leases lists all leases, by address. It asks no source.
func (p *Pool) Leases(ctx context.Context) ([]Lease, error) {
	s, err := p.readState(ctx, "list leases")
	if err == nil && p.needsAdoption(&s) {
		if err = p.adoptLinks(ctx); err == nil {
			s, err = p.readState(ctx, "list leases")
		}
	}
	if err != nil {
		return nil, fmt.Errorf("list leases: %w", err)
	}
	var all []Lease
	for _, addr := range slices.SortedFunc(maps.Keys(s.Leases), netip.Addr.Compare) {
		l, _ := s.leaseOf(addr)
		all = append(all, l)
	}
	return all, nil
}
