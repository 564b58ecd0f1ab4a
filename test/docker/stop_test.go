// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// TestAPluginThatStopsLogsNoError: the plugin stops while it asks a source. The log has no error of that.
func TestAPluginThatStopsLogsNoError(t *testing.T) {
	t.Parallel() // it mostly waits
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 1})
	h := vms[0]
	for _, source := range []vnetsim.Source{vnetsim.HostAgent, vnetsim.IMDS} {
		if err := vnet.SetFault(source, vnetsim.BlackHole); err != nil {
			t.Fatal(err)
		}
	}
	h.WithPlugin()
	time.Sleep(2 * time.Second) // it asks for 8 s
	h.Docker("plugin", "disable", "-f", test.Plugin)
	log := h.DockerLog()
	if !strings.Contains(log, "msg=stopped") {
		t.Fatal("it did not stop by itself")
	}
	for line := range strings.Lines(log) {
		if strings.Contains(line, "plugin=") && (strings.Contains(line, "level=error") || strings.Contains(line, "level=warn")) {
			t.Errorf("the log says %s", line)
		}
	}
}
