// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"azurevnet/internal/vnetsim"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Plugin is the name under which tests give the plugin to an engine.
const Plugin = "azure-vnet:latest"

// Top is the root of the checkout, which has the go.mod.
var Top = func() string {
	dir, err := os.Getwd()
	if err != nil {
		panic(err)
	}
	for dir != "/" {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		dir = filepath.Dir(dir)
	}
	panic("no go.mod above the tests")
}()

// PluginBinary is the plugin as make build makes it.
var PluginBinary = filepath.Join(Top, "build", "azure-vnet-plugin")

// BuildPlugin makes build/plugin and PluginBinary.
var BuildPlugin = Once("plugin", func(string) error {
	return output(exec.Command("make", "-C", Top, "rootfs"))
})

// buildCNI builds our CNI plugins and the reference ones.
var buildCNI = Once("cni", func(dir string) error {
	const ref = "github.com/containernetworking/plugins/plugins/"
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", dir+"/",
		"azurevnet/cmd/azure-vnet", "azurevnet/cmd/azure-vnet-ipam",
		"github.com/containernetworking/cni/cnitool",
		ref+"main/bridge", ref+"main/ptp", ref+"main/macvlan", ref+"main/loopback", ref+"ipam/host-local", ref+"meta/portmap", ref+"meta/bandwidth", ref+"meta/tuning", ref+"meta/sbr")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	return output(build)
})

// former is the last commit whose build moves the NIC into azure0.
const former = "7f651bb476cc3e83a11092e86d8b91e6704ad2d4"

// ErrNoHistory says that this checkout lacks the commit of the former build.
var ErrNoHistory = errors.New("git does not know the former build here: " + former)

// BuildFormer makes a directory with the sources of the former build.
// Its build/ has what make rootfs puts there: azure-vnet-plugin, cni/ and plugin/.
var BuildFormer = Once("former", func(dir string) error {
	if err := exec.Command("git", "-C", Top, "cat-file", "-e", former+"^{commit}").Run(); err != nil {
		return ErrNoHistory
	}
	if _, err := BuildPlugin(); err != nil { // which fetches the packages of iptables
		return err
	}
	return output(exec.Command("sh", "-euc", `rm -rf "$1"
mkdir "$1"
git -C "$0" archive "$2" | tar -x -C "$1"
cd "$1"
make -s build VERSION=former
scripts/dist.sh content former "$3" build/cni
scripts/rootfs.sh build/azure-vnet-plugin build/cni build/plugin/rootfs "$0/build/packages" "$3"
cp config.json build/plugin/`, Top, dir, former, runtime.GOARCH))
})

// engineDisk makes /var/lib/docker of an engine that has the image busybox and the plugin, not enabled. To pack the plugin
// is most of what an engine does in a short test, so it is done once.
var engineDisk = Once("engine", func(dir string) (err error) {
	if _, err := BuildPlugin(); err != nil {
		return err
	}
	vnet, err := vnetsim.New(vnetsim.Config{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, vnet.Close()) }()
	vm, err := vnet.AddVM(vnetsim.VMConfig{})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	if err := vm.StartDocker(ctx); err != nil {
		return err
	}
	if err := vm.ImportBusybox(ctx); err != nil {
		return err
	}
	if _, err := vm.Docker(ctx, "plugin", "create", Plugin, filepath.Join(Top, "build", "plugin")); err != nil {
		return err
	}
	if err := vm.StopDocker(ctx, syscall.SIGTERM); err != nil {
		return err
	}
	return output(exec.Command("sh", "-euc", `rm -rf "$1"; cp -a "$0" "$1"`, fmt.Sprintf("/proc/%d/root/var/lib/docker", vm.PidOne()), dir))
})

// Once returns a function that builds something into the directory that it returns. Packages of tests run at once: the
// first one builds, and the others find it built. Each process holds the lock, shared, until it ends, so that nobody
// builds anew what another process uses.
func Once(name string, build func(dir string) error) func() (dir string, err error) {
	return sync.OnceValues(func() (string, error) {
		dir := filepath.Join(Top, "build", "tests", name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", err
		}
		fd, err := unix.Open(dir+".lock", unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o644) // never closed
		if err != nil {
			return "", fmt.Errorf("open %s.lock: %w", dir, err)
		}
		if unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) == nil {
			err = build(dir)
		}
		return dir, errors.Join(err, unix.Flock(fd, unix.LOCK_SH))
	})
}

func output(cmd *exec.Cmd) error {
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", cmd, err, out)
	}
	return nil
}
