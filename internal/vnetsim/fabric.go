// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
)

// portTable is the table of a port. It lives as long as the VNet, so that its
// counters survive power cuts and the end of the NIC.
const portTable = `
table netdev %[1]s {
	%[2]s
	counter own_ipv6 { }
	set own { type ipv4_addr; }
	set primary { type ipv4_addr; }
	set accepted { type ipv4_addr; size 65535; flags dynamic; }
	set strangers { type ipv4_addr; size 65535; flags dynamic; }
}
`

// portRules are Azure's rules for what a VM sends. What ends in a plain drop is
// not an offence: Azure does not answer it either. The VM's own primary address
// is not answered for by anyone. Each update is a rule of its own because a set
// that is full ends the rule, and the frame is judged all the same.
const portRules = `
table netdev %[1]s {
	chain ingress {
		type filter hook ingress device "%[1]s" priority 0; policy drop;
		ether saddr != %[2]s counter name source_mac drop
		ether type arp arp saddr ether != %[2]s counter name arp_mac drop
		ether type arp arp saddr ip 0.0.0.0 drop
		ether type arp arp saddr ip != @own counter name arp_ip drop
		ether type arp arp daddr ip @primary drop
		ether type arp ether daddr { ff:ff:ff:ff:ff:ff, %[3]s } accept
		ether type ip6 ip6 saddr %[4]s counter name own_ipv6 drop
		ether type ip6 counter name ipv6 drop
		ether type ip ether daddr ff:ff:ff:ff:ff:ff udp dport 67 drop
		ether type ip ether daddr & 01:00:00:00:00:00 == 01:00:00:00:00:00 counter name multicast drop
		ether daddr != %[3]s counter name destination drop
		ether type != ip counter name protocol drop
		ip saddr != @own update @strangers { ip saddr counter }
		ip saddr != @own counter name source_ip drop
		ip saddr != @primary ip daddr 168.63.129.16 tcp dport { 80, 32526 } counter name host_agent drop
		update @accepted { ip saddr counter }
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
			"ipv4/icmp_ratelimit=0", // a test must not lose "fragmentation needed"
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
		link set net0 up
		route add %s via 192.0.2.1
		route add %s via 192.0.2.1
		route add default via 192.0.2.1`, v.Internet.PidOne(), HostAgentAddr, IMDSAddr)); err != nil {
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
	return v.fabric.nft(fabricRules)
}

// SetInternetMTU makes the way from the VMs to the internet have a smaller MTU,
// in bytes from 576 to 1500; 0 is the 1500 of the beginning. The fabric answers
// a larger packet that must not be fragmented with ICMP "fragmentation needed"
// and fragments the others. The way back, the host agent and IMDS keep 1500. A
// VM that has learned a path MTU keeps it for ten minutes, or until
// "ip route flush cache".
func (v *VNet) SetInternetMTU(bytes int) error {
	route := "route replace default via 192.0.2.1"
	switch {
	case bytes == 0:
	case bytes < 576 || bytes > 1500:
		return fmt.Errorf("set the MTU of the internet: %d is not from 576 to 1500", bytes)
	default:
		route += fmt.Sprintf(" mtu %d", bytes)
	}
	return v.fabric.ip(route)
}

// register makes what the fabric has of a NIC even while its VM has no power:
// the table of its port, and the elements of its primary address.
func (v *VNet) register(vm *VM, n *nic) error {
	var counters strings.Builder
	for _, name := range violations {
		fmt.Fprintf(&counters, "counter %s { }\n", name)
	}
	rules := fmt.Sprintf(portTable, n.port, counters.String()) + elements("add", vm.elements(n))
	if err := v.fabric.nft(rules); err != nil {
		return err
	}
	v.ports[n.port] = vm.Name
	return nil
}

// unregister takes back the elements of all NICs. The tables stay.
func (m *VM) unregister() error {
	var rules strings.Builder
	for _, n := range m.nics {
		rules.WriteString(elements("delete", m.elements(n)))
	}
	return m.vnet.fabric.nft(rules.String())
}

// elements are what the sets and maps of fabricRules have of the NIC's primary
// address. On eth0 that includes the VM's faults.
func (m *VM) elements(n *nic) []string {
	all := []string{fmt.Sprintf("primaries { %s }", n.Primary)}
	if n.public.IsValid() {
		all = append(all, fmt.Sprintf("public { %s : %s }", n.Primary, n.public), fmt.Sprintf("primary { %s : %s }", n.public, n.Primary))
	}
	if n.index == 0 {
		for s, f := range m.faults {
			all = append(all, faultElements(n.Primary, s, f)...)
		}
	}
	return all
}

// elements are commands that add or delete elements of fabricRules.
func elements(verb string, all []string) string {
	var b strings.Builder
	for _, e := range all {
		fmt.Fprintf(&b, "%s element ip fabric %s\n", verb, e)
	}
	return b.String()
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
	entries, sets := delivery(n.port, NIC{}, n.NIC)
	if err := v.fabric.nft(fmt.Sprintf(portRules, n.port, n.MAC, FabricMAC, linkLocal(n.MAC)) + sets); err != nil {
		return err
	}
	return v.fabric.ip("link set " + n.port + " up\n" + entries)
}

// unplug removes the port, and with it the NIC and the routes. The table stays
// for its counters.
func (v *VNet) unplug(n *nic) error {
	return errors.Join(
		v.fabric.nft("delete chain netdev "+n.port+" ingress"),
		v.fabric.ip("link del "+n.port))
}

// deliver makes the port take the addresses that the NIC has now, and lead them
// to its MAC, instead of the old ones. It adds before it deletes, so that an
// address that stays is reached all the time.
func (v *VNet) deliver(port string, old, now NIC) error {
	entries, sets := delivery(port, old, now)
	if err := v.fabric.ip(entries); err != nil {
		return err
	}
	return v.fabric.nft(sets)
}

// delivery is what deliver tells ip and nft.
func delivery(port string, old, now NIC) (entries, sets string) {
	var b strings.Builder
	fmt.Fprintf(&b, "neighbor replace %s lladdr %s dev %s nud permanent\n", now.Primary, now.MAC, port)
	fmt.Fprintf(&b, "route replace %s/32 dev %s scope link\n", now.Primary, port)
	own := []string{now.Primary.String()}
	for _, a := range now.Secondaries {
		fmt.Fprintf(&b, "route replace %s/32 via %s dev %s onlink\n", a, now.Primary, port)
		own = append(own, a.String())
	}
	for _, a := range old.addresses() {
		if a.IsValid() && !slices.Contains(now.addresses(), a) {
			fmt.Fprintf(&b, "route del %s/32\n", a)
		}
	}
	if old.Primary.IsValid() && old.Primary != now.Primary {
		fmt.Fprintf(&b, "neighbor del %s dev %s\n", old.Primary, port)
	}
	return b.String(), fmt.Sprintf(`
		flush set netdev %[1]s own
		add element netdev %[1]s own { %[2]s }
		flush set netdev %[1]s primary
		add element netdev %[1]s primary { %[3]s }`, port, strings.Join(own, ", "), now.Primary)
}

// linkLocal is the IPv6 address that an interface gives itself.
func linkLocal(mac string) netip.Addr {
	var m [6]byte
	fmt.Sscanf(mac, "%x:%x:%x:%x:%x:%x", &m[0], &m[1], &m[2], &m[3], &m[4], &m[5])
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
}

// ignoreMissing is for settings of what a kernel may not have.
func ignoreMissing(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
