// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"context"
	"fmt"
)

// gate keeps calls waiting until the plugin is ready, and tells those that wait
// too long for what.
type gate struct {
	waiting string        // what the gate waits for
	opened  chan struct{} // closed when it is open
	refused error         // why it opened on nothing; written before opened is closed
}

func newGate(waiting string) *gate {
	return &gate{waiting: waiting, opened: make(chan struct{})}
}

// open lets all calls through, or, with an error, refuses them all with it. It is
// called once.
func (g *gate) open(refused error) {
	g.refused = refused
	close(g.opened)
}

// wait returns nil when the gate is open.
func (g *gate) wait(ctx context.Context) error {
	select {
	case <-g.opened:
		return g.refused
	case <-ctx.Done():
		return fmt.Errorf("azure-vnet is not ready yet: %s; try again", g.waiting)
	}
}
