// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"azurevnet/internal/statefile"
	"azurevnet/test/random"
)

// Calls of two runtimes die and freeze anywhere. The source withdraws addresses and fails, the host takes addresses,
// people edit leases.json, and the VM boots. In any order of these, no address has two holders, none is lost, and each is
// lent in its turn. The model says what each call answers and what is in the file.
func TestAnyOrderOfCalls(t *testing.T) {
	top := t.TempDir()
	random.Check(t, 30, true, func(rt *rapid.T) {
		dir, err := os.MkdirTemp(top, "")
		if err != nil {
			rt.Fatal(err)
		}
		defer os.RemoveAll(dir)
		// In the bubble time passes only where somebody sleeps, so a source that is silent for 8 s costs nothing.
		rapid.SyncTest(rt, func(rt *rapid.T) {
			h := newHistory(rt, dir)
			h.run()
			h.end()
		})
	})
}

var modelSubnet = prefix("10.0.0.0/24")

// modelAddr returns an address of the subnet.
func modelAddr(last int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(last)}) }

// history is one random history: pools of several processes over one file, and the model.
type history struct {
	model
	t      *rapid.T
	ctx    context.Context
	path   string // of leases.json
	pools  [3]*Pool
	count  int    // of questions to the source
	edited []byte // a body that somebody wrote into the file and that nobody can read; nil: none
}

func newHistory(t *rapid.T, dir string) *history {
	h := &history{t: t, ctx: context.Background(), path: filepath.Join(dir, "leases.json")}
	h.reboot()
	for n := 5; n < 9; n++ {
		h.lists = append(h.lists, modelAddr(n))
	}
	for i := range h.pools {
		p, err := New(Config{Dir: dir, Source: "wireserver", Links: func(context.Context) ([]Lease, error) { return proven(h.links), nil }})
		if err != nil {
			t.Fatal(err)
		}
		p.clock, p.occupied, p.sources[0].fetch = h.now, h.occupied, h.fetch
		p.host = func() (hostLinks, error) { return hostLinks{MACs: []string{mac1}}, nil }
		h.pools[i] = p
	}
	return h
}

// proven lists the leases that links prove, as internal/upkeep does.
func proven(links map[netip.Addr]Lease) (all []Lease) {
	for a, l := range links {
		all = append(all, Lease{Addr: a, Owner: l.Owner, Pod: l.Pod, MAC: l.MAC, Prefix: netip.PrefixFrom(a, 24)})
	}
	return all
}

// occupied is what the pool reads of the host.
func (h *history) occupied() (occupied, error) {
	has := occupied{onHost: maps.Clone(h.onHost), routed: maps.Clone(h.others), nameOf: func(link int) string { return fmt.Sprintf("link %d", link) }}
	for a := range h.links {
		has.routed[a] = 16
	}
	return has, nil
}

// fetch is the source: it answers, or fails in one of the ways of sources.
func (h *history) fetch(ctx context.Context) ([]byte, error) {
	h.count++
	defer func() { // the pool forgets which addresses rested of those that are listed no more
		h.asked = time.Now()
		maps.DeleteFunc(h.freed, func(a netip.Addr, r rest) bool { return h.now() >= r.Until && !slices.Contains(h.known, a) })
	}()
	own, other := nic(mac1, modelSubnet.String(), 1), nic(mac2, "10.9.0.0/24", 4)
	for _, a := range h.lists {
		own.Subnets[0].Addrs = append(own.Subnets[0].Addrs, docAddr{Address: a.String(), Primary: "false"})
	}
	switch h.fails {
	case "silent":
		<-ctx.Done()
		return nil, ctx.Err()
	case "refuses":
		return nil, errors.New("connection refused")
	case "HTML":
		return []byte("<html><body>busy</body></html>"), nil
	case "no NIC":
		return xml.Marshal(document{})
	case "another VM":
		return xml.Marshal(document{NICs: []docNIC{other}})
	case "half":
		body, err := xml.Marshal(document{NICs: []docNIC{own}})
		return body[:len(body)/2], err
	}
	h.knows, h.known = true, lendable(h.lists)
	return xml.Marshal(document{NICs: []docNIC{own}})
}

// actions are all that may happen.
func (h *history) actions() []random.Action {
	return []random.Action{
		random.Act(12, "lease", h.leaseAny),
		random.Act(4, "lease by name", h.leaseByName),
		random.Act(1, "lease, and give up", h.giveUp),
		random.Act(12, "a container starts", h.start),
		random.Act(9, "make a link", h.linkSome),
		random.Act(9, "confirm", h.confirmSome),
		random.Act(2, "keep without a link", h.keep),
		random.Act(5, "stop", h.stop),
		random.Act(2, "a runtime forgets", func() { h.drop(h.someCall(func(*call) bool { return true })) }),
		random.Act(2, "a late release", func() { h.release(h.owner(), h.address()) }),
		random.Act(1, "end all of an owner", h.endOwner),
		random.Act(2, "a container ends", func() { delete(h.links, h.address()) }),
		random.Act(4, "collect", func() { h.collectWhile(h.meanwhile) }),
		random.Act(4, "all processes are frozen", h.freeze),
		random.Act(2, "adopt", h.adoptLost),
		random.Act(2, "find", h.find),
		random.Act(2, "list", h.list),
		random.Act(6, "time passes", func() { time.Sleep(time.Duration(1+h.number(60)) * time.Second) }),
		random.Act(1, "the host takes an address", func() { h.onHost[h.address()] = "eth0" }),
		random.Act(2, "the host gives it up", func() { delete(h.onHost, h.address()) }),
		random.Act(1, "a container of another plugin starts", h.foreign),
		random.Act(2, "a container of another plugin ends", func() { delete(h.others, h.address()) }),
		random.Act(3, "Azure changes its list", h.changeList),
		random.Act(2, "the source fails", func() {
			h.fails = random.Evenly("silent", "refuses", "HTML", "no NIC", "another VM", "half").Draw(h.t, "how")
		}),
		random.Act(3, "the source answers", func() { h.fails = "" }),
		random.Act(2, "somebody edits a lease", h.editLease),
		random.Act(1, "somebody damages the file", h.damageFile),
		random.Act(2, "a writer is killed", h.killWriter),
		random.Act(1, "the VM boots", h.bootVM),
	}
}

// run does random actions, and compares the file with the model after each.
func (h *history) run() { random.Run(h.t, 80, h.actions(), h.compare) }

// compare compares the file with the model.
func (h *history) compare() {
	s, err := h.pools[0].readState(h.ctx, "look")
	if err != nil {
		h.t.Fatal(err)
	}
	leases, proved := map[netip.Addr]Lease{}, map[netip.Addr]time.Duration{}
	for a, r := range s.Leases {
		leases[a], _ = s.leaseOf(a)
		if r.Confirmed != 0 {
			proved[a] = r.Confirmed
		}
	}
	for _, part := range []struct {
		what      string
		want, got any
	}{{"leases", h.leases, leases}, {"confirmed leases", h.proved, proved}, {"freed addresses", h.freed, s.Freed}} {
		if diff := gocmp.Diff(part.want, part.got, compareState); diff != "" {
			h.t.Fatalf("%s (-want +got):\n%s", part.what, diff)
		}
	}
	if h.edited == nil {
		return
	}
	aside := statefile.ListAside(h.path)
	if len(aside) != 1 {
		h.t.Fatalf("set aside are %q", aside)
	}
	if kept, err := os.ReadFile(aside[0]); err != nil || string(kept) != string(h.edited) {
		h.t.Fatalf("what was set aside is %q, not %q: %v", kept, h.edited, err)
	}
	h.edited = nil
}

// end ends all containers, and lends every address of Azure's list once: none was lost.
func (h *history) end() {
	h.fails = ""
	h.onHost, h.others, h.links, h.calls = map[netip.Addr]string{}, map[netip.Addr]int{}, map[netip.Addr]Lease{}, nil
	time.Sleep(modelGrace)
	h.list()
	h.collectWhile(func() {})
	for _, o := range modelOwners { // only a release ends a linkless lease
		h.releaseOwner(o)
	}
	time.Sleep(modelCoolDown)
	if len(h.leases) > 0 {
		h.t.Fatalf("nobody is left, and leases are: %v", h.leases)
	}
	for range h.known {
		if l, err := h.lease(Request{Owner: "all"}); err != nil || l.Early {
			h.t.Fatalf("of %v, which nobody has, %v are lent; then %+v, %v", h.known, slices.Collect(maps.Keys(h.leases)), l, err)
		}
	}
	h.compare()
}

// number draws a number below n.
func (h *history) number(n int) int {
	all := make([]int, n)
	for i := range all {
		all[i] = i
	}
	return random.Evenly(all...).Draw(h.t, "number")
}

// pool draws one of the processes.
func (h *history) pool() *Pool { return h.pools[random.Evenly(0, 1, 2).Draw(h.t, "process")] }

// modelOwners are those of two runtimes. All containers of a network of Docker's have one.
var modelOwners = []string{"docker/p1", "docker/p2", "cni/azure/c1/eth0", "cni/azure/c2/eth0"}

func (h *history) owner() string { return random.Evenly(modelOwners...).Draw(h.t, "owner") }

// address draws an address, which may be a reserved one, the NIC's own or none of Azure's.
func (h *history) address() netip.Addr {
	return modelAddr(random.Evenly(5, 6, 7, 8, 9, 10, 5, 6, 7, 8, 1, 3, 4, 255).Draw(h.t, "address"))
}

// someCall draws one of the calls that are wanted. It is nil if there is none.
func (h *history) someCall(want func(*call) bool) *call {
	var all []*call
	for _, c := range h.calls {
		if want(c) {
			all = append(all, c)
		}
	}
	if len(all) == 0 {
		return nil
	}
	return random.Evenly(all...).Draw(h.t, "call")
}

// GoString has a failure tell the call by its address and owner.
func (c *call) GoString() string { return c.lease.Addr.String() + " of " + c.lease.Owner }

// drop has the runtime forget the container.
func (h *history) drop(c *call) {
	h.calls = slices.DeleteFunc(h.calls, func(o *call) bool { return o == c })
}
