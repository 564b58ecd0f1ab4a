// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Published ports have an nft table of their own, which is there while there
// are any: DNAT before iptables' own, and masquerading before iptables' own of
// those flows whose replies would not come up to the host and be undone.
var publishTable = &nftables.Table{Name: tableName, Family: nftables.TableFamilyIPv4}

// Hooks of iptables' nat table are at -100 and 100, of its raw table at -300.
const (
	beforeDNAT = -101
	beforeSNAT = 99
	asRaw      = -300
)

// Of linux/netfilter/nf_conntrack_common.h and linux/rtnetlink.h.
const (
	ipsDNAT  = 1 << 5
	rtnLocal = 2
)

var (
	hostPortType  = nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService)
	addrPortType  = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService)
	containerType = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService)
	targetType    = nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeIPAddr, nftables.TypeInetService)
)

// published is the whole table of published ports.
func (in *tableInput) published() *tableState {
	t := &tableState{table: publishTable}
	t.set("published_at", addrPortType, containerType)
	t.set("published", hostPortType, containerType)
	t.set("targets", targetType, nftables.TypeVerdict)
	bridges := t.set("bridges", nftables.TypeIFName, nftables.SetDatatype{})

	local := join(one(&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true}), is(binaryutil.NativeEndian.PutUint32(rtnLocal)))
	// With route_localnet the host's 127.0.0.1 would be anybody's on the wire.
	loopback := func(load func(uint32) []expr.Any) []expr.Any {
		return join(meta(expr.MetaKeyIIFNAME, 1), lookup("bridges"), load(1),
			one(&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: []byte{255, 0, 0, 0}, Xor: make([]byte, 4)}),
			is([]byte{127, 0, 0, 0}), drop())
	}
	t.base("raw", nftables.ChainHookPrerouting, asRaw, loopback(ipDaddr), loopback(ipSaddr))
	t.base("prerouting", nftables.ChainHookPrerouting, beforeDNAT, join(local, jump("publish")))
	t.base("output", nftables.ChainHookOutput, beforeDNAT, join(local, jump("publish")))
	t.base("postrouting", nftables.ChainHookPostrouting, beforeSNAT,
		join(isDNAT(), l4proto(1), ipDaddr(9), thDport(10), vmap("targets")))
	for _, c := range t.chains[1:] {
		c.kind = nftables.ChainTypeNAT
	}
	t.chain("publish",
		join(ipDaddr(1), l4proto(9), thDport(10), find("published_at"), dnat()),
		join(l4proto(1), thDport(9), find("published"), dnat()))

	for _, b := range in.bridges {
		bridges.elems[elemKey{bytes: ifname(b.Name)}] = ""
		done := map[string]bool{}
		for host, ports := range in.ports {
			a := in.endpoints[host]
			if a.bridge != b.Name || len(ports) == 0 {
				continue
			}
			for i, s := range publishedElements(a, ports) {
				for k, v := range s.elems {
					t.sets[i].elems[k] = v
				}
			}
			if !done[a.policy] {
				done[a.policy] = true
				in.addBypass(t, a)
			}
		}
	}
	return t
}

// addBypass adds the chain of a's network: whom its containers answer past the
// host must be seen with the host's address.
func (in *tableInput) addBypass(t *tableState, a alias) {
	subnets := slices.Clone(in.subnets[a.bridge])
	for _, other := range in.endpoints {
		if other.bridge == a.bridge {
			subnets = append(subnets, other.addr.Masked())
		}
	}
	p := policyOf(in.policies, a.policy)
	set := t.set("bypass_"+a.bridge+"_"+a.policy, nftables.TypeIPAddr, nftables.SetDatatype{})
	set.interval = true
	set.add(p.bypass(subnets, in.away), "")
	t.chain(masqueradeChain(a), join(ipSaddr(1), lookup(set.name), one(&expr.Masq{})))
}

// bypass is whom a container of policy p answers without the host: what is
// direct, or all without SNAT, and always the host agent, whose probes come to
// the host too. 127.0.0.1 is of no use to a container.
func (p Policy) bypass(subnets []netip.Prefix, away []span) []span {
	agent, loopback := spans(netip.PrefixFrom(hostAgent, 32)), spans(netip.PrefixFrom(netip.AddrFrom4([4]byte{127}), 8))
	out := subtract([]span{{0, 1<<32 - 1}}, away)
	if p.SNAT {
		out = p.direct(subnets, away)
	}
	return merge(slices.Concat(out, agent, loopback))
}

func masqueradeChain(a alias) string { return "masquerade_" + a.bridge + "_" + a.policy }

// publishedElements are an endpoint's elements of the table's first three sets.
func publishedElements(a alias, ports []Port) []*tableSet {
	at := &tableSet{table: publishTable, name: "published_at", data: containerType, elems: map[elemKey]string{}}
	all := &tableSet{table: publishTable, name: "published", data: containerType, elems: map[elemKey]string{}}
	targets := &tableSet{table: publishTable, name: "targets", data: nftables.TypeVerdict, elems: map[elemKey]string{}}
	for _, p := range ports {
		hostPort, port := protoKey(p.Proto)+portKey(p.HostPort), portKey(p.Port)
		container := ipKey(a.addr.Addr()) + port
		if p.HostAddr.IsValid() {
			at.elems[elemKey{bytes: ipKey(p.HostAddr) + hostPort}] = container
		} else {
			all.elems[elemKey{bytes: hostPort}] = container
		}
		targets.elems[elemKey{bytes: protoKey(p.Proto) + container}] = "goto " + masqueradeChain(a)
	}
	return []*tableSet{at, all, targets}
}

// readPublished reads from the table what it publishes, by container.
func readPublished() (map[netip.Addr][]Port, error) {
	t, err := readTable(publishTable)
	if err != nil {
		return nil, fmt.Errorf("nft table ip %s: %w", tableName, err)
	}
	out := map[netip.Addr][]Port{}
	for _, s := range t.sets {
		for k, v := range s.elems {
			key, p := k.bytes, Port{}
			switch {
			case s.name == "published_at" && len(key) == 12:
				p.HostAddr, _ = netip.AddrFromSlice([]byte(key[:4]))
				key = key[4:]
			case s.name != "published" || len(key) != 8:
				continue
			}
			if len(v) != 8 {
				continue
			}
			to, _ := netip.AddrFromSlice([]byte(v[:4]))
			p.Proto, p.HostPort, p.Port = protoOf(key[0]), portOf(key[4:]), portOf(v[4:])
			out[to] = append(out[to], p)
		}
	}
	for _, ports := range out {
		slices.SortFunc(ports, func(a, b Port) int { return slices.Compare([]uint16{a.Port, a.HostPort}, []uint16{b.Port, b.HostPort}) })
	}
	return out, nil
}

// syncPublished makes the table and what it rests on as in says, and reports
// whether a published port was not served. None: no table, and 127.0.0.1 is the
// host's alone again.
func (h *Host) syncPublished(in tableInput) (changed bool, err error) {
	var all []Port
	for _, ports := range in.ports {
		all = append(all, ports...)
	}
	if len(all) == 0 {
		if err := h.routeLocalnet(in.bridges, "0"); err != nil {
			return false, err
		}
		return false, deleteTable(publishTable)
	}
	if changed, err = writeTable(in.published()); err != nil {
		return false, err
	}
	if changed {
		var nf netfilter
		defer nf.close()
		if err := nf.forgetDatagrams(all); err != nil {
			return true, err
		}
	}
	return changed, h.routeLocalnet(in.bridges, "1")
}

// routeLocalnet lets the host's packets from 127.0.0.1 leave by the bridges.
func (h *Host) routeLocalnet(bridges []Bridge, value string) error {
	for _, b := range bridges {
		name := "ipv4/conf/" + b.Name + "/route_localnet"
		if _, err := h.setSysctl(name, value); err != nil && !errors.Is(err, os.ErrNotExist) { // before the bridge is made
			return fmt.Errorf("set %s to %s: %w", name, value, err)
		}
	}
	return nil
}

func protoKey(proto string) string {
	if proto == "udp" {
		return string([]byte{unix.IPPROTO_UDP, 0, 0, 0})
	}
	return string([]byte{unix.IPPROTO_TCP, 0, 0, 0})
}

func protoOf(n byte) string {
	if n == unix.IPPROTO_UDP {
		return "udp"
	}
	return "tcp"
}

func portKey(port uint16) string { return string(append(be16(port), 0, 0)) }
func portOf(key string) uint16   { return uint16(key[0])<<8 | uint16(key[1]) }

func l4proto(reg uint32) []expr.Any { return meta(expr.MetaKeyL4PROTO, reg) }
func thDport(reg uint32) []expr.Any { return load(thHeader, 2, 2, reg) }

// dnat leads to the address and port that a map of containerType found.
func dnat() []expr.Any {
	return one(&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegAddrMax: 1, RegProtoMin: 9, RegProtoMax: 9, Specified: true})
}

func isDNAT() []expr.Any {
	bit := binaryutil.NativeEndian.PutUint32(ipsDNAT)
	return join(one(&expr.Ct{Register: 1, Key: expr.CtKeySTATUS}),
		one(&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: bit, Xor: make([]byte, 4)}),
		cmpTo(expr.CmpOpNeq, make([]byte, 4)))
}
