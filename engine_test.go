// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

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
func (n *nic) SetCreatedInContainer(bool) {}

func TestTheEnginesOwnClients(t *testing.T) {
	newVM(t, 2)
	startPlugin(t, t.TempDir())
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
	ctx := context.Background()
	if err := c.network.CreateNetwork(ctx, netID, map[string]any{}, nil, data, nil); err != nil {
		t.Fatal(err)
	}
	ep := &nic{}
	if ep.addr, _, err = c.ipam.RequestAddress(pool.PoolID, nil, nil); err != nil {
		t.Fatal(err)
	}
	if err := c.network.CreateEndpoint(ctx, netID, endpointID(1), ep, map[string]any{}); err != nil {
		t.Fatal(err)
	}
	if err := c.network.Join(ctx, netID, endpointID(1), "/run/docker/netns/x", ep, nil, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := c.network.EndpointOperInfo(netID, endpointID(1)); err != nil {
		t.Error(err)
	}
	got := []string{ep.addr.String(), ep.mac.String(), ep.names, ep.gateway.String(), ep.source[:3]}
	expect(t, "endpoint", []string{"10.240.0.5/16", "02:42:0a:f0:00:05", "eth", "10.240.0.1", "azc"}, got)
	for what, err := range map[string]error{
		"revoke":          c.network.RevokeExternalConnectivity(netID, endpointID(1)),
		"leave":           c.network.Leave(netID, endpointID(1)),
		"delete endpoint": c.network.DeleteEndpoint(netID, endpointID(1)),
		"release address": c.ipam.ReleaseAddress(pool.PoolID, ep.addr.IP),
		"release pool":    c.ipam.ReleasePool(pool.PoolID),
		"delete network":  c.network.DeleteNetwork(netID),
	} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	expect(t, "links", []string{}, endpoints(t))
}
