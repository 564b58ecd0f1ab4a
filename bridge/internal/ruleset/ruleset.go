// Copyright (c) The azure-vnet authors. MIT licence.

// Package ruleset is the nftables rules of azure-vnet: plain values in, tables
// out. It decides which frames a container may send, which packets are forwarded,
// what leaves with the NIC's own address, and which port of the host leads to
// which container. It reads and writes nf_tables alone; it knows neither links nor
// files.
//
// There are up to three tables, all named azure_vnet: family bridge checks what
// comes from ports of our bridges, family arp what comes by ARP from transparent
// links, and family ip does the rest. A container is programmed by its set
// elements alone, in one transaction, while the chains stay as they are.
package ruleset

import (
	"net"
	"net/netip"
	"slices"
	"syscall"

	"github.com/google/nftables"

	"azurevnet/bridge/internal/nfnl"
)

// Name is the name of each of the tables.
const Name = "azure_vnet"

// The link groups that the rules tell links of azure-vnet by. Whoever makes such a
// link gives it its group in the message that creates it.
const (
	GroupBridge      = 16862 // a bridge of ours, and each of its ports
	GroupTransparent = 16863 // the host end of a transparent endpoint
)

// Config is all that the tables derive from.
type Config struct {
	Bridges     bool           // a bridge of ours stands
	Transparent bool           // transparent endpoints may come
	NICs        []string       // names of the VM's NICs
	Subnets     []netip.Prefix // of these NICs: reached without SNAT by networks whose Direct is nil
	Networks    []Network      // kinds of networks; each ID once
	Endpoints   []Endpoint     // that stand
}

// Network is how the endpoints of a network leave the host. Networks that are alike
// are one.
type Network struct {
	ID     string         // names the network's chain
	SNAT   bool           // what is not direct leaves with the address of the link that it leaves by; false: all leaves as it is
	Direct []netip.Prefix // leaves as it is, by whatever link; nil: RFC 1918, 100.64.0.0/10 and Subnets, by the NICs alone
}

// Endpoint is what the rules need to know of a container's interface.
type Endpoint struct {
	Link       string           // name of the host end
	MAC        net.HardwareAddr // of the container's interface
	Addr       netip.Addr
	BridgeMAC  net.HardwareAddr // of the bridge that the host end is a port of; nil: transparent
	NIC        string           // name of the NIC whose address it has; empty: that NIC is gone
	Network    string           // ID
	Internal   bool             // reaches the host and other endpoints, and is reached by them, and nothing else
	NoMetadata bool             // does not reach 169.254.169.254
	Ports      []Port           // of the host that lead to it
}

// Port is a port of the host that leads to a container.
type Port struct {
	UDP      bool       // else TCP
	HostAddr netip.Addr // zero: each address of the host, except those of other NICs than the endpoint's
	HostPort uint16
	Port     uint16 // of the container
}

// The addresses that mean the same on every Azure VM.
var (
	hostAgent = netip.MustParseAddr("168.63.129.16")   // answers secondary addresses as they are
	metadata  = netip.MustParseAddr("169.254.169.254") // does not answer secondary addresses
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

// tables are all that there may be, in the order in which they are written: what
// restricts comes before what opens.
func allTables() []*nftables.Table { return []*nftables.Table{bridgeTable, arpTable, ipTable} }

// tables are those that c asks for.
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
