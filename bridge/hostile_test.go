// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"azurevnet/internal/vnetsim"
)

// theEnd is what the container says to all after its attacks, in its own name. A listener that has heard it has heard all
// that came before.
const theEnd = "that is all"

// heardAt is a UDP port of the host, and connectedTo a TCP port of the other VM.
const heardAt, connectedTo = 4242, 4243

// scene is two VMs, and three containers on the first. One of them is hostile.
type scene struct {
	t                 *testing.T
	mode              Mode
	v                 *vnetsim.VNet
	h, far            *host
	evil, good, third *container
	mine, his, gw     net.HardwareAddr // the MACs of evil and of good, and the one that answers evil for Azure's gateway
	absent            netip.Addr       // of the VNet, and nobody's
	unlent            netip.Addr       // an ipconfig that no container has
	ofGood, ofHost    net.Conn         // connections to the other VM
	heardByFar        net.PacketConn   // a socket of the other VM

	out       int // evil's packet socket
	listeners []*listener
	lastID    uint16 // of a packet that was sent in fragments
}

func newScene(t *testing.T, mode Mode) *scene {
	v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{Secondaries: 1})
	h := hosts[0]
	br := h.mustEnsure(h.spec(mode))
	s := &scene{
		t: t, mode: mode, v: v, h: h, far: hosts[1],
		evil: h.running(0, mode, Policy{SNAT: true}), good: h.running(1, mode, Policy{SNAT: true}), third: h.running(2, mode, Policy{}),
		gw: br.MAC, absent: netip.MustParseAddr("10.240.77.77"), unlent: h.Secondaries()[3],
	}
	s.mine, s.his = MACFor(s.evil.addr), MACFor(s.good.addr)
	if mode == ModeTransparent {
		s.gw = hostMAC(s.evil.addr)
	}
	s.far.place().echoTCP(t, connectedTo)
	s.ofGood, s.ofHost = s.connect(s.good.place()), s.connect(h.place())
	for _, p := range []place{s.evil.place(), s.good.place(), s.third.place(), h.place()} { // else they answer that they have no such port
		p.listenUDP(t)
	}
	s.heardByFar = s.far.place().listenUDP(t)
	s.listen()
	return s
}

// ledToAgent is an address that a rule of the administrator leads to the host agent, port 80.
var ledToAgent = netip.MustParseAddrPort("10.96.0.9:8080")

// believeAll makes the host one whose administrator trusts everybody: it heeds routers, redirects and source routes,
// checks no source address, and has a service that leads to the host agent.
func (s *scene) believeAll() {
	s.h.run("nft", fmt.Sprintf("add table ip administrator; add chain ip administrator to_agent { type nat hook prerouting priority -100; }; "+
		"flush chain ip administrator to_agent; add rule ip administrator to_agent ip daddr %s tcp dport %d dnat to %s:80", ledToAgent.Addr(), ledToAgent.Port(), vnetsim.HostAgentAddr))
	s.h.sh(`cd /proc/sys/net/ipv4/conf
		for f in accept_source_route accept_redirects arp_accept bc_forwarding; do echo 1 >all/$f; done
		echo 0 >all/secure_redirects
		for f in */rp_filter; do echo 0 >$f; done
		for f in /proc/sys/net/ipv6/conf/*/accept_ra; do echo 1 >$f; done`)
}

// try sends frames, and returns what was heard by those who must not hear it.
func (s *scene) try(frames ...[]byte) (heard []string) {
	s.t.Helper()
	s.hear()
	for _, f := range frames {
		if _, err := unix.Write(s.out, append(f, make([]byte, max(0, 14-len(f)))...)); err != nil {
			s.t.Errorf("send % x: %v", f, err)
		}
	}
	return s.hearToTheEnd()
}

// hearToTheEnd sends the end in evil's own name. It returns what was heard until all have heard the end.
func (s *scene) hearToTheEnd() (heard []string) {
	s.t.Helper()
	for _, l := range s.listeners {
		l.ended = !l.must
	}
	var again time.Time
	for end := time.Now().Add(patience); ; time.Sleep(200 * time.Microsecond) {
		if now := time.Now(); now.After(again) {
			again = now.Add(100 * time.Millisecond)
			for _, to := range []netip.Addr{s.good.addr, s.third.addr, s.h.Primary, s.far.Primary} {
				_, _ = unix.Write(s.out, ether(s.gw, s.mine, unix.ETH_P_IP, ip4(s.evil.addr, to, unix.IPPROTO_UDP, udp4(9, heardAt, []byte(theEnd)...))...))
			}
		}
		heard = append(heard, s.hear()...)
		i := slices.IndexFunc(s.listeners, func(l *listener) bool { return !l.ended })
		if i < 0 {
			return heard
		}
		if time.Now().After(end) {
			s.t.Fatalf("%s (%s) hears nothing that evil says in its own name", s.listeners[i].who, s.listeners[i].name)
		}
	}
}

// notice sends each attack alone, and returns what was heard of those that somebody heard, by their names.
func (s *scene) notice(attacks []attack) map[string][]string {
	s.t.Helper()
	noticed := map[string][]string{}
	for _, a := range attacks {
		if heard := s.try(a.frames...); len(heard) > 0 {
			noticed[a.name] = heard
		}
	}
	return noticed
}

// attackAll sends all attacks at once. If somebody hears one, it sends each alone to find out which.
func (s *scene) attackAll(when string, attacks []attack) {
	s.t.Helper()
	var frames [][]byte
	for _, a := range attacks {
		frames = append(frames, a.frames...)
	}
	if heard := s.try(frames...); len(heard) == 0 {
		return
	}
	noticed := s.notice(attacks)
	for name, heard := range noticed {
		s.t.Errorf("%s, %s: %s", when, name, strings.Join(heard, "\n"))
	}
	if heard := s.try(frames...); len(noticed) == 0 && len(heard) > 0 {
		s.t.Errorf("%s: of all attacks at once, and of none alone: %s", when, strings.Join(heard, "\n"))
	}
}

// talk checks that all still speak with each other, and that connections from before live.
func (s *scene) talk(when string) {
	s.t.Helper()
	c := &checks{t: s.t}
	c.reaches(s.good.place(), s.third.addr, s.evil.addr, s.h.Primary, s.far.Primary, vnetsim.InternetAddr)
	c.reaches(s.evil.place(), s.good.addr, s.h.Primary, s.far.Primary)
	c.reaches(s.h.place(), s.good.addr, s.evil.addr, s.far.Primary)
	c.reaches(s.far.place(), s.good.addr, s.evil.addr, s.h.Primary)
	for name, conn := range map[string]net.Conn{"another container": s.ofGood, "the host": s.ofHost} {
		c.wait.Go(func() {
			conn.SetDeadline(time.Now().Add(patience))
			if _, err := io.WriteString(conn, "still?"); err != nil {
				s.t.Errorf("the connection of %s: %v", name, err)
			}
			if got, err := io.ReadAll(io.LimitReader(conn, 6)); string(got) != "still?" {
				s.t.Errorf("the connection of %s gets %q: %v", name, got, err)
			}
		})
	}
	c.wait.Wait()
	if s.t.Failed() {
		s.t.Logf("this is what is wrong %s", when)
	}
}

// picture is what a hostile container must not change: neighbours, routes, path MTUs, addresses and forwarding entries.
func (s *scene) picture() string {
	s.t.Helper()
	const learned = "ip -4 neigh show; ip -4 route show cache"
	return s.h.sh("{ "+learned+`; ip -4 route show table all; ip -4 rule show; ip -6 neigh show; ip -6 route show default
		ip -6 addr show scope global; ip -o -4 addr show; bridge fdb show; } | grep -v 12:34:56 | sed "s/ used.*//" | sort`) +
		s.good.sh(learned) + s.third.sh(learned)
}

// A container may send any frame. Nobody hears a frame who must not, nothing false leaves the VM, and no entry of others
// changes. All can still speak. Without our nft tables, the test would notice a hundred attacks.
func TestAContainerHurtsNobody(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode Mode) {
		s := newScene(t, mode)
		s.believeAll()
		for _, call := range []string{"0", "1"} {
			when := "with bridge-nf-call-iptables=" + call
			s.h.sh("echo " + call + " >/proc/sys/net/bridge/bridge-nf-call-iptables")
			s.talk("before, " + when)
			before := s.picture()
			attacks := s.attacks()
			s.attackAll(when, attacks)
			t.Logf("FIGURE hostile container: %d attacks by frames", len(attacks))
			checkSame(t, "entries of others, "+when, before, s.picture())
			s.talk("after, " + when)
		}
		s.h.reconcile()
		s.h.whole("after all that")
		checkFabric(t, s.v, s.good.addr, s.evil.addr)
		s.checkNoticed()
	})
}

// checkNoticed attacks a host without our nft tables. It shows that the table of attacks can fail.
func (s *scene) checkNoticed() {
	s.t.Helper()
	s.believeAll()
	s.h.sh(`for f in ip arp bridge; do nft delete table $f azure_vnet 2>/dev/null; done
		for f in /proc/sys/net/ipv4/conf/*/accept_source_route; do echo 1 >$f; done`)
	attacks := s.attacks()
	noticed := s.notice(attacks)
	s.t.Logf("%d attacks. Without nft tables, %d are noticed: %q", len(attacks), len(noticed), slices.Sorted(maps.Keys(noticed)))
	if want := 100; len(noticed) < want {
		s.t.Errorf("without nft tables, %d attacks are noticed, want %d at least", len(noticed), want)
	}
}

// A datagram that a container sends in fragments is its own: nobody else gives it another beginning or end, or spoils it.
func TestFragmentsAreTheirSendersOwn(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode Mode) {
		s := newScene(t, mode)
		toHim, gw := s.good.openPacketSocket(), s.gw
		if mode == ModeTransparent {
			gw = hostMAC(s.good.addr)
		}
		far := s.heardByFar
		datagram := func(text []byte) []byte {
			return ip4(s.good.addr, s.far.Primary, unix.IPPROTO_UDP, udp4(9, heardAt, bytes.Repeat(text, 5)...))
		}
		own, forged := datagram([]byte("of my own ")), datagram(append(mark(anybody), '!'))
		size := len(own) - 20
		for _, part := range []struct {
			name       string
			begin, end int
		}{{"beginning", 0, 24}, {"end", 24, size}, {"middle", 8, 32}, {"whole", 0, size}} {
			for _, mac := range []net.HardwareAddr{s.mine, s.his} {
				s.lastID++
				heard := s.try(ether(s.gw, mac, unix.ETH_P_IP, fragment(forged, s.lastID, part.begin, part.end)...))
				for _, f := range [][]byte{fragment(own, s.lastID, 0, 24), fragment(own, s.lastID, 24, size)} {
					if _, err := unix.Write(toHim, ether(gw, s.his, unix.ETH_P_IP, f...)); err != nil {
						t.Fatal(err)
					}
				}
				if heard = append(heard, s.try()...); len(heard) > 0 {
					t.Errorf("a forged %s from %s: %s", part.name, mac, strings.Join(heard, "\n"))
				}
				far.SetReadDeadline(time.Now().Add(patience))
				buf := make([]byte, 512)
				n, _, err := far.ReadFrom(buf)
				for err == nil && bytes.HasPrefix(buf[:n], []byte(theEnd)) {
					n, _, err = far.ReadFrom(buf)
				}
				if !bytes.Equal(buf[:n], own[28:]) {
					t.Errorf("a forged %s from %s: the other VM gets %q, %v", part.name, mac, buf[:n], err)
				}
			}
		}
		checkFabric(t, s.v, s.good.addr)
	})
}

// One MAC is on a bridge once: the second container that asks for it is told who has it, and the first keeps it.
// The NIC's own MAC is a container's as any other. Transparent links share nothing, and a MAC may be there twice.
func TestOneMACOnce(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 3}, vnetsim.VMConfig{})
		h := hosts[0]
		br := h.mustEnsure(h.spec(mode))
		first := h.container(0)
		e := first.endpoint(mode, Policy{SNAT: true})
		e.MAC = mustMAC(h.MAC)
		h.mustAttach(e)
		second := h.container(1)
		again := second.endpoint(mode, Policy{SNAT: true})
		again.MAC = mustMAC(h.MAC)
		before := h.kernelState()
		_, err := h.attach(again)
		if mode == ModeBridge {
			if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("the MAC %s is that of %s (%s) on azure0 already", h.MAC, e.Owner, first.addr)) {
				t.Errorf("the same MAC again: %v", err)
			}
			checkSame(t, "after the refusal", before, h.kernelState())
			again.MAC = br.MAC
			if _, err := h.attach(again); err == nil || !strings.Contains(err.Error(), "is that of azure0 on azure0 already") {
				t.Errorf("the bridge's MAC: %v", err)
			}
			again.MAC = nil
			h.mustAttach(again)
		} else if err != nil {
			t.Errorf("the same MAC on a link of its own: %v", err)
		}
		c := &checks{t: t}
		c.pings(true, first, second.addr, h.Primary, hosts[1].Primary, vnetsim.InternetAddr)
		c.pings(true, second, first.addr, h.Primary, hosts[1].Primary)
		c.hostPings(true, hosts[1], first.addr, second.addr, h.Primary)
		c.wait.Wait()
		if name, _, err := (func() (n, m string, err error) {
			err = h.Do(func() (err error) { n, m, err = h.NIC(t.Context(), h.MAC); return err })
			return
		})(); err != nil || name != "eth0" {
			t.Errorf("the NIC is %q, %v", name, err)
		}
		h.whole("with the NIC's MAC in a container")
		checkFabric(t, v, first.addr, second.addr)
	})
}

// A container heeds no router advertisement, and speaks IPv6 to nobody.
func TestIPv6GoesNowhere(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		a, b := h.running(0, mode, Policy{SNAT: true}), h.running(1, mode, Policy{SNAT: true})
		for _, c := range []*container{a, b} {
			if got := strings.TrimSpace(c.sh("cat /proc/sys/net/ipv6/conf/eth0/accept_ra")); got != "0" {
				t.Errorf("%s has accept_ra=%s", c.name, got)
			}
		}
		b.sh("sysctl -qw net.ipv6.conf.eth0.accept_dad=0 && ip -6 addr add fe80::b/64 dev eth0 nodad && ip -6 addr add fd00::b/64 dev eth0 nodad")
		a.sh("sysctl -qw net.ipv6.conf.eth0.accept_dad=0 && ip -6 addr add fe80::a/64 dev eth0 nodad && ip -6 addr add fd00::a/64 dev eth0 nodad")
		for _, to := range []string{"fe80::b%eth0", "fd00::b"} {
			if a.try("busybox ping -6 -q -c 1 -W 1 " + to) {
				t.Errorf("%s is reached", to)
			}
		}
		// Switching IPv6 off and on at run time ails nothing of ours.
		for _, off := range []string{"1", "0"} {
			h.sh("for f in all default eth0; do echo " + off + " >/proc/sys/net/ipv6/conf/$f/disable_ipv6; done")
			h.reconcile()
			h.whole("with disable_ipv6=" + off)
			if !a.pings(b.addr) {
				t.Errorf("disable_ipv6=%s cuts a container off", off)
			}
		}
		checkFabric(t, v)
	})
}
