// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"azurevnet/bridge/internal/rtnl"
	"azurevnet/internal/vnetsim"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
)

// One NIC has one bridge: it is found again under any name but another one.
func TestEnsureChoosesTheBridge(t *testing.T) {
	t.Parallel()
	_, hosts := newHosts(t, vnetsim.VMConfig{NICs: []vnetsim.NICConfig{{Subnet: secondSubnet}}})
	h := hosts[0]
	eth1 := h.NICs()[1]
	index := strings.TrimSpace(h.sh("cat /sys/class/net/eth1/ifindex"))
	azure0 := Bridge{Name: "azure0", NIC: "eth0", NICMAC: h.MAC, MAC: bridgeMAC(mustMAC(h.MAC)), MTU: 1500}
	second := Bridge{Name: "azure" + index, NIC: "eth1", NICMAC: eth1.MAC, MAC: bridgeMAC(mustMAC(eth1.MAC)), MTU: 1500}
	for _, mac := range []string{h.MAC, eth1.MAC} {
		if mac == azure0.MAC.String() || mac == second.MAC.String() {
			t.Errorf("a bridge has the MAC of the NIC %s", mac)
		}
	}
	for _, tt := range []struct {
		name string
		spec Spec
		want Bridge
		err  string
	}{
		{"bad name", Spec{MAC: h.MAC, Name: "a/b"}, Bridge{}, "an interface name is 1 to 15 letters, digits, dots, dashes or underscores"},
		{"long name", Spec{MAC: h.MAC, Name: "azure0123456789x"}, Bridge{}, "an interface name is 1 to 15 letters, digits, dots, dashes or underscores"},
		{"dots", Spec{MAC: h.MAC, Name: ".."}, Bridge{}, "an interface name is 1 to 15 letters, digits, dots, dashes or underscores"},
		{"space", Spec{MAC: h.MAC, Name: "az ure"}, Bridge{}, "an interface name is 1 to 15 letters, digits, dots, dashes or underscores"},
		{"quote", Spec{MAC: h.MAC, Name: `az"ure`}, Bridge{}, "an interface name is 1 to 15 letters, digits, dots, dashes or underscores"},
		{"wildcard", Spec{MAC: h.MAC, Name: "azure+"}, Bridge{}, "an interface name is 1 to 15 letters, digits, dots, dashes or underscores"},
		{"an endpoint's name", Spec{MAC: h.MAC, Name: "azvx"}, Bridge{}, "those of containers' links"},
		{"name of another link", Spec{MAC: h.MAC, Name: "eth1"}, Bridge{}, "eth1 exists already as a link of type veth"},
		{"no such NIC", Spec{MAC: "02:00:00:00:00:01"}, Bridge{}, "no network interface of this host has the MAC"},
		{"no MAC", Spec{}, Bridge{}, "invalid MAC"},
		{"primary", h.spec(ModeBridge), azure0, ""},
		{"again", h.spec(ModeBridge), azure0, ""},
		{"again by name", Spec{MAC: h.MAC, Name: "azure0"}, azure0, ""},
		{"another name", Spec{MAC: h.MAC, Name: "azure9"}, Bridge{}, "eth0 has the bridge azure0 already and cannot have azure9 too"},
		{"name of another's", Spec{MAC: eth1.MAC, Name: "azure0"}, Bridge{}, "azure0 is the bridge of the NIC " + h.MAC + " already"},
		{"not primary", h.specOf(1, ModeBridge), second, ""},
		{"transparent beside it", h.specOf(1, ModeTransparent), Bridge{NIC: "eth1", NICMAC: eth1.MAC, MTU: 1500}, ""},
	} {
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
	for _, nic := range []struct{ ask, name, mac string }{
		{"eth0", "eth0", h.MAC}, {"azure0", "eth0", h.MAC}, {h.MAC, "eth0", h.MAC},
		{strings.ToUpper(strings.ReplaceAll(eth1.MAC, ":", "")), "eth1", eth1.MAC}, {second.Name, "eth1", eth1.MAC},
	} {
		if err := h.Do(func() error {
			name, mac, err := h.NIC(t.Context(), nic.ask)
			if err == nil && (name != nic.name || mac != nic.mac) {
				err = fmt.Errorf("is %s, %s and not %s, %s", name, mac, nic.name, nic.mac)
			}
			return err
		}); err != nil {
			t.Errorf("NIC %q: %v", nic.ask, err)
		}
	}
	nothing := []Bridge{azure0, second}
	for _, b := range nothing {
		if err := h.remove(b.Name); err != nil {
			t.Error(err)
		}
	}
	if left := h.sh("ip -o link show type bridge"); left != "" {
		t.Errorf("left: %s", left)
	}
	h.whole("with transparent endpoints alone")
}

// wholeHost prints all that Ensure may not touch when it refuses.
const wholeHost = "ip -d addr; ip route show table all; ip rule; nft -s list ruleset; ip neigh show nud permanent; grep -r . /proc/sys/net/ipv4/conf /proc/sys/net/ipv4/ip_forward; ls -R /run/systemd /run/NetworkManager 2>/dev/null; true"

// A NIC that is a port of a bridge of others stays there, and so does a bridge of others that has the name of ours.
// The refusal says what helps, and never what would cut the host off. Nothing is changed.
func TestEnsureRefusesATakenHost(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		lines []string
		taken bool
		says  []string
	}{
		"NIC in br0":               {[]string{"link add br0 type bridge", "link set eth0 master br0"}, true, []string{"eth0 is in br0, a bridge that is not ours", "Drain this VM and reboot it without whatever makes br0"}},
		"NIC in another's azure0":  {[]string{"link add azure0 type bridge", "link set eth0 master azure0"}, true, []string{"eth0 is in azure0, a bridge that is not ours", "Drain this VM and reboot"}},
		"NIC where a former build": {[]string{"link add azure0 type bridge", "link set azure0 alias azv1_bridge", "link set eth0 master azure0"}, true, []string{"where an earlier build of azure-vnet put it", "containers that run keep their network", "Drain this VM"}},
		"another's azure0":         {[]string{"link add azure0 type bridge"}, false, []string{"azure0 is a bridge that is not ours", "give the network's bridge another name"}},
		"a veth azure0":            {[]string{"link add azure0 type veth peer name x"}, false, []string{"azure0 exists already as a link of type veth", "give the network's bridge another name"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, hosts := newHosts(t, vnetsim.VMConfig{})
			h := hosts[0]
			h.ip(tt.lines...)
			if slices.ContainsFunc(tt.lines, func(l string) bool { return strings.Contains(l, "azv1_bridge") }) {
				h.run("ip", "link", "set", "azure0", "alias", "azv1 bridge "+h.MAC)
			}
			before := h.sh(wholeHost)
			refused := func(what string, err error) {
				t.Helper()
				if err == nil || errors.Is(err, ErrTaken) != tt.taken {
					t.Fatalf("%s: %v", what, err)
				}
				for _, says := range tt.says {
					if !strings.Contains(err.Error(), says) {
						t.Errorf("%s says %q, and not %q", what, err, says)
					}
				}
				for _, cuts := range []string{"nomaster", "ip link del"} {
					if tt.taken && strings.Contains(err.Error(), cuts) {
						t.Errorf("%s advises %q, which cuts the host off", what, cuts)
					}
				}
			}
			for range 2 {
				_, err := h.ensure(h.spec(ModeBridge))
				refused("ensure", err)
			}
			_, err := h.ensure(h.spec(ModeTransparent))
			if tt.taken {
				refused("ensure transparent", err)
				refused("ready", h.Do(func() error { return h.CheckReady(t.Context(), h.MAC) }))
			}
			if tt.taken {
				checkSame(t, "the host", before, h.sh(wholeHost))
				if mended := h.reconcile(); len(mended) > 0 {
					t.Errorf("mended %q", mended)
				}
				if _, err := os.Stat(h.path("host.json")); err == nil {
					t.Error("host.json was written")
				}
			} else if err != nil { // transparent endpoints need no bridge
				t.Error(err)
			}
		})
	}
}

// A macvlan on the NIC disturbs nothing of ours, and stays as it is.
func TestEnsureStandsBesideAMacvlan(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
		h := hosts[0]
		h.ip("link add link eth0 name mv0 type macvlan mode bridge", "link set mv0 up")
		before := h.sh("ip -d -o link show mv0; ip -o addr show eth0")
		h.mustEnsure(h.spec(mode))
		c := h.running(0, mode, Policy{SNAT: true})
		if !c.pings(vnetsim.HostAgentAddr) {
			t.Error("the container is cut off")
		}
		h.whole("beside a macvlan")
		checkSame(t, "the macvlan and the NIC", before, h.sh("ip -d -o link show mv0; ip -o addr show eth0"))
		checkFabric(t, v, c.addr)
	})
}

// Where all stands, Ensure waits for nobody; and it notices what is gone: what an attach needs at once, and all else
// a minute after the last round.
func TestEnsureWaitsForNobodyAndIsNotBlind(t *testing.T) {
	t.Parallel()
	_, hosts := newHosts(t, vnetsim.VMConfig{})
	h := hosts[0]
	h.mustEnsure(h.spec(ModeBridge))
	var unlock func()
	if err := h.Do(func() (err error) { unlock, err = h.lockHost(t.Context(), "a slow attach"); return err }); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if _, err := h.ensure(h.spec(ModeBridge)); err != nil || time.Since(start) > lockWait/2 {
		t.Errorf("a standing bridge: %v after %v", err, time.Since(start))
	}
	unlock()
	for _, harm := range []struct {
		line string
		late bool
	}{
		{"ip link set azure0 mtu 1300", false}, {"ip link set azure0 down", false}, {"ip link del azure0", false}, {"nft flush ruleset", false},
		{"ip rule del pref 100", true}, {"echo 0 >/proc/sys/net/ipv4/ip_forward", true}, {"echo 0 >/proc/sys/net/ipv4/conf/azure0/proxy_arp", true},
	} {
		h.sh(harm.line)
		if harm.late {
			if err := os.Chtimes(h.path("reconciled"), time.Now(), time.Now().Add(-roundEvery)); err != nil {
				t.Fatal(err)
			}
		}
		b := h.mustEnsure(h.spec(ModeBridge))
		if harm.late && len(b.Mended) == 0 {
			t.Errorf("Ensure after %q does not say what it mended", harm.line)
		}
		if mended := h.reconcile(); len(mended) != 0 {
			t.Errorf("Ensure after %q left %q", harm.line, mended)
		}
	}
}

// Of many calls at once that find a NIC without its bridge, one prepares the NIC. The others wait for it, and do no round
// of their own.
func TestOneOfManyCallsPreparesTheNIC(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{})
		h := hosts[0]
		var asked atomic.Int32
		h.testHook = func(step string) error {
			if step == "ask" {
				asked.Add(1)
			}
			return nil
		}
		var unlock func()
		if err := h.Do(func() (err error) { unlock, err = h.lockHost(t.Context(), "a slow attach"); return err }); err != nil {
			t.Fatal(err)
		}
		var wait sync.WaitGroup
		for range 5 {
			wait.Go(func() {
				if _, err := h.ensure(h.spec(mode)); err != nil {
					t.Error(err)
				}
			})
		}
		time.Sleep(300 * time.Millisecond) // until all have found nothing and wait: one that comes later shows nothing
		unlock()
		wait.Wait()
		if got := asked.Load(); got != 1 {
			t.Errorf("%d of 5 calls prepared the NIC", got)
		}
		if mended := h.reconcile(); len(mended) > 0 {
			t.Errorf("not whole after that: %q", mended)
		}
	})
}

// Under accelerated networking a virtual function has the MAC of the NIC above it, and no machine here has one: the
// list of links is made up.
func TestTheNICIsNotItsVirtualFunction(t *testing.T) {
	t.Parallel()
	mac := net.HardwareAddr{0x00, 0x0d, 0x3a, 0x04, 0x75, 0x98}
	attrs := func(index int, name string, master int) netlink.LinkAttrs {
		return netlink.LinkAttrs{Index: index, Name: name, MasterIndex: master, HardwareAddr: mac}
	}
	device := func(index int, name string, master int) netlink.Link {
		return &netlink.Device{LinkAttrs: attrs(index, name, master)}
	}
	br0 := &netlink.Bridge{LinkAttrs: attrs(9, "br0", 0)}
	for _, c := range []struct {
		name  string
		links rtnl.Links
		want  string // "": it cannot be told
	}{
		{"a NIC alone", rtnl.Links{device(2, "eth0", 0)}, "eth0"},
		{"its virtual function comes after it", rtnl.Links{device(2, "eth0", 0), device(3, "enP1s1", 2)}, "eth0"},
		{"and before it", rtnl.Links{device(2, "enP1s1", 3), device(3, "eth0", 0)}, "eth0"},
		{"in a bridge of others", rtnl.Links{br0, device(2, "eth0", 9), device(3, "enP1s1", 2)}, "eth0"},
		{"with a VLAN on it", rtnl.Links{device(2, "eth0", 0), &netlink.Vlan{LinkAttrs: attrs(4, "eth0.7", 0)}}, "eth0"},
		{"with a macvlan on it", rtnl.Links{&netlink.Macvlan{LinkAttrs: attrs(4, "mv0", 0)}, device(2, "eth0", 0)}, "eth0"},
		{"a container's veth was given its MAC", rtnl.Links{device(2, "eth0", 0), &netlink.Veth{LinkAttrs: attrs(5, "veth1", 0)}}, "eth0"},
		{"an end of ours was given its MAC", rtnl.Links{device(2, "eth0", 0), device(5, "azv0123456789a", 0)}, "eth0"},
		{"a virtual function that has lost its NIC", rtnl.Links{device(3, "enP1s1", 2)}, ""},
		{"two NICs", rtnl.Links{device(2, "eth0", 0), device(3, "eth1", 0)}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := ""
			l, err := findNIC(c.links, mac.String(), "")
			if err == nil {
				got = l.Attrs().Name
			}
			if got != c.want {
				t.Errorf("the NIC is %q, want %q: %v", got, c.want, err)
			}
		})
	}
}

// What cloud-init put on the NIC is taken off it when the administrator asks for it, and the host's own address never is.
func TestReclaim(t *testing.T) {
	t.Parallel()
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 3, HoldSecondaries: true})
	h := hosts[0]
	reclaim := func(addrs ...netip.Addr) (removed []netip.Addr, err error) {
		return removed, h.Do(func() (err error) {
			removed, err = h.Reclaim(t.Context(), h.MAC, addrs)
			return err
		})
	}
	check := func(what string, want []netip.Addr, addrs ...netip.Addr) {
		t.Helper()
		removed, err := reclaim(addrs...)
		if err != nil || !slices.Equal(removed, want) {
			t.Errorf("%s: %v, %v, want %v", what, removed, err, want)
		}
	}
	first, rest := h.Secondaries()[0], h.Secondaries()[1:]
	before := h.sh("ip route; ip rule; cat /proc/sys/net/ipv4/conf/eth0/promote_secondaries")
	check("one", []netip.Addr{first}, first)
	h.mustEnsure(h.spec(ModeBridge))
	check("all", rest, h.Secondaries()...)
	check("again", nil, h.Secondaries()...)
	for range 2 { // with a default route that names its source, and with one that does not, as dhclient makes it
		if _, err := reclaim(h.Primary); err == nil || !strings.Contains(err.Error(), "the host's own") {
			t.Errorf("the primary address: %v", err)
		}
		h.sh("ip route replace default via " + h.Gateway.String() + " dev eth0")
	}
	if err := h.removeAll(); err != nil {
		t.Fatal(err)
	}
	h.sh("ip route del default; ip route del default || true; " + strings.ReplaceAll(defaultRoute(before), "\n", ""))
	checkSame(t, "routes and rules", before, h.sh("ip route; ip rule; cat /proc/sys/net/ipv4/conf/eth0/promote_secondaries"))
	if got := h.sh("ip -o -4 addr show dev eth0"); strings.Count(got, "\n") != 1 || !strings.Contains(got, h.Primary.String()) {
		t.Errorf("eth0 has %s", got)
	}
}

// defaultRoute is the command that makes the default route of a listing.
func defaultRoute(routes string) string {
	for l := range strings.Lines(routes) {
		if strings.HasPrefix(l, "default") {
			return "ip route add " + l
		}
	}
	return "true"
}
