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

// grace is how old a lease must be before a missing link says that it leaked:
// longer than any deadline between a lease and its link.
const grace = 5 * time.Minute

// needsAdoption says that the file may lack leases that links prove.
func (p *Pool) needsAdoption(s *state) bool { return !s.Adopted && p.cfg.Links != nil }

func (p *Pool) adoptLinks(ctx context.Context) error {
	leases, err := p.cfg.Links(ctx)
	if err != nil {
		return fmt.Errorf("list the leases that links prove: %w", err)
	}
	return p.Adopt(ctx, leases)
}

// Adopt takes in leases that links prove and the file lacks, after it was lost.
// One that is held already, by whomever, stays as it is. A zero Since is now.
// Adopt may be repeated.
func (p *Pool) Adopt(ctx context.Context, leases []Lease) error {
	_, err := p.adopt(ctx, leases)
	return err
}

// AdoptLost takes in leases that links prove and that somebody took out of the file, and
// returns them. proven lists what links prove. It is called without the pool's lock, and
// after the leases were read: a link goes before its lease does, so a link that is there
// later has lost its lease.
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

// adopt returns the leases that were not held.
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

// Collect ends leases that leaked, and returns them: those with a link to show
// whose address is not attached, 5 minutes after they were given or, if that was
// late, confirmed. attached is called without the pool's lock, and after the leases were read; one that
// changed since, or was confirmed, is not judged.
func (p *Pool) Collect(ctx context.Context, attached func(context.Context) (map[netip.Addr]bool, error)) ([]Lease, error) {
	seen, err := p.readState(ctx, "collect")
	if err != nil {
		return nil, fmt.Errorf("collect leases: %w", err)
	}
	now := p.clock()
	suspects := map[netip.Addr]record{}
	for addr, r := range seen.Leases {
		age := now - r.lastSeen()
		if !r.Linkless && (age >= grace || age < 0) { // of one from the future nobody can be on the way to its link
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
