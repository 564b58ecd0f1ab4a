// Copyright (c) The azure-vnet authors. MIT licence.

package docker

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
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// registry serves Debian's docker-registry on the VM's address until the test
// ends, and returns where.
func registry(h test.Host) string {
	h.T.Helper()
	at := h.Primary.String() + ":5000"
	h.Must("sh", "-c", `mkdir -p /run/registry && cat >/run/registry/config.yml <<END
version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: /run/registry/data}}
http: {addr: `+at+`}
END`)
	ctx, cancel := context.WithCancel(context.Background())
	cmd := h.Command(ctx, "docker-registry", "serve", "/run/registry/config.yml")
	if err := cmd.Start(); err != nil {
		h.T.Fatal(err)
	}
	h.T.Cleanup(func() { cancel(); cmd.Wait() })
	client := http.Client{Transport: &http.Transport{DialContext: h.DialContext}}
	test.Eventually(h.T, "the registry answers", 10*time.Second, func() bool {
		resp, err := client.Get("http://" + at + "/v2/")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	return at
}

// runMake runs make in the VM, on the checkout.
func runMake(h test.Host, arg ...string) {
	h.T.Helper()
	ctx, cancel := context.WithTimeout(h.T.Context(), 5*time.Minute)
	defer cancel()
	cmd := h.Command(ctx, "make", append([]string{"-C", test.Top}, arg...)...)
	cmd.Env = os.Environ()
	if out, err := cmd.CombinedOutput(); err != nil {
		h.T.Fatalf("make %s: %v\n%s", strings.Join(arg, " "), err, out)
	}
}

func TestThePluginComesFromARegistry(t *testing.T) {
	if _, err := test.BuildPlugin(); err != nil {
		t.Fatal(err)
	}
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{}, vnetsim.VMConfig{Secondaries: 4})
	maker, h := vms[0], vms[1]
	at := registry(maker)
	maker.StartEngine("--insecure-registry", at)
	native := "ARCHS=" + runtime.GOARCH
	runMake(maker, "push", "REGISTRY="+at+"/azure-vnet", native, "TAG=old", "VERSION=old")
	runMake(maker, "push", "REGISTRY="+at+"/azure-vnet", native)
	tag := func(version string) string { return at + "/azure-vnet:" + version + runtime.GOARCH }

	h.WithEngine("--insecure-registry", at) // and nothing else is prepared
	h.Docker("plugin", "install", "--grant-all-permissions", "--alias", test.Plugin, tag("old-"))
	h.Network("azure")
	addr := h.Container("azure", "one", "sleep 100000")
	used := []netip.Addr{addr}
	works := func(t *testing.T, what string) {
		t.Helper()
		if _, err := test.OnHost(maker).Try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
			t.Errorf("%s: the container is not reached: %v", what, err)
		}
	}
	works(t, "installed")
	// change does something to the disabled plugin while a container runs.
	change := func(t *testing.T, what, version string, do func(h test.Host)) {
		t.Helper()
		h := h.In(t)
		h.Docker("plugin", "disable", "-f", test.Plugin)
		works(t, what+" is disabled")
		do(h)
		h.Docker("plugin", "enable", test.Plugin)
		works(t, what+" is enabled")
		if got := h.Must("sh", "-c", `/proc/$(busybox pidof azure-vnet-plugin | cut -d' ' -f1)/root/azure-vnet-plugin version`); got != version {
			t.Errorf("%s: version %q runs, want %q", what, got, version)
		}
		two := h.Container("azure", "two", "sleep 100000")
		used = append(used, two)
		if _, err := test.OnHost(maker).Try("ping", "-c", "1", "-W", "3", two.String()); err != nil {
			t.Errorf("%s: a new container is not reached: %v", what, err)
		}
		h.Docker("rm", "-f", "two")
		holds(h, 1)
	}
	current := test.MustOutput(t, test.PluginBinary, "version")
	t.Run("upgraded and downgraded with a container running, its networks and addresses stay", func(t *testing.T) {
		change(t, "the upgraded plugin", current, func(h test.Host) {
			h.Docker("plugin", "upgrade", "--grant-all-permissions", "--skip-remote-check", test.Plugin, tag(""))
		})
		change(t, "the downgraded plugin", "old", func(h test.Host) {
			h.Docker("plugin", "upgrade", "--grant-all-permissions", "--skip-remote-check", test.Plugin, tag("old-"))
		})
	})
	t.Run("make install puts another build in its place", func(t *testing.T) {
		if !test.Soaking {
			t.Skip("TestEveryRestart does much the same: make soak")
		}
		change(t, "the replaced plugin", current, func(h test.Host) {
			runMake(h, "install", "PREFIX=/run/prefix")
			h.Docker("plugin", "disable", "-f", test.Plugin) // change enables it
		})
	})
	t.Run("a file system that cannot be written keeps the plugin as it is", func(t *testing.T) {
		h := h.In(t)
		h.Must("sh", "-c", "mkdir -p /run/ro && mount -t tmpfs -o ro none /run/ro")
		before := h.Docker("plugin", "ls", "--no-trunc")
		_, err := h.Try(filepath.Join(test.Top, "scripts", "plugin.sh"), "install", filepath.Join(test.Top, "build", "plugin"), test.PluginBinary, "/run/ro")
		for _, says := range []string{"Read-only file system", "Nothing was changed", "make install PREFIX="} {
			if err == nil || !strings.Contains(err.Error(), says) {
				t.Errorf("make install does not say %q: %v", says, err)
			}
		}
		if after := h.Docker("plugin", "ls", "--no-trunc"); after != before {
			t.Errorf("the plugins were\n%s\nand are\n%s", before, after)
		}
		works(t, "after an installation that could not be")
		if out, err := h.Try(filepath.Join(test.Top, "scripts", "plugin.sh"), "uninstall", test.PluginBinary, "/run/prefix"); err == nil || !strings.Contains(err.Error(), "these networks use it") {
			t.Errorf("uninstall beside a network: %s %v", out, err)
		}
	})
	h.Docker("rm", "-f", "one")
	h.Empty()
	test.NothingDropped(t, vnet, used...)
}

// TestEveryArchitecture: what no machine here can run is read.
func TestEveryArchitecture(t *testing.T) {
	if !test.Soaking {
		t.Skip("takes long: make soak")
	}
	_, vms := test.NewVNet(t, vnetsim.VMConfig{})
	at := registry(vms[0])
	vms[0].StartEngine("--insecure-registry", at)
	machines := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}
	for arch, machine := range machines {
		test.MustOutput(t, "make", "-C", test.Top, "rootfs", "ARCH="+arch) // packages come from outside
		dir := "build/" + arch + "/plugin/rootfs"
		if arch == runtime.GOARCH {
			dir = "build/plugin/rootfs"
		}
		root := os.DirFS(filepath.Join(test.Top, dir))
		there := map[string]bool{}
		var needed []string
		err := fs.WalkDir(root, ".", func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() || filepath.Ext(path) == ".conflist" {
				return err
			}
			there[d.Name()] = true
			f, err := elf.Open(filepath.Join(test.Top, dir, path))
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
	runMake(vms[0], "push", "REGISTRY="+at+"/azure-vnet")
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
