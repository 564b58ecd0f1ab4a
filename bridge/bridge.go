// Copyright (c) The azure-vnet authors. MIT licence.

// Package bridge attaches containers to the host's network. It makes azure0, veth pairs, routes to containers,
// and the nftables rules that containers live by. The NIC stays the host's: the package changes no route, rule,
// name or flag of it. It sets one sysctl of the NIC, forwarding. Only Reclaim takes addresses off the NIC, and
// an administrator asks for that.
//
// The package is not the pool: its caller gives it addresses, and it never chooses one. It knows neither Docker
// nor CNI.
//
// The kernel is the record of what is attached. The package reads attachments from the links: from their names, link
// groups and aliases. The file <run>/azure-vnet/host.json has only what the kernel cannot tell. It has the wishes for
// each NIC, the networks' policies, the ports that endpoints have claimed, and the links that the package put into
// zones of firewalld. Every call can be repeated. A repeat finishes what a crash left.
package bridge

import (
	"net"
	"net/netip"
)

// Config says where the host's directories are, as this process sees them. The zero value is right outside of a
// container.
type Config struct {
	Run    string // the host's /run; empty: /run. The package's files are in Run/azure-vnet
	Sysctl string // the host's /proc/sys/net; empty: /proc/sys/net
}

// Mode says how the host end of an endpoint's veth is connected.
type Mode string

// The modes. Both may be in use on one host.
const (
	ModeBridge      Mode = "bridge"      // the host end is a port of the NIC's bridge
	ModeTransparent Mode = "transparent" // the host end is in no bridge. This is for policy engines that match a container's own interface
)

// Modes has every mode.
var Modes = []Mode{ModeBridge, ModeTransparent}

// Spec is what a network asks of the host. Ensure takes it.
type Spec struct {
	MAC     string       // of the NIC, lower case with colons; required
	Name    string       // of the NIC's bridge; empty: the bridge that the NIC has, else azure0 for the primary NIC and azure<ifindex> for another
	Primary bool         // the NIC is the VM's primary
	Mode    Mode         // empty: ModeBridge
	Subnet  netip.Prefix // of the virtual network that the NIC is in; invalid: the subnet is taken from the NIC's addresses

	// NICs are the MACs of all NICs of the VM, as far as they are known. A packet that leaves by one of these
	// NICs stays in the virtual network, whether or not addresses of that NIC are lent.
	NICs []string
}

// Bridge says what a NIC has for its containers.
type Bridge struct {
	Name   string           // such as azure0; empty: the NIC has transparent endpoints only
	MAC    net.HardwareAddr // of the bridge. It differs from every NIC's MAC. nil: there is no bridge
	MTU    int              // in bytes; it is the NIC's
	NIC    string           // the NIC's name, such as eth0; empty: the NIC is gone
	NICMAC string           // the NIC's MAC, lower case with colons

	Mended []string // of Ensure alone: sentences that say what Ensure found broken on the host and mended
}

// Policy says which destinations a network's containers may reach, and with which source address.
type Policy struct {
	Internal   bool           // containers reach only the host and other endpoints. SNAT and Direct mean nothing then
	SNAT       bool           // packets to destinations that are not direct leave with the address of the link that they leave by; false: all packets leave with the container's address, unless rules of others do SNAT
	Direct     []netip.Prefix // destinations reached with the container's address, by whatever link; nil: RFC 1918, 100.64.0.0/10 and the NICs' subnets, as far as they are reached by a NIC
	NoMetadata bool           // containers do not reach 169.254.169.254
}

// Endpoint is the wish for a container's interface. Attach takes it.
type Endpoint struct {
	Owner   string           // id of the endpoint. The host end's name derives from it, and the host end's alias has it. 1 to 255 bytes, no spaces
	Lease   string           // the owner of the address's lease; the alias has it too. Empty: Owner
	Pod     string           // namespace/name of the container's pod. The alias has it as far as there is room; empty: none, or not known
	NIC     string           // MAC of the NIC that the address belongs to, lower case with colons; required
	Bridge  string           // name of the NIC's bridge, which Ensure has made; empty: the endpoint is transparent
	Addr    netip.Prefix     // the container's address, with the mask of its subnet
	Gateway netip.Addr       // Azure's gateway in the subnet. It is ignored if Netns is empty
	MAC     net.HardwareAddr // of the container's interface; nil: it is derived from Addr, so an address always has the same MAC
	MTU     int              // of both ends, in bytes; 0: the NIC's
	Policy  Policy
	Ports   []PublishedPort // ports of the host that lead to the container. Those that are Idle are claimed for it, and lead nowhere until Publish
	Netns   string          // path of the container's network namespace; empty: the container end stays in the host's namespace, and the caller moves it
	IfName  string          // the interface's name in Netns; required with Netns
}

// Attachment is a container's interface as the kernel has it.
type Attachment struct {
	Owner       string // as given to Attach; sha256:<hex> if it did not fit into the alias
	Lease       string // the owner of the address's lease; sha256:<hex> if it did not fit into the alias
	Pod         string // namespace/name; empty: none, not known, or it did not fit into the alias
	Link        string // name of the host end
	Peer        string // name of the container end while it is in the host's namespace, else empty
	Bridge      string // name of the bridge that was asked for, also while the host end is not in it; empty: transparent
	NIC         string // the NIC's MAC, lower case with colons
	Addr        netip.Prefix
	MAC         net.HardwareAddr // of the container's interface
	MTU         int              // of the host end, in bytes
	Ports       []PublishedPort  // ports of the host that lead to the container, and, from Attach alone, those that are Idle
	InContainer bool             `json:"Away"` // the container end lies in another network namespace, so a container has it. The key is that of earlier releases' status
}
