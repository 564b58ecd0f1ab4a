// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"azurevnet/internal/statefile"
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

// leasesAged makes every lease look older than the grace that a leak is given.
func (h host) leasesAged() {
	h.t.Helper()
	type file struct {
		Leases map[string]*struct {
			Since time.Duration `json:"since"`
		} `json:"leases"`
	}
	path := fmt.Sprintf("/proc/%d/root/run/azure-vnet/leases.json", h.PidOne())
	err := statefile.Update(h.t.Context(), path, "a test", func(f *file) error {
		for _, l := range f.Leases {
			l.Since -= 10 * time.Minute
		}
		return nil
	})
	if err != nil {
		h.t.Fatal(err)
	}
}

// misfortunes are all ways in which a plugin, its engine or its VM goes away and
// comes back; meanwhile is what happens between the two, where something can.
var misfortunes = []struct {
	name   string
	happen func(h host, meanwhile func())
	ends   bool // every container
	lossy  bool // the engine goes on meanwhile, so its calls are lost
}{
	{name: "the plugin is killed", happen: func(h host, meanwhile func()) { h.killPlugin(); meanwhile() }},
	{name: "the plugin is disabled and enabled", lossy: true, happen: func(h host, meanwhile func()) {
		h.docker("plugin", "disable", "-f", plugin)
		meanwhile()
		h.docker("plugin", "enable", plugin)
	}},
	{name: "the plugin is replaced by another build", lossy: true, happen: func(h host, meanwhile func()) {
		h.docker("plugin", "disable", "-f", plugin)
		meanwhile()
		build := filepath.Join(top, "build")
		h.must(filepath.Join(top, "scripts", "plugin.sh"), "install", build+"/plugin", build+"/azure-vnet-plugin", "/run/prefix")
	}},
	{name: "dockerd gets SIGTERM", ends: true, happen: func(h host, _ func()) {
		h.stopEngine(syscall.SIGTERM)
		h.startEngine()
	}},
	{name: "dockerd is killed", ends: true, happen: func(h host, meanwhile func()) {
		h.stopEngine(syscall.SIGKILL)
		meanwhile()
		h.startEngine()
	}},
	{name: "dockerd and the plugin are killed", ends: true, happen: func(h host, meanwhile func()) {
		h.stopEngine(syscall.SIGKILL)
		h.killPlugin()
		meanwhile()
		h.startEngine()
	}},
	{name: "dockerd gets SIGTERM and live-restore is turned on", ends: true, happen: func(h host, _ func()) {
		h.stopEngine(syscall.SIGTERM)
		h.startEngine("--live-restore")
	}},
	{name: "dockerd gets SIGTERM under live-restore", happen: func(h host, meanwhile func()) {
		h.stopEngine(syscall.SIGTERM)
		meanwhile()
		h.startEngine("--live-restore")
	}},
	{name: "dockerd is killed under live-restore", happen: func(h host, meanwhile func()) {
		h.stopEngine(syscall.SIGKILL)
		meanwhile()
		h.startEngine("--live-restore")
	}},
	{name: "dockerd and the plugin are killed under live-restore", happen: func(h host, meanwhile func()) {
		h.stopEngine(syscall.SIGKILL)
		h.killPlugin()
		meanwhile()
		h.startEngine("--live-restore")
	}},
	{name: "the power is cut", ends: true, happen: func(h host, _ func()) {
		h.must("sync")
		h.cut()
		if err := h.Boot(); err != nil {
			h.t.Fatal(err)
		}
		h.startEngine()
	}},
}

// TestEveryRestart: through every misfortune a container that is always restarted
// is there, and goes on where nothing ends it; one that dies meanwhile gives back its
// address, and starts again.
func TestEveryRestart(t *testing.T) {
	t.Parallel()
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 8}, vnetsim.VMConfig{})
	h, plain := vms[0], onHost(vms[1])
	h.withPlugin()
	h.network("azure")
	h.network("alone", "mode=transparent")
	h.container("azure", "always", "sleep 100000", "--restart", "always")
	h.container("alone", "lone", "sleep 100000", "--restart", "always")
	h.container("azure", "once", "sleep 100000")
	used := map[netip.Addr]bool{}
	answers := func(addr string) bool {
		_, err := plain.try("ping", "-c", "1", "-W", "1", addr)
		return err == nil
	}
	for _, m := range misfortunes {
		t.Run(m.name, func(t *testing.T) {
			h := h.in(t)
			died := false
			before, pid := h.address("always").String(), h.docker("inspect", "-f", "{{.State.Pid}}", "once")
			lone := h.address("lone").String()
			started := h.docker("inspect", "-f", "{{.State.StartedAt}}", "always")
			m.happen(h, func() {
				for _, addr := range []string{before, lone} {
					if !answers(addr) {
						t.Errorf("%s is not reached meanwhile", addr)
					}
				}
				if m.lossy && !soaking {
					return // the engine repeats each of four calls for 15 s
				}
				died = true
				h.must("kill", "-9", pid)
				if m.lossy {
					h.docker("inspect", "once") // answers when the engine has given up
				}
			})
			if after := h.address("always").String(); !m.ends && after != before {
				t.Errorf("always had %s and has %s", before, after)
			}
			if after := h.address("lone").String(); !m.ends && after != lone {
				t.Errorf("lone had %s and has %s", lone, after)
			}
			if since := h.docker("inspect", "-f", "{{.State.StartedAt}}", "always"); !m.ends && since != started {
				t.Errorf("always ran since %s and runs since %s", started, since)
			}
			if died && m.lossy {
				h.leasesAged()
			}
			eventually(t, "a lease and a link for each container that runs", 40*time.Second, func() bool {
				return h.counts() == len(strings.Fields(h.docker("ps", "-q")))
			})
			h.docker("start", "once")
			h.container("azure", "new", "sleep 100000")
			for _, name := range []string{"always", "lone", "once", "new"} {
				eventually(t, name+" answers", 20*time.Second, func() bool { return answers(h.address(name).String()) })
				used[h.address(name)] = true
			}
			h.docker("rm", "-f", "new")
			h.holds(3)
		})
	}
	h.docker("rm", "-f", "always", "lone", "once")
	h.empty()
	h.docker("network", "rm", "azure", "alone")
	clean(t, vnet, slices.Collect(maps.Keys(used))...)
}

// counts is how many containers the VM has addresses and links for, -1 if it does not agree.
func (h host) counts() int {
	s := h.state()
	if len(s.Leases) != len(s.Attachments) {
		return -1
	}
	return len(s.Leases)
}

// TestWhatWasLostHeals: an engine repeats no call that came while the plugin was
// away. What that leaks ends by itself: addresses and links after five minutes,
// networks after a minute.
func TestWhatWasLostHeals(t *testing.T) {
	t.Parallel()
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 3})
	h := vms[0]
	h.withPlugin()
	h.network("azure")
	spare := h.Secondaries()[2].String()
	h.docker("network", "create", "-d", plugin, "--ipam-driver", plugin, "--subnet", h.Prefix.String(), "--aux-address", "spare="+spare, "lost")
	h.network("alone", "mode=transparent")
	h.container("azure", "removed", "sleep 100000")
	h.container("alone", "died", "sleep 100000")
	if s := h.state(); len(s.Leases) != 3 || len(s.Attachments) != 2 {
		t.Fatalf("two containers and an auxiliary address, and the state is %+v", s)
	}
	h.docker("plugin", "disable", "-f", plugin)
	failed := make(chan error)
	for _, arg := range [][]string{{"rm", "-f", "removed"}, {"kill", "died"}, {"network", "rm", "lost"}} {
		go func() { _, err := h.try(client, arg...); failed <- err }()
	}
	for range 3 {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
	h.docker("inspect", "died") // answers when the engine has given up
	if s := h.state(); len(s.Leases) != 3 || len(s.Attachments) != 2 {
		t.Errorf("the engine's calls were lost, and the state is %+v", s)
	}
	h.leasesAged()
	h.docker("plugin", "enable", plugin)
	eventually(t, "the containers' leases and links end", 40*time.Second, func() bool {
		s := h.state()
		return len(s.Leases) == 1 && len(s.Attachments) == 0
	})
	eventually(t, "the removed network is forgotten", 2*time.Minute, func() bool { return len(h.networks()) == 2 })
	h.empty()
	h.docker("start", "died")
	h.docker("rm", "-f", "died")
	again := h.container("azure", "again", "ping "+h.Gateway.String(), "--ip", spare)
	eventually(t, "the spare address is used", 10*time.Second, func() bool {
		accepted, err := vnet.Accepted()
		return err == nil && accepted[again] > 0
	})
	h.docker("rm", "-f", "again")
	clean(t, vnet)
}

// networks are the ids in networks.json.
func (h host) networks() (ids []string) {
	h.t.Helper()
	var report struct{ Networks map[string]any }
	if err := json.Unmarshal([]byte(h.must(filepath.Join(top, "build", "azure-vnet-plugin"), "status", "-json")), &report); err != nil {
		h.t.Fatal(err)
	}
	for id := range report.Networks {
		ids = append(ids, id)
	}
	return ids
}
