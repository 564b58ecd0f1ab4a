// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
)

// The first container of a bridge is reached as soon as its attach has ended. A bridge without ports has no carrier, and
// for some time after it has a port the kernel drops what it sends.
func TestTheFirstContainerIsReachedAtOnce(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		c := h.container(0)
		e := c.endpoint(mode, Policy{SNAT: true})
		for range 20 {
			var lost error
			if err := h.Do(func() error {
				if _, err := h.Attach(t.Context(), e); err != nil {
					return err
				}
				here := place{h.Name, func(f func() error) error { return f() }}
				lost = echo(here, c.addr, small, 500*time.Millisecond)
				return h.Detach(t.Context(), e.Owner)
			}); err != nil {
				t.Fatal(err)
			}
			if lost != nil {
				t.Fatalf("after the attach: %v", lost)
			}
		}
	})
}
