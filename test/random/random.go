// Copyright (c) The azure-vnet authors. MIT licence.

// Package random has model tests try random histories: it chooses how many, and which things happen in each. It knows
// nothing of what happens.
package random

import (
	"flag"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// Action is one thing that may happen in a history.
type Action struct {
	often int
	name  string
	do    func()
}

// Act makes an action. often is its weight: an action of weight 3 happens three times as often as one of weight 1.
func Act(often int, name string, do func()) Action { return Action{often, name, do} }

// GoString has a failure tell the action by its name.
func (a Action) GoString() string { return a.name }

// Check tries random histories. make test tries few, the same ones each time, so that it fails only if something has
// changed. With SOAK set, the seed comes from the time, and Check runs for a tenth of SOAK. A flag on the command line
// overrides these settings, such as -rapid.checks=100. A failure writes no file into the tree: it tells the seed that
// repeats the history. shrink has rapid look for a shorter history that fails.
func Check(t *testing.T, few int, shrink bool, history func(*rapid.T)) {
	t.Helper()
	settings := map[string]string{"rapid.checks": fmt.Sprint(few), "rapid.nofailfile": "true", "rapid.seed": "1"}
	length, err := time.ParseDuration(os.Getenv("SOAK"))
	if err == nil {
		settings["rapid.seed"] = "0" // of the time
	}
	if !shrink {
		settings["rapid.shrinktime"] = "0s"
	}
	for name, value := range settings {
		if err := set(name, value); err != nil {
			t.Fatal(err)
		}
	}
	histories := 0
	for end := time.Now().Add(length / 10); ; {
		rapid.Check(t, func(rt *rapid.T) {
			histories++
			history(rt)
		})
		if t.Failed() || !time.Now().Before(end) {
			t.Logf("FIGURE models: %d histories", histories)
			return
		}
	}
}

// given are the flags that the command line has.
var given = sync.OnceValue(func() map[string]bool {
	all := map[string]bool{}
	flag.Visit(func(f *flag.Flag) { all[f.Name] = true })
	return all
})

// set sets a flag that the command line does not have.
func set(name, value string) error {
	if given()[name] {
		return nil
	}
	return flag.Set(name, value)
}

// Run has actions happen, so many on average, each as often as it says. between is called before the first and after each.
func Run(t *rapid.T, steps int, actions []Action, between func()) {
	var all []Action
	for _, a := range actions {
		for range a.often {
			all = append(all, a)
		}
	}
	if err := set("rapid.steps", fmt.Sprint(steps)); err != nil {
		t.Fatal(err)
	}
	t.Repeat(map[string]func(*rapid.T){
		"act": func(*rapid.T) { Evenly(all...).Draw(t, "what").do() },
		"":    func(*rapid.T) { between() },
	})
}

// Evenly draws each of the values as often as the others. The draws of rapid prefer the first.
func Evenly[T any](values ...T) *rapid.Generator[T] {
	return rapid.Custom(func(t *rapid.T) T {
		n := 0
		for range 10 {
			n <<= 1
			if rapid.Bool().Draw(t, "bit") {
				n++
			}
		}
		return values[n*len(values)>>10]
	})
}
