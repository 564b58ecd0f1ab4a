// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"azurevnet/internal/vnetsim"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// An attach that cannot be is refused with the reason, and touches nothing.
func TestAttachRefuses(t *testing.T) {
	t.Parallel()
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2})
	h := hosts[0]
	h.mustEnsure()
	c, d := h.container(0), h.container(1)
	e := c.endpoint(Policy{SNAT: true})
	a := h.mustAttach(e)
	if diff := cmp.Diff(Attachment{
		Owner: e.Owner, Lease: e.Owner, Link: a.Link, Bridge: "azure0", Addr: e.Addr, MAC: MACFor(c.addr), Away: true,
	}, a, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
		t.Errorf("the attachment (-want +got):\n%s", diff)
	}
	c.sh("ip addr | grep -q " + e.Addr.String())
	whole := h.kernelState()

	change := func(f func(*Endpoint)) Endpoint {
		e := d.endpoint(Policy{SNAT: true})
		f(&e)
		return e
	}
	for want, wish := range map[string]Endpoint{
		"running container has it":        e,
		"cni/net/c0/eth0 has the address": change(func(e *Endpoint) { e.Addr = netip.PrefixFrom(c.addr, 16) }),
		"1 to 255 bytes and no space":     change(func(e *Endpoint) { e.Owner = "a b" }),
		"must have at most 255":           change(func(e *Endpoint) { e.Lease = strings.Repeat("l", 256) }),
		"not an IPv4 address":             change(func(e *Endpoint) { e.Addr = netip.MustParsePrefix("fd00::1/64") }),
		"MAC of one interface":            change(func(e *Endpoint) { e.MAC = mustMAC("01:00:5e:00:00:01") }),
		"not a name for an interface":     change(func(e *Endpoint) { e.IfName = "sixteen-bytes-ab" }),
		"needs an IPv4 gateway":           change(func(e *Endpoint) { e.Gateway = netip.Addr{} }),
		`bridge "azure7"`:                 change(func(e *Endpoint) { e.Bridge = "azure7" }),
		"eth0 is not a bridge of":         change(func(e *Endpoint) { e.Bridge = "eth0" }),
		"no such file":                    change(func(e *Endpoint) { e.Netns = "/nowhere" }),
		"host's own network namespace":    change(func(e *Endpoint) { e.Netns = fmt.Sprintf("/proc/%d/ns/net", h.PidOne()) }),
		"is there a lo":                   change(func(e *Endpoint) { e.IfName = "lo" }),
	} {
		_, err := h.attach(wish)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want an error that says %q", err, want)
		}
		if wish.Owner == e.Owner != errors.Is(err, ErrAttached) {
			t.Errorf("%v: ErrAttached or not, wrongly", err)
		}
	}
	if diff := cmp.Diff(whole, h.kernelState()); diff != "" {
		t.Errorf("refusals changed the kernel's state (-want +got):\n%s", diff)
	}
	for range 2 {
		if err := h.detach(e.Owner); err != nil {
			t.Errorf("detach: %v", err)
		}
	}
	if err := h.detach("never/attached"); err != nil {
		t.Errorf("detach of what never was: %v", err)
	}
}

// Whatever someone does to a port, a neighbour or the table is named and mended.
func TestPortsAreMended(t *testing.T) {
	t.Parallel()
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1, MTU: 4000})
	h := hosts[0]
	h.mustEnsure()
	c := h.container(0)
	a := h.mustAttach(c.endpoint(Policy{SNAT: true}))
	if err := os.Symlink(fmt.Sprintf("/proc/%d/root/run/netns", h.PidOne()), filepath.Join(h.cfg.Run, "netns")); err != nil {
		t.Fatal(err)
	}
	h.reconcile()
	if mended := h.reconcile(); len(mended) > 0 {
		t.Errorf("mended with nothing broken: %q", mended)
	}
	whole := h.kernelState()
	for _, broken := range []string{
		"ip link set LINK nomaster",
		"ip link set LINK down",
		"ip link set LINK mtu 1400",
		"bridge link set dev LINK hairpin off",
		"bridge link set dev LINK learning on",
		"bridge link set dev LINK flood on",
		"bridge fdb del MAC dev LINK master",
		"ip neigh del ADDR dev azure0",
		"ip neigh replace ADDR lladdr 02:00:00:00:00:01 dev azure0",
		"ip neigh add 10.240.77.77 lladdr 02:42:0a:f0:4d:4d dev azure0",
		"ip neigh add 10.240.77.78 lladdr 02:00:00:00:00:02 dev azure0 protocol 168",
		"ip link add azv0123456789a type veth peer azc0123456789a",
		"nft flush ruleset",
		"nft delete element bridge azure_vnet src_ip6 { LINK . MAC }",
	} {
		cmd := strings.NewReplacer("LINK", a.Link, "MAC", a.MAC.String(), "ADDR", c.addr.String()).Replace(broken)
		h.run("sh", "-c", cmd)
		if len(h.broken()) == 0 {
			t.Errorf("%s: not named", broken)
		}
		if mended := h.reconcile(); len(mended) == 0 {
			t.Errorf("%s: not noticed", broken)
		}
		if diff := cmp.Diff(whole, h.kernelState()); diff != "" {
			t.Errorf("%s: not mended (-want +got):\n%s", broken, diff)
		}
	}
	// The bridge's MTU is every end's, the one in the container too.
	if err := h.Do(func() error {
		_, err := h.syncPorts(Bridge{Name: "azure0", MTU: 1300})
		return err
	}); err != nil {
		t.Error(err)
	}
	c.sh("ip link show eth0 | grep -q 'mtu 1300'")
	h.run("sh", "-c", "ip link show "+a.Link+" | grep -q 'mtu 1300'")
}

// A plugin may not enter namespaces: the container's end then keeps its MTU, and
// so does the host's end, by which the next reconcile knows that it is to be told.
func TestAnMTUThatCannotBeSetSaysWhatHelps(t *testing.T) {
	t.Parallel()
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
	h := hosts[0]
	h.mustEnsure()
	c := h.container(0)
	a := h.mustAttach(c.endpoint(Policy{SNAT: true}))
	if err := os.Symlink(fmt.Sprintf("/proc/%d/root/run/netns", h.PidOne()), filepath.Join(h.cfg.Run, "netns")); err != nil {
		t.Fatal(err)
	}
	err := h.Do(func() error {
		defer without(t, unix.CAP_SYS_ADMIN)()
		_, err := h.syncPorts(Bridge{Name: "azure0", MTU: 1300})
		return err
	})
	if err == nil || !strings.Contains(err.Error(), a.Link+": MTU 1500: this process may not enter the container's namespace: restart the container") {
		t.Errorf("an MTU that cannot be set: %v", err)
	}
	h.run("sh", "-c", "ip link show "+a.Link+" | grep -q 'mtu 1500'")
}

// without takes a capability from the thread until the func that it returns is called.
func without(t *testing.T, capability int) (back func()) {
	t.Helper()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var has [2]unix.CapUserData
	if err := unix.Capget(&header, &has[0]); err != nil {
		t.Fatal(err)
	}
	less := has
	less[capability/32].Effective &^= 1 << (capability % 32)
	if err := unix.Capset(&header, &less[0]); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := unix.Capset(&header, &has[0]); err != nil {
			t.Error(err)
		}
	}
}

// What the host routes through another link than the NIC goes up to the host:
// masqueraded with SNAT, as it is without.
func TestHostRoutesElsewhere(t *testing.T) {
	t.Parallel()
	v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2})
	h := hosts[0]
	h.mustEnsure()
	h.run("sh", "-c", `
		ip netns add vpn
		ip link add docker0 type veth peer vp netns vpn
		ip addr add 172.17.0.1/16 dev docker0; ip link set docker0 up
		ip -n vpn addr add 172.17.0.2/16 dev vp; ip -n vpn link set vp up
		ip -n vpn route add default via 172.17.0.1
		ip addr add 10.96.0.1/32 dev docker0`)
	on, off := h.container(0), h.container(1)
	h.mustAttach(on.endpoint(Policy{SNAT: true}))
	h.mustAttach(off.endpoint(Policy{}))
	for _, c := range []*container{on, off} {
		for _, to := range []string{"172.17.0.2", "10.96.0.1"} {
			if !c.try(ping(netip.MustParseAddr(to))) {
				t.Errorf("%s does not reach %s", c.name, to)
			}
		}
	}
	checkViolations(t, v)
}

// A flow that outlives its container would black-hole the next that has the
// address: a detach deletes those that it began, and no other.
func TestDetachForgetsFlows(t *testing.T) {
	t.Parallel()
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2})
	h := hosts[0]
	h.mustEnsure()
	var owners []string
	for i, p := range []Policy{{SNAT: true}, {}} {
		c := h.container(i)
		e := c.endpoint(p)
		h.mustAttach(e)
		owners = append(owners, e.Owner)
		h.run("conntrack", "-I", "-p", "udp", "-s", c.addr.String(), "-d", "8.8.8.8", "--sport", "5353", "--dport", "53", "--timeout", "100")
	}
	for _, owner := range owners {
		if err := h.detach(owner); err != nil {
			t.Fatal(err)
		}
	}
	flows := h.run("sh", "-c", "conntrack -L -p udp 2>/dev/null")
	for i, want := range []bool{false, true} { // without SNAT the host has none to delete
		if got := strings.Contains(flows, "src="+h.Secondaries()[i].String()+" dst=8.8.8.8"); got != want {
			t.Errorf("a flow of address %d is there: %v, want %v\n%s", i, got, want, flows)
		}
	}
}
