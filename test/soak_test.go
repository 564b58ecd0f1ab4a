// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
)

// TestSoak does what goes wrong on a host, at random and for long, and says
// each time that the containers that run are reached, each at an address of its
// own, and that what is gone leaves nothing. SOAK is for how long, such as 10m;
// SOAK_SEED repeats a run.
func TestSoak(t *testing.T) {
	length, err := time.ParseDuration(os.Getenv("SOAK"))
	if err != nil {
		t.Skip("takes long: make soak")
	}
	seed := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv("SOAK_SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("SOAK_SEED=%d", seed)
	dice := rand.New(rand.NewPCG(seed, 0))

	_, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 12}, vnetsim.VMConfig{})
	h, plain := vms[0], onHost(vms[1])
	h.withPlugin("COOL_DOWN=5s")
	h.network("azure")
	h.network("alone", "mode=transparent")
	boot := func(args ...string) {
		if err := h.Boot(); err != nil {
			t.Fatal(err)
		}
		h.startEngine(args...)
	}
	running := map[string]bool{}
	next := 0
	misfortunes := map[string]func(){
		"a container starts": func() {
			if len(running) == 8 {
				return
			}
			next++
			name := fmt.Sprintf("c%d", next)
			h.container([]string{"azure", "alone"}[next%2], name, "sleep 100000", "--restart", "always")
			running[name] = true
		},
		"a container goes": func() {
			for name := range running {
				h.docker("rm", "-f", name)
				delete(running, name)
				return
			}
		},
		"a container restarts": func() {
			for name := range running {
				h.docker("restart", "-t", "0", name)
				return
			}
		},
		"the plugin is killed": func() {
			h.killPlugin()
			// An engine that is still checking a plugin it has just restarted (10 s at most)
			// gives up on it for good if it is killed then: seen on 20.10.
			eventually(t, "the engine restarts the plugin and is content", time.Minute, func() bool {
				_, err := h.try("sh", "-c", "[ $(ps -o etimes= -p $(busybox pidof azure-vnet-plugin)) -gt 3 ]")
				return err == nil
			})
		},
		"the plugin is disabled":      func() { h.docker("plugin", "disable", "-f", plugin); h.docker("plugin", "enable", plugin) },
		"dockerd is stopped":          func() { h.stopEngine(syscall.SIGTERM); h.startEngine() },
		"dockerd is killed":           func() { h.stopEngine(syscall.SIGKILL); h.startEngine() },
		"the power is cut":            func() { h.must("sync"); h.cut(); boot() },
		"somebody flushes nft":        func() { h.must("nft", "flush", "ruleset") },
		"somebody flushes FORWARD":    func() { h.must("iptables", "-F", "FORWARD") },
		"somebody deletes azure0":     func() { h.must("sh", "-c", "ip link del azure0 || true") }, // it stands only while it is asked for
		"somebody flushes our routes": func() { h.must("ip", "route", "flush", "table", "all", "proto", "168") },
		"somebody flushes rules":      func() { h.must("sh", "-c", "ip rule del lookup 16863 || true") },
		"somebody flushes neighbours": func() { h.must("sh", "-c", "ip neigh flush nud permanent proto 168") },
		"somebody takes a port out": func() {
			h.must("sh", "-c", "for l in /sys/class/net/azure0/brif/*; do ip link set $(basename $l) nomaster; break; done; true")
		},
		"somebody turns sysctls off":  func() { h.must("sysctl", "-w", "net.ipv4.ip_forward=0") },
		"somebody changes eth0's MTU": func() { h.must("ip", "link", "set", "eth0", "mtu", strconv.Itoa(1400+dice.IntN(100))) },
	}
	var names []string
	for name := range misfortunes {
		names = append(names, name)
	}
	for end := time.Now().Add(length); time.Now().Before(end); {
		what := names[dice.IntN(len(names))]
		t.Logf("%s, with %d containers", what, len(running))
		misfortunes[what]()
		seen := map[string]string{}
		for name := range running {
			// A container that died with the engine is started again by it, with a new address perhaps.
			eventually(t, name+" is reached after: "+what, 40*time.Second, func() bool {
				addr, err := h.try(client, "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", name)
				if err != nil || addr == "" {
					return false
				}
				if other, taken := seen[addr]; taken && other != name {
					t.Fatalf("%s and %s both have %s", name, other, addr)
				}
				seen[addr] = name
				_, err = plain.try("ping", "-c", "1", "-W", "1", addr)
				return err == nil
			})
		}
		eventually(t, "the host is reached after: "+what, 30*time.Second, func() bool {
			_, err := plain.try("ping", "-c", "1", "-W", "1", h.Primary.String())
			return err == nil
		})
	}
	for name := range running {
		h.docker("rm", "-f", name)
	}
	// Calls that were lost while the plugin was away are healed after five minutes.
	eventually(t, "no lease and no link is left", 6*time.Minute, func() bool {
		s := h.state()
		return len(s.Leases)+len(s.Attachments) == 0
	})
	h.empty()
}

// cut takes the power away.
func (h host) cut() {
	h.t.Helper()
	if err := h.PowerCut(); err != nil {
		h.t.Fatal(err)
	}
}

// TestTwentyBoots is a host that loses power again and again.
func TestTwentyBoots(t *testing.T) {
	if !soaking {
		t.Skip("takes long: make soak")
	}
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	h, plain := vms[0], onHost(vms[1])
	h.withPlugin()
	h.network("azure")
	h.container("azure", "always", "sleep 100000", "--restart", "always")
	for i := range 20 {
		h.cut()
		if err := h.Boot(); err != nil {
			t.Fatal(err)
		}
		h.startEngine()
		eventually(t, fmt.Sprintf("the container is back after boot %d", i+1), 30*time.Second, func() bool {
			addr, err := h.try(client, "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", "always")
			if err != nil || addr == "" {
				return false
			}
			_, err = plain.try("ping", "-c", "1", "-W", "1", addr)
			return err == nil
		})
		h.holds(1)
	}
	clean(t, vnet)
}
