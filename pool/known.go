// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"context"
	"fmt"
	"net/netip"
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

// Lendable is an error that says why addr of the NIC's subnet cannot be lent; nil: it can be lent. Lendable asks
// no source.
func (p *Pool) Lendable(ctx context.Context, mac string, subnet netip.Prefix, addr netip.Addr) error {
	s, err := p.read(ctx, "look whether "+addr.String()+" can be lent")
	if err != nil {
		return err
	}
	has, err := p.occupied()
	if err != nil {
		return err
	}
	v, err := p.view(&s, has)
	if err == nil {
		_, err = p.pick(&v, Request{MAC: mac, Prefix: subnet, Addr: addr})
	}
	return err
}
