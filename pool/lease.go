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

// Lease lends an address. ErrExhausted, ErrInUse, ErrNotOurs and ErrSource are
// as said there. The source is asked when what is known cannot serve r, and
// shortly when it is old; a source that fails does not keep a known address
// from being lent.
func (p *Pool) Lease(ctx context.Context, r Request) (Lease, error) {
	if r.Owner == "" {
		return Lease{}, errors.New("lease: no owner")
	}
	if r.Prefix.IsValid() && r.Prefix != r.Prefix.Masked() || r.Range.IsValid() && r.Range != r.Range.Masked() {
		return Lease{}, fmt.Errorf("lease for %s: %s and %s must be without host bits", r.Owner, r.Prefix, r.Range)
	}
	return p.lendAddress(ctx, r)
}

// lendAddress tries under the lock; what must be learnt first is learnt outside of it,
// once, and then it tries again.
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
			v, err := p.newView(s, has)
			if err == nil {
				l, err = p.pickAddress(&v, r)
			}
			var ask bool
			if q, ask = p.questionFor(s, l, err); ask && !asked && !r.Known {
				asked = true
				return statefile.ErrUnchanged
			}
			q = question{}
			// A container that ended since the routes were read may have left its address.
			if retry = err != nil && len(has.led) > 0 && !again; retry {
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

// questionFor says whether the source should be asked before l is given, or err is.
func (p *Pool) questionFor(s *state, l Lease, err error) (question, bool) {
	q := p.quickQuestion()
	switch {
	case errors.Is(err, ErrInUse):
		return q, false // whatever the source says
	case err != nil:
		q = p.neededQuestion()
	case l.Early:
		q = p.scarceQuestion()
	}
	return q, p.isDue(s, q)
}

func (p *Pool) newView(s *state, has occupied) (view, error) {
	a, _, ok := p.newestAnswer(s)
	if !ok {
		return view{}, p.silenceError(s)
	}
	return view{state: s, answer: a, occupied: has, now: p.clock()}, nil
}

// Confirm returns nil if l is still held, by the same owner since the same
// time, else ErrGone: what was built on it must be undone. An attachment is
// confirmed when its link stands.
//
// A lease that Collect may just be judging by older news is marked, so that
// Collect, which looks again under the lock, leaves it.
func (p *Pool) Confirm(ctx context.Context, l Lease) error {
	err := p.updateState(ctx, "confirm "+l.Addr.String(), func(s *state) error {
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
	if err != nil {
		return fmt.Errorf("confirm %s: %w", l.Addr, err)
	}
	return nil
}

// MakeLinkless makes l Linkless: it turned out to be an auxiliary address. A repeat is a
// success; ErrGone if l is no longer held.
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

// FindLease returns who holds addr, if anyone does.
func (p *Pool) FindLease(ctx context.Context, addr netip.Addr) (Lease, bool, error) {
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

// Release ends owner's lease of addr, which rests from now on. It is false if
// owner does not hold addr, be it free or another's: a release that comes late,
// or twice, takes nothing from anybody.
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
	if err != nil {
		return false, fmt.Errorf("release %s: %w", addr, err)
	}
	return released, nil
}

// Return ends the very lease l, as it was given, and is false if that has ended:
// where one owner has many holders, Release could take what another of them got since.
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
	if err != nil {
		return false, fmt.Errorf("return %s: %w", l.Addr, err)
	}
	return returned, nil
}

// ReleaseOwners ends every lease of each owner and returns their addresses, ascending.
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
