// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"azurevnet/internal/vnetsim"
)

// The table of attacks. Packets of which the table says nothing else go to a port of the host.

func (s *scene) attacks() (all []attack) {
	for _, part := range [][]attack{
		s.destinationMACs(), s.sourceMACs(), s.sourceAddresses(), s.destinationAddresses(), s.arps(), s.otherTypes(), s.tags(),
		s.ipv6(), s.icmps(), s.connections(), s.protocols(), s.options(), s.fragments(), s.malformed(), s.hostAgent(), s.reservedGroups(),
	} {
		all = append(all, part...)
	}
	return all
}

// frame is one frame of evil's own MAC.
func (s *scene) frame(dst net.HardwareAddr, kind uint16, payload ...byte) [][]byte {
	return [][]byte{ether(dst, s.mine, kind, payload...)}
}

// sends is packets to the gateway, each in a frame of evil's own MAC.
func (s *scene) sends(packets ...[]byte) (frames [][]byte) {
	for _, p := range packets {
		frames = append(frames, ether(s.gw, s.mine, unix.ETH_P_IP, p...))
	}
	return frames
}

func addr(a string) netip.Addr { return netip.MustParseAddr(a) }

// packet is a datagram that nobody must hear.
func packet(from, to netip.Addr) []byte { return packetFor(anybody, from, to) }

func packetFor(secret ears, from, to netip.Addr) []byte {
	return ip4(from, to, unix.IPPROTO_UDP, udp4(9, heardAt, mark(secret)...))
}

// own is a datagram of evil's own address to good, which good may get from the gateway alone.
func (s *scene) own() []byte { return packet(s.evil.addr, s.good.addr) }

// toGroups are those who must not hear what evil sends to all in its own name. Behind a transparent link is the host alone,
// which may hear it.
func (s *scene) toGroups() ears {
	if s.mode == ModeTransparent {
		return anybody &^ theHost
	}
	return anybody
}

func (s *scene) destinationMACs() []attack {
	himself, all := s.linkMAC(hostEnd(s.good)), s.toGroups()
	return []attack{
		{"straight to another container", anybody, s.frame(s.his, unix.ETH_P_IP, s.own()...)},
		{"to another container's host end", anybody, s.frame(himself, unix.ETH_P_IP, s.own()...)},
		{"to its own MAC", anybody, s.frame(s.mine, unix.ETH_P_IP, s.own()...)},
		{"to the NIC's MAC", anybody, s.frame(mustMAC(s.h.MAC), unix.ETH_P_IP, s.own()...)},
		{"to the fabric's MAC", anybody, s.frame(mustMAC(vnetsim.FabricMAC), unix.ETH_P_IP, s.own()...)},
		{"to a MAC that nobody has", anybody, s.frame(mustMAC("02:00:00:00:00:99"), unix.ETH_P_IP, s.own()...)},
		{"to the zero MAC", anybody, s.frame(zeroMAC, unix.ETH_P_IP, s.own()...)},
		{"to all MACs, and one address", anybody, s.frame(toAll, unix.ETH_P_IP, s.own()...)},
		{"to all MACs, and the host's address", all, s.frame(toAll, unix.ETH_P_IP, packetFor(all, s.evil.addr, s.h.Primary)...)},
		{"to a group's MAC, and one address", anybody, s.frame(mustMAC("01:00:5e:00:00:01"), unix.ETH_P_IP, s.own()...)},
		{"mDNS", anybody, s.frame(mustMAC("01:00:5e:00:00:fb"), unix.ETH_P_IP, ip4(s.evil.addr, addr("224.0.0.251"), unix.IPPROTO_UDP, udp4(5353, 5353, mark(anybody)...))...)},
		{"SSDP", anybody, s.frame(mustMAC("01:00:5e:7f:ff:fa"), unix.ETH_P_IP, ip4(s.evil.addr, addr("239.255.255.250"), unix.IPPROTO_UDP, udp4(1900, 1900, mark(anybody)...))...)},
		{"DHCP discover", anybody, s.frame(toAll, unix.ETH_P_IP, ip4(addr("0.0.0.0"), addr("255.255.255.255"), unix.IPPROTO_UDP, udp4(68, 67, mark(anybody)...))...)},
		{"DHCP offer", all, s.frame(toAll, unix.ETH_P_IP, ip4(s.evil.addr, addr("255.255.255.255"), unix.IPPROTO_UDP, udp4(67, 68, mark(all)...))...)},
		{"DHCP offer in the gateway's name", anybody, s.sends(ip4(s.evil.Gateway, s.good.addr, unix.IPPROTO_UDP, udp4(67, 68, mark(anybody)...)))},
	}
}

// sourceMACs are frames from evil's own address and another MAC.
func (s *scene) sourceMACs() (all []attack) {
	for name, mac := range map[string]net.HardwareAddr{
		"another container's": s.his, "the gateway's": s.gw, "the NIC's": mustMAC(s.h.MAC), "the fabric's": mustMAC(vnetsim.FabricMAC),
		"its own host end's": s.linkMAC(hostEnd(s.evil)), "nobody's": mustMAC("02:00:00:00:00:99"), "the zero": zeroMAC, "all": toAll,
		"a group's": mustMAC("01:00:5e:00:00:01"), "a reserved group's": mustMAC("01:80:c2:00:00:00"),
	} {
		all = append(all, attack{"from " + name + " MAC", anybody, [][]byte{ether(s.gw, mac, unix.ETH_P_IP, packet(s.evil.addr, s.h.Primary)...)}})
	}
	return append(all, attack{"from the gateway's MAC to another container", anybody, [][]byte{ether(s.his, s.gw, unix.ETH_P_IP, s.own()...)}})
}

func (s *scene) sourceAddresses() []attack {
	return []attack{
		{"from another container's address", anybody, s.sends(packet(s.good.addr, s.third.addr))},
		{"from the address of the container that hears it", anybody, s.sends(packet(s.good.addr, s.good.addr))},
		{"from another container's address and MAC", anybody, [][]byte{ether(s.gw, s.his, unix.ETH_P_IP, packet(s.good.addr, s.h.Primary)...)}},
		{"from the other VM's address", anybody, s.sends(packet(s.far.Primary, s.good.addr))},
		{"from an address that nobody has", anybody, s.sends(packet(s.absent, s.far.Primary))},
		{"from an ipconfig that is not lent", anybody, s.sends(packet(s.unlent, s.far.Primary))},
		{"from the host's address to another VM", anybody, s.sends(packet(s.h.Primary, s.far.Primary))},
		{"from the host's address to the host", anybody, s.sends(packet(s.h.Primary, s.h.Primary))},
		{"from the gateway's address", anybody, s.sends(packet(s.evil.Gateway, s.h.Primary))},
		{"from the host agent's address", anybody, s.sends(packet(vnetsim.HostAgentAddr, s.h.Primary))},
		{"from the metadata service's address", anybody, s.sends(packet(vnetsim.IMDSAddr, s.good.addr))},
		{"from an address of the internet", anybody, s.sends(packet(vnetsim.InternetAddr, s.good.addr))},
		{"from 127.0.0.1 to another container", anybody, s.sends(packet(addr("127.0.0.1"), s.good.addr))},
		{"from 127.0.0.1 to the host", anybody, s.sends(packet(addr("127.0.0.1"), s.h.Primary))},
		{"from 0.0.0.0", anybody, s.sends(packet(addr("0.0.0.0"), s.h.Primary))},
		{"from 0.1.2.3", anybody, s.sends(packet(addr("0.1.2.3"), s.h.Primary))},
		{"from 169.254.7.7", anybody, s.sends(packet(addr("169.254.7.7"), s.h.Primary))},
		{"from 224.0.0.1", anybody, s.sends(packet(addr("224.0.0.1"), s.h.Primary))},
		{"from 240.0.0.1", anybody, s.sends(packet(addr("240.0.0.1"), s.h.Primary))},
		{"from 255.255.255.255", anybody, s.sends(packet(addr("255.255.255.255"), s.h.Primary))},
		{"from the subnet's broadcast address", anybody, s.sends(packet(addr("10.240.255.255"), s.h.Primary))},
		{"from the subnet's own address", anybody, s.sends(packet(addr("10.240.0.0"), s.h.Primary))},
	}
}

// destinationAddresses are packets of evil's own address. The host may hear what is for all.
func (s *scene) destinationAddresses() []attack {
	const notHost = anybody &^ theHost
	return []attack{
		{"to the host's 127.0.0.1", anybody, s.sends(packet(s.evil.addr, addr("127.0.0.1")))},
		{"to the host's 127.255.255.254", anybody, s.sends(packet(s.evil.addr, addr("127.255.255.254")))},
		{"to 0.0.0.0", anybody, s.sends(packet(s.evil.addr, addr("0.0.0.0")))},
		{"to 0.1.2.3", anybody &^ wire, s.sends(packetFor(anybody&^wire, s.evil.addr, addr("0.1.2.3")))},
		{"to 240.0.0.1", anybody &^ wire, s.sends(packetFor(anybody&^wire, s.evil.addr, addr("240.0.0.1")))},
		{"to 255.255.255.255", notHost, s.sends(packetFor(notHost, s.evil.addr, addr("255.255.255.255")))},
		{"to the subnet's broadcast address", notHost, s.sends(packetFor(notHost, s.evil.addr, addr("10.240.255.255")))},
		{"to 224.0.0.1", notHost, s.sends(packetFor(notHost, s.evil.addr, addr("224.0.0.1")))},
		{"to 224.0.0.251", anybody, s.sends(packet(s.evil.addr, addr("224.0.0.251")))},
		{"to 239.1.2.3", anybody, s.sends(packet(s.evil.addr, addr("239.1.2.3")))},
		{"to itself", anybody &^ itself, s.sends(packetFor(anybody&^itself, s.evil.addr, s.evil.addr))},
		{"a ping of the subnet in another's name", anybody, s.sends(ip4(s.good.addr, addr("10.240.255.255"), unix.IPPROTO_ICMP, echoRequest(mark(anybody)...)))},
	}
}

func (s *scene) arps() []attack {
	to := func(dst net.HardwareAddr, packet []byte) [][]byte { return s.frame(dst, unix.ETH_P_ARP, packet...) }
	ofKind := func(packet []byte, at int, value byte) []byte { p := bytes.Clone(packet); p[at] = value; return p }
	evil, good, gateway := s.evil.addr, s.good.addr, s.evil.Gateway
	ask := arp(1, s.mine, evil, zeroMAC, good)
	return []attack{
		{"ARP: who has another", anybody, to(toAll, ask)},
		{"ARP: straight to another", anybody, to(s.his, ask)},
		{"ARP: I am another", anybody, to(toAll, arp(1, s.mine, good, zeroMAC, good))},
		{"ARP: I am another, to the host", anybody, to(s.gw, arp(2, s.mine, good, s.gw, s.h.Primary))},
		{"ARP: another is at mine, answered", anybody, to(toAll, arp(2, s.mine, good, toAll, good))},
		{"ARP: the gateway is at mine, to another", anybody, to(s.his, arp(2, s.mine, gateway, s.his, good))},
		{"ARP: the gateway is at mine, to all", anybody, to(toAll, arp(1, s.mine, gateway, zeroMAC, gateway))},
		{"ARP: the gateway is at mine, to the host", anybody, to(s.gw, arp(2, s.mine, gateway, s.gw, s.h.Primary))},
		{"ARP: the other VM is at mine, to the host", anybody, to(s.gw, arp(2, s.mine, s.far.Primary, s.gw, s.h.Primary))},
		{"ARP: the host is at mine", anybody, to(s.gw, arp(2, s.mine, s.h.Primary, s.gw, s.h.Primary))},
		{"ARP: an address that nobody has is at mine", anybody, to(s.gw, arp(1, s.mine, s.absent, zeroMAC, s.h.Primary))},
		{"ARP: an ipconfig that is not lent is at mine", anybody, to(toAll, arp(1, s.mine, s.unlent, zeroMAC, s.unlent))},
		{"ARP: mine is at another's MAC", anybody, to(toAll, arp(1, s.his, evil, zeroMAC, gateway))},
		{"ARP: mine is at all MACs", anybody, to(s.gw, arp(2, toAll, evil, s.gw, s.h.Primary))},
		{"ARP: mine is at a group's MAC", anybody, to(s.gw, arp(2, mustMAC("01:00:5e:00:00:01"), evil, s.gw, s.h.Primary))},
		{"ARP: from another's MAC", anybody, [][]byte{ether(toAll, s.his, unix.ETH_P_ARP, arp(1, s.his, good, zeroMAC, gateway)...)}},
		{"ARP: from another's MAC in its own name", anybody, [][]byte{ether(toAll, s.his, unix.ETH_P_ARP, ask...)}},
		{"ARP: to a group", anybody, to(mustMAC("01:00:5e:00:00:01"), ask)},
		{"ARP: a probe", anybody, to(toAll, arp(1, s.mine, addr("0.0.0.0"), zeroMAC, good))},
		{"ARP: a probe to the host", anybody, to(s.gw, arp(1, s.mine, addr("0.0.0.0"), zeroMAC, s.h.Primary))},
		{"ARP: gratuitous, of its own", anybody, to(toAll, arp(1, s.mine, evil, zeroMAC, evil))},
		{"ARP: of another hardware", anybody, to(toAll, ofKind(arp(1, s.mine, good, zeroMAC, good), 1, 6))},
		{"ARP: with long addresses", anybody, to(toAll, append(ofKind(ask, 4, 20), make([]byte, 40)...))},
		{"ARP: cut off", anybody, to(s.gw, ask[:20])},
		{"ARP: inverse", anybody, to(toAll, arp(8, s.mine, evil, s.his, addr("0.0.0.0")))},
		{"ARP: refused", anybody, to(s.his, arp(10, s.mine, good, s.his, good))},
		{"RARP", anybody, s.frame(toAll, 0x8035, arp(3, s.mine, evil, s.mine, evil)...)},
		{"RARP: another is told its address", anybody, s.frame(s.his, 0x8035, arp(4, s.mine, evil, s.his, s.absent)...)},
	}
}

// otherTypes are frames of protocols that a kernel, a switch or a machine's firmware may heed. They go to all or to the
// group that the protocol has, and to the host by the gateway's MAC.
func (s *scene) otherTypes() (all []attack) {
	hello := append(mark(anybody), make([]byte, 46)...)
	ipFrame := snap(unix.ETH_P_IP, packet(s.absent, s.h.Primary))
	for _, p := range []struct {
		name string
		kind uint16
		to   string
	}{
		{"an experiment", 0x88b5, ""}, {"Wake-on-LAN", 0x0842, ""}, {"802.1X (EAPOL)", 0x888e, ""}, {"MACsec", 0x88e5, ""},
		{"MPLS", 0x8847, ""}, {"MPLS to a group", 0x8848, "01:00:5e:80:00:01"}, {"PPPoE discovery", 0x8863, ""}, {"PPPoE", 0x8864, ""},
		{"the loop-back test", 0x9000, "cf:00:00:00:00:00"}, {"HSR", 0x892f, "01:15:4e:00:01:00"}, {"PRP", 0x88fb, "01:15:4e:00:01:00"},
		{"B.A.T.M.A.N.", 0x4305, ""}, {"PTP", 0x88f7, "01:1b:19:00:00:00"}, {"CFM", 0x8902, "01:80:c2:00:00:30"}, {"MRP", 0x88e3, "01:15:4e:00:00:01"},
		{"FCoE", 0x8906, ""}, {"ATA over Ethernet", 0x88a2, ""}, {"EtherCAT", 0x88a4, ""}, {"PROFINET", 0x8892, "01:0e:cf:00:00:00"},
		{"TIPC", 0x88ca, ""}, {"flow control", 0x8808, "01:80:c2:00:00:01"}, {"LACP", 0x8809, "01:80:c2:00:00:02"}, {"GVRP's own type", 0x88f5, "01:80:c2:00:00:21"},
		{"AppleTalk", 0x809b, ""}, {"IPX", 0x8137, ""}, {"a type of DSA", 0xdada, ""},
	} {
		to := toAll
		if p.to != "" {
			to = mustMAC(p.to)
		}
		all = append(all, attack{p.name, anybody, append(s.frame(to, p.kind, hello...), s.frame(s.gw, p.kind, hello...)...)})
	}
	bpdu := func(version, kind byte) []byte {
		return append([]byte{0x42, 0x42, 3, 0, 0, version, kind}, make([]byte, 32)...)
	}
	three := func(dst string, payload []byte) [][]byte { return [][]byte{ether3(mustMAC(dst), s.mine, payload...)} }
	return append(all,
		attack{"STP", anybody, three("01:80:c2:00:00:00", bpdu(0, 0))},
		attack{"STP: the topology changed", anybody, three("01:80:c2:00:00:00", bpdu(0, 0x80))},
		attack{"RSTP", anybody, three("01:80:c2:00:00:00", bpdu(2, 2))},
		attack{"a provider's STP", anybody, three("01:80:c2:00:00:08", bpdu(2, 2))},
		attack{"Cisco's STP", anybody, three("01:00:0c:cc:cc:cd", append([]byte{0xaa, 0xaa, 3, 0, 0, 0x0c, 1, 0x0b}, make([]byte, 42)...))},
		attack{"CDP", anybody, three("01:00:0c:cc:cc:cc", append([]byte{0xaa, 0xaa, 3, 0, 0, 0x0c, 0x20, 0}, make([]byte, 42)...))},
		attack{"LLDP", anybody, s.frame(mustMAC("01:80:c2:00:00:0e"), 0x88cc, append([]byte{2, 7, 4}, make([]byte, 30)...)...)},
		attack{"IP in 802.3, to the host", anybody, three(s.gw.String(), ipFrame)},
		attack{"IP in 802.3, to another", anybody, three(s.his.String(), snap(unix.ETH_P_IP, s.own()))},
		attack{"ARP in 802.3", anybody, three(toAll.String(), snap(unix.ETH_P_ARP, arp(1, s.mine, s.good.addr, zeroMAC, s.good.addr)))},
		attack{"IPX in 802.3", anybody, three(toAll.String(), append([]byte{0xff, 0xff}, hello...))},
		attack{"NetBEUI", anybody, three("03:00:00:00:00:01", append([]byte{0xf0, 0xf0, 3}, hello...))},
		attack{"802.3 without a payload", anybody, three(toAll.String(), nil)},
	)
}

func (s *scene) tags() []attack {
	straight := ether(s.his, s.mine, unix.ETH_P_IP, s.own()...)
	forged := ether(s.gw, s.mine, unix.ETH_P_IP, packet(s.good.addr, s.h.Primary)...)
	question := ether(toAll, s.mine, unix.ETH_P_ARP, arp(1, s.mine, s.good.addr, zeroMAC, s.good.addr)...)
	return []attack{
		{"a VLAN tag, straight to another", anybody, [][]byte{tagged(0x8100, 7, straight)}},
		{"a VLAN tag, in another's name", anybody, [][]byte{tagged(0x8100, 7, forged)}},
		{"a VLAN tag, and ARP in another's name", anybody, [][]byte{tagged(0x8100, 7, question)}},
		{"a priority tag, straight to another", anybody, [][]byte{tagged(0x8100, 0xe000, straight)}},
		{"a priority tag, in another's name", anybody, [][]byte{tagged(0x8100, 0xe000, forged)}},
		{"a provider's VLAN tag", anybody, [][]byte{tagged(0x88a8, 7, straight)}},
		{"a provider's VLAN tag before another (QinQ)", anybody, [][]byte{tagged(0x88a8, 7, tagged(0x8100, 7, straight))}},
		{"two priority tags, in another's name", anybody, [][]byte{tagged(0x8100, 0, tagged(0x8100, 0, forged))}},
		{"a tag of old QinQ", anybody, [][]byte{tagged(0x9100, 7, straight)}},
		{"a tag and nothing behind it", anybody, [][]byte{ether(toAll, s.mine, 0x8100, 0, 0)}},
	}
}

// reservedGroups are frames to the groups 01:80:c2:00:00:0x. The kernel has ways of its own for some of them.
func (s *scene) reservedGroups() (all []attack) {
	for _, p := range []struct {
		name    string
		kind    uint16
		payload []byte
	}{
		{"IP", unix.ETH_P_IP, packet(s.absent, s.h.Primary)},
		{"ARP", unix.ETH_P_ARP, arp(1, s.mine, s.absent, zeroMAC, s.h.Primary)},
		{"a router advertisement", unix.ETH_P_IPV6, ip6(append([]byte{134, 0, 0, 0, 64, 0, 7, 8}, make([]byte, 8)...)...)},
		{"LLDP", 0x88cc, append([]byte{2, 7, 4}, make([]byte, 30)...)},
	} {
		for last := range byte(16) {
			all = append(all, attack{fmt.Sprintf("%s to the reserved group %02x", p.name, last), anybody, s.frame(net.HardwareAddr{1, 0x80, 0xc2, 0, 0, last}, p.kind, p.payload...)})
		}
	}
	return all
}
