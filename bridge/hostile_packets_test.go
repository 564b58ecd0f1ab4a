// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"

	"azurevnet/internal/vnetsim"
)

// The table of attacks goes on: packets of IPv6, and of what stands in an IPv4 packet.

func (s *scene) ipv6() []attack {
	sends := func(group string, packet []byte) [][]byte {
		return append(s.frame(mustMAC(group), unix.ETH_P_IPV6, packet...), s.frame(s.gw, unix.ETH_P_IPV6, packet...)...)
	}
	icmp := func(dst string, kind byte, rest ...byte) []byte {
		return ip6To(dst, unix.IPPROTO_ICMPV6, append(append([]byte{kind, 0, 0, 0}, rest...), mark(anybody)...)...)
	}
	target := addr("fe80::1234:5678:9abc")
	about := func(flags byte, option ...byte) []byte {
		return append(append([]byte{flags, 0, 0, 0}, target.AsSlice()...), option...)
	}
	sourceMAC, targetMAC := append([]byte{1, 1}, s.mine...), append([]byte{2, 1}, s.mine...)
	prefix := append([]byte{3, 4, 64, 0xc0, 0, 0, 7, 8, 0, 0, 7, 8, 0, 0, 0, 0, 0xfd, 0xba, 0xd}, make([]byte, 13)...)
	const all, routers, reporters = "33:33:00:00:00:01", "33:33:00:00:00:02", "33:33:00:00:00:16"
	return []attack{
		{"a router advertisement", anybody, sends(all, icmp("ff02::1", 134, append([]byte{64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0}, prefix...)...))},
		{"a router solicitation", anybody, sends(routers, icmp("ff02::2", 133, append([]byte{0, 0, 0, 0}, sourceMAC...)...))},
		{"NS: who has Azure's gateway", anybody, sends("33:33:ff:78:9a:bc", icmp("ff02::1:ff78:9abc", 135, about(0, sourceMAC...)...))},
		{"NS: is the address free", anybody, sends("33:33:ff:78:9a:bc", icmp("ff02::1:ff78:9abc", 135, about(0)...))},
		{"NA: Azure's gateway is at mine", anybody, sends(all, icmp("ff02::1", 136, about(0xa0, targetMAC...)...))},
		{"an IPv6 redirect", anybody, sends(all, icmp("ff02::1", 137, append(about(0), append(target.AsSlice(), targetMAC...)...)...))},
		{"MLD: a query", anybody, sends(all, icmp("ff02::1", 130, make([]byte, 20)...))},
		{"MLD: a report", anybody, sends(reporters, icmp("ff02::16", 143, append([]byte{0, 0, 0, 1, 4, 0, 0, 0}, addr("ff02::fb").AsSlice()...)...))},
		{"MLD: done", anybody, sends(routers, icmp("ff02::2", 132, append([]byte{0, 0, 0, 0}, addr("ff02::fb").AsSlice()...)...))},
		{"an IPv6 ping to all nodes", anybody, sends(all, icmp("ff02::1", 128, 0, 1, 0, 1))},
		{"an IPv6 packet that is too big", anybody, sends(all, icmp("ff02::1", 2, append([]byte{0, 0, 5, 0}, make([]byte, 40)...)...))},
		{"DHCPv6 solicit", anybody, sends("33:33:00:01:00:02", ip6To("ff02::1:2", unix.IPPROTO_UDP, udp4(546, 547, append([]byte{1, 0, 0, 1}, mark(anybody)...)...)...))},
		{"DHCPv6 advertise", anybody, sends(all, ip6To("ff02::1", unix.IPPROTO_UDP, udp4(547, 546, append([]byte{2, 0, 0, 1}, mark(anybody)...)...)...))},
		{"LLMNR over IPv6", anybody, sends("33:33:00:01:00:03", ip6To("ff02::1:3", unix.IPPROTO_UDP, udp4(5355, 5355, mark(anybody)...)...))},
		{"an IPv6 fragment", anybody, sends(all, ip6To("ff02::1", unix.IPPROTO_FRAGMENT, append([]byte{unix.IPPROTO_UDP, 0, 0, 1, 0, 0, 0, 9}, mark(anybody)...)...))},
		{"an IPv6 routing header", anybody, sends(all, ip6To("ff02::1", unix.IPPROTO_ROUTING, append(append([]byte{58, 2, 0, 1, 0, 0, 0, 0}, target.AsSlice()...), mark(anybody)...)...))},
	}
}

// icmps are what a router may say, in the name of one.
func (s *scene) icmps() []attack {
	icmp := func(from, to netip.Addr, packet []byte) [][]byte {
		return s.sends(ip4(from, to, unix.IPPROTO_ICMP, packet))
	}
	// The kernel heeds it for a ping without asking whether there was one.
	pong := ip4(s.good.addr, s.far.Primary, unix.IPPROTO_ICMP, icmp4(0, 0, append([]byte{0, 1, 0, 1}, mark(anybody)...)...))
	hostPong := ip4(s.h.Primary, s.far.Primary, unix.IPPROTO_ICMP, icmp4(0, 0, append([]byte{0, 1, 0, 1}, mark(anybody)...)...))
	redirect := icmp4(5, 1, append(s.evil.addr.AsSlice(), pong...)...)
	const notOthers = anybody &^ others
	return []attack{
		{"a redirect in the gateway's name", anybody, icmp(s.evil.Gateway, s.good.addr, redirect)},
		{"a redirect in the host's name", anybody, icmp(s.h.Primary, s.good.addr, redirect)},
		{"a redirect in the gateway's name, to the host", anybody, icmp(s.evil.Gateway, s.h.Primary, icmp4(5, 1, append(s.evil.addr.AsSlice(), hostPong...)...))},
		{"a redirect in its own name, which nobody heeds", notOthers, icmp(s.evil.addr, s.good.addr,
			icmp4(5, 1, append(s.evil.addr.AsSlice(), ip4(s.good.addr, s.far.Primary, unix.IPPROTO_ICMP, icmp4(0, 0, append([]byte{0, 1, 0, 1}, mark(notOthers)...)...))...)...))},
		{"too big, in the gateway's name", anybody, icmp(s.evil.Gateway, s.good.addr, tooBig(600, pong))},
		{"too big, in the other VM's name", anybody, icmp(s.far.Primary, s.good.addr, tooBig(600, pong))},
		{"too big, in the gateway's name, to the host", anybody, icmp(s.evil.Gateway, s.h.Primary, tooBig(600, hostPong))},
		{"too big, in another's name, to the host", anybody, icmp(s.good.addr, s.h.Primary, tooBig(600, hostPong))},
		{"no route, in the gateway's name", anybody, icmp(s.evil.Gateway, s.good.addr, icmp4(3, 0, append(make([]byte, 4), pong...)...))},
		{"time is over, in the gateway's name", anybody, icmp(s.evil.Gateway, s.good.addr, icmp4(11, 0, append(make([]byte, 4), pong...)...))},
		{"source quench, in the other VM's name", anybody, icmp(s.far.Primary, s.good.addr, icmp4(4, 0, append(make([]byte, 4), pong...)...))},
		{"I am a router, to all hosts", anybody, icmp(s.evil.Gateway, addr("224.0.0.1"), icmp4(9, 0, append([]byte{1, 2, 7, 8, 10, 240, 0, 5, 0, 0, 0, 1}, mark(anybody)...)...))},
		{"a mask for all hosts", anybody, icmp(s.evil.Gateway, addr("10.240.255.255"), icmp4(18, 0, append([]byte{0, 0, 0, 0, 255, 0, 0, 0}, mark(anybody)...)...))},
		{"a ping in another's name", anybody, icmp(s.good.addr, s.third.addr, echoRequest(mark(anybody)...))},
		{"an answer in another's name", anybody, icmp(s.far.Primary, s.good.addr, icmp4(0, 0, append([]byte{0, 1, 0, 1}, mark(anybody)...)...))},
	}
}

// connections are segments that fit exactly into connections of others.
func (s *scene) connections() []attack {
	near, far := s.nextSegments(s.ofGood)
	hostNear, hostFar := s.nextSegments(s.ofHost)
	m := mark(anybody)
	icmp := func(from, to netip.Addr, packet []byte) [][]byte {
		return s.sends(ip4(from, to, unix.IPPROTO_ICMP, packet))
	}
	return []attack{
		{"RST to another's connection, from its server", anybody, s.sends(far.packet(rst|ack, nil, m...))},
		{"RST to another's server, from it", anybody, s.sends(near.packet(rst|ack, nil, m...))},
		{"SYN to another's connection", anybody, s.sends(far.packet(syn, nil, m...))},
		{"FIN to another's connection", anybody, s.sends(far.packet(fin|ack, nil, m...))},
		{"data to another's connection", anybody, s.sends(far.packet(push|ack, nil, m...))},
		{"data to another's server", anybody, s.sends(near.packet(push|ack, nil, m...))},
		{"RST to the host's connection", anybody, s.sends(hostFar.packet(rst|ack, nil, m...))},
		{"RST to the host's server, from the host", anybody, s.sends(hostNear.packet(rst|ack, nil, m...))},
		{"data to the host's connection", anybody, s.sends(hostFar.packet(push|ack, nil, m...))},
		{"too big, of another's connection", anybody, icmp(s.evil.Gateway, s.good.addr, tooBig(600, near.packet(ack, nil, m...)))},
		{"too big, of the host's connection", anybody, icmp(s.evil.Gateway, s.h.Primary, tooBig(600, hostNear.packet(ack, nil, m...)))},
		{"no such port, of another's connection", anybody, icmp(s.far.Primary, s.good.addr, icmp4(3, 3, append(make([]byte, 4), near.packet(ack, nil, m...)...)...))},
		{"SYN in another's name to the host", anybody, s.sends(segment{netip.AddrPortFrom(s.good.addr, 99), netip.AddrPortFrom(s.h.Primary, 22), 7, 0}.packet(syn, nil, m...))},
	}
}

// protocols are packets of other protocols in another's name, and to the groups that routers have.
func (s *scene) protocols() (all []attack) {
	m := append(make([]byte, 16), mark(anybody)...)
	for _, p := range []struct {
		name   string
		number byte
	}{
		{"IGMP", unix.IPPROTO_IGMP}, {"DCCP", unix.IPPROTO_DCCP}, {"GRE", unix.IPPROTO_GRE}, {"ESP", unix.IPPROTO_ESP}, {"AH", unix.IPPROTO_AH},
		{"EIGRP", protoEIGRP}, {"OSPF", protoOSPF}, {"PIM", unix.IPPROTO_PIM}, {"VRRP", protoVRRP}, {"L2TP", unix.IPPROTO_L2TP},
		{"SCTP", unix.IPPROTO_SCTP}, {"UDP-Lite", unix.IPPROTO_UDPLITE}, {"a protocol that nobody has", 253},
	} {
		all = append(all, attack{p.name + " in another's name", anybody, s.sends(ip4(s.good.addr, s.h.Primary, p.number, m), ip4(s.good.addr, s.third.addr, p.number, m))})
	}
	inner := packet(s.good.addr, s.h.Primary)
	toGroup := func(group string, last byte, proto byte, payload []byte) [][]byte {
		return s.frame([]byte{1, 0, 0x5e, 0, 0, last}, unix.ETH_P_IP, ip4(s.evil.addr, addr(group), proto, payload)...)
	}
	groups := s.toGroups()
	igmp := func(kind byte, group string) []byte {
		return icmp4(kind, 0, append(addr(group).AsSlice(), mark(groups)...)...)
	}
	return append(all,
		attack{"IP in IP, with another's packet", anybody, s.sends(ip4(s.evil.addr, s.h.Primary, unix.IPPROTO_IPIP, inner))},
		attack{"IP in GRE, with another's packet", anybody, s.sends(ip4(s.evil.addr, s.h.Primary, unix.IPPROTO_GRE, append([]byte{0, 0, 8, 0}, inner...)))},
		attack{"Ethernet in GRE, with another's frame", anybody, s.sends(ip4(s.evil.addr, s.h.Primary, unix.IPPROTO_GRE, append([]byte{0, 0, 0x65, 0x58}, ether(s.gw, s.his, unix.ETH_P_IP, inner...)...)))},
		attack{"IPv6 in IP", anybody, s.sends(ip4(s.evil.addr, s.h.Primary, unix.IPPROTO_IPV6, ip6(append([]byte{134, 0, 0, 0, 64, 0, 7, 8}, mark(anybody)...)...)))},
		attack{"IGMP: a query", groups, toGroup("224.0.0.1", 1, unix.IPPROTO_IGMP, igmp(0x11, "0.0.0.0"))},
		attack{"IGMP: a report", groups, toGroup("224.0.0.251", 251, unix.IPPROTO_IGMP, igmp(0x16, "224.0.0.251"))},
		attack{"OSPF: hello", anybody, toGroup("224.0.0.5", 5, protoOSPF, m)},
		attack{"VRRP: I am the master", anybody, toGroup("224.0.0.18", 18, protoVRRP, m)},
		attack{"PIM: hello", anybody, toGroup("224.0.0.13", 13, unix.IPPROTO_PIM, m)},
	)
}

func (s *scene) options() (all []attack) {
	datagram := udp4(9, heardAt, mark(anybody)...)
	with := func(src, dst netip.Addr, options []byte) [][]byte {
		return s.sends(ip4Options(src, dst, unix.IPPROTO_UDP, options, datagram))
	}
	for name, options := range map[string][]byte{"record route": recordRoute, "timestamps": timestamps, "router alert": routerAlert, "security": security, "no-ops": noOptions} {
		all = append(all, attack{"the option " + name + ", in another's name", anybody, append(with(s.good.addr, s.h.Primary, options), with(s.good.addr, s.third.addr, options)...)})
	}
	const loose, strict = 131, 137
	return append(all,
		attack{"a loose source route, in another's name", anybody, with(s.good.addr, s.h.Primary, sourceRoute(loose, s.third.addr))},
		attack{"a loose source route by the host to another", anybody, with(s.evil.addr, s.h.Primary, sourceRoute(loose, s.good.addr))},
		attack{"a strict source route by the host to another", anybody, with(s.evil.addr, s.h.Primary, sourceRoute(strict, s.good.addr))},
		attack{"a source route by the host to its 127.0.0.1", anybody, with(s.evil.addr, s.h.Primary, sourceRoute(loose, addr("127.0.0.1")))},
		attack{"a source route by the host to another VM", anybody, with(s.evil.addr, s.h.Primary, sourceRoute(loose, s.far.Primary))},
		attack{"options that lie about their length", anybody, with(s.evil.addr, s.h.Primary, []byte{7, 40, 4, 0})},
		attack{"an option that points beyond its end", anybody, with(s.evil.addr, s.h.Primary, []byte{1, 131, 7, 200, 10, 240, 0, 9})},
	)
}

func (s *scene) fragments() []attack {
	datagram := udp4(9, heardAt, append(mark(anybody), make([]byte, 32)...)...)
	const cut = 24
	size := len(datagram)
	id := func() uint16 { s.lastID++; return s.lastID }
	toHost := ip4(s.good.addr, s.h.Primary, unix.IPPROTO_UDP, datagram)
	toThird := ip4(s.good.addr, s.third.addr, unix.IPPROTO_UDP, datagram)
	own := ip4(s.evil.addr, s.good.addr, unix.IPPROTO_UDP, datagram)
	one, two, three := id(), id(), id()
	huge := fragment(own, id(), 0, size)
	binary.BigEndian.PutUint16(huge[6:], 65528/8)
	return []attack{
		{"a first fragment in another's name", anybody, s.sends(fragment(toThird, id(), 0, cut))},
		{"a last fragment in another's name", anybody, s.sends(fragment(toThird, id(), cut, size))},
		{"both fragments in another's name", anybody, s.sends(fragment(toHost, one, 0, cut), fragment(toHost, one, cut, size))},
		{"a first fragment of its own, and a last one in another's name", anybody, s.sends(fragment(own, two, 0, cut), fragment(ip4(s.third.addr, s.good.addr, unix.IPPROTO_UDP, datagram), two, cut, size))},
		{"a first fragment in another's name, and a last one of its own", anybody, s.sends(fragment(ip4(s.third.addr, s.good.addr, unix.IPPROTO_UDP, datagram), three, 0, cut), fragment(own, three, cut, size))},
		{"a fragment beyond the largest packet", anybody, s.sends(withHeaderSum(huge[:20]), huge)},
		{"a last fragment of nothing", anybody, s.sends(fragment(own, id(), cut, size))},
	}
}

func (s *scene) malformed() []attack {
	changed := func(to netip.Addr, at int, value ...byte) []byte {
		p := packet(s.evil.addr, to)
		copy(p[at:], value)
		return append(withHeaderSum(p[:20]), p[20:]...)
	}
	badSum := packet(s.evil.addr, s.h.Primary)
	badSum[10] ^= 0x55
	return []attack{
		{"too short to be anything", anybody, s.frame(s.gw, unix.ETH_P_IP, 0x45)},
		{"nothing behind the type", anybody, s.frame(s.gw, unix.ETH_P_IP)},
		{"a header that lies about its length", anybody, s.sends(append([]byte{0x4f}, s.own()[1:]...))},
		{"a header that is too short", anybody, s.sends(changed(s.h.Primary, 0, 0x44))},
		{"IPv6's version in IPv4's type", anybody, s.sends(changed(s.h.Primary, 0, 0x65))},
		{"IPv4 in IPv6's type", anybody, s.frame(s.gw, unix.ETH_P_IPV6, packet(s.evil.addr, s.h.Primary)...)},
		{"a packet that says that it is longer", anybody, s.sends(changed(s.h.Primary, 2, 0x10))},
		{"a wrong checksum", anybody, s.sends(badSum)},
		{"no time to live", anybody, s.sends(changed(s.good.addr, 8, 0))},
	}
}

// hostAgent are ways to the host agent's HTTP.
func (s *scene) hostAgent() (all []attack) {
	from := netip.AddrPortFrom(s.evil.addr, 999)
	http := func(via netip.Addr, port uint16, options []byte, secret ears) []byte {
		return segment{from, netip.AddrPortFrom(via, port), 7, 0}.packet(syn, options, append(mark(secret), make([]byte, 32)...)...)
	}
	toAgent := http(vnetsim.HostAgentAddr, 80, nil, anybody)
	size := len(toAgent) - 20
	id := func() uint16 { s.lastID++; return s.lastID }
	one, two, three := id(), id(), id()
	harmless := http(vnetsim.HostAgentAddr, 8080, nil, anybody)
	otherFlags := segment{from, netip.AddrPortFrom(vnetsim.HostAgentAddr, 80), 7, 7}.packet(push|ack, nil, mark(anybody)...)
	forged := func(src netip.Addr) []byte {
		return segment{netip.AddrPortFrom(src, 999), netip.AddrPortFrom(vnetsim.HostAgentAddr, 80), 7, 0}.packet(syn, nil, mark(anybody)...)
	}
	for name, options := range map[string][]byte{"record route": recordRoute, "timestamps": timestamps, "router alert": routerAlert, "security": security, "no-ops": noOptions} {
		all = append(all, attack{"host agent: with the option " + name, anybody, s.sends(http(vnetsim.HostAgentAddr, 80, options, anybody))})
	}
	const loose, strict = 131, 137
	const notOthers, notWire = anybody &^ others, anybody &^ wire
	route := func(kind byte) []byte { return sourceRoute(kind, vnetsim.HostAgentAddr) }
	return append(all,
		attack{"host agent: directly", anybody, s.sends(toAgent)},
		attack{"host agent: directly, port 32526", anybody, s.sends(http(vnetsim.HostAgentAddr, 32526, nil, anybody))},
		attack{"host agent: by a service of the host", anybody, s.sends(http(ledToAgent.Addr(), ledToAgent.Port(), nil, anybody))},
		attack{"host agent: in the midst of a connection", anybody, s.sends(otherFlags)},
		attack{"host agent: in fragments", anybody, s.sends(fragment(toAgent, one, 0, 8), fragment(toAgent, one, 8, size))},
		attack{"host agent: in fragments, the last one first", anybody, s.sends(fragment(toAgent, two, 8, size), fragment(toAgent, two, 0, 8))},
		attack{"host agent: in fragments that overlap", anybody, s.sends(fragment(harmless, three, 0, 24), fragment(toAgent, three, 0, 32), fragment(toAgent, three, 32, size))},
		attack{"host agent: a loose source route by the host", anybody, s.sends(http(s.h.Primary, 80, route(loose), anybody))},
		attack{"host agent: a strict source route by the host", anybody, s.sends(http(s.h.Primary, 80, route(strict), anybody))},
		attack{"host agent: a source route by another container", notOthers &^ wire, s.sends(http(s.good.addr, 80, route(loose), notOthers&^wire))},
		attack{"host agent: a source route by another VM", notWire, s.sends(http(s.far.Primary, 80, route(loose), notWire))},
		attack{"host agent: a source route by Azure's gateway", notWire, s.sends(http(s.evil.Gateway, 80, route(loose), notWire))},
		attack{"host agent: IP in IP, by the host", anybody, s.sends(ip4(s.evil.addr, s.h.Primary, unix.IPPROTO_IPIP, toAgent))},
		attack{"host agent: IP in IP, by itself", notWire, s.sends(ip4(s.evil.addr, vnetsim.HostAgentAddr, unix.IPPROTO_IPIP, http(vnetsim.HostAgentAddr, 80, nil, notWire)))},
		attack{"host agent: IP in GRE, by the host", anybody, s.sends(ip4(s.evil.addr, s.h.Primary, unix.IPPROTO_GRE, append([]byte{0, 0, 8, 0}, toAgent...)))},
		attack{"host agent: straight to another container", anybody, s.frame(s.his, unix.ETH_P_IP, toAgent...)},
		attack{"host agent: by another container's gateway", anybody, s.frame(s.linkMAC(hostEnd(s.good)), unix.ETH_P_IP, toAgent...)},
		attack{"host agent: by the NIC's MAC", anybody, s.frame(mustMAC(s.h.MAC), unix.ETH_P_IP, toAgent...)},
		attack{"host agent: by the fabric's MAC", anybody, s.frame(mustMAC(vnetsim.FabricMAC), unix.ETH_P_IP, toAgent...)},
		attack{"host agent: with a VLAN tag", anybody, [][]byte{tagged(0x8100, 7, ether(s.gw, s.mine, unix.ETH_P_IP, toAgent...))}},
		attack{"host agent: with a priority tag", anybody, [][]byte{tagged(0x8100, 0, ether(s.gw, s.mine, unix.ETH_P_IP, toAgent...))}},
		attack{"host agent: in the host's name", anybody, s.sends(forged(s.h.Primary))},
		attack{"host agent: in another's name", anybody, s.sends(forged(s.good.addr))},
		attack{"host agent: from an ipconfig that is not lent", anybody, s.sends(forged(s.unlent))},
	)
}
