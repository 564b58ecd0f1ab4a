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

// stateVersion is the version of leases.json.
const stateVersion = 1

// state is the content of leases.json. Its times are of CLOCK_BOOTTIME, in ns: this clock goes on during suspend,
// ignores changes of the wall clock, and begins anew with each boot. Fields may be added. Any other change needs
// another version.
//
// A time may be negative: no program writes one, but a test or an operator may, to make a lease look older than the boot.
// It is compared like any other time. In some fields 0 means never. Test for 0 before you compare such a field: as a time,
// 0 is the boot, which may be a second ago.
type state struct {
	Version int                   `json:"version"`
	Boot    string                `json:"boot"`              // boot id; the leases of another boot are void
	Adopted bool                  `json:"adopted,omitempty"` // the leases that links prove were taken in since the file is new
	Answers map[string]answer     `json:"answers,omitempty"` // by name of the source
	Leases  map[netip.Addr]record `json:"leases,omitempty"`
	Freed   map[netip.Addr]rest   `json:"freed,omitempty"` // the addresses that were lent before and are free now
}

// answer is the last answer of one source. A failure changes neither NICs nor At.
type answer struct {
	NICs     []NIC         `json:"nics,omitempty"`
	At       time.Duration `json:"at"`                 // when it answered; 0: never, or in an earlier boot
	Notes    []string      `json:"notes,omitempty"`    // what was odd about the answer
	Failure  string        `json:"failure,omitempty"`  // of the last try, if that was after At
	FailedAt time.Duration `json:"failedAt,omitempty"` // when it failed last; 0: not in this boot
	Waited   time.Duration `json:"waited,omitempty"`   // how long that try waited for all sources, if it timed out; 0: it did not
}

// newerThan reports whether a came later than b. An answer of an earlier boot is older than every answer of this boot.
func (a answer) newerThan(b answer) bool {
	if a.At == 0 || b.At == 0 {
		return a.At != 0
	}
	return a.At > b.At
}

// record is a lease as the file has it.
type record struct {
	Lease
	Confirmed time.Duration `json:"confirmed,omitempty"` // when Confirm marked it last; 0: never
}

// lastSeen returns when the lease was given or, if that is later, confirmed.
func (r record) lastSeen() time.Duration {
	if r.Confirmed == 0 {
		return r.Since
	}
	return max(r.Since, r.Confirmed)
}

// rest is how a free address rests.
type rest struct {
	At    time.Duration `json:"at"`    // when it was released
	Until time.Duration `json:"until"` // when it has cooled
}

// Check refuses a file of another version, and one with values that no program writes. Somebody else changed such a
// file, and the leases that links prove are more trustworthy. It accepts negative times: see state. It accepts an
// absurd answer, which beginBoot forgets.
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

// arePlausible reports whether all times are within a century of the boot. Then no difference of two of them overflows.
func arePlausible(times ...time.Duration) bool {
	const century = 100 * 365 * 24 * time.Hour
	return !slices.ContainsFunc(times, func(t time.Duration) bool { return t < -century || t > century })
}

// isAbsurd reports whether the answer has values that no program writes.
func (a answer) isAbsurd() bool {
	return !arePlausible(a.At, a.FailedAt) || slices.ContainsFunc(a.NICs, func(n NIC) bool {
		mac, err := parseMAC(n.MAC)
		return err != nil || mac != n.MAC || len(n.Subnets) == 0 || slices.ContainsFunc(n.Subnets, Subnet.isAbsurd)
	})
}

// isAbsurd reports whether the subnet has values that no program writes.
func (s Subnet) isAbsurd() bool {
	outside := func(a netip.Addr) bool { return !s.Prefix.Contains(a) }
	return !s.Prefix.Addr().Is4() || s.Prefix != s.Prefix.Masked() || s.Primary.IsValid() && outside(s.Primary) || slices.ContainsFunc(s.Secondary, outside)
}

// beginBoot makes a state usable: it fills the maps of a new one, and voids what another boot left, if /run is on a
// disk. Of another boot it keeps the NICs that the sources told, which may still be true. It does not keep when they
// told them, which means nothing in this boot's time, nor their failures.
//
// It also forgets an absurd answer. The source is then asked again, and the leases stay.
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

// leaseOf returns the lease of addr, and false if nobody holds addr.
func (s *state) leaseOf(addr netip.Addr) (Lease, bool) {
	r, ok := s.Leases[addr]
	r.Lease.Addr = addr
	return r.Lease, ok
}

// holds reports whether the lease l is held as it was given.
func (s *state) holds(l Lease) bool {
	r, ok := s.Leases[l.Addr]
	return ok && r.Owner == l.Owner && r.Since == l.Since
}

// freeAddress ends the lease of addr. The address cools from now on.
func (s *state) freeAddress(addr netip.Addr, now, coolDown time.Duration) {
	delete(s.Leases, addr)
	s.Freed[addr] = rest{At: now, Until: now + max(coolDown, 0)}
}

// forgetUnlisted forgets the addresses that have cooled and that no source lists any more.
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

// updateState changes the state under its lock. what names the change, for the error of a process that waits for the
// lock in vain. If the file cannot be read, it is set aside, and a new one is begun.
func (p *Pool) updateState(ctx context.Context, what string, change func(*state) error) error {
	return p.retryRebuilt(ctx, what, func(boot, who string) error {
		return statefile.Update(ctx, p.path, who, func(s *state) error {
			s.beginBoot(boot)
			return change(s)
		})
	})
}

// readState returns the state. It takes no lock.
func (p *Pool) readState(ctx context.Context, what string) (s state, err error) {
	err = p.retryRebuilt(ctx, what, func(boot, _ string) (err error) {
		s, err = statefile.Read[state](p.path)
		s.beginBoot(boot)
		return err
	})
	return s, err
}

// retryRebuilt calls use, which reads the file. If the file cannot be read, it sets the file aside and calls use again.
// who names this process and what it does.
func (p *Pool) retryRebuilt(ctx context.Context, what string, use func(boot, who string) error) error {
	boot, err := statefile.BootID()
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
