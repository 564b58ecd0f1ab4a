// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
)

// violations are what a port counts: offences that no VM's own boot commits
// and that Azure would drop in silence.
var violations = []string{
	"source_mac",  // a frame from another MAC than the NIC's
	"arp_mac",     // an ARP packet that names another MAC as its sender's
	"arp_ip",      // an ARP packet that names an address as its sender's that is not the NIC's
	"source_ip",   // an IPv4 packet from an address that is not the NIC's
	"multicast",   // an IPv4 frame to a multicast or broadcast MAC, but for DHCP
	"destination", // a frame to a MAC that is not the fabric's
	"ipv6",        // IPv6 from another link-local address than the NIC's own
	"protocol",    // neither ARP nor IP
	"host_agent",  // HTTP to the host agent from a secondary address
}

// portRules are Azure's rules for what a VM sends, in a table per port so that
// the counters live as long as the VM. What ends in a plain drop is not an
// offence: Azure does not answer it either. The VM's own primary address is
// not answered for by anyone.
const portRules = `
table netdev %[1]s {
	%[2]s
	counter own_ipv6 { }
	set own { type ipv4_addr; }
	chain ingress {
		type filter hook ingress device "%[1]s" priority 0; policy drop;
		ether saddr != %[3]s counter name source_mac drop
		ether type arp arp saddr ether != %[3]s counter name arp_mac drop
		ether type arp arp saddr ip 0.0.0.0 drop
		ether type arp arp saddr ip != @own counter name arp_ip drop
		ether type arp arp daddr ip %[4]s drop
		ether type arp ether daddr { ff:ff:ff:ff:ff:ff, %[5]s } accept
		ether type ip6 ip6 saddr %[6]s counter name own_ipv6 drop
		ether type ip6 counter name ipv6 drop
		ether type ip ether daddr ff:ff:ff:ff:ff:ff udp dport 67 drop
		ether type ip ether daddr & 01:00:00:00:00:00 == 01:00:00:00:00:00 counter name multicast drop
		ether daddr != %[5]s counter name destination drop
		ether type != ip counter name protocol drop
		ip saddr != @own counter name source_ip drop
		ip saddr != %[4]s ip daddr 168.63.129.16 tcp dport { 80, 32526 } counter name host_agent drop
		accept
	}
}
`

// fabricRules are Azure's rules between ports and internet: the platform
// translates primaries to their public addresses and back, drops what else
// leaves but for the host agent, and says nothing for addresses that nobody has.
const fabricRules = `
table ip fabric {
	set subnets { type ipv4_addr; flags interval; }
	set primaries { type ipv4_addr; }
	map public { type ipv4_addr : ipv4_addr; }
	map primary { type ipv4_addr : ipv4_addr; }
	map faults { type ipv4_addr . ipv4_addr : verdict; }
	chain untracked {
		type filter hook prerouting priority raw;
		iifname "p*" ip daddr @subnets notrack
	}
	chain refuse { reject with tcp reset; }
	chain forward {
		type filter hook forward priority filter; policy accept;
		tcp dport 80 ip saddr . ip daddr vmap @faults
		oifname != "net0" accept
		ip daddr @subnets drop
		ip daddr 168.63.129.16 accept
		ip saddr != @primaries drop
	}
	chain prerouting {
		type nat hook prerouting priority dstnat;
		iifname "net0" dnat to ip daddr map @primary
	}
	chain postrouting {
		type nat hook postrouting priority srcnat;
		oifname "net0" ip daddr != { 168.63.129.16, 169.254.169.254 } snat to ip saddr map @public
	}
}
`

// fabricUp makes the fabric and its link to the internet. The default route
// makes proxy ARP answer for every address there is.
func (v *VNet) fabricUp() error {
	for _, n := range []*Namespace{v.fabric, v.Internet} {
		if err := n.sysctl("ipv4/ip_forward=1",
			"ipv4/conf/all/rp_filter=0", "ipv4/conf/default/rp_filter=0",
			"ipv4/conf/all/send_redirects=0", "ipv4/conf/default/send_redirects=0"); err != nil {
			return err
		}
		if err := n.sysctl("ipv6/conf/default/disable_ipv6=1"); ignoreMissing(err) != nil {
			return err
		}
	}
	if err := v.fabric.ip(fmt.Sprintf(`
		link set lo up
		link add net0 type veth peer name net0 netns %d
		address add 192.0.2.0/31 dev net0
		link set net0 up`, v.Internet.PidOne())); err != nil {
		return err
	}
	if err := v.Internet.ip(fmt.Sprintf(`
		link set lo up
		address add 192.0.2.1/31 dev net0
		address add %s/32 dev net0
		address add %s/32 dev net0
		address add %s/32 dev net0
		link set net0 up
		route add default via 192.0.2.0`, InternetAddr, HostAgentAddr, IMDSAddr)); err != nil {
		return err
	}
	if err := v.fabric.ip("route add default via 192.0.2.1"); err != nil {
		return err
	}
	return v.fabric.nft(fabricRules)
}

// addSubnet makes the fabric answer for a subnet. It may be called again.
func (v *VNet) addSubnet(p netip.Prefix) error {
	return v.fabric.nft(fmt.Sprintf("add element ip fabric subnets { %s }", p))
}

// plug makes the port of a NIC and the NIC itself, in the VM's namespace.
func (v *VNet) plug(n *nic, pid int) error {
	if err := v.fabric.ip(fmt.Sprintf("link add %s address %s mtu %d type veth peer name %s address %s mtu %d netns %d",
		n.port, FabricMAC, n.MTU, n.Name, n.MAC, n.MTU, pid)); err != nil {
		return err
	}
	conf := "ipv4/conf/" + n.port
	if err := v.fabric.sysctl(conf+"/proxy_arp=1", conf+"/proxy_arp_pvlan=1", "ipv4/neigh/"+n.port+"/proxy_delay=0"); err != nil {
		return err
	}
	var counters strings.Builder
	for _, name := range violations {
		fmt.Fprintf(&counters, "counter %s { }\n", name)
	}
	rules := fmt.Sprintf(portRules, n.port, counters.String(), n.MAC, n.Primary, FabricMAC, linkLocal(n.MAC))
	rules += fmt.Sprintf("add element ip fabric primaries { %s }\n", n.Primary)
	if n.public.IsValid() {
		rules += fmt.Sprintf("add element ip fabric public { %[1]s : %[2]s }\nadd element ip fabric primary { %[2]s : %[1]s }\n", n.Primary, n.public)
	}
	if err := v.fabric.nft(rules); err != nil {
		return err
	}
	if err := v.fabric.ip(fmt.Sprintf(`
		link set %[1]s up
		neighbor replace %[2]s lladdr %[3]s dev %[1]s nud permanent
		route replace %[2]s/32 dev %[1]s scope link`, n.port, n.Primary, n.MAC)); err != nil {
		return err
	}
	return v.assign(n, nil, n.Secondaries)
}

// unplug removes the port, and with it the NIC and the routes. The table stays
// for its counters.
func (v *VNet) unplug(n *nic) {
	// Both may be gone already: the kernel removes them with the VM's namespace.
	v.fabric.nft("delete chain netdev " + n.port + " ingress")
	v.fabric.ip("link del " + n.port)
}

// assign delivers secondary addresses to the NIC's MAC instead of the old ones.
func (v *VNet) assign(n *nic, old, secondaries []netip.Addr) error {
	var routes strings.Builder
	for _, a := range old {
		fmt.Fprintf(&routes, "route del %s/32\n", a)
	}
	own := []string{n.Primary.String()}
	for _, a := range secondaries {
		fmt.Fprintf(&routes, "route replace %s/32 via %s dev %s onlink\n", a, n.Primary, n.port)
		own = append(own, a.String())
	}
	if err := v.fabric.ip(routes.String()); err != nil {
		return err
	}
	return v.fabric.nft(fmt.Sprintf("flush set netdev %[1]s own\nadd element netdev %[1]s own { %[2]s }\n", n.port, strings.Join(own, ", ")))
}

// linkLocal is the IPv6 address that an interface gives itself.
func linkLocal(mac string) netip.Addr {
	var m [6]byte
	fmt.Sscanf(mac, "%x:%x:%x:%x:%x:%x", &m[0], &m[1], &m[2], &m[3], &m[4], &m[5])
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
}

// Violations counts the frames that the fabric refused because they break
// Azure's rules, by kind, over all VMs; kinds without any are left out. The
// kinds are source_mac, arp_mac, arp_ip, source_ip, multicast, destination,
// ipv6, protocol and host_agent. What a VM's NIC says in IPv6 about its own
// link-local address is not one.
func (v *VNet) Violations() (map[string]uint64, error) {
	return v.violations(nil)
}

// Violations counts those of this VM alone. They survive power cuts.
func (m *VM) Violations() (map[string]uint64, error) {
	return m.vnet.violations(m.nics)
}

// violations adds the counters of the NICs' ports up, of all ports for nil.
func (v *VNet) violations(nics []*nic) (map[string]uint64, error) {
	out, err := v.fabric.feed("", "nft", "-j", "list", "counters")
	if err != nil {
		return nil, err
	}
	var list struct {
		Nftables []struct {
			Counter struct {
				Family, Table, Name string
				Packets             uint64
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return nil, fmt.Errorf("read the fabric's counters: %w", err)
	}
	ports := map[string]bool{}
	for _, n := range nics {
		ports[n.port] = true
	}
	sum := map[string]uint64{}
	for _, e := range list.Nftables {
		c := e.Counter
		if c.Family == "netdev" && c.Name != "own_ipv6" && c.Packets > 0 && (nics == nil || ports[c.Table]) {
			sum[c.Name] += c.Packets
		}
	}
	return sum, nil
}

// ResetViolations sets all counters to zero.
func (v *VNet) ResetViolations() error {
	_, err := v.fabric.feed("", "nft", "reset", "counters")
	return err
}

// ignoreMissing is for settings of what a kernel may not have.
func ignoreMissing(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
