// Copyright (c) The azure-vnet authors. MIT licence.

package driver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/docker/go-plugins-helpers/network"

	"azurevnet/bridge"
	"azurevnet/pool"
)

// attachTime bounds CreateEndpoint: a container that starts keeps an engine from
// ending, which gives up after 15 s.
const attachTime = 9 * time.Second

// undoTime bounds a rollback, which runs after the call's own deadline too.
const undoTime = 10 * time.Second

// CreateEndpoint attaches a container's interface: all that can fail of a
// docker run is here, since an engine from 29 leaves a container without network
// when Join fails. A failure leaves nothing, for the engine sends no DeleteEndpoint
// after one.
func (d *Driver) CreateEndpoint(ctx context.Context, r *network.CreateEndpointRequest) (*network.CreateEndpointResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, attachTime)
	defer cancel()
	attached, err := d.attachEndpoint(ctx, r)
	if err != nil {
		return nil, d.inDockersWords(ctx, r.EndpointID, err)
	}
	answer := &network.EndpointInterface{} // an address that is echoed is an error to the engine
	if r.Interface.MacAddress == "" {
		answer.MacAddress = attached.MAC.String()
	}
	return &network.CreateEndpointResponse{Interface: answer}, nil
}

func (d *Driver) attachEndpoint(ctx context.Context, r *network.CreateEndpointRequest) (bridge.Attachment, error) {
	none := bridge.Attachment{}
	if err := checkIDs(r.NetworkID, r.EndpointID); err != nil {
		return none, err
	}
	ports, err := parseEndpointOptions(r.Options)
	if err != nil {
		return none, err
	}
	n, err := d.findNetwork(r.NetworkID)
	if err != nil {
		return none, err
	}
	if n.Internal && len(ports) > 0 {
		d.cfg.Warn(fmt.Sprintf("%s: not published for endpoint %.12s, whose network %.12s is internal: another network of its container may", portsText(ports), r.EndpointID, r.NetworkID))
		ports = nil // as Docker's own internal networks do: the container may publish by another network of its
	}
	addr, mac, err := n.readInterface(r.Interface)
	if err != nil {
		return none, err
	}
	lease, err := d.findLease(ctx, n, addr.Addr())
	if err != nil {
		return none, err
	}
	br, err := d.cfg.Host.Ensure(ctx, n.bridgeSpec())
	if err != nil {
		return none, err
	}
	for _, what := range br.Mended {
		d.cfg.Warn("mended: " + what)
	}
	for i := range ports {
		ports[i].Idle = true // until ProgramExternalConnectivity says that they lead here
	}
	owner := OwnerPrefix + r.EndpointID
	attached, err := d.cfg.Host.Attach(ctx, bridge.Endpoint{
		Owner: owner, Lease: lease.Owner, NIC: n.MAC, Bridge: br.Name, Addr: addr, Gateway: n.Gateway, MAC: mac, MTU: n.MTU,
		Policy: n.bridgePolicy(), Ports: ports,
	})
	if err != nil {
		return none, err // and nothing was attached
	}
	if err = d.cfg.Pool.Confirm(ctx, lease); err == nil {
		err = ctx.Err() // an answer after the deadline reaches nobody
	}
	if err != nil {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
		defer cancel()
		return none, errors.Join(err, d.cfg.Host.Detach(undo, owner))
	}
	return attached, nil
}

// readInterface reads the interface that the engine wants: an address of the network,
// and a MAC (nil: ours to choose).
func (n Network) readInterface(want *network.EndpointInterface) (netip.Prefix, net.HardwareAddr, error) {
	switch {
	case want == nil || want.Address == "":
		return netip.Prefix{}, nil, errors.New("the engine gave no address")
	case want.AddressIPv6 != "":
		return netip.Prefix{}, nil, errors.New("IPv6 is not served yet")
	}
	addr, err := netip.ParsePrefix(want.Address)
	if err != nil {
		return netip.Prefix{}, nil, fmt.Errorf("%.80q is not an address with its mask", want.Address)
	}
	if addr.Masked() != n.Prefix {
		return netip.Prefix{}, nil, fmt.Errorf("%s is not of the network's subnet %s", addr, n.Prefix)
	}
	if want.MacAddress == "" {
		return addr, nil, nil
	}
	mac, err := net.ParseMAC(want.MacAddress)
	if err != nil || len(mac) != 6 {
		return netip.Prefix{}, nil, fmt.Errorf("%.80q is not a MAC address", want.MacAddress)
	}
	if mac[0]&1 != 0 {
		return netip.Prefix{}, nil, fmt.Errorf("MAC %s is a multicast address: no interface can have it", mac)
	}
	return addr, mac, nil
}

// findLease is the one that the IpamDriver made for the endpoint.
func (d *Driver) findLease(ctx context.Context, n Network, addr netip.Addr) (pool.Lease, error) {
	lease, held, err := d.cfg.Pool.FindLease(ctx, addr)
	switch {
	case err != nil:
		return lease, err
	case !held:
		return lease, d.whyNotLeased(ctx, n, addr)
	case !strings.HasPrefix(lease.Owner, OwnerPrefix), lease.Linkless:
		return lease, fmt.Errorf("%s %s: %s", addr, d.WhoHas(ctx, lease), withoutIP)
	case lease.MAC != n.MAC || lease.Prefix != n.Prefix:
		return lease, fmt.Errorf("%s belongs to NIC %s (%s) and the network to NIC %s (%s): create the network with --ipam-opt master= and -o master= naming one NIC", addr, lease.MAC, lease.Prefix, n.MAC, n.Prefix)
	}
	return lease, nil
}

// withoutIP says what to do if the address that --ip asks for cannot be had.
const withoutIP = "leave out --ip to get any free address"

// whyNotLeased says why addr has no lease. The IpamDriver refuses no address that this VM cannot lend: an engine asks for
// --ip and for --aux-address in the same words, and an auxiliary address need not be this VM's.
func (d *Driver) whyNotLeased(ctx context.Context, n Network, addr netip.Addr) error {
	if aux := d.describeAux(ctx, func(a Aux) bool { return a.Addr == addr }); aux != "" {
		return fmt.Errorf("%s is %s: %s", addr, aux, withoutIP)
	}
	if err := d.cfg.Pool.CheckLendable(ctx, n.MAC, n.Prefix, addr); err != nil {
		return fmt.Errorf("%w; %s", err, withoutIP)
	}
	return fmt.Errorf("%s is not leased, for its lease has ended: start the container again", addr)
}

// DeleteEndpoint removes the endpoint's link; one that is not there is success.
func (d *Driver) DeleteEndpoint(ctx context.Context, r *network.DeleteEndpointRequest) error {
	if err := checkIDs(r.EndpointID); err != nil {
		return err
	}
	if err := d.cfg.Host.Detach(ctx, OwnerPrefix+r.EndpointID); err != nil {
		return d.inDockersWords(ctx, r.EndpointID, err)
	}
	d.ports.Lock()
	defer d.ports.Unlock()
	return d.ports.bindOwner(OwnerPrefix+r.EndpointID, nil)
}

// Join tells the engine which link to move into the container, and the routes of
// that link. The answer always has the gateway, or declines the service of one: else
// the engine adds an interface of its own.
func (d *Driver) Join(ctx context.Context, r *network.JoinRequest) (*network.JoinResponse, error) {
	if err := checkIDs(r.NetworkID, r.EndpointID); err != nil {
		return nil, err
	}
	n, err := d.findNetwork(r.NetworkID)
	if err != nil {
		return nil, err
	}
	all, err := d.cfg.Host.Attachments(ctx)
	if err != nil {
		return nil, err
	}
	for _, at := range all {
		if at.Owner != OwnerPrefix+r.EndpointID {
			continue
		}
		if at.Peer == "" {
			return nil, fmt.Errorf("endpoint %.12s is in a container already", r.EndpointID)
		}
		answer := &network.JoinResponse{
			InterfaceName: network.InterfaceName{SrcName: at.Peer, DstPrefix: "eth"},
			StaticRoutes:  routesByGateway(n.Prefix, n.Gateway),
		}
		if answer.DisableGatewayService = n.Internal; !n.Internal {
			answer.Gateway = n.Gateway.String()
		}
		return answer, nil
	}
	return nil, fmt.Errorf("endpoint %.12s is not attached: start the container again", r.EndpointID)
}

// The kinds of an engine's static routes (its types.NEXTHOP and types.CONNECTED).
const (
	routeNextHop   = 0
	routeConnected = 1
)

// routesByGateway are the routes that lead a container to its own subnet by the
// gateway: so the container holds one neighbour entry, and all that it sends passes
// the host's IP layer. The engine gives the interface a route to the whole subnet as
// well, so the subnet goes in two halves, which are more specific. The gateway's own
// route comes first, for the engine looks up the way to a next hop.
func routesByGateway(subnet netip.Prefix, gateway netip.Addr) []*network.StaticRoute {
	subnet = subnet.Masked()
	routes := []*network.StaticRoute{{Destination: netip.PrefixFrom(gateway, gateway.BitLen()).String(), RouteType: routeConnected}}
	bits := subnet.Bits() + 1
	if bits >= gateway.BitLen() {
		return routes // the halves of two addresses are these addresses
	}
	upper := subnet.Addr().As4()
	upper[subnet.Bits()/8] |= 0x80 >> (subnet.Bits() % 8)
	for _, half := range []netip.Addr{subnet.Addr(), netip.AddrFrom4(upper)} {
		routes = append(routes, &network.StaticRoute{Destination: netip.PrefixFrom(half, bits).String(), RouteType: routeNextHop, NextHop: gateway.String()})
	}
	return routes
}

// Leave ends what is published, where the engine forgot to revoke it. The engine has brought the link back, and
// DeleteEndpoint removes it.
func (d *Driver) Leave(ctx context.Context, r *network.LeaveRequest) error {
	return d.inDockersWords(ctx, r.EndpointID, d.publishPorts(ctx, r.EndpointID, nil))
}

// EndpointInfo tells which ports of the host lead to the endpoint. An engine asks,
// but shows only those of its own drivers.
func (d *Driver) EndpointInfo(ctx context.Context, r *network.InfoRequest) (*network.InfoResponse, error) {
	info := &network.InfoResponse{Value: map[string]string{}}
	all, err := d.cfg.Host.Attachments(ctx)
	if err != nil {
		return nil, err
	}
	for _, at := range all {
		if at.Owner == OwnerPrefix+r.EndpointID && len(at.Ports) > 0 {
			info.Value["ports"] = portsText(at.Ports)
		}
	}
	return info, nil
}

// ProgramExternalConnectivity publishes the container's ports, for its default route leads here now. Those that came
// with CreateEndpoint were claimed there, since an engine from 29 leaves a container without network when this
// fails. Others come where the container was connected to this network after another one; if somebody has such a
// port by now, the container goes on without it, and the log says so.
func (d *Driver) ProgramExternalConnectivity(ctx context.Context, r *network.ProgramExternalConnectivityRequest) error {
	ports, err := parseEndpointOptions(r.Options)
	if err == nil && len(ports) > 0 {
		err = d.publishPorts(ctx, r.EndpointID, ports)
	}
	if err != nil {
		d.cfg.Warn(fmt.Sprintf("%s: not published for endpoint %.12s: %v", portsText(ports), r.EndpointID, d.inDockersWords(ctx, r.EndpointID, err)))
	}
	return nil
}

// RevokeExternalConnectivity takes the container's ports back, for its default route leads to another network now,
// which publishes them. They stay claimed.
func (d *Driver) RevokeExternalConnectivity(ctx context.Context, r *network.RevokeExternalConnectivityRequest) error {
	return d.inDockersWords(ctx, r.EndpointID, d.publishPorts(ctx, r.EndpointID, nil))
}

func (d *Driver) publishPorts(ctx context.Context, endpoint string, ports []bridge.PublishedPort) error {
	if err := checkIDs(endpoint); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, attachTime)
	defer cancel()
	d.ports.Lock()
	defer d.ports.Unlock()
	published, err := d.cfg.Host.Publish(ctx, OwnerPrefix+endpoint, ports)
	return errors.Join(err, d.ports.bindOwner(OwnerPrefix+endpoint, published))
}
