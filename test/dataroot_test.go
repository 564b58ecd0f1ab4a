// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"azurevnet/internal/vnetsim"
)

// TestNetworksAreFoundWhereverTheEngineKeepsThem: status and uninstall find networks.json
// under any data-root, while the plugin runs and until the next boot. After the boot they name
// the missing file, and end with an error.
func TestNetworksAreFoundWhereverTheEngineKeepsThem(t *testing.T) {
	t.Parallel() // it mostly waits
	_, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 2})
	h := vms[0]
	const root = "/var/lib/docker/some where/else" // on the VM's own disk
	tool := filepath.Join(top, "build", "azure-vnet-plugin")
	h.withEngine("--data-root", root)
	h.enablePlugin()
	networks := func(arg ...string) (int, error) {
		t.Helper()
		out, err := h.try(tool, append([]string{"status", "-json"}, arg...)...)
		var report struct{ Networks map[string]any }
		if bad := json.Unmarshal([]byte(out), &report); bad != nil {
			t.Fatalf("%v: %v", bad, err)
		}
		return len(report.Networks), err
	}
	shown := func(when string, want int) {
		t.Helper()
		if count, err := networks(); count != want || err != nil {
			t.Errorf("%s: status shows %d networks, not %d: %v", when, count, want, err)
		}
	}
	shown("before the first network", 0)
	h.network("azure")
	shown("while the plugin runs", 1)
	h.docker("plugin", "disable", "-f", plugin)
	shown("while it is disabled", 1)

	h.must("sync")
	h.cut()
	if err := h.Boot(); err != nil {
		t.Fatal(err)
	}
	h.startEngine("--data-root", root)
	count, err := networks()
	if count != 0 || err == nil || !strings.Contains(err.Error(), "networks.json, which lists Docker's networks, is not found") {
		t.Fatalf("after a boot with the plugin disabled: %d networks, %v", count, err)
	}
	// The error says what to add to the command. And docs/docker.md runs the program that lies beside networks.json.
	_, rest, _ := strings.Cut(err.Error(), "of the command: ")
	add, _, _ := strings.Cut(rest, ". If")
	add = strings.ReplaceAll(add, "docker ", client+" ")
	own := `"$(` + client + ` info -f '{{.DockerRootDir}}')"/plugins/*/rootfs/azure-vnet-plugin`
	for _, line := range []string{tool + " status -json " + add, own + " status -json"} {
		if out, err := h.try("sh", "-c", line); err != nil || !strings.Contains(out, `"prefix": "10.240.0.0/16"`) {
			t.Errorf("%s: %s, %v", line, out, err)
		}
	}
	if _, err := h.try(tool, "uninstall"); err == nil || !strings.Contains(err.Error(), "uninstall: all else is removed, but networks.json") {
		t.Errorf("uninstall that does not find it: %v", err)
	}
	h.must("sh", "-c", `test -e "$(echo "`+root+`"/plugins/*/propagated-mount/networks.json)"`)

	h.docker("plugin", "enable", plugin)
	h.docker("network", "rm", "azure")
	h.docker("plugin", "disable", plugin)
	h.must(tool, "uninstall")
	h.must("sh", "-c", `! test -e /run/azure-vnet && ! ls "`+root+`"/plugins/*/propagated-mount/* 2>/dev/null`)
}
