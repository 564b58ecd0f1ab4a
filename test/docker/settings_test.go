// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// TestWrongSettingsAreNamedWhereTheUserLooks: the engine enables a plugin with wrong settings, because
// it shows no error of a plugin at enable. The next network or container fails. The error names all wrong
// settings, what is allowed, and the command that mends them. Running containers can be ended.
func TestWrongSettingsAreNamedWhereTheUserLooks(t *testing.T) {
	t.Parallel() // it mostly waits
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 3})
	h := vms[0]
	h.WithPlugin("COOL_DOWN=0s")
	h.Network("azure")
	addr := h.Container("azure", "runs", "sleep 100000")
	h.Container("azure", "stopped", "sleep 100000")
	h.Docker("stop", "-t", "0", "stopped")

	h.Docker("plugin", "disable", "-f", test.Plugin)
	h.Docker("plugin", "set", test.Plugin, "LOG_LEVEL=loud", "SOURCE=/etc/azure.json", "COOL_DOWN=soon")
	start := time.Now()
	h.Docker("plugin", "enable", test.Plugin)
	if took := time.Since(start); took > 8*time.Second {
		t.Errorf("enable took %v", took)
	}
	const mend = "docker plugin disable -f azure-vnet:latest && docker plugin set azure-vnet:latest LOG_LEVEL=info SOURCE=auto COOL_DOWN=30s && docker plugin enable azure-vnet:latest"
	why := []string{
		"wrong settings of the plugin: LOG_LEVEL=loud (allowed: error, warning, info or debug), SOURCE=/etc/azure.json (allowed: auto, wireserver, imds, or a file under /run",
		"COOL_DOWN=soon (allowed: a time such as 30s, from 0s to 1h)", mend,
	}
	refused := func() {
		t.Helper()
		h.Refused([]string{"network", "create", "-d", test.Plugin, "--ipam-driver", test.Plugin, "--subnet", h.Prefix.String(), "second"}, why...)
		h.Refused([]string{"run", "--rm", "--network", "azure", "busybox", "true"}, why...)
		h.Refused([]string{"start", "stopped"}, why...)
	}
	refused()
	if !strings.Contains(h.DockerLog(), why[0]) {
		t.Error("the engine's log does not say it")
	}
	if out, err := h.Try(test.PluginBinary, "status"); err == nil || !strings.Contains(err.Error(), why[0]) || !strings.Contains(out, addr.String()) {
		t.Errorf("status: %s, %v", out, err)
	}
	h.Docker("rm", "-f", "runs")
	h.Empty()

	stopEngine(h, syscall.SIGTERM)
	h.StartEngine()
	if enabled := h.Docker("plugin", "inspect", "-f", "{{.Enabled}}", test.Plugin); enabled != "true" {
		t.Error("a restart of the engine disables the plugin")
	}
	refused()

	h.Must("sh", "-euc", strings.ReplaceAll(mend, "docker ", test.Client+" "))
	h.Docker("start", "stopped")
	h.Network("second")
	h.Docker("rm", "-f", "stopped")
	test.NothingDropped(t, vnet)
}
