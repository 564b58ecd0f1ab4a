// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"azurevnet/internal/vnetsim"
)

// do runs f in the container's network namespace.
func (c *container) do(f func() error) {
	c.t.Helper()
	ns, err := netns.GetFromPath(c.endpoint(ModeTransparent, Policy{}).Netns)
	if err != nil {
		c.t.Fatal(err)
	}
	defer ns.Close()
	if err := runInNamespace(ns, f); err != nil {
		c.t.Fatalf("in %s: %v", c.name, err)
	}
}

// openPacketSocket is a packet socket on the container's eth0.
func (c *container) openPacketSocket() (fd int) {
	c.t.Helper()
	c.do(func() (err error) {
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0x0300); err != nil { // ETH_P_ALL
			return err
		}
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: 0x0300, Ifindex: eth0.Index})
	})
	c.t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// heard are the frames that came in on a packet socket.
func heard(fd int) (frames [][]byte) {
	buf := make([]byte, 2048)
	for {
		n, from, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			return frames
		}
		if l, ok := from.(*unix.SockaddrLinklayer); ok && l.Pkttype != unix.PACKET_OUTGOING {
			frames = append(frames, bytes.Clone(buf[:n]))
		}
	}
}

// Spelling of frames.

func ether(dst, src net.HardwareAddr, kind uint16, payload ...byte) []byte {
	return append(binary.BigEndian.AppendUint16(append(bytes.Clone(dst), src...), kind), payload...)
}

func arp(op uint16, sha net.HardwareAddr, sip netip.Addr, tha net.HardwareAddr, tip netip.Addr) []byte {
	b := binary.BigEndian.AppendUint16([]byte{0, 1, 8, 0, 6, 4}, op)
	return append(append(append(append(b, sha...), sip.AsSlice()...), tha...), tip.AsSlice()...)
}

func ip4(src, dst netip.Addr, proto byte, payload []byte) []byte {
	b := make([]byte, 20)
	b[0], b[8], b[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(b[2:], uint16(20+len(payload)))
	copy(b[12:], src.AsSlice())
	copy(b[16:], dst.AsSlice())
	binary.BigEndian.PutUint16(b[10:], ^sum(b))
	return append(b, payload...)
}

func sum(b []byte) uint16 {
	var s uint32
	for ; len(b) > 1; b = b[2:] {
		s += uint32(binary.BigEndian.Uint16(b))
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

func udp4(from, to uint16, payload ...byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(payload)))
	return append(append(b, 0, 0), payload...)
}

func icmp4(kind, code byte, rest ...byte) []byte {
	b := append([]byte{kind, code, 0, 0}, rest...)
	binary.BigEndian.PutUint16(b[2:], ^sum(append(bytes.Clone(b), 0)))
	return b
}

func ip6(payload ...byte) []byte {
	b := make([]byte, 40)
	b[0], b[5], b[6], b[7] = 0x60, byte(len(payload)), 58, 255
	copy(b[8:], net.ParseIP("fe80::bad"))
	copy(b[24:], net.ParseIP("ff02::1"))
	return append(b, payload...)
}

// Whatever a container sends, no other container hears it, it does not come back, nothing foul leaves the VM,
// and all can still speak.
func TestAContainerHurtsNobody(t *testing.T) {
	inBothModes(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 3}, vnetsim.VMConfig{})
		h := hosts[0]
		br := h.mustEnsure(h.spec(mode))
		evil, good, third := h.running(0, mode, Policy{SNAT: true}), h.running(1, mode, Policy{SNAT: true}), h.running(2, mode, Policy{})
		all, zero := net.HardwareAddr{255, 255, 255, 255, 255, 255}, make(net.HardwareAddr, 6)
		mine, his, gw := MACFor(evil.addr), MACFor(good.addr), br.MAC
		if mode == ModeTransparent {
			gw = hostMAC(evil.addr)
		}
		absent := netip.MustParseAddr("10.240.77.77")
		marker := []byte("not for you")
		toHim := ip4(evil.addr, good.addr, unix.IPPROTO_UDP, udp4(9, 9, marker...))
		vlan := func(tpid uint16, frame []byte) []byte {
			return append(append(bytes.Clone(frame[:12]), byte(tpid>>8), byte(tpid), 0, 0), frame[12:]...)
		}
		frames := map[string][]byte{
			"straight to another container":       ether(his, mine, unix.ETH_P_IP, toHim...),
			"to all":                              ether(all, mine, unix.ETH_P_IP, toHim...),
			"to a group":                          ether(net.HardwareAddr{1, 0, 0x5e, 0, 0, 251}, mine, unix.ETH_P_IP, ip4(evil.addr, netip.MustParseAddr("224.0.0.251"), unix.IPPROTO_UDP, udp4(5353, 5353, marker...))...),
			"from another's MAC":                  ether(gw, his, unix.ETH_P_IP, toHim...),
			"from the gateway's MAC":              ether(his, gw, unix.ETH_P_IP, toHim...),
			"from another's address":              ether(gw, mine, unix.ETH_P_IP, ip4(good.addr, third.addr, unix.IPPROTO_UDP, udp4(9, 9, marker...))...),
			"from an address that nobody has":     ether(gw, mine, unix.ETH_P_IP, ip4(absent, hosts[1].Primary, unix.IPPROTO_UDP, udp4(9, 9, marker...))...),
			"from the host's address":             ether(gw, mine, unix.ETH_P_IP, ip4(h.Primary, hosts[1].Primary, unix.IPPROTO_UDP, udp4(9, 9, marker...))...),
			"from 127.0.0.1":                      ether(gw, mine, unix.ETH_P_IP, ip4(netip.MustParseAddr("127.0.0.1"), good.addr, unix.IPPROTO_UDP, udp4(9, 9, marker...))...),
			"to the host's 127.0.0.1":             ether(gw, mine, unix.ETH_P_IP, ip4(evil.addr, netip.MustParseAddr("127.0.0.1"), unix.IPPROTO_UDP, udp4(9, 9, marker...))...),
			"from 0.0.0.0 (DHCP discover)":        ether(all, mine, unix.ETH_P_IP, ip4(netip.IPv4Unspecified(), netip.MustParseAddr("255.255.255.255"), unix.IPPROTO_UDP, udp4(68, 67, marker...))...),
			"a DHCP offer":                        ether(all, mine, unix.ETH_P_IP, ip4(evil.addr, netip.MustParseAddr("255.255.255.255"), unix.IPPROTO_UDP, udp4(67, 68, marker...))...),
			"an ICMP redirect in Azure's name":    ether(gw, mine, unix.ETH_P_IP, ip4(evil.Gateway, good.addr, unix.IPPROTO_ICMP, icmp4(5, 1, append(evil.addr.AsSlice(), toHim[:28]...)...))...),
			"a VLAN tag":                          vlan(0x8100, ether(his, mine, unix.ETH_P_IP, toHim...)),
			"a provider's VLAN tag":               vlan(0x88a8, vlan(0x8100, ether(his, mine, unix.ETH_P_IP, toHim...))),
			"a router advertisement":              ether(net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}, mine, unix.ETH_P_IPV6, ip6(append([]byte{134, 0, 0, 0, 64, 0, 7, 8}, marker...)...)...),
			"IPv6 to the gateway":                 ether(gw, mine, unix.ETH_P_IPV6, ip6(append([]byte{128, 0, 0, 0}, marker...)...)...),
			"a BPDU":                              ether(net.HardwareAddr{1, 0x80, 0xc2, 0, 0, 0}, mine, 38, append([]byte{0x42, 0x42, 3, 0, 0, 0, 0}, make([]byte, 31)...)...),
			"LLDP":                                ether(net.HardwareAddr{1, 0x80, 0xc2, 0, 0, 14}, mine, 0x88cc, append([]byte{2, 7, 4}, make([]byte, 30)...)...),
			"802.3":                               ether(his, mine, 40, append([]byte{0xaa, 0xaa, 3, 0, 0, 0}, make([]byte, 34)...)...),
			"another protocol":                    ether(gw, mine, 0x88b5, make([]byte, 46)...),
			"ARP: who has another":                ether(all, mine, unix.ETH_P_ARP, arp(1, mine, evil.addr, zero, good.addr)...),
			"ARP: straight to another":            ether(his, mine, unix.ETH_P_ARP, arp(1, mine, evil.addr, zero, good.addr)...),
			"ARP: I am another":                   ether(all, mine, unix.ETH_P_ARP, arp(1, mine, good.addr, zero, good.addr)...),
			"ARP: another is at mine, answered":   ether(all, mine, unix.ETH_P_ARP, arp(2, mine, good.addr, all, good.addr)...),
			"ARP: the gateway is at mine":         ether(his, mine, unix.ETH_P_ARP, arp(2, mine, evil.Gateway, his, good.addr)...),
			"ARP: the host is at mine":            ether(gw, mine, unix.ETH_P_ARP, arp(2, mine, h.Primary, gw, h.Primary)...),
			"ARP: mine is at another's MAC":       ether(all, mine, unix.ETH_P_ARP, arp(1, his, evil.addr, zero, evil.Gateway)...),
			"ARP: a probe":                        ether(all, mine, unix.ETH_P_ARP, arp(1, mine, netip.IPv4Unspecified(), zero, good.addr)...),
			"ARP: gratuitous, of its own":         ether(all, mine, unix.ETH_P_ARP, arp(1, mine, evil.addr, zero, evil.addr)...),
			"ARP: RARP's kind":                    ether(all, mine, 0x8035, arp(3, mine, evil.addr, mine, evil.addr)...),
			"too short to be anything":            ether(gw, mine, unix.ETH_P_IP, 0x45),
			"a header that lies about its length": ether(gw, mine, unix.ETH_P_IP, append([]byte{0x4f}, toHim[1:]...)...),
		}
		for kind, frame := range map[string][]byte{
			"IP":                     ether(gw, mine, unix.ETH_P_IP, ip4(absent, h.Primary, unix.IPPROTO_UDP, udp4(9, heardAt, marker...))...),
			"ARP":                    ether(gw, mine, unix.ETH_P_ARP, arp(1, mine, absent, zero, h.Primary)...),
			"a router advertisement": ether(gw, mine, unix.ETH_P_IPV6, ip6(append([]byte{134, 0, 0, 0, 64, 0, 7, 8}, make([]byte, 8)...)...)...),
			"LLDP":                   ether(gw, mine, 0x88cc, append([]byte{2, 7, 4}, make([]byte, 30)...)...),
		} {
			for last := range byte(16) { // the kernel has ways of their own for some of the reserved groups
				group := append([]byte{1, 0x80, 0xc2, 0, 0, last}, frame[6:]...)
				frames[fmt.Sprintf("%s to the reserved group %02x", kind, last)] = group
			}
		}
		// As a kernel has it that nobody configured: the host believes what a router says, and checks no source.
		for _, dev := range []string{"all", "default", hostEnd(evil), hostEnd(good)} {
			h.sh("echo 1 >/proc/sys/net/ipv6/conf/" + dev + "/accept_ra")
			if mode == ModeBridge {
				h.sh("echo 0 >/proc/sys/net/ipv4/conf/" + dev + "/rp_filter")
			}
		}
		ear := h.listenUDP(heardAt)
		talk := func(when string) {
			t.Helper()
			c := &checks{t: t}
			c.pings(true, good, third.addr, evil.addr, h.Primary, hosts[1].Primary, vnetsim.InternetAddr)
			c.pings(true, evil, good.addr, h.Primary, hosts[1].Primary)
			c.hostPings(true, h, good.addr, evil.addr)
			c.hostPings(true, hosts[1], good.addr, h.Primary)
			c.wait.Wait()
			if t.Failed() {
				t.Fatal(when)
			}
		}
		for _, call := range []string{"0", "1"} {
			h.sh("echo " + call + " >/proc/sys/net/bridge/bridge-nf-call-iptables")
			talk("before, with call-iptables " + call)
			neighbours := func() string { return h.sh("ip -4 neigh show | grep -v 12:34:56 | sed 's/ used.*//' | sort") }
			before := neighbours()
			out, ears, back := evil.openPacketSocket(), []int{good.openPacketSocket(), third.openPacketSocket()}, evil.openPacketSocket()
			for name, frame := range frames {
				for len(frame) < 14 {
					frame = append(frame, 0)
				}
				heard(back)
				if _, err := unix.Write(out, frame); err != nil {
					t.Errorf("%s: %v", name, err)
				}
				time.Sleep(10 * time.Millisecond)
				for _, ear := range ears {
					for _, f := range heard(ear) {
						t.Errorf("call-iptables %s, %s: another container hears % x", call, name, f)
					}
				}
				for _, f := range heard(back) {
					if bytes.Equal(f[6:12], frame[6:12]) || bytes.Contains(f, marker) && !isICMPError(f) {
						t.Errorf("call-iptables %s, %s: it comes back: % x", call, name, f)
					}
				}
			}
			talk("after, with call-iptables " + call)
			ear.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			if n, _, err := ear.ReadFrom(make([]byte, 64)); err == nil {
				t.Errorf("call-iptables %s: the host hears %d bytes from an address that the container does not have", call, n)
			}
			if routes := h.sh("ip -6 route show default; ip -6 addr show scope global"); routes != "" {
				t.Errorf("call-iptables %s: the host believes a container that it is an IPv6 router: %s", call, routes)
			}
			if after := neighbours(); after != before {
				t.Errorf("the host's neighbour entries changed from\n%s to\n%s", before, after)
			}
		}
		h.whole("after all that")
		checkFabric(t, v, good.addr, evil.addr)
	})
}

// heardAt is a UDP port at which the host listens.
const heardAt = 4242

// listenUDP is a socket of the host that nobody waits for.
func (h *host) listenUDP(port int) (conn net.PacketConn) {
	h.t.Helper()
	if err := h.Do(func() (err error) { conn, err = net.ListenPacket("udp4", fmt.Sprintf(":%d", port)); return err }); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { conn.Close() })
	return conn
}

// hostEnd is the name of a container's link on the host.
func hostEnd(c *container) string {
	link, _ := linkNames("cni/net/" + c.name + "/eth0")
	return link
}

// isICMPError is what a router says of a packet, with the packet in it.
func isICMPError(f []byte) bool {
	return len(f) > 34 && f[12] == 8 && f[13] == 0 && f[23] == unix.IPPROTO_ICMP && (f[34] == 3 || f[34] == 11)
}

// One MAC is on a bridge once: the second container that asks for it is told who has it, and the first keeps it.
// The NIC's own MAC is a container's as any other. Transparent links share nothing, and a MAC may be there twice.
func TestOneMACOnce(t *testing.T) {
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
