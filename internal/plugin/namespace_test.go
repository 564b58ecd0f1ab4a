// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"azurevnet/internal/dump"
)

const inside = "AZURE_VNET_TEST_NAMESPACE"

// TestMain runs the tests in namespaces of network and mounts that end with the
// process: a VM with one NIC and a /run of its own. Every thread is in them, as
// the threads of a server must be.
func TestMain(m *testing.M) {
	if os.Geteuid() != 0 || os.Getenv(inside) != "" {
		os.Exit(m.Run())
	}
	runtime.LockOSThread() // Pdeathsig is of the thread
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	if exit := new(exec.ExitError); errors.As(err, &exit) {
		os.Exit(exit.ExitCode())
	} else if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

const (
	nicMAC    = "00:0d:3a:04:75:98"
	oneSubnet = `{"Interfaces":[{"MacAddress":"000D3A047598","IsPrimary":true,"IPSubnets":[{"Prefix":"10.240.0.0/16","IPAddresses":[%s]}]}]}`
)

// newVM makes the namespaces a VM as it booted: eth0 with its address, an empty
// /run, and a source file with that many secondary addresses, from 10.240.0.5 up.
func newVM(t *testing.T, secondaries int) {
	t.Helper()
	if os.Getenv(inside) == "" {
		t.Skip("needs root, to make namespaces")
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(syscall.Mount("tmpfs", "/run", "tmpfs", 0, ""))
	t.Cleanup(func() { syscall.Unmount("/run", syscall.MNT_DETACH) })

	list := `{"Address":"10.240.0.4","IsPrimary":true}`
	for i := range secondaries {
		list += fmt.Sprintf(`,{"Address":"10.240.0.%d"}`, 5+i)
	}
	must(os.WriteFile("/run/interfaces.json", fmt.Appendf(nil, oneSubnet, list), 0o600))
	t.Setenv("SOURCE", "/run/interfaces.json")
	t.Setenv("LOG_LEVEL", "debug")

	mac, err := net.ParseMAC(nicMAC)
	must(err)
	eth0 := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0", HardwareAddr: mac, MTU: 1500}, PeerName: "fabric"}
	must(netlink.LinkAdd(eth0))
	t.Cleanup(func() { clearNamespace(t) })
	for _, name := range []string{"lo", "eth0", "fabric"} {
		link, err := netlink.LinkByName(name)
		must(err)
		must(netlink.LinkSetUp(link))
	}
	addr, err := netlink.ParseAddr("10.240.0.4/16")
	must(err)
	must(netlink.AddrAdd(eth0, addr))
	must(netlink.RouteAdd(&netlink.Route{LinkIndex: eth0.Index, Gw: net.IPv4(10, 240, 0, 1)}))
}

// clearNamespace removes what a test left, for the next one.
func clearNamespace(t *testing.T) {
	links, err := dump.Whole(netlink.LinkList)
	if err != nil {
		t.Error(err)
	}
	for _, l := range links {
		if l.Attrs().Name != "lo" {
			_ = netlink.LinkDel(l) // the other end of a veth goes with the first
		}
	}
	if out, err := exec.Command("nft", "flush", "ruleset").CombinedOutput(); err != nil {
		t.Errorf("nft flush ruleset: %v: %s", err, out)
	}
}

// endpoints lists the links of containers, on this side.
func endpoints(t *testing.T) []string {
	t.Helper()
	links, err := dump.Whole(netlink.LinkList)
	if err != nil {
		t.Fatal(err)
	}
	names := []string{}
	for _, l := range links {
		if name := l.Attrs().Name; strings.HasPrefix(name, "azv") || strings.HasPrefix(name, "azc") {
			names = append(names, name)
		}
	}
	return names
}

// moveToContainer does what an engine does after Join; the namespace ends with
// what it returns.
func moveToContainer(t *testing.T, link string) (end func()) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer home.Close()
	container, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	if err := netns.Set(home); err != nil {
		t.Fatal(err)
	}
	l, err := netlink.LinkByName(link)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetNsFd(l, int(container)); err != nil {
		t.Fatal(err)
	}
	return func() { container.Close() }
}
