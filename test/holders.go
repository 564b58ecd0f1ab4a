// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"net/netip"
	"sync"
	"testing"
)

// Holders say who has which address, and when two do.
type Holders struct {
	t     *testing.T
	mu    sync.Mutex
	By    map[netip.Addr]string // guarded by mu
	Taken map[string]int        // guarded by mu: how often, by the first letter of the holder
}

// NewHolders are holders of nothing yet.
func NewHolders(t *testing.T) *Holders {
	return &Holders{t: t, By: map[netip.Addr]string{}, Taken: map[string]int{}}
}

// Take notes an address when its holder has it.
func (h *Holders) Take(addr netip.Addr, who string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if other := h.By[addr]; other != "" {
		h.t.Errorf("%s is lent to %s while %s has it", addr, who, other)
	}
	h.By[addr] = who
	h.Taken[who[:1]]++
}

// Give forgets one just before its holder gives it back.
func (h *Holders) Give(addr netip.Addr) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.By, addr)
}
