// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"context"
	"fmt"
	"net/netip"
)

// KnownNICs returns the VM's NICs as a source last told them, the primary first. It asks no source. It is ErrSource if
// none has answered yet.
func (p *Pool) KnownNICs(ctx context.Context) ([]NIC, error) {
	s, err := p.readState(ctx, "look up the known NICs")
	if err != nil {
		return nil, fmt.Errorf("look up the known NICs: %w", err)
	}
	a, _, ok := p.newestAnswer(&s)
	if !ok {
		return nil, fmt.Errorf("look up the known NICs: %w", p.silenceError(&s))
	}
	return a.NICs, nil
}

// CheckLendable is an error if addr, of the NIC's subnet, cannot be lent now. The error says why. It asks no source.
func (p *Pool) CheckLendable(ctx context.Context, mac string, subnet netip.Prefix, addr netip.Addr) error {
	s, err := p.readState(ctx, "look whether "+addr.String()+" can be lent")
	if err != nil {
		return err
	}
	has, err := p.occupied()
	if err != nil {
		return err
	}
	v, err := p.newSnapshot(&s, has)
	if err == nil {
		_, err = p.pickAddress(&v, Request{MAC: mac, Prefix: subnet, Addr: addr})
	}
	return err
}
