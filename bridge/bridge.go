// Copyright (c) The azure-vnet authors. MIT licence.

// Package bridge is the host's network: azure0 made from the NIC, container
// endpoints on it, Azure's L2 rules in one nft table, SNAT. It is not the pool:
// it is told addresses and never chooses one, and knows neither Docker nor CNI.
//
// The kernel is the record. What is attached is read from links (names and
// aliases); <run>/azure-vnet/host.json holds only what the kernel cannot: the
// journal and snapshot of a NIC's move and the networks' SNAT policies.
// Everything is ensure, or absent is success: a repeat finishes what a crash
// left.
package bridge

import (
	"net"
	"net/netip"
)

// Config says where the host's directories are, as this process sees them. The
// zero value is right outside a container.
type Config struct {
	Run    string // the host's /run; empty: /run. State lies in Run/azure-vnet
	Sysctl string // the host's /proc/sys/net; empty: that
}

// Spec is a wish for a bridge over a NIC.
type Spec struct {
	MAC     string // the NIC, lower case with colons; required
	Name    string // of the bridge; empty: the one the NIC is in, else azure0 for the primary, azure<ifindex> for another
	Primary bool   // the NIC is the VM's primary
	MTU     int    // bytes, of the bridge and its endpoints; 0: the NIC's

	// NICs are the MACs of all NICs of the VM, as far as known: what the host
	// routes to one of them goes to the VNet too, whether or not it has a bridge.
	NICs []string
}

// Bridge is a bridge of ours as it stands.
type Bridge struct {
	Name string           // azure0
	NIC  string           // name of its NIC, eth0
	MAC  net.HardwareAddr // of both
	MTU  int              // bytes

	Mended []string // of Ensure: what it found broken on the host and mended, in sentences
}

// Policy is what a network may reach, and how.
type Policy struct {
	Internal bool           // the host and its bridge's endpoints are reached, and nothing through the NIC; the rest does not matter then
	SNAT     bool           // what is not direct leaves with the primary address of the bridge's NIC; off: it leaves as it is
	Direct   []netip.Prefix // reached without SNAT; nil: RFC 1918, 100.64.0.0/10 and the NIC's subnets. 168.63.129.16 always is; what the host routes through another link never is
}

// Endpoint is a wish for a container's interface.
type Endpoint struct {
	Owner   string           // id of the endpoint: names the host veth and stands in its alias. No spaces, at most 255 bytes
	Lease   string           // owner of the address's lease, kept in the alias; empty: Owner
	Bridge  string           // bridge to attach to, which must stand
	Addr    netip.Prefix     // the container's address with its subnet's mask
	Gateway netip.Addr       // default gateway in Netns; ignored without Netns and with an internal policy
	MAC     net.HardwareAddr // of the container's interface; nil: derived from Addr, so that a reused address keeps its MAC
	Policy  Policy
	Ports   []Port // of the host that lead to it
	Netns   string // path of the container's network namespace; empty: the container's end stays here for the caller to move
	IfName  string // name in Netns; required with Netns
}

// Attachment is a container's interface as the kernel holds it.
type Attachment struct {
	Owner  string // as given; sha256:<hex> where it did not fit the alias
	Lease  string // owner of its address's lease
	Link   string // host veth
	Peer   string // container's end while it lies in the host's namespace, else empty
	Bridge string // as asked for, also while the link is not in it
	NIC    string // MAC of the bridge, lower case with colons; empty while there is no such bridge
	Addr   netip.Prefix
	MAC    net.HardwareAddr // container's
	Ports  []Port           // published
	Away   bool             // the container's end lies in another namespace: a container has it
}
