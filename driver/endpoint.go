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

// attachTime bounds CreateEndpoint and the publishing of ports. A container that starts keeps an engine from ending, and
// an engine that ends waits 15 s at most.
const attachTime = 9 * time.Second

// undoTime bounds the undoing of a failed CreateEndpoint. It runs even if the call's own deadline has passed.
const undoTime = 10 * time.Second

// CreateEndpoint attaches a container: it finds the lease that the IpamDriver made, ensures the bridge, makes the
// interface, and confirms the lease. Everything that can fail in a docker run is here and in RequestAddress: an engine
// from 29 leaves a container without any network if Join fails. After an error the engine sends no DeleteEndpoint, so
// CreateEndpoint leaves nothing.
func (d *Driver) CreateEndpoint(ctx context.Context, r *network.CreateEndpointRequest) (*network.CreateEndpointResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, attachTime)
	defer cancel()
	attached, err := d.createEndpoint(ctx, r)
	if err != nil {
		return nil, d.inDockersWords(ctx, r.EndpointID, err)
	}
	answer := &network.EndpointInterface{} // the engine refuses an answer that repeats the address or the MAC that it sent
	if r.Interface.MacAddress == "" {
		answer.MacAddress = attached.MAC.String()
	}
	return &network.CreateEndpointResponse{Interface: answer}, nil
}

// createEndpoint has the steps of CreateEndpoint.
func (d *Driver) createEndpoint(ctx context.Context, r *network.CreateEndpointRequest) (bridge.Attachment, error) {
	w, err := d.readWish(r)
	if err != nil {
		return bridge.Attachment{}, err
	}
	lease, err := d.findLease(ctx, w.network, w.addr.Addr())
	if err != nil {
		return bridge.Attachment{}, err
	}
	br, err := d.ensureBridge(ctx, w.network)
	if err != nil {
		return bridge.Attachment{}, err
	}
	attached, err := d.attachContainer(ctx, w, lease, br)
	if err != nil {
		return bridge.Attachment{}, err
	}
	if err := d.confirmLease(ctx, w, lease); err != nil {
		return bridge.Attachment{}, err
	}
	return attached, nil
}

// endpointWish is what an engine asks for with CreateEndpoint.
type endpointWish struct {
	owner   string
	network Network
	addr    netip.Prefix           // with the mask of the network's subnet
	mac     net.HardwareAddr       // nil: the bridge chooses it
	ports   []bridge.PublishedPort // published ports
}

// readWish reads the request.
func (d *Driver) readWish(r *network.CreateEndpointRequest) (w endpointWish, err error) {
	if err := checkIDs(r.NetworkID, r.EndpointID); err != nil {
		return w, err
	}
	w.owner = OwnerPrefix + r.EndpointID
	if w.ports, err = parseEndpointOptions(r.Options); err != nil {
		return w, err
	}
	if w.network, err = d.findNetwork(r.NetworkID); err != nil {
		return w, err
	}
	if w.network.Internal && len(w.ports) > 0 { // Docker's own internal networks ignore published ports too
		d.cfg.Warn(fmt.Sprintf("%s: not published for endpoint %.12s, whose network %.12s is internal: another network of its container may", portsText(w.ports), r.EndpointID, r.NetworkID))
		w.ports = nil
	}
	for i := range w.ports {
		w.ports[i].Idle = true // claimed now; ProgramExternalConnectivity has them lead to the container
	}
	w.addr, w.mac, err = w.network.readInterface(r.Interface)
	return w, err
}

// readInterface reads the address and the MAC that the engine asks for. The MAC is nil if the engine asks for none.
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
	mac, ok := parseMAC(want.MacAddress)
	if !ok {
		return netip.Prefix{}, nil, fmt.Errorf("%.80q is not a MAC address", want.MacAddress)
	}
	if mac[0]&1 != 0 {
		return netip.Prefix{}, nil, fmt.Errorf("MAC %s is a multicast address: no interface can have it", mac)
	}
	return addr, mac, nil
}

// findLease returns the lease that the IpamDriver made of the endpoint's address. It is an error if the address is not
// leased, is kept for something else, or belongs to another NIC than the network.
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

// withoutIP is the remedy if the address that --ip asks for cannot be had.
const withoutIP = "leave out --ip to get any free address"

// whyNotLeased returns the error that says why addr has no lease. The IpamDriver does not refuse an address that this VM
// cannot lend: an engine asks for --ip and for --aux-address in the same words, and an auxiliary address need not be this
// VM's. So the refusal comes here.
func (d *Driver) whyNotLeased(ctx context.Context, n Network, addr netip.Addr) error {
	if aux := d.describeAux(ctx, func(a Aux) bool { return a.Addr == addr }); aux != "" {
		return fmt.Errorf("%s is %s: %s", addr, aux, withoutIP)
	}
	if err := d.cfg.Pool.CheckLendable(ctx, n.MAC, n.Prefix, addr); err != nil {
		return fmt.Errorf("%w; %s", err, withoutIP)
	}
	return fmt.Errorf("%s is not leased, for its lease has ended: start the container again", addr)
}

// ensureBridge makes the network's bridge and the host's rules, as far as they are missing.
func (d *Driver) ensureBridge(ctx context.Context, n Network) (bridge.Bridge, error) {
	br, err := d.cfg.Host.Ensure(ctx, n.bridgeSpec())
	if err != nil {
		return br, err
	}
	for _, what := range br.Mended {
		d.cfg.Warn("mended: " + what)
	}
	return br, nil
}

// attachContainer makes the container's interface. The engine moves it into the container after Join. After an error no
// interface is left.
func (d *Driver) attachContainer(ctx context.Context, w endpointWish, lease pool.Lease, br bridge.Bridge) (bridge.Attachment, error) {
	n := w.network
	return d.cfg.Host.Attach(ctx, bridge.Endpoint{
		Owner: w.owner, Lease: lease.Owner, NIC: n.MAC, Bridge: br.Name, Addr: w.addr, Gateway: n.Gateway, MAC: w.mac, MTU: n.MTU,
		Policy: n.bridgePolicy(), Ports: w.ports,
	})
}

// confirmLease confirms the lease of an interface that stands. If the lease has ended, or the engine has given up
// waiting, it detaches the interface and is an error.
func (d *Driver) confirmLease(ctx context.Context, w endpointWish, lease pool.Lease) error {
	err := d.cfg.Pool.Confirm(ctx, lease)
	if err != nil {
		err = fmt.Errorf("confirm %s: %w", lease.Addr, err)
	} else {
		err = ctx.Err() // after the deadline, the answer reaches nobody
	}
	if err == nil {
		return nil
	}
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
	defer cancel()
	return errors.Join(err, d.cfg.Host.Detach(undo, w.owner))
}

// DeleteEndpoint detaches the container. It is a success if the container is not attached. The lease stays: the engine
// sends ReleaseAddress next.
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
