// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// TestABootWithThePluginDisabled: what docs/docker.md says of a plugin that is disabled.
// docker rm takes a minute, and a container that is always restarted stays down after a
// boot until docker start, though the plugin is enabled again.
func TestABootWithThePluginDisabled(t *testing.T) {
	t.Parallel() // it mostly waits
	if !test.Soaking {
		t.Skip("the engine alone waits for a minute and a half: make soak")
	}
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2})
	h := vms[0]
	h.WithPlugin("COOL_DOWN=0s")
	h.Network("azure")
	h.Container("azure", "always", "sleep 100000", "--restart", "always")
	h.Container("azure", "removed", "sleep 100000")
	h.Docker("plugin", "disable", "-f", test.Plugin)
	start := time.Now()
	h.Docker("rm", "-f", "removed")
	if took := time.Since(start); took < 50*time.Second || took > 75*time.Second {
		t.Errorf("docker rm took %v", took)
	}
	h.Must("sync")
	cut(h)
	if err := h.Boot(); err != nil {
		t.Fatal(err)
	}
	h.StartEngine()
	h.Docker("plugin", "enable", test.Plugin)
	time.Sleep(15 * time.Second)
	if running := h.Docker("ps", "-q"); running != "" {
		t.Errorf("a container runs without docker start: %s", running)
	}
	h.Docker("start", "always")
	holds(h, 1)
	h.Docker("rm", "-f", "always")
	h.Empty()
	test.NothingDropped(t, vnet)
}

// TestANetworkWithoutItsDriver: what docs/docker.md says of a network that is made without
// -d. Docker's own bridge takes the gateway's address, and with a container on it the VM
// reaches no other VM. docker network rm gives everything back.
func TestANetworkWithoutItsDriver(t *testing.T) {
	t.Parallel()
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
	h := vms[0]
	h.WithPlugin()
	reaches := func() bool {
		_, err := h.Try("busybox", "ping", "-c", "1", "-W", "2", vms[1].Primary.String())
		return err == nil
	}
	if !reaches() {
		t.Fatal("the VM reaches no other VM to begin with")
	}
	for _, ipam := range [][]string{{"--ipam-driver", test.Plugin}, nil} {
		h.Docker(append(append([]string{"network", "create"}, ipam...), "--subnet", h.Prefix.String(), "azure")...)
		if out := h.Must("ip", "-br", "-4", "addr"); !strings.Contains(out, h.Gateway.String()+"/16") {
			t.Errorf("%v: no bridge has the gateway's address:\n%s", ipam, out)
		}
		h.Docker("run", "-d", "--init", "--network", "azure", "--name", "cc", "busybox", "sleep", "100000")
		if reaches() {
			t.Errorf("%v: the VM reaches another VM", ipam)
		}
		h.Docker("rm", "-f", "cc")
		h.Docker("network", "rm", "azure")
		if !reaches() {
			t.Errorf("%v: the VM reaches no other VM afterwards", ipam)
		}
	}
}
