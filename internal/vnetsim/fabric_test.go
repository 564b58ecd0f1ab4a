// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// send puts a frame on the VM's eth0 as it is.
func send(t *testing.T, vm *VM, frame []byte) {
	t.Helper()
	err := vm.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: eth0.Index})
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

func TestOffencesAreCounted(t *testing.T) {
	v, vms := newVNet(t, VMConfig{Secondaries: 1}, VMConfig{})
	vm, other := vms[0], vms[1].Primary
	const arpType, ip4, ip6 = 0x0806, 0x0800, 0x86dd
	const all, foreign = "ff:ff:ff:ff:ff:ff", "02:00:00:00:00:01"
	mac, own, secondary := vm.MAC, vm.Primary, vm.Secondaries()[0]
	stranger, zero := netip.MustParseAddr("10.240.200.1"), netip.IPv4Unspecified()
	mdns, allNodes := netip.MustParseAddr("224.0.0.251"), netip.MustParseAddr("ff02::1")
	for name, tt := range map[string]struct {
		frame []byte
		want  string // counter; empty: no offence
	}{
		"IP from a foreign MAC":             {ethernet(FabricMAC, foreign, ip4, ipv4(own, other, 17, 9)), "source_mac"},
		"ARP from a foreign MAC":            {ethernet(all, foreign, arpType, arp(mac, own, other)), "source_mac"},
		"ARP that names a foreign MAC":      {ethernet(all, mac, arpType, arp(foreign, own, other)), "arp_mac"},
		"ARP that names a foreign address":  {ethernet(all, mac, arpType, arp(mac, stranger, other)), "arp_ip"},
		"ARP for another":                   {ethernet(all, mac, arpType, arp(mac, own, other)), ""},
		"ARP for its own primary":           {ethernet(all, mac, arpType, arp(mac, own, own)), ""},
		"ARP of its own secondary":          {ethernet(all, mac, arpType, arp(mac, secondary, other)), ""},
		"ARP probe":                         {ethernet(all, mac, arpType, arp(mac, zero, own)), ""},
		"IP from a foreign address":         {ethernet(FabricMAC, mac, ip4, ipv4(stranger, other, 17, 9)), "source_ip"},
		"IP from a VM's address":            {ethernet(FabricMAC, mac, ip4, ipv4(other, own, 17, 9)), "source_ip"},
		"IP from its secondary":             {ethernet(FabricMAC, mac, ip4, ipv4(secondary, other, 17, 9)), ""},
		"IP multicast":                      {ethernet("01:00:5e:00:00:fb", mac, ip4, ipv4(own, mdns, 17, 5353)), "multicast"},
		"IP broadcast":                      {ethernet(all, mac, ip4, ipv4(own, netip.MustParseAddr("255.255.255.255"), 17, 137)), "multicast"},
		"DHCP":                              {ethernet(all, mac, ip4, ipv4(zero, netip.MustParseAddr("255.255.255.255"), 17, 67)), ""},
		"IP to another MAC":                 {ethernet(vms[1].MAC, mac, ip4, ipv4(own, other, 17, 9)), "destination"},
		"IPv6 from a container's address":   {ethernet("33:33:00:00:00:01", mac, ip6, ipv6(netip.MustParseAddr("fe80::1"), allNodes)), "ipv6"},
		"IPv6 from the NIC's address":       {ethernet("33:33:00:00:00:01", mac, ip6, ipv6(linkLocal(mac), allNodes)), ""},
		"LLDP":                              {ethernet("01:80:c2:00:00:0e", mac, 0x88cc, make([]byte, 46)), "destination"},
		"neither ARP nor IP":                {ethernet(FabricMAC, mac, 0x88b5, make([]byte, 46)), "protocol"},
		"HTTP to the host agent, secondary": {ethernet(FabricMAC, mac, ip4, ipv4(secondary, HostAgentAddr, 6, 80)), "host_agent"},
		"HTTP to the host agent, primary":   {ethernet(FabricMAC, mac, ip4, ipv4(own, HostAgentAddr, 6, 80)), ""},
		"DNS to the host agent, secondary":  {ethernet(FabricMAC, mac, ip4, ipv4(secondary, HostAgentAddr, 17, 53)), ""},
		"to an address that nobody has":     {ethernet(FabricMAC, mac, ip4, ipv4(own, stranger, 17, 9)), ""},
		"to the internet without SNAT":      {ethernet(FabricMAC, mac, ip4, ipv4(secondary, InternetAddr, 17, 9)), ""},
		"IMDS without SNAT":                 {ethernet(FabricMAC, mac, ip4, ipv4(secondary, IMDSAddr, 6, 80)), ""},
	} {
		if err := v.ResetViolations(); err != nil {
			t.Fatal(err)
		}
		send(t, vm, tt.frame)
		want := map[string]uint64{}
		if tt.want != "" {
			want[tt.want] = 1
		}
		t.Run(name, func(t *testing.T) { wantViolations(t, v, want) })
	}
	if err := v.ResetViolations(); err != nil {
		t.Fatal(err)
	}
	send(t, vm, ethernet(FabricMAC, foreign, ip4, ipv4(own, other, 17, 9)))
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
