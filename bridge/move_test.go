// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"

	"github.com/google/go-cmp/cmp"
)

// host is a VM of a simulated VNet, with its bridge package.
type host struct {
	*vnetsim.VM
	*Host
	t *testing.T
}

// newHosts starts a VNet with a VM for each config.
func newHosts(t *testing.T, cfgs ...vnetsim.VMConfig) (*vnetsim.VNet, []*host) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make network namespaces")
	}
	v, err := vnetsim.New(vnetsim.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := v.Close(); err != nil {
			t.Error(err)
		}
	})
	var hosts []*host
	for _, cfg := range cfgs {
		vm, err := v.AddVM(cfg)
		if err != nil {
			t.Fatal(err)
		}
		hosts = append(hosts, &host{VM: vm, Host: New(Config{Run: t.TempDir()}), t: t})
	}
	return v, hosts
}

func (h *host) spec() Spec { return Spec{MAC: h.MAC, Primary: true} }

// ensure and remove are the package's, on the VM.
func (h *host) ensure(spec Spec) (b Bridge, err error) {
	return b, errors.Join(h.Do(func() error { b, err = h.Ensure(h.t.Context(), spec); return err }))
}

func (h *host) remove(name string) error {
	return h.Do(func() error { return h.Remove(h.t.Context(), name) })
}

func (h *host) reconcile() []string {
	h.t.Helper()
	var mended []string
	err := h.Do(func() (err error) { mended, err = h.Reconcile(h.t.Context()); return err })
	if err != nil {
		h.t.Fatalf("reconcile: %v", err)
	}
	return mended
}

func (h *host) broken() []string {
	h.t.Helper()
	var wrong []string
	err := h.Do(func() (err error) { wrong, err = h.Broken(h.t.Context()); return err })
	if err != nil {
		h.t.Fatalf("broken: %v", err)
	}
	return wrong
}

// ip runs lines of the ip tool.
func (h *host) ip(lines ...string) {
	h.t.Helper()
	for _, line := range lines {
		h.run("ip", strings.Fields(line)...)
	}
}

func (h *host) run(name string, arg ...string) string {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	out, err := h.Run(ctx, name, arg...)
	if err != nil {
		h.t.Fatal(err)
	}
	return out
}

// picture is the host's identity as the ip tool prints it, with LINK in the
// place of the link that has it and without what passes: a picture of eth0
// before a move is that of azure0 after it.
func (h *host) picture(link string) []string {
	h.t.Helper()
	var out []string
	for _, what := range []string{"-4 addr show dev " + link, "-6 addr show dev " + link, "-4 route show table all", "-6 route show table all", "-4 rule", "-6 rule", "neigh show nud permanent dev " + link} {
		for line := range strings.Lines(h.run("ip", strings.Fields("-o -N "+what)...)) {
			line = passing.ReplaceAllString(strings.ReplaceAll(line, link, "LINK"), "")
			line = strings.Join(strings.Fields(line), " ")
			if line != "" && !strings.Contains(line, "table 255") && (strings.Contains(what, "rule") || strings.Contains(what, "show dev") || strings.Contains(what, "permanent") || strings.Contains(line, "LINK")) {
				out = append(out, line)
			}
		}
	}
	slices.Sort(out)
	return out
}

var passing = regexp.MustCompile(`^\d+: |\\|valid_lft \S+|preferred_lft \S+|noprefixroute|nodad|dynamic|linkdown|expires \S+|error \S+`)

// rich is all that a host may have on its NIC.
func (h *host) rich() {
	h.t.Helper()
	h.ip(
		"addr add 10.240.200.9/16 dev eth0 label eth0:old valid_lft 3000 preferred_lft 2000",
		"addr add 172.31.0.1/32 dev eth0",
		"route add 192.0.2.0/24 via "+h.Gateway.String()+" dev eth0 metric 7 mtu 1400 table 100",
		"route add 198.18.0.0/15 via 172.16.0.1 dev eth0 onlink src "+h.Primary.String(),
		"route add 100.64.0.0/10 dev eth0 scope link proto static tos 0x10",
		"rule add iif eth0 lookup 100 priority 99",
		"rule add from 10.240.200.9 oif eth0 lookup 100 priority 98",
		"neigh add 10.240.9.9 lladdr 02:00:00:00:00:09 nud permanent dev eth0",
		"-6 addr add fd00:1::4/64 dev eth0 nodad",
		"-6 addr add fe80::20d:3aff:fe00:1/64 dev eth0 nodad",
		"-6 route add default via fe80::1234:5678:9abc dev eth0 metric 100 proto ra",
		"-6 route add fd00:2::/64 via fe80::1234:5678:9abc dev eth0 metric 1024 pref high",
		"-6 rule add iif eth0 lookup 100 priority 97",
	)
}

// A host with a full routing table moves as any other, and home again.
func TestManyRoutesMove(t *testing.T) {
	_, hosts := newHosts(t, vnetsim.VMConfig{}, vnetsim.VMConfig{})
	h := hosts[0]
	h.run("sh", "-c", "for i in $(seq 12); do for j in $(seq 200); do echo route add 198.$i.$j.0/24 via "+h.Gateway.String()+" dev eth0; done; done | ip -batch -")
	before := h.picture("eth0")
	p := startProbe(t, h, hosts[1], h.Primary)
	if _, err := h.ensure(h.spec()); err != nil {
		t.Fatal(err)
	}
	checkSame(t, "azure0", before, h.picture("azure0"))
	if err := h.remove("azure0"); err != nil {
		t.Fatal(err)
	}
	checkSame(t, "eth0", before, h.picture("eth0"))
	if worst := p.end(); worst > silence {
		t.Errorf("the host was silent for %v", worst)
	}
}

// A NIC that cannot join a bridge, such as one under a macvlan, keeps the host.
func TestANICThatCannotJoinKeepsTheHost(t *testing.T) {
	_, hosts := newHosts(t, vnetsim.VMConfig{}, vnetsim.VMConfig{})
	h := hosts[0]
	if _, err := h.Run(t.Context(), "ip", "link", "add", "mv0", "link", "eth0", "type", "macvlan"); err != nil {
		t.Skip("no macvlan in this kernel: ", err)
	}
	before := h.picture("eth0")
	p := startProbe(t, h, hosts[1], h.Primary)
	if _, err := h.ensure(h.spec()); err == nil || !strings.Contains(err.Error(), "put eth0 into azure0") {
		t.Errorf("ensure: %v", err)
	}
	checkSame(t, "eth0", before, h.picture("eth0"))
	if worst := p.end(); worst > silence {
		t.Errorf("the host was silent for %v", worst)
	}
}

// A bridge gets all that made the NIC the host's, and gives all of it back.
func TestIdentityMovesAndReturns(t *testing.T) {
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
	h := hosts[0]
	h.rich()
	before := h.picture("eth0")

	got, err := h.ensure(h.spec())
	if err != nil {
		t.Fatal(err)
	}
	mac, _ := net.ParseMAC(h.MAC)
	if diff := cmp.Diff(Bridge{Name: "azure0", NIC: "eth0", MAC: mac, MTU: 1500}, got); diff != "" {
		t.Errorf("bridge (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(before, h.picture("azure0")); diff != "" {
		t.Errorf("azure0 against what eth0 was (-want +got):\n%s", diff)
	}
	if got := h.run("ip", "-o", "addr", "show", "dev", "eth0"); got != "" {
		t.Errorf("eth0 still has %s", got)
	}
	if got := h.run("ip", "-o", "-4", "addr", "show", "dev", "azure0"); strings.Contains(got, "dynamic") {
		t.Errorf("an address on azure0 will expire: %s", got)
	}
	if mended := h.reconcile(); len(mended) != 0 {
		t.Errorf("a bridge just made lacked: %q", mended)
	}

	if err := h.remove("azure0"); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, h.picture("eth0")); diff != "" {
		t.Errorf("eth0 against what it was (-want +got):\n%s", diff)
	}
	for _, file := range []string{networkd, networkManager} {
		if _, err := os.Stat(filepath.Join(h.cfg.Run, file)); err == nil {
			t.Errorf("%s is left", file)
		}
	}
	if s, err := h.state(); err != nil || len(s.Bridges) != 0 {
		t.Errorf("host.json is left with %v, %v", s.Bridges, err)
	}
	if err := h.remove("azure0"); err != nil {
		t.Errorf("remove again: %v", err)
	}
}
