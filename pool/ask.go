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

// question says how much a caller needs an answer of the sources.
type question struct {
	age  time.Duration // the sources are asked only if the last try, good or bad, is older
	wait time.Duration // how long the caller waits for all sources together
	turn bool          // if another process is asking, the caller waits for it; false: it goes on without an answer
}

const (
	longWait  = 8 * time.Second        // if the call cannot go on without an answer; two sources have 4 s each
	shortWait = 500 * time.Millisecond // if known addresses will do; a healthy source answers in a hundredth of this
	pressing  = 2 * time.Second        // between two tries while no address is free
)

// listQuestion is for a call that wants the list of NICs itself.
func (p *Pool) listQuestion() question { return question{p.cfg.QueryInterval, longWait, true} }

// quickQuestion is for a call that known addresses will do for. The sources are asked once per interval, by one
// process, which waits 500 ms at most. NICs waits longer, so it hears a slow source: the plugin and the timer call it
// in each round.
func (p *Pool) quickQuestion() question { return question{p.cfg.QueryInterval, shortWait, false} }

// scarceQuestion is for a lease that only a cooling address can serve.
func (p *Pool) scarceQuestion() question { return question{p.pressingAge(), shortWait, true} }

// neededQuestion is for a call that known addresses cannot serve at all.
func (p *Pool) neededQuestion() question { return question{p.pressingAge(), longWait, true} }

// pressingAge is the age of an answer at which a pressing question is asked again.
func (p *Pool) pressingAge() time.Duration { return min(p.cfg.QueryInterval, pressing) }

// NICs returns the VM's NICs, the primary first. It asks the sources if nothing is known, or if the answer is older
// than the interval. If they fail, it returns what is known, and Status tells the failure. It is ErrSource if nothing
// is known.
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

// Subnet finds a NIC of this VM that has exactly the subnet want. A zero want is the NIC's first subnet. An empty mac
// is the first NIC that has the subnet, the primary before others. It is ErrNotOurs if no NIC has the subnet, and the
// error lists those that there are. It is ErrSource if nothing is known.
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

// findSubnet is Subnet for a list of NICs, the primary first.
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

// newestAnswer returns the newest answer of this pool's sources, and the name of the source. ok is false if none has
// answered.
func (p *Pool) newestAnswer(s *state) (newest answer, from string, ok bool) {
	for _, src := range p.sources {
		if a := s.Answers[src.name]; len(a.NICs) > 0 && (!ok || a.newerThan(newest)) {
			newest, from, ok = a, src.name, true
		}
	}
	return newest, from, ok
}

// isDue reports whether the sources are to be asked. They are if no try of this boot, good or bad, is younger than
// q.age. Two kinds of tries do not count:
//
//   - A try at a time that lies ahead. It would keep the source from being asked until then.
//   - A try that timed out after a shorter wait than q's. A slow source may still answer q.
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

// silenceError returns the error if nothing is known.
func (p *Pool) silenceError(s *state) error {
	if f := p.describeFailures(s); f != "" {
		return fmt.Errorf("%w: %s", ErrSource, f)
	}
	return fmt.Errorf("%w: no answer came yet", ErrSource)
}

// describeFailures says why each source failed since one answered. It is "" if none failed.
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

// askSources asks the sources in turn until one answers, and writes the answers into the pool's file. An answer
// replaces the last answer of the same source. A failure leaves the last answer as it is, and is no error of
// askSources. It is an error if ctx ends, or if a lock or the pool's file cannot be used.
//
// The pool's lock is not held while a source is asked. Another lock is held, so that of many processes one asks, and
// the others find its answer. If the process that asks dies, the kernel frees this lock.
func (p *Pool) askSources(ctx context.Context, q question) error {
	// A process that waits for another one to ask waits a little longer than a question may take.
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
		return ctx.Err() // the other process takes too long: this one goes on with what is known
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
			return ctx.Err() // the call's own end is no failure of the source
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

// askSource asks one source. left is how many sources share the time that is left of the question, this one included.
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

// readSource reads an answer of the source. notes say what was odd about it.
func (p *Pool) readSource(ctx context.Context, src source) (nics []NIC, notes []string, err error) {
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
