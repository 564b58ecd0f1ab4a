// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"azurevnet/internal/statefile"
)

// A container that another plugin runs keeps its address: a route of the host leads to it, and no lease tells of it.
func TestAnAddressThatARouteLeadsToIsNotLent(t *testing.T) {
	f := azure(nic(mac1, "10.0.0.0/24", 4)) // .5, .6 and .7 can be lent
	f.occupied.routed = map[netip.Addr]int{addr("10.0.0.5"): 17, addr("10.0.9.9"): 4}
	p := newPool(t, f)
	const whose = "10.0.0.5 is led to azv17 by a route, and no lease tells of it: it is a container's of another plugin"
	_, err := p.Lease(t.Context(), Request{Owner: "me", Addr: addr("10.0.0.5")})
	wants(t, err, ErrInUse, whose)
	for _, want := range []string{"10.0.0.6", "10.0.0.7"} {
		if l := p.must(t, Request{Owner: "me"}); l.Addr != addr(want) {
			t.Errorf("lent %s, want %s", l.Addr, want)
		}
	}
	_, err = p.Lease(t.Context(), Request{Owner: "me"})
	wants(t, err, ErrExhausted, "4 ipconfigs: 1 the NIC's own, 2 held, 1 of other containers", whose)

	f.occupied.routed[addr("10.0.0.6")] = 5 // the route to a container of ours, which has a lease
	st, err := p.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	sub := st.NICs[0].Subnets[0]
	if want := (Census{Configs: 4, Own: 1, Held: 2, Routed: 1}); sub.Census != want {
		t.Errorf("census is %+v, want %+v", sub.Census, want)
	}
	if diff := cmp.Diff(map[netip.Addr]string{addr("10.0.0.5"): "azv17"}, sub.RoutedBy, compareAddr); diff != "" {
		t.Errorf("led to (-want +got):\n%s", diff)
	}
	if !slices.ContainsFunc(st.Warnings, func(w string) bool { return strings.HasPrefix(w, whose) }) {
		t.Errorf("no warning says %q: %q", whose, st.Warnings)
	}

	delete(f.occupied.routed, addr("10.0.0.5"))
	if l := p.must(t, Request{Owner: "me"}); l.Addr != addr("10.0.0.5") {
		t.Errorf("when its container is gone, lent %s", l.Addr)
	}
}

// An address whose container ends while a lease waits for the lock is lent: its route was read before, and is read
// again before the lease fails.
func TestARouteThatGoesMeanwhile(t *testing.T) {
	f := azure(nic(mac1, "10.0.0.0/24", 2))
	p := newPool(t, f)
	ending := p.must(t, Request{Owner: "ending"})
	reads := 0
	read := p.occupied
	p.occupied = func() (occupied, error) {
		has, err := read()
		if reads++; reads == 1 {
			has.routed = map[netip.Addr]int{ending.Addr: 17} // and then it ends
			if _, err := p.Release(t.Context(), "ending", ending.Addr); err != nil {
				t.Error(err)
			}
		}
		return has, err
	}
	if l := p.must(t, Request{Owner: "next"}); l.Addr != ending.Addr || !l.Early || reads != 2 {
		t.Errorf("lent %+v after %d reads", l, reads)
	}
}

// Somebody edits the file so that a lease is missing while its container runs: another address is lent, and the next
// round leases that one again to whom it was lent.
func TestALeaseThatWasTakenOutOfTheFile(t *testing.T) {
	f := azure(nic(mac1, "10.0.0.0/24", 4))
	p := newPool(t, f)
	lost, kept := p.must(t, Request{Owner: "lost"}), p.must(t, Request{Owner: "kept"})
	err := statefile.Update(t.Context(), p.path, "test", func(s *state) error { delete(s.Leases, lost.Addr); return nil })
	if err != nil {
		t.Fatal(err)
	}
	f.occupied.routed = map[netip.Addr]int{lost.Addr: 5, kept.Addr: 5}
	if l := p.must(t, Request{Owner: "new"}); l.Addr != addr("10.0.0.7") {
		t.Errorf("lent %s to another", l.Addr)
	}
	links := func(context.Context) ([]Lease, error) {
		return []Lease{{Addr: lost.Addr, Owner: "lost", MAC: mac1, Prefix: prefix("10.0.0.5/24")}, {Addr: kept.Addr, Owner: "thief"}}, nil
	}
	f.pass(time.Hour)
	for round, want := range [][]Lease{{{Addr: lost.Addr, Owner: "lost", MAC: mac1, Prefix: lost.Prefix, Since: f.now}}, nil} {
		got, err := p.AdoptLost(t.Context(), links)
		if diff := cmp.Diff(want, got, compareAddr); err != nil || diff != "" {
			t.Errorf("round %d adopts, %v (-want +got):\n%s", round, err, diff)
		}
	}
	for owner, l := range map[string]Lease{"lost": lost, "kept": kept} {
		if now, ok, err := p.FindLease(t.Context(), l.Addr); !ok || now.Owner != owner || err != nil {
			t.Errorf("%s is held by %+v, %v", l.Addr, now, err)
		}
	}
}

// A list without any NIC of this VM, such as one that was copied to an image, replaces nothing.
func TestAListOfAnotherVMReplacesNothing(t *testing.T) {
	f := azure(nic(mac1, "10.0.0.0/24", 3))
	f.macs = []string{"06:0d:3a:04:75:98", mac1}
	p := newPool(t, f)
	before := p.must(t, Request{Owner: "o"})
	others := nic(mac2, "10.9.0.0/24", 9)
	f.list(others)
	f.pass(time.Minute)
	if l := p.must(t, Request{Owner: "o"}); l.MAC != mac1 || l.Prefix != before.Prefix {
		t.Errorf("lent %+v", l)
	}
	nics, err := p.NICs(t.Context())
	if err != nil || len(nics) != 1 || nics[0].MAC != mac1 {
		t.Errorf("NICs are %+v, %v", nics, err)
	}
	const says = "it lists no NIC of this VM, but " + mac2
	if st, err := p.Status(t.Context()); err != nil || !strings.Contains(st.Sources[0].Failure, says) {
		t.Errorf("the failure does not say %q: %+v, %v", says, st.Sources, err)
	}
	f.list(others, nic(mac1, "10.0.0.0/24", 4)) // beside it, the list is this VM's
	f.pass(time.Minute)
	if nics, err := p.NICs(t.Context()); err != nil || len(nics) != 2 {
		t.Errorf("NICs are %+v, %v", nics, err)
	}

	f.list(others)
	_, err = newPool(t, f).Lease(t.Context(), Request{Owner: "o"})
	wants(t, err, ErrSource, says)
}

// What Azure reserves is refused by name too, with the reason.
func TestReservedAddressesAreRefused(t *testing.T) {
	f := azure(nic(mac1, "10.0.0.0/24", 3))
	p := newPool(t, f)
	for _, a := range []string{"10.0.0.0", "10.0.0.2", "10.0.0.3", "10.0.0.255"} {
		_, err := p.Lease(t.Context(), Request{Owner: "o", Addr: addr(a)})
		wants(t, err, ErrNotOurs, a, "Azure reserves it")
	}
}
