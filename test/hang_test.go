// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"azurevnet/internal/statefile"
	"azurevnet/internal/vnetsim"
)

// failsInTime runs a docker command that fails with an error that says want,
// within the 20 s that a call may take, and what the engine adds.
func (h host) failsInTime(want string, arg ...string) {
	h.t.Helper()
	start := time.Now()
	h.refused(arg, want)
	if took := time.Since(start); took > 24*time.Second {
		h.t.Errorf("docker %s: it took %v", strings.Join(arg, " "), took)
	}
}

// shutdown is how long an engine may take to end while all that it asks the plugin
// hangs: it waits for a container that starts, which has one call of 9 s, or for two of
// 5 s of each that runs. After 15 s it gives up.
const shutdown = 13 * time.Second

// endsInTime ends the engine as systemd does.
func (h host) endsInTime(within time.Duration) {
	h.t.Helper()
	start := time.Now()
	h.stopEngine(syscall.SIGTERM)
	took := time.Since(start).Round(time.Millisecond)
	h.t.Logf("the engine ended after %v", took)
	if took > within {
		h.t.Errorf("the engine took %v to end, and may take %v", took, within)
	}
}

// hangingRun has a docker run begin, and returns when it hangs in a call: its container
// is made, and a second later not started. One that is refused at once, since the
// source was asked just before, begins again.
func (h host) hangingRun(network string) (ended chan struct{}) {
	h.t.Helper()
	hangs := func() bool {
		ended = make(chan struct{})
		go func() {
			defer close(ended)
			h.try(client, "run", "--rm", "--network", network, "busybox", "true")
		}()
		select {
		case <-ended:
			return false
		case <-time.After(1500 * time.Millisecond):
			return h.docker("ps", "-aq", "--filter", "status=created") != ""
		}
	}
	eventually(h.t, "a container hangs as it starts", 20*time.Second, hangs)
	return ended
}

func TestWhatHangsHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 3}, vnetsim.VMConfig{Secondaries: 1})
	h, deaf := vms[0], vms[1]
	h.withPlugin()
	h.network("azure")
	h.container("azure", "one", "sleep 100000")

	t.Run("no source answers: addresses that are known are lent, and no more", func(t *testing.T) {
		for _, source := range []vnetsim.Source{vnetsim.HostAgent, vnetsim.IMDS} {
			if err := vnet.SetFault(source, vnetsim.BlackHole); err != nil {
				t.Fatal(err)
			}
			defer vnet.SetFault(source, vnetsim.Healthy)
		}
		h := h.in(t)
		h.container("azure", "two", "sleep 100000")
		h.container("azure", "three", "sleep 100000")
		h.failsInTime("no free address", "run", "--rm", "--network", "azure", "busybox", "true")
		h.docker("rm", "-f", "two", "three")
		h.holds(1)

		deaf := deaf.in(t)
		deaf.withPlugin() // listens though it knows nothing
		deaf.failsInTime("no answer from", "network", "create", "-d", plugin, "--ipam-driver", plugin, "--subnet", deaf.Prefix.String(), "azure")
	})
	t.Run("an engine that hangs is none of the plugin's business", func(t *testing.T) {
		h := h.in(t)
		resume, err := h.HangDocker(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		h.holds(1) // status answers
		// The plugin ends in time, though the one who started it does not look.
		h.must("sh", "-c", "kill $(busybox pidof azure-vnet-plugin)")
		eventually(t, "the plugin ends", 10*time.Second, func() bool {
			state, err := h.try("sh", "-c", "ps -o stat= -C azure-vnet-plug,azure-vnet-plugin | grep -v Z")
			return err != nil && state == ""
		})
		if err := resume(); err != nil {
			t.Fatal(err)
		}
		h.container("azure", "after", "sleep 100000")
		h.docker("rm", "-f", "after")
		h.holds(1)
	})
	t.Run("no source answers: the engine ends all the same", func(t *testing.T) {
		h := h.in(t)
		h.container("azure", "two", "sleep 100000")
		h.container("azure", "three", "sleep 100000")
		for _, source := range []vnetsim.Source{vnetsim.HostAgent, vnetsim.IMDS} {
			if err := h.SetFault(source, vnetsim.BlackHole); err != nil {
				t.Fatal(err)
			}
			defer h.SetFault(source, vnetsim.Healthy)
		}
		hangs := h.hangingRun("azure")
		h.endsInTime(shutdown)
		<-hangs
		h.startEngine()
		h.docker("rm", "-f", "two", "three")
		h.docker("start", "one")
		h.holds(1)
	})
	t.Run("a lock that is not given back: the call says whose it is, and the engine still ends", func(t *testing.T) {
		h := h.in(t)
		path := fmt.Sprintf("/proc/%d/root/run/azure-vnet/leases.json.lock", h.PidOne())
		unlock, err := statefile.Lock(t.Context(), path, "a sleeper")
		if err != nil {
			t.Fatal(err)
		}
		defer unlock()
		h.failsInTime("a sleeper", "run", "--rm", "--network", "azure", "busybox", "true")
		hangs := h.hangingRun("azure")
		h.endsInTime(shutdown)
		<-hangs
	})
	h.startEngine()
	h.docker("rm", "-f", "one")
	h.leasesAged() // of calls that came while the lock was held
	eventually(t, "nothing is left", 40*time.Second, func() bool { return h.counts() == 0 })
	clean(t, vnet)
}

// TestADiskThatHangs: a frozen file system, which no signal wakes a process from.
func TestADiskThatHangs(t *testing.T) {
	if !soaking {
		t.Skip("takes long: make soak")
	}
	_, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 3})
	h := vms[0]
	if err := built(); err != nil {
		t.Fatal(err)
	}
	h.withEngine()
	h.docker("plugin", "create", plugin, top+"/build/plugin")
	disk := "/var/lib/docker/plugins/" + h.docker("plugin", "inspect", "-f", "{{.Id}}", plugin) + "/propagated-mount"
	if _, err := h.try("sh", "-euc", "mkdir -p "+disk+"; truncate -s 32M /run/disk; mkfs.ext4 -q /run/disk; mount -o loop /run/disk "+disk); err != nil {
		t.Skip("no loop devices here: ", err)
	}
	h.docker("plugin", "enable", plugin)
	h.network("azure")
	h.container("azure", "one", "sleep 100000")
	h.must("fsfreeze", "-f", disk)
	thawed := false
	thaw := func() {
		if !thawed {
			thawed = true
			h.must("fsfreeze", "-u", disk)
		}
	}
	defer thaw()
	h.failsInTime("hangs", "network", "create", "-d", plugin, "--ipam-driver", plugin, "--subnet", h.Prefix.String(), "second")
	h.container("azure", "two", "sleep 100000") // needs no write to that disk
	h.docker("rm", "-f", "two")
	h.holds(1)
	h.endsInTime(18 * time.Second) // no signal ends the plugin, and the engine gives up after 15 s
	thaw()
	h.startEngine()
	h.network("third")
	h.docker("start", "one")
	h.docker("rm", "-f", "one")
	h.empty()
}
