// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The table's names. Shared: src_ip, src_arp and src_ip6 say what an endpoint may send,
// from_nic and to_nic send a NIC's frames to its bridge's chains. Per bridge,
// with its name: ep4 and the chains fabric, wire, arp and host; where it has
// internal endpoints, the set inner and the chain arpin. Per policy and bridge,
// with both: the map dst and the chain net. Names are none of nft's keywords, so
// that what it lists it can load.
const tableName = "azure_vnet"

var bridgeTable = &nftables.Table{Name: tableName, Family: nftables.TableFamilyBridge}

// snatMark on a packet asks the host's one MASQUERADE rule for it.
const snatMark = 0x10000

// tableState is the table, as wanted or as found.
type tableState struct {
	table  *nftables.Table
	chains []*tableChain
	sets   []*tableSet
}

type tableChain struct {
	table *nftables.Table
	name  string
	kind  nftables.ChainType      // with hook
	hook  *nftables.ChainHook     // nil: reached by goto
	prio  *nftables.ChainPriority // with hook
	rules [][]expr.Any
}

type tableSet struct {
	table    *nftables.Table
	name     string
	key      nftables.SetDatatype
	data     nftables.SetDatatype // zero: a set, no map
	interval bool
	elems    map[elemKey]string // value: bytes, or a verdict in nft's words
}

// elemKey is an element's key; end marks the first address after an interval.
type elemKey struct {
	bytes string
	end   bool
}

// table is the whole table: base chains, what endpoints may send, then each
// bridge's part.
func (in *tableInput) table() *tableState {
	t := &tableState{table: bridgeTable}
	src := t.set("src_ip", nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeEtherAddr, nftables.TypeIPAddr), nftables.TypeVerdict)
	arp := t.set("src_arp", nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeEtherAddr, nftables.TypeEtherAddr, nftables.TypeIPAddr), nftables.TypeVerdict)
	ip6 := t.set("src_ip6", nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeEtherAddr), nftables.SetDatatype{})
	fromNIC := t.set("from_nic", nftables.TypeIFName, nftables.TypeVerdict)
	toNIC := t.set("to_nic", nftables.TypeIFName, nftables.TypeVerdict)

	t.base("prerouting", nftables.ChainHookPrerouting, -300,
		join(iifname(1, expr.CmpOpEq), jump("endpoint")),
		join(meta(expr.MetaKeyIIFNAME, 1), vmap("from_nic")))
	// Bridged frames only: the host's own IPv6 and broadcasts pass elsewhere.
	t.base("forward", nftables.ChainHookForward, 0,
		join(iifname(1, expr.CmpOpNeq), accept()),
		join(meta(expr.MetaKeyOIFNAME, 1), is([]byte(hostPrefix)), accept()),
		join(etherType(unix.ETH_P_IPV6), drop()), // until IPv6 is served
		join(etherTypeNot(unix.ETH_P_ARP), multicast(), drop()))
	t.base("postrouting", nftables.ChainHookPostrouting, 300, // iifname is not known here
		join(meta(expr.MetaKeyOIFNAME, 1), is([]byte(hostPrefix)), accept()),
		join(meta(expr.MetaKeyOIFNAME, 1), vmap("to_nic")))
	// A frame that none of these knows bears a foreign address, a VLAN tag or a
	// protocol that the VNet has not.
	t.chain("endpoint",
		join(etherType(unix.ETH_P_IP), meta(expr.MetaKeyIIFNAME, 1), etherSaddr(2), ipSaddr(14), vmap("src_ip")),
		join(etherType(unix.ETH_P_ARP), meta(expr.MetaKeyIIFNAME, 1), etherSaddr(2), arpSaddrEther(14), arpSaddrIP(3), vmap("src_arp")),
		join(etherType(unix.ETH_P_IPV6), meta(expr.MetaKeyIIFNAME, 1), etherSaddr(2), lookup("src_ip6"), accept()),
		drop())
	// The host agent's HTTP is for the host's agents; its DNS is for all.
	t.chain("agent",
		join(tcpDport(80), drop()),
		join(tcpDport(32526), drop()))

	for host, a := range in.endpoints {
		if !slices.ContainsFunc(in.bridges, func(b Bridge) bool { return b.Name == a.bridge }) {
			continue
		}
		k := keysOf(host, a)
		src.elems[k.src] = "goto " + netChain(a.bridge, a.policy)
		arp.elems[k.arp] = "goto " + arpChain(a)
		if !a.internal() {
			ip6.elems[k.ip6] = ""
		}
	}
	for _, b := range in.bridges {
		fromNIC.elems[elemKey{bytes: ifname(b.NIC)}] = "goto fabric_" + b.Name
		toNIC.elems[elemKey{bytes: ifname(b.NIC)}] = "goto wire_" + b.Name
		in.addBridge(t, b)
	}
	return t
}

// addBridge adds b's map of addresses, its chains and its networks.
func (in *tableInput) addBridge(t *tableState, b Bridge) {
	name := "ep4_" + b.Name
	ep4 := t.set(name, nftables.TypeIPAddr, nftables.TypeEtherAddr)
	for _, ip := range in.held {
		ep4.elems[elemKey{bytes: ipKey(ip)}] = string(b.MAC)
	}
	subnets := slices.Clone(in.subnets[b.Name])
	inner := &tableSet{elems: map[elemKey]string{}}
	for _, a := range in.endpoints {
		if a.bridge == b.Name {
			ep4.elems[elemKey{bytes: ipKey(a.addr.Addr())}] = string(a.mac)
			subnets = append(subnets, a.addr.Masked())
			if a.internal() {
				inner.elems[elemKey{bytes: ipKey(a.addr.Addr())}] = ""
			}
		}
	}
	ip, arp := etherType(unix.ETH_P_IP), etherType(unix.ETH_P_ARP)
	request, reply := arpOp(1), arpOp(2)
	toOwner := join(arpDaddrIP(1), find(name), setEtherDaddr())

	// From the fabric all comes with the NIC's MAC and goes to the address's owner.
	fabric := [][]expr.Any{
		join(ip, ipDaddr(1), find(name), setEtherDaddr(), accept()),
		join(arp, toOwner, reply, arpDaddrIP(1), find(name), setARPDaddr(), accept()),
	}
	if len(inner.elems) > 0 {
		set := t.set("inner_"+b.Name, nftables.TypeIPAddr, nftables.SetDatatype{})
		set.elems = inner.elems
		fabric = slices.Concat([][]expr.Any{
			join(ip, ipDaddr(1), lookup(set.name), drop()),
			join(arp, arpDaddrIP(1), lookup(set.name), drop()),
		}, fabric)
		// Only who is here is asked, and only he is answered.
		t.chain("arpin_"+b.Name, join(arp, toOwner, accept()), drop())
	}
	t.chain("fabric_"+b.Name, fabric...)
	// To the fabric all goes from the NIC's MAC. What is here is not asked for
	// there: the lookup is written to the frame only to be dropped with it.
	t.chain("wire_"+b.Name,
		join(arp, request, toOwner, drop()),
		join(value(b.MAC), setEtherSaddr()),
		join(arp, value(b.MAC), setARPSaddr()))
	// An endpoint's question about an address here goes to its owner alone.
	t.chain("arp_"+b.Name,
		join(arp, request, toOwner))
	// Up to the host, which routes. Its bridge must take the frame for its own.
	t.chain("host_"+b.Name,
		join(value([]byte{unix.PACKET_HOST}), setMeta(expr.MetaKeyPKTTYPE), value(b.MAC), setEtherDaddr(), accept()))

	for _, id := range in.networks(b.Name) {
		in.addNetwork(t, b.Name, id, subnets)
	}
}

// addNetwork adds the chain of policy id on bridge and the map that it asks.
// With SNAT what is not direct goes up to the host, marked. Without, all leaves
// as it is, but what the host routes away goes up to it just so: the fabric
// could not deliver it.
func (in *tableInput) addNetwork(t *tableState, bridge, id string, subnets []netip.Prefix) {
	p := policyOf(in.policies, id)
	if p.Internal {
		t.chain(netChain(bridge, id),
			join(etherType(unix.ETH_P_IP), ipDaddr(1), find("ep4_"+bridge), setEtherDaddr(), accept()),
			drop())
		return
	}
	dst := t.set("dst_"+bridge+"_"+id, nftables.TypeIPAddr, nftables.TypeVerdict)
	dst.interval = true
	agent := spans(netip.PrefixFrom(hostAgent, 32))
	dst.add(agent, "goto agent")
	ask := join(etherType(unix.ETH_P_IP), ipDaddr(1), vmap(dst.name))
	if !p.SNAT {
		dst.add(subtract(in.away, agent), "goto host_"+bridge)
		t.chain(netChain(bridge, id), ask)
		return
	}
	dst.add(p.direct(subnets, in.away), "accept")
	t.chain(netChain(bridge, id), ask, join(orMark(snatMark), jump("host_"+bridge)))
}

func netChain(bridge, policy string) string { return "net_" + bridge + "_" + policy }

func arpChain(a alias) string {
	if a.internal() {
		return "arpin_" + a.bridge
	}
	return "arp_" + a.bridge
}

func (t *tableState) set(name string, key, data nftables.SetDatatype) *tableSet {
	s := &tableSet{table: t.table, name: name, key: key, data: data, elems: map[elemKey]string{}}
	t.sets = append(t.sets, s)
	return s
}

func (t *tableState) chain(name string, rules ...[]expr.Any) {
	t.chains = append(t.chains, &tableChain{table: t.table, name: name, rules: rules})
}

func (t *tableState) base(name string, hook *nftables.ChainHook, prio nftables.ChainPriority, rules ...[]expr.Any) {
	t.chains = append(t.chains, &tableChain{t.table, name, nftables.ChainTypeFilter, hook, &prio, rules})
}

// add maps each span to verdict. An end at 2^32 is none.
func (s *tableSet) add(list []span, verdict string) {
	for _, sp := range list {
		s.elems[elemKey{bytes: numberKey(sp.first)}] = verdict
		if sp.last < 1<<32-1 {
			s.elems[elemKey{bytes: numberKey(sp.last + 1), end: true}] = ""
		}
	}
}

// endpointKeys are an endpoint's elements in the maps that all bridges share.
type endpointKeys struct{ src, arp, ip6 elemKey }

func keysOf(host string, a alias) endpointKeys {
	port, mac, ip := ifname(host), string(append(slices.Clone(a.mac), 0, 0)), ipKey(a.addr.Addr())
	return endpointKeys{
		src: elemKey{bytes: port + mac + ip},
		arp: elemKey{bytes: port + mac + mac + ip},
		ip6: elemKey{bytes: port + mac},
	}
}

func ifname(name string) string {
	var b [unix.IFNAMSIZ]byte
	copy(b[:], name)
	return string(b[:])
}

func ipKey(a netip.Addr) string { b := a.As4(); return string(b[:]) }

func numberKey(n uint64) string { return string(binary.BigEndian.AppendUint32(nil, uint32(n))) }

// What follows spells nft's statements in the kernel's expressions. Registers:
// 1 to 4 are of 16 bytes, 8 to 23 their quarters.

func join(parts ...[]expr.Any) []expr.Any { return slices.Concat(parts...) }

func one(e expr.Any) []expr.Any { return []expr.Any{e} }

func accept() []expr.Any { return one(&expr.Verdict{Kind: expr.VerdictAccept}) }
func drop() []expr.Any   { return one(&expr.Verdict{Kind: expr.VerdictDrop}) }
func jump(chain string) []expr.Any {
	return one(&expr.Verdict{Kind: expr.VerdictGoto, Chain: chain})
}

func meta(key expr.MetaKey, reg uint32) []expr.Any { return one(&expr.Meta{Key: key, Register: reg}) }
func setMeta(key expr.MetaKey) []expr.Any {
	return one(&expr.Meta{Key: key, SourceRegister: true, Register: 1})
}

func cmpTo(op expr.CmpOp, data []byte) []expr.Any {
	return one(&expr.Cmp{Op: op, Register: 1, Data: data})
}
func is(data []byte) []expr.Any { return cmpTo(expr.CmpOpEq, data) }

func iifname(reg uint32, op expr.CmpOp) []expr.Any {
	return join(meta(expr.MetaKeyIIFNAME, reg), cmpTo(op, []byte(hostPrefix)))
}

func load(base expr.PayloadBase, offset, length, reg uint32) []expr.Any {
	return one(&expr.Payload{DestRegister: reg, Base: base, Offset: offset, Len: length})
}
func store(base expr.PayloadBase, offset uint32) []expr.Any {
	return one(&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: 1, Base: base, Offset: offset, Len: 6})
}

const (
	llHeader = expr.PayloadBaseLLHeader
	nhHeader = expr.PayloadBaseNetworkHeader
	thHeader = expr.PayloadBaseTransportHeader
)

func etherType(t uint16) []expr.Any { return join(load(llHeader, 12, 2, 1), is(be16(t))) }
func etherTypeNot(t uint16) []expr.Any {
	return join(load(llHeader, 12, 2, 1), cmpTo(expr.CmpOpNeq, be16(t)))
}
func etherSaddr(reg uint32) []expr.Any { return load(llHeader, 6, 6, reg) }
func ipSaddr(reg uint32) []expr.Any    { return load(nhHeader, 12, 4, reg) }
func ipDaddr(reg uint32) []expr.Any    { return load(nhHeader, 16, 4, reg) }

func arpOp(op uint16) []expr.Any          { return join(load(nhHeader, 6, 2, 1), is(be16(op))) }
func arpSaddrEther(reg uint32) []expr.Any { return load(nhHeader, 8, 6, reg) }
func arpSaddrIP(reg uint32) []expr.Any    { return load(nhHeader, 14, 4, reg) }
func arpDaddrIP(reg uint32) []expr.Any    { return load(nhHeader, 24, 4, reg) }

func setEtherDaddr() []expr.Any { return store(llHeader, 0) }
func setEtherSaddr() []expr.Any { return store(llHeader, 6) }
func setARPSaddr() []expr.Any   { return store(nhHeader, 8) }
func setARPDaddr() []expr.Any   { return store(nhHeader, 18) }

func multicast() []expr.Any {
	group := []byte{1, 0, 0, 0, 0, 0}
	return join(load(llHeader, 0, 6, 1), one(&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 6, Mask: group, Xor: make([]byte, 6)}), is(group))
}

func tcpDport(port uint16) []expr.Any {
	return join(etherType(unix.ETH_P_IP), load(nhHeader, 9, 1, 1), is([]byte{unix.IPPROTO_TCP}), load(thHeader, 2, 2, 1), is(be16(port)))
}

func orMark(bit uint32) []expr.Any {
	mask, xor := binaryutil.NativeEndian.PutUint32(^bit), binaryutil.NativeEndian.PutUint32(bit)
	return join(meta(expr.MetaKeyMARK, 1),
		one(&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mask, Xor: xor}),
		setMeta(expr.MetaKeyMARK))
}

func value(data []byte) []expr.Any { return one(&expr.Immediate{Register: 1, Data: data}) }

func lookup(set string) []expr.Any { return one(&expr.Lookup{SourceRegister: 1, SetName: set}) }
func find(m string) []expr.Any {
	return one(&expr.Lookup{SourceRegister: 1, DestRegister: 1, IsDestRegSet: true, SetName: m})
}
func vmap(m string) []expr.Any {
	return one(&expr.Lookup{SourceRegister: 1, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: m})
}

func be16(n uint16) []byte { return binary.BigEndian.AppendUint16(nil, n) }
