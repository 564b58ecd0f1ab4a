// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"azurevnet/internal/vnetsim"
)

// create is docker network create with options of any kind.
func (h host) create(name string, option ...string) {
	h.t.Helper()
	h.docker(append(append([]string{"network", "create", "-d", plugin, "--ipam-driver", plugin}, option...), name)...)
}

// serve starts server on the VM itself.
func (h host) serve() {
	h.t.Helper()
	h.must("sh", "-c", strings.NewReplacer("/www", "/run/www", "exec httpd -f", "busybox httpd").Replace(server))
}

// seen says that a server sees from as want.
func seen(t *testing.T, from place, to, want netip.Addr) {
	t.Helper()
	if got, err := from.try(fetch(fmt.Sprintf("http://%s/cgi-bin/who", to))...); err != nil || got != want.String() {
		t.Errorf("%s fetches from %s and is seen as %q, want %s: %v", from.name, to, got, want, err)
	}
}

// unseen says that from does not reach a server.
func unseen(t *testing.T, from place, to netip.Addr) {
	t.Helper()
	if got, err := from.try("timeout", "1", "busybox", "wget", "-q", "-O", "-", fmt.Sprintf("http://%s/cgi-bin/who", to)); err == nil {
		t.Errorf("%s reaches %s, and is seen as %q", from.name, to, got)
	}
}

// fromOutside fetches from one of the addresses on the internet's side: whom does
// a server see?
func fromOutside(vnet *vnetsim.VNet, from, to netip.Addr, port uint16) (string, error) {
	dialer := net.Dialer{Timeout: 5 * time.Second, LocalAddr: &net.TCPAddr{IP: from.AsSlice()}}
	var got []byte
	err := vnet.Internet.Do(func() error {
		conn, err := dialer.Dial("tcp4", netip.AddrPortFrom(to, port).String())
		if err != nil {
			return err
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		fmt.Fprint(conn, "GET /cgi-bin/who HTTP/1.0\r\n\r\n")
		got, err = io.ReadAll(conn)
		return err
	})
	text := strings.TrimSpace(string(got))
	return text[strings.LastIndex(text, "\n")+1:], err
}

// probed says that a load balancer's probe is answered by the container itself:
// the fabric refuses an answer from a NIC that has not the container's address.
func probed(t *testing.T, vnet *vnetsim.VNet, to netip.Addr) {
	t.Helper()
	if got, err := fromOutside(vnet, vnetsim.HostAgentAddr, to, 80); got != vnetsim.HostAgentAddr.String() {
		t.Errorf("the probe of %s is answered with %q: %v", to, got, err)
	}
}

// docs/docker.md says what becomes of a container on networks of two NICs: the engine makes its routes. Each address is
// reached from its own subnet, and from elsewhere that of the network with the default route.
func TestAContainerOnNetworksOfTwoNICs(t *testing.T) {
	t.Parallel()
	second, third := netip.MustParsePrefix("10.241.0.0/16"), netip.MustParsePrefix("10.242.0.0/16")
	_, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 2, NICs: []vnetsim.NICConfig{{Subnet: second, Secondaries: 2}}},
		vnetsim.VMConfig{}, vnetsim.VMConfig{Subnet: second}, vnetsim.VMConfig{Subnet: third})
	h, near, nearSecond, far := vms[0], onHost(vms[1]), onHost(vms[2]), onHost(vms[3])
	h.withPlugin()
	h.network("azure")
	h.create("second", "--subnet", second.String(), "-o", "master=eth1")
	one := h.container("azure", "both", server)
	h.docker("network", "connect", "second", "both")
	two, err := netip.ParseAddr(h.docker("inspect", "-f", "{{.NetworkSettings.Networks.second.IPAddress}}", "both"))
	if err != nil {
		t.Fatal(err)
	}
	if route := h.docker("exec", "both", "ip", "route", "show", "default"); !strings.Contains(route, "10.240.0.1") {
		t.Errorf("the default route is not that of the first by name: %s", route)
	}
	for _, tt := range []struct {
		from    place
		to      netip.Addr
		reached bool
	}{{near, one, true}, {nearSecond, two, true}, {far, one, true}, {far, two, false}, {near, two, false}, {nearSecond, one, false}} {
		if _, err := tt.from.try("ping", "-c", "1", "-W", "1", tt.to.String()); (err == nil) != tt.reached {
			t.Errorf("%s reaches %s: %v, and docs/docker.md says %v", tt.from.name, tt.to, err, tt.reached)
		}
	}
	h.docker("rm", "-f", "both")
}

func TestEachNetworkUsesItsOwnNIC(t *testing.T) {
	second := netip.MustParsePrefix("10.241.0.0/16")
	vnet, vms := newVNet(t,
		vnetsim.VMConfig{Secondaries: 4, NICs: []vnetsim.NICConfig{{Subnet: second, Secondaries: 4}}},
		vnetsim.VMConfig{}, vnetsim.VMConfig{NICs: []vnetsim.NICConfig{{Subnet: second}}})
	h, plain, other := vms[0], onHost(vms[1]), onHost(vms[2])
	other.addr = other.on.NICs()[1].Primary // it has a primary NIC too, whose address it is not known by here
	h.withPlugin()
	plain.on.serve()
	other.on.serve()
	eth1 := h.NICs()[1]
	before := h.must("sh", "-c", "ip -4 rule; ip -4 route show table all | sort; ip -br -4 addr")

	h.create("second", "--subnet", second.String(), "-o", "master=eth1")
	h.create("alone", "--subnet", second.String(), "-o", "master=eth1", "-o", "mode=transparent")
	s1 := inContainer(h, "s1", h.container("second", "s1", server, "-p", "8081:80"))
	t1 := inContainer(h, "t1", h.container("alone", "t1", server, "-p", "8083:80"))
	outside := func(t *testing.T, from place, internet netip.Addr) {
		t.Helper()
		seen(t, from, plain.addr, from.addr)
		seen(t, plain, from.addr, plain.addr)
		if got, err := from.try(fetch("http://" + vnetsim.InternetAddr.String() + "/")...); err != nil || got != internet.String() {
			t.Errorf("the internet sees %s as %q, want %s: %v", from.name, got, internet, err)
		}
		imds := "http://" + vnetsim.IMDSAddr.String() + "/metadata/instance/network?api-version=2021-02-01"
		if got, err := from.try("timeout", "5", "busybox", "wget", "-q", "-O", "-", "--header", "Metadata: true", imds); err != nil {
			t.Errorf("%s gets from IMDS %q: %v", from.name, got, err)
		}
		probed(t, vnet, from.addr)
		seen(t, onHost(h), from.addr, h.Primary)
	}
	t.Run("the second NIC's, while the primary has none", func(t *testing.T) {
		for _, from := range []place{s1, t1} {
			outside(t, from, eth1.Primary)
			seen(t, from, other.addr, from.addr)
			seen(t, other, from.addr, other.addr)
		}
	})
	clean(t, vnet, s1.addr, t1.addr, eth1.Primary)
	h.network("azure")
	a1 := inContainer(h, "a1", h.container("azure", "a1", server))
	t.Run("both", func(t *testing.T) {
		outside(t, s1, eth1.Primary)
		outside(t, a1, h.Public)
		for _, from := range []place{s1, t1} {
			seen(t, from, other.addr, from.addr)
			seen(t, other, from.addr, other.addr)
			seen(t, a1, from.addr, a1.addr)
			seen(t, from, a1.addr, from.addr)
		}
		seen(t, s1, t1.addr, s1.addr)
		seen(t, t1, s1.addr, t1.addr)
	})
	t.Run("the second NIC's published ports", func(t *testing.T) {
		for port, to := range map[uint16]place{8081: s1, 8083: t1} {
			for _, client := range []netip.Addr{vnetsim.InternetAddr, vnetsim.HostAgentAddr} {
				if got, err := fromOutside(vnet, client, eth1.Primary, port); got != client.String() {
					t.Errorf("%s asks for port %d and is seen as %q: %v", client, port, got, err)
				}
			}
			for _, from := range []place{plain, other, a1, to} {
				want := from.addr
				if from.addr == to.addr {
					want = h.Primary // it reaches itself by the host
				}
				if got, err := from.try(fetch(fmt.Sprintf("http://%s:%d/cgi-bin/who", eth1.Primary, port))...); err != nil || got != want.String() {
					t.Errorf("%s asks for port %d and is seen as %q, want %s: %v", from.name, port, got, want, err)
				}
			}
			// The answer would leave by eth1, with an address that the client did not ask.
			if got, err := fromOutside(vnet, vnetsim.InternetAddr, h.Public, port); err == nil && got != "" {
				t.Errorf("asked for by the other NIC, port %d answers %q", port, got)
			}
		}
	})
	clean(t, vnet, s1.addr, t1.addr, a1.addr)
	t.Run("the routing is mended", func(t *testing.T) {
		h := h.in(t)
		ours := func() string {
			return h.must("sh", "-c", "(ip -d rule | grep 'proto 168'; ip route show table all proto 168) | sort")
		}
		asItWas := ours()
		for _, want := range []string{"lookup 16863 ", "32764:", "default via 10.241.0.1 dev eth1 table 16863", s1.addr.String() + " dev azure", t1.addr.String() + " dev azv"} {
			if !strings.Contains(asItWas, want) {
				t.Errorf("the routing has no %q:\n%s", want, asItWas)
			}
		}
		h.must("sh", "-ec", "ip rule del lookup 16863; for n in 0 1 2 3 4; do while ip rule del priority 3276$n 2>/dev/null; do :; done; done; ip route flush table 16863; ip route flush proto 168 table all")
		diff := ""
		defer func() {
			if diff != "" {
				t.Errorf("the routing (- was, + is):\n%s", diff)
			}
		}()
		eventually(t, "the routing is as it was", 35*time.Second, func() bool {
			diff = cmp.Diff(asItWas, ours())
			return diff == ""
		})
		for _, from := range []place{s1, t1} {
			outside(t, from, eth1.Primary)
		}
	})
	t.Run("a container on both is reached at both", func(t *testing.T) {
		h := h.in(t)
		addr := h.container("azure", "two", server)
		h.docker("network", "connect", "--alias", "deux", "second", "two")
		more, err := netip.ParseAddr(h.docker("inspect", "-f", "{{.NetworkSettings.Networks.second.IPAddress}}", "two"))
		if err != nil {
			t.Fatal(err)
		}
		seen(t, plain, addr, plain.addr)
		seen(t, other, more, other.addr)
		seen(t, inContainer(h, "two", addr), other.addr, more)
		if _, err := s1.try(fetch("http://deux/cgi-bin/who")...); err != nil {
			t.Errorf("by its alias: %v", err)
		}
		h.docker("network", "disconnect", "second", "two")
		if s := h.state(); len(s.Attachments) != 4 {
			t.Errorf("disconnected, and attached are %v", s.Attachments)
		}
		seen(t, plain, addr, plain.addr)
	})
	t.Run("a container with published ports cannot be on both", func(t *testing.T) {
		h := h.in(t)
		addr := h.container("azure", "web", server, "-p", "8082:80")
		h.refused([]string{"network", "connect", "second", "web"}, "8082/tcp", "published to "+addr.String()+" already")
		if _, err := plain.try(fetch(fmt.Sprintf("http://%s:8082/cgi-bin/who", h.Primary))...); err != nil {
			t.Errorf("its port is not reached any more: %v", err)
		}
		h.docker("rm", "-f", "web")
	})
	t.Run("an internal network of one NIC behind a front on the other", func(t *testing.T) {
		h := h.in(t)
		h.create("inner", "--internal", "--subnet", second.String())
		db := inContainer(h, "db", h.container("inner", "db", server))
		front := inContainer(h, "front", h.container("azure", "front", server, "-p", "8080:80"))
		h.docker("network", "connect", "inner", "front")
		if _, err := front.try(fetch("http://db/cgi-bin/who")...); err != nil {
			t.Errorf("by its name: %v", err)
		}
		if got, err := plain.try(fetch(fmt.Sprintf("http://%s:8080/cgi-bin/who", h.Primary))...); err != nil {
			t.Errorf("its published port is answered with %q: %v", got, err)
		}
		unseen(t, other, db.addr)
		unseen(t, db, other.addr)
		h.docker("rm", "-f", "db", "front")
		h.docker("network", "rm", "inner")
	})
	clean(t, vnet, s1.addr, t1.addr, a1.addr)
	t.Run("uninstall leaves no rule and no route", func(t *testing.T) {
		h := h.in(t)
		h.docker("rm", "-f", "a1", "s1", "t1", "two")
		h.docker("network", "rm", "azure", "second", "alone")
		h.docker("plugin", "disable", "-f", plugin)
		h.must(top+"/build/azure-vnet-plugin", "uninstall")
		if after := h.must("sh", "-c", "ip -4 rule; ip -4 route show table all | sort; ip -br -4 addr"); after != before {
			t.Errorf("was\n%s\nis\n%s", before, after)
		}
	})
}

func TestNetworkOptions(t *testing.T) {
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 13}, vnetsim.VMConfig{})
	h, plain := vms[0], onHost(vms[1])
	h.withPlugin("COOL_DOWN=0s")
	plain.on.serve()
	ours, subnet := h.Secondaries(), h.Prefix.String()
	h.network("azure")
	a1 := inContainer(h, "a1", h.container("azure", "a1", server))

	t.Run("an internal network", func(t *testing.T) {
		h := h.in(t)
		h.create("inner", "--internal", "--subnet", subnet)
		h.create("hermit", "--internal", "--subnet", subnet, "-o", "mode=transparent")
		i1 := inContainer(h, "i1", h.container("inner", "i1", server))
		i2 := inContainer(h, "i2", h.container("inner", "i2", server, "--cap-add", "NET_ADMIN"))
		i3 := inContainer(h, "i3", h.container("hermit", "i3", server, "--cap-add", "NET_ADMIN"))
		inside := []place{i1, i2, i3}
		for _, i := range inside {
			// The subnet by the gateway: all meet in the host's IP layer.
			want := "10.240.0.0/16 dev eth0 scope link  src " + i.addr.String() + "\n10.240.0.0/17 via 10.240.0.1 dev eth0\n10.240.0.1 dev eth0 scope link\n10.240.128.0/17 via 10.240.0.1 dev eth0"
			if out, err := i.try("sh", "-c", "ip route | sed 's/ *$//' | sort"); out != want {
				t.Errorf("%s has the routes\n%s\n%v, want\n%s", i.name, out, err, want)
			}
			seen(t, onHost(h), i.addr, h.Primary)
			seen(t, a1, i.addr, a1.addr)
			for _, to := range inside {
				seen(t, i, to.addr, i.addr)
			}
			unseen(t, plain, i.addr)
			unseen(t, i, plain.addr)
		}
		for _, i := range []place{i2, i3} {
			h.docker("exec", i.name, "ip", "route", "add", "default", "via", h.Gateway.String())
			unseen(t, i, plain.addr)
			unseen(t, i, vnetsim.InternetAddr)
			if out, err := i.try("timeout", "1", "nslookup", "internet.test", vnetsim.HostAgentAddr.String()); err == nil {
				t.Errorf("%s asks the host agent: %s", i.name, out)
			}
		}
		// No container is on two networks of one subnet: Docker's rule, and it leaves nothing.
		h.refused([]string{"network", "connect", "inner", "a1"}, "conflicts with existing route")
		h.docker("restart", "-t", "0", "i1", "i3")
		unseen(t, plain, h.address("i1"))
		unseen(t, plain, h.address("i3"))
		h.docker("rm", "-f", "i1", "i2", "i3")
		h.docker("network", "rm", "inner", "hermit")
	})
	t.Run("networks with a SNAT of their own", func(t *testing.T) {
		h := h.in(t)
		h.create("bare", "--subnet", subnet, "-o", "snat=off")
		h.create("near", "--subnet", subnet, "-o", "direct="+netip.PrefixFrom(h.Primary, 32).String())
		h.create("near2", "--subnet", subnet, "-o", "mode=transparent", "-o", "direct="+netip.PrefixFrom(h.Primary, 32).String())
		near := inContainer(h, "near", h.container("near", "near", server))
		near2 := inContainer(h, "near2", h.container("near2", "near2", server))
		bare := inContainer(h, "bare", h.container("bare", "bare", server))
		seen(t, near, plain.addr, h.Primary)
		seen(t, near2, plain.addr, h.Primary)
		seen(t, bare, plain.addr, bare.addr)
		seen(t, a1, plain.addr, a1.addr)
		h.docker("rm", "-f", "near", "near2", "bare")
		h.docker("network", "rm", "near", "near2", "bare")
	})
	t.Run("--ip-range bounds the choice and reserves nothing", func(t *testing.T) {
		h := h.in(t)
		h.create("range", "--subnet", subnet, "--ip-range", netip.PrefixFrom(ours[3], 31).Masked().String())
		within := netip.PrefixFrom(ours[3], 31).Masked()
		for _, name := range []string{"r1", "r2"} {
			if addr := h.container("range", name, "sleep 1000"); !within.Contains(addr) {
				t.Errorf("%s is out of %s", addr, within)
			}
		}
		h.refused([]string{"run", "--rm", "--network", "range", "busybox", "true"}, "range", within.String())
		h.docker("rm", "-f", "r1", "r2")
		if got := h.container("azure", "r3", "sleep 1000", "--ip", within.Addr().String()); got != within.Addr() {
			t.Errorf("another network gets %s", got)
		}
		h.docker("rm", "-f", "r3")
		h.docker("network", "rm", "range")
	})
	t.Run("--aux-address reserves what is ours, and notes what is not", func(t *testing.T) {
		h := h.in(t)
		mine, gateway := ours[len(ours)-1], h.Gateway.String()
		h.create("aux", "--subnet", subnet, "--gateway", gateway, "--aux-address", "mine="+mine.String(),
			"--aux-address", "reserved=10.240.0.2", "--aux-address", "other="+plain.addr.String(), "--aux-address", "vm="+h.Primary.String())
		held := func() bool { return slices.Contains(h.state().Leases, mine.String()) }
		if !held() {
			t.Errorf("%s is not held", mine)
		}
		for _, network := range []string{"aux", "azure"} {
			for _, addr := range []netip.Addr{mine, plain.addr} {
				h.refused([]string{"run", "--rm", "--network", network, "--ip", addr.String(), "busybox", "true"}, addr.String())
			}
		}
		h.killPlugin()
		eventually(t, "it is held after the plugin's restart", 20*time.Second, held)
		h.refused([]string{"network", "create", "-d", plugin, "--ipam-driver", plugin, "--subnet", subnet, "--aux-address", "a=" + mine.String(), "again"}, mine.String())
		h.docker("network", "rm", "aux")
		if held() {
			t.Errorf("%s is held by a network that is gone", mine)
		}
	})
	h.docker("rm", "-f", "a1")
	h.empty()
	clean(t, vnet, a1.addr)
}

func TestTwoNICsInOneSubnet(t *testing.T) {
	subnet := netip.MustParsePrefix("10.240.0.0/16")
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 2, NICs: []vnetsim.NICConfig{{Subnet: subnet, Secondaries: 2}}}, vnetsim.VMConfig{})
	h, plain := vms[0], onHost(vms[1])
	h.withPlugin()
	plain.on.serve()
	create := []string{"network", "create", "-d", plugin, "--ipam-driver", plugin, "--subnet", subnet.String()}
	for _, bad := range [][]string{{"--ipam-opt", "master=eth1"}, {"-o", "master=eth1"}, {"--ipam-opt", "master=eth1", "-o", "master=eth0"}} {
		h.refused(append(append(slices.Clone(create), bad...), "bad"), "--ipam-opt master= and -o master=")
	}
	h.create("first", "--subnet", subnet.String())
	h.create("second", "--subnet", subnet.String(), "--ipam-opt", "master=eth1", "-o", "master=eth1")
	var used []netip.Addr
	for i, network := range []string{"first", "second"} {
		nic := h.NICs()[i]
		c := inContainer(h, network, h.container(network, network, server))
		if !slices.Contains(nic.Secondaries, c.addr) {
			t.Errorf("%s has %s, which is not of %s", network, c.addr, nic.Name)
		}
		used = append(used, c.addr)
		seen(t, c, plain.addr, c.addr)
		seen(t, plain, c.addr, plain.addr)
		probed(t, vnet, c.addr)
		sees := map[int]netip.Addr{0: h.Public, 1: nic.Primary}[i]
		if got, err := c.try(fetch("http://" + vnetsim.InternetAddr.String() + "/")...); err != nil || got != sees.String() {
			t.Errorf("the internet sees %s as %q, want %s: %v", network, got, sees, err)
		}
	}
	clean(t, vnet, used...)
}
