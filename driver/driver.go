// Copyright (c) The azure-vnet authors. MIT licence.

// Package driver is libnetwork's NetworkDriver: it translates Docker's networks and endpoints for package bridge. It
// chooses no address. The IpamDriver leases the addresses, and this driver checks the leases.
//
// An engine tells each network once and never again, not even after a reboot. So networks.json keeps the networks, and
// outlives the boot. Nothing is kept about endpoints: the kernel's links say which are attached.
//
// Errors do not name the call, because the engine puts its name before them.
package driver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/docker/go-plugins-helpers/network"

	"azurevnet/bridge"
	"azurevnet/pool"
)

// OwnerPrefix begins the owner of every lease and every link of Docker's.
const OwnerPrefix = "docker/"

// Config says what the driver works on. The fields from NetworkMade on may be nil.
type Config struct {
	Dir          string // directory of networks.json; it must outlive a reboot, and is made if missing
	OnHost       string // the same directory as an operator finds it on the host, for errors; empty: Dir
	Host         *bridge.Host
	Pool         *pool.Pool
	AddressSpace string // the IpamDriver's address space; a network whose pool is in another one is refused

	// NetworkMade is called after a network was made of the subnet, on the NIC with the MAC.
	NetworkMade func(subnet netip.Prefix, mac string)

	// CheckNIC returns an error if the IpamDriver gave the network of the subnet a pool of another NIC than that with
	// the MAC.
	CheckNIC func(subnet netip.Prefix, mac string) error

	Engine Engine // tells names for errors

	Warn func(text string) // is called with what is no failure, but worth a line in the log
}

// Driver answers the NetworkDriver calls. Its methods are safe for parallel use, and may be repeated.
type Driver struct {
	cfg   Config
	ports boundPorts

	mu      sync.Mutex           // guards missing; taken while the lock of networks.json is held
	missing map[string]time.Time // by id: since when the engine's lists lack a network; see ForgetUnlisted
}

// New returns a driver.
func New(cfg Config) *Driver {
	if cfg.OnHost == "" {
		cfg.OnHost = cfg.Dir
	}
	if cfg.NetworkMade == nil {
		cfg.NetworkMade = func(netip.Prefix, string) {}
	}
	if cfg.Warn == nil {
		cfg.Warn = func(string) {}
	}
	if cfg.CheckNIC == nil {
		cfg.CheckNIC = func(netip.Prefix, string) error { return nil }
	}
	return &Driver{cfg: cfg}
}

// GetCapabilities says that a network is of this host alone, and that its containers reach other hosts.
func (d *Driver) GetCapabilities(context.Context) (*network.CapabilitiesResponse, error) {
	return &network.CapabilitiesResponse{Scope: network.LocalScope, ConnectivityScope: network.GlobalScope}, nil
}

// idShape matches the ids of Docker's networks and endpoints. An id becomes part of owners, so it must have no slash.
var idShape = regexp.MustCompile(`^[0-9a-zA-Z]{1,64}$`)

// checkIDs refuses ids that no engine sends.
func checkIDs(ids ...string) error {
	for _, id := range ids {
		if !idShape.MatchString(id) {
			return fmt.Errorf("%.80q is not an id of 1 to 64 letters and digits, as an engine sends", id)
		}
	}
	return nil
}

// CreateNetwork checks the network, writes it to networks.json and ensures its bridge. A repeat with the same options is
// a success. If the bridge cannot be ensured for a new network, the network is taken out of networks.json again. If that
// fails too, the error says both, and the network stays there until ForgetUnlisted. A network that was there before stays.
func (d *Driver) CreateNetwork(ctx context.Context, r *network.CreateNetworkRequest) error {
	n, err := d.planNetwork(ctx, r)
	if err != nil {
		return err
	}
	added := false
	err = d.changeNetworks(ctx, "create network "+r.NetworkID, func(all map[string]Network) error {
		d.unmarkMissing(r.NetworkID)
		n = n.withSharedBridge(all)
		if old, ok := all[r.NetworkID]; ok && !old.withSharedBridge(all).equal(n) {
			return fmt.Errorf("network %s exists with other options: remove it first, docker network rm", r.NetworkID)
		} else if ok {
			return nil
		}
		if err := n.checkSharedBridge(all); err != nil {
			return err
		}
		all[r.NetworkID], added = n, true
		return nil
	})
	if err != nil {
		return err
	}
	br, err := d.cfg.Host.Ensure(ctx, n.bridgeSpec())
	if err == nil && n.MTU > br.MTU {
		err = fmt.Errorf("-o mtu=%d: the NIC %s has an MTU of %d bytes, and larger packets would vanish: ask for at most that, or leave -o mtu out", n.MTU, br.NIC, br.MTU)
	}
	if err == nil {
		err = ctx.Err() // after the deadline, the answer reaches nobody
	}
	if err != nil {
		if added {
			err = errors.Join(err, d.forgetNetwork(context.WithoutCancel(ctx), r.NetworkID))
		}
		return err
	}
	if added {
		d.cfg.NetworkMade(n.Prefix, n.MAC)
	}
	return nil
}

// withSharedBridge returns n with the bridge name that another network of the same NIC asks for, if n asks for none. After
// a boot either network may be restored first, and both must make the same bridge. A transparent network has no bridge.
func (n Network) withSharedBridge(all map[string]Network) Network {
	for _, other := range all {
		if !n.Transparent() && n.Bridge == "" && other.MAC == n.MAC {
			n.Bridge = other.Bridge
		}
	}
	return n
}

// checkSharedBridge refuses a network that asks for another name of the bridge that it shares with a network of its NIC.
func (n Network) checkSharedBridge(all map[string]Network) error {
	for id, other := range all {
		if !n.Transparent() && other.MAC == n.MAC && other.Bridge != "" && other.Bridge != n.Bridge {
			return fmt.Errorf("networks of one NIC share its bridge: network %.12s has %s, this one asks for %s; ask for %[2]s, or leave -o bridge out", id, other.Bridge, n.Bridge)
		}
	}
	return nil
}

// planNetwork checks a request, and returns the network that it asks for. It marks the leases of auxiliary addresses as
// linkless, which may be repeated, and changes nothing else.
func (d *Driver) planNetwork(ctx context.Context, r *network.CreateNetworkRequest) (Network, error) {
	if err := checkIDs(r.NetworkID); err != nil {
		return Network{}, err
	}
	o, err := parseNetworkOptions(r.Options)
	if err != nil {
		return Network{}, err
	}
	if len(r.IPv6Data) > 0 {
		return Network{}, errors.New("IPv6 is not served yet: create the network without --ipv6 and IPv6 subnets")
	}
	if len(r.IPv4Data) != 1 || r.IPv4Data[0] == nil {
		return Network{}, fmt.Errorf("a network has exactly one subnet, and %d were given: give one --subnet", len(r.IPv4Data))
	}
	data := r.IPv4Data[0]
	if data.AddressSpace != d.cfg.AddressSpace && swarmIDShape.MatchString(r.NetworkID) {
		return Network{}, errors.New("the swarm network was created without --config-from, or from a configuration without --ipam-driver: " + swarmWay)
	}
	if data.AddressSpace != d.cfg.AddressSpace {
		return Network{}, fmt.Errorf("its addresses come from %.40q and not from Azure: create it with --ipam-driver azure-vnet:latest (the tag that -d has)", data.AddressSpace)
	}
	prefix, err := netip.ParsePrefix(data.Pool)
	if err != nil {
		return Network{}, fmt.Errorf("its subnet %.80q is not a CIDR such as 10.240.0.0/16", data.Pool)
	}
	nic, err := d.findNIC(ctx, o.master, prefix)
	if err != nil {
		return Network{}, err
	}
	if err := d.cfg.CheckNIC(prefix, nic.MAC); err != nil {
		return Network{}, err
	}
	known, err := d.cfg.Pool.Status(ctx)
	if err != nil {
		return Network{}, err
	}
	n := Network{
		MAC: nic.MAC, Primary: nic.Primary, Mode: o.mode, Bridge: o.bridge, MTU: o.mtu, Prefix: prefix, Gateway: prefix.Addr().Next(),
		Internal: o.policy.Internal, SNAT: o.policy.SNAT, Direct: o.policy.Direct, NoMetadata: o.policy.NoMetadata,
	}
	for _, other := range known.NICs {
		n.NICs = append(n.NICs, other.MAC)
	}
	slices.Sort(n.NICs)
	if data.Gateway != "" {
		if gateway, err := netip.ParsePrefix(data.Gateway); err != nil || gateway.Addr() != n.Gateway {
			return Network{}, fmt.Errorf("the gateway of %s is %s, which Azure fixes, and not %.80s: leave out --gateway", prefix, n.Gateway, data.Gateway)
		}
	}
	if n.Aux, err = d.keepAux(ctx, n, nic, data.AuxAddresses); err != nil {
		return Network{}, err
	}
	for _, aux := range n.Aux {
		if mac := nicWith(known.NICs, aux.Addr); mac != "" {
			d.cfg.Warn(fmt.Sprintf("network %.12s: --aux-address %s=%s is the own address of NIC %s: no container gets it in any case, so leave it out", r.NetworkID, aux.Name, aux.Addr, mac))
		}
	}
	return n, nil
}

// nicWith returns the MAC of the NIC whose own address addr is. It is "" if addr is the own address of no NIC.
func nicWith(nics []pool.NICStatus, addr netip.Addr) string {
	for _, nic := range nics {
		if slices.ContainsFunc(nic.Subnets, func(s pool.SubnetStatus) bool { return s.Primary == addr }) {
			return nic.MAC
		}
	}
	return ""
}

// findNIC returns the NIC that has the subnet. If master names a NIC, it must be that one.
func (d *Driver) findNIC(ctx context.Context, master string, prefix netip.Prefix) (pool.NIC, error) {
	mac := ""
	if master != "" {
		var err error
		if _, mac, err = d.cfg.Host.NIC(ctx, master); err != nil {
			return pool.NIC{}, fmt.Errorf("-o master=%s: %w", master, err)
		}
	}
	nic, _, err := d.cfg.Pool.Subnet(ctx, mac, prefix)
	return nic, err
}

// DeleteNetwork forgets the network, and releases its auxiliary addresses: a round of Restore may have leased them again
// since ReleasePool. The bridge stays until an uninstall, because other networks and CNI may use it. It is a success if
// the network is not known.
func (d *Driver) DeleteNetwork(ctx context.Context, r *network.DeleteNetworkRequest) error {
	if err := checkIDs(r.NetworkID); err != nil {
		return err
	}
	return d.forgetNetwork(ctx, r.NetworkID)
}

// forgetNetwork takes a network out of networks.json, and releases its auxiliary addresses.
func (d *Driver) forgetNetwork(ctx context.Context, id string) error {
	var n Network
	err := d.changeNetworks(ctx, "forget network "+id, func(all map[string]Network) error {
		n = all[id]
		delete(all, id)
		return nil
	})
	if err != nil {
		return err
	}
	return d.releaseAux(ctx, n)
}

// swarmIDShape matches the ids of swarm networks. Those of other networks have 64 hex digits.
var swarmIDShape = regexp.MustCompile(`^[0-9a-z]{25}$`)

// swarmWay is the remedy in errors about swarm networks. docs/docker.md says the same.
const swarmWay = "create a configuration on each node, docker network create --config-only --subnet SUBNET --ipam-driver azure-vnet:latest CONFIG, and the network on a manager, docker network create --scope swarm -d azure-vnet:latest --config-from CONFIG NAME"

// AllocateNetwork is an error: it asks for a network's addresses on all nodes of a swarm. Engines send it only to drivers
// of global scope, which this driver is not.
func (d *Driver) AllocateNetwork(context.Context, *network.AllocateNetworkRequest) (*network.AllocateNetworkResponse, error) {
	return nil, errors.New("a swarm's manager cannot choose the addresses of a network, for each address belongs to one VM: " + swarmWay)
}

// FreeNetwork does nothing, because AllocateNetwork allocates nothing.
func (d *Driver) FreeNetwork(context.Context, *network.FreeNetworkRequest) error { return nil }

// DiscoverNew does nothing: Azure routes to other nodes, so the driver need not know them.
func (d *Driver) DiscoverNew(context.Context, *network.DiscoveryNotification) error { return nil }

// DiscoverDelete does nothing, as DiscoverNew.
func (d *Driver) DiscoverDelete(context.Context, *network.DiscoveryNotification) error { return nil }
