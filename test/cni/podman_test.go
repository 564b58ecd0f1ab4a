// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

func TestPodmanGivesAnAddressAndAMAC(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("podman"); err != nil && os.Geteuid() == 0 {
		t.Fatalf("%v: scripts/needs.sh installs it", err)
	}
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	n, plain := test.OnNode(vms[0]), test.OnHost(vms[1])
	root := fmt.Sprintf("/proc/%d/root", n.PidOne())
	for path, content := range map[string]string{
		"/run/pod.tar":         string(imageArchive(t)),
		"/run/containers.conf": fmt.Sprintf("[network]\nnetwork_backend = \"cni\"\nnetwork_config_dir = \"/etc/cni/net.d\"\ncni_plugin_dirs = [%q]\n[engine]\nruntime = \"runc\"\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\n[containers]\nlog_driver = \"k8s-file\"\ndefault_sysctls = []\n", n.Dir),
		"/run/policy.json":     `{"default":[{"type":"insecureAcceptAnything"}]}`,
	} {
		if err := os.WriteFile(filepath.Join(root, path), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	n.Must("mkdir", "-p", "/etc/cni/net.d", "/etc/containers")
	n.Must("cp", "/run/policy.json", "/etc/containers/policy.json")
	writeConflist(n, documented)
	n.Must("sh", "-c", "for f in /etc/cni/net.d/*; do [ $f = /etc/cni/net.d/10-azure.conflist ] || rm -f $f; done")
	podman := func(arg ...string) (string, error) {
		return n.Try("sh", append([]string{"-c", `for f in /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/*/cgroup.procs; do echo 0 >$f; done 2>/dev/null
			CONTAINERS_CONF=/run/containers.conf exec podman --root /var/lib/pods --runroot /run/pods --storage-driver vfs "$@"`, "sh"}, arg...)...)
	}
	must := func(arg ...string) string {
		t.Helper()
		out, err := podman(arg...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	must("load", "-q", "-i", "/run/pod.tar")
	want := n.Secondaries()[2]
	must("run", "-d", "--name", "asked", "--network", "azure:ip="+want.String()+",mac=02:aa:bb:cc:dd:ee", "-p", "8080:80", podImage)
	if got := must("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{.MacAddress}}{{end}}", "asked"); got != want.String()+" 02:aa:bb:cc:dd:ee" {
		t.Errorf("podman tells %q", got)
	}
	must("exec", "-d", "asked", "/bin/sh", "-c", "busybox mkdir /www; echo hello >/www/index.html; exec busybox httpd -f -p 0.0.0.0:80 -h /www")
	for _, at := range []string{want.String(), n.Primary.String() + ":8080"} {
		if got, err := plain.Try(test.Fetch("http://" + at + "/")...); err != nil || got != "hello" {
			t.Errorf("%s answers %q: %v", at, got, err)
		}
	}
	second := must("run", "-d", "--name", "any", "--network", "azure", podImage)
	addr, err := netip.ParseAddr(must("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", "any"))
	if err != nil || addr == want {
		t.Errorf("%s has %s: %v", second, addr, err)
	}
	if _, err := podman("run", "--rm", "--network", "azure:ip="+want.String(), podImage, "true"); err == nil || !strings.Contains(err.Error(), "is held by cni/azure/") {
		t.Errorf("an address that is taken: %v", err)
	}
	must("rm", "-f", "-t", "0", "asked", "any")
	n.Bare()
	test.NothingDropped(t, vnet, want)
}
