// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"azurevnet/internal/vnetsim"
)

// Attaches at once, some of them in processes of their own, do not disturb each other. Of two owners that want
// one address exactly one has it.
func TestAttachAtOnce(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		for _, p := range []Policy{{SNAT: true}, {}} { // whose chains stay when their endpoints are gone
			if err := h.Do(func() error { return h.LearnPolicy(t.Context(), p) }); err != nil {
				t.Fatal(err)
			}
		}
		none := h.kernelState()
		const addresses = 20
		wish := func(i, owner int) Endpoint {
			e := Endpoint{Owner: fmt.Sprintf("docker/%d/%d", i, owner), NIC: h.MAC, Policy: Policy{SNAT: i%2 == 0},
				Addr: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 240, 1, byte(i)}), 16)}
			if mode == ModeBridge {
				e.Bridge = "azure0"
			}
			return e
		}
		attach := func(i, owner int) error {
			if i%5 == 0 && owner == 1 {
				out, err := h.child(childCall{Do: "attach", Endpoint: wish(i, owner)})
				if err != nil {
					return fmt.Errorf("%w: %s", err, out)
				}
				return nil
			}
			_, err := h.attach(wish(i, owner))
			return err
		}
		var wait sync.WaitGroup
		var won [addresses]atomic.Int32
		for i := range addresses {
			for owner := range 2 {
				wait.Go(func() {
					if err := attach(i, owner); err == nil {
						won[i].Add(1)
					} else if !strings.Contains(err.Error(), "has the address") {
						t.Error(err)
					}
				})
			}
		}
		wait.Wait()
		for i := range won {
			if got := won[i].Load(); got != 1 {
				t.Errorf("%d owners got address %d", got, i)
			}
		}
		whole := h.kernelState()
		if mended := h.reconcile(); len(mended) > 0 {
			t.Errorf("not whole after attaches at once: %q", mended)
		}
		checkSame(t, "a reconcile changed what attaches made", whole, h.kernelState())
		for i := range addresses {
			for owner := range 2 {
				wait.Go(func() {
					if err := h.detach(wish(i, owner).Owner); err != nil {
						t.Error(err)
					}
				})
			}
		}
		wait.Wait()
		checkSame(t, "left after all are detached", none, h.kernelState())
	})
}

// Of several attaches of one container and interface one wins, and the others harm nothing: neither those of one
// owner, nor those of owners with an address each.
func TestOneInterfaceAtOnce(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 4})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		c := h.container(0)
		race := func(wishes []Endpoint, refused func(error) bool) (winner Attachment) {
			var wait sync.WaitGroup
			var mu sync.Mutex
			for _, e := range wishes {
				wait.Go(func() {
					a, err := h.attach(e)
					mu.Lock()
					defer mu.Unlock()
					switch {
					case err == nil && winner.Owner != "":
						t.Errorf("both %s and %s won", winner.Link, a.Link)
					case err == nil:
						winner = a
					case !refused(err):
						t.Error(err)
					}
				})
			}
			wait.Wait()
			if winner.Owner == "" {
				t.Fatal("nobody won")
			}
			if !c.pings(h.Primary) {
				t.Errorf("%s does not reach its host", c.name)
			}
			h.whole("after the race")
			h.mustDetach(winner.Owner)
			return winner
		}
		same := c.endpoint(mode, Policy{SNAT: true})
		race([]Endpoint{same, same, same, same}, func(err error) bool { return errors.Is(err, ErrAttached) })
		none := h.kernelState()
		var others []Endpoint
		for i, addr := range h.Secondaries() {
			e := same
			e.Owner, e.Addr = fmt.Sprintf("cni/net/c/%d", i), netip.PrefixFrom(addr, 16)
			others = append(others, e)
		}
		race(others, func(err error) bool { return strings.Contains(err.Error(), "if eth0 is in") })
		checkSame(t, "left", none, h.kernelState())
	})
}
