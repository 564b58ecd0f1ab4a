// Copyright (c) The azure-vnet authors. MIT licence.

package driver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/docker/go-plugins-helpers/network"

	"azurevnet/bridge"
)

// Join tells the engine which link to move into the container, and the routes of that link. The answer either has the
// gateway or says that the network has none. With an answer that does neither, the engine would add an interface of its
// own to the container.
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
	for _, attached := range all {
		if attached.Owner != OwnerPrefix+r.EndpointID {
			continue
		}
		if attached.Peer == "" {
			return nil, fmt.Errorf("endpoint %.12s is in a container already", r.EndpointID)
		}
		answer := &network.JoinResponse{
			InterfaceName: network.InterfaceName{SrcName: attached.Peer, DstPrefix: "eth"},
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

// routesByGateway returns the routes by which a container reaches its own subnet through the gateway. So the container
// holds one neighbour entry only, and all that it sends passes the host's IP layer.
//
// The engine gives the interface a connected route to the whole subnet too. The subnet therefore comes in two halves,
// which are more specific than that route. The route to the gateway itself comes first, because the engine looks up the
// way to a next hop.
func routesByGateway(subnet netip.Prefix, gateway netip.Addr) []*network.StaticRoute {
	subnet = subnet.Masked()
	routes := []*network.StaticRoute{{Destination: netip.PrefixFrom(gateway, gateway.BitLen()).String(), RouteType: routeConnected}}
	bits := subnet.Bits() + 1
	if bits >= gateway.BitLen() {
		return routes // a subnet of two addresses has no halves that are subnets
	}
	upper := subnet.Addr().As4()
	upper[subnet.Bits()/8] |= 0x80 >> (subnet.Bits() % 8)
	for _, half := range []netip.Addr{subnet.Addr(), netip.AddrFrom4(upper)} {
		routes = append(routes, &network.StaticRoute{Destination: netip.PrefixFrom(half, bits).String(), RouteType: routeNextHop, NextHop: gateway.String()})
	}
	return routes
}

// Leave takes the container's published ports back, if the engine did not revoke them. The engine has moved the link back
// to the host by now, and DeleteEndpoint removes it.
func (d *Driver) Leave(ctx context.Context, r *network.LeaveRequest) error {
	return d.inDockersWords(ctx, r.EndpointID, d.publishPorts(ctx, r.EndpointID, nil))
}

// EndpointInfo tells which ports of the host lead to the endpoint. Engines ask, but show only those of their own drivers.
func (d *Driver) EndpointInfo(ctx context.Context, r *network.InfoRequest) (*network.InfoResponse, error) {
	info := &network.InfoResponse{Value: map[string]string{}}
	attached, _, err := d.cfg.Host.Attachment(ctx, OwnerPrefix+r.EndpointID)
	if err != nil {
		return nil, err
	}
	if len(attached.Ports) > 0 {
		info.Value["ports"] = portsText(attached.Ports)
	}
	return info, nil
}

// ProgramExternalConnectivity has the container's published ports lead to it. The engine calls it when the container's
// default route leads to this network.
//
// It never fails, because an engine from 29 would leave the container without any network. The ports of CreateEndpoint
// were claimed there, so nobody else has them. Other ports come if the container was connected to this network after
// another one. If somebody else has such a port by now, the container goes on without it, and the log says so.
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

// RevokeExternalConnectivity takes the container's ports back. The engine calls it when the container's default route
// leads to another network, which then publishes the ports. The claim of the ports stays.
func (d *Driver) RevokeExternalConnectivity(ctx context.Context, r *network.RevokeExternalConnectivityRequest) error {
	return d.inDockersWords(ctx, r.EndpointID, d.publishPorts(ctx, r.EndpointID, nil))
}

// publishPorts has exactly these ports of the host lead to the endpoint.
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
