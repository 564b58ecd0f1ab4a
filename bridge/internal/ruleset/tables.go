// Copyright (c) The azure-vnet authors. MIT licence.

package ruleset

import (
	"net"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Hook priorities. Those of iptables' tables are -300 (raw), -100 (DNAT), 0 (filter)
// and 100 (SNAT). Our chains run just before the iptables table whose stage depends on
// them.
const (
	beforeBrNetfilter = -300 // br_netfilter's own hook is at 0 in the bridge family
	beforeRaw         = -310 // before raw (-300) and conntrack (-200): a forged packet creates no flow and meets no rule of others
	beforeDNAT        = -101
	atFilter          = 0
	beforeSNAT        = 99
)

// Of linux/rtnetlink.h.
const rtnLocal = 2

// arpInput is the hook of incoming ARP (NF_ARP_IN), which is not numbered as that of IP.
var arpInput = nftables.ChainHookRef(0)

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

// bridgeTable lets a port of ours send only IPv4 and ARP with its own MAC and address, addressed to its bridge. ARP
// may be broadcast too. So no frame goes from one port to another by itself: all frames pass the host's IP layer, with
// br_netfilter or without. A VLAN tag, IPv6, STP, LLDP, and the MAC or address of another are no elements of the sets.
// Such frames are dropped.
//
// The rule that drops comes last, so that a container's packet costs one look-up.
//
// The checks of loopback and of redirects stand here, because packets that the host exchanges by its NIC pass neither
// chain of this table. Transparent links have a loopback check of their own: see prerouting.
func (c Config) bridgeTable() *table {
	t := &table{nft: bridgeTable}
	t.addSet("own", ownType)
	t.addSet("own_arp", ownARP)
	t.addBaseChain("prerouting", filterType, nftables.ChainHookPrerouting, beforeBrNetfilter,
		// With route_localnet a container would reach the host's 127.0.0.1.
		rule(etherType(unix.ETH_P_IP), toLoopback(), iifgroup(GroupBridge), dropVerdict()),
		rule(etherType(unix.ETH_P_IP), iifname(1), etherSaddr(2), etherDaddr(14), ipSaddr(3), inSet("own"), acceptVerdict()),
		rule(etherType(unix.ETH_P_ARP), iifname(1), etherSaddr(2), etherDaddr(14), arpSaddrEther(3), arpSaddrIP(18), inSet("own_arp"), acceptVerdict()),
		rule(iifgroup(GroupBridge), dropVerdict()))
	// The kernel tells a container that another container of its bridge is reached without
	// the gateway. That is wrong: no frame goes from one port to another by itself.
	t.addBaseChain("output", filterType, nftables.ChainHookOutput, atFilter,
		rule(oifgroup(GroupBridge), etherType(unix.ETH_P_IP), icmpType(5), dropVerdict()))
	c.addElements(t)
	return t
}

// arpTable is for transparent links, whose ARP no bridge table sees.
func (c Config) arpTable() *table {
	t := &table{nft: arpTable}
	t.addSet("own", ownL3Type)
	t.addBaseChain("input", filterType, arpInput, atFilter,
		rule(iifgroup(GroupTransparent), iifname(1), arpSaddrEther(2), arpSaddrIP(14), inSet("own"), acceptVerdict()),
		rule(iifgroup(GroupTransparent), dropVerdict()))
	c.addElements(t)
	return t
}

// ipTable does all that is not about one link: see each chain.
func (c Config) ipTable() *table {
	t := &table{nft: ipTable}
	t.addSet("nics", nftables.TypeIFName)
	t.addSet("links", nftables.TypeDevGroup).elems = map[elemKey]string{
		{bytes: string(be32host(GroupBridge))}:      "",
		{bytes: string(be32host(GroupTransparent))}: "",
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
		{bytes: ipKey(hostAgent)}: "jump host_agent",
		{bytes: ipKey(metadata)}:  "jump metadata",
	}
	for _, nic := range c.NICs {
		t.sets["nics"].elems[elemKey{bytes: nameKey(nic)}] = ""
	}
	if c.transparent() {
		addPrerouting(t)
	}
	c.addForward(t)
	c.addPublish(t)
	c.addPostrouting(t)
	c.addElements(t)
	return t
}

// addPrerouting checks packets from transparent links, before any rule of others. All packets of the host pass this
// chain. So the chain exists only if there are such links.
func addPrerouting(t *table) {
	t.addBaseChain("prerouting", filterType, nftables.ChainHookPrerouting, beforeRaw,
		// With route_localnet a container would reach the host's 127.0.0.1.
		rule(iifgroup(GroupTransparent), toLoopback(), dropVerdict()),
		rule(iifgroup(GroupTransparent), ethernet(), iifname(1), etherSaddr(2), ipSaddr(14), inSet("own"), acceptVerdict()),
		rule(iifgroup(GroupTransparent), dropVerdict()))
}

func toLoopback() []expr.Any {
	return rule(ipDaddr(1), mask(255, 0, 0, 0), equal([]byte{127, 0, 0, 0}))
}

// addForward drops what no container may reach, and all that an internal endpoint exchanges
// with a link that is not ours. Such an endpoint reaches the host, and the endpoints behind
// our links on this VM. The chain comes after every DNAT, whoever made it. It accepts
// nothing: that is left to the firewall of the host.
func (c Config) addForward(t *table) {
	t.addBaseChain("forward", filterType, nftables.ChainHookForward, atFilter,
		rule(ipDaddr(1), verdictFrom("guarded")),
		rule(ipSaddr(1), inSet("internal"), notToOurs(), dropVerdict()),
		rule(ipDaddr(1), inSet("internal"), notFromOurs(), dropVerdict()))
	// The host agent's HTTP is for the host's own agents. Another VM's containers
	// come by a NIC, when a service of this VM leads there.
	t.addChain("host_agent",
		rule(l4proto(1), equal([]byte{unix.IPPROTO_TCP}), destPort(1), equal(be16(80)), gotoChain("containers")),
		rule(l4proto(1), equal([]byte{unix.IPPROTO_TCP}), destPort(1), equal(be16(32526)), gotoChain("containers")))
	t.addChain("containers",
		rule(fromOurs(), dropVerdict()),
		rule(iifname(1), inSet("nics"), dropVerdict()))
	t.addChain("metadata",
		rule(ipSaddr(1), inSet("no_metadata"), dropVerdict()))
}

// addPublish leads ports of the host to containers. What comes by a NIC is led to
// containers of that NIC alone: the answer leaves by the container's own NIC, and
// Azure drops a packet whose source address does not belong to the NIC that sends it.
func (c Config) addPublish(t *table) {
	local := rule(fibDaddrType(), equal(be32host(rtnLocal)), gotoChain("publish"))
	t.addBaseChain("ports_prerouting", natType, nftables.ChainHookPrerouting, beforeDNAT, local)
	t.addBaseChain("ports_output", natType, nftables.ChainHookOutput, beforeDNAT, local)
	t.addChain("publish",
		rule(ipDaddr(1), l4proto(9), destPort(10), valueFrom("published_at"), dnat()),
		rule(iifname(1), l4proto(2), destPort(13), valueFrom("published_by"), dnat()),
		rule(iifname(1), inSet("nics"), returnVerdict()),
		rule(l4proto(1), destPort(9), valueFrom("published"), dnat()))
}

// addPostrouting decides what leaves with which source address. It comes after every
// DNAT and asks for no packet mark.
func (c Config) addPostrouting(t *table) {
	t.addBaseChain("postrouting", natType, nftables.ChainHookPostrouting, beforeSNAT,
		// Through a published port, a container would receive from itself, or from 127.0.0.1.
		rule(ipSaddr(1), ipDaddr(9), inSet("self"), masquerade()),
		rule(toOurs(), ipSaddr(1), mask(255, 0, 0, 0), equal([]byte{127, 0, 0, 0}), masquerade()),
		rule(toOurs(), acceptVerdict()),
		rule(ipSaddr(1), verdictFrom("sources")))
	for _, n := range c.Networks {
		if !n.SNAT {
			continue
		}
		direct := t.addSet("direct_"+n.ID, nftables.TypeIPAddr)
		direct.interval = true
		direct.addRanges(n.direct(c.Subnets))
		accepted := rule(ipDaddr(1), inSet(direct.name), acceptVerdict())
		if n.Direct != nil { // a VM may be a site's gateway: by whatever link
			t.addChain(snatChain(n.ID), accepted, rule(masquerade()))
			continue
		}
		t.addChain(snatChain(n.ID), rule(oifname(1), notInSet("nics"), masquerade()), accepted, rule(masquerade()))
	}
}

// direct is what leaves as it is. The metadata service never answers a secondary
// address, and the host agent always does.
func (n Network) direct(subnets []netip.Prefix) []addrRange {
	list := n.Direct
	if list == nil {
		list = slices.Concat(defaultDirect, subnets)
	}
	list = append(slices.Clone(list), netip.PrefixFrom(hostAgent, 32))
	return subtractRanges(rangesOf(list...), rangesOf(netip.PrefixFrom(metadata, 32)))
}

func snatChain(network string) string { return "snat_" + network }

// addElements adds the endpoints' elements of the table.
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

// elements are all that programs the endpoint, each set with the endpoint's
// elements alone.
func (c Config) elements(e Endpoint) []*set {
	port, mac, ip := nameKey(e.Link), macKey(e.MAC), ipKey(e.Addr)
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
		add(arpTable, "own", none, plain(port+mac+ip))
		add(ipTable, "own", none, plain(port+mac+ip))
	} else {
		to, all := macKey(e.BridgeMAC), macKey(net.HardwareAddr{255, 255, 255, 255, 255, 255})
		add(bridgeTable, "own", none, plain(port+mac+to+ip))
		add(bridgeTable, "own_arp", none, plain(port+mac+to+mac+ip, port+mac+all+mac+ip))
	}
	if e.Internal {
		add(ipTable, "internal", none, plain(ip))
	} else if i := slices.IndexFunc(c.Networks, func(n Network) bool { return n.ID == e.Network }); i >= 0 && c.Networks[i].SNAT {
		add(ipTable, "sources", nftables.TypeVerdict, map[elemKey]string{{bytes: ip}: "goto " + snatChain(e.Network)})
	}
	if e.NoMetadata {
		add(ipTable, "no_metadata", none, plain(ip))
	}
	return append(all, e.portElements()...)
}

// portElements are those that lead ports of the host to the endpoint.
func (e Endpoint) portElements() []*set {
	if len(e.Ports) == 0 {
		return nil
	}
	ip := ipKey(e.Addr)
	at, by, everywhere := map[elemKey]string{}, map[elemKey]string{}, map[elemKey]string{}
	for _, p := range e.Ports {
		from, to := protoKey(p.UDP)+portKey(p.HostPort), ip+portKey(p.Port)
		if p.HostAddr.IsValid() {
			at[elemKey{bytes: ipKey(p.HostAddr) + from}] = to
			continue
		}
		everywhere[elemKey{bytes: from}] = to
		if e.NIC != "" {
			by[elemKey{bytes: nameKey(e.NIC) + from}] = to
		}
	}
	all := []*set{
		{table: ipTable, name: "self", elems: map[elemKey]string{{bytes: ip + ip}: ""}},
		{table: ipTable, name: "published_at", data: targetType, elems: at},
		{table: ipTable, name: "published_by", data: targetType, elems: by},
		{table: ipTable, name: "published", data: targetType, elems: everywhere},
	}
	return slices.DeleteFunc(all, func(s *set) bool { return len(s.elems) == 0 })
}

func verdict(kind expr.VerdictKind, chain string) []expr.Any {
	return oneExpression(&expr.Verdict{Kind: kind, Chain: chain})
}
func acceptVerdict() []expr.Any { return verdict(expr.VerdictAccept, "") }
func dropVerdict() []expr.Any   { return verdict(expr.VerdictDrop, "") }
func returnVerdict() []expr.Any { return verdict(expr.VerdictReturn, "") }
func gotoChain(name string) []expr.Any {
	return verdict(expr.VerdictGoto, name)
}
