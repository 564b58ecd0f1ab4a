// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
)

var secondSubnet = netip.MustParsePrefix("10.241.0.0/24")

// ensureAll prepares every NIC of the VM.
func (h *host) ensureAll(mode Mode) {
	h.t.Helper()
	for n := range h.NICs() {
		h.mustEnsure(h.specOf(n, mode))
	}
}

// runningOn makes the n-th container of a NIC, attaches it, and has it answer.
func (h *host) runningOn(nic, n int, mode Mode, p Policy, ports ...PublishedPort) *container {
	h.t.Helper()
	c := h.containerOn(nic, n)
	h.mustAttach(publishing(c.endpoint(mode, p), ports...))
	return c.answer()
}

// probe asks for tcp/80 as Azure's load balancer does.
func (c *checks) probe(v *vnetsim.VNet, to netip.Addr) {
	c.wait.Go(func() {
		var conn net.Conn
		err := v.Internet.Do(func() (err error) {
			d := net.Dialer{Timeout: patience, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(vnetsim.HostAgentAddr, 0))}
			conn, err = d.Dial("tcp4", netip.AddrPortFrom(to, tcpPort).String())
			return err
		})
		if err != nil {
			c.t.Errorf("the load balancer probes %s: %v", to, err)
			return
		}
		conn.Close()
	})
}

// seenOutside checks by which address the internet sees the client.
func (c *checks) seenOutside(from *container, want netip.Addr) {
	c.expect(true, fmt.Sprintf("%s is %s to the internet", from.place().name, want), func() bool {
		return from.try("curl -s -m 10 http://203.0.113.10/ | grep -qx " + want.String())
	})
}

// getsTo checks that the metadata service answers at all, whatever it says.
func (c *checks) metadata(from *container) {
	c.expect(true, from.place().name+" gets an answer of the metadata service", func() bool {
		return from.try("curl -s -o /dev/null -m 10 http://169.254.169.254/metadata/instance/network")
	})
}

// Containers of a second NIC reach all that others reach, and are reached, each by its own NIC: whether the
// NIC has a subnet of its own or shares that of the first, and whatever the reverse path filter.
func TestTwoNICs(t *testing.T) {
	t.Parallel()
	for name, subnet := range map[string]netip.Prefix{"own subnet": secondSubnet, "same subnet": {}} {
		t.Run(name, func(t *testing.T) {
			inOneMode(t, func(t *testing.T, mode Mode) {
				v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1, NICs: []vnetsim.NICConfig{{Subnet: subnet, Secondaries: 2}}},
					vnetsim.VMConfig{Secondaries: 1}, vnetsim.VMConfig{Subnet: secondSubnet, Secondaries: 1})
				h := hosts[0]
				for _, h := range hosts {
					h.ensureAll(mode)
				}
				a, b, d := h.runningOn(0, 0, mode, Policy{SNAT: true}), h.runningOn(1, 0, mode, Policy{SNAT: true}), h.runningOn(1, 1, mode, Policy{SNAT: true})
				far, far2 := hosts[1].running(0, mode, Policy{}), hosts[2].running(0, mode, Policy{})
				used := []netip.Addr{a.addr, b.addr, d.addr, h.Primary, b.nic.Primary, far.addr, far2.addr}
				filters := []string{"1"}
				if soaking {
					filters = []string{"0", "1", "2"}
				}
				for _, filter := range filters {
					t.Run("rp_filter "+filter, func(t *testing.T) {
						for _, dev := range []string{"all", "default", "eth0", "eth1"} {
							h.sh("echo " + filter + " >/proc/sys/net/ipv4/conf/" + dev + "/rp_filter")
						}
						h.whole("with that filter")
						c := &checks{t: t}
						defer c.wait.Wait()
						for _, from := range []*container{a, b, d} {
							c.reaches(from.place(), a.addr, b.addr, d.addr, far.addr, far2.addr, h.Primary, b.nic.Primary, hosts[1].Primary, hosts[2].Primary, vnetsim.HostAgentAddr)
							for _, peer := range []place{h.place(), far.place(), far2.place(), hosts[1].place(), hosts[2].place()} {
								c.reaches(peer, from.addr)
							}
							c.expect(true, from.name+" asks the host agent's DNS", func() bool { return from.try("busybox nslookup internet.test 168.63.129.16") })
							c.probe(v, from.addr)
							c.metadata(from)
						}
						c.seenOutside(a, h.Public)
						c.seenOutside(b, b.nic.Primary) // the simulated platform translates the primary of the first NIC alone
					})
				}
				h.whole("at the end")
				checkFabric(t, v, used...)
			})
		})
	}
}

// Containers of each NIC go where the host goes: by the routes of a VPN that takes everything (0/1 and 128/1),
// and by a table that a VPN's rule leads to. If that table has the VNet's own range, containers and host still
// reach each other.
func TestVPNRoutesKeepTheirPlace(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1, NICs: []vnetsim.NICConfig{{Subnet: secondSubnet, Secondaries: 1}}}, vnetsim.VMConfig{Secondaries: 1})
		h, peer := hosts[0], hosts[1]
		h.ensureAll(mode)
		a, b := h.runningOn(0, 0, mode, Policy{SNAT: true}), h.runningOn(1, 0, mode, Policy{SNAT: true})
		site, own := h.room("site"), netip.MustParseAddr("192.168.99.1")
		h.tunnel(h.place(), site.place(), own, netip.MustParseAddr("192.168.99.2"))
		behind, onlyThere := netip.MustParseAddr("198.18.0.7"), netip.MustParseAddr("100.101.102.103")
		site.sh("ip addr add " + behind.String() + " dev lo; ip addr add " + onlyThere.String() + " dev lo")
		h.answerAt(site.place(), netip.AddrPortFrom(netip.IPv4Unspecified(), tcpPort))
		h.run("iptables-nft", "-P", "FORWARD", "DROP")
		h.reconcile()
		checkAll := func(when string, to netip.Addr, others ...netip.Addr) {
			t.Helper()
			c := &checks{t: t}
			for _, from := range []*container{a, b} {
				c.sees(own, from.place(), to, tcpPort, 0) // an answer of UDP has the server's first address
				c.reaches(from.place(), append(others, a.addr, b.addr, h.Primary, b.nic.Primary)...)
				c.reaches(h.place(), from.addr)
			}
			c.reaches(h.place(), to)
			c.wait.Wait()
			h.whole(when)
			if t.Failed() {
				t.Fatal(when)
			}
		}
		h.ip("route add 0.0.0.0/1 dev tun0", "route add 128.0.0.0/1 dev tun0")
		checkAll("0/1 and 128/1", behind, peer.Primary, vnetsim.HostAgentAddr)
		h.ip("route del 0.0.0.0/1 dev tun0", "route del 128.0.0.0/1 dev tun0", "route add 100.64.0.0/10 dev tun0 table 52", "rule add pref 5270 lookup 52")
		checkAll("table 52", onlyThere, peer.Primary, vnetsim.HostAgentAddr)
		narrow := netip.MustParseAddr("10.240.200.9")
		site.sh("ip addr add " + narrow.String() + " dev lo")
		h.ip("route add 10.240.200.0/24 dev tun0")
		checkAll("a narrower route than a subnet's", narrow, peer.Primary)
		h.ip("route add 10.240.0.0/16 dev tun0 table 52")
		checkAll("table 52 with the VNet's own range", onlyThere)
		checkFabric(t, v, a.addr, b.addr)
	})
}

// The rules of guides for several NICs, added before us or after, take nothing from containers.
func TestRulesOfMultiNICGuides(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		for _, order := range []string{"before", "after"} {
			t.Run(order, func(t *testing.T) {
				v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2, NICs: []vnetsim.NICConfig{{Subnet: secondSubnet, Secondaries: 1}}}, vnetsim.VMConfig{Secondaries: 1})
				h := hosts[0]
				second := h.NICs()[1]
				guide := func() {
					h.ip("route add "+h.Prefix.String()+" dev eth0 table 77", "route add default via "+h.Gateway.String()+" dev eth0 table 77",
						"route add "+secondSubnet.String()+" dev eth1 table 78", "route add default via "+second.Gateway.String()+" dev eth1 table 78",
						"rule add from "+second.Primary.String()+" lookup 78", "rule add to "+second.Primary.String()+" lookup 78",
						"rule add from "+secondSubnet.String()+" lookup 78",
						"rule add from "+h.Primary.String()+" lookup 77", "rule add to "+h.Primary.String()+" lookup 77",
						"rule add from "+h.Prefix.String()+" lookup 77")
				}
				if order == "before" {
					guide()
				}
				h.ensureAll(mode)
				a, a2, b := h.runningOn(0, 0, mode, Policy{SNAT: true}), h.runningOn(0, 1, mode, Policy{SNAT: true}), h.runningOn(1, 0, mode, Policy{SNAT: true})
				if order == "after" {
					guide()
					if len(h.broken()) == 0 {
						t.Error("rules stand before the one that leads to containers, and nothing is said to be broken")
					}
					h.reconcile()
				}
				h.whole("with a guide's rules")
				c := &checks{t: t}
				for _, from := range []*container{a, a2, b} {
					c.reaches(from.place(), a.addr, a2.addr, b.addr, h.Primary, second.Primary, hosts[1].Primary, vnetsim.HostAgentAddr, vnetsim.InternetAddr)
					c.reaches(h.place(), from.addr)
					c.reaches(hosts[1].place(), from.addr)
					c.sees(h.Primary, h.place(), from.addr, tcpPort, udpPort)
				}
				c.reaches(hosts[1].place(), h.Primary, second.Primary)
				c.wait.Wait()
				checkFabric(t, v, a.addr, a2.addr, b.addr, h.Primary)
				h.ip("rule del from "+h.Primary.String()+" lookup 77", "rule del to "+h.Primary.String()+" lookup 77")
				h.reconcile()
				h.whole("after some of a guide's rules went")
			})
		}
	})
}

// Watch tells of a rule of others, which may stand before the one that leads to containers.
func TestWatchTellsOfForeignRules(t *testing.T) {
	t.Parallel()
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
	h := hosts[0]
	h.mustEnsure(h.spec(ModeBridge))
	told := h.watching()
	h.ip("rule add from " + h.Primary.String() + " lookup 77")
	select {
	case <-told:
	case <-time.After(patience):
		t.Error("nobody was told")
	}
}

// watching is told of what Watch tells.
func (h *host) watching() <-chan struct{} {
	h.t.Helper()
	told := make(chan struct{}, 100)
	go func() {
		_ = h.Do(func() error { return h.Watch(h.t.Context(), func() { told <- struct{}{} }) })
	}()
	<-told // it listens
	return told
}

// NICs change while containers run: their names, their number, the primary address, the subnets of the VNet.
func TestNICsChange(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{Secondaries: 1})
		h, peer := hosts[0], hosts[1]
		h.ensureAll(mode)
		a := h.runningOn(0, 0, mode, Policy{SNAT: true}, tcpAndUDP(netip.Addr{}, 8080, 5353)...)
		var b *container
		used := []netip.Addr{a.addr}
		all := func(when string) {
			t.Helper()
			h.whole(when)
			c := &checks{t: t}
			c.sees(peer.Primary, peer.place(), h.Primary, 8080, 5353)
			c.reaches(peer.place(), a.addr)
			c.reaches(a.place(), h.Primary, peer.Primary, vnetsim.HostAgentAddr)
			c.seenOutside(a, h.Public)
			if b != nil {
				c.sees(peer.Primary, peer.place(), b.nic.Primary, 8081, 5354)
				c.reaches(peer.place(), b.addr)
				c.reaches(b.place(), a.addr, h.Primary, peer.Primary, vnetsim.HostAgentAddr)
				c.reaches(a.place(), b.addr)
				c.seenOutside(b, b.nic.Primary)
			}
			c.wait.Wait()
			if t.Failed() {
				t.Fatal(when)
			}
		}
		all("at the beginning")

		nic, err := h.AddNIC(vnetsim.NICConfig{Subnet: secondSubnet, Secondaries: 2})
		if err != nil {
			t.Fatal(err)
		}
		spare := h.containerOn(1, 1)
		h.ensureAll(mode)
		h.reconcile()
		b = h.runningOn(1, 0, mode, Policy{SNAT: true}, tcpAndUDP(netip.Addr{}, 8081, 5354)...)
		all("a NIC was added")

		// As a rule of udev does it, and networkd or cloud-init configure it again.
		config := func(name string) {
			h.ip("addr replace "+nic.Primary.String()+"/24 dev "+name+" metric 200", "link set "+name+" up",
				"route replace default via "+nic.Gateway.String()+" dev "+name+" table 201")
		}
		h.ip("link set eth1 down", "link set eth1 name lan9")
		config("lan9")
		h.reconcile()
		all("a NIC was renamed")
		h.mustEnsure(h.specOf(1, mode))
		h.whole("the renamed NIC is asked for again")

		store := h.room("store")
		h.ip("link set lan9 netns store")
		gone := h.broken()
		if !slices.ContainsFunc(gone, func(s string) bool { return strings.Contains(s, nic.MAC+" is gone") }) {
			t.Errorf("a NIC was detached: broken says %q", gone)
		}
		h.reconcile()
		c := &checks{t: t}
		c.reaches(peer.place(), a.addr)
		c.reaches(a.place(), b.addr, peer.Primary)
		c.reaches(b.place(), a.addr, h.Primary)
		leadsNowhere := func() { // and not out by the primary NIC, which Azure takes for a forgery
			t.Helper()
			c.pings(false, b, peer.Primary, vnetsim.HostAgentAddr, vnetsim.InternetAddr)
			c.wait.Wait()
		}
		leadsNowhere()
		if _, err := h.attach(spare.endpoint(mode, Policy{SNAT: true})); err == nil || !strings.Contains(err.Error(), "no network interface of this host has the MAC "+nic.MAC) {
			t.Errorf("attach to a NIC that is gone: %v", err)
		}
		store.sh("ip link set lan9 name eth7 && ip link set eth7 netns 1")
		config("eth7")
		h.reconcile()
		all("a NIC was attached again, with another name")
		h.ip("link set eth7 down")
		leadsNowhere()
		h.reconcile()
		leadsNowhere()
		config("eth7")
		h.reconcile()
		all("a NIC was down for a while")

		if err := h.SetPrimary(netip.MustParseAddr("10.240.3.3")); err != nil {
			t.Fatal(err)
		}
		c.reaches(a.place(), h.Primary, peer.Primary) // by the main table, while eth0's own is empty
		c.wait.Wait()
		h.reconcile()
		all("the primary address changed")

		later := netip.MustParsePrefix("10.250.0.0/16")
		if err := v.AddSubnet(later); err != nil {
			t.Fatal(err)
		}
		vm, err := v.AddVM(vnetsim.VMConfig{Subnet: later, Secondaries: 1})
		if err != nil {
			t.Fatal(err)
		}
		newcomer := &host{VM: vm, Host: New(Config{Run: t.TempDir()}), t: t}
		newcomer.ensureAll(mode)
		far := newcomer.runningOn(0, 0, mode, Policy{SNAT: true})
		for _, c2 := range []*container{a, b} {
			c.sees(c2.addr, c2.place(), far.addr, tcpPort, udpPort)
			c.sees(far.addr, far.place(), c2.addr, tcpPort, udpPort)
			c.sees(vm.Primary, newcomer.place(), c2.addr, tcpPort, udpPort)
		}
		c.wait.Wait()
		all("a subnet was added")
		checkFabric(t, v, append(used, b.addr, far.addr)...)
	})
}

// A VM has as many containers as Azure gives it addresses: all are reached, and all go without a trace.
func TestManyContainers(t *testing.T) {
	t.Parallel()
	for _, mode := range Modes {
		t.Run(string(mode), func(t *testing.T) {
			many := 250
			if !soaking {
				many = 30
			}
			v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: many}, vnetsim.VMConfig{})
			h, peer := hosts[0], hosts[1]
			h.mustEnsure(h.spec(mode))
			first := h.running(0, mode, Policy{SNAT: true}) // makes the policy's chain
			h.mustDetach(first.endpoint(mode, Policy{}).Owner)
			before := h.kernelState()
			all := []*container{first}
			for n := 1; n < many; n++ {
				h.netns(fmt.Sprintf("c0-%d", n))
				all = append(all, &container{h, fmt.Sprintf("c0-%d", n), h.NICs()[0], h.Secondaries()[n]})
			}
			start := time.Now()
			for _, c := range all {
				h.mustAttach(c.endpoint(mode, Policy{SNAT: true}))
			}
			attached := time.Since(start)
			h.whole("with all of them")
			c := &checks{t: t}
			for part := range slices.Chunk(all, 25) {
				for _, to := range part {
					c.reaches(peer.place(), to.addr)
					c.reaches(h.place(), to.addr)
					c.reaches(to.place(), all[0].addr, peer.Primary)
				}
				c.wait.Wait()
			}
			start = time.Now()
			for _, c := range all {
				h.mustDetach(c.endpoint(mode, Policy{}).Owner)
			}
			t.Logf("%d containers: attached in %v, detached in %v", many, attached, time.Since(start))
			if limit := 60 * time.Second; attached > limit || time.Since(start) > limit {
				t.Errorf("%d attaches or detaches took more than %v", many, limit)
			}
			checkSame(t, "what is left of them", before, h.kernelState())
			h.whole("without them")
			if s, err := os.ReadFile(h.path("host.json")); err != nil || len(s) > 4096 {
				t.Errorf("host.json has %d bytes: %v", len(s), err)
			}
			checkFabric(t, v, h.Secondaries()...)
		})
	}
}
