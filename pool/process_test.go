// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
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
