// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"azurevnet/internal/vnetsim"
)

// flood is what a container sends very often.
type flood struct {
	name  string
	frame func(n int) []byte
}

func floods(evil *container, gw net.HardwareAddr, far netip.Addr) []flood {
	mine := MACFor(evil.addr)
	absent := func(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 240, byte(128 + n>>8&127), byte(n)}) }
	ip := func(packet []byte) []byte { return ether(gw, mine, unix.ETH_P_IP, packet...) }
	hello := []byte("anybody?")
	return []flood{
		{"ARP requests", func(n int) []byte {
			return ether(toAll, mine, unix.ETH_P_ARP, arp(1, mine, evil.addr, zeroMAC, absent(n))...)
		}},
		{"ARP in as many names", func(n int) []byte {
			return ether(toAll, mine, unix.ETH_P_ARP, arp(1, mine, absent(n), zeroMAC, evil.Gateway)...)
		}},
		{"frames from as many MACs", func(n int) []byte {
			return ether(gw, net.HardwareAddr{2, 0, 0, byte(n >> 16), byte(n >> 8), byte(n)}, unix.ETH_P_IP, ip4(evil.addr, far, unix.IPPROTO_UDP, udp4(9, 9, hello...))...)
		}},
		{"packets to as many absent addresses", func(n int) []byte { return ip(ip4(evil.addr, absent(n), unix.IPPROTO_UDP, udp4(9, 9, hello...))) }},
		{"packets from as many addresses", func(n int) []byte { return ip(ip4(absent(n), far, unix.IPPROTO_UDP, udp4(9, 9, hello...))) }},
		{"UDP flows", func(n int) []byte {
			return ip(ip4(evil.addr, far, unix.IPPROTO_UDP, udp4(uint16(1024+n), uint16(1024+n*7), hello...)))
		}},
		{"TCP connections that are never answered", func(n int) []byte {
			return ip(segment{netip.AddrPortFrom(evil.addr, uint16(1024+n)), netip.AddrPortFrom(absent(n), 80), uint32(n), 0}.packet(syn, nil))
		}},
		{"pings that die on the way", func(n int) []byte {
			p := ip4(evil.addr, far, unix.IPPROTO_ICMP, echoRequest(hello...))
			p[8] = 1
			return ip(append(withHeaderSum(p[:20]), p[20:]...))
		}},
	}
}

// A container that sends thousands of frames, more than the kernel has neighbour entries, costs nobody a packet, keeps
// nobody from new peers, and leaves no entry for what it made up.
func TestAFloodHarmsNobody(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{Secondaries: 8})
		h, far := hosts[0], hosts[1]
		gw := h.mustEnsure(h.spec(mode)).MAC
		far.ensureAll(mode)
		evil, good := h.running(0, mode, Policy{SNAT: true}), h.running(1, mode, Policy{SNAT: true})
		if mode == ModeTransparent {
			gw = hostMAC(evil.addr)
		}
		out, frames := evil.openPacketSocket(), 2000
		if soaking {
			frames = 20_000
		}
		before := h.sh("bridge fdb show")
		quiet, _ := pingsWhile(t, good.place(), far.Primary, func() { time.Sleep(50 * time.Millisecond) })
		for i, f := range floods(evil, gw, far.Primary) {
			t.Logf("FIGURE hostile container: %d frames of floods", frames)
			times, lost := pingsWhile(t, good.place(), far.Primary, func() {
				for n := range frames {
					sendAtOnce(t, out, f.frame(n))
				}
			})
			t.Logf("%s: the median of %d pings of another container takes %v, and %v without the flood", f.name, len(times), median(times), median(quiet))
			if lost*100 > lost+len(times) { // the kernel's own queue for a CPU may drop one
				t.Errorf("%s: another container loses %d pings of %d", f.name, lost, lost+len(times))
			}
			c := &checks{t: t}
			c.reaches(good.place(), far.running(i, mode, Policy{SNAT: true}).addr) // a new peer
			c.reaches(h.place(), far.Primary, good.addr)
			c.reaches(far.place(), good.addr, h.Primary)
			c.wait.Wait()
			if got, err := strconv.Atoi(strings.TrimSpace(h.sh("ip -4 neigh show | wc -l"))); err != nil || got > 20 {
				t.Errorf("%s: the host has %d neighbours: %v", f.name, got, err)
			}
		}
		checkSame(t, "the host's forwarding entries", before, h.sh("bridge fdb show"))
		t.Logf("the host tracks %s flows of at most %s", strings.TrimSpace(h.sh("conntrack -C")), strings.TrimSpace(h.sh("cat /proc/sys/net/netfilter/nf_conntrack_max")))
		checkFabric(t, v, good.addr, evil.addr)
	})
}

// sendAtOnce sends a frame as soon as the socket takes it.
func sendAtOnce(t *testing.T, fd int, frame []byte) {
	for {
		_, err := unix.Write(fd, frame)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.ENOBUFS) {
			time.Sleep(100 * time.Microsecond)
			continue
		}
		if err != nil {
			t.Error(err)
		}
		return
	}
}

// pingsWhile pings, one ping after the other, while f runs, and twenty times at least. It returns how long each took, and
// how many were not answered.
func pingsWhile(t *testing.T, from place, to netip.Addr, f func()) (times []time.Duration, lost int) {
	done := make(chan bool)
	go func() {
		defer close(done)
		f()
	}()
	var conn net.PacketConn
	if err := from.do(func() (err error) { conn, err = net.ListenPacket("ip4:icmp", "0.0.0.0"); return err }); err != nil {
		<-done // it uses a socket that is closed with the test
		t.Fatalf("%s: %v", from.name, err)
	}
	defer conn.Close()
	buf := make([]byte, 512)
	for seq, running := uint16(0), true; running || seq < 20; seq++ {
		request := icmp4(8, 0, 0x7e, 0x58, byte(seq>>8), byte(seq))
		start := time.Now()
		_, err := conn.WriteTo(request, &net.IPAddr{IP: to.AsSlice()})
		_ = conn.SetReadDeadline(start.Add(5 * time.Second))
		for err == nil {
			var n int
			if n, _, err = conn.ReadFrom(buf); err == nil && n >= 8 && buf[0] == 0 && binary.BigEndian.Uint16(buf[6:]) == seq {
				break
			}
		}
		if err != nil {
			lost++
		} else {
			times = append(times, time.Since(start))
		}
		select {
		case <-done:
			running = false
		default:
		}
	}
	return times, lost
}

func median(times []time.Duration) time.Duration {
	if len(times) == 0 {
		return 0
	}
	slices.Sort(times)
	return times[len(times)/2]
}
