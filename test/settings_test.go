// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
)

// TestWrongSettingsAreNamedWhereTheUserLooks: the engine enables a plugin with wrong settings, because
// it shows no error of a plugin at enable. The next network or container fails. The error names all wrong
// settings, what is allowed, and the command that mends them. Running containers can be ended.
func TestWrongSettingsAreNamedWhereTheUserLooks(t *testing.T) {
	t.Parallel() // it mostly waits
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 3})
	h := vms[0]
	h.withPlugin("COOL_DOWN=0s")
	h.network("azure")
	addr := h.container("azure", "runs", "sleep 100000")
	h.container("azure", "stopped", "sleep 100000")
	h.docker("stop", "-t", "0", "stopped")

	h.docker("plugin", "disable", "-f", plugin)
	h.docker("plugin", "set", plugin, "LOG_LEVEL=loud", "SOURCE=/etc/azure.json", "COOL_DOWN=soon")
	start := time.Now()
	h.docker("plugin", "enable", plugin)
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
		h.refused([]string{"network", "create", "-d", plugin, "--ipam-driver", plugin, "--subnet", h.Prefix.String(), "second"}, why...)
		h.refused([]string{"run", "--rm", "--network", "azure", "busybox", "true"}, why...)
		h.refused([]string{"start", "stopped"}, why...)
	}
	refused()
	if !strings.Contains(h.DockerLog(), why[0]) {
		t.Error("the engine's log does not say it")
	}
	if out, err := h.try(top+"/build/azure-vnet-plugin", "status"); err == nil || !strings.Contains(err.Error(), why[0]) || !strings.Contains(out, addr.String()) {
		t.Errorf("status: %s, %v", out, err)
	}
	h.docker("rm", "-f", "runs")
	h.empty()

	h.stopEngine(syscall.SIGTERM)
	h.startEngine()
	if enabled := h.docker("plugin", "inspect", "-f", "{{.Enabled}}", plugin); enabled != "true" {
		t.Error("a restart of the engine disables the plugin")
	}
	refused()

	h.must("sh", "-euc", strings.ReplaceAll(mend, "docker ", client+" "))
	h.docker("start", "stopped")
	h.network("second")
	h.docker("rm", "-f", "stopped")
	clean(t, vnet)
}
