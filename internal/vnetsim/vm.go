// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// VMConfig describes a VM.
type VMConfig struct {
	Name            string      // host name; empty: vm1, vm2…
	Secondaries     int         // secondary ipconfigs of eth0
	MTU             int         // of eth0 in bytes; 0: 1500
	HoldSecondaries bool        // put the secondaries of eth0 on it at boot, as cloud-init does
	NICs            []NICConfig // eth1, eth2…
}

// NICConfig describes a further NIC.
type NICConfig struct {
	Subnet      netip.Prefix // not overlapping others
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
	port   string     // interface in the fabric
	public netip.Addr // what the internet sees of eth0's primary
}

// VM is a virtual machine of the VNet: namespaces of net, mount, pid, uts, ipc
// and cgroup, with a private /run, and a private /etc, /var/lib and
// /var/lib/docker that survive power cuts. The rest of its file system is this
// machine's.
type VM struct {
	*Namespace
	Name    string
	MAC     string       // of eth0, lower case with colons
	Primary netip.Addr   // of eth0
	Prefix  netip.Prefix // of eth0, masked
	Gateway netip.Addr   // of eth0
	Public  netip.Addr   // what the internet sees of Primary

	vnet   *VNet
	disk   string
	hold   bool
	nics   []*nic           // their addresses are guarded by the VNet's mutex
	faults map[Source]Fault // guarded by the VNet's mutex

	power   sync.Mutex // guards boot and power cut, and what follows; taken before the VNet's mutex
	cgroups []cgroup
	engine  *engine
}

// AddVM makes a VM and boots it.
func (v *VNet) AddVM(cfg VMConfig) (*VM, error) {
	vm, err := v.newVM(cfg)
	if err != nil {
		return nil, fmt.Errorf("add vm %s: %w", cfg.Name, err)
	}
	if err := vm.Boot(); err != nil {
		return nil, fmt.Errorf("add vm %s: %w", vm.Name, errors.Join(err, v.forget(vm)))
	}
	return vm, nil
}

// newVM gives a VM its name, addresses and disk.
func (v *VNet) newVM(cfg VMConfig) (*VM, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if cfg.Name == "" {
		cfg.Name = fmt.Sprintf("vm%d", len(v.vms)+1)
	}
	if cfg.Name != filepath.Base(cfg.Name) || cfg.Name == ".." || cfg.Name == "." {
		return nil, errors.New("not a host name")
	}
	if slices.ContainsFunc(v.vms, func(vm *VM) bool { return vm.Name == cfg.Name }) {
		return nil, errors.New("there is one of that name")
	}
	vm := &VM{
		Namespace: &Namespace{name: cfg.Name, enter: []string{"--mount", "--uts", "--ipc", "--pid", "--cgroup"}},
		Name:      cfg.Name,
		vnet:      v,
		disk:      filepath.Join(v.dir, cfg.Name),
		hold:      cfg.HoldSecondaries,
		faults:    map[Source]Fault{},
	}
	for _, n := range append([]NICConfig{{v.Subnet, cfg.Secondaries, cfg.MTU}}, cfg.NICs...) {
		if err := v.addNIC(vm, n); err != nil {
			return nil, err
		}
	}
	first := vm.nics[0]
	vm.MAC, vm.Primary, vm.Prefix, vm.Gateway = first.MAC, first.Primary, first.Prefix, first.Gateway
	vm.Public = first.public
	if err := os.Mkdir(vm.disk, 0o755); err != nil {
		return nil, err
	}
	for source, fault := range v.faults {
		if err := vm.setFault(source, fault); err != nil {
			return nil, err
		}
	}
	v.vms = append(v.vms, vm)
	return vm, nil
}

// forget takes back a VM that did not boot.
func (v *VNet) forget(vm *VM) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.vms = slices.DeleteFunc(v.vms, func(m *VM) bool { return m == vm })
	return os.RemoveAll(vm.disk)
}

// addNIC gives the VM a NIC with addresses, as Azure does from the fourth up.
func (v *VNet) addNIC(vm *VM, cfg NICConfig) error {
	prefix := cfg.Subnet.Masked()
	if !prefix.Addr().Is4() || prefix.Bits() > 29 {
		return fmt.Errorf("%s is no subnet of Azure: IPv4 and at most /29", prefix)
	}
	if len(v.ports) == 254 {
		return errors.New("a simulated vnet has at most 254 NICs")
	}
	if err := v.addSubnet(prefix); err != nil {
		return err
	}
	if cfg.MTU == 0 {
		cfg.MTU = 1500
	}
	number := len(v.ports) + 1
	n := &nic{
		NIC: NIC{
			Name:    fmt.Sprintf("eth%d", len(vm.nics)),
			MAC:     fmt.Sprintf("00:0d:3a:04:%02x:%02x", number>>8, number&0xff),
			Prefix:  prefix,
			Gateway: prefix.Addr().Next(),
			MTU:     cfg.MTU,
		},
		port: fmt.Sprintf("p%d", number),
	}
	if len(vm.nics) == 0 {
		n.public = netip.AddrFrom4([4]byte{198, 51, 100, byte(number)})
	}
	next := max(v.next[prefix], 4)
	if free := uint(1)<<(32-prefix.Bits()) - 1; next+uint(cfg.Secondaries)+1 > free {
		return fmt.Errorf("subnet %s has only %d free addresses", prefix, free-next)
	}
	addr := prefix.Addr()
	for range next {
		addr = addr.Next()
	}
	n.Primary = addr
	for range cfg.Secondaries {
		addr = addr.Next()
		n.Secondaries = append(n.Secondaries, addr)
	}
	v.next[prefix] = next + uint(cfg.Secondaries) + 1
	if err := v.register(n); err != nil {
		return err
	}
	v.ports[n.port] = vm.Name
	vm.nics = append(vm.nics, n)
	return nil
}

// NICs are the VM's, eth0 first.
func (m *VM) NICs() []NIC {
	m.vnet.mu.Lock()
	defer m.vnet.mu.Unlock()
	var nics []NIC
	for _, n := range m.nics {
		c := n.NIC
		c.Secondaries = slices.Clone(c.Secondaries)
		nics = append(nics, c)
	}
	return nics
}

// Secondaries are the secondary addresses of eth0.
func (m *VM) Secondaries() []netip.Addr { return m.NICs()[0].Secondaries }

// SetSecondaries adds and withdraws secondary addresses of eth0, which the
// fabric, the host agent and IMDS follow at once. The VM itself is not touched.
func (m *VM) SetSecondaries(addrs []netip.Addr) error {
	m.power.Lock()
	defer m.power.Unlock()
	m.vnet.mu.Lock()
	defer m.vnet.mu.Unlock()
	n := m.nics[0]
	for i, a := range addrs {
		if !n.Prefix.Contains(a) || slices.Contains(addrs[:i], a) {
			return fmt.Errorf("set secondaries of %s: %s is not in %s, or there twice", m.Name, a, n.Prefix)
		}
		for _, vm := range m.vnet.vms {
			for _, o := range vm.nics {
				if a == o.Primary || o != n && slices.Contains(o.Secondaries, a) {
					return fmt.Errorf("set secondaries of %s: %s belongs to %s", m.Name, a, vm.Name)
				}
			}
		}
	}
	addrs = slices.Clone(addrs)
	if m.PidOne() != 0 {
		if err := m.vnet.assign(n, n.Secondaries, addrs); err != nil {
			return fmt.Errorf("set secondaries of %s: %w", m.Name, err)
		}
	}
	n.Secondaries = addrs
	return nil
}

// PowerCut kills everything in the VM at once, and takes its NICs and /run
// away. The disk stays.
func (m *VM) PowerCut() error {
	m.power.Lock()
	defer m.power.Unlock()
	if m.PidOne() == 0 {
		return fmt.Errorf("cut the power of %s: it has none", m.Name)
	}
	return m.powerCut()
}

func (m *VM) powerCut() error {
	m.stopHolder()
	for _, n := range m.nics {
		m.vnet.unplug(n)
	}
	if m.engine != nil {
		<-m.engine.exited
		m.engine = nil
	}
	if err := removeAll(cgroupDirs(m.cgroups), 10*time.Second); err != nil {
		return fmt.Errorf("cut the power of %s: %w", m.Name, err)
	}
	return nil
}

// Boot gives the VM power again: new namespaces, the same disk, NICs and
// addresses. It starts nothing in the VM.
func (m *VM) Boot() error {
	m.power.Lock()
	defer m.power.Unlock()
	if m.vnet.closing.Load() {
		return fmt.Errorf("boot %s: the vnet is closed", m.Name)
	}
	if m.PidOne() != 0 {
		return fmt.Errorf("boot %s: it has power", m.Name)
	}
	if err := m.boot(); err != nil {
		return errors.Join(fmt.Errorf("boot %s: %w", m.Name, err), m.powerCut())
	}
	return nil
}

func (m *VM) boot() (err error) {
	if m.cgroups, err = childCgroups(m.vnet.cgroups, m.Name); err != nil {
		return err
	}
	const flags = syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC
	h, err := startHolder(flags, holderSpec{VM: &machine{Name: m.Name, Disk: m.disk, Cgroups: m.cgroups}})
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.holder = h
	m.mu.Unlock()
	// Loose, as distributions set it.
	if err := m.sysctl("ipv4/ip_forward=0", "ipv4/conf/all/rp_filter=2", "ipv4/conf/default/rp_filter=2"); err != nil {
		return err
	}
	// No link-local address of its own accord: then a link that comes up says nothing.
	if err := m.sysctl("ipv6/conf/default/addr_gen_mode=1", "ipv6/conf/default/accept_dad=0", "ipv6/conf/default/accept_ra=0"); ignoreMissing(err) != nil {
		return err
	}
	if err := m.ip("link set lo up"); err != nil {
		return err
	}
	for i, n := range m.nics {
		if err := m.vnet.plug(n, m.PidOne()); err != nil {
			return err
		}
		if err := m.ip(m.dhcp(n, i)); err != nil {
			return err
		}
	}
	return nil
}

// dhcp is what Azure's DHCP makes of the i-th NIC: the primary address and, on
// eth0, the default route and option 121's. A further NIC has the policy
// routing that Azure's documentation asks for: what comes in by it leaves by it.
func (m *VM) dhcp(n *nic, i int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "address add %s/%d broadcast + dev %s metric %d\n", n.Primary, n.Prefix.Bits(), n.Name, 100*(i+1)) // as cloud-init has it
	if m.hold && i == 0 {
		for _, a := range n.Secondaries {
			fmt.Fprintf(&b, "address add %s/%d dev %s\n", a, n.Prefix.Bits(), n.Name)
		}
	}
	fmt.Fprintf(&b, "link set %s up\n", n.Name)
	if i > 0 {
		fmt.Fprintf(&b, "route add default via %s dev %s table %d\n", n.Gateway, n.Name, 200+i)
		fmt.Fprintf(&b, "rule add from %s lookup %d\n", n.Primary, 200+i)
		return b.String()
	}
	for _, dst := range []string{"default", HostAgentAddr.String(), IMDSAddr.String()} {
		fmt.Fprintf(&b, "route add %s via %s dev %s proto dhcp src %s metric 100\n", dst, n.Gateway, n.Name, n.Primary)
	}
	return b.String()
}
