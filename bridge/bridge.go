// Copyright (c) The azure-vnet authors. MIT licence.

// Package bridge attaches containers to the host's network: it makes azure0, veth
// pairs, routes to containers, and the rules that containers live by. The NIC stays
// the host's: no address, route, rule, name or flag of it is changed. It is not the
// pool: it is told addresses and never chooses one, and it knows neither Docker nor
// CNI.
//
// The kernel is the record. What is attached is read from links: their names, link
// groups and aliases. <run>/azure-vnet/host.json holds only what the kernel cannot:
// what was asked of each NIC, the networks' policies, and who claimed which port of
// the host. Every call can be repeated, and a repeat finishes what a crash left.
package bridge

import (
	"net"
	"net/netip"
)

// Config says where the host's directories are, as this process sees them. The zero
// value is right outside a container.
type Config struct {
	Run    string // the host's /run; empty: /run. State lies in Run/azure-vnet
	Sysctl string // the host's /proc/sys/net; empty: that
}

// Mode is where the host end of an endpoint's veth is plugged.
type Mode string

// The modes. Both may stand on one host.
const (
	ModeBridge      Mode = "bridge"      // a port of the NIC's bridge
	ModeTransparent Mode = "transparent" // on its own: for policy engines that match a container's own interface
)

// Modes are all of them.
var Modes = []Mode{ModeBridge, ModeTransparent}

// Spec is what a network asks of the host: see Ensure.
type Spec struct {
	MAC     string       // of the NIC, lower case with colons; required
	Name    string       // of its bridge; empty: the one that it has, else azure0 for the primary NIC and azure<ifindex> for another
	Primary bool         // the NIC is the VM's primary
	Mode    Mode         // empty: ModeBridge
	Subnet  netip.Prefix // of the virtual network, which the NIC is in; none: told by the NIC's addresses

	// NICs are the MACs of all NICs of the VM, as far as known. What leaves by one of
	// them stays in the virtual network, whether or not its addresses are lent.
	NICs []string
}

// Bridge is what stands for a NIC.
type Bridge struct {
	Name   string           // azure0; empty: only transparent endpoints are asked for
	MAC    net.HardwareAddr // of the bridge, and no NIC's; nil without a bridge
	MTU    int              // bytes, the NIC's
	NIC    string           // its name, eth0; empty: it is gone
	NICMAC string           // lower case with colons

	Mended []string // of Ensure alone: what it found broken on the host and mended, in sentences
}

// Policy is what a network may reach, and how.
type Policy struct {
	Internal   bool           // the host and other endpoints are reached, and nothing else; SNAT and Direct do not matter then
	SNAT       bool           // what is not direct leaves with the address of the link that it leaves by; off: all leaves as it is
	Direct     []netip.Prefix // leaves as it is, by whatever link; nil: RFC 1918, 100.64.0.0/10 and the NICs' subnets, as far as they leave by a NIC
	NoMetadata bool           // 169.254.169.254 is not reached
}

// Endpoint is a wish for a container's interface.
type Endpoint struct {
	Owner   string           // id of the endpoint: names the host end and stands in its alias. No spaces, at most 255 bytes
	Lease   string           // owner of the address's lease, kept in the alias; empty: Owner
	Pod     string           // namespace/name of the pod that the container is of, kept in the alias as far as there is room; empty: none, or not known
	NIC     string           // MAC of the NIC that has the address, lower case with colons; required
	Bridge  string           // the NIC's bridge, which Ensure has made; empty: transparent
	Addr    netip.Prefix     // the container's address with its subnet's mask
	Gateway netip.Addr       // Azure's, in the subnet; ignored without Netns
	MAC     net.HardwareAddr // of the container's interface; nil: derived from Addr, so that an address keeps its MAC
	MTU     int              // bytes, of both ends; 0: the NIC's
	Policy  Policy
	Ports   []PublishedPort // of the host that lead to it; those that are Idle are claimed for it, until Publish has them lead to it
	Netns   string          // path of the container's network namespace; empty: the container end stays here for the caller to move
	IfName  string          // name in Netns; required with Netns
}

// Attachment is a container's interface as the kernel holds it.
type Attachment struct {
	Owner       string // as given; sha256:<hex> where it did not fit the alias
	Lease       string // owner of its address's lease
	Pod         string // namespace/name; empty: none, not known, or it did not fit the alias
	Link        string // host end
	Peer        string // container end while it lies in the host's namespace, else empty
	Bridge      string // as asked for, also while the link is not in it; empty: transparent
	NIC         string // MAC, lower case with colons
	Addr        netip.Prefix
	MAC         net.HardwareAddr // container's
	MTU         int              // bytes
	Ports       []PublishedPort  // published: they lead to it
	InContainer bool             `json:"Away"` // the container end lies in another network namespace, so a container has it. The key is that of earlier releases' status
}
