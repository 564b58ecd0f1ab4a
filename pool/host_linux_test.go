// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
)

func TestAFileIsASource(t *testing.T) {
	path, err := filepath.Abs(filepath.Join("testdata", "interfaces.json"))
	if err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{path: "", path + ".not": "no such file", t.TempDir(): "not a file", fifo: "not a file", "/dev/zero": "not a file"} {
		p, err := New(Config{Dir: t.TempDir(), Source: file})
		if err != nil {
			t.Fatal(err)
		}
		p.host = func() (hostLinks, error) { return hostLinks{}, nil }
		nics, err := p.NICs(t.Context())
		if want != "" {
			wants(t, err, ErrSource, file, want)
		} else if err != nil || text(nics) != "00:0d:3a:6e:18:25* 10.0.0.0/24 10.0.0.4: 10.0.0.5" {
			t.Errorf("NICs are %s, %v", text(nics), err)
		}
	}
}

// In a network namespace of its own, which ends with the test's thread.
func TestTheHostIsReadFromTheKernel(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to make a network namespace")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlock: the thread ends with its namespace
		if err := syscall.Unshare(syscall.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		addLink(t, "eth0", mac1, "10.0.0.4/24", "10.0.0.5/24")
		addLink(t, "azure0", mac1, "10.0.0.6/24") // the bridge has the NIC's MAC
		addLink(t, "eth1", mac2, "10.0.1.4/24")
		for dev, metric := range map[string]int{"eth1": 200, "eth0": 100} {
			l, err := netlink.LinkByName(dev)
			if err == nil {
				err = netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Priority: metric, Scope: netlink.SCOPE_LINK,
					Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}})
			}
			if err != nil {
				t.Error(err)
			}
		}
		held, err := hostAddrs()
		want := map[netip.Addr]string{addr("10.0.0.4"): "eth0", addr("10.0.0.5"): "eth0", addr("10.0.0.6"): "azure0", addr("10.0.1.4"): "eth1"}
		if diff := cmp.Diff(want, held, compareAddr); err != nil || diff != "" {
			t.Errorf("held, %v (-want +got):\n%s", err, diff)
		}
		h, err := readHostLinks()
		wantHost := hostLinks{Default: mac1, MACs: []string{mac1, mac1, mac2}, Addrs: map[string][]netip.Addr{
			mac1: {addr("10.0.0.4"), addr("10.0.0.5"), addr("10.0.0.6")}, mac2: {addr("10.0.1.4")}}}
		if diff := cmp.Diff(wantHost, h, compareAddr); err != nil || diff != "" {
			t.Errorf("host, %v (-want +got):\n%s", err, diff)
		}
		for to, dev := range map[string]string{"10.0.0.8/32": "azure0", "10.0.0.9/32": "eth1", "10.0.0.128/25": "eth1"} {
			l, err := netlink.LinkByName(dev)
			if err == nil {
				_, dst, _ := net.ParseCIDR(to)
				err = netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Scope: netlink.SCOPE_LINK, Dst: dst})
			}
			if err != nil {
				t.Error(err)
			}
		}
		routes, err := hostRoutes()
		routed := map[netip.Addr]string{}
		for to, link := range routes {
			routed[to] = linkName(link)
		}
		if diff := cmp.Diff(map[netip.Addr]string{addr("10.0.0.8"): "azure0", addr("10.0.0.9"): "eth1"}, routed, compareAddr); err != nil || diff != "" {
			t.Errorf("led, %v (-want +got):\n%s", err, diff)
		}
		lendBesideTheHost(t)
	}()
	<-done
}

// lendBesideTheHost lends in the namespace whose eth0 holds .5 and azure0 .6.
func lendBesideTheHost(t *testing.T) {
	f := azure(nic(mac1, "10.0.0.0/24", 4))
	p, err := New(Config{Dir: t.TempDir()})
	if err != nil {
		t.Error(err)
		return
	}
	p.sources[0].fetch = func(context.Context) ([]byte, error) { return []byte(f.body), nil }
	if l, err := p.Lease(t.Context(), Request{Owner: "o"}); err != nil || l.Addr != addr("10.0.0.7") {
		t.Errorf("lease %+v, %v", l, err)
	}
}

func addLink(t *testing.T, name, mac string, addrs ...string) {
	hw, _ := net.ParseMAC(mac) // bridges, for every kernel has them
	l := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name, HardwareAddr: hw}}
	if err := netlink.LinkAdd(l); err != nil {
		t.Error(err)
	}
	for _, a := range addrs {
		parsed, err := netlink.ParseAddr(a)
		if err == nil {
			err = netlink.AddrAdd(l, parsed)
		}
		if err != nil {
			t.Error(err)
		}
	}
	if err := netlink.LinkSetUp(l); err != nil {
		t.Error(err)
	}
}
