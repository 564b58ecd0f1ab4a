// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"azurevnet/internal/statefile"
)

// grace is how old a lease must be before a missing link says that it leaked. No call takes that long between a lease
// and its link.
const grace = 5 * time.Minute

// needsAdoption reports whether the file may lack leases that links prove: it is new, and nobody has taken these leases
// in.
func (p *Pool) needsAdoption(s *state) bool { return !s.Adopted && p.cfg.Links != nil }

// adoptLinks takes in the leases that links prove.
func (p *Pool) adoptLinks(ctx context.Context) error {
	leases, err := p.cfg.Links(ctx)
	if err != nil {
		return fmt.Errorf("list the leases that links prove: %w", err)
	}
	return p.Adopt(ctx, leases)
}

// Adopt takes in leases that links prove and that the file lost. If somebody holds the address of such a lease, the
// lease in the file stays as it is. A zero Since becomes the present time. Adopt may be repeated.
func (p *Pool) Adopt(ctx context.Context, leases []Lease) error {
	_, err := p.adopt(ctx, leases)
	return err
}

// AdoptLost adds leases that were deleted from the file although their links stand, and returns them. proven lists the
// leases that links prove. It is called without the pool's lock.
//
// proven is called after the leases were read. A link goes before its lease does. So a link that stands after its lease
// was missing has really lost the lease.
func (p *Pool) AdoptLost(ctx context.Context, proven func(context.Context) ([]Lease, error)) ([]Lease, error) {
	seen, err := p.readState(ctx, "adopt")
	if err != nil {
		return nil, fmt.Errorf("adopt leases: %w", err)
	}
	leases, err := proven(ctx)
	if err != nil {
		return nil, fmt.Errorf("adopt leases: list what links prove: %w", err)
	}
	leases = slices.DeleteFunc(leases, func(l Lease) bool { _, held := seen.Leases[l.Addr]; return held })
	if len(leases) == 0 {
		return nil, nil
	}
	return p.adopt(ctx, leases)
}

// adopt takes leases in, and returns those that nobody held.
func (p *Pool) adopt(ctx context.Context, leases []Lease) (lost []Lease, err error) {
	err = p.updateState(ctx, "adopt", func(s *state) error {
		s.Adopted = true
		for _, l := range leases {
			if _, ok := s.Leases[l.Addr]; ok || !l.Addr.IsValid() || l.Owner == "" {
				continue
			}
			if l.Since == 0 {
				l.Since = p.clock()
			}
			l.Prefix = l.Prefix.Masked()
			s.Leases[l.Addr] = record{Lease: l}
			delete(s.Freed, l.Addr)
			lost = append(lost, l)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("adopt leases: %w", err)
	}
	return lost, nil
}

// Collect ends the leases that leaked, and returns them. A lease has leaked if it is not linkless, its address is not
// attached, and it was given, or confirmed late, 5 minutes ago or more.
//
// attached returns the addresses that are attached. It is called without the pool's lock, and after the leases were
// read. A lease that changed since the reading, or was confirmed, is not ended.
func (p *Pool) Collect(ctx context.Context, attached func(context.Context) (map[netip.Addr]bool, error)) ([]Lease, error) {
	seen, err := p.readState(ctx, "collect")
	if err != nil {
		return nil, fmt.Errorf("collect leases: %w", err)
	}
	now := p.clock()
	suspects := map[netip.Addr]record{}
	for addr, r := range seen.Leases {
		age := now - r.lastSeen()
		if !r.Linkless && (age >= grace || age < 0) { // a lease from the future is damaged, so no call can be making its link
			suspects[addr] = r
		}
	}
	if len(suspects) == 0 {
		return nil, nil
	}
	links, err := attached(ctx)
	if err != nil {
		return nil, fmt.Errorf("collect leases: list what is attached: %w", err)
	}
	var leaked []Lease
	err = p.updateState(ctx, "collect", func(s *state) error {
		for addr, r := range suspects {
			if links[addr] || s.Leases[addr] != r {
				continue
			}
			l, _ := s.leaseOf(addr)
			leaked = append(leaked, l)
			s.freeAddress(addr, p.clock(), p.cfg.CoolDown)
		}
		if leaked == nil {
			return statefile.ErrUnchanged
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("collect leases: %w", err)
	}
	slices.SortFunc(leaked, func(a, b Lease) int { return cmp.Compare(a.Addr.String(), b.Addr.String()) })
	return leaked, nil
}
