// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// capabilities are the names that docs/security.md has, by number.
var capabilities = map[string]int{
	"CAP_CHOWN": unix.CAP_CHOWN, "CAP_DAC_OVERRIDE": unix.CAP_DAC_OVERRIDE, "CAP_FOWNER": unix.CAP_FOWNER, "CAP_FSETID": unix.CAP_FSETID,
	"CAP_KILL": unix.CAP_KILL, "CAP_SETGID": unix.CAP_SETGID, "CAP_SETUID": unix.CAP_SETUID, "CAP_SETPCAP": unix.CAP_SETPCAP,
	"CAP_NET_BIND_SERVICE": unix.CAP_NET_BIND_SERVICE, "CAP_NET_ADMIN": unix.CAP_NET_ADMIN, "CAP_NET_RAW": unix.CAP_NET_RAW,
	"CAP_SYS_CHROOT": unix.CAP_SYS_CHROOT, "CAP_MKNOD": unix.CAP_MKNOD, "CAP_AUDIT_WRITE": unix.CAP_AUDIT_WRITE, "CAP_SETFCAP": unix.CAP_SETFCAP,
}

// TestThePluginsRightsAreTheDocumentedOnes: docs/security.md lists the rights of each thread of a running plugin, and
// not only what it asks for. These rights suffice for legacy iptables and a published port below 1024. Nobody but root
// reaches its socket.
func TestThePluginsRightsAreTheDocumentedOnes(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(filepath.Join(test.Top, "docs", "security.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, part, _ := strings.Cut(string(text), "## What the plugin may do")
	part, _, _ = strings.Cut(part, "**The engine's socket")
	var told uint64
	for _, name := range regexp.MustCompile("`(CAP_[A-Z_]+)`").FindAllStringSubmatch(part, -1) {
		number, known := capabilities[name[1]]
		if !known {
			t.Errorf("docs/security.md names %s, which this test does not know", name[1])
		}
		told |= 1 << number
	}
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 1})
	h := vms[0]
	h.Must("iptables-legacy", "-P", "FORWARD", "DROP")
	h.WithPlugin()
	h.Network("azure")
	h.Container("azure", "web", "httpd -f -p 80", "-p", "80:80")
	publishes(h, ":80->80/tcp")
	h.Must("iptables-legacy", "-C", "FORWARD", "-j", "AZURE-VNET", "-m", "comment", "--comment", "azure-vnet")
	threads := 0
	for line := range strings.Lines(h.Must("sh", "-c", "cat /proc/$(busybox pidof azure-vnet-plugin)/task/*/status")) {
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch key {
		case "Pid":
			threads++
		case "CapEff", "CapPrm", "CapBnd":
			if got, err := strconv.ParseUint(value, 16, 64); err != nil || got != told {
				t.Errorf("%s of a thread is %s, and docs/security.md says %016x", key, value, told)
			}
		case "CapInh", "CapAmb":
			if got, err := strconv.ParseUint(value, 16, 64); err != nil || got&^told != 0 {
				t.Errorf("%s of a thread is %s, and docs/security.md says no more than %016x", key, value, told)
			}
		case "Seccomp":
			if value != "0" {
				t.Errorf("the plugin has a seccomp profile (%s), and docs/security.md says that it has none", value)
			}
		}
	}
	if threads < 2 {
		t.Errorf("the plugin has %d threads: this test is blind", threads)
	}
	h.Docker("rm", "-f", "web")
	sockets := h.Must("sh", "-c", "stat -c '%U %a' /run/docker/plugins/*/azure-vnet.sock; stat -c '%U %a' /run/docker/plugins/*")
	if diff := cmp.Diff("root 600\nroot 700", sockets); diff != "" {
		t.Errorf("the plugin's socket and its directory (-want +got):\n%s", diff)
	}
	files := h.Must("sh", "-c", "find /run/azure-vnet -type f ! -perm 600; find /var/lib/docker/plugins/*/propagated-mount -type f ! -perm 600; stat -c '%a' /run/azure-vnet")
	if files != "755" {
		t.Errorf("files with other modes than docs/security.md says: %s", files)
	}
}
