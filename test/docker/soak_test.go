// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// TestSoak does one harm after the other, at random and for long. After each, every
// container is reached at an address of its own. A container that has ended leaves
// nothing. TestChurnWithBreakages does many harms at once. SOAK is for how long, such
// as 10m; SOAK_SEED repeats a run.
func TestSoak(t *testing.T) {
	if test.SoakTime == 0 {
		t.Skip("takes long: make soak")
	}
	seed := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv("SOAK_SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("SOAK_SEED=%d", seed)
	dice := rand.New(rand.NewPCG(seed, 0))

	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 12}, vnetsim.VMConfig{})
	h, plain := vms[0], test.OnHost(vms[1])
	h.WithPlugin("COOL_DOWN=5s")
	h.Network("azure")
	h.Network("alone", "mode=transparent")
	boot := func(args ...string) {
		if err := h.Boot(); err != nil {
			t.Fatal(err)
		}
		h.StartEngine(args...)
	}
	running := map[string]bool{}
	one := func() string { // of those that run; sorted, so that a seed repeats it
		all := slices.Sorted(maps.Keys(running))
		return all[dice.IntN(len(all))]
	}
	next := 0
	misfortunes := map[string]func(){
		"a container starts": func() {
			if len(running) == 8 {
				return
			}
			next++
			name := fmt.Sprintf("c%d", next)
			h.Container([]string{"azure", "alone"}[next%2], name, "sleep 100000", "--restart", "always")
			running[name] = true
		},
		"a container goes": func() {
			if len(running) > 0 {
				name := one()
				h.Docker("rm", "-f", name)
				delete(running, name)
			}
		},
		"a container restarts": func() {
			if len(running) > 0 {
				h.Docker("restart", "-t", "0", one())
			}
		},
		"the plugin is killed": func() {
			killPlugin(h)
			// An engine that is still checking a plugin it has just restarted (10 s at most)
			// gives up on it for good if it is killed then: seen on 20.10.
			test.Eventually(t, "the engine restarts the plugin and is content", time.Minute, func() bool {
				_, err := h.Try("sh", "-c", "[ $(ps -o etimes= -p $(busybox pidof azure-vnet-plugin)) -gt 3 ]")
				return err == nil
			})
		},
		"the plugin is disabled": func() { h.Docker("plugin", "disable", "-f", test.Plugin); h.Docker("plugin", "enable", test.Plugin) },
		"dockerd is stopped":     func() { stopEngine(h, syscall.SIGTERM); h.StartEngine() },
		"dockerd is killed":      func() { stopEngine(h, syscall.SIGKILL); h.StartEngine() },
		"the power is cut":       func() { h.Must("sync"); cut(h); boot() },
	}
	for what, command := range test.Breakages {
		misfortunes[what] = func() { h.Must("sh", "-c", command) }
	}
	names, happened := slices.Sorted(maps.Keys(misfortunes)), 0
	for end := time.Now().Add(test.SoakTime); time.Now().Before(end); happened++ {
		what := names[dice.IntN(len(names))]
		t.Logf("%s, with %d containers", what, len(running))
		misfortunes[what]()
		seen := map[string]string{}
		for name := range running {
			// A container that died with the engine is started again by it, with a new address perhaps.
			test.Eventually(t, name+" is reached after: "+what, 40*time.Second, func() bool {
				addr, err := h.Try(test.Client, "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", name)
				if err != nil || addr == "" {
					return false
				}
				if other, taken := seen[addr]; taken && other != name {
					t.Fatalf("%s and %s both have %s", name, other, addr)
				}
				seen[addr] = name
				_, err = plain.Try("ping", "-c", "1", "-W", "1", addr)
				return err == nil
			})
		}
		test.Eventually(t, "the host is reached after: "+what, 30*time.Second, func() bool {
			_, err := plain.Try("ping", "-c", "1", "-W", "1", h.Primary.String())
			return err == nil
		})
	}
	t.Logf("FIGURE storms: %d misfortunes", happened)
	for name := range running {
		h.Docker("rm", "-f", name)
	}
	// Calls that were lost while the plugin was away are healed after five minutes.
	test.Eventually(t, "no lease and no link is left", 6*time.Minute, func() bool {
		s := h.State()
		return len(s.Leases)+len(s.Attachments) == 0
	})
	h.Empty()
}

// cut takes the power away.
func cut(h test.Host) {
	h.T.Helper()
	if err := h.PowerCut(); err != nil {
		h.T.Fatal(err)
	}
}

// TestTwentyBoots is a host that loses power again and again.
func TestTwentyBoots(t *testing.T) {
	if !test.Soaking {
		t.Skip("takes long: make soak")
	}
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	h, plain := vms[0], test.OnHost(vms[1])
	h.WithPlugin()
	h.Network("azure")
	h.Container("azure", "always", "sleep 100000", "--restart", "always")
	for i := range 20 {
		cut(h)
		if err := h.Boot(); err != nil {
			t.Fatal(err)
		}
		h.StartEngine()
		test.Eventually(t, fmt.Sprintf("the container is back after boot %d", i+1), 30*time.Second, func() bool {
			addr, err := h.Try(test.Client, "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", "always")
			if err != nil || addr == "" {
				return false
			}
			_, err = plain.Try("ping", "-c", "1", "-W", "1", addr)
			return err == nil
		})
		holds(h, 1)
	}
	test.NothingDropped(t, vnet)
}
