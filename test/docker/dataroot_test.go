// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"encoding/json"
	"strings"
	"testing"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// TestNetworksAreFoundWhereverTheEngineKeepsThem: status and uninstall find networks.json
// under any data-root, while the plugin runs and until the next boot. After the boot they name
// the missing file, and end with an error.
func TestNetworksAreFoundWhereverTheEngineKeepsThem(t *testing.T) {
	t.Parallel() // it mostly waits
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2})
	h := vms[0]
	const root = "/var/lib/docker/some where/else" // on the VM's own disk
	tool := test.PluginBinary
	h.WithEngine("--data-root", root)
	h.EnablePlugin()
	networks := func(arg ...string) (int, error) {
		t.Helper()
		out, err := h.Try(tool, append([]string{"status", "-json"}, arg...)...)
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
	h.Network("azure")
	shown("while the plugin runs", 1)
	h.Docker("plugin", "disable", "-f", test.Plugin)
	shown("while it is disabled", 1)

	h.Must("sync")
	cut(h)
	if err := h.Boot(); err != nil {
		t.Fatal(err)
	}
	h.StartEngine("--data-root", root)
	count, err := networks()
	if count != 0 || err == nil || !strings.Contains(err.Error(), "networks.json, which lists Docker's networks, is not found") {
		t.Fatalf("after a boot with the plugin disabled: %d networks, %v", count, err)
	}
	// The error says what to add to the command. And docs/docker.md runs the program that lies beside networks.json.
	_, rest, _ := strings.Cut(err.Error(), "of the command: ")
	add, _, _ := strings.Cut(rest, ". If")
	add = strings.ReplaceAll(add, "docker ", test.Client+" ")
	own := `"$(` + test.Client + ` info -f '{{.DockerRootDir}}')"/plugins/*/rootfs/azure-vnet-plugin`
	for _, line := range []string{tool + " status -json " + add, own + " status -json"} {
		if out, err := h.Try("sh", "-c", line); err != nil || !strings.Contains(out, `"prefix": "10.240.0.0/16"`) {
			t.Errorf("%s: %s, %v", line, out, err)
		}
	}
	if _, err := h.Try(tool, "uninstall"); err == nil || !strings.Contains(err.Error(), "uninstall: all else is removed, but networks.json") {
		t.Errorf("uninstall that does not find it: %v", err)
	}
	h.Must("sh", "-c", `test -e "$(echo "`+root+`"/plugins/*/propagated-mount/networks.json)"`)

	h.Docker("plugin", "enable", test.Plugin)
	h.Docker("network", "rm", "azure")
	h.Docker("plugin", "disable", test.Plugin)
	h.Must(tool, "uninstall")
	h.Must("sh", "-c", `! test -e /run/azure-vnet && ! ls "`+root+`"/plugins/*/propagated-mount/* 2>/dev/null`)
}
