// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"

	"github.com/google/go-cmp/cmp"
)

// One NIC has one bridge: it is found again under any name but another one.
func TestEnsureChoosesTheBridge(t *testing.T) {
	_, hosts := newHosts(t, vnetsim.VMConfig{NICs: []vnetsim.NICConfig{{Subnet: netip.MustParsePrefix("10.241.0.0/24")}}})
	h := hosts[0]
	eth1 := h.NICs()[1]
	mac := func(s string) net.HardwareAddr { m, _ := net.ParseMAC(s); return m }
	azure0 := Bridge{Name: "azure0", NIC: "eth0", MAC: mac(h.MAC), MTU: 1500}
	index := strings.TrimSpace(h.run("cat", "/sys/class/net/eth1/ifindex"))
	second := Bridge{Name: "azure" + index, NIC: "eth1", MAC: mac(eth1.MAC), MTU: 1400}
	tests := []struct {
		name string
		spec Spec
		want Bridge
		err  string
	}{
		{"bad name", Spec{MAC: h.MAC, Name: "a/b"}, Bridge{}, "cannot be the name"},
		{"long name", Spec{MAC: h.MAC, Name: "azure0123456789x"}, Bridge{}, "cannot be the name"},
		{"dots", Spec{MAC: h.MAC, Name: ".."}, Bridge{}, "cannot be the name"},
		{"an endpoint's name", Spec{MAC: h.MAC, Name: "azvx"}, Bridge{}, "cannot be the name"},
		{"name of another link", Spec{MAC: h.MAC, Name: "eth1"}, Bridge{}, "eth1 exists already as a link of type veth"},
		{"no such NIC", Spec{MAC: "02:00:00:00:00:01"}, Bridge{}, "no network interface of this host has the MAC"},
		{"no MAC", Spec{}, Bridge{}, "invalid MAC"},
		{"too large an MTU", Spec{MAC: h.MAC, MTU: 9000}, Bridge{}, "is more than the 1500 of eth0"},
		{"primary", Spec{MAC: h.MAC, Primary: true}, azure0, ""},
		{"again", Spec{MAC: h.MAC, Primary: true}, azure0, ""},
		{"again by name", Spec{MAC: h.MAC, Name: "azure0"}, azure0, ""},
		{"another name", Spec{MAC: h.MAC, Name: "azure9"}, Bridge{}, "eth0 is in the bridge azure0 already and cannot be in azure9 too"},
		{"name of another's", Spec{MAC: eth1.MAC, Name: "azure0"}, Bridge{}, "azure0 is the bridge of eth0 already"},
		{"not primary", Spec{MAC: eth1.MAC, MTU: 1400}, second, ""},
		{"its MTU stays", Spec{MAC: eth1.MAC}, second, ""},
		{"another MTU, with nothing attached", Spec{MAC: eth1.MAC, MTU: 1300}, Bridge{Name: second.Name, NIC: "eth1", MAC: second.MAC, MTU: 1300}, ""},
		{"and back", Spec{MAC: eth1.MAC, MTU: 1400}, second, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := h.ensure(tt.spec)
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Fatalf("error %v, want %q", err, tt.err)
			}
			if diff := cmp.Diff(tt.want, got); err == nil && diff != "" {
				t.Errorf("bridge (-want +got):\n%s", diff)
			}
		})
	}
	if mended := h.reconcile(); len(mended) != 0 {
		t.Errorf("two bridges just made lacked %q", mended)
	}
	var got []Bridge
	if err := h.Do(func() (err error) { got, err = h.Bridges(t.Context()); return err }); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]Bridge{azure0, second}, got); diff != "" {
		t.Errorf("bridges (-want +got):\n%s", diff)
	}
	for _, nic := range []struct{ ask, name, mac string }{
		{"eth0", "eth0", h.MAC}, {"azure0", "eth0", h.MAC}, {h.MAC, "eth0", h.MAC},
		{strings.ToUpper(strings.ReplaceAll(eth1.MAC, ":", "")), "eth1", eth1.MAC}, {second.Name, "eth1", eth1.MAC},
	} {
		err := h.Do(func() error {
			name, mac, err := h.NIC(t.Context(), nic.ask)
			if err == nil && (name != nic.name || mac != nic.mac) {
				err = fmt.Errorf("is %s, %s and not %s, %s", name, mac, nic.name, nic.mac)
			}
			return err
		})
		if err != nil {
			t.Errorf("NIC %q: %v", nic.ask, err)
		}
	}
	dropIn, err := os.ReadFile(filepath.Join(h.cfg.Run, networkd))
	if want := "Name=azure0 azure" + index + " eth0 eth1 azv*\n\n[Link]\nUnmanaged=yes\n"; err != nil || !strings.Contains(string(dropIn), want) {
		t.Errorf("networkd's drop-in lacks %q: %s%v", want, dropIn, err)
	}
	for _, b := range []Bridge{second, azure0} {
		if err := h.remove(b.Name); err != nil {
			t.Error(err)
		}
	}
}

// A wish for an MTU outlives its network no longer than what is attached.
func TestAnotherMTU(t *testing.T) {
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
	h := hosts[0]
	h.mustEnsure()
	wish := func(mtu int) error {
		spec := h.spec()
		spec.MTU = mtu
		b, err := h.ensure(spec)
		if err == nil && b.MTU != mtu {
			err = fmt.Errorf("the bridge has %d", b.MTU)
		}
		return err
	}
	for _, mtu := range []int{1400, 1450} { // the first on a bridge that stood without
		if err := wish(mtu); err != nil {
			t.Fatalf("MTU %d: %v", mtu, err)
		}
		if mended := h.reconcile(); len(mended) != 0 {
			t.Errorf("MTU %d was forgotten: %q", mtu, mended)
		}
	}
	e := h.container(0).endpoint(Policy{})
	h.mustAttach(e)
	err := wish(1300)
	if err == nil || !strings.Contains(err.Error(), "azure0 has an MTU of 1450 bytes, and another of 1300 is asked for: detach first what is attached to it: "+e.Owner) {
		t.Errorf("another MTU with a container attached: %v", err)
	}
	if err := h.detach(e.Owner); err != nil {
		t.Fatal(err)
	}
	if err := wish(1300); err != nil {
		t.Error(err)
	}
}

// A NIC that belongs to somebody else's bridge is left there.
func TestEnsureLeavesForeignBridges(t *testing.T) {
	_, hosts := newHosts(t, vnetsim.VMConfig{})
	h := hosts[0]
	h.ip("link add br0 type bridge", "link set eth0 master br0")
	_, err := h.ensure(h.spec())
	if err == nil || !strings.Contains(err.Error(), "eth0 is a port of br0, a bridge that is not ours: take it out first (ip link set eth0 nomaster)") {
		t.Errorf("NIC in a foreign bridge: %v", err)
	}
	h.ip("link set eth0 nomaster")
	if _, err := h.ensure(Spec{MAC: h.MAC, Name: "br0"}); err == nil || !strings.Contains(err.Error(), "br0 exists already as a link of type bridge that is not ours") {
		t.Errorf("a foreign bridge's name: %v", err)
	}
}

// A NIC whose DHCP client has not finished is left alone until it has.
func TestEnsureWaitsForTheHostsAddress(t *testing.T) {
	_, hosts := newHosts(t, vnetsim.VMConfig{})
	h := hosts[0]
	h.ip("addr flush dev eth0")
	if _, err := h.ensure(h.spec()); err == nil || !strings.Contains(err.Error(), "eth0 has no IPv4 address yet") {
		t.Errorf("a NIC without an address: %v", err)
	}
	if got := h.run("ip", "-o", "link", "show", "type", "bridge"); got != "" {
		t.Errorf("bridges: %s", got)
	}
	h.ip("addr add " + h.Primary.String() + "/16 dev eth0")
	if _, err := h.ensure(h.spec()); err != nil {
		t.Error(err)
	}
}

// Where the bridge stands, Ensure waits for nobody; and it notices what is gone.
func TestEnsureWaitsForNobodyAndIsNotBlind(t *testing.T) {
	_, hosts := newHosts(t, vnetsim.VMConfig{})
	h := hosts[0]
	if _, err := h.ensure(h.spec()); err != nil {
		t.Fatal(err)
	}
	unlock, err := h.lockExclusive(t.Context(), "a long move of another NIC")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.ensure(h.spec()); err != nil {
		t.Errorf("a standing bridge: %v", err)
	}
	unlock()
	harms := []string{
		"ip link set eth0 nomaster", "ip addr flush dev azure0", "ip route del default", "ip link set azure0 mtu 1300",
		"ip link set azure0 down", "ip link del azure0", "nft flush ruleset",
	}
	// Where nobody reconciles, a minute later.
	late := []string{
		"iptables-nft -F FORWARD", "iptables-nft -t nat -F POSTROUTING", "bridge fdb del 12:34:56:78:9a:bc dev eth0 master",
		"echo 0 >/proc/sys/net/ipv4/ip_forward",
	}
	for i, harm := range append(harms, late...) {
		h.run("sh", "-c", harm)
		if i >= len(harms) {
			if err := os.Chtimes(h.path("reconciled"), time.Now(), time.Now().Add(-lookEvery)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := h.ensure(h.spec()); err != nil {
			t.Fatal(err)
		}
		if mended := h.reconcile(); len(mended) != 0 {
			t.Errorf("Ensure after %q left %q", harm, mended)
		}
	}
}
