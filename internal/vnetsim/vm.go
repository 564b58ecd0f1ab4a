// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"
)

// VMConfig describes a VM.
type VMConfig struct {
	Name            string       // host name; empty: vm1, vm2…
	Subnet          netip.Prefix // of eth0; zero: the VNet's
	Secondaries     int          // secondary ipconfigs of eth0
	MTU             int          // of eth0 in bytes; 0: 1500
	HoldSecondaries bool         // put the secondaries of eth0 on it at boot, as cloud-init does
	NICs            []NICConfig  // eth1, eth2…
}

// VM is a virtual machine of the VNet: namespaces of net, mount, pid, uts, ipc,
// cgroup and, where the kernel has it, time, with a private /run, and a private
// /etc, /var/lib and /var/lib/docker that survive power cuts. Its boot clock
// begins anew with every boot. The rest of its file system is this machine's.
type VM struct {
	*Namespace
	Name    string
	MAC     string       // of eth0, lower case with colons
	Primary netip.Addr   // of eth0; SetPrimary changes it
	Prefix  netip.Prefix // of eth0, masked
	Gateway netip.Addr   // of eth0
	Public  netip.Addr   // what the internet sees of Primary

	vnet   *VNet
	disk   string
	hold   bool
	nics   []*nic           // the list and the addresses: changed under power and the VNet's mutex, read under one of them
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
func (v *VNet) newVM(cfg VMConfig) (_ *VM, err error) {
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
	defer func() {
		if err != nil {
			err = errors.Join(err, vm.unregister())
		}
	}()
	for _, n := range append([]NICConfig{{cfg.Subnet, cfg.Secondaries, cfg.MTU}}, cfg.NICs...) {
		if _, err := v.addNIC(vm, n); err != nil {
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
	return errors.Join(vm.unregister(), os.RemoveAll(vm.disk))
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
		m.vnet.unplug(n) // the kernel may have removed the port already, with the VM's namespace
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
	clock, err := newBootClock()
	if err != nil {
		return err
	}
	if clock != nil {
		defer clock.Close() // the holder has its own
	}
	h, err := startHolder(flags, clock, holderSpec{VM: &machine{Name: m.Name, Disk: m.disk, Cgroups: m.cgroups}})
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
	for _, n := range m.nics {
		if err := m.start(n); err != nil {
			return err
		}
	}
	return nil
}
