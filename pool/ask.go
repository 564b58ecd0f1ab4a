// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"azurevnet/internal/statefile"
)

// question says how much the asker needs an answer.
type question struct {
	age  time.Duration // asked only if no try, good or bad, is younger
	wait time.Duration // for the answer, all sources together
	turn bool          // waits for the process that is asking just now; else goes on without
}

const (
	longWait  = 8 * time.Second        // for what cannot be done without: 4 s and 4 s with two sources
	shortWait = 500 * time.Millisecond // a healthy source answers in a hundredth of this
	pressing  = 2 * time.Second        // least time between tries while nothing is free
)

// listQuestion is for a list that is read for its own sake.
func (p *Pool) listQuestion() question { return question{p.cfg.QueryInterval, longWait, true} }

// quickQuestion is for a call that known addresses can serve. It asks at most once per interval, in one process, and waits for
// at most 500 ms. A slower source is asked later by NICs, which waits longer. The plugin and the timer call NICs when
// they reconcile.
func (p *Pool) quickQuestion() question { return question{p.cfg.QueryInterval, shortWait, false} }

// scarceQuestion is for a lease that only a cooling address can serve.
func (p *Pool) scarceQuestion() question { return question{p.pressingAge(), shortWait, true} }

// neededQuestion is for what known addresses cannot serve at all.
func (p *Pool) neededQuestion() question { return question{p.pressingAge(), longWait, true} }

func (p *Pool) pressingAge() time.Duration { return min(p.cfg.QueryInterval, pressing) }

// NICs returns the VM's NICs, the primary first. The source is asked if nothing
// is known or the answer is older than the interval; if it fails and something
// is known, that is returned, and Status has the failure. ErrSource if nothing is.
func (p *Pool) NICs(ctx context.Context) ([]NIC, error) {
	s, err := p.readState(ctx, "list NICs")
	if err != nil {
		return nil, fmt.Errorf("list NICs: %w", err)
	}
	if q := p.listQuestion(); p.isDue(&s, q) {
		if err := p.askSources(ctx, q); err != nil {
			return nil, fmt.Errorf("list NICs: %w", err)
		}
		if s, err = p.readState(ctx, "list NICs"); err != nil {
			return nil, fmt.Errorf("list NICs: %w", err)
		}
	}
	a, _, ok := p.newestAnswer(&s)
	if !ok {
		return nil, fmt.Errorf("list NICs: %w", p.silenceError(&s))
	}
	return a.NICs, nil
}

// Subnet answers: is want exactly a subnet of a NIC of this VM? A zero prefix
// is the NIC's first; an empty mac is the NIC that has the subnet, the primary
// first. ErrNotOurs names what there is; ErrSource if nothing is known.
func (p *Pool) Subnet(ctx context.Context, mac string, want netip.Prefix) (NIC, Subnet, error) {
	find := func() (s state, nic NIC, sub Subnet, err error) {
		if s, err = p.readState(ctx, "find a subnet"); err != nil {
			return
		}
		a, _, ok := p.newestAnswer(&s)
		if !ok {
			return s, nic, sub, p.silenceError(&s)
		}
		nic, sub, err = findSubnet(a.NICs, mac, want)
		return
	}
	s, nic, sub, err := find()
	q := p.quickQuestion()
	if errors.Is(err, ErrNotOurs) || errors.Is(err, ErrSource) {
		q = p.neededQuestion()
	} else if err != nil {
		return NIC{}, Subnet{}, fmt.Errorf("find the subnet: %w", err)
	}
	if p.isDue(&s, q) {
		if err := p.askSources(ctx, q); err != nil {
			return NIC{}, Subnet{}, fmt.Errorf("find the subnet: %w", err)
		}
		_, nic, sub, err = find()
	}
	if err != nil {
		return NIC{}, Subnet{}, fmt.Errorf("find the subnet: %w", err)
	}
	return nic, sub, nil
}

// findSubnet looks for a subnet among NICs, of which the primary comes first.
func findSubnet(nics []NIC, mac string, want netip.Prefix) (NIC, Subnet, error) {
	if mac != "" {
		canonical, err := parseMAC(mac)
		if err != nil {
			return NIC{}, Subnet{}, fmt.Errorf("%w: %w", ErrNotOurs, err)
		}
		mac = canonical
	}
	var there []string
	for _, n := range nics {
		var prefixes []string
		for _, s := range n.Subnets {
			if (mac == "" || n.MAC == mac) && (!want.IsValid() || s.Prefix == want) {
				return n, s, nil
			}
			prefixes = append(prefixes, s.Prefix.String())
		}
		there = append(there, fmt.Sprintf("NIC %s has %s", n.MAC, strings.Join(prefixes, ", ")))
	}
	what := "subnet " + want.String()
	if !want.IsValid() {
		what = "a subnet"
	}
	if mac != "" {
		what += " of NIC " + mac
	}
	return NIC{}, Subnet{}, fmt.Errorf("%s: %w: of this VM, %s", what, ErrNotOurs, strings.Join(there, "; "))
}

// newestAnswer returns the newest answer of this pool's sources, and whose it is.
func (p *Pool) newestAnswer(s *state) (newest answer, from string, ok bool) {
	for _, src := range p.sources {
		if a := s.Answers[src.name]; len(a.NICs) > 0 && (!ok || a.newerThan(newest)) {
			newest, from, ok = a, src.name, true
		}
	}
	return newest, from, ok
}

// isDue reports whether the sources are to be asked: no try of this boot, good or bad, is younger than q.age. Two kinds of
// tries do not count. A try at a time that lies ahead would keep the source from being asked until then. A try that
// timed out after a shorter wait than q's tells nothing: a slow source may answer q.
func (p *Pool) isDue(s *state, q question) bool {
	now := p.clock()
	young := func(tried time.Duration) bool { return tried != 0 && tried <= now && now-tried < q.age }
	failed, hasty := false, false
	for _, src := range p.sources {
		a := s.Answers[src.name]
		if young(a.At) {
			return false
		}
		failed = failed || young(a.FailedAt)
		hasty = hasty || a.Waited != 0 && a.Waited < q.wait
	}
	return hasty || !failed
}

// silenceError is the error of knowing nothing.
func (p *Pool) silenceError(s *state) error {
	if f := p.describeFailures(s); f != "" {
		return fmt.Errorf("%w: %s", ErrSource, f)
	}
	return fmt.Errorf("%w: no answer came yet", ErrSource)
}

// describeFailures tells what went wrong with each source since one answered.
func (p *Pool) describeFailures(s *state) string {
	newest, _, _ := p.newestAnswer(s)
	var all []string
	for _, src := range p.sources {
		if a := s.Answers[src.name]; a.Failure != "" && (newest.At == 0 || a.FailedAt >= newest.At) {
			all = append(all, src.name+": "+a.Failure)
		}
	}
	return strings.Join(all, "; ")
}

// askSources puts the question to the sources in turn, until one answers, and keeps the answers in the pool's file. An answer
// replaces the source's last one, a failure does not. A source's failure is no error of ask. It fails only if ctx ends,
// or if the lock, or the pool's file, cannot be had, read or written.
//
// The pool's lock is not held while a source is asked. Another lock is held, so that of many processes one asks and the
// others find its answer. The kernel frees this lock if the asker dies.
func (p *Pool) askSources(ctx context.Context, q question) error {
	// A process that waits for another one's question waits a little longer than its own question may take.
	bounded, cancel := context.WithTimeout(ctx, q.wait+q.wait/8)
	defer cancel()
	const what = "ask for this VM's addresses"
	lock := p.path + ".ask"
	unlock, ok, err := statefile.TryLock(lock, what)
	if err == nil && !ok {
		if !q.turn {
			return nil
		}
		unlock, err = statefile.Lock(bounded, lock, what)
	}
	if err != nil && bounded.Err() != nil {
		return ctx.Err() // the process that asks takes longer than this one waits: go on with what is known
	} else if err != nil {
		return err
	}
	defer unlock()

	if s, err := p.readState(ctx, what); err != nil || !p.isDue(&s, q) {
		return err
	}
	asking, cancel := context.WithTimeout(bounded, q.wait)
	defer cancel()
	answers := map[string]answer{}
	for i, src := range p.sources {
		a := p.askSource(asking, src, len(p.sources)-i, q)
		if ctx.Err() != nil {
			return ctx.Err() // that says nothing of the source
		}
		answers[src.name] = a
		if a.Failure == "" {
			break
		}
	}
	return p.updateState(ctx, what, func(s *state) error {
		for name, a := range answers {
			if old := s.Answers[name]; a.Failure != "" {
				a.NICs, a.At, a.Notes = old.NICs, old.At, old.Notes
			}
			s.Answers[name] = a
		}
		s.forgetUnlisted(p.clock())
		return nil
	})
}

// askSource asks one source of the left many, which share what is left of q's time.
func (p *Pool) askSource(ctx context.Context, src source, left int, q question) answer {
	end, _ := ctx.Deadline()
	ctx, cancel := context.WithTimeout(ctx, time.Until(end)/time.Duration(left))
	defer cancel()
	nics, notes, err := p.readSource(ctx, src)
	if err != nil {
		failed := answer{Failure: err.Error(), FailedAt: p.clock()}
		if ctx.Err() != nil {
			failed.Waited = q.wait
		}
		return failed
	}
	return answer{NICs: nics, Notes: notes, At: p.clock()}
}

func (p *Pool) readSource(ctx context.Context, src source) ([]NIC, []string, error) {
	body, err := src.fetch(ctx)
	if err != nil {
		return nil, nil, err
	}
	d, err := src.parse(body)
	if err != nil {
		return nil, nil, err
	}
	h, err := p.host()
	if err != nil {
		return nil, nil, err
	}
	return interpretDocument(d, h)
}
