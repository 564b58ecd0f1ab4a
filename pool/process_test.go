// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// TestMain is also the child of the tests below: a process that shares a pool
// with many others, as every CNI call does.
func TestMain(m *testing.M) {
	dir, url := os.Getenv("POOL_TEST_DIR"), os.Getenv("POOL_TEST_URL")
	if dir == "" {
		os.Exit(m.Run())
	}
	p, err := New(Config{Dir: dir, Source: "wireserver", QueryURL: url, CoolDown: -1})
	if err == nil {
		p.occupied = func() (occupied, error) { return occupied{}, nil } // whatever this machine holds
		p.host = func() (hostLinks, error) { return hostLinks{}, nil }
		err = child(p, os.Getenv("POOL_TEST_OWNER"))
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

// child lends once, or with an owner that begins with churn lends and releases
// until it is killed. It says what it does before a release and after a lease.
func child(p *Pool, owner string) error {
	// Longer than a face waits: 200 processes with the race detector keep two
	// cores busy for that long.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for {
		l, err := p.Lease(ctx, Request{Owner: owner})
		if err != nil {
			return err
		}
		fmt.Println("has", l.Addr)
		if err := p.Confirm(ctx, l); err != nil {
			return err
		}
		if !strings.HasPrefix(owner, "churn") {
			return nil
		}
		if rand.IntN(3) == 0 {
			continue // a container that stays
		}
		fmt.Println("frees", l.Addr)
		if ok, err := p.Release(ctx, owner, l.Addr); !ok || err != nil {
			return fmt.Errorf("release %s: %v, %w", l.Addr, ok, err)
		}
	}
}

func process(p *Pool, owner string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "POOL_TEST_DIR="+filepath.Dir(p.path), "POOL_TEST_URL="+p.cfg.QueryURL, "POOL_TEST_OWNER="+owner)
	return cmd
}

// Processes that ask at once have an address each: 60 of them in make test, 200 in make soak.
func TestProcessesAtOnceShareNoAddress(t *testing.T) {
	count := 60
	if os.Getenv("SOAK") != "" {
		count = 200
	}
	f := azure(nic(mac1, "10.0.0.0/22", 201))
	p := newPool(t, f)
	p.clock = bootTime
	start := make(chan struct{})
	var mu sync.Mutex
	has := map[string]string{}
	var wg sync.WaitGroup
	for i := range count {
		wg.Go(func() {
			<-start
			owner := fmt.Sprintf("cni/azure/%d/eth0", i)
			out, err := process(p, owner).Output()
			mu.Lock()
			defer mu.Unlock()
			if other := has[string(out)]; err != nil || other != "" || !strings.HasPrefix(string(out), "has ") {
				t.Errorf("%s: %q, also of %q: %v", owner, out, other, err)
			}
			has[string(out)] = owner
		})
	}
	// The source is this very process, which the others may keep from answering the first question in time.
	if _, err := p.NICs(t.Context()); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	close(start)
	wg.Wait()
	most := 3 + int(time.Since(began)/(10*time.Second)) // an answer is asked again at that age
	if len(has) != count || f.questions() > most {
		t.Errorf("%d addresses, %d questions", len(has), f.questions())
	}
	s, err := p.readState(t.Context(), "test")
	if err != nil || len(s.Leases) != count {
		t.Errorf("%d leases, %v", len(s.Leases), err)
	}
}

// Processes are killed at any moment. Whoever was told that he has an address
// has it, nobody else does, and nothing but his lease is left behind.
func TestKilledProcessesShareNoAddress(t *testing.T) {
	f := azure(nic(mac1, "10.0.0.0/22", 256))
	p := newPool(t, f)
	p.clock = bootTime
	var mu sync.Mutex
	certain, freeing := map[string]string{}, map[string]string{} // address → owner
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			for round := range 5 {
				owner := fmt.Sprintf("churn/%d/%d", i, round)
				has, frees, err := churn(process(p, owner))
				mu.Lock()
				if err != nil {
					t.Errorf("%s: %v", owner, err)
				}
				for a := range has {
					if certain[a] != "" {
						t.Errorf("%s is held by %s and %s", a, certain[a], owner)
					}
					certain[a] = owner
				}
				freeing[frees] = owner
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	start := time.Now()
	s, err := p.readState(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	for a, owner := range certain {
		if l, _ := s.leaseOf(addr(a)); l.Owner != owner {
			t.Errorf("%s told that %s has it; it is held by %q", a, owner, l.Owner)
		}
	}
	if l, err := p.Lease(t.Context(), Request{Owner: "after"}); err != nil && !errors.Is(err, ErrExhausted) || certain[l.Addr.String()] != "" {
		t.Errorf("lease %+v, %v", l, err)
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("the next call took %v", took)
	}
	// Whatever is held beyond that was lent to one who died before he said so.
	if extra := len(s.Leases) - len(certain); len(certain) == 0 || extra > 2*30 {
		t.Errorf("%d addresses certain, %d more held", len(certain), extra)
	}
}

// churn runs a child for a moment and tells what it has, as far as it said, and
// what it may or may not have released.
func churn(cmd *exec.Cmd) (has map[string]bool, frees string, err error) {
	has = map[string]bool{}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, "", err
	}
	if err := cmd.Start(); err != nil {
		return nil, "", err
	}
	timer := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
	defer timer.Stop()
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if len(has) == 0 && frees == "" { // it runs
			timer.Reset(time.Duration(rand.IntN(100)) * time.Millisecond)
		}
		what, a, _ := strings.Cut(lines.Text(), " ")
		switch {
		case what == "has":
			has[a] = true
		case what == "frees":
			delete(has, a)
			frees = a
		case strings.Contains(lines.Text(), ErrExhausted.Error()): // those before it took all
		default:
			return nil, "", errors.New(lines.Text())
		}
	}
	cmd.Wait() // killed
	return has, frees, nil
}

// Whatever several pools over one file are asked, in any order, no address is
// held twice, none is lost, and what is not listed, rests on the host or is another
// plugin's container's is not lent.
func TestAnyOrderOfCalls(t *testing.T) {
	f := azure(nic(mac1, "10.0.0.0/24", 7))
	base := newPool(t, f)
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp(t.TempDir(), "")
		if err != nil {
			rt.Fatal(err)
		}
		listed, links := 7, map[netip.Addr]bool{}
		f.list(nic(mac1, "10.0.0.0/24", listed))
		f.occupied = occupied{onHost: map[netip.Addr]string{}, routed: map[netip.Addr]int{}}
		var pools [3]*Pool
		for i := range pools {
			pools[i] = poolIn(t, f, dir)
			pools[i].sources[0].fetch = func(context.Context) ([]byte, error) { return []byte(f.body), nil }
		}
		model := map[netip.Addr]Lease{}
		ctx := context.Background()
		pool := func() *Pool { return pools[rapid.IntRange(0, 2).Draw(rt, "pool")] }
		owner := func() string { return rapid.SampledFrom([]string{"a", "b", "c"}).Draw(rt, "owner") }
		address := func() netip.Addr { return addr(fmt.Sprintf("10.0.0.%d", rapid.IntRange(3, 12).Draw(rt, "address"))) }
		can := func(a netip.Addr) bool {
			n := int(a.As4()[3])
			return n > 4 && n < 4+listed && f.occupied.onHost[a] == "" && f.occupied.routed[a] == 0
		}
		take := func(l Lease, err error) {
			if err != nil {
				return
			}
			if _, ok := model[l.Addr]; ok || !can(l.Addr) {
				rt.Fatalf("lent %+v; held %v, lendable %v", l, ok, can(l.Addr))
			}
			model[l.Addr], links[l.Addr] = l, true
		}
		rt.Repeat(map[string]func(*rapid.T){
			"lease": func(*rapid.T) {
				l, err := pool().Lease(ctx, Request{Owner: owner()})
				take(l, err)
				for n := 5; err != nil && n < 4+listed; n++ {
					if a := addr(fmt.Sprintf("10.0.0.%d", n)); model[a].Owner == "" && can(a) {
						rt.Fatalf("%s was free: %v", a, err)
					}
				}
			},
			"lease by name": func(*rapid.T) { take(pool().Lease(ctx, Request{Owner: owner(), Addr: address()})) },
			"release": func(*rapid.T) {
				a, o := address(), owner()
				ok, err := pool().Release(ctx, o, a)
				if err != nil || ok != (model[a].Owner == o) {
					rt.Fatalf("release %s of %s: %v, %v; held by %+v", a, o, ok, err, model[a])
				}
				if ok {
					delete(model, a)
				}
			},
			"release all": func(*rapid.T) {
				o := owner()
				freed, err := pool().ReleaseOwners(ctx, o)
				for _, a := range freed {
					if model[a].Owner != o {
						rt.Fatalf("released %s of %+v", a, model[a])
					}
					delete(model, a)
				}
				for a, l := range model {
					if err != nil || l.Owner == o {
						rt.Fatalf("%s is still held, %v", a, err)
					}
				}
			},
			"link goes": func(*rapid.T) { delete(links, address()) },
			"collect": func(*rapid.T) {
				gone, err := pool().Collect(ctx, func(context.Context) (map[netip.Addr]bool, error) { return links, nil })
				for _, l := range gone {
					if err != nil || links[l.Addr] || model[l.Addr] != l || f.now-l.Since < grace {
						rt.Fatalf("collected %+v of %+v, %v", l, model[l.Addr], err)
					}
					delete(model, l.Addr)
				}
			},
			"time":        func(rt *rapid.T) { f.pass(time.Duration(rapid.IntRange(1, 400).Draw(rt, "s")) * time.Second) },
			"host takes":  func(*rapid.T) { f.occupied.onHost[address()] = "eth0" },
			"host gives":  func(*rapid.T) { delete(f.occupied.onHost, address()) },
			"route comes": func(*rapid.T) { f.occupied.routed[address()] = 17 },
			"route goes":  func(*rapid.T) { delete(f.occupied.routed, address()) },
			"azure lists": func(rt *rapid.T) {
				listed = rapid.IntRange(1, 8).Draw(rt, "n")
				f.list(nic(mac1, "10.0.0.0/24", listed))
				f.pass(time.Minute) // and it is heard
			},
			"": func(*rapid.T) {
				s, err := base.at(dir).readState(ctx, "test")
				got := map[netip.Addr]Lease{}
				for a := range s.Leases {
					got[a], _ = s.leaseOf(a)
				}
				if diff := cmp.Diff(model, got, compareState); err != nil || diff != "" {
					rt.Fatalf("%v; leases (-want +got):\n%s", err, diff)
				}
				for a := range s.Freed {
					if _, ok := s.Leases[a]; ok {
						rt.Fatalf("%s is held and free", a)
					}
				}
			},
		})
	})
}

func (p *Pool) at(dir string) *Pool {
	q := *p
	q.path = filepath.Join(dir, "leases.json")
	return &q
}
