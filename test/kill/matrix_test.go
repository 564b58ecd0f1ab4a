// Copyright (c) The azure-vnet authors. MIT licence.

package kill

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"azurevnet/test"
)

// history is what happens to a host again and again, with one call of it killed at another step each time. Each begins and
// ends with the same state of the host.
type history struct {
	begin func()                                  // before the call; nil: nothing
	call  func(tr *trace)                         // the call that is killed
	next  func(killed bool, way int, heal func()) // the calls that follow it. A way is one order of them; each has the same end.
	heal  func()                                  // a round of reconciling, past the grace that a leak is given
	pods  []string                                // whose namespaces are looked at
	end   func()                                  // back to the beginning
}

// ways are so many that each is met when every seventh step is tried.
const ways = 3

// stride is how many steps the tests go on to the next kill. It is coprime to ways.
var stride = map[bool]int{true: 1, false: 7}[test.Soaking]

// try runs a history without a kill, and then with one after every stride-th step. offset differs between cases.
func (hi history) try(t *testing.T, host test.Host, p *probes, offset int) {
	var wants [ways][]string
	steps := 0
	for way := range ways { // the state at the end of each is the same
		tr := &trace{}
		wants[way] = hi.run(host, tr, false, way)
		steps = max(steps, len(tr.done()))
		if way == 0 {
			t.Logf("%d steps: %q", steps, tr.done())
		} else if diff := cmp.Diff(wants[0], wants[way]); diff != "" {
			t.Fatalf("way %d without a kill ends otherwise than way 0:\n%s", way, diff)
		}
	}
	kills := 0
	for at := 1 + offset%stride; at <= steps; at += stride {
		before := p.last()
		tr := &trace{killAt: at}
		start := time.Now()
		is := hi.run(host, tr, true, at%ways)
		done := tr.done()
		if len(done) < at {
			t.Logf("kill %d: there were %d steps only", at, len(done))
			continue
		}
		kills++
		what := fmt.Sprintf("killed after step %d (%s), way %d, %v", at, done[at-1], at%ways, time.Since(start).Round(time.Millisecond))
		if diff := cmp.Diff(wants[0], is); diff != "" {
			t.Errorf("%s, the host is not as without the kill (- without, + with):\n%s", what, diff)
		}
		if lost := p.lost(before); lost > 1 {
			t.Errorf("%s, %d probes of the host were lost", what, lost)
		}
	}
	t.Logf("%d kills", kills)
}

// run runs the history once, and tells the state before its end.
func (hi history) run(host test.Host, tr *trace, killed bool, way int) (state []string) {
	if hi.begin != nil {
		hi.begin()
	}
	hi.call(tr)
	hi.next(killed, way, hi.heal)
	hi.heal()
	state = picture(host, hi.pods...)
	hi.end()
	return state
}
