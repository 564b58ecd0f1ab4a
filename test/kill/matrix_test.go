// Copyright (c) The azure-vnet authors. MIT licence.

package kill

import (
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"azurevnet/test"
)

// history is what happens to a host again and again, with one call of it killed at another step each time. Each begins and
// ends with the same state of the host.
type history struct {
	begin func()                     // before the call; nil: nothing
	call  func(tr *trace)            // the call that is killed
	next  func(way int, heal func()) // the calls that follow it. A way is one order of them; each has the same end.
	heal  func()                     // a round of reconciling, past the grace that a leak is given
	pods  []string                   // whose namespaces are looked at
	end   func()                     // back to the beginning

	patience time.Duration // until a round that began has ended; 0: heal waits for it
}

// ways are so many that each is met when every seventh step is tried.
const ways = 3

// stride is how many steps the tests go on to the next kill. It is coprime to ways.
var stride = map[bool]int{true: 1, false: 7}[test.Soaking]

// try runs a history without a kill, and then with one after every stride-th step. offset differs between cases.
func (hi history) try(t *testing.T, host test.Host, p *probes, offset int) {
	before := p.last()
	want, steps := hi.run(host, &trace{}, 0, nil)
	if lost := p.lost(before); lost > 1 {
		t.Errorf("without a kill, %d probes of the host were lost: this history shows nothing", lost)
	}
	begun := picture(host, hi.pods...)
	t.Logf("%d steps: %q", len(steps), steps)
	kills := 0
	for at := 1 + offset%stride; at <= len(steps) && !t.Failed(); at += stride {
		before := p.last()
		is, done := hi.run(host, &trace{killAt: at}, at%ways, want)
		if len(done) < at {
			t.Logf("kill %d: there were %d steps only", at, len(done))
			continue
		}
		kills++
		diff, lost := cmp.Diff(want, is), p.lost(before)
		if diff != "" {
			t.Errorf("the host is not as without the kill (- without, + with):\n%s", diff)
		}
		if lost > 1 {
			t.Errorf("%d probes of the host were lost", lost)
		}
		if t.Failed() {
			t.Errorf("it was killed after step %d (%s), way %d", at, done[at-1], at%ways)
		}
	}
	if diff := cmp.Diff(begun, picture(host, hi.pods...)); diff != "" {
		t.Errorf("the last history does not end as the first one did (- first, + last):\n%s", diff)
	}
	t.Logf("%d kills", kills)
}

// run runs the history once. It returns the state before its end, and the steps of the call. The state is looked at until
// it is as wanted: a plugin does its rounds by itself.
func (hi history) run(host test.Host, tr *trace, way int, want []string) (state, steps []string) {
	if hi.begin != nil {
		hi.begin()
	}
	hi.call(tr)
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
	return state, tr.done()
}
