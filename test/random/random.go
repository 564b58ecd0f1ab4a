// Copyright (c) The azure-vnet authors. MIT licence.

// Package random has model tests try random histories: it chooses how many, and which things happen in each. It knows
// nothing of what happens.
package random

import (
	"flag"
	"fmt"
	"os"
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

// Act makes an action that happens often times as often as one whose often is 1.
func Act(often int, name string, do func()) Action { return Action{often, name, do} }

// GoString has a failure tell the action by its name.
func (a Action) GoString() string { return a.name }

// Check tries random histories. make test tries few, the same ones each time, so that it fails only if something has
// changed. make soak tries others, for a tenth of SOAK. A flag on the command line goes before, such as
// -rapid.checks=100. A failure writes no file into the tree: it tells the seed that repeats the history. shrink has rapid
// look for a shorter history that fails.
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
	flag.Visit(func(f *flag.Flag) { delete(settings, f.Name) })
	for name, value := range settings {
		if err := flag.Set(name, value); err != nil {
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

// Run has actions happen, so many on average, each as often as it says. between is called before the first and after each.
func Run(t *rapid.T, steps int, actions []Action, between func()) {
	var all []Action
	for _, a := range actions {
		for range a.often {
			all = append(all, a)
		}
	}
	if err := flag.Set("rapid.steps", fmt.Sprint(steps)); err != nil {
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
