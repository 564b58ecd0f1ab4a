// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"fmt"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// aged is a plugin that speaks CNI 1.0.0 at most, and answers STATUS as such plugins do.
const aged = `#!/bin/sh
case $CNI_COMMAND in
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0"]}' ;;
*) echo '{"cniVersion":"1.0.0","code":4,"msg":"required env variables [CNI_CONTAINERID] missing"}'; exit 1 ;;
esac
`

// TestSTATUSNamesAChainedPluginThatDoesNotSpeakTheListsVersion: such a plugin's answer does not name the plugin, and the
// operator sees no other. If azure-vnet does not find the list, STATUS says nothing about chained plugins.
func TestSTATUSNamesAChainedPluginThatDoesNotSpeakTheListsVersion(t *testing.T) {
	t.Parallel()
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2})
	n := test.OnNode(vms[0])
	write := func(t *testing.T, path, text string) {
		t.Helper()
		n.In(t).Must("sh", "-c", `mkdir -p "${0%/*}" && printf %s "$1" >"$0" && chmod +x "$0"`, path, text)
	}
	write(t, "/run/old/portmap", aged)
	write(t, "/run/old/silent", "#!/bin/sh\nexit 1\n")
	write(t, "/run/old/asleep", "#!/bin/sh\nsleep 1000\n")
	n.Must("sh", "-c", "mkdir -p /etc/cni/net.d /var/lib/azure-vnet && mount -t tmpfs t /etc/cni/net.d && mount -t tmpfs t /var/lib/azure-vnet && mkfifo /etc/cni/net.d/00-fifo.conflist")
	list := func(name, first, second string) string {
		return fmt.Sprintf(`{"cniVersion":"0.3.0","cniVersions":["1.0.0","1.1.0"],"name":%q,"plugins":[%s,{"type":%q,"snat":true}]}`, name, first, second)
	}
	const file = "/etc/cni/net.d/10-azure.conflist"
	for _, c := range []struct{ name, path, list, record, says string }{
		{"an old plugin", file, list("azure", test.Azure(), "portmap"), "", file + ": its plugin portmap does not speak CNI 1.1.0, and so cannot tell its state: /run/old/portmap speaks 0.4.0, 1.0.0: install a newer portmap, or remove 1.1.0 from the list's cniVersions"},
		{"where the installer put the list", "/run/conf/azure.conflist", list("azure", test.Azure(), "portmap"), "0  /run/conf/azure.conflist\n", "/run/conf/azure.conflist: its plugin portmap"},
		{"a missing plugin", file, list("azure", test.Azure(), "nobody"), "", file + `: its plugin nobody is missing: failed to find plugin "nobody" in path [/run/old ` + n.Dir + `]: install it there, or take it out of the list`},
		{"a plugin of today", file, list("azure", test.Azure(), "bandwidth"), "", ""},
		{"a plugin that does not tell", file, list("azure", test.Azure(), "silent"), "", ""},
		{"a plugin that hangs with what it started", file, list("azure", test.Azure(), "asleep"), "", ""},
		{"in a directory that nobody told of", "/run/elsewhere/10-azure.conflist", list("azure", test.Azure(), "portmap"), "", ""},
		{"in the list of another network", file, list("blue", test.Azure(), "portmap"), "", ""},
		{"in a list with another azure-vnet", file, list("azure", test.Azure(`"mode":"transparent"`), "portmap"), "", ""},
		{"in a list that is none", file, "{", "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := n.In(t)
			write(t, c.path, c.list)
			write(t, "/var/lib/azure-vnet/cni.installed", c.record)
			start := time.Now()
			out, err := n.Call("STATUS", "", "", test.Stdin("1.1.0", "azure", test.Azure(), nil), "CNI_PATH=/run/old:"+n.Dir)
			if c.says == "" && err != nil || c.says != "" && !test.Says(err, 50, c.says) {
				t.Errorf("STATUS: %s %v", out, err)
			}
			if took := time.Since(start); took > 15*time.Second {
				t.Errorf("STATUS took %v", took)
			}
			n.Must("rm", c.path)
		})
	}
	n.Bare()
}
