// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"azurevnet/internal/statefile"
)

// bootTimeAtStart is the boot clock when this test binary started.
var bootTimeAtStart = bootTime()

// scripts/young.sh says that it wrapped the tests: then the boot clock is young.
func TestTheBootClockIsYoung(t *testing.T) {
	switch wrapped := os.Getenv("AZURE_VNET_YOUNG"); {
	case wrapped == "":
		t.Skip("go test ran without -exec scripts/young.sh: the boot clock is this machine's")
	case wrapped != "yes":
		t.Skipf("the boot clock is this machine's: %s", wrapped)
	case bootTimeAtStart >= time.Minute:
		t.Errorf("scripts/young.sh wrapped this test, and the boot clock was at %v", bootTimeAtStart)
	}
}

// machineAges are times since boot at which every grace must hold.
var machineAges = []time.Duration{time.Nanosecond, time.Second, 10 * time.Second, 3 * time.Minute, grace, time.Hour}

// newPoolAt is a pool of a machine that booted that long ago.
func newPoolAt(t *testing.T, age time.Duration) (*Pool, *fabric) {
	t.Helper()
	f := azure(nic(mac1, "10.0.0.0/24", 5))
	f.now = age
	return newPool(t, f), f
}

// makeOlder moves the times of leases and answers back, below zero on a machine
// that booted a moment ago.
func (p *Pool) makeOlder(t *testing.T, by time.Duration) {
	t.Helper()
	err := statefile.Update(t.Context(), p.path, "test", func(s *state) error {
		for addr, r := range s.Leases {
			r.Since -= by
			if r.Confirmed != 0 {
				r.Confirmed -= by
			}
			s.Leases[addr] = r
		}
		for name, a := range s.Answers {
			if a.At != 0 {
				a.At -= by
			}
			if a.FailedAt != 0 {
				a.FailedAt -= by
			}
			s.Answers[name] = a
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// refuse answers with a status for which the question is not repeated.
func refuse(status int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }
}

func TestTheGraceOfALeaseHoldsAtEveryAgeOfTheMachine(t *testing.T) {
	for _, age := range machineAges {
		t.Run(age.String(), func(t *testing.T) {
			p, _ := newPoolAt(t, age)
			unconfirmed, confirmed := p.must(t, Request{Owner: "unconfirmed"}), p.must(t, Request{Owner: "confirmed"})
			collect := func() (addrs []netip.Addr) {
				t.Helper()
				leases, err := p.Collect(t.Context(), func(context.Context) (map[netip.Addr]bool, error) { return nil, nil })
				if err != nil {
					t.Fatal(err)
				}
				for _, l := range leases {
					addrs = append(addrs, l.Addr)
				}
				return addrs
			}
			if got := collect(); got != nil {
				t.Errorf("collected %v, which were just lent", got)
			}
			p.makeOlder(t, grace-1)
			if got := collect(); got != nil {
				t.Errorf("collected %v within the grace", got)
			}
			p.makeOlder(t, 1)
			confirmed, _, err := p.FindLease(t.Context(), confirmed.Addr) // with its time as it is now
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Confirm(t.Context(), confirmed); err != nil {
				t.Fatal(err)
			}
			if got := collect(); len(got) != 1 || got[0] != unconfirmed.Addr {
				t.Errorf("collected %v at the end of the grace, not %v", got, unconfirmed.Addr)
			}
			p.makeOlder(t, grace)
			if got := collect(); len(got) != 1 || got[0] != confirmed.Addr {
				t.Errorf("collected %v a grace after it was confirmed, not %v", got, confirmed.Addr)
			}
		})
	}
}

func TestAnAnswerGrowsOldAtEveryAgeOfTheMachine(t *testing.T) {
	for _, age := range machineAges {
		for _, fails := range []bool{false, true} {
			t.Run(map[bool]string{false: "an answer, ", true: "a failure, "}[fails]+age.String(), func(t *testing.T) {
				p, f := newPoolAt(t, age)
				if fails {
					f.fail(refuse(http.StatusForbidden))
				}
				for step, older := range []struct {
					by   time.Duration
					want int // questions in all
				}{{0, 1}, {0, 1}, {defaultInterval - 1, 1}, {1, 2}, {0, 2}} {
					if step > 0 {
						p.makeOlder(t, older.by)
					}
					if _, err := p.NICs(t.Context()); fails != errors.Is(err, ErrSource) || f.questions() != older.want {
						t.Errorf("step %d: %d questions, not %d: %v", step, f.questions(), older.want, err)
					}
				}
			})
		}
	}
}

func TestAnAddressRestsAtEveryAgeOfTheMachine(t *testing.T) {
	for _, age := range machineAges {
		t.Run(age.String(), func(t *testing.T) {
			p, f := newPoolAt(t, age)
			var all []Lease
			for range 4 {
				all = append(all, p.must(t, Request{Owner: "o"}))
			}
			if ok, err := p.Release(t.Context(), "o", all[0].Addr); !ok || err != nil {
				t.Fatal(ok, err)
			}
			f.pass(defaultCoolDown - 1)
			if l := p.must(t, Request{Owner: "o"}); !l.Early || l.Addr != all[0].Addr {
				t.Errorf("within the cool-down the lease is %+v", l)
			}
			if ok, err := p.Release(t.Context(), "o", all[0].Addr); !ok || err != nil {
				t.Fatal(ok, err)
			}
			f.pass(defaultCoolDown)
			if l := p.must(t, Request{Owner: "o"}); l.Early || l.Addr != all[0].Addr {
				t.Errorf("after the cool-down the lease is %+v", l)
			}
		})
	}
}

// What a source said before the boot is told as such, however short ago the
// boot is: what it said is older than that.
func TestAnAnswerOfAnEarlierBootIsNotSecondsOld(t *testing.T) {
	for _, age := range machineAges {
		t.Run(age.String(), func(t *testing.T) {
			p, f := newPoolAt(t, time.Hour)
			p.must(t, Request{Owner: "o"})
			f.pass(time.Minute)
			f.fail(refuse(http.StatusForbidden))
			if _, err := p.NICs(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := statefile.Update(t.Context(), p.path, "test", func(s *state) error { s.Boot = "another"; return nil }); err != nil {
				t.Fatal(err)
			}
			f.now = age
			f.fail(refuse(http.StatusUnauthorized))
			_, err := p.Lease(t.Context(), Request{Owner: "o", Addr: addr("10.0.0.77")})
			wants(t, err, ErrNotOurs, "as known before the boot", "401")
			st, err := p.Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			said := strings.Join(st.Warnings, "\n")
			if got := st.Sources[0]; !got.Answered || !got.BeforeBoot || got.FailureAge != 0 || strings.Contains(said, "403") {
				t.Errorf("the source is %+v; warnings: %s", got, said)
			}
			f.list(nic(mac1, "10.0.0.0/24", 5))
			f.pass(defaultInterval)
			if st, err = p.Status(t.Context()); err != nil || st.Sources[0].BeforeBoot {
				t.Errorf("once it answered the source is %+v: %v", st.Sources[0], err)
			}
		})
	}
}
