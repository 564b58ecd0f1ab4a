// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"azurevnet/internal/statefile"
)

// Lease lends an address to r.Owner. Its errors are ErrExhausted, ErrInUse, ErrNotOurs or ErrSource. The sources are
// asked if known addresses cannot serve r, and for a short time if what is known is old. If a source fails, a known
// address is lent all the same.
func (p *Pool) Lease(ctx context.Context, r Request) (Lease, error) {
	if r.Owner == "" {
		return Lease{}, errors.New("lease: no owner")
	}
	if r.Prefix.IsValid() && r.Prefix != r.Prefix.Masked() || r.Range.IsValid() && r.Range != r.Range.Masked() {
		return Lease{}, fmt.Errorf("%s and %s must be without host bits", r.Prefix, r.Range)
	}
	return p.lendAddress(ctx, r)
}

// lendAddress tries to lend an address under the pool's lock. It may find that it needs to know more first: the leases
// that links prove, an answer of a source, or the host's routes once more. It asks for that without the lock, once
// each, and tries again.
func (p *Pool) lendAddress(ctx context.Context, r Request) (l Lease, err error) {
	for asked, again := false, false; ; {
		has, err := p.occupied()
		if err != nil {
			return Lease{}, err
		}
		var adopt, retry bool
		var q question
		err = p.updateState(ctx, "lease for "+r.Owner, func(s *state) error {
			if adopt = p.needsAdoption(s); adopt {
				return statefile.ErrUnchanged
			}
			v, err := p.newSnapshot(s, has)
			if err == nil {
				l, err = p.pickAddress(&v, r)
			}
			var ask bool
			if q, ask = p.questionFor(s, l, err); ask && !asked && !r.Known {
				asked = true
				return statefile.ErrUnchanged
			}
			q = question{}
			// A container that had an address without a lease may have ended since the routes were read.
			if retry = err != nil && len(has.routed) > 0 && !again; retry {
				again = true
				return statefile.ErrUnchanged
			}
			if err != nil {
				return err
			}
			s.Leases[l.Addr] = record{Lease: l}
			delete(s.Freed, l.Addr)
			return nil
		})
		switch {
		case err != nil:
			return Lease{}, err
		case adopt:
			err = p.adoptLinks(ctx)
		case q.wait > 0:
			err = p.askSources(ctx, q)
		case retry:
		default:
			return l, nil
		}
		if err != nil {
			return Lease{}, err
		}
	}
}

// questionFor returns the question to the sources before l is given, or before err is returned. ask is false if they
// need not be asked.
func (p *Pool) questionFor(s *state, l Lease, err error) (q question, ask bool) {
	q = p.quickQuestion()
	switch {
	case errors.Is(err, ErrInUse):
		return q, false // no answer of a source changes that
	case err != nil:
		q = p.neededQuestion()
	case l.Early:
		q = p.scarceQuestion()
	}
	return q, p.isDue(s, q)
}

// newSnapshot returns what a choice of an address rests on. It is ErrSource if no source has answered yet.
func (p *Pool) newSnapshot(s *state, has occupied) (snapshot, error) {
	a, _, ok := p.newestAnswer(s)
	if !ok {
		return snapshot{}, p.silenceError(s)
	}
	return snapshot{state: s, answer: a, occupied: has, now: p.clock()}, nil
}

// Confirm is called when the link of a lease stands. It returns nil if the owner still holds the lease l, and ErrGone
// if the lease has ended: the caller must then undo what it built.
//
// The errors of Confirm, Release and Return do not name the lease: the caller does, in the words of its reader.
//
// Collect may be judging an old lease just now, from a list of links that lacks the new one. Confirm marks such a
// lease. Collect looks for the mark under the lock, and leaves the lease.
func (p *Pool) Confirm(ctx context.Context, l Lease) error {
	return p.updateState(ctx, "confirm "+l.Addr.String(), func(s *state) error {
		if !s.holds(l) {
			return ErrGone
		}
		now := p.clock()
		if now-l.Since < grace {
			return statefile.ErrUnchanged
		}
		r := s.Leases[l.Addr]
		r.Confirmed = now
		s.Leases[l.Addr] = r
		return nil
	})
}

// MakeLinkless marks the lease l as Linkless: it turned out to be of an auxiliary address. It may be repeated. It is
// ErrGone if the lease has ended.
func (p *Pool) MakeLinkless(ctx context.Context, l Lease) error {
	err := p.updateState(ctx, "keep "+l.Addr.String(), func(s *state) error {
		if !s.holds(l) {
			return ErrGone
		}
		r := s.Leases[l.Addr]
		r.Linkless = true
		s.Leases[l.Addr] = r
		return nil
	})
	if err != nil {
		return fmt.Errorf("keep %s: %w", l.Addr, err)
	}
	return nil
}

// FindLease returns the lease of addr. held is false if nobody holds addr. It asks no source.
func (p *Pool) FindLease(ctx context.Context, addr netip.Addr) (lease Lease, held bool, err error) {
	s, err := p.readState(ctx, "look for "+addr.String())
	if err == nil && p.needsAdoption(&s) {
		if err = p.adoptLinks(ctx); err == nil {
			s, err = p.readState(ctx, "look for "+addr.String())
		}
	}
	if err != nil {
		return Lease{}, false, fmt.Errorf("look for %s: %w", addr, err)
	}
	l, ok := s.leaseOf(addr)
	if !ok {
		return Lease{}, false, nil
	}
	return l, true, nil
}

// Release ends the owner's lease of addr, which then cools. It is false if the owner does not hold addr, whether addr
// is free or another's. So a release that comes late or twice takes nothing from anybody.
func (p *Pool) Release(ctx context.Context, owner string, addr netip.Addr) (bool, error) {
	released := false
	err := p.updateState(ctx, "release "+addr.String(), func(s *state) error {
		if l, ok := s.leaseOf(addr); !ok || l.Owner != owner {
			return statefile.ErrUnchanged
		}
		s.freeAddress(addr, p.clock(), p.cfg.CoolDown)
		released = true
		return nil
	})
	return released && err == nil, err
}

// Return ends exactly the lease l, as it was given. It is false if that lease has ended. If an owner has many
// containers, Release could end a lease that another of its containers got since.
func (p *Pool) Return(ctx context.Context, l Lease) (bool, error) {
	returned := false
	err := p.updateState(ctx, "return "+l.Addr.String(), func(s *state) error {
		if !s.holds(l) {
			return statefile.ErrUnchanged
		}
		s.freeAddress(l.Addr, p.clock(), p.cfg.CoolDown)
		returned = true
		return nil
	})
	return returned && err == nil, err
}

// ReleaseOwners ends all leases of the owners, and returns their addresses, ascending.
func (p *Pool) ReleaseOwners(ctx context.Context, owners ...string) ([]netip.Addr, error) {
	what := "release all of " + strings.Join(owners[:min(1, len(owners))], "")
	if more := len(owners) - 1; more > 0 {
		what += fmt.Sprintf(" and %d more", more)
	}
	var freed []netip.Addr
	err := p.updateState(ctx, what, func(s *state) error {
		for addr, r := range s.Leases {
			if slices.Contains(owners, r.Owner) {
				freed = append(freed, addr)
				s.freeAddress(addr, p.clock(), p.cfg.CoolDown)
			}
		}
		if freed == nil {
			return statefile.ErrUnchanged
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	slices.SortFunc(freed, netip.Addr.Compare)
	return freed, nil
}
