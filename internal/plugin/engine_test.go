// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker/docker/libnetwork/discoverapi"
	"github.com/docker/docker/libnetwork/driverapi"
	remotedriver "github.com/docker/docker/libnetwork/drivers/remote"
	"github.com/docker/docker/libnetwork/ipamapi"
	remoteipam "github.com/docker/docker/libnetwork/ipams/remote"
	"github.com/docker/docker/pkg/plugingetter"
	"github.com/docker/docker/pkg/plugins"
)

// clients are an engine's own clients of the plugin: of release 28.5.
type clients struct {
	network driverapi.Driver
	scope   driverapi.Capability
	ipam    ipamapi.Ipam
}

func (c *clients) RegisterDriver(_ string, d driverapi.Driver, scope driverapi.Capability) error {
	c.network, c.scope = d, scope
	return nil
}

func (c *clients) RegisterIpamDriver(_ string, i ipamapi.Ipam) error { c.ipam = i; return nil }

func (c *clients) RegisterIpamDriverWithCapabilities(name string, i ipamapi.Ipam, _ *ipamapi.Capability) error {
	return c.RegisterIpamDriver(name, i)
}

// store is an engine's list of plugins, with one in it.
type store struct{ plugingetter.CompatPlugin }

func (s store) GetAllManagedPluginsByCap(string) []plugingetter.CompatPlugin {
	return []plugingetter.CompatPlugin{s}
}
func (s store) Handle(string, func(string, *plugins.Client))               {}
func (s store) GetAllByCap(string) ([]plugingetter.CompatPlugin, error)    { return nil, nil }
func (s store) Get(string, string, int) (plugingetter.CompatPlugin, error) { return s, nil }
func (s store) Name() string                                               { return "azure-vnet:latest" }
func (s store) Protocol() string                                           { return plugins.ProtocolSchemeHTTPV1 }
func (s store) Timeout() time.Duration                                     { return 30 * time.Second }
func (s store) Addr() net.Addr {
	return &net.UnixAddr{Net: "unix", Name: "/run/docker/plugins/azure-vnet.sock"}
}
func (s store) Client() *plugins.Client {
	c, err := plugins.NewClientWithTimeout("unix://"+s.Addr().String(), nil, s.Timeout())
	if err != nil {
		panic(err) // the address is right
	}
	return c
}

// nic is a container's interface as an engine keeps it, and what Join says of it.
type nic struct {
	driverapi.JoinInfo
	mac           net.HardwareAddr
	addr          *net.IPNet
	source, names string
	gateway       net.IP
	routes        []string
}

func (n *nic) SetMacAddress(mac net.HardwareAddr) error   { n.mac = mac; return nil }
func (n *nic) SetIPAddress(*net.IPNet) error              { panic("the driver changed the address") }
func (n *nic) MacAddress() net.HardwareAddr               { return n.mac }
func (n *nic) Address() *net.IPNet                        { return n.addr }
func (n *nic) AddressIPv6() *net.IPNet                    { return nil }
func (n *nic) NetnsPath() string                          { return "" }
func (n *nic) InterfaceName() driverapi.InterfaceNameInfo { return n }
func (n *nic) SetNames(source, prefix, _ string) error {
	n.source, n.names = source, prefix
	return nil
}
func (n *nic) SetGateway(ip net.IP) error { n.gateway = ip; return nil }
func (n *nic) AddStaticRoute(dst *net.IPNet, kind int, nextHop net.IP) error {
	n.routes = append(n.routes, fmt.Sprintf("%s %d %s", dst, kind, nextHop))
	return nil
}
func (n *nic) SetCreatedInContainer(bool) {}

// newClients are those of an engine that found the plugin.
func newClients(t *testing.T) *clients {
	t.Helper()
	var c clients
	if err := remotedriver.Register(&c, store{}); err != nil {
		t.Fatal(err)
	}
	if err := remoteipam.Register(&c, store{}); err != nil {
		t.Fatal(err)
	}
	if c.network == nil || c.ipam == nil {
		t.Fatal("the engine did not take the drivers")
	}
	return &c
}

// run does what docker run does, and rm what docker rm -f does.
func (c *clients) run(pool, endpoint string) (*nic, error) {
	ctx := context.Background()
	ep := &nic{}
	var err error
	if ep.addr, _, err = c.ipam.RequestAddress(pool, nil, nil); err != nil {
		return nil, err
	}
	if err = c.network.CreateEndpoint(ctx, netID, endpoint, ep, map[string]any{}); err == nil {
		err = c.network.Join(ctx, netID, endpoint, "/run/docker/netns/x", ep, nil, nil)
	}
	if err == nil {
		err = c.network.ProgramExternalConnectivity(ctx, netID, endpoint, map[string]any{})
	}
	if err == nil {
		_, err = c.network.EndpointOperInfo(netID, endpoint)
	}
	return ep, err
}

func (c *clients) rm(pool, endpoint string, ep *nic) error {
	return errors.Join(
		c.network.RevokeExternalConnectivity(netID, endpoint), c.network.Leave(netID, endpoint),
		c.network.DeleteEndpoint(netID, endpoint), c.ipam.ReleaseAddress(pool, ep.addr.IP))
}

func TestTheEnginesOwnClients(t *testing.T) {
	newVM(t, 2)
	startPlugin(t, t.TempDir())
	c := newClients(t)
	expect(t, "scope", driverapi.Capability{DataScope: "local", ConnectivityScope: "global"}, c.scope)
	local, _, err := c.ipam.GetDefaultAddressSpaces()
	if err != nil {
		t.Fatal(err)
	}
	// No --subnet, on a host whose own route overlaps: one call, and no loop.
	pool, err := c.ipam.RequestPool(ipamapi.PoolRequest{AddressSpace: local, Exclude: []netip.Prefix{netip.MustParsePrefix("10.240.0.0/16")}})
	if err != nil {
		t.Fatal(err)
	}
	expect(t, "pool", "10.240.0.0/16", pool.Pool.String())
	gateway := &net.IPNet{IP: net.IPv4(10, 240, 0, 1), Mask: net.CIDRMask(16, 32)}
	expect(t, "gateway", gateway.String(), pool.Meta["com.docker.network.gateway"])
	subnet := &net.IPNet{IP: net.IPv4(10, 240, 0, 0), Mask: net.CIDRMask(16, 32)}
	data := []driverapi.IPAMData{{AddressSpace: local, Pool: subnet, Gateway: gateway}}
	if err := c.network.CreateNetwork(context.Background(), netID, map[string]any{}, nil, data, nil); err != nil {
		t.Fatal(err)
	}
	ep, err := c.run(pool.PoolID, endpointID(1))
	if err != nil {
		t.Fatal(err)
	}
	got := []string{ep.addr.String(), ep.mac.String(), ep.names, ep.gateway.String(), ep.source[:3]}
	expect(t, "endpoint", []string{"10.240.0.5/16", "02:42:0a:f0:00:05", "eth", "10.240.0.1", "azc"}, got)
	expect(t, "routes", []string{"10.240.0.1/32 1 <nil>", "10.240.0.0/17 0 10.240.0.1", "10.240.128.0/17 0 10.240.0.1"}, ep.routes)
	for what, err := range map[string]error{
		"remove":         c.rm(pool.PoolID, endpointID(1), ep),
		"release pool":   c.ipam.ReleasePool(pool.PoolID),
		"delete network": c.network.DeleteNetwork(netID),
	} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	expect(t, "links", []string{}, endpoints(t))
}

// Every call by an engine's own clients: of what is not there, again, and at once.
func TestTheEnginesOwnClientsRepeatThemselves(t *testing.T) {
	newVM(t, 20)
	e := startPlugin(t, t.TempDir())
	c := newClients(t)
	pool := e.createNetwork(netID, nil)
	unknown := &nic{addr: &net.IPNet{IP: net.IPv4(10, 240, 0, 9), Mask: net.CIDRMask(16, 32)}}
	swarm := c.network.(interface {
		discoverapi.Discover
		NetworkAllocate(string, map[string]string, []driverapi.IPAMData, []driverapi.IPAMData) (map[string]string, error)
		NetworkFree(string) error
	})
	if _, err := swarm.NetworkAllocate(netID, nil, nil, nil); err == nil || !strings.Contains(err.Error(), "--scope swarm -d azure-vnet:latest --config-from CONFIG") {
		t.Errorf("NetworkAllocate: %v", err)
	}
	node := discoverapi.NodeDiscoveryData{Address: "10.240.0.4", Self: true}
	for what, err := range map[string]error{
		"rm of an unknown endpoint":       c.rm(pool, endpointID(99), unknown),
		"program of an unknown endpoint":  c.network.ProgramExternalConnectivity(t.Context(), netID, endpointID(99), nil),
		"an unknown network":              c.network.DeleteNetwork(otherID),
		"an unknown swarm network":        swarm.NetworkFree(otherID),
		"another node":                    swarm.DiscoverNew(discoverapi.NodeDiscovery, node),
		"another node that is gone":       swarm.DiscoverDelete(discoverapi.NodeDiscovery, node),
		"a pool that holds nothing":       c.ipam.ReleasePool(pool[:len(pool)-12] + "000000000000"),
		"an address of such a pool":       c.ipam.ReleaseAddress(pool[:len(pool)-12]+"000000000000", unknown.addr.IP),
		"an endpoint's ports, of nothing": func() error { _, err := c.network.EndpointOperInfo(otherID, endpointID(99)); return err }(),
	} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	for what, err := range map[string]error{
		"CreateEndpoint of an unknown network": c.network.CreateEndpoint(t.Context(), otherID, endpointID(99), unknown, nil),
		"CreateEndpoint of an unlent address":  c.network.CreateEndpoint(t.Context(), netID, endpointID(99), unknown, nil),
		"Join of an unknown endpoint":          c.network.Join(t.Context(), netID, endpointID(99), "", unknown, nil, nil),
		"ReleasePool of another driver":        c.ipam.ReleasePool("LocalDefault/10.240.0.0/16"),
	} {
		if err == nil {
			t.Errorf("%s: no error", what)
		}
	}
	for range 2 { // the second time of the same endpoints
		var all sync.WaitGroup
		for i := range 20 {
			all.Go(func() {
				ep, err := c.run(pool, endpointID(i))
				if err != nil {
					t.Error(err)
					return
				}
				if err := c.network.CreateEndpoint(t.Context(), netID, endpointID(i), &nic{addr: ep.addr, mac: ep.mac}, nil); err != nil {
					t.Errorf("CreateEndpoint again, of one that is not yet in a container: %v", err)
				}
				for range 2 {
					if err := c.rm(pool, endpointID(i), ep); err != nil {
						t.Error(err)
					}
				}
			})
		}
		all.Wait()
	}
	expect(t, "links", []string{}, endpoints(t))
	expect(t, "leases", []string{}, e.lent())
}
