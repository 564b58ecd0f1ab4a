// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// createNetwork is docker network create with options of any kind.
func createNetwork(h test.Host, name string, option ...string) {
	h.T.Helper()
	h.Docker(append(append([]string{"network", "create", "-d", test.Plugin, "--ipam-driver", test.Plugin}, option...), name)...)
}

// unseen says that from does not reach a server.
func unseen(t *testing.T, from test.Place, to netip.Addr) {
	t.Helper()
	if got, err := from.Try("timeout", "1", "busybox", "wget", "-q", "-O", "-", fmt.Sprintf("http://%s/cgi-bin/who", to)); err == nil {
		t.Errorf("%s reaches %s, and is seen as %q", from.Name, to, got)
	}
}

// docs/docker.md says what becomes of a container on networks of two NICs: the engine makes its routes. Each address is
// reached from its own subnet, and from elsewhere that of the network with the default route.
func TestAContainerOnNetworksOfTwoNICs(t *testing.T) {
	t.Parallel()
	second, third := netip.MustParsePrefix("10.241.0.0/16"), netip.MustParsePrefix("10.242.0.0/16")
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2, NICs: []vnetsim.NICConfig{{Subnet: second, Secondaries: 2}}},
		vnetsim.VMConfig{}, vnetsim.VMConfig{Subnet: second}, vnetsim.VMConfig{Subnet: third})
	h, near, nearSecond, far := vms[0], test.OnHost(vms[1]), test.OnHost(vms[2]), test.OnHost(vms[3])
	h.WithPlugin()
	h.Network("azure")
	createNetwork(h, "second", "--subnet", second.String(), "-o", "master=eth1")
	one := h.Container("azure", "both", test.Server)
	h.Docker("network", "connect", "second", "both")
	two, err := netip.ParseAddr(h.Docker("inspect", "-f", "{{.NetworkSettings.Networks.second.IPAddress}}", "both"))
	if err != nil {
		t.Fatal(err)
	}
	if route := h.Docker("exec", "both", "ip", "route", "show", "default"); !strings.Contains(route, "10.240.0.1") {
		t.Errorf("the default route is not that of the first by name: %s", route)
	}
	for _, tt := range []struct {
		from    test.Place
		to      netip.Addr
		reached bool
	}{{near, one, true}, {nearSecond, two, true}, {far, one, true}, {far, two, false}, {near, two, false}, {nearSecond, one, false}} {
		if _, err := tt.from.Try("ping", "-c", "1", "-W", "1", tt.to.String()); (err == nil) != tt.reached {
			t.Errorf("%s reaches %s: %v, and docs/docker.md says %v", tt.from.Name, tt.to, err, tt.reached)
		}
	}
	h.Docker("rm", "-f", "both")
}

func TestEachNetworkUsesItsOwnNIC(t *testing.T) {
	t.Parallel()
	second := netip.MustParsePrefix("10.241.0.0/16")
	vnet, vms := test.NewVNet(t,
		vnetsim.VMConfig{Secondaries: 4, NICs: []vnetsim.NICConfig{{Subnet: second, Secondaries: 4}}},
		vnetsim.VMConfig{}, vnetsim.VMConfig{NICs: []vnetsim.NICConfig{{Subnet: second}}})
	h, plain, other := vms[0], test.OnHost(vms[1]), test.OnHost(vms[2])
	other.Addr = other.Host.NICs()[1].Primary // it has a primary NIC too, whose address it is not known by here
	h.WithPlugin()
	plain.Host.Serve()
	other.Host.Serve()
	eth1 := h.NICs()[1]
	before := h.Must("sh", "-c", "ip -4 rule; ip -4 route show table all | sort; ip -br -4 addr")

	createNetwork(h, "second", "--subnet", second.String(), "-o", "master=eth1")
	createNetwork(h, "alone", "--subnet", second.String(), "-o", "master=eth1", "-o", "mode=transparent")
	s1 := test.InContainer(h, "s1", h.Container("second", "s1", test.Server, "-p", "8081:80"))
	t1 := test.InContainer(h, "t1", h.Container("alone", "t1", test.Server, "-p", "8083:80"))
	outside := func(t *testing.T, from test.Place, internet netip.Addr) {
		t.Helper()
		test.Seen(t, from, plain.Addr, from.Addr)
		test.Seen(t, plain, from.Addr, plain.Addr)
		if got, err := from.Try(test.Fetch("http://" + vnetsim.InternetAddr.String() + "/")...); err != nil || got != internet.String() {
			t.Errorf("the internet sees %s as %q, want %s: %v", from.Name, got, internet, err)
		}
		imds := "http://" + vnetsim.IMDSAddr.String() + "/metadata/instance/network?api-version=2021-02-01"
		if got, err := from.Try("timeout", "5", "busybox", "wget", "-q", "-O", "-", "--header", "Metadata: true", imds); err != nil {
			t.Errorf("%s gets from IMDS %q: %v", from.Name, got, err)
		}
		test.Probed(t, vnet, from.Addr)
		test.Seen(t, test.OnHost(h), from.Addr, h.Primary)
	}
	t.Run("the second NIC's, while the primary has none", func(t *testing.T) {
		for _, from := range []test.Place{s1, t1} {
			outside(t, from, eth1.Primary)
			test.Seen(t, from, other.Addr, from.Addr)
			test.Seen(t, other, from.Addr, other.Addr)
		}
	})
	test.NothingDropped(t, vnet, s1.Addr, t1.Addr, eth1.Primary)
	h.Network("azure")
	a1 := test.InContainer(h, "a1", h.Container("azure", "a1", test.Server))
	t.Run("both", func(t *testing.T) {
		outside(t, s1, eth1.Primary)
		outside(t, a1, h.Public)
		for _, from := range []test.Place{s1, t1} {
			test.Seen(t, from, other.Addr, from.Addr)
			test.Seen(t, other, from.Addr, other.Addr)
			test.Seen(t, a1, from.Addr, a1.Addr)
			test.Seen(t, from, a1.Addr, from.Addr)
		}
		test.Seen(t, s1, t1.Addr, s1.Addr)
		test.Seen(t, t1, s1.Addr, t1.Addr)
	})
	t.Run("the second NIC's published ports", func(t *testing.T) {
		for port, to := range map[uint16]test.Place{8081: s1, 8083: t1} {
			for _, client := range []netip.Addr{vnetsim.InternetAddr, vnetsim.HostAgentAddr} {
				if got, err := test.FromOutside(vnet, client, eth1.Primary, port); got != client.String() {
					t.Errorf("%s asks for port %d and is seen as %q: %v", client, port, got, err)
				}
			}
			for _, from := range []test.Place{plain, other, a1, to} {
				want := from.Addr
				if from.Addr == to.Addr {
					want = h.Primary // it reaches itself by the host
				}
				if got, err := from.Try(test.Fetch(fmt.Sprintf("http://%s:%d/cgi-bin/who", eth1.Primary, port))...); err != nil || got != want.String() {
					t.Errorf("%s asks for port %d and is seen as %q, want %s: %v", from.Name, port, got, want, err)
				}
			}
			// The answer would leave by eth1, with an address that the client did not ask.
			if got, err := test.FromOutside(vnet, vnetsim.InternetAddr, h.Public, port); err == nil && got != "" {
				t.Errorf("asked for by the other NIC, port %d answers %q", port, got)
			}
		}
	})
	test.NothingDropped(t, vnet, s1.Addr, t1.Addr, a1.Addr)
	t.Run("the routing is mended", func(t *testing.T) {
		h := h.In(t)
		ours := func() string {
			return h.Must("sh", "-c", "(ip -d rule | grep 'proto 168'; ip route show table all proto 168) | sort")
		}
		asItWas := ours()
		for _, want := range []string{"lookup 16863 ", "32764:", "default via 10.241.0.1 dev eth1 table 16863", s1.Addr.String() + " dev azure", t1.Addr.String() + " dev azv"} {
			if !strings.Contains(asItWas, want) {
				t.Errorf("the routing has no %q:\n%s", want, asItWas)
			}
		}
		h.Must("sh", "-ec", "ip rule del lookup 16863; for n in 0 1 2 3 4; do while ip rule del priority 3276$n 2>/dev/null; do :; done; done; ip route flush table 16863; ip route flush proto 168 table all")
		diff := ""
		defer func() {
			if diff != "" {
				t.Errorf("the routing (- was, + is):\n%s", diff)
			}
		}()
		test.Eventually(t, "the routing is as it was", 35*time.Second, func() bool {
			diff = cmp.Diff(asItWas, ours())
			return diff == ""
		})
		for _, from := range []test.Place{s1, t1} {
			outside(t, from, eth1.Primary)
		}
	})
	t.Run("a container on both is reached at both", func(t *testing.T) {
		h := h.In(t)
		addr := h.Container("azure", "two", test.Server)
		h.Docker("network", "connect", "--alias", "deux", "second", "two")
		more, err := netip.ParseAddr(h.Docker("inspect", "-f", "{{.NetworkSettings.Networks.second.IPAddress}}", "two"))
		if err != nil {
			t.Fatal(err)
		}
		test.Seen(t, plain, addr, plain.Addr)
		test.Seen(t, other, more, other.Addr)
		test.Seen(t, test.InContainer(h, "two", addr), other.Addr, more)
		if _, err := s1.Try(test.Fetch("http://deux/cgi-bin/who")...); err != nil {
			t.Errorf("by its alias: %v", err)
		}
		h.Docker("network", "disconnect", "second", "two")
		if s := h.State(); len(s.Attachments) != 4 {
			t.Errorf("disconnected, and attached are %v", s.Attachments)
		}
		test.Seen(t, plain, addr, plain.Addr)
	})
	t.Run("a container with published ports cannot be on both", func(t *testing.T) {
		h := h.In(t)
		addr := h.Container("azure", "web", test.Server, "-p", "8082:80")
		h.Refused([]string{"network", "connect", "second", "web"}, "8082/tcp", "published to "+addr.String()+" already")
		if _, err := plain.Try(test.Fetch(fmt.Sprintf("http://%s:8082/cgi-bin/who", h.Primary))...); err != nil {
			t.Errorf("its port is not reached any more: %v", err)
		}
		h.Docker("rm", "-f", "web")
	})
	t.Run("an internal network of one NIC behind a front on the other", func(t *testing.T) {
		h := h.In(t)
		createNetwork(h, "inner", "--internal", "--subnet", second.String())
		db := test.InContainer(h, "db", h.Container("inner", "db", test.Server))
		front := test.InContainer(h, "front", h.Container("azure", "front", test.Server, "-p", "8080:80"))
		h.Docker("network", "connect", "inner", "front")
		if _, err := front.Try(test.Fetch("http://db/cgi-bin/who")...); err != nil {
			t.Errorf("by its name: %v", err)
		}
		if got, err := plain.Try(test.Fetch(fmt.Sprintf("http://%s:8080/cgi-bin/who", h.Primary))...); err != nil {
			t.Errorf("its published port is answered with %q: %v", got, err)
		}
		unseen(t, other, db.Addr)
		unseen(t, db, other.Addr)
		h.Docker("rm", "-f", "db", "front")
		h.Docker("network", "rm", "inner")
	})
	test.NothingDropped(t, vnet, s1.Addr, t1.Addr, a1.Addr)
	t.Run("uninstall leaves no rule and no route", func(t *testing.T) {
		h := h.In(t)
		h.Docker("rm", "-f", "a1", "s1", "t1", "two")
		h.Docker("network", "rm", "azure", "second", "alone")
		h.Docker("plugin", "disable", "-f", test.Plugin)
		h.Must(test.PluginBinary, "uninstall")
		if after := h.Must("sh", "-c", "ip -4 rule; ip -4 route show table all | sort; ip -br -4 addr"); after != before {
			t.Errorf("was\n%s\nis\n%s", before, after)
		}
	})
}

func TestNetworkOptions(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 13}, vnetsim.VMConfig{})
	h, plain := vms[0], test.OnHost(vms[1])
	h.WithPlugin("COOL_DOWN=0s")
	plain.Host.Serve()
	ours, subnet := h.Secondaries(), h.Prefix.String()
	h.Network("azure")
	a1 := test.InContainer(h, "a1", h.Container("azure", "a1", test.Server))

	t.Run("an internal network", func(t *testing.T) {
		h := h.In(t)
		createNetwork(h, "inner", "--internal", "--subnet", subnet)
		createNetwork(h, "hermit", "--internal", "--subnet", subnet, "-o", "mode=transparent")
		i1 := test.InContainer(h, "i1", h.Container("inner", "i1", test.Server))
		i2 := test.InContainer(h, "i2", h.Container("inner", "i2", test.Server, "--cap-add", "NET_ADMIN"))
		i3 := test.InContainer(h, "i3", h.Container("hermit", "i3", test.Server, "--cap-add", "NET_ADMIN"))
		inside := []test.Place{i1, i2, i3}
		for _, i := range inside {
			// The subnet by the gateway: all meet in the host's IP layer.
			want := "10.240.0.0/16 dev eth0 scope link  src " + i.Addr.String() + "\n10.240.0.0/17 via 10.240.0.1 dev eth0\n10.240.0.1 dev eth0 scope link\n10.240.128.0/17 via 10.240.0.1 dev eth0"
			if out, err := i.Try("sh", "-c", "ip route | sed 's/ *$//' | sort"); out != want {
				t.Errorf("%s has the routes\n%s\n%v, want\n%s", i.Name, out, err, want)
			}
			test.Seen(t, test.OnHost(h), i.Addr, h.Primary)
			test.Seen(t, a1, i.Addr, a1.Addr)
			for _, to := range inside {
				test.Seen(t, i, to.Addr, i.Addr)
			}
			unseen(t, plain, i.Addr)
			unseen(t, i, plain.Addr)
		}
		for _, i := range []test.Place{i2, i3} {
			h.Docker("exec", i.Name, "ip", "route", "add", "default", "via", h.Gateway.String())
			unseen(t, i, plain.Addr)
			unseen(t, i, vnetsim.InternetAddr)
			if out, err := i.Try("timeout", "1", "nslookup", "internet.test", vnetsim.HostAgentAddr.String()); err == nil {
				t.Errorf("%s asks the host agent: %s", i.Name, out)
			}
		}
		// No container is on two networks of one subnet: Docker's rule, and it leaves nothing.
		h.Refused([]string{"network", "connect", "inner", "a1"}, "conflicts with existing route")
		h.Docker("restart", "-t", "0", "i1", "i3")
		unseen(t, plain, h.Address("i1"))
		unseen(t, plain, h.Address("i3"))
		h.Docker("rm", "-f", "i1", "i2", "i3")
		h.Docker("network", "rm", "inner", "hermit")
	})
	t.Run("networks with a SNAT of their own", func(t *testing.T) {
		h := h.In(t)
		createNetwork(h, "bare", "--subnet", subnet, "-o", "snat=off")
		createNetwork(h, "near", "--subnet", subnet, "-o", "direct="+netip.PrefixFrom(h.Primary, 32).String())
		createNetwork(h, "near2", "--subnet", subnet, "-o", "mode=transparent", "-o", "direct="+netip.PrefixFrom(h.Primary, 32).String())
		near := test.InContainer(h, "near", h.Container("near", "near", test.Server))
		near2 := test.InContainer(h, "near2", h.Container("near2", "near2", test.Server))
		bare := test.InContainer(h, "bare", h.Container("bare", "bare", test.Server))
		test.Seen(t, near, plain.Addr, h.Primary)
		test.Seen(t, near2, plain.Addr, h.Primary)
		test.Seen(t, bare, plain.Addr, bare.Addr)
		test.Seen(t, a1, plain.Addr, a1.Addr)
		h.Docker("rm", "-f", "near", "near2", "bare")
		h.Docker("network", "rm", "near", "near2", "bare")
	})
	t.Run("an MTU by the name that Docker's bridge has for it", func(t *testing.T) {
		h := h.In(t)
		createNetwork(h, "narrow", "--subnet", subnet, "-o", "com.docker.network.driver.mtu=1400")
		if out := h.Docker("run", "--rm", "--network", "narrow", "busybox", "cat", "/sys/class/net/eth0/mtu"); out != "1400" {
			t.Errorf("the container's MTU is %s", out)
		}
		h.Docker("network", "rm", "narrow")
	})
	t.Run("--ip-range bounds the choice and reserves nothing", func(t *testing.T) {
		h := h.In(t)
		createNetwork(h, "range", "--subnet", subnet, "--ip-range", netip.PrefixFrom(ours[3], 31).Masked().String())
		within := netip.PrefixFrom(ours[3], 31).Masked()
		for _, name := range []string{"r1", "r2"} {
			if addr := h.Container("range", name, "sleep 1000"); !within.Contains(addr) {
				t.Errorf("%s is out of %s", addr, within)
			}
		}
		h.Refused([]string{"run", "--rm", "--network", "range", "busybox", "true"}, "range", within.String())
		h.Docker("rm", "-f", "r1", "r2")
		if got := h.Container("azure", "r3", "sleep 1000", "--ip", within.Addr().String()); got != within.Addr() {
			t.Errorf("another network gets %s", got)
		}
		h.Docker("rm", "-f", "r3")
		h.Docker("network", "rm", "range")
	})
	t.Run("--aux-address reserves what is ours, and notes what is not", func(t *testing.T) {
		h := h.In(t)
		mine, gateway := ours[len(ours)-1], h.Gateway.String()
		createNetwork(h, "aux", "--subnet", subnet, "--gateway", gateway, "--aux-address", "mine="+mine.String(),
			"--aux-address", "reserved=10.240.0.2", "--aux-address", "other="+plain.Addr.String(), "--aux-address", "vm="+h.Primary.String())
		held := func() bool { return slices.Contains(h.State().Leases, mine.String()) }
		if !held() {
			t.Errorf("%s is not held", mine)
		}
		for _, network := range []string{"aux", "azure"} {
			for _, addr := range []netip.Addr{mine, plain.Addr} {
				h.Refused([]string{"run", "--rm", "--network", network, "--ip", addr.String(), "busybox", "true"}, addr.String())
			}
		}
		killPlugin(h)
		test.Eventually(t, "it is held after the plugin's restart", 20*time.Second, held)
		h.Refused([]string{"network", "create", "-d", test.Plugin, "--ipam-driver", test.Plugin, "--subnet", subnet, "--aux-address", "a=" + mine.String(), "again"}, mine.String())
		h.Docker("network", "rm", "aux")
		if held() {
			t.Errorf("%s is held by a network that is gone", mine)
		}
	})
	h.Docker("rm", "-f", "a1")
	h.Empty()
	test.NothingDropped(t, vnet, a1.Addr)
}

func TestTwoNICsInOneSubnet(t *testing.T) {
	t.Parallel()
	subnet := netip.MustParsePrefix("10.240.0.0/16")
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2, NICs: []vnetsim.NICConfig{{Subnet: subnet, Secondaries: 2}}}, vnetsim.VMConfig{})
	h, plain := vms[0], test.OnHost(vms[1])
	h.WithPlugin()
	plain.Host.Serve()
	create := []string{"network", "create", "-d", test.Plugin, "--ipam-driver", test.Plugin, "--subnet", subnet.String()}
	for _, bad := range [][]string{{"--ipam-opt", "master=eth1"}, {"-o", "master=eth1"}, {"--ipam-opt", "master=eth1", "-o", "master=eth0"}} {
		h.Refused(append(append(slices.Clone(create), bad...), "bad"), "--ipam-opt master= and -o master=")
	}
	createNetwork(h, "first", "--subnet", subnet.String())
	createNetwork(h, "second", "--subnet", subnet.String(), "--ipam-opt", "master=eth1", "-o", "master=eth1")
	var used []netip.Addr
	for i, network := range []string{"first", "second"} {
		nic := h.NICs()[i]
		c := test.InContainer(h, network, h.Container(network, network, test.Server))
		if !slices.Contains(nic.Secondaries, c.Addr) {
			t.Errorf("%s has %s, which is not of %s", network, c.Addr, nic.Name)
		}
		used = append(used, c.Addr)
		test.Seen(t, c, plain.Addr, c.Addr)
		test.Seen(t, plain, c.Addr, plain.Addr)
		test.Probed(t, vnet, c.Addr)
		sees := map[int]netip.Addr{0: h.Public, 1: nic.Primary}[i]
		if got, err := c.Try(test.Fetch("http://" + vnetsim.InternetAddr.String() + "/")...); err != nil || got != sees.String() {
			t.Errorf("the internet sees %s as %q, want %s: %v", network, got, sees, err)
		}
	}
	test.NothingDropped(t, vnet, used...)
}
