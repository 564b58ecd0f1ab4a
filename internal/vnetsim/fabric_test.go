// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"bytes"
	"encoding/binary"
	"maps"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// send puts frames on a NIC of the VM as they are, in their order.
func send(t *testing.T, vm *VM, nic string, frames ...[]byte) {
	t.Helper()
	err := vm.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		link, err := net.InterfaceByName(nic)
		if err != nil {
			return err
		}
		for _, frame := range frames {
			if err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: link.Index}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func hardware(s string) net.HardwareAddr {
	mac, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return mac
}

func ethernet(dst, src string, ethertype uint16, payload ...[]byte) []byte {
	frame := append(append([]byte{}, hardware(dst)...), hardware(src)...)
	return append(binary.BigEndian.AppendUint16(frame, ethertype), bytes.Join(payload, nil)...)
}

// arp is the ARP request of a sender for an address.
func arp(mac string, ip, target netip.Addr) []byte {
	return bytes.Join([][]byte{{0, 1, 8, 0, 6, 4, 0, 1}, hardware(mac), ip.AsSlice(), make([]byte, 6), target.AsSlice()}, nil)
}

// ipv4 is a packet with a header of UDP or TCP that has a destination port.
func ipv4(src, dst netip.Addr, proto byte, port uint16) []byte {
	h := []byte{0x45, 0, 0, 40, 0, 0, 0, 0, 64, proto, 0, 0}
	h = append(append(h, src.AsSlice()...), dst.AsSlice()...)
	var sum uint32
	for i := 0; i < len(h); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(h[i:]))
	}
	binary.BigEndian.PutUint16(h[10:], ^uint16(sum>>16+sum))
	h = binary.BigEndian.AppendUint16(append(h, 0x30, 0x39), port)
	return append(h, make([]byte, 16)...)
}

// ipv6 is a packet without a next header.
func ipv6(src, dst netip.Addr) []byte {
	return bytes.Join([][]byte{{0x60, 0, 0, 0, 0, 0, 59, 255}, src.AsSlice(), dst.AsSlice()}, nil)
}

// TestFramesAreCounted sends single frames. Each moves the counter of its
// offence or the counter of its source address, and no other.
func TestFramesAreCounted(t *testing.T) {
	v, vms := newVNet(t, VMConfig{Secondaries: 2, NICs: []NICConfig{{Subnet: netip.MustParsePrefix("10.1.2.0/24")}}}, VMConfig{})
	vm, other := vms[0], vms[1].Primary
	const arpType, ip4, ip6, vlan, lldp = 0x0806, 0x0800, 0x86dd, 0x8100, 0x88cc
	const all, foreign = "ff:ff:ff:ff:ff:ff", "02:00:00:00:00:01"
	mac, own, secondary, second := vm.MAC, vm.Primary, vm.Secondaries()[0], vm.NICs()[1]
	stranger, zero, broadcast := netip.MustParseAddr("10.240.200.1"), netip.IPv4Unspecified(), netip.MustParseAddr("255.255.255.255")
	mdns, allNodes := netip.MustParseAddr("224.0.0.251"), netip.MustParseAddr("ff02::1")
	none := netip.Addr{}
	// The last frame on each NIC. When it is counted, so is the frame before it.
	last := vm.Secondaries()[1]
	covered := map[string]bool{}
	for _, tt := range []struct {
		name     string
		frame    []byte
		offence  string     // empty: none
		accepted netip.Addr // none: the frame is not accepted, or not IPv4
	}{
		{"IP from a foreign MAC", ethernet(FabricMAC, foreign, ip4, ipv4(own, other, 17, 9)), "source_mac", none},
		{"IP from the fabric's MAC", ethernet(FabricMAC, FabricMAC, ip4, ipv4(own, other, 17, 9)), "source_mac", none},
		{"IP from another NIC's MAC", ethernet(FabricMAC, second.MAC, ip4, ipv4(own, other, 17, 9)), "source_mac", none},
		{"ARP from a foreign MAC", ethernet(all, foreign, arpType, arp(mac, own, other)), "source_mac", none},
		{"IPv6 from a foreign MAC", ethernet("33:33:00:00:00:01", foreign, ip6, ipv6(linkLocal(mac), allNodes)), "source_mac", none},
		{"ARP that names a foreign MAC", ethernet(all, mac, arpType, arp(foreign, own, other)), "arp_mac", none},
		{"ARP that names a foreign address", ethernet(all, mac, arpType, arp(mac, stranger, other)), "arp_ip", none},
		{"ARP that names another VM's address", ethernet(all, mac, arpType, arp(mac, other, own)), "arp_ip", none},
		{"ARP that names another NIC's address", ethernet(all, mac, arpType, arp(mac, second.Primary, other)), "arp_ip", none},
		{"ARP to a foreign MAC", ethernet(foreign, mac, arpType, arp(mac, own, other)), "destination", none},
		{"ARP for another", ethernet(all, mac, arpType, arp(mac, own, other)), "", none},
		{"ARP to the fabric's MAC", ethernet(FabricMAC, mac, arpType, arp(mac, own, other)), "", none},
		{"ARP for its own primary", ethernet(all, mac, arpType, arp(mac, own, own)), "", none},
		{"ARP of its own secondary", ethernet(all, mac, arpType, arp(mac, secondary, other)), "", none},
		{"ARP probe", ethernet(all, mac, arpType, arp(mac, zero, own)), "", none},
		{"IP from a foreign address", ethernet(FabricMAC, mac, ip4, ipv4(stranger, other, 17, 9)), "source_ip", none},
		{"IP from a VM's address", ethernet(FabricMAC, mac, ip4, ipv4(other, own, 17, 9)), "source_ip", none},
		{"IP from another NIC's address", ethernet(FabricMAC, mac, ip4, ipv4(second.Primary, other, 17, 9)), "source_ip", none},
		{"IP from no address", ethernet(FabricMAC, mac, ip4, ipv4(zero, other, 17, 9)), "source_ip", none},
		{"IP from its primary", ethernet(FabricMAC, mac, ip4, ipv4(own, other, 17, 9)), "", own},
		{"IP from its secondary", ethernet(FabricMAC, mac, ip4, ipv4(secondary, other, 17, 9)), "", secondary},
		{"IP multicast", ethernet("01:00:5e:00:00:fb", mac, ip4, ipv4(own, mdns, 17, 5353)), "multicast", none},
		{"IP broadcast", ethernet(all, mac, ip4, ipv4(own, broadcast, 17, 137)), "multicast", none},
		{"DHCP", ethernet(all, mac, ip4, ipv4(zero, broadcast, 17, 67)), "", none},
		{"IP to another MAC", ethernet(vms[1].MAC, mac, ip4, ipv4(own, other, 17, 9)), "destination", none},
		{"LLDP", ethernet("01:80:c2:00:00:0e", mac, lldp, make([]byte, 46)), "destination", none},
		{"IPv6 from a container's address", ethernet("33:33:00:00:00:01", mac, ip6, ipv6(netip.MustParseAddr("fe80::1"), allNodes)), "ipv6", none},
		{"IPv6 from the NIC's address", ethernet("33:33:00:00:00:01", mac, ip6, ipv6(linkLocal(mac), allNodes)), "", none},
		{"neither ARP nor IP", ethernet(FabricMAC, mac, 0x88b5, make([]byte, 46)), "protocol", none},
		{"IP in a VLAN", ethernet(FabricMAC, mac, vlan, []byte{0, 7, 8, 0}, ipv4(own, other, 17, 9)), "protocol", none},
		{"IP with a priority tag", ethernet(FabricMAC, mac, vlan, []byte{0x20, 0, 8, 0}, ipv4(own, other, 17, 9)), "protocol", none},
		{"HTTP to the host agent, secondary", ethernet(FabricMAC, mac, ip4, ipv4(secondary, HostAgentAddr, 6, 80)), "host_agent", none},
		{"the agent's other port, secondary", ethernet(FabricMAC, mac, ip4, ipv4(secondary, HostAgentAddr, 6, 32526)), "host_agent", none},
		{"HTTP to the host agent, primary", ethernet(FabricMAC, mac, ip4, ipv4(own, HostAgentAddr, 6, 80)), "", own},
		{"DNS to the host agent, secondary", ethernet(FabricMAC, mac, ip4, ipv4(secondary, HostAgentAddr, 17, 53)), "", secondary},
		{"to an address that nobody has", ethernet(FabricMAC, mac, ip4, ipv4(own, stranger, 17, 9)), "", own},
		{"to the internet without SNAT", ethernet(FabricMAC, mac, ip4, ipv4(secondary, InternetAddr, 17, 9)), "", secondary},
		{"IMDS without SNAT", ethernet(FabricMAC, mac, ip4, ipv4(secondary, IMDSAddr, 6, 80)), "", secondary},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := v.ResetViolations(); err != nil {
				t.Fatal(err)
			}
			wantAccepted(t, v.Accepted, map[netip.Addr]uint64{})
			send(t, vm, "eth0", tt.frame, ethernet(FabricMAC, mac, ip4, ipv4(last, stranger, 17, 9)))
			accepted := map[netip.Addr]uint64{last: 1}
			if tt.accepted.IsValid() {
				accepted[tt.accepted]++
			}
			offences := map[string]uint64{}
			if tt.offence != "" {
				offences[tt.offence] = 1
				covered[tt.offence] = true
			}
			wantAccepted(t, vm.Accepted, accepted)
			wantViolations(t, v, offences)
		})
	}
	for _, kind := range violations {
		if !covered[kind] {
			t.Errorf("no frame commits %s", kind)
		}
	}

	if err := v.ResetViolations(); err != nil {
		t.Fatal(err)
	}
	send(t, vm, "eth1", ethernet(FabricMAC, second.MAC, ip4, ipv4(own, stranger, 17, 9)),
		ethernet(FabricMAC, second.MAC, ip4, ipv4(second.Primary, stranger, 17, 9)))
	wantAccepted(t, vm.Accepted, map[netip.Addr]uint64{second.Primary: 1})
	wantViolations(t, v, map[string]uint64{"source_ip": 1})
	wantAccepted(t, v.Strangers, map[netip.Addr]uint64{own: 1})
}

// wantAccepted waits for the counters as wantViolations does.
func wantAccepted(t *testing.T, accepted func() (map[netip.Addr]uint64, error), want map[netip.Addr]uint64) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		got, err := accepted()
		if err != nil {
			t.Fatal(err)
		}
		if maps.Equal(want, got) {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("accepted %v, want %v", got, want)
			return
		}
	}
}

func TestCountersAreOfOneVMAndSurvivePowerCuts(t *testing.T) {
	v, vms := newVNet(t, VMConfig{}, VMConfig{})
	vm, stranger := vms[0], netip.MustParseAddr("10.240.200.1")
	send(t, vm, "eth0", ethernet(FabricMAC, "02:00:00:00:00:01", 0x0800, ipv4(vm.Primary, stranger, 17, 9)),
		ethernet(FabricMAC, vm.MAC, 0x0800, ipv4(vm.Primary, stranger, 17, 9)))
	wantAccepted(t, v.Accepted, map[netip.Addr]uint64{vm.Primary: 1})
	wantAccepted(t, vms[1].Accepted, map[netip.Addr]uint64{})
	for i, want := range []uint64{1, 0} {
		if got, err := vms[i].Violations(); err != nil || got["source_mac"] != want {
			t.Errorf("%s: %v, %v; want source_mac %d", vms[i].Name, got, err, want)
		}
	}
	if err := vm.PowerCut(); err != nil {
		t.Fatal(err)
	}
	if err := vm.Boot(); err != nil {
		t.Fatal(err)
	}
	wantViolations(t, v, map[string]uint64{"source_mac": 1})
	wantAccepted(t, v.Accepted, map[netip.Addr]uint64{vm.Primary: 1})
}

// TestAcceptedIsExact sends from many addresses, on all processors at once. All
// the frames together fit the queue that a processor has for veths.
func TestAcceptedIsExact(t *testing.T) {
	const secondaries, rounds = 100, 2
	v, vms := newVNet(t, VMConfig{Secondaries: secondaries}, VMConfig{Secondaries: secondaries})
	want := map[netip.Addr]uint64{}
	var wg sync.WaitGroup
	for _, vm := range vms {
		addrs := vm.NICs()[0].addresses()
		var frames [][]byte
		for range rounds {
			for _, a := range addrs {
				frames = append(frames, ethernet(FabricMAC, vm.MAC, 0x0800, ipv4(a, netip.MustParseAddr("10.240.200.1"), 17, 9)))
			}
		}
		for _, a := range addrs {
			want[a] = 2 * rounds
		}
		for range 2 {
			wg.Go(func() { send(t, vm, "eth0", frames...) })
		}
	}
	wg.Wait()
	wantAccepted(t, v.Accepted, want)
	wantViolations(t, v, map[string]uint64{})
}

func TestARPIsAnsweredWithTheFabricsMAC(t *testing.T) {
	_, vms := newVNet(t, VMConfig{Secondaries: 1}, VMConfig{})
	var wg sync.WaitGroup // each waits its second out
	for name, tt := range map[string]struct {
		target string
		want   bool
	}{
		"the gateway":        {"10.240.0.1", true},
		"another VM":         {vms[1].Primary.String(), true},
		"nobody":             {"10.240.200.1", true},
		"outside the subnet": {"10.99.0.1", true},
		"its own secondary":  {vms[0].Secondaries()[0].String(), true},
		"its own primary":    {vms[0].Primary.String(), false},
	} {
		wg.Go(func() {
			out, _ := vms[0].Run(t.Context(), "busybox", "arping", "-c", "1", "-w", "1", "-I", "eth0", tt.target)
			if got := strings.Contains(out, FabricMAC); got != tt.want {
				t.Errorf("%s: answered %t, want %t: %s", name, got, tt.want, out)
			}
		})
	}
	wg.Wait()
}
