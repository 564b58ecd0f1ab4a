// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"context"
	"debug/elf"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"azurevnet/internal/vnetsim"
)

// registry serves Debian's docker-registry on the VM's address until the test
// ends, and returns where.
func (h host) registry() string {
	h.t.Helper()
	at := h.Primary.String() + ":5000"
	h.must("sh", "-c", `mkdir -p /run/registry && cat >/run/registry/config.yml <<END
version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: /run/registry/data}}
http: {addr: `+at+`}
END`)
	ctx, cancel := context.WithCancel(context.Background())
	cmd := h.Command(ctx, "docker-registry", "serve", "/run/registry/config.yml")
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { cancel(); cmd.Wait() })
	client := http.Client{Transport: &http.Transport{DialContext: h.DialContext}}
	eventually(h.t, "the registry answers", 10*time.Second, func() bool {
		resp, err := client.Get("http://" + at + "/v2/")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	return at
}

// make runs make in the VM, on the checkout.
func (h host) make(arg ...string) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), 5*time.Minute)
	defer cancel()
	cmd := h.Command(ctx, "make", append([]string{"-C", top}, arg...)...)
	cmd.Env = os.Environ()
	if out, err := cmd.CombinedOutput(); err != nil {
		h.t.Fatalf("make %s: %v\n%s", strings.Join(arg, " "), err, out)
	}
}

func TestThePluginComesFromARegistry(t *testing.T) {
	if err := built(); err != nil {
		t.Fatal(err)
	}
	vnet, vms := newVNet(t, vnetsim.VMConfig{}, vnetsim.VMConfig{Secondaries: 4})
	maker, h := vms[0], vms[1]
	at := maker.registry()
	maker.startEngine("--insecure-registry", at)
	native := "ARCHS=" + runtime.GOARCH
	maker.make("push", "REGISTRY="+at+"/azure-vnet", native, "TAG=old", "VERSION=old")
	maker.make("push", "REGISTRY="+at+"/azure-vnet", native)
	tag := func(version string) string { return at + "/azure-vnet:" + version + runtime.GOARCH }

	h.withEngine("--insecure-registry", at) // and nothing else is prepared
	h.docker("plugin", "install", "--grant-all-permissions", "--alias", plugin, tag("old-"))
	h.network("azure")
	addr := h.container("azure", "one", "sleep 100000")
	used := []netip.Addr{addr}
	works := func(t *testing.T, what string) {
		t.Helper()
		if _, err := onHost(maker).try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
			t.Errorf("%s: the container is not reached: %v", what, err)
		}
	}
	works(t, "installed")
	// change does something to the disabled plugin while a container runs.
	change := func(t *testing.T, what, version string, do func(h host)) {
		t.Helper()
		h := h.in(t)
		h.docker("plugin", "disable", "-f", plugin)
		works(t, what+" is disabled")
		do(h)
		h.docker("plugin", "enable", plugin)
		works(t, what+" is enabled")
		if got := h.must("sh", "-c", `/proc/$(busybox pidof azure-vnet-plugin | cut -d' ' -f1)/root/azure-vnet-plugin version`); got != version {
			t.Errorf("%s: version %q runs, want %q", what, got, version)
		}
		two := h.container("azure", "two", "sleep 100000")
		used = append(used, two)
		if _, err := onHost(maker).try("ping", "-c", "1", "-W", "3", two.String()); err != nil {
			t.Errorf("%s: a new container is not reached: %v", what, err)
		}
		h.docker("rm", "-f", "two")
		h.holds(1)
	}
	current := mustOutput(t, filepath.Join(top, "build", "azure-vnet-plugin"), "version")
	t.Run("upgraded and downgraded with a container running, its networks and addresses stay", func(t *testing.T) {
		change(t, "the upgraded plugin", current, func(h host) {
			h.docker("plugin", "upgrade", "--grant-all-permissions", "--skip-remote-check", plugin, tag(""))
		})
		change(t, "the downgraded plugin", "old", func(h host) {
			h.docker("plugin", "upgrade", "--grant-all-permissions", "--skip-remote-check", plugin, tag("old-"))
		})
	})
	t.Run("make install puts another build in its place", func(t *testing.T) {
		change(t, "the replaced plugin", current, func(h host) {
			h.make("install", "PREFIX=/run/prefix")
			h.docker("plugin", "disable", "-f", plugin) // change enables it
		})
	})
	t.Run("a file system that cannot be written keeps the plugin as it is", func(t *testing.T) {
		h := h.in(t)
		h.must("sh", "-c", "mkdir -p /run/ro && mount -t tmpfs -o ro none /run/ro")
		before := h.docker("plugin", "ls", "--no-trunc")
		_, err := h.try(filepath.Join(top, "scripts", "plugin.sh"), "install", filepath.Join(top, "build", "plugin"), filepath.Join(top, "build", "azure-vnet-plugin"), "/run/ro")
		for _, says := range []string{"Read-only file system", "Nothing was changed", "make install PREFIX="} {
			if err == nil || !strings.Contains(err.Error(), says) {
				t.Errorf("make install does not say %q: %v", says, err)
			}
		}
		if after := h.docker("plugin", "ls", "--no-trunc"); after != before {
			t.Errorf("the plugins were\n%s\nand are\n%s", before, after)
		}
		works(t, "after an installation that could not be")
		if out, err := h.try(filepath.Join(top, "scripts", "plugin.sh"), "uninstall", filepath.Join(top, "build", "azure-vnet-plugin"), "/run/prefix"); err == nil || !strings.Contains(err.Error(), "these networks use it") {
			t.Errorf("uninstall beside a network: %s %v", out, err)
		}
	})
	h.docker("rm", "-f", "one")
	h.empty()
	clean(t, vnet, used...)
}

func mustOutput(t *testing.T, name string, arg ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, arg...).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// TestEveryArchitecture: what no machine here can run is read.
func TestEveryArchitecture(t *testing.T) {
	if !soaking {
		t.Skip("takes long: make soak")
	}
	_, vms := newVNet(t, vnetsim.VMConfig{})
	at := vms[0].registry()
	vms[0].startEngine("--insecure-registry", at)
	machines := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}
	for arch, machine := range machines {
		mustOutput(t, "make", "-C", top, "rootfs", "ARCH="+arch) // packages come from outside
		dir := "build/" + arch + "/plugin/rootfs"
		if arch == runtime.GOARCH {
			dir = "build/plugin/rootfs"
		}
		root := os.DirFS(filepath.Join(top, dir))
		there := map[string]bool{}
		var needed []string
		err := fs.WalkDir(root, ".", func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() || filepath.Ext(path) == ".conflist" {
				return err
			}
			there[d.Name()] = true
			f, err := elf.Open(filepath.Join(top, dir, path))
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			defer f.Close()
			if f.Machine != machine {
				t.Errorf("%s is of %v in a plugin for %s", path, f.Machine, arch)
			}
			names, err := f.ImportedLibraries()
			needed = append(needed, names...)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range needed {
			if !there[name] {
				t.Errorf("the plugin for %s lacks %s", arch, name)
			}
		}
	}
	vms[0].make("push", "REGISTRY="+at+"/azure-vnet")
	client := http.Client{Transport: &http.Transport{DialContext: vms[0].DialContext}}
	resp, err := client.Get("http://" + at + "/v2/azure-vnet/tags/list")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var list struct{ Tags []string }
	if err := json.NewDecoder(resp.Body).Decode(&list); err != nil {
		t.Fatal(err)
	}
	slices.Sort(list.Tags)
	if diff := cmp.Diff(slices.Sorted(maps.Keys(machines)), list.Tags); diff != "" {
		t.Errorf("the registry's tags (-want +got):\n%s", diff)
	}
}
