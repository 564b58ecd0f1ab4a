// Copyright (c) The azure-vnet authors. MIT licence.

package ruleset

import (
	"net"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// Priorities of our chains on their hooks. iptables' tables have -300 (raw), -100 (DNAT), 0 (filter) and 100 (SNAT). If an
// administrator wants it so, raw has -450.
const (
	beforeBrNetfilter = -300 // in the bridge family, where br_netfilter's own hook is at 0
	beforeDefrag      = -460 // before the kernel puts fragments together (-400), so that a forged one becomes part of nobody's packet. And before raw and conntrack (-200): a forged packet creates no flow, and meets no rule of others
	beforeDNAT        = -101 // a published port of ours comes before one of others
	atFilter          = 0    // after every DNAT. The order beside the host's filter does not matter: a packet that one lets pass may be dropped by the other
	beforeSNAT        = 99   // our SNAT comes before that of others, such as Docker's. Where we do none, theirs may
)

// arpInput is the hook of incoming ARP (NF_ARP_IN). The arp family numbers its hooks in its own way.
var arpInput = nftables.ChainHookRef(0)

// Kinds of base chains.
const (
	filterType = nftables.ChainTypeFilter
	natType    = nftables.ChainTypeNAT
)

// The types of the sets' keys and the maps' values. A key names the fields in the order in which the rules load them.
var (
	macType   = nftables.TypeEtherAddr
	ownType   = nftables.MustConcatSetType(nftables.TypeIFName, macType, macType, nftables.TypeIPAddr)
	ownARP    = nftables.MustConcatSetType(nftables.TypeIFName, macType, macType, macType, nftables.TypeIPAddr)
	ownL3Type = nftables.MustConcatSetType(nftables.TypeIFName, macType, nftables.TypeIPAddr)
	selfType  = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeIPAddr)

	targetType   = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService)
	portType     = nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService)
	addrPortType = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService)
	nicPortType  = nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeInetProto, nftables.TypeInetService)
)

// bridgeTable lets a port of our bridges send only two kinds of frame: IPv4 and ARP, with its own MAC and address,
// addressed to its bridge. ARP may be broadcast too. So no frame goes from one port to another by itself: all frames pass
// the host's IP layer, with br_netfilter or without. VLAN tags, IPv6, STP, LLDP, and the MAC or the address of another are
// not in the sets. Such frames are dropped.
//
// The rule that drops comes last, so that a packet of a container costs one look-up.
//
// The checks of loopback and of redirects are in this table, because packets that the host exchanges by its NIC do not
// pass it. Transparent links have a loopback check of their own: see addPrerouting.
func (c Config) bridgeTable() *table {
	t := &table{nft: bridgeTable}
	t.addSet("own", ownType)
	t.addSet("own_arp", ownARP)
	t.addBaseChain("prerouting", filterType, nftables.ChainHookPrerouting, beforeBrNetfilter,
		// With route_localnet a container would reach the host's 127.0.0.1.
		rule(isEtherType(unix.ETH_P_IP), isLoopback(ipDaddr), fromGroup(GroupBridge), dropVerdict()),
		rule(isEtherType(unix.ETH_P_IP), key(iifname, etherSaddr, etherDaddr, ipSaddr), inSet("own"), acceptVerdict()),
		rule(isEtherType(unix.ETH_P_ARP), key(iifname, etherSaddr, etherDaddr, arpSaddrEther, arpSaddrIP), inSet("own_arp"), acceptVerdict()),
		rule(fromGroup(GroupBridge), dropVerdict()))
	// The kernel tells a container that it reaches another container of its bridge without the gateway. That is wrong: no
	// frame goes from one port to another by itself.
	t.addBaseChain("output", filterType, nftables.ChainHookOutput, atFilter,
		rule(toGroup(GroupBridge), isEtherType(unix.ETH_P_IP), isICMPRedirect(), dropVerdict()))
	c.addElements(t)
	return t
}

// arpTable checks the ARP of transparent links. These are no bridge ports, so bridgeTable does not see it.
func (c Config) arpTable() *table {
	t := &table{nft: arpTable}
	t.addSet("own", ownL3Type)
	t.addBaseChain("input", filterType, arpInput, atFilter,
		rule(fromGroup(GroupTransparent), key(iifname, arpSaddrEther, arpSaddrIP), inSet("own"), acceptVerdict()),
		rule(fromGroup(GroupTransparent), dropVerdict()))
	c.addElements(t)
	return t
}

// ipTable has all chains that decide on IPv4 packets in the host's IP layer. Each of the functions below adds one part.
func (c Config) ipTable() *table {
	t := &table{nft: ipTable}
	t.addSet("nics", nftables.TypeIFName)
	t.addSet("links", nftables.TypeDevGroup).elems = map[elemKey]string{
		{bytes: groupKey(GroupBridge)}:      "",
		{bytes: groupKey(GroupTransparent)}: "",
	}
	t.addSet("own", ownL3Type)
	t.addSet("internal", nftables.TypeIPAddr)
	t.addSet("no_metadata", nftables.TypeIPAddr)
	t.addSet("self", selfType)
	t.addMap("sources", nftables.TypeIPAddr, nftables.TypeVerdict)
	t.addMap("published_at", addrPortType, targetType)
	t.addMap("published_by", nicPortType, targetType)
	t.addMap("published", portType, targetType)
	t.addMap("guarded", nftables.TypeIPAddr, nftables.TypeVerdict)
	t.sets["guarded"].elems = map[elemKey]string{
		{bytes: ipKey(hostAgent)}: jumpWord + " host_agent",
		{bytes: ipKey(metadata)}:  jumpWord + " metadata",
	}
	for _, nic := range c.NICs {
		t.sets["nics"].elems[elemKey{bytes: nameKey(nic)}] = ""
	}
	if c.transparent() {
		addPrerouting(t)
	}
	addForward(t)
	addPublish(t)
	c.addPostrouting(t)
	c.addElements(t)
	return t
}

// addPrerouting checks packets from transparent links, before any rule of others. All packets of the host pass this
// chain. So the chain exists only if there are such links, and it asks for the link's group only once.
func addPrerouting(t *table) {
	t.addBaseChain("prerouting", filterType, nftables.ChainHookPrerouting, beforeDefrag,
		rule(fromGroup(GroupTransparent), gotoChain("transparent")))
	t.addChain("transparent",
		// With route_localnet a container would reach the host's 127.0.0.1.
		rule(isLoopback(ipDaddr), dropVerdict()),
		rule(isEthernet(), key(iifname, etherSaddr, ipSaddr), inSet("own"), acceptVerdict()),
		rule(dropVerdict()))
}

// addForward drops packets to addresses that no container may reach. It drops all packets between an internal endpoint
// and a link that is not ours. An internal endpoint reaches the host, and the endpoints behind our links on this VM.
// The chain comes after every DNAT, whoever made it. It accepts nothing: the host's firewall decides on the rest.
func addForward(t *table) {
	t.addBaseChain("forward", filterType, nftables.ChainHookForward, atFilter,
		rule(key(ipDaddr), verdictFrom("guarded")),
		rule(key(ipSaddr), inSet("internal"), notToOurs(), dropVerdict()),
		rule(key(ipDaddr), inSet("internal"), notFromOurs(), dropVerdict()))
	// The host agent's HTTP (ports 80 and 32526) is for the host's own agents. Another VM's containers come by a NIC, if a
	// service of this VM leads to the host agent.
	t.addChain("host_agent",
		rule(isProtocol(unix.IPPROTO_TCP), fieldEquals(thDport, bigEndian16(80)), gotoChain("containers")),
		rule(isProtocol(unix.IPPROTO_TCP), fieldEquals(thDport, bigEndian16(32526)), gotoChain("containers")))
	t.addChain("containers",
		rule(fromOurs(), dropVerdict()),
		rule(key(iifname), inSet("nics"), dropVerdict()))
	t.addChain("metadata",
		rule(key(ipSaddr), inSet("no_metadata"), dropVerdict()))
}

// addPublish leads ports of the host to containers. A packet from a NIC is led to containers of that NIC alone. The
// answer leaves by the container's own NIC. By another NIC it would have a source address that is not that NIC's, and
// Azure drops such packets.
func addPublish(t *table) {
	jump := rule(toThisHost(), gotoChain("publish"))
	t.addBaseChain("ports_prerouting", natType, nftables.ChainHookPrerouting, beforeDNAT, jump)
	t.addBaseChain("ports_output", natType, nftables.ChainHookOutput, beforeDNAT, jump)
	t.addChain("publish",
		rule(key(ipDaddr, metaL4proto, thDport), valueFrom("published_at"), dnat()),
		rule(key(iifname, metaL4proto, thDport), valueFrom("published_by"), dnat()),
		rule(key(iifname), inSet("nics"), returnVerdict()),
		rule(key(metaL4proto, thDport), valueFrom("published"), dnat()))
}

// addPostrouting decides with which source address a packet leaves. The chain comes after every DNAT, and uses no packet
// mark.
func (c Config) addPostrouting(t *table) {
	t.addBaseChain("postrouting", natType, nftables.ChainHookPostrouting, beforeSNAT,
		// Through a published port, a container would receive a packet from its own address, or from 127.0.0.1.
		rule(key(ipSaddr, ipDaddr), inSet("self"), masquerade()),
		rule(toOurs(), isLoopback(ipSaddr), masquerade()),
		rule(toOurs(), acceptVerdict()),
		rule(key(ipSaddr), verdictFrom("sources")))
	for _, n := range c.Policies {
		if !n.SNAT {
			continue
		}
		direct := t.addSet("direct_"+n.ID, nftables.TypeIPAddr)
		direct.interval = true
		direct.addRanges(n.direct(c.Subnets))
		acceptDirect := rule(key(ipDaddr), inSet(direct.name), acceptVerdict())
		if n.Direct != nil { // leaves as it is by whatever link: the VM may be the gateway of a site
			t.addChain(snatChain(n.ID), acceptDirect, rule(masquerade()))
			continue
		}
		t.addChain(snatChain(n.ID), rule(key(oifname), notInSet("nics"), masquerade()), acceptDirect, rule(masquerade()))
	}
}

// direct returns the destinations that packets of the policy's endpoints reach with the container's own address. The host agent
// always answers a secondary address, and the metadata service never does.
func (n Policy) direct(subnets []netip.Prefix) []addrRange {
	list := n.Direct
	if list == nil {
		list = slices.Concat(defaultDirect, subnets)
	}
	list = append(slices.Clone(list), netip.PrefixFrom(hostAgent, 32))
	return subtractRanges(rangesOf(list...), rangesOf(netip.PrefixFrom(metadata, 32)))
}

func snatChain(policyID string) string { return "snat_" + policyID }

// addElements adds to the table the elements of all endpoints that belong into it.
func (c Config) addElements(t *table) {
	for _, e := range c.Endpoints {
		for _, s := range c.elements(e) {
			if s.table != t.nft {
				continue
			}
			for k, v := range s.elems {
				t.sets[s.name].elems[k] = v
			}
		}
	}
}

// elements are all elements that program the endpoint. Each set that is returned has the endpoint's elements alone.
func (c Config) elements(e Endpoint) []*set {
	link, mac, ip := nameKey(e.Link), macKey(e.MAC), ipKey(e.Addr)
	var all []*set
	add := func(t *nftables.Table, name string, data nftables.SetDatatype, elems map[elemKey]string) {
		all = append(all, &set{table: t, name: name, data: data, elems: elems})
	}
	plain := func(keys ...string) map[elemKey]string {
		elems := map[elemKey]string{}
		for _, k := range keys {
			elems[elemKey{bytes: k}] = ""
		}
		return elems
	}
	none := nftables.SetDatatype{}
	if e.transparent() {
		add(arpTable, "own", none, plain(link+mac+ip))
		add(ipTable, "own", none, plain(link+mac+ip))
	} else {
		to, broadcast := macKey(e.BridgeMAC), macKey(net.HardwareAddr{255, 255, 255, 255, 255, 255})
		add(bridgeTable, "own", none, plain(link+mac+to+ip))
		add(bridgeTable, "own_arp", none, plain(link+mac+to+mac+ip, link+mac+broadcast+mac+ip))
	}
	if e.Internal {
		add(ipTable, "internal", none, plain(ip))
	} else if i := slices.IndexFunc(c.Policies, func(n Policy) bool { return n.ID == e.PolicyID }); i >= 0 && c.Policies[i].SNAT {
		add(ipTable, "sources", nftables.TypeVerdict, map[elemKey]string{{bytes: ip}: gotoWord + " " + snatChain(e.PolicyID)})
	}
	if e.NoMetadata {
		add(ipTable, "no_metadata", none, plain(ip))
	}
	return append(all, e.portElements()...)
}

// portElements are the elements that lead ports of the host to the endpoint.
func (e Endpoint) portElements() []*set {
	if len(e.Ports) == 0 {
		return nil
	}
	ip := ipKey(e.Addr)
	atAddr, byNIC, anyAddr := map[elemKey]string{}, map[elemKey]string{}, map[elemKey]string{}
	for _, p := range e.Ports {
		from, to := protoKey(p.UDP)+portKey(p.HostPort), ip+portKey(p.Port)
		if p.HostAddr.IsValid() {
			atAddr[elemKey{bytes: ipKey(p.HostAddr) + from}] = to
			continue
		}
		anyAddr[elemKey{bytes: from}] = to
		if e.NIC != "" {
			byNIC[elemKey{bytes: nameKey(e.NIC) + from}] = to
		}
	}
	all := []*set{
		{table: ipTable, name: "self", elems: map[elemKey]string{{bytes: ip + ip}: ""}},
		{table: ipTable, name: "published_at", data: targetType, elems: atAddr},
		{table: ipTable, name: "published_by", data: targetType, elems: byNIC},
		{table: ipTable, name: "published", data: targetType, elems: anyAddr},
	}
	return slices.DeleteFunc(all, func(s *set) bool { return len(s.elems) == 0 })
}
