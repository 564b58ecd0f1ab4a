// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"context"
	"fmt"
)

// gate has calls wait until the plugin is ready. A call that waits too long gets an error, which names the cause of
// the wait.
type gate struct {
	waiting string        // what the calls wait for, for the error
	opened  chan struct{} // is closed when the gate opens
}

// newGate returns a closed gate.
func newGate(waiting string) *gate {
	return &gate{waiting: waiting, opened: make(chan struct{})}
}

// open lets all calls pass. It is called once.
func (g *gate) open() { close(g.opened) }

// wait returns nil when the gate is open, and an error when ctx is done.
func (g *gate) wait(ctx context.Context) error {
	select {
	case <-g.opened:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("azure-vnet is not ready yet: %s; try again", g.waiting)
	}
}
