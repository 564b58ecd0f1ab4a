// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"context"
	"fmt"
)

// Known returns the VM's NICs as they were last told, the primary first. No
// source is asked: ErrSource if none has answered yet.
func (p *Pool) Known(ctx context.Context) ([]NIC, error) {
	s, err := p.read(ctx, "look up the known NICs")
	if err != nil {
		return nil, fmt.Errorf("look up the known NICs: %w", err)
	}
	a, _, ok := p.known(&s)
	if !ok {
		return nil, fmt.Errorf("look up the known NICs: %w", p.silence(&s))
	}
	return a.NICs, nil
}
