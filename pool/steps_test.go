// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/google/go-cmp/cmp"

	"azurevnet/test/random"
)

// The steps of a history that make calls of the pool. Each says in the model what follows.

// isDue reports whether a call that needs an address must ask the source.
func (h *history) isDue() bool { return time.Since(h.asked) >= modelInterval }

// lease makes a call of Lease, and compares its answer with the model's.
func (h *history) lease(r Request) (Lease, error) {
	time.Sleep(time.Millisecond) // two leases of one address never begin at one time
	if h.adopts {
		h.adopt(h.links, h.now())
	}
	before, due := h.count, h.isDue()
	l, err := h.pool().Lease(h.ctx, r)
	want, wantErr := h.pick(r)
	if !errors.Is(err, wantErr) || err == nil && l != want {
		h.t.Fatalf("%+v was answered %+v, %v; want %+v, %v", r, l, err, want, wantErr)
	}
	if asked := h.count > before; r.Known && asked || !r.Known && !r.Addr.IsValid() && due && !asked {
		h.t.Fatalf("%+v: the source was asked: %v, was due: %v", r, asked, due)
	}
	if err == nil {
		h.take(l)
		h.calls = append(h.calls, &call{lease: l})
	}
	return l, err
}

// request draws what a runtime asks for.
func (h *history) request() Request {
	r := Request{Owner: h.owner()}
	if strings.HasPrefix(r.Owner, "cni/") {
		r.Pod = "shop/web"
	}
	switch random.Evenly("any", "any", "any", "in a range", "of a NIC", "quick", "linkless").Draw(h.t, "kind") {
	case "in a range":
		r.Range = netip.PrefixFrom(modelAddr(4*h.number(4)), 30)
	case "of a NIC":
		r.MAC, r.Prefix = mac1, modelSubnet
	case "quick":
		r.Known = true
	case "linkless":
		r.Linkless = true
	}
	return r
}

func (h *history) leaseAny() { _, _ = h.lease(h.request()) }

func (h *history) leaseByName() {
	r := h.request()
	r.Addr = h.address()
	_, _ = h.lease(r)
}

// giveUp makes calls whose time is up. They change nothing, and ask nobody.
func (h *history) giveUp() {
	ctx, cancel := context.WithCancel(h.ctx)
	cancel()
	before := h.count
	_, err := h.pool().Lease(ctx, h.request())
	released, releaseErr := h.pool().Release(ctx, h.owner(), h.address())
	if !errors.Is(err, context.Canceled) || !errors.Is(releaseErr, context.Canceled) || released || h.count > before {
		h.t.Fatalf("calls that were given up ended with %v; %v, %v; %d questions", err, released, releaseErr, h.count-before)
	}
}

// start starts a container, in which nothing comes between.
func (h *history) start() {
	if _, err := h.lease(h.request()); err == nil {
		c := h.calls[len(h.calls)-1]
		h.link(c)
		h.confirm(c)
	}
}

func (h *history) linkSome() {
	h.link(h.someCall(func(c *call) bool { return !c.linked && !c.lease.Linkless }))
}

func (h *history) confirmSome() {
	h.confirm(h.someCall(func(c *call) bool { return c.linked && !c.runs }))
}

// link makes the link of a container. The bridge refuses an address that somebody has, and the call takes its lease back.
func (h *history) link(c *call) {
	if c == nil || c.linked || c.lease.Linkless {
		return
	}
	if a := c.lease.Addr; h.isRouted(a) || h.onHost[a] != "" {
		h.giveBack(c)
		return
	}
	h.links[c.lease.Addr], c.linked = c.lease, true
}

// unlink removes the link of a container, if it is there still.
func (h *history) unlink(c *call) {
	if h.links[c.lease.Addr] == c.lease {
		delete(h.links, c.lease.Addr)
	}
}

// giveBack returns the lease of a container that did not start, or of one of Docker's, and the runtime forgets it.
func (h *history) giveBack(c *call) {
	returned, err := h.pool().Return(h.ctx, c.lease)
	if want := h.has(c.lease); err != nil || returned != want {
		h.t.Fatalf("return %+v: %v, %v, want %v", c.lease, returned, err, want)
	}
	if returned {
		h.free(c.lease.Addr)
	}
	h.drop(c)
}

// confirm confirms the lease of a container whose link was made. A container whose lease has ended is undone.
func (h *history) confirm(c *call) {
	if c == nil || !c.linked || c.runs {
		return
	}
	err := h.pool().Confirm(h.ctx, c.lease)
	if !h.has(c.lease) {
		if !errors.Is(err, ErrGone) {
			h.t.Fatalf("a lease that has ended was confirmed: %+v, %v", c.lease, err)
		}
		h.unlink(c)
		h.drop(c)
		return
	}
	if err != nil {
		h.t.Fatalf("confirm %+v: %v", c.lease, err)
	}
	for _, o := range h.calls {
		if o.runs && h.links[o.lease.Addr] == o.lease && o.lease.Addr == c.lease.Addr {
			h.t.Fatalf("two containers have an address: %+v and %+v", o.lease, c.lease)
		}
	}
	c.runs = true
	if h.now()-c.lease.Since >= modelGrace {
		h.proved[c.lease.Addr] = h.now()
	}
}

// keep marks a lease as one of an auxiliary address, which no link will prove.
func (h *history) keep() {
	c := h.someCall(func(c *call) bool { return !c.linked && strings.HasPrefix(c.lease.Owner, "docker/") })
	if c == nil {
		return
	}
	err := h.pool().MakeLinkless(h.ctx, c.lease)
	if has := h.has(c.lease); has && err != nil || !has && !errors.Is(err, ErrGone) {
		h.t.Fatalf("keep %+v: %v, held: %v", c.lease, err, has)
	} else if has {
		l := h.leases[c.lease.Addr]
		l.Linkless = true
		h.leases[c.lease.Addr] = l
	}
	h.drop(c)
}

// stop ends a container: the link goes before the lease. The runtime may die between the two.
func (h *history) stop() {
	c := h.someCall(func(*call) bool { return true })
	if c == nil {
		return
	}
	h.unlink(c)
	switch {
	case random.Evenly("release", "release", "die").Draw(h.t, "then") == "die":
		h.drop(c)
	case strings.HasPrefix(c.lease.Owner, "docker/"):
		h.giveBack(c)
	default:
		h.release(c.lease.Owner, c.lease.Addr)
		h.drop(c)
	}
}

// release makes a call of Release. It may come late or from a runtime that is mistaken.
func (h *history) release(owner string, a netip.Addr) {
	released, err := h.pool().Release(h.ctx, owner, a)
	if want := h.leases[a].Owner == owner; err != nil || released != want {
		h.t.Fatalf("release %s of %s: %v, %v; held by %+v", a, owner, released, err, h.leases[a])
	}
	if released {
		h.free(a)
	}
}

// endOwner ends all that a container of CNI's has: its links, then its leases.
func (h *history) endOwner() {
	owner := random.Evenly(modelOwners[2:]...).Draw(h.t, "owner")
	maps.DeleteFunc(h.links, func(_ netip.Addr, l Lease) bool { return l.Owner == owner })
	h.releaseOwner(owner)
}

func (h *history) releaseOwner(owner string) {
	var want []netip.Addr
	for a, l := range h.leases {
		if l.Owner == owner {
			want = append(want, a)
		}
	}
	slices.SortFunc(want, netip.Addr.Compare)
	freed, err := h.pool().ReleaseOwners(h.ctx, owner)
	if err != nil || !slices.Equal(freed, want) {
		h.t.Fatalf("all of %s: released %v, %v, want %v", owner, freed, err, want)
	}
	for _, a := range freed {
		h.free(a)
	}
}

// meanwhile is what other processes do between two readings of one call.
func (h *history) meanwhile() {
	for range h.number(5) {
		random.Evenly(h.linkSome, h.confirmSome, h.stop, h.leaseAny).Draw(h.t, "meanwhile")()
	}
}

// freeze has all processes stand still for as long as a lease may be without a link, and longer: one of them after it
// was lent an address. They go on in the middle of a round.
func (h *history) freeze() {
	h.leaseAny()
	time.Sleep(modelGrace + time.Duration(h.number(100)-10)*time.Second)
	h.collectWhile(func() {
		h.meanwhile()
		h.linkSome()
		h.confirmSome()
	})
}

// collectWhile does what a round does, while others go on between its two readings.
func (h *history) collectWhile(others func()) {
	suspects, attached := h.suspects(), map[netip.Addr]bool{}
	gone, err := h.pool().Collect(h.ctx, func(context.Context) (map[netip.Addr]bool, error) {
		for a := range h.links {
			attached[a] = true
		}
		others()
		return attached, nil
	})
	if diff := cmp.Diff(h.collect(suspects, attached), gone, compareState); err != nil || diff != "" {
		h.t.Fatalf("collected: %v (-want +got):\n%s", err, diff)
	}
}

// adoptLost does what a round does, while others go on.
func (h *history) adoptLost() {
	held, links := maps.Clone(h.leases), map[netip.Addr]Lease{}
	got, err := h.pool().AdoptLost(h.ctx, func(context.Context) ([]Lease, error) {
		links = maps.Clone(h.links)
		h.meanwhile()
		return proven(links), nil
	})
	maps.DeleteFunc(links, func(a netip.Addr, _ Lease) bool { _, ok := held[a]; return ok })
	var want []Lease
	if len(links) > 0 {
		want = h.adopt(links, h.now())
	}
	slices.SortFunc(got, func(a, b Lease) int { return a.Addr.Compare(b.Addr) })
	if diff := cmp.Diff(want, got, compareState); err != nil || diff != "" {
		h.t.Fatalf("adopted: %v (-want +got):\n%s", err, diff)
	}
}

// find looks for the lease of an address, which takes in what links prove.
func (h *history) find() {
	if h.adopts {
		h.adopt(h.links, h.now())
	}
	a := h.address()
	l, held, err := h.pool().FindLease(h.ctx, a)
	if want, ok := h.leases[a]; err != nil || held != ok || l != want {
		h.t.Fatalf("%s is held: %+v, %v, %v; want %+v", a, l, held, err, want)
	}
}

// list asks for the NICs: the source is asked if its answer is old.
func (h *history) list() {
	before, due := h.count, h.isDue()
	nics, err := h.pool().NICs(h.ctx)
	if due && h.count == before || err == nil != h.knows || err != nil && !errors.Is(err, ErrSource) {
		h.t.Fatalf("list: %+v, %v; known: %v, %v; %d questions, due: %v", nics, err, h.knows, h.known, h.count-before, due)
	}
	if err == nil && !slices.Equal(nics[0].Secondaries(), h.known) {
		h.t.Fatalf("listed are %v, and known are %v", nics[0].Secondaries(), h.known)
	}
}
