// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"context"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
)

// killPlugin is what an out-of-memory killer does to it.
func (h host) killPlugin() {
	h.t.Helper()
	h.must("sh", "-c", "kill -9 $(busybox pidof azure-vnet-plugin)")
}

func (h host) stopEngine(sig syscall.Signal) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), time.Minute)
	defer cancel()
	if err := h.StopDocker(ctx, sig); err != nil {
		h.t.Fatal(err)
	}
}

// holds says that the VM holds exactly so many addresses, each attached once.
func (h host) holds(count int) {
	h.t.Helper()
	eventually(h.t, "a lease and a link for each container and no more", 20*time.Second, func() bool {
		s := h.state()
		return len(s.Leases) == count && len(s.Attachments) == count
	})
}

func TestEveryRestart(t *testing.T) {
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 8}, vnetsim.VMConfig{})
	h, plain := vms[0], onHost(vms[1])
	h.withPlugin()
	h.network("azure")
	h.container("azure", "always", "sleep 100000", "--restart", "always")
	h.container("azure", "once", "sleep 100000")
	reached := func(t *testing.T, names ...string) {
		t.Helper()
		for _, name := range names {
			addr := h.in(t).address(name)
			eventually(t, name+" answers from "+addr.String(), 20*time.Second, func() bool {
				_, err := plain.try("ping", "-c", "1", "-W", "1", addr.String())
				return err == nil
			})
		}
	}
	fresh := func(t *testing.T, name string) {
		t.Helper()
		h := h.in(t)
		h.container("azure", name, "sleep 100000")
		reached(t, name)
		h.docker("rm", "-f", name)
	}
	reached(t, "always", "once")

	t.Run("the plugin killed: containers go on, new ones start", func(t *testing.T) {
		before := []netip.Addr{h.in(t).address("always"), h.in(t).address("once")}
		h.in(t).killPlugin()
		for _, addr := range before {
			if _, err := plain.try("ping", "-c", "1", "-W", "2", addr.String()); err != nil {
				t.Errorf("%s is not reached while the plugin is dead: %v", addr, err)
			}
		}
		fresh(t, "after")
		h.in(t).holds(2)
	})
	t.Run("the plugin disabled and enabled with containers running", func(t *testing.T) {
		h := h.in(t)
		h.docker("plugin", "disable", "-f", plugin)
		reached(t, "always", "once")
		h.docker("plugin", "enable", plugin)
		reached(t, "always", "once")
		fresh(t, "after")
		h.holds(2)
	})
	t.Run("dockerd restarted by SIGTERM: always is back, once gave its address back", func(t *testing.T) {
		h := h.in(t)
		h.stopEngine(syscall.SIGTERM)
		h.startEngine()
		reached(t, "always")
		h.holds(1)
		h.docker("start", "once")
		reached(t, "once")
		h.holds(2)
	})
	t.Run("dockerd killed", func(t *testing.T) {
		h := h.in(t)
		h.stopEngine(syscall.SIGKILL)
		h.startEngine()
		reached(t, "always")
		h.docker("start", "once") // it was ended by the engine's restart, or runs: then this does nothing
		reached(t, "once")
		h.holds(2)
	})
	t.Run("power cut and boot: the network works, always is back", func(t *testing.T) {
		h := h.in(t)
		if err := h.PowerCut(); err != nil {
			t.Fatal(err)
		}
		if err := h.Boot(); err != nil {
			t.Fatal(err)
		}
		h.startEngine()
		reached(t, "always")
		h.docker("start", "once")
		reached(t, "once")
		fresh(t, "after")
		h.holds(2)
	})
	t.Run("live-restore: nothing is noticed", func(t *testing.T) {
		h := h.in(t)
		h.stopEngine(syscall.SIGTERM)
		h.startEngine("--live-restore")
		reached(t, "always")
		h.docker("start", "once")
		before := h.address("always")
		h.stopEngine(syscall.SIGTERM)
		if _, err := plain.try("ping", "-c", "1", "-W", "2", before.String()); err != nil {
			t.Errorf("always is not reached while dockerd is down: %v", err)
		}
		h.startEngine("--live-restore")
		if got := h.address("always"); got != before {
			t.Errorf("always had %s and has %s", before, got)
		}
		reached(t, "always", "once")
		h.holds(2)
	})
	t.Run("all removed, nothing is left", func(t *testing.T) {
		h := h.in(t)
		h.docker("rm", "-f", "always", "once")
		h.empty()
		h.docker("network", "rm", "azure")
	})
	clean(t, vnet)
}
