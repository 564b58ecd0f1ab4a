// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

func TestReadmeEveryBlockIsProved(t *testing.T) {
	known := []string{"run: clone", "run: vm", "run: node", "run: make", "read: needs Azure"}
	found := test.Blocks(t, "README.md")
	for _, how := range known {
		if len(found[how]) == 0 {
			t.Errorf("no block is marked %q", how)
		}
		delete(found, how)
	}
	for how := range found {
		t.Errorf("no test proves blocks marked %q", how)
	}
}

func TestReadmeTryIt(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make namespaces: sudo make test")
	}
	script := "set -eu\n" + test.Blocks(t, "README.md")["run: clone"][0]
	cmd := exec.CommandContext(t.Context(), "sh", "-c", script)
	cmd.Dir, cmd.Env = t.TempDir(), test.AsUser(t, os.Environ())
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"container client on vm2", "mode bridge", "mode transparent", "plain VM vm3", "its own host vm1", "the internet, by SNAT", "fabric violations: 0"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the demo does not say %q:\n%s", want, out)
		}
	}
}

func TestReadmeOnAVM(t *testing.T) {
	if _, err := test.BuildPlugin(); err != nil {
		t.Fatal(err)
	}
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2})
	h := vms[0]
	h.WithEngine()
	withNginx(h)
	h.Must("mkdir", "-p", "/etc/cloud/cloud.cfg.d")
	before := h.Must("ip", "-br", "addr", "show", "eth0")

	// Installed files go to the VM's own disk.
	h.Must("sh", "-c", "mkdir -p /run/up /run/work && mount -t overlay -o lowerdir=/usr/local,upperdir=/run/up,workdir=/run/work overlay /usr/local")
	blocks := test.Blocks(t, "README.md")["run: vm"]
	script := func(lines string) {
		t.Helper()
		cmd := h.Command(t.Context(), "sh", "-euc", "cd "+test.Top+"\n"+lines)
		cmd.Env = test.AsUser(t, os.Environ())
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s\n%v\n%s", lines, err, out)
		}
		t.Logf("%s\n%s", lines, out)
	}
	// In the order of the text, but that the last one, on what is wrong, needs
	// the plugin that the one before removes.
	last := len(blocks) - 1
	for _, lines := range append(append([]string{}, blocks[:last-1]...), blocks[last], blocks[last-1]) {
		script(lines)
	}
	if after := h.Must("ip", "-br", "addr", "show", "eth0"); strings.Fields(after)[2] != strings.Fields(before)[2] {
		t.Errorf("eth0 was\n%s\nand is\n%s", before, after)
	}
	for _, gone := range []string{"/etc/cloud/cloud.cfg.d/90-azure-vnet.cfg", "/usr/local/sbin/azure-vnet-plugin", "/run/azure-vnet"} {
		if out, err := h.Try("ls", "-d", gone); err == nil {
			t.Errorf("uninstall left %s", out)
		}
	}
	if out := h.Docker("plugin", "ls", "-q"); out != "" {
		t.Errorf("uninstall left a plugin: %s", out)
	}
}

func TestReadmeDevelopment(t *testing.T) {
	for _, block := range test.Blocks(t, "README.md")["run: make"] {
		for line := range strings.Lines(block) {
			target := strings.Fields(strings.TrimPrefix(strings.TrimSpace(line), "sudo "))
			if out, err := exec.Command("make", "-C", test.Top, "-n", target[1]).CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s", line, err, out)
			}
		}
	}
}

// TestDockerDocOnAVM runs docs/docker.md on a VM that has nothing but an engine,
// with a registry on another.
func TestDockerDocOnAVM(t *testing.T) {
	if !test.Soaking {
		t.Skip("TestReadmeOnAVM and TestThePluginComesFromARegistry run much of it: make soak")
	}
	const doc = "docs/docker.md"
	if _, err := test.BuildPlugin(); err != nil {
		t.Fatal(err)
	}
	_, vms := test.NewVNet(t, vnetsim.VMConfig{}, vnetsim.VMConfig{Secondaries: 4})
	maker, h := vms[0], vms[1]
	at := registry(maker)
	maker.StartEngine("--insecure-registry", at)
	runMake(maker, "push", "REGISTRY="+at+"/azure-vnet", "ARCHS="+runtime.GOARCH)
	h.WithEngine("--insecure-registry", at)
	withNginx(h)
	before := h.Must("ip", "-br", "addr", "show", "eth0")
	found := test.Blocks(t, doc)
	// One shell, for the text sets a variable and uses it later.
	out := shell(h, "/", strings.Join(found["run: docker"], "\n"), "REGISTRY="+at+"/azure-vnet")
	t.Log(out)
	delete(found, "run: docker")
	for how := range found {
		if !strings.HasPrefix(how, "read: ") {
			t.Errorf("%s: no test proves blocks marked %q", doc, how)
		}
	}
	if after := h.Must("ip", "-br", "addr", "show", "eth0"); strings.Fields(after)[2] != strings.Fields(before)[2] {
		t.Errorf("eth0 was\n%s\nand is\n%s", before, after)
	}
	if out := h.Docker("plugin", "ls", "-q"); out != "" {
		t.Errorf("a plugin is left: %s", out)
	}
}

// TestContributingNamesWhatThereIs: each make target, and each test that is run alone.
func TestContributingNamesWhatThereIs(t *testing.T) {
	const doc = "CONTRIBUTING.md"
	text, err := os.ReadFile(filepath.Join(test.Top, doc))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile("`(?:sudo )?make ([a-z ]+)`").FindAllStringSubmatch(string(text), -1) {
		args := append([]string{"-C", test.Top, "-n"}, strings.Fields(m[1])...)
		if out, err := exec.Command("make", args...).CombinedOutput(); err != nil {
			t.Errorf("make %s: %v\n%s", m[1], err, out)
		}
	}
	alone := 0
	for _, block := range test.Blocks(t, doc)["run: test"] {
		for _, m := range regexp.MustCompile(` test (\./\S+) -run (\S+)`).FindAllStringSubmatch(block, -1) {
			alone++
			cmd := exec.Command("go", "test", m[1], "-list", "^"+m[2]+"$")
			cmd.Dir = test.Top
			if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), m[2]+"\n") {
				t.Errorf("%s has no test %s: %v\n%s", m[1], m[2], err, out)
			}
		}
	}
	if alone == 0 {
		t.Errorf("%s names no test: this test is blind", doc)
	}
}
