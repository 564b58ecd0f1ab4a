// Copyright (c) The azure-vnet authors. MIT licence.

// Package vnetsim is an Azure virtual network in network namespaces: a fabric
// with Azure's rules and counters of what it accepted and refused, an internet
// behind it, the host agent and IMDS at their real addresses, and VMs that run
// a real dockerd and may lose power. It is for tests, the demo and benchmarks,
// and it is not the product: it imports no other package of it.
//
// Every namespace is pinned by a holder process that ends with the process
// that called New, even if that is killed; the last holder then removes the
// VNet's directory and cgroups. Nothing has a fixed name outside the
// namespaces, so VNets run side by side.
package vnetsim

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
)

// Addresses that are the same in every VNet.
var (
	HostAgentAddr = netip.MustParseAddr("168.63.129.16")   // host agent, DNS, source of load balancer probes
	IMDSAddr      = netip.MustParseAddr("169.254.169.254") // instance metadata
	InternetAddr  = netip.MustParseAddr("203.0.113.10")    // a host of the internet; its HTTP answers with the client's address
)

// FabricMAC answers every ARP request and is the source of every frame.
const FabricMAC = "12:34:56:78:9a:bc"

// Config describes a VNet. The zero value is right for most tests.
type Config struct {
	Subnet netip.Prefix // of the VMs' eth0; zero: 10.240.0.0/16
	Dir    string       // made, holds the VMs' disks, removed by Close; empty: a temporary directory
}

// VNet is a running virtual network. Its methods, and those of its VMs, may be
// called from many goroutines.
type VNet struct {
	Subnet   netip.Prefix
	Internet *Namespace // where InternetAddr, HostAgentAddr and IMDSAddr live: for pings and probes from outside

	dir     string
	cgroups []cgroup
	fabric  *Namespace
	servers []func()  // close the listeners in Internet
	once    sync.Once // Close
	closing atomic.Bool
	closed  error // of the first Close

	mu      sync.Mutex // guards what follows: what Azure knows
	vms     []*VM
	subnets []netip.Prefix
	next    map[netip.Prefix]uint32 // by subnet: offset of the next address to give out
	ports   map[string]string       // by port, also of NICs that are gone: the VM's name
	publics int                     // public addresses given out
	faults  map[Source]Fault        // of VMs added later
}

// New starts a VNet without VMs. It needs root, and the programs ip and nft.
func New(cfg Config) (_ *VNet, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("start vnet: needs root, to make namespaces")
	}
	if !cfg.Subnet.IsValid() {
		cfg.Subnet = netip.MustParsePrefix("10.240.0.0/16")
	}
	if cfg.Dir == "" {
		cfg.Dir, err = os.MkdirTemp("", "vnetsim")
	} else if cfg.Dir, err = filepath.Abs(cfg.Dir); err == nil {
		err = os.Mkdir(cfg.Dir, 0o755)
	}
	if err != nil {
		return nil, fmt.Errorf("start vnet: %w", err)
	}
	v := &VNet{
		Subnet: cfg.Subnet.Masked(),
		dir:    cfg.Dir,
		next:   map[netip.Prefix]uint32{},
		ports:  map[string]string{},
		faults: map[Source]Fault{},
	}
	if v.cgroups, err = ownCgroups(); err != nil {
		os.Remove(cfg.Dir)
		return nil, fmt.Errorf("start vnet: %w", err)
	}
	// The fabric's holder outlives the others: it cleans up after this process.
	fabric, err := startHolder(syscall.CLONE_NEWNET, nil, holderSpec{Clean: append([]string{v.dir}, cgroupDirs(v.cgroups)...)})
	if err != nil {
		os.Remove(cfg.Dir)
		return nil, fmt.Errorf("start vnet: %w", err)
	}
	v.fabric = &Namespace{name: "fabric", holder: fabric}
	if err := v.start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start vnet: %w", err), v.Close())
	}
	return v, nil
}

// start makes the internet and the fabric's part that belongs to no VM.
func (v *VNet) start() error {
	internet, err := startHolder(syscall.CLONE_NEWNET, nil, holderSpec{})
	if err != nil {
		return err
	}
	v.Internet = &Namespace{name: "internet", holder: internet}
	if err := v.fabricUp(); err != nil {
		return err
	}
	if err := v.AddSubnet(v.Subnet); err != nil {
		return err
	}
	return v.serve()
}

// Close ends every process of the VNet and removes all it made. It may be
// called again, and returns what the first call did.
func (v *VNet) Close() error {
	v.once.Do(func() {
		v.closing.Store(true)
		for _, stop := range v.servers {
			stop()
		}
		v.mu.Lock()
		vms := slices.Clone(v.vms)
		v.mu.Unlock()
		for _, vm := range vms {
			vm.power.Lock() // a boot that has begun ends first
			vm.stopHolder()
			vm.power.Unlock()
		}
		if v.Internet != nil {
			v.Internet.stopHolder()
		}
		v.closed = v.fabric.close() // removes the directory and the cgroups
	})
	return v.closed
}
