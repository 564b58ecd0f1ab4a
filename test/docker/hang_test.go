// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"azurevnet/internal/statefile"
	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// failsInTime runs a docker command. The command fails, its error says want, and it ends within 20 s, the longest time
// of a call, and the engine's own delay.
func failsInTime(h test.Host, want string, arg ...string) {
	h.T.Helper()
	start := time.Now()
	h.Refused(arg, want)
	if took := time.Since(start); took > 24*time.Second {
		h.T.Errorf("docker %s: it took %v", strings.Join(arg, " "), took)
	}
}

// shutdown is the longest time in which an engine ends while its calls to the plugin hang. A container that starts has
// one call of 9 s. A container that runs has two calls of 5 s. After 15 s the engine gives up, and ends later than that.
const shutdown = 15 * time.Second

// endsInTime ends the engine as systemd does.
func endsInTime(h test.Host, within time.Duration) {
	h.T.Helper()
	start := time.Now()
	stopEngine(h, syscall.SIGTERM)
	took := time.Since(start).Round(time.Millisecond)
	h.T.Logf("the engine ended after %v", took)
	if took > within {
		h.T.Errorf("the engine took %v to end, and may take %v", took, within)
	}
}

// hangingRun has a docker run begin, and returns when it hangs in a call: its container
// is made, and a second later not started. One that is refused at once, since the
// source was asked just before, begins again.
func hangingRun(h test.Host, network string) (ended chan struct{}) {
	h.T.Helper()
	hangs := func() bool {
		ended = make(chan struct{})
		go func() {
			defer close(ended)
			h.Try(test.Client, "run", "--rm", "--network", network, "busybox", "true")
		}()
		select {
		case <-ended:
			return false
		case <-time.After(1500 * time.Millisecond):
			return h.Docker("ps", "-aq", "--filter", "status=created") != ""
		}
	}
	test.Eventually(h.T, "a container hangs as it starts", 20*time.Second, hangs)
	return ended
}

func TestWhatHangsHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 3}, vnetsim.VMConfig{Secondaries: 1})
	h, deaf := vms[0], vms[1]
	h.WithPlugin()
	h.Network("azure")
	h.Container("azure", "one", "sleep 100000")

	t.Run("no source answers: addresses that are known are lent, and no more", func(t *testing.T) {
		for _, source := range []vnetsim.Source{vnetsim.HostAgent, vnetsim.IMDS} {
			if err := vnet.SetFault(source, vnetsim.BlackHole); err != nil {
				t.Fatal(err)
			}
			defer vnet.SetFault(source, vnetsim.Healthy)
		}
		h := h.In(t)
		h.Container("azure", "two", "sleep 100000")
		h.Container("azure", "three", "sleep 100000")
		failsInTime(h, "no free address", "run", "--rm", "--network", "azure", "busybox", "true")
		h.Docker("rm", "-f", "two", "three")
		holds(h, 1)

		deaf := deaf.In(t)
		deaf.WithPlugin() // listens though it knows nothing
		failsInTime(deaf, "no answer from", "network", "create", "-d", test.Plugin, "--ipam-driver", test.Plugin, "--subnet", deaf.Prefix.String(), "azure")
	})
	t.Run("an engine that hangs is none of the plugin's business", func(t *testing.T) {
		if !test.Soaking {
			t.Skip("takes long: make soak")
		}
		h := h.In(t)
		resume, err := h.HangDocker(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		holds(h, 1) // status answers
		// The plugin ends in time, though the one who started it does not look.
		h.Must("sh", "-c", "kill $(busybox pidof azure-vnet-plugin)")
		test.Eventually(t, "the plugin ends", 10*time.Second, func() bool {
			state, err := h.Try("sh", "-c", "ps -o stat= -C azure-vnet-plug,azure-vnet-plugin | grep -v Z")
			return err != nil && state == ""
		})
		if err := resume(); err != nil {
			t.Fatal(err)
		}
		h.Container("azure", "after", "sleep 100000")
		h.Docker("rm", "-f", "after")
		holds(h, 1)
	})
	t.Run("no source answers: the engine ends all the same", func(t *testing.T) {
		if !test.Soaking {
			t.Skip("takes long: make soak")
		}
		h := h.In(t)
		h.Container("azure", "two", "sleep 100000")
		h.Container("azure", "three", "sleep 100000")
		for _, source := range []vnetsim.Source{vnetsim.HostAgent, vnetsim.IMDS} {
			if err := h.SetFault(source, vnetsim.BlackHole); err != nil {
				t.Fatal(err)
			}
			defer h.SetFault(source, vnetsim.Healthy)
		}
		hangs := hangingRun(h, "azure")
		endsInTime(h, shutdown)
		<-hangs
		h.StartEngine()
		h.Docker("rm", "-f", "two", "three")
		h.Docker("start", "one")
		holds(h, 1)
	})
	t.Run("a lock that is not given back: the call says whose it is, and the engine still ends", func(t *testing.T) {
		h := h.In(t)
		path := fmt.Sprintf("/proc/%d/root/run/azure-vnet/leases.json.lock", h.PidOne())
		unlock, err := statefile.Lock(t.Context(), path, "a sleeper")
		if err != nil {
			t.Fatal(err)
		}
		defer unlock()
		failsInTime(h, "a sleeper", "run", "--rm", "--network", "azure", "busybox", "true")
		hangs := hangingRun(h, "azure")
		endsInTime(h, shutdown)
		<-hangs
	})
	h.StartEngine()
	h.Docker("rm", "-f", "one")
	h.LeasesAged() // of calls that came while the lock was held
	test.Eventually(t, "nothing is left", 40*time.Second, func() bool { return counts(h) == 0 })
	test.NothingDropped(t, vnet)
}

// TestADiskThatHangs: a frozen file system, which no signal wakes a process from.
func TestADiskThatHangs(t *testing.T) {
	if !test.Soaking {
		t.Skip("takes long: make soak")
	}
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 3})
	h := vms[0]
	if _, err := test.BuildPlugin(); err != nil {
		t.Fatal(err)
	}
	h.WithEngine()
	h.Docker("plugin", "create", test.Plugin, test.Top+"/build/plugin")
	disk := "/var/lib/docker/plugins/" + h.Docker("plugin", "inspect", "-f", "{{.Id}}", test.Plugin) + "/propagated-mount"
	if _, err := h.Try("sh", "-euc", "mkdir -p "+disk+"; truncate -s 32M /run/disk; mkfs.ext4 -q /run/disk; mount -o loop /run/disk "+disk); err != nil {
		t.Skip("no loop devices here: ", err)
	}
	h.Docker("plugin", "enable", test.Plugin)
	h.Network("azure")
	h.Container("azure", "one", "sleep 100000")
	h.Must("fsfreeze", "-f", disk)
	thawed := false
	thaw := func() {
		if !thawed {
			thawed = true
			h.Must("fsfreeze", "-u", disk)
		}
	}
	defer thaw()
	failsInTime(h, "hangs", "network", "create", "-d", test.Plugin, "--ipam-driver", test.Plugin, "--subnet", h.Prefix.String(), "second")
	h.Container("azure", "two", "sleep 100000") // needs no write to that disk
	h.Docker("rm", "-f", "two")
	holds(h, 1)
	endsInTime(h, 18*time.Second) // no signal ends the plugin, and the engine gives up after 15 s
	thaw()
	h.StartEngine()
	h.Network("third")
	h.Docker("start", "one")
	h.Docker("rm", "-f", "one")
	h.Empty()
}
