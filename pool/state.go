// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"azurevnet/internal/statefile"
)

const stateVersion = 1 // of leases.json

// state is leases.json. Times are of CLOCK_BOOTTIME, in ns: they go on through
// clock steps and suspend, and mean nothing in another boot. Fields are only
// ever added; a change that is none of that kind takes another version.
//
// The clock starts at 0 when the machine boots, so a time that is a few minutes
// older than now may be negative. No program writes a negative time, but tests
// and operators that make a lease look older do. Such a time is compared as any
// other. Where 0 means that something never happened, it must not be compared:
// it would be later than a negative time, and on a machine that booted seconds
// ago it would look like seconds ago.
type state struct {
	Version int                   `json:"version"`
	Boot    string                `json:"boot"`              // boot id: leases of another boot are void
	Adopted bool                  `json:"adopted,omitempty"` // what links prove was taken in since the file was made
	Answers map[string]answer     `json:"answers,omitempty"` // by source
	Leases  map[netip.Addr]record `json:"leases,omitempty"`
	Freed   map[netip.Addr]rest   `json:"freed,omitempty"` // addresses lent before and free now
}

// answer is what one source said last. A failure leaves NICs and At alone.
type answer struct {
	NICs     []NIC         `json:"nics,omitempty"`
	At       time.Duration `json:"at"`                 // when it said so; 0: in an earlier boot, or never
	Notes    []string      `json:"notes,omitempty"`    // what was odd about it
	Failure  string        `json:"failure,omitempty"`  // since then
	FailedAt time.Duration `json:"failedAt,omitempty"` // last time; 0: not in this boot
	Waited   time.Duration `json:"waited,omitempty"`   // then, for all sources, if no answer came in time; 0: it failed by itself
}

// newerThan says that a came later than b. An answer of an earlier boot is older
// than every one of this boot.
func (a answer) newerThan(b answer) bool {
	if a.At == 0 || b.At == 0 {
		return a.At != 0
	}
	return a.At > b.At
}

type record struct {
	Lease
	Confirmed time.Duration `json:"confirmed,omitempty"` // last time, if that was late in the grace: see Confirm; 0: never
}

// lastSeen returns when the owner was last known to want the lease: when it was
// given or, if that is later, confirmed.
func (r record) lastSeen() time.Duration {
	if r.Confirmed == 0 {
		return r.Since
	}
	return max(r.Since, r.Confirmed)
}

type rest struct {
	At    time.Duration `json:"at"`    // released
	Until time.Duration `json:"until"` // cools
}

// Check refuses what this program cannot know how to keep, and what no program writes:
// then somebody else changed the file, and what links prove is more to be believed.
// It accepts negative times: see state. An answer that is absurd costs itself only:
// see begin.
func (s *state) Check() error {
	if s.Version != stateVersion {
		return fmt.Errorf("its version is %d, and this program knows %d only", s.Version, stateVersion)
	}
	for addr, r := range s.Leases {
		switch {
		case !addr.Is4():
			return fmt.Errorf("it has a lease of %s, which is not an IPv4 address", addr)
		case r.Owner == "":
			return fmt.Errorf("it has a lease of %s without an owner", addr)
		case r.Prefix.IsValid() && !r.Prefix.Addr().Is4():
			return fmt.Errorf("it has a lease of %s in %s", addr, r.Prefix)
		case !arePlausible(r.Since, r.Confirmed):
			return fmt.Errorf("it has a lease of %s of centuries ago or ahead", addr)
		}
	}
	for addr, r := range s.Freed {
		if !addr.Is4() || !arePlausible(r.At, r.Until) {
			return fmt.Errorf("it has %s freed at %v, and cooling until %v", addr, r.At, r.Until)
		}
	}
	return nil
}

// arePlausible reports whether times are within a century of the boot. So no difference of
// two of them overflows.
func arePlausible(times ...time.Duration) bool {
	const century = 100 * 365 * 24 * time.Hour
	return !slices.ContainsFunc(times, func(t time.Duration) bool { return t < -century || t > century })
}

// isAbsurd reports whether no program writes such an answer.
func (a answer) isAbsurd() bool {
	return !arePlausible(a.At, a.FailedAt) || slices.ContainsFunc(a.NICs, func(n NIC) bool {
		mac, err := parseMAC(n.MAC)
		return err != nil || mac != n.MAC || len(n.Subnets) == 0 || slices.ContainsFunc(n.Subnets, Subnet.isAbsurd)
	})
}

func (s Subnet) isAbsurd() bool {
	outside := func(a netip.Addr) bool { return !s.Prefix.Contains(a) }
	return !s.Prefix.Addr().Is4() || s.Prefix != s.Prefix.Masked() || s.Primary.IsValid() && outside(s.Primary) || slices.ContainsFunc(s.Secondary, outside)
}

// beginBoot makes a new state usable and voids what another boot left: a /run that
// is a disk. The NICs that the sources told may still be true. When they were
// told is not known in this boot's time, and a failure of then says nothing now.
//
// An absurd answer is forgotten: its source is asked again, and the leases stay.
func (s *state) beginBoot(boot string) {
	maps.DeleteFunc(s.Answers, func(_ string, a answer) bool { return a.isAbsurd() })
	if s.Boot != boot {
		for name, a := range s.Answers {
			s.Answers[name] = answer{NICs: a.NICs, Notes: a.Notes}
		}
		*s = state{Version: stateVersion, Boot: boot, Answers: s.Answers}
	}
	if s.Answers == nil {
		s.Answers = map[string]answer{}
	}
	if s.Leases == nil {
		s.Leases = map[netip.Addr]record{}
	}
	if s.Freed == nil {
		s.Freed = map[netip.Addr]rest{}
	}
}

// leaseOf returns who holds addr.
func (s *state) leaseOf(addr netip.Addr) (Lease, bool) {
	r, ok := s.Leases[addr]
	r.Lease.Addr = addr
	return r.Lease, ok
}

// holds says that l is held as it was given.
func (s *state) holds(l Lease) bool {
	r, ok := s.Leases[l.Addr]
	return ok && r.Owner == l.Owner && r.Since == l.Since
}

// freeAddress frees addr, which rests now.
func (s *state) freeAddress(addr netip.Addr, now, coolDown time.Duration) {
	delete(s.Leases, addr)
	s.Freed[addr] = rest{At: now, Until: now + max(coolDown, 0)}
}

// forgetUnlisted drops rested addresses that no source lists any more.
func (s *state) forgetUnlisted(now time.Duration) {
	var listed []map[netip.Addr]bool
	for _, a := range s.Answers {
		listed = append(listed, secondarySet(a.NICs))
	}
	for addr, r := range s.Freed {
		gone := !slices.ContainsFunc(listed, func(set map[netip.Addr]bool) bool { return set[addr] })
		if gone && now >= r.Until {
			delete(s.Freed, addr)
		}
	}
}

// updateState changes the state under its lock. what names the call for those who
// wait. A file that cannot be read is set aside and a new one begun.
func (p *Pool) updateState(ctx context.Context, what string, change func(*state) error) error {
	return p.retryRebuilt(ctx, what, func(boot, who string) error {
		return statefile.Update(ctx, p.path, who, func(s *state) error {
			s.beginBoot(boot)
			return change(s)
		})
	})
}

// readState returns the state as it stands, without the lock.
func (p *Pool) readState(ctx context.Context, what string) (s state, err error) {
	err = p.retryRebuilt(ctx, what, func(boot, _ string) (err error) {
		s, err = statefile.Read[state](p.path)
		s.beginBoot(boot)
		return err
	})
	return s, err
}

func (p *Pool) retryRebuilt(ctx context.Context, what string, use func(boot, who string) error) error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	who := filepath.Base(os.Args[0]) + ": " + what
	if err = use(boot, who); errors.Is(err, statefile.ErrUnreadable) {
		if err = statefile.SetAside[state](ctx, p.path, who); err == nil {
			err = use(boot, who)
		}
	}
	return err
}
