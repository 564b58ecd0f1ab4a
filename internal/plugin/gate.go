// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"context"
	"fmt"
)

// gate keeps calls waiting until the plugin is ready, and tells those that wait
// too long for what.
type gate struct {
	waiting string        // what the gate waits for
	opened  chan struct{} // closed when it is open
}

func newGate(waiting string) *gate {
	return &gate{waiting: waiting, opened: make(chan struct{})}
}

// open lets all calls through. It is called once.
func (g *gate) open() { close(g.opened) }

// wait returns nil when the gate is open.
func (g *gate) wait(ctx context.Context) error {
	select {
	case <-g.opened:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("azure-vnet is not ready yet: %s; try again", g.waiting)
	}
}
