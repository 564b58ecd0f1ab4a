// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"context"
	"encoding/json"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// killPlugin is what an out-of-memory killer does to it.
func killPlugin(h test.Host) {
	h.T.Helper()
	h.Must("sh", "-c", "kill -9 $(busybox pidof azure-vnet-plugin)")
}

func stopEngine(h test.Host, sig syscall.Signal) {
	h.T.Helper()
	ctx, cancel := context.WithTimeout(h.T.Context(), time.Minute)
	defer cancel()
	if err := h.StopDocker(ctx, sig); err != nil {
		h.T.Fatal(err)
	}
}

// holds says that the VM holds exactly so many addresses, each attached once.
func holds(h test.Host, count int) {
	h.T.Helper()
	test.Eventually(h.T, "a lease and a link for each container and no more", 20*time.Second, func() bool {
		s := h.State()
		return len(s.Leases) == count && len(s.Attachments) == count
	})
}

// misfortunes are all ways in which a plugin, its engine or its VM goes away and
// comes back; meanwhile is what happens between the two, where something can.
var misfortunes = []struct {
	name   string
	happen func(h test.Host, meanwhile func())
	ends   bool // every container
	lossy  bool // the engine goes on meanwhile, so its calls are lost
	soak   bool // much like another one, so that make soak alone has it
}{
	{name: "the plugin is killed", happen: func(h test.Host, meanwhile func()) { killPlugin(h); meanwhile() }},
	{name: "the plugin is disabled and enabled", soak: true, lossy: true, happen: func(h test.Host, meanwhile func()) {
		h.Docker("plugin", "disable", "-f", test.Plugin)
		meanwhile()
		h.Docker("plugin", "enable", test.Plugin)
	}},
	{name: "the plugin is replaced by another build", soak: true, lossy: true, happen: func(h test.Host, meanwhile func()) {
		h.Docker("plugin", "disable", "-f", test.Plugin)
		meanwhile()
		build := filepath.Join(test.Top, "build")
		h.Must(filepath.Join(test.Top, "scripts", "plugin.sh"), "install", build+"/plugin", build+"/azure-vnet-plugin", "/run/prefix")
	}},
	{name: "dockerd gets SIGTERM", soak: true, ends: true, happen: func(h test.Host, _ func()) {
		stopEngine(h, syscall.SIGTERM)
		h.StartEngine()
	}},
	{name: "dockerd is killed", soak: true, ends: true, happen: func(h test.Host, meanwhile func()) {
		stopEngine(h, syscall.SIGKILL)
		meanwhile()
		h.StartEngine()
	}},
	{name: "dockerd and the plugin are killed", soak: true, ends: true, happen: func(h test.Host, meanwhile func()) {
		stopEngine(h, syscall.SIGKILL)
		killPlugin(h)
		meanwhile()
		h.StartEngine()
	}},
	{name: "dockerd gets SIGTERM and live-restore is turned on", ends: true, happen: func(h test.Host, _ func()) {
		stopEngine(h, syscall.SIGTERM)
		h.StartEngine("--live-restore")
	}},
	{name: "dockerd gets SIGTERM under live-restore", soak: true, happen: func(h test.Host, meanwhile func()) {
		stopEngine(h, syscall.SIGTERM)
		meanwhile()
		h.StartEngine("--live-restore")
	}},
	{name: "dockerd is killed under live-restore", soak: true, happen: func(h test.Host, meanwhile func()) {
		stopEngine(h, syscall.SIGKILL)
		meanwhile()
		h.StartEngine("--live-restore")
	}},
	{name: "dockerd and the plugin are killed under live-restore", happen: func(h test.Host, meanwhile func()) {
		stopEngine(h, syscall.SIGKILL)
		killPlugin(h)
		meanwhile()
		h.StartEngine("--live-restore")
	}},
	{name: "the power is cut", ends: true, happen: func(h test.Host, _ func()) {
		h.Must("sync")
		cut(h)
		if err := h.Boot(); err != nil {
			h.T.Fatal(err)
		}
		h.StartEngine()
	}},
}

// TestEveryRestart: through every misfortune a container that is always restarted
// is there, and goes on where nothing ends it; one that dies meanwhile gives back its
// address, and starts again.
func TestEveryRestart(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 8}, vnetsim.VMConfig{})
	h, plain := vms[0], test.OnHost(vms[1])
	h.WithPlugin()
	h.Network("azure")
	h.Network("alone", "mode=transparent")
	h.Container("azure", "always", "sleep 100000", "--restart", "always")
	h.Container("alone", "lone", "sleep 100000", "--restart", "always")
	h.Container("azure", "once", "sleep 100000")
	used := map[netip.Addr]bool{}
	answers := func(addr string) bool {
		_, err := plain.Try("ping", "-c", "1", "-W", "1", addr)
		return err == nil
	}
	for _, m := range misfortunes {
		t.Run(m.name, func(t *testing.T) {
			if m.soak && !test.Soaking {
				t.Skip("one much like it runs: make soak")
			}
			h := h.In(t)
			died := false
			before, pid := h.Address("always").String(), h.Docker("inspect", "-f", "{{.State.Pid}}", "once")
			lone := h.Address("lone").String()
			started := h.Docker("inspect", "-f", "{{.State.StartedAt}}", "always")
			m.happen(h, func() {
				for _, addr := range []string{before, lone} {
					if !answers(addr) {
						t.Errorf("%s is not reached meanwhile", addr)
					}
				}
				if m.lossy && !test.Soaking {
					return // the engine repeats each of four calls for 15 s
				}
				died = true
				h.Must("kill", "-9", pid)
				if m.lossy {
					h.Docker("inspect", "once") // answers when the engine has given up
				}
			})
			if after := h.Address("always").String(); !m.ends && after != before {
				t.Errorf("always had %s and has %s", before, after)
			}
			if after := h.Address("lone").String(); !m.ends && after != lone {
				t.Errorf("lone had %s and has %s", lone, after)
			}
			if since := h.Docker("inspect", "-f", "{{.State.StartedAt}}", "always"); !m.ends && since != started {
				t.Errorf("always ran since %s and runs since %s", started, since)
			}
			if died && m.lossy {
				h.LeasesAged()
			}
			test.Eventually(t, "a lease and a link for each container that runs", 40*time.Second, func() bool {
				return counts(h) == len(strings.Fields(h.Docker("ps", "-q")))
			})
			h.Docker("start", "once")
			h.Container("azure", "new", "sleep 100000")
			for _, name := range []string{"always", "lone", "once", "new"} {
				test.Eventually(t, name+" answers", 20*time.Second, func() bool { return answers(h.Address(name).String()) })
				used[h.Address(name)] = true
			}
			h.Docker("rm", "-f", "new")
			holds(h, 3)
		})
	}
	h.Docker("rm", "-f", "always", "lone", "once")
	h.Empty()
	h.Docker("network", "rm", "azure", "alone")
	test.NothingDropped(t, vnet, slices.Collect(maps.Keys(used))...)
}

// counts is how many containers the VM has addresses and links for, -1 if it does not agree.
func counts(h test.Host) int {
	s := h.State()
	if len(s.Leases) != len(s.Attachments) {
		return -1
	}
	return len(s.Leases)
}

// TestWhatWasLostHeals: an engine repeats no call that came while the plugin was away. Such a loss heals by itself:
// leaked addresses and links go after five minutes, and networks after a minute.
func TestWhatWasLostHeals(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 3})
	h := vms[0]
	h.WithPlugin()
	h.Network("azure")
	spare := h.Secondaries()[2].String()
	h.Docker("network", "create", "-d", test.Plugin, "--ipam-driver", test.Plugin, "--subnet", h.Prefix.String(), "--aux-address", "spare="+spare, "lost")
	h.Network("alone", "mode=transparent")
	h.Container("azure", "removed", "sleep 100000")
	h.Container("alone", "died", "sleep 100000")
	if s := h.State(); len(s.Leases) != 3 || len(s.Attachments) != 2 {
		t.Fatalf("two containers and an auxiliary address, and the state is %+v", s)
	}
	h.Docker("plugin", "disable", "-f", test.Plugin)
	failed := make(chan error)
	for _, arg := range [][]string{{"rm", "-f", "removed"}, {"kill", "died"}, {"network", "rm", "lost"}} {
		go func() { _, err := h.Try(test.Client, arg...); failed <- err }()
	}
	for range 3 {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
	h.Docker("inspect", "died") // answers when the engine has given up
	if s := h.State(); len(s.Leases) != 3 || len(s.Attachments) != 2 {
		t.Errorf("the engine's calls were lost, and the state is %+v", s)
	}
	h.LeasesAged()
	h.Docker("plugin", "enable", test.Plugin)
	test.Eventually(t, "the containers' leases and links end", 40*time.Second, func() bool {
		s := h.State()
		return len(s.Leases) == 1 && len(s.Attachments) == 0
	})
	test.Eventually(t, "the removed network is forgotten", 2*time.Minute, func() bool { return len(networkIDs(h)) == 2 })
	h.Empty()
	h.Docker("start", "died")
	h.Docker("rm", "-f", "died")
	again := h.Container("azure", "again", "ping "+h.Gateway.String(), "--ip", spare)
	test.Eventually(t, "the spare address is used", 10*time.Second, func() bool {
		accepted, err := vnet.Accepted()
		return err == nil && accepted[again] > 0
	})
	h.Docker("rm", "-f", "again")
	test.NothingDropped(t, vnet)
}

// networkIDs are the ids in networks.json.
func networkIDs(h test.Host) (ids []string) {
	h.T.Helper()
	var report struct{ Networks map[string]any }
	if err := json.Unmarshal([]byte(h.Must(test.PluginBinary, "status", "-json")), &report); err != nil {
		h.T.Fatal(err)
	}
	for id := range report.Networks {
		ids = append(ids, id)
	}
	return ids
}
