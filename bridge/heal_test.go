// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"

	"github.com/google/go-cmp/cmp"
)

// Whoever breaks the bridge, one Reconcile makes it what it was, and a second
// finds nothing to do.
func TestReconcileHeals(t *testing.T) {
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1}, vnetsim.VMConfig{})
	h := hosts[0]
	h.rich()
	if _, err := h.ensure(h.spec()); err != nil {
		t.Fatal(err)
	}
	want := h.picture("azure0")
	primary := h.Primary.String()
	tests := []struct {
		name  string
		harm  []string
		tells string // part of a sentence of what was mended
	}{
		{"bridge deleted", []string{"link del azure0"}, "azure0 was gone"},
		{"NIC taken out", []string{"link set eth0 nomaster"}, "eth0 was not in azure0"},
		{"networkd restarted", []string{"link set eth0 nomaster", "addr add " + primary + "/16 dev eth0 metric 100", "route append default via " + h.Gateway.String() + " dev eth0 proto dhcp metric 100 src " + primary}, "eth0 was not in azure0"},
		{"NIC addressed", []string{"addr add " + primary + "/16 dev eth0 valid_lft 3600 preferred_lft 3600"}, "eth0 held address " + primary},
		{"NIC down", []string{"link set eth0 down"}, "eth0 was down"},
		{"bridge down", []string{"link set azure0 down"}, "azure0 was down"},
		{"address deleted", []string{"addr del " + primary + "/16 dev azure0"}, "azure0 lacked its address " + primary},
		{"addresses flushed", []string{"addr flush dev azure0"}, "azure0 lacked its address"},
		{"default route deleted", []string{"route del default dev azure0"}, "azure0 lacked its route default"},
		{"rule deleted", []string{"rule del priority 99"}, "azure0 lacked its rule"},
		{"MAC changed", []string{"link set azure0 address 02:11:22:33:44:55"}, "azure0 had the MAC"},
		{"MTU changed", []string{"link set azure0 mtu 1300"}, "azure0 had an MTU"},
		{"fabric's entry deleted", []string{}, "forwarding entry"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if len(tt.harm) == 0 {
				h.run("bridge", "fdb", "del", "12:34:56:78:9a:bc", "dev", "eth0", "master")
			}
			h.ip(tt.harm...)
			if len(h.broken()) == 0 {
				t.Error("Broken names nothing")
			}
			if mended := strings.Join(h.reconcile(), "\n"); !strings.Contains(mended, tt.tells) {
				t.Errorf("mended %q, and not %q", mended, tt.tells)
			}
			checkSame(t, "azure0", want, h.picture("azure0"))
			if got := h.run("ip", "-o", "addr", "show", "dev", "eth0"); got != "" {
				t.Errorf("eth0 has %s", got)
			}
			if mended := h.reconcile(); len(mended) != 0 {
				t.Errorf("mended again: %q", mended)
			}
			if wrong := h.broken(); len(wrong) != 0 {
				t.Errorf("Broken names %q, and all stands", wrong)
			}
		})
	}
	p := startProbe(t, h, hosts[1], h.Primary)
	p.end()
}

// An iptables that does not work is told, and keeps nothing else from being mended.
func TestReconcileHealsWithoutIptables(t *testing.T) {
	_, hosts := newHosts(t, vnetsim.VMConfig{}, vnetsim.VMConfig{})
	h := hosts[0]
	if _, err := h.ensure(h.spec()); err != nil {
		t.Fatal(err)
	}
	want := h.picture("azure0")
	h.run("nft", "flush", "ruleset")
	h.ip("addr flush dev azure0")
	path := os.Getenv("PATH")
	t.Setenv("PATH", "")
	err := h.Do(func() error { _, err := h.Reconcile(t.Context()); return err })
	if err == nil || !strings.Contains(err.Error(), "install the package iptables") {
		t.Errorf("reconcile without iptables: %v", err)
	}
	t.Setenv("PATH", path)
	checkSame(t, "azure0", want, h.picture("azure0"))
	if tables := h.run("nft", "list", "tables", "bridge"); !strings.Contains(tables, tableName) {
		t.Errorf("the table was not made again: %q", tables)
	}
	if mended := h.reconcile(); len(mended) != 2 {
		t.Errorf("with iptables it mended %q, and not two rules", mended)
	}
}

// A network that wants a list of its own has it again after host.json was lost,
// for whoever knows the network says it.
func TestALostPolicyIsLearntAgain(t *testing.T) {
	t.Parallel()
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
	h := hosts[0]
	h.mustEnsure()
	own := Policy{SNAT: true, Direct: []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}}
	h.mustAttach(h.container(0).endpoint(own))
	before := h.kernelState()
	if err := os.Remove(h.path("host.json")); err != nil {
		t.Fatal(err)
	}
	if err := h.Do(func() error {
		if err := h.Learn(t.Context(), own); err != nil {
			return err
		}
		_, err := h.Reconcile(t.Context())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, h.kernelState()); diff != "" {
		t.Errorf("the kernel's state changed (-before +after):\n%s", diff)
	}
}

// A lost or spoilt host.json means no second move: what stands is adopted, and
// can still be undone.
func TestLostStateIsAdopted(t *testing.T) {
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1}, vnetsim.VMConfig{})
	h := hosts[0]
	h.rich()
	h.ip("neigh del 10.240.9.9 dev eth0") // a bridge's neighbours are its containers': only host.json tells them apart
	home := h.picture("eth0")
	if _, err := h.ensure(h.spec()); err != nil {
		t.Fatal(err)
	}
	index := h.run("ip", "-o", "link", "show", "azure0")
	p := startProbe(t, h, hosts[1], h.Primary)
	for name, spoil := range map[string]func(file string) error{
		"lost":    os.Remove,
		"empty":   func(file string) error { return os.WriteFile(file, nil, 0o600) },
		"NULs":    func(file string) error { return os.WriteFile(file, make([]byte, 4096), 0o600) },
		"of 2042": func(file string) error { return os.WriteFile(file, []byte(`{"version":2042}`), 0o600) },
		"of another boot": func(file string) error {
			return os.WriteFile(file, []byte(`{"version":1,"boot":"another","bridges":{"azure9":{"mac":"02:00:00:00:00:01"}}}`), 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			if err := spoil(h.path("host.json")); err != nil {
				t.Fatal(err)
			}
			if _, err := h.ensure(h.spec()); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(index, h.run("ip", "-o", "link", "show", "azure0")); diff != "" {
				t.Errorf("azure0 is another (-was +is):\n%s", diff)
			}
			checkSame(t, "azure0", home, h.picture("azure0"))
			s, err := h.state()
			if err != nil || s.Bridges["azure0"] == nil || s.Bridges["azure0"].Phase != standing || len(s.Bridges) != 1 {
				t.Errorf("host.json: %+v, %v", s.Bridges, err)
			}
		})
	}
	if err := os.Remove(h.path("host.json")); err != nil {
		t.Fatal(err)
	}
	if err := h.remove("azure0"); err != nil {
		t.Fatal(err)
	}
	checkSame(t, "eth0", home, h.picture("eth0"))
	if worst := p.end(); worst > silence {
		t.Errorf("the host was silent for %v", worst)
	}
}

// What others gave the bridge is theirs to take away; it comes back with a
// bridge that was lost, and goes home with one that is removed.
func TestBridgeIsGivenMore(t *testing.T) {
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
	h := hosts[0]
	if _, err := h.ensure(h.spec()); err != nil {
		t.Fatal(err)
	}
	h.ip("addr add 10.240.77.1/16 dev azure0 noprefixroute", "route add 192.0.2.0/24 via "+h.Gateway.String()+" dev azure0", "route add 198.51.100.0/24 dev azure0")
	h.ip("route del 198.51.100.0/24 dev azure0")
	more := h.picture("azure0")
	h.reconcile() // the nft table follows the host's addresses
	checkSame(t, "azure0", more, h.picture("azure0"))
	if mended := h.reconcile(); len(mended) != 0 {
		t.Errorf("mended %q", mended)
	}
	h.ip("link del azure0")
	h.reconcile()
	checkSame(t, "azure0 rebuilt", more, h.picture("azure0"))
	if err := h.remove("azure0"); err != nil {
		t.Fatal(err)
	}
	checkSame(t, "eth0", more, h.picture("eth0"))
}

// What others gave the bridge and what cannot be brought back with it, such as a
// route by a link that is gone, is told, and keeps nobody's network away.
func TestWhatDoesNotFitAnyMoreIsTold(t *testing.T) {
	_, hosts := newHosts(t, vnetsim.VMConfig{})
	h := hosts[0]
	if _, err := h.ensure(h.spec()); err != nil {
		t.Fatal(err)
	}
	home := h.picture("azure0")
	h.ip("link add d0 type veth peer d1", "link set d0 up", "link set d1 up", "addr add 192.168.9.1/24 dev d0",
		"route add 192.0.2.0/24 nexthop via "+h.Gateway.String()+" dev azure0 nexthop via 192.168.9.2 dev d0")
	h.reconcile()
	h.ip("link del d0", "link del azure0")
	err := h.Do(func() error { _, err := h.Reconcile(t.Context()); return err })
	if err == nil || !strings.Contains(err.Error(), "route 192.0.2.0/24") {
		t.Errorf("reconcile: %v", err)
	}
	checkSame(t, "azure0", home, h.picture("azure0"))
	if mended := h.reconcile(); len(mended) != 0 {
		t.Errorf("mended again: %q", mended)
	}
}

// An address that a container has does not stay on the NIC, were it the only one there.
func TestTheHostYieldsAContainersAddress(t *testing.T) {
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
	h := hosts[0]
	h.mustEnsure()
	c := h.container(0)
	h.mustAttach(c.endpoint(Policy{SNAT: true}))
	h.ip("addr add " + c.addr.String() + "/32 dev eth0")
	if mended := strings.Join(h.reconcile(), "\n"); !strings.Contains(mended, "eth0 held "+c.addr.String()) {
		t.Errorf("mended %q", mended)
	}
	if got := h.run("ip", "-o", "addr", "show", "dev", "eth0"); got != "" {
		t.Errorf("eth0 has %s", got)
	}
}

// cloud-init puts secondary addresses on the NIC: they follow the host to the
// bridge until they are reclaimed, and then stay away.
func TestReclaim(t *testing.T) {
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 3, HoldSecondaries: true})
	h := hosts[0]
	reclaim := func(addrs ...netip.Addr) (removed []netip.Addr, err error) {
		return removed, h.Do(func() (err error) {
			removed, err = h.Reclaim(t.Context(), h.MAC, addrs)
			return err
		})
	}
	first, rest := h.Secondaries()[0], h.Secondaries()[1:]
	var removed []netip.Addr
	check := func(what string, want []netip.Addr, addrs ...netip.Addr) {
		t.Helper()
		err := h.Do(func() (err error) {
			removed, err = h.Reclaim(t.Context(), h.MAC, addrs)
			return err
		})
		if diff := cmp.Diff(want, removed, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" || err != nil {
			t.Errorf("%s: %v (-want +got):\n%s", what, err, diff)
		}
	}
	h.ip("route del default dev eth0", "route add default via "+h.Gateway.String()+" dev eth0") // as dhclient does, naming no source
	if _, err := reclaim(h.Primary); err == nil || !strings.Contains(err.Error(), "the host's own") {
		t.Errorf("the primary address under a route that does not name it: %v", err)
	}
	check("from the NIC", []netip.Addr{first}, first)
	if _, err := h.ensure(h.spec()); err != nil {
		t.Fatal(err)
	}
	check("from the bridge", rest, h.Secondaries()...)
	check("again", nil, h.Secondaries()...)
	if mended := h.reconcile(); len(mended) != 0 {
		t.Errorf("reconcile brought back: %q", mended)
	}
	if _, err := reclaim(h.Primary); err == nil || !strings.Contains(err.Error(), "the host's own") {
		t.Errorf("the primary address: %v", err)
	}
	if got := h.run("ip", "-o", "-4", "addr", "show", "dev", "azure0"); strings.Count(got, "\n") != 1 || !strings.Contains(got, h.Primary.String()) {
		t.Errorf("azure0 has %s", got)
	}
}

// Watch tells of what happens to the bridge, to its NIC and to our nft table,
// and of nothing that happens to others.
func TestWatch(t *testing.T) {
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
	h := hosts[0]
	if _, err := h.ensure(h.spec()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	told, ended := make(chan struct{}, 100), make(chan error, 1)
	go func() {
		ended <- h.Do(func() error { return h.Watch(ctx, func() { told <- struct{}{} }) })
	}()
	await := func() bool {
		select {
		case <-told:
			return true
		case <-time.After(watchPause + 300*time.Millisecond):
			return false
		}
	}
	for deadline := time.Now().Add(5 * time.Second); ; { // until it listens
		h.ip("link set azure0 mtu 1400")
		if await() {
			break
		}
		if h.ip("link set azure0 mtu 1500"); time.Now().After(deadline) {
			t.Fatal("Watch tells of nothing")
		}
	}
	for await() {
	}
	tests := []struct {
		do   string
		want bool
	}{
		{"ip route add 192.0.2.0/24 dev azure0", true},
		{"ip addr add 192.0.2.9/32 dev azure0", true},
		{"ip addr add 192.0.2.10/32 dev eth0", true},
		{"ip link set eth0 nomaster", true},
		{"ip link add azvtest type veth peer name elsewhere", true},
		{"ip link del azvtest", true},
		{"ip link add docker9 type bridge", false},
		{"ip addr add 192.0.2.11/32 dev docker9", false},
		{"nft add table ip other", false},
		{"nft add table bridge azure_vnet_test", true},
		{"ip link del azure0", true},
		{"nft flush ruleset", true},
	}
	c := h.container(0)
	for await() {
	}
	h.mustAttach(c.endpoint(Policy{}))
	for await() { // the policy is new to the table
	}
	if err := h.detach(c.endpoint(Policy{}).Owner); err != nil {
		t.Fatal(err)
	}
	for await() {
	}
	h.mustAttach(c.endpoint(Policy{}))
	if await() {
		t.Error("a container that starts: told")
	}
	for _, tt := range tests {
		for !tt.want && await() { // late echoes of what was done before
		}
		words := strings.Fields(tt.do)
		h.run(words[0], words[1:]...)
		if got := await(); got != tt.want {
			t.Errorf("%s: told %v, want %v", tt.do, got, tt.want)
		}
	}
	cancel()
	if err := <-ended; err != context.Canceled {
		t.Errorf("Watch ended with %v", err)
	}
}
