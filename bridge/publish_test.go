// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"

	"github.com/google/go-cmp/cmp"
)

var loopback = netip.MustParseAddr("127.0.0.1")

// publishing is the wish e with ports.
func publishing(e Endpoint, ports ...PublishedPort) Endpoint {
	e.Ports = ports
	return e
}

// tcpAndUDP publishes both servers of a container.
func tcpAndUDP(at netip.Addr, tcp, udp uint16) []PublishedPort {
	return []PublishedPort{{Proto: "tcp", HostAddr: at, HostPort: tcp, Port: tcpPort}, {Proto: "udp", HostAddr: at, HostPort: udp, Port: udpPort}}
}

// Published ports are reached from everywhere, by every address of the host, with any FORWARD policy
// and bridge-nf-call-iptables, with SNAT and without. Clients keep their addresses, but for those that
// the answer would not find: the host's 127.0.0.1, and the container itself.
func TestPublishedPortsAreReached(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 3}, vnetsim.VMConfig{Secondaries: 1})
		h, peer := hosts[0], hosts[1]
		h.mustEnsure(h.spec(mode))
		peer.mustEnsure(peer.spec(mode))
		on := h.running(0, mode, Policy{SNAT: true}, tcpAndUDP(netip.Addr{}, 8080, 5353)...).answer()
		off := h.running(1, mode, Policy{}, tcpAndUDP(netip.Addr{}, 8081, 5354)...).answer()
		other, far := h.running(2, mode, Policy{SNAT: true}), peer.running(0, mode, Policy{SNAT: true})
		site, siteAddr := h.room("site"), netip.MustParseAddr("192.168.99.2")
		h.tunnel(h.place(), site.place(), netip.MustParseAddr("192.168.99.1"), siteAddr)
		site.sh("ip route add default dev tun0")
		for _, call := range callIptables(mode) {
			for _, policy := range []string{"ACCEPT", "DROP"} {
				t.Run(fmt.Sprintf("forward %s call-iptables %s", policy, call), func(t *testing.T) {
					h.run("iptables-nft", "-P", "FORWARD", policy)
					h.sh("echo " + call + " >/proc/sys/net/bridge/bridge-nf-call-iptables")
					h.reconcile()
					c := &checks{t: t}
					defer c.wait.Wait()
					for tcp, udp := range map[uint16]uint16{8080: 5353, 8081: 5354} {
						c.sees(netip.MustParseAddr("192.0.2.1"), internet(v), h.Public, tcp, udp)
						c.sees(peer.Primary, peer.place(), h.Primary, tcp, udp)
						c.sees(far.addr, far.place(), h.Primary, tcp, udp)
						c.sees(siteAddr, site.place(), h.Primary, tcp, udp)
						c.sees(h.Primary, h.place(), h.Primary, tcp, udp)
						c.sees(h.Primary, h.place(), loopback, tcp, udp)
						for _, from := range []*container{on, off, other} {
							itself := from == on && tcp == 8080 || from == off && tcp == 8081
							c.sees(map[bool]netip.Addr{true: h.Primary, false: from.addr}[itself], from.place(), h.Primary, tcp, udp)
						}
					}
				})
			}
		}
		h.whole("at the end")
		checkFabric(t, v, h.Primary, far.addr)
	})
}

// A port that is published at one address of the host is reached at that one alone.
func TestPortsOfOneHostAddress(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
		h, peer := hosts[0], hosts[1]
		h.mustEnsure(h.spec(mode))
		site, vpn, siteAddr := h.room("site"), netip.MustParseAddr("192.168.99.1"), netip.MustParseAddr("192.168.99.2")
		h.tunnel(h.place(), site.place(), vpn, siteAddr)
		site.sh("ip route add default dev tun0")
		h.running(0, mode, Policy{SNAT: true}, tcpAndUDP(h.Primary, 8080, 5353)...).answer()
		h.running(1, mode, Policy{SNAT: true}, tcpAndUDP(loopback, 8080, 5353)...).answer()
		h.running(2, mode, Policy{SNAT: true}, tcpAndUDP(vpn, 8081, 5354)...).answer()
		other := h.running(3, mode, Policy{SNAT: true})
		c := &checks{t: t}
		c.sees(peer.Primary, peer.place(), h.Primary, 8080, 5353)
		c.sees(siteAddr, site.place(), h.Primary, 8080, 5353)
		c.sees(other.addr, other.place(), h.Primary, 8080, 5353)
		c.sees(h.Primary, h.place(), loopback, 8080, 5353)
		c.refuses(site.place(), vpn, 8080, 5353)
		c.sees(siteAddr, site.place(), vpn, 8081, 5354)
		c.sees(other.addr, other.place(), vpn, 8081, 5354)
		c.refuses(h.place(), loopback, 8081, 5354)
		c.refuses(h.place(), h.Primary, 8081, 5354)
		c.refuses(peer.place(), h.Primary, 8081, 5354)
		c.wait.Wait()
		h.whole("at the end")
		checkFabric(t, v, h.Primary, peer.Primary)
	})
}

// A port of a container whose address is of the second NIC is reached by that NIC's address, by the host
// and by its containers. Asked for by the first NIC's address it is refused: the answer would leave by the
// second NIC, and Azure drops that.
func TestPortsBelongToTheirNIC(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		subnet := netip.MustParsePrefix("10.241.0.0/24")
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1, NICs: []vnetsim.NICConfig{{Subnet: subnet, Secondaries: 2}}},
			vnetsim.VMConfig{}, vnetsim.VMConfig{Subnet: subnet})
		h := hosts[0]
		h.mustEnsure(h.specOf(0, mode))
		h.mustEnsure(h.specOf(1, mode))
		first, second := h.running(0, mode, Policy{SNAT: true}), h.containerOn(1, 0)
		h.mustAttach(publishing(second.endpoint(mode, Policy{SNAT: true}), tcpAndUDP(netip.Addr{}, 8080, 5353)...))
		second.answer()
		own := second.nic.Primary
		c := &checks{t: t}
		for _, peer := range hosts[1:] {
			c.sees(peer.Primary, peer.place(), own, 8080, 5353)
		}
		c.refuses(hosts[1].place(), h.Primary, 8080, 5353)
		c.refuses(internet(v), h.Public, 8080, 5353)
		for _, to := range []netip.Addr{own, h.Primary} {
			c.sees(first.addr, first.place(), to, 8080, 5353)
		}
		c.sees(own, h.place(), own, 8080, 5353)
		c.sees(h.Primary, h.place(), h.Primary, 8080, 5353)
		c.wait.Wait()
		for _, wrong := range []struct {
			c    *container
			at   netip.Addr
			want string
		}{
			{h.containerOn(1, 1), h.Primary, "publish port 80: " + h.Primary.String() + " is an address of eth0, and the container's address is of eth1"},
			{first, own, "is an address of eth1, and the container's address is of eth0"},
		} {
			e := publishing(wrong.c.endpoint(mode, Policy{}), tcpAndUDP(wrong.at, 9000, 9000)...)
			if wrong.c == first {
				h.mustDetach(e.Owner)
			}
			if _, err := h.attach(e); err == nil || !strings.Contains(err.Error(), wrong.want) {
				t.Errorf("published at %s: %v, want %q", wrong.at, err, wrong.want)
			}
		}
		h.whole("at the end")
		checkFabric(t, v, h.Primary, own)
	})
}

// Nobody on the wire reaches what the host keeps to 127.0.0.1, though the host itself reaches published
// ports there.
func TestPublishingOpensNoLoopback(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		c := h.running(0, mode, Policy{SNAT: true}, PublishedPort{Proto: "tcp", HostPort: 8080, Port: tcpPort})
		link, _ := linkNames(c.endpoint(mode, Policy{}).Owner)
		if mode == ModeBridge {
			link = "azure0"
		}
		if is := strings.TrimSpace(h.sh("cat /proc/sys/net/ipv4/conf/" + link + "/route_localnet")); is != "1" {
			t.Errorf("route_localnet of %s is %s", link, is)
		}
		var listener net.Listener
		if err := h.Do(func() (err error) { listener, err = net.Listen("tcp4", "0.0.0.0:7777"); return err }); err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		// A container that gives up its own 127.0.0.0/8.
		c.sh("ip route del local 127.0.0.0/8 dev lo table local; ip addr del 127.0.0.1/8 dev lo; ip route add 127.0.0.0/8 via " + c.Gateway.String() +
			" dev eth0; echo 1 >/proc/sys/net/ipv4/conf/eth0/route_localnet")
		for _, to := range []string{"127.0.0.1:7777", "127.0.0.53:7777", "127.0.0.1:8080"} {
			var timeout net.Error
			if _, err := fetch(c.place(), netip.MustParseAddrPort(to), nil, 500*time.Millisecond); !errors.As(err, &timeout) || !timeout.Timeout() {
				t.Errorf("a container asks the host's %s: %v, want no answer", to, err)
			}
		}
		if err := listener.(*net.TCPListener).SetDeadline(time.Now()); err != nil {
			t.Fatal(err)
		}
		if from, err := listener.Accept(); err == nil {
			t.Errorf("a container reaches the host's 127.0.0.0/8 from %s", from.RemoteAddr())
		}
	})
}

// Who has a port is told, and a port is had by one.
func TestPortConflicts(t *testing.T) {
	t.Parallel()
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 3})
	h := hosts[0]
	h.mustEnsure(h.spec(ModeBridge))
	var taken []interface{ Close() error }
	if err := h.Do(func() error {
		one, err := net.Listen("tcp4", "0.0.0.0:1000")
		two, err2 := net.Listen("tcp4", "127.0.0.1:1001")
		both, errBoth := net.Listen("tcp", "[::]:1002") // which takes IPv4 too
		six, err6 := net.Listen("tcp6", "[::1]:1003")
		udp, errUDP := net.ListenPacket("udp4", "127.0.0.53:1004")
		taken = append(taken, one, two, both, six, udp)
		return errors.Join(err, err2, errBoth, err6, errUDP)
	}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		for _, l := range taken {
			l.Close()
		}
	}()
	one, two := h.container(0).endpoint(ModeBridge, Policy{SNAT: true}), h.container(1).endpoint(ModeBridge, Policy{SNAT: true})
	primary := h.Primary
	h.mustAttach(publishing(one, PublishedPort{Proto: "tcp", HostPort: 2000, Port: 80}, PublishedPort{Proto: "tcp", HostAddr: primary, HostPort: 2001, Port: 80}))
	h.mustAttach(publishing(two, PublishedPort{Proto: "tcp", HostPort: 2999, Port: 80})) // the policy and the tables are known from here on
	h.mustDetach(two.Owner)
	before := h.kernelState()
	for _, c := range []struct {
		name  string
		ports []PublishedPort
		err   string
	}{
		{"a listener", []PublishedPort{{Proto: "tcp", HostPort: 1000, Port: 80}}, "publish port 1000/tcp of the host: the host itself listens at 0.0.0.0:1000 (uid 0; ss -tlnp names the program)"},
		{"a listener of one address", []PublishedPort{{Proto: "tcp", HostPort: 1001, Port: 80}}, "the host itself listens at 127.0.0.1:1001"},
		{"another address than a listener's", []PublishedPort{{Proto: "tcp", HostAddr: primary, HostPort: 1001, Port: 80}}, ""},
		{"a listener of IPv6 and IPv4", []PublishedPort{{Proto: "tcp", HostPort: 1002, Port: 80}}, "the host itself listens at 0.0.0.0:1002"},
		{"a listener of IPv6", []PublishedPort{{Proto: "tcp", HostPort: 1003, Port: 80}}, ""},
		{"a socket of UDP", []PublishedPort{{Proto: "udp", HostPort: 1004, Port: 80}}, "the host itself listens at 127.0.0.53:1004 (uid 0; ss -ulnp names the program)"},
		{"the other protocol", []PublishedPort{{Proto: "udp", HostPort: 1000, Port: 80}}, ""},
		{"another container", []PublishedPort{{Proto: "tcp", HostPort: 2000, Port: 81}}, "it is published to " + one.Addr.Addr().String() + " already (" + one.Owner + ")"},
		{"another container, one address", []PublishedPort{{Proto: "tcp", HostAddr: loopback, HostPort: 2000, Port: 81}}, "it is published to"},
		{"another container of one address", []PublishedPort{{Proto: "tcp", HostPort: 2001, Port: 81}}, "it is published to"},
		{"other addresses", []PublishedPort{{Proto: "tcp", HostAddr: loopback, HostPort: 2001, Port: 81}}, ""},
		{"twice", []PublishedPort{{Proto: "tcp", HostPort: 3000, Port: 81}, {Proto: "tcp", HostPort: 3000, Port: 82}}, "it is asked for twice, for 81 and 82"},
		{"twice, of one address and of all", []PublishedPort{{Proto: "tcp", HostPort: 3000, Port: 81}, {Proto: "tcp", HostAddr: primary, HostPort: 3000, Port: 82}}, "it is asked for twice"},
		{"an address of nobody", []PublishedPort{{Proto: "tcp", HostAddr: netip.MustParseAddr("10.9.9.9"), HostPort: 3000, Port: 81}}, "10.9.9.9 is not an address of this host"},
		{"an address of a container", []PublishedPort{{Proto: "tcp", HostAddr: one.Addr.Addr(), HostPort: 3000, Port: 81}}, "is not an address of this host"},
		{"IPv6", []PublishedPort{{Proto: "tcp", HostAddr: netip.MustParseAddr("::1"), HostPort: 3000, Port: 81}}, "is not IPv4, and IPv6 is not served yet"},
		{"SCTP", []PublishedPort{{Proto: "sctp", HostPort: 3000, Port: 81}}, `tcp and udp can be published, and "sctp" cannot`},
		{"port 0 of the container", []PublishedPort{{Proto: "tcp", HostPort: 3000}}, "port 0 of a container cannot be published"},
		{"a range upside down", []PublishedPort{{Proto: "tcp", HostPort: 3000, HostPortEnd: 2999, Port: 80}}, "3000-2999 is no range of host ports"},
		{"a range that is taken", []PublishedPort{{Proto: "tcp", HostPort: 1000, HostPortEnd: 1001, Port: 80}}, "publish a port 1000-1001/tcp of the host: none is free; of the last, the host itself listens"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := h.attach(publishing(two, c.ports...))
			if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
				t.Errorf("%v, want %q", err, c.err)
			}
			if err == nil {
				h.mustDetach(two.Owner)
			}
			checkSame(t, "what it left", before, h.kernelState())
			if s, err := h.readState(); err != nil || len(s.Ports) != 1 {
				t.Errorf("host.json has %v %v", s.Ports, err)
			}
		})
	}
	t.Run("the first of a range that is free", func(t *testing.T) {
		got := h.mustAttach(publishing(two, PublishedPort{Proto: "tcp", HostPort: 1999, HostPortEnd: 2003, Port: 80}, PublishedPort{Proto: "tcp", HostPort: 1999, HostPortEnd: 2003, Port: 81}))
		want := []PublishedPort{{Proto: "tcp", HostPort: 1999, Port: 80}, {Proto: "tcp", HostPort: 2002, Port: 81}}
		if diff := cmp.Diff(want, got.Ports, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}
		h.mustDetach(two.Owner)
	})
	t.Run("a free one, the same for a repeat", func(t *testing.T) {
		wish := publishing(two, PublishedPort{Proto: "tcp", Port: 80}, PublishedPort{Proto: "tcp", Port: 81}, PublishedPort{Proto: "udp", Port: 81})
		wish.Netns, wish.IfName = "", ""
		first := h.mustAttach(wish)
		for _, p := range first.Ports {
			if p.HostPort < firstFree || p.HostPort > lastFree {
				t.Errorf("%s is not of the ephemeral range", p)
			}
		}
		if second := h.mustAttach(wish); !slices.Equal(first.Ports, second.Ports) {
			t.Errorf("a repeat gets %v, not %v", second.Ports, first.Ports)
		}
		h.mustDetach(two.Owner)
	})
	t.Run("what a crash left stands in nobody's way", func(t *testing.T) {
		three := publishing(h.container(2).endpoint(ModeBridge, Policy{SNAT: true}), PublishedPort{Proto: "tcp", HostPort: 4000, Port: 80})
		for _, step := range []string{"ports", "elements", "link", "flows", "alias"} {
			if !h.crash(step, func() { _, _ = h.attach(publishing(two, three.Ports...)) }) {
				t.Errorf("no attach got to %q", step)
			}
			if _, err := h.attach(three); err != nil {
				t.Errorf("after an attach died at %q: %v", step, err)
			}
			h.mustDetach(three.Owner)
			h.mustDetach(two.Owner)
		}
		h.reconcile()
		if s, err := h.readState(); err != nil || len(s.Ports) != 1 {
			t.Errorf("host.json has %v %v", s.Ports, err)
		}
		checkSame(t, "what crashes left", before, h.kernelState())
	})
}

// Ports outlive a flushed ruleset, a lost host.json and a lost bridge.
func TestPortsAreRestored(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1}, vnetsim.VMConfig{})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		c := h.container(0)
		at := h.mustAttach(publishing(c.endpoint(mode, Policy{SNAT: true}),
			PublishedPort{Proto: "udp", HostPort: 5353, Port: udpPort}, PublishedPort{Proto: "tcp", HostPort: 8080, Port: tcpPort}, PublishedPort{Proto: "tcp", HostAddr: h.Primary, Port: tcpPort}))
		c.answer()
		link := at.Link
		if mode == ModeBridge {
			link = "azure0"
		}
		before := h.kernelState()
		for _, trouble := range []struct{ name, line string }{
			{"the ruleset flushed", "nft flush ruleset"},
			{"host.json lost", "rm " + h.path("host.json")},
			{"the table lost after host.json", "nft delete table ip azure_vnet"},
			{"host.json half written", "printf '{\"ports\":' >" + h.path("host.json")},
			{"the bridge lost", "ip link del azure0 || true"},
			{"loopback's way lost", "echo 0 >/proc/sys/net/ipv4/conf/" + link + "/route_localnet"},
		} {
			h.sh(trouble.line)
			h.reconcile()
			checkSame(t, trouble.name, before, h.kernelState())
			s, err := h.readState()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(sortedPorts(at.Ports), sortedPorts(s.Ports[at.Link])); diff != "" {
				t.Errorf("%s: host.json has other ports (-want +got):\n%s", trouble.name, diff)
			}
			checks := &checks{t: t}
			checks.sees(hosts[1].Primary, hosts[1].place(), h.Primary, 8080, 5353)
			checks.sees(h.Primary, h.place(), loopback, 8080, 5353)
			checks.sees(h.Primary, h.place(), h.Primary, at.Ports[2].HostPort, 5353)
			checks.wait.Wait()
			if t.Failed() {
				t.Fatal(trouble.name)
			}
		}
		checkFabric(t, v, h.Primary)
	})
}

// sortedPorts spells ports in one order.
func sortedPorts(ports []PublishedPort) (out []string) {
	for _, p := range ports {
		out = append(out, p.String())
	}
	slices.Sort(out)
	return out
}

// Ports end with their container, also when it died with its namespace, and another has them at once.
func TestPortsEndWithTheContainer(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
		h, peer := hosts[0], hosts[1]
		h.mustEnsure(h.spec(mode))
		ports := tcpAndUDP(netip.Addr{}, 8080, 5353)
		one := h.running(0, mode, Policy{SNAT: true}, ports...).answer()
		h.mustDetach(one.endpoint(mode, Policy{}).Owner)
		two := h.running(1, mode, Policy{SNAT: true}, ports...).answer()
		c := &checks{t: t}
		c.sees(peer.Primary, peer.place(), h.Primary, 8080, 5353)
		c.wait.Wait()

		owner := two.endpoint(mode, Policy{}).Owner
		link, _ := linkNames(owner)
		h.sh("ip netns del " + two.name) // sockets of this process hold the namespace still
		h.ip("link del " + link)
		h.mustAttach(publishing(one.endpoint(mode, Policy{SNAT: true}), ports...))
		c.sees(peer.Primary, peer.place(), h.Primary, 8080, 5353)
		c.wait.Wait()
		if s, err := h.readState(); err != nil || len(s.Ports) != 1 {
			t.Errorf("host.json has %v %v", s.Ports, err)
		}
		link, _ = linkNames(one.endpoint(mode, Policy{}).Owner)
		h.ip("link del " + link)
		if mended := h.reconcile(); len(mended) == 0 {
			t.Error("nothing was mended after a container died")
		}
		h.mustAttach(two.endpointElsewhere(mode))
		h.mustDetach(owner)
		if s, err := h.readState(); err != nil || len(s.Ports) != 0 {
			t.Errorf("host.json has %v %v", s.Ports, err)
		}
		h.whole("with no port")
		c.refuses(peer.place(), h.Primary, 8080, 5353)
		c.refuses(h.place(), loopback, 8080, 5353)
		c.wait.Wait()
		listing := h.sh("nft list table ip azure_vnet")
		for _, set := range []string{"published", "published_at", "published_by", "self"} {
			_, body, _ := strings.Cut(listing, " "+set+" {")
			if body, _, _ = strings.Cut(body, "}"); strings.Contains(body, "elements") {
				t.Errorf("%s is not empty: %s", set, body)
			}
		}
	})
}

// endpointElsewhere is the wish of a container whose interface stays on the host.
func (c *container) endpointElsewhere(mode Mode) Endpoint {
	e := c.endpoint(mode, Policy{SNAT: true})
	e.Netns, e.IfName = "", ""
	return e
}

// A client that has been sending all along is heard as soon as there is someone to hear, and again when
// another container has the port.
func TestDatagramsFindTheNewContainer(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		var ask net.Conn
		if err := hosts[1].Do(func() (err error) {
			ask, err = net.Dial("udp4", netip.AddrPortFrom(h.Primary, 5353).String())
			return err
		}); err != nil {
			t.Fatal(err)
		}
		defer ask.Close()
		answered := func() bool {
			buf := make([]byte, 512)
			for range 40 {
				_, _ = ask.Write([]byte("hello\n"))
				_ = ask.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
				if n, err := ask.Read(buf); err == nil && n > 0 {
					return true
				}
			}
			return false
		}
		_, _ = ask.Write([]byte("anybody?\n"))
		for n := range 2 {
			c := h.running(n, mode, Policy{SNAT: true}, PublishedPort{Proto: "udp", HostPort: 5353, Port: udpPort}).answer()
			if !answered() {
				t.Errorf("container %d does not hear", n)
			}
			h.mustDetach(c.endpoint(mode, Policy{}).Owner)
			if flows := h.sh("grep -c 'src=" + c.addr.String() + "' /proc/net/nf_conntrack || true"); strings.TrimSpace(flows) != "0" {
				t.Errorf("flows of the container that is gone: %s", flows)
			}
			_, _ = ask.Write([]byte("anybody?\n"))
		}
	})
}
