// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// NICConfig describes a further NIC.
type NICConfig struct {
	Subnet      netip.Prefix // one that overlaps no other; zero: the VNet's
	Secondaries int
	MTU         int // in bytes; 0: 1500
}

// NIC is a network interface of a VM as Azure knows it.
type NIC struct {
	Name        string // eth0
	MAC         string // lower case with colons
	Prefix      netip.Prefix
	Gateway     netip.Addr // first of Prefix
	MTU         int        // bytes
	Primary     netip.Addr
	Secondaries []netip.Addr
}

type nic struct {
	NIC
	index  int        // of the name: 0 for eth0
	port   string     // interface in the fabric
	public netip.Addr // what the internet sees of eth0's primary
}

// addresses are the NIC's, its primary first.
func (n NIC) addresses() []netip.Addr { return append([]netip.Addr{n.Primary}, n.Secondaries...) }

// AddSubnet adds a prefix to the VNet: the fabric answers for its addresses.
// VMs and NICs add their own subnets. It may be called again with the same prefix.
func (v *VNet) AddSubnet(p netip.Prefix) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.addSubnet(p.Masked())
}

// addSubnet is called with the VNet's mutex held.
func (v *VNet) addSubnet(p netip.Prefix) error {
	if !p.Addr().Is4() || p.Bits() > 29 {
		return fmt.Errorf("%s is no subnet of Azure: IPv4 and at most /29", p)
	}
	if slices.Contains(v.subnets, p) {
		return nil
	}
	for _, s := range v.subnets {
		if s.Overlaps(p) {
			return fmt.Errorf("subnet %s overlaps %s", p, s)
		}
	}
	if err := v.fabric.nft(fmt.Sprintf("add element ip fabric subnets { %s }", p)); err != nil {
		return err
	}
	v.subnets = append(v.subnets, p)
	return nil
}

// addNIC gives the VM a NIC with addresses, as Azure does from the fourth up.
// It is called with the VNet's mutex held.
func (v *VNet) addNIC(vm *VM, cfg NICConfig) (*nic, error) {
	if !cfg.Subnet.IsValid() {
		cfg.Subnet = v.Subnet
	}
	prefix := cfg.Subnet.Masked()
	if err := v.addSubnet(prefix); err != nil {
		return nil, err
	}
	if cfg.MTU == 0 {
		cfg.MTU = 1500
	}
	index := 0 // the lowest free one, as the kernel names NICs
	for slices.ContainsFunc(vm.nics, func(n *nic) bool { return n.index == index }) {
		index++
	}
	number := len(v.ports) + 1
	n := &nic{
		NIC: NIC{
			Name:    fmt.Sprintf("eth%d", index),
			MAC:     fmt.Sprintf("00:0d:3a:04:%02x:%02x", number>>8, number&0xff),
			Prefix:  prefix,
			Gateway: prefix.Addr().Next(),
			MTU:     cfg.MTU,
		},
		index: index,
		port:  fmt.Sprintf("p%d", number),
	}
	if index == 0 {
		if v.publics == 254 {
			return nil, errors.New("a simulated vnet has at most 254 VMs")
		}
		v.publics++
		n.public = netip.AddrFrom4([4]byte{198, 51, 100, byte(v.publics)})
	}
	addrs, err := v.takeAddresses(prefix, 1+cfg.Secondaries)
	if err != nil {
		return nil, err
	}
	n.Primary, n.Secondaries = addrs[0], addrs[1:]
	if err := v.register(vm, n); err != nil {
		return nil, err
	}
	vm.nics = append(vm.nics, n)
	return n, nil
}

// takeAddresses gives out the next addresses of a subnet that no NIC has. It
// does not give out the same address twice.
func (v *VNet) takeAddresses(p netip.Prefix, count int) ([]netip.Addr, error) {
	base, next := binary.BigEndian.Uint32(p.Addr().AsSlice()), v.next[p]
	var addrs []netip.Addr
	for ; len(addrs) < count; next++ {
		a := netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, base+next)))
		if !p.Contains(a) {
			return nil, fmt.Errorf("subnet %s has fewer than %d free addresses", p, count)
		}
		if vm, _ := v.owner(a); vm == nil && !reserved(p, a) {
			addrs = append(addrs, a)
		}
	}
	v.next[p] = next
	return addrs, nil
}

// reserved tells whether Azure keeps an address of the subnet for itself: the
// first four and the last.
func reserved(p netip.Prefix, a netip.Addr) bool {
	offset := binary.BigEndian.Uint32(a.AsSlice()) - binary.BigEndian.Uint32(p.Addr().AsSlice())
	return offset < 4 || !p.Contains(a.Next())
}

// owner finds the VM and the NIC that have an address, nil if none has it. It
// is called with the VNet's mutex held.
func (v *VNet) owner(a netip.Addr) (*VM, *nic) {
	for _, vm := range v.vms {
		for _, n := range vm.nics {
			if a == n.Primary || slices.Contains(n.Secondaries, a) {
				return vm, n
			}
		}
	}
	return nil, nil
}

// canHave returns an error if Azure would not give the address to the NIC, be
// it as its primary or as a secondary.
func (v *VNet) canHave(n *nic, a netip.Addr) error {
	if !n.Prefix.Contains(a) {
		return fmt.Errorf("%s is not in %s", a, n.Prefix)
	}
	if reserved(n.Prefix, a) {
		return fmt.Errorf("%s is one of the addresses of %s that Azure keeps for itself", a, n.Prefix)
	}
	if vm, o := v.owner(a); o != nil && o != n {
		return fmt.Errorf("%s belongs to %s", a, vm.Name)
	}
	return nil
}

// NICs are the VM's, eth0 first.
func (m *VM) NICs() []NIC {
	m.vnet.mu.Lock()
	defer m.vnet.mu.Unlock()
	var nics []NIC
	for _, n := range m.nics {
		nics = append(nics, n.clone())
	}
	return nics
}

func (n NIC) clone() NIC {
	n.Secondaries = slices.Clone(n.Secondaries)
	return n
}

// Secondaries are the secondary addresses of eth0.
func (m *VM) Secondaries() []netip.Addr { return m.NICs()[0].Secondaries }

// AddNIC adds a NIC to the VM. A VM that runs gets it at once, with what DHCP
// makes of a further NIC at boot.
func (m *VM) AddNIC(cfg NICConfig) (NIC, error) {
	m.power.Lock()
	defer m.power.Unlock()
	m.vnet.mu.Lock()
	n, err := m.vnet.addNIC(m, cfg)
	m.vnet.mu.Unlock()
	if err != nil {
		return NIC{}, fmt.Errorf("add a NIC to %s: %w", m.Name, err)
	}
	if m.PidOne() != 0 {
		if err := m.start(n); err != nil {
			return NIC{}, fmt.Errorf("add a NIC to %s: %w", m.Name, errors.Join(err, m.removeNIC(n)))
		}
	}
	return n.clone(), nil
}

// RemoveNIC takes a NIC other than eth0 from the VM, and its port from the
// fabric. The VM loses its routing rule too.
func (m *VM) RemoveNIC(name string) error {
	m.power.Lock()
	defer m.power.Unlock()
	i := slices.IndexFunc(m.nics, func(n *nic) bool { return n.Name == name })
	if i < 1 {
		return fmt.Errorf("remove the NIC %s of %s: it is not one of the further NICs", name, m.Name)
	}
	if err := m.removeNIC(m.nics[i]); err != nil {
		return fmt.Errorf("remove the NIC %s of %s: %w", name, m.Name, err)
	}
	return nil
}

// removeNIC is called with the VM's power mutex held.
func (m *VM) removeNIC(n *nic) error {
	m.vnet.mu.Lock()
	err := m.vnet.fabric.nft(elements("delete", m.elements(n)))
	m.nics = slices.DeleteFunc(slices.Clone(m.nics), func(o *nic) bool { return o == n })
	m.vnet.mu.Unlock()
	if m.PidOne() == 0 {
		return err
	}
	m.ip("rule del " + n.rule()) // the VM may have removed it
	return errors.Join(err, m.vnet.unplug(n))
}

// SetSecondaries adds and withdraws secondary addresses of eth0, which the
// fabric, the host agent and IMDS follow at once. The VM itself is not touched.
func (m *VM) SetSecondaries(addrs []netip.Addr) error {
	m.power.Lock()
	defer m.power.Unlock()
	m.vnet.mu.Lock()
	defer m.vnet.mu.Unlock()
	n := m.nics[0]
	for i, a := range addrs {
		err := m.vnet.canHave(n, a)
		if a == n.Primary || slices.Contains(addrs[:i], a) {
			err = fmt.Errorf("%s is the primary, or there twice", a)
		}
		if err != nil {
			return fmt.Errorf("set secondaries of %s: %w", m.Name, err)
		}
	}
	old, now := n.NIC, n.NIC
	now.Secondaries = slices.Clone(addrs)
	if m.PidOne() != 0 {
		if err := m.vnet.deliver(n.port, old, now); err != nil {
			return fmt.Errorf("set secondaries of %s: %w", m.Name, err)
		}
	}
	n.NIC = now
	return nil
}

// SetPrimary gives eth0 another primary address, which the fabric, the host
// agent and IMDS follow at once. A VM that runs gets the address and its routes
// on eth0 as a DHCP client that is told of another address sets them. A
// secondary of eth0 may become its primary: the old primary takes its place.
// The public address stays. It writes the VM's field Primary, which nobody may
// read meanwhile.
func (m *VM) SetPrimary(addr netip.Addr) error {
	m.power.Lock()
	defer m.power.Unlock()
	n := m.nics[0]
	old := n.clone()
	if addr == old.Primary {
		return nil
	}
	err := m.changePrimary(n, addr)
	if err == nil && m.PidOne() != 0 {
		err = m.renew(n, old)
	}
	if err != nil {
		return fmt.Errorf("set the primary of %s: %w", m.Name, err)
	}
	return nil
}

// changePrimary is Azure's part of SetPrimary.
func (m *VM) changePrimary(n *nic, addr netip.Addr) error {
	m.vnet.mu.Lock()
	defer m.vnet.mu.Unlock()
	if err := m.vnet.canHave(n, addr); err != nil {
		return err
	}
	old, now := n.NIC, n.clone()
	now.Primary = addr
	if i := slices.Index(now.Secondaries, addr); i >= 0 {
		now.Secondaries[i] = old.Primary
	}
	rules := elements("delete", m.elements(n))
	n.NIC, m.Primary = now, now.Primary
	err := m.vnet.fabric.nft(rules + elements("add", m.elements(n)))
	if err == nil && m.PidOne() != 0 {
		err = m.vnet.deliver(n.port, old, now)
	}
	if err != nil {
		n.NIC, m.Primary = old, old.Primary
	}
	return err
}

// start puts a NIC into the running VM and its port into the fabric.
func (m *VM) start(n *nic) error {
	if err := m.vnet.plug(n, m.PidOne()); err != nil {
		return err
	}
	return m.ip(m.dhcp(n))
}

// renew is what dhclient does when a lease names another address: the old
// address goes first, and the kernel removes its routes with it.
func (m *VM) renew(n *nic, old NIC) error {
	held, err := m.feed("", "ip", "-o", "-4", "address", "show", "dev", old.Name, "to", old.Primary.String())
	if err != nil {
		return err
	}
	if held != "" { // else something in the VM moved it
		if err := m.ip(fmt.Sprintf("address del %s/%d dev %s", old.Primary, old.Prefix.Bits(), old.Name)); err != nil {
			return err
		}
	}
	return m.ip(m.dhcp(n))
}

// dhcp is what Azure's DHCP makes of a NIC: the primary address and, on eth0,
// the default route and option 121's. A further NIC has the policy routing that
// Azure's documentation asks for: what comes in by it leaves by it. Routes are
// appended, as a DHCP client does: those of others stay.
func (m *VM) dhcp(n *nic) string {
	var b strings.Builder
	if n.index == 0 {
		b.WriteString("link set lo up\n")
	}
	fmt.Fprintf(&b, "address replace %s/%d broadcast + dev %s metric %d\n", n.Primary, n.Prefix.Bits(), n.Name, 100*(n.index+1)) // as cloud-init has it
	if m.hold && n.index == 0 {
		for _, a := range n.Secondaries {
			fmt.Fprintf(&b, "address replace %s/%d dev %s\n", a, n.Prefix.Bits(), n.Name)
		}
	}
	fmt.Fprintf(&b, "link set %s up\n", n.Name)
	if n.index > 0 {
		fmt.Fprintf(&b, "route append default via %s dev %s table %d\n", n.Gateway, n.Name, n.table())
		fmt.Fprintf(&b, "rule add %s\n", n.rule())
		return b.String()
	}
	for _, dst := range []string{"default", HostAgentAddr.String(), IMDSAddr.String()} {
		fmt.Fprintf(&b, "route append %s via %s dev %s proto dhcp src %s metric 100\n", dst, n.Gateway, n.Name, n.Primary)
	}
	return b.String()
}

// table is the routing table of a further NIC, and rule leads to it.
func (n *nic) table() int { return 200 + n.index }

func (n *nic) rule() string { return fmt.Sprintf("from %s lookup %d", n.Primary, n.table()) }
