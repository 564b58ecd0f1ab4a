// Copyright (c) The azure-vnet authors. MIT licence.

package kill

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"azurevnet/internal/dump"
	"azurevnet/test"
)

// history is a series of calls that a test repeats. Each run kills one of the calls after another step, and ends with the
// state of the host that it began with.
type history struct {
	begin func()                     // before the call; nil: nothing
	call  func(tr *trace)            // the call that is killed
	next  func(way int, heal func()) // the calls that follow it. A way is one order of them; each has the same end.
	heal  func()                     // a round of reconciling, past the grace that a leak is given
	pods  []string                   // whose namespaces are looked at
	end   func()                     // back to the beginning

	patience time.Duration // until a round that began has ended; 0: heal waits for it

	count func(kills, steps int) // is told how much was tried; nil: nobody is
}

// ways is the number of orders in which the calls after the kill come. It has no common factor with the stride, so each
// order is met.
const ways = 3

// stride is how many steps the tests go on to the next kill. It is coprime to ways.
var stride = map[bool]int{true: 1, false: 7}[test.Soaking]

// try runs a history without a kill, and then with one after every stride-th step. offset differs between cases.
func (hi history) try(t *testing.T, host test.Host, p *probes, offset int) {
	t.Helper()
	hi.count = func(kills, steps int) { t.Logf("FIGURE kill matrix: %d kills, %d steps", kills, steps) }
	for _, fault := range hi.faults(t, host, p, 1+offset%stride, stride) {
		t.Error(fault)
	}
}

// faults are what differs between the history without a kill and those with one, after the first step and every stride-th
// that follows. The first kill that has a fault is the last one.
func (hi history) faults(t *testing.T, host test.Host, p *probes, first, stride int) (faults []string) {
	t.Helper()
	before := p.last()
	whole := &trace{}
	want, steps, _ := hi.run(host, whole, 0, nil)
	if lost := p.lost(before); lost > 1 {
		t.Fatalf("without a kill, %d probes of the host were lost: this history shows nothing", lost)
	}
	if len(steps) < 3 {
		t.Fatalf("only %d steps were counted: the tracer is blind", len(steps))
	}
	for _, file := range whole.torn {
		faults = append(faults, file+" was renamed before it was written out: a power cut would leave it empty")
	}
	begun := picture(host, hi.pods...)
	kills := 0
	for at := min(first, len(steps)); at <= len(steps) && len(faults) == 0 && !t.Failed(); at += stride {
		before := p.last()
		is, done, unleased := hi.run(host, &trace{killAt: at}, at%ways, want)
		if len(done) < at {
			continue // programs that this one starts do not always do the same
		}
		kills++
		what := fmt.Sprintf("killed after step %d (%s), way %d", at, done[at-1], at%ways)
		if len(unleased) > 0 {
			faults = append(faults, fmt.Sprintf("%s: containers have %v, which can be lent to others", what, unleased))
		}
		if diff := cmp.Diff(want, is); diff != "" {
			faults = append(faults, fmt.Sprintf("%s: the host is not as without the kill (- without, + with):\n%s", what, diff))
		}
		if lost := p.lost(before); lost > 1 {
			faults = append(faults, fmt.Sprintf("%s: %d probes of the host were lost", what, lost))
		}
		if t.Failed() {
			t.Log(what)
		}
	}
	if diff := cmp.Diff(begun, picture(host, hi.pods...)); len(faults) == 0 && diff != "" {
		faults = append(faults, fmt.Sprintf("the last history does not end as the first one did (- first, + last):\n%s", diff))
	}
	if hi.count != nil {
		hi.count(kills, len(steps))
	}
	return faults
}

// run runs the history once. It returns the state before its end, the steps of the call, and the addresses that containers
// have and nobody holds just after it. The state is looked at until it is as wanted: a plugin does its rounds by itself.
func (hi history) run(host test.Host, tr *trace, way int, want []string) (state, steps, unleased []string) {
	if hi.begin != nil {
		hi.begin()
	}
	hi.call(tr)
	unleased = unleasedOf(host)
	hi.next(way, hi.heal)
	hi.heal()
	if want == nil && hi.patience > 0 {
		time.Sleep(time.Second)
	}
	state = picture(host, hi.pods...)
	for deadline := time.Now().Add(hi.patience); want != nil && time.Now().Before(deadline) && !slices.Equal(state, want); {
		time.Sleep(100 * time.Millisecond)
		state = picture(host, hi.pods...)
	}
	hi.end()
	return state, tr.done(), unleased
}

// attached matches the alias of a host's end of a link that is whole.
var attached = regexp.MustCompile(`^azv2 addr=([0-9.]+)/`)

// unleasedOf are the addresses that a host's links lead to, and that leases.json does not know. There is no moment in which
// one may be lent to somebody else.
func unleasedOf(host test.Host) (unleased []string) {
	host.T.Helper()
	var file struct{ Leases map[string]any }
	if text, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/run/azure-vnet/leases.json", host.PidOne())); err == nil {
		_ = json.Unmarshal(text, &file) // one that is torn knows nothing
	}
	if err := host.Do(func() error {
		links, err := dump.Whole(netlink.LinkList)
		for _, l := range links {
			if of := attached.FindStringSubmatch(l.Attrs().Alias); of != nil && file.Leases[of[1]] == nil {
				unleased = append(unleased, of[1])
			}
		}
		return err
	}); err != nil {
		host.T.Fatal(err)
	}
	return unleased
}
