// Copyright (c) The azure-vnet authors. MIT licence.

// Package ruleset is azure-vnet's nftables rules: plain values in, tables out. The rules check the frames that a
// container sends. They restrict forwarding. They do SNAT: a packet leaves with the address of its outgoing link. They
// lead published ports of the host to containers. The package reads and writes nf_tables alone. It knows no links and
// no files.
//
// There are up to three tables, all named azure_vnet. The one of family bridge checks what comes from ports of
// our bridges. The one of family arp checks what comes by ARP from transparent links. The one of family ip does
// the rest. A new container needs only new elements of sets, which are added in one transaction; the chains
// stay as they are.
package ruleset

import (
	"net"
	"net/netip"
	"slices"
	"syscall"

	"github.com/google/nftables"

	"azurevnet/bridge/internal/nfnl"
)

// Name is the name of all three tables.
const Name = "azure_vnet"

// The link groups by which the rules recognise links of azure-vnet. A link gets its group in the message that
// creates it, so no link of ours ever lacks it.
const (
	GroupBridge      = 16862 // our bridges and their ports
	GroupTransparent = 16863 // host ends of transparent endpoints
)

// Config has all values that the tables derive from.
type Config struct {
	Bridges     bool           // the host has a bridge of ours
	Transparent bool           // transparent endpoints are asked for, even if none exists yet
	NICs        []string       // names of the VM's NICs
	Subnets     []netip.Prefix // subnets of these NICs, which policies without a Direct list reach without SNAT
	Policies    []Policy       // each ID once
	Endpoints   []Endpoint     // every endpoint of the host
}

// Policy says how packets of a network's endpoints leave the host. Networks with the same policy share one.
//
// Only SNAT is final. A packet without SNAT here meets later chains of others, such as that of iptables at priority
// 100. They may do SNAT.
type Policy struct {
	ID     string         // names the policy's chain
	SNAT   bool           // packets to destinations that are not direct leave with the address of the link that they leave by; false: all packets leave with the container's address
	Direct []netip.Prefix // destinations reached with the container's address, by whatever link; nil: RFC 1918, 100.64.0.0/10 and Subnets, as far as they are reached by a NIC
}

// Endpoint is what the rules need to know of a container's interface.
type Endpoint struct {
	Link       string           // name of the host end
	MAC        net.HardwareAddr // of the container's interface
	Addr       netip.Addr
	BridgeMAC  net.HardwareAddr // MAC of the bridge that the host end is a port of; nil: transparent
	NIC        string           // name of the NIC that the address belongs to; empty: the NIC is gone
	PolicyID   string           // of its Policy
	Internal   bool             // it exchanges packets with the host and with other endpoints only
	NoMetadata bool             // it does not reach 169.254.169.254
	Ports      []Port           // ports of the host that lead to it
}

// Port is a port of the host that leads to a container.
type Port struct {
	UDP      bool       // false: TCP
	HostAddr netip.Addr // address of the host; invalid: every address of the host, without those of other NICs than the endpoint's
	HostPort uint16
	Port     uint16 // of the container
}

// Addresses that are the same on every Azure VM.
var (
	hostAgent = netip.MustParseAddr("168.63.129.16")   // the host agent. It answers secondary addresses without SNAT
	metadata  = netip.MustParseAddr("169.254.169.254") // the metadata service. It answers a NIC's primary address only
)

// defaultDirect are the private ranges of RFC 1918 and RFC 6598.
var defaultDirect = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("100.64.0.0/10"),
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.168.0.0/16"),
}

var (
	bridgeTable = &nftables.Table{Name: Name, Family: nftables.TableFamilyBridge}
	arpTable    = &nftables.Table{Name: Name, Family: nftables.TableFamilyARP}
	ipTable     = &nftables.Table{Name: Name, Family: nftables.TableFamilyIPv4}
)

// allTables returns the tables in the order of writing. Tables that restrict containers come before those that open a
// way to them.
func allTables() []*nftables.Table { return []*nftables.Table{bridgeTable, arpTable, ipTable} }

// tables returns the tables that c asks for, with their chains and elements.
func (c Config) tables() []*table {
	var all []*table
	if c.Bridges {
		all = append(all, c.bridgeTable())
	}
	if c.transparent() {
		all = append(all, c.arpTable())
	}
	return append(all, c.ipTable())
}

func (c Config) transparent() bool {
	return c.Transparent || slices.ContainsFunc(c.Endpoints, Endpoint.transparent)
}

func (e Endpoint) transparent() bool { return e.BridgeMAC == nil }

// ConcernsEvent reports whether an event of nf_tables (NFNLGRP_NFTABLES) is about one of the tables. Elements of sets
// come and go with endpoints and do not count.
func ConcernsEvent(m syscall.NetlinkMessage) bool {
	_, table, ok := nfnl.EventTable(m)
	return ok && table == Name
}
