// Copyright (c) The azure-vnet authors. MIT licence.

// Package ipamdriver is libnetwork's IpamDriver over the pool: it turns Docker's
// pools and addresses into leases. It is not the network and makes no link, and
// keeps nothing that a later call needs: a PoolID says it all.
//
// Errors do not name the call, for the engine puts its name before them.
package ipamdriver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/docker/go-plugins-helpers/ipam"

	"azurevnet/pool"
)

// AddressSpace is the one name of the local and the global address space. They
// must be the same: engines from 27 then skip the check against host routes that
// a VNet's subnet can never pass.
const AddressSpace = "azure-vnet"

// Keys of the engine's protocol.
const (
	gatewayData    = "com.docker.network.gateway"
	addressType    = "RequestAddressType"
	addressGateway = "com.docker.network.gateway"
)

// Config says what the driver works on.
type Config struct {
	Pool     *pool.Pool
	FindNIC  func(ctx context.Context, nameOrMAC string) (mac string, err error) // finds the host's NIC of that name
	FindLink func(ctx context.Context, addr netip.Addr) (link string, err error) // host link that holds the address, or ""
	HoldAux  func(ctx context.Context) error                                     // has all auxiliary addresses held, before any address is lent; may be nil
	WhoHas   func(ctx context.Context, lease pool.Lease) string                  // says in Docker's words who has a leased address: "is held by …" or "is …"; nil: by the owner alone
	Warn     func(text string)                                                   // told what is no failure, but worth knowing; may be nil
}

// Driver answers the IpamDriver calls. Its methods are safe for parallel use.
type Driver struct {
	cfg Config

	mu     sync.Mutex
	chosen map[netip.Prefix]choice // pools chosen for the engine that nothing has used yet
	lately map[poolID]time.Time    // when each was requested; for Agrees alone
}

// choice is a pool given out for an empty request.
type choice struct {
	id string
	at time.Time
}

// choiceAge bounds how long an unused choice is taken for the engine's loop,
// which asks again within a millisecond; an engine that died has no loop.
const choiceAge = 10 * time.Second

// New returns a driver.
func New(cfg Config) *Driver {
	if cfg.HoldAux == nil {
		cfg.HoldAux = func(context.Context) error { return nil }
	}
	if cfg.WhoHas == nil {
		cfg.WhoHas = func(_ context.Context, lease pool.Lease) string { return "is held by " + lease.Owner }
	}
	if cfg.Warn == nil {
		cfg.Warn = func(string) {}
	}
	return &Driver{cfg: cfg, chosen: map[netip.Prefix]choice{}, lately: map[poolID]time.Time{}}
}

// GetCapabilities asks for neither MAC addresses nor replay.
func (d *Driver) GetCapabilities(context.Context) (*ipam.CapabilitiesResponse, error) {
	return &ipam.CapabilitiesResponse{}, nil
}

// GetDefaultAddressSpaces returns one name for both.
func (d *Driver) GetDefaultAddressSpaces(context.Context) (*ipam.AddressSpacesResponse, error) {
	return &ipam.AddressSpacesResponse{LocalDefaultAddressSpace: AddressSpace, GlobalDefaultAddressSpace: AddressSpace}, nil
}

// RequestPool checks that the pool is exactly a subnet of a NIC of this VM, or
// chooses the NIC's first. It takes nothing: a pool that is never released
// leaks nothing.
func (d *Driver) RequestPool(ctx context.Context, r *ipam.RequestPoolRequest) (*ipam.RequestPoolResponse, error) {
	if r.AddressSpace != "" && r.AddressSpace != AddressSpace {
		return nil, fmt.Errorf("address space %.80q is not this driver's, which is %s", r.AddressSpace, AddressSpace)
	}
	if r.V6 {
		return nil, errors.New("IPv6 is not served yet: leave out --ipv6")
	}
	var want, within netip.Prefix
	var err error
	if r.Pool != "" {
		if want, err = parseSubnet(r.Pool); err != nil {
			return nil, fmt.Errorf("--subnet %w", err)
		}
	}
	if r.SubPool != "" {
		if r.Pool == "" {
			return nil, errors.New("--ip-range needs --subnet")
		}
		if within, err = parseSubnet(r.SubPool); err != nil {
			return nil, fmt.Errorf("--ip-range %w", err)
		}
		if !containsPrefix(want, within) {
			return nil, fmt.Errorf("--ip-range %s lies outside --subnet %s", within, want)
		}
	}
	mac, err := d.findMaster(ctx, r.Options)
	if err != nil {
		return nil, err
	}
	nic, subnet, err := d.cfg.Pool.Subnet(ctx, mac, want)
	if err != nil {
		return nil, err
	}
	id := poolID{mac: nic.MAC, prefix: subnet.Prefix, within: within, serial: newSerial()}
	if r.Pool == "" {
		if err := d.noteChoice(id); err != nil {
			return nil, err
		}
	}
	if within.IsValid() && !slices.ContainsFunc(subnet.Secondary, within.Contains) {
		d.cfg.Warn(fmt.Sprintf("--ip-range %s: NIC %s has no ipconfig in it, so the network lends no address until one is added: az network nic ip-config create -g GROUP --nic-name NIC -n NAME --private-ip-address ADDRESS", within, nic.MAC))
	}
	d.noteRequest(id)
	return &ipam.RequestPoolResponse{
		PoolID: id.String(),
		Pool:   id.prefix.String(),
		Data:   map[string]string{gatewayData: netip.PrefixFrom(id.gateway(), id.prefix.Bits()).String()},
	}, nil
}

// findMaster returns the MAC that --ipam-opt master= names, "" without it.
func (d *Driver) findMaster(ctx context.Context, options map[string]string) (mac string, err error) {
	for key, value := range options {
		if key != "master" {
			return "", fmt.Errorf("unknown --ipam-opt %.80q: the only one is master=<NIC>", key)
		}
		if mac, err = d.cfg.FindNIC(ctx, value); err != nil {
			return "", fmt.Errorf("--ipam-opt master=%.80s: %w", value, err)
		}
	}
	return mac, nil
}

// noteChoice notes a pool chosen for an empty request. Engines before 27 ask again
// and again while the pool overlaps a host route, which a VNet's subnet always
// does; only an error ends that loop.
func (d *Driver) noteChoice(id poolID) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if last, ok := d.chosen[id.prefix]; ok && time.Since(last.at) < choiceAge {
		return fmt.Errorf("this engine does not let a driver choose the subnet: pass --subnet %s", id.prefix)
	}
	d.chosen[id.prefix] = choice{id: id.String(), at: time.Now()}
	return nil
}

// NetworkMade tells that a network has been made of prefix on that MAC's NIC: what was
// chosen for it is in use, and one of the pools requested lately is its.
func (d *Driver) NetworkMade(prefix netip.Prefix, mac string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.chosen, prefix)
	var its poolID
	for id, at := range d.lately {
		if id.prefix == prefix && id.mac == mac && (its == poolID{} || at.Before(d.lately[its])) {
			its = id
		}
	}
	delete(d.lately, its)
}

// requestAge is how long after its RequestPool a network may be created: the
// calls between have deadlines of their own.
const requestAge = time.Minute

func (d *Driver) noteRequest(id poolID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	maps.DeleteFunc(d.lately, func(_ poolID, at time.Time) bool { return time.Since(at) > requestAge })
	d.lately[id] = time.Now()
}

// CheckNIC returns an error if pools of the subnet were requested lately, and all
// of other NICs than that MAC's: --ipam-opt master= and -o master= then differ,
// and the engine tells neither driver of the other's. After a restart it knows
// of none, and the network's first container is refused instead.
func (d *Driver) CheckNIC(subnet netip.Prefix, mac string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	other := ""
	for id, at := range d.lately {
		if id.prefix != subnet || time.Since(at) > requestAge {
			continue
		}
		if id.mac == mac {
			return nil
		}
		other = id.mac
	}
	if other == "" {
		return nil
	}
	return fmt.Errorf("its addresses are those of NIC %s and its master is NIC %s, both in subnet %s: name one NIC with both, --ipam-opt master= and -o master=", other, mac, subnet)
}

// dropChoice ends the choice made with id.
func (d *Driver) dropChoice(id poolID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.chosen[id.prefix].id == id.String() {
		delete(d.chosen, id.prefix)
	}
}

// ReleasePool releases what the pool still holds and no link has: auxiliary
// addresses, and what a lost call left.
func (d *Driver) ReleasePool(ctx context.Context, r *ipam.ReleasePoolRequest) error {
	id, err := parsePoolID(r.PoolID)
	if err != nil {
		return err
	}
	d.dropChoice(id)
	d.mu.Lock()
	delete(d.lately, id)
	d.mu.Unlock()
	status, err := d.cfg.Pool.Status(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for addr, lease := range status.Leases {
		if lease.Owner == id.owner() {
			errs = append(errs, d.releaseAddress(ctx, id, addr))
		}
	}
	return errors.Join(errs...)
}

// requestTime bounds RequestAddress: a container that starts keeps an engine from
// ending, which gives up after 15 s. The longest question to a source takes 8 s.
const requestTime = 9 * time.Second

// RequestAddress leases an address of the pool: the one asked for (--ip, an
// auxiliary address) or the one freed longest ago. The gateway is Azure's and
// leased to nobody.
//
// Auxiliary addresses, which may be anybody's, and --ip look alike here. So one
// of the subnet that is not this VM's is answered without being leased: the
// NetworkDriver lets no container have what is not leased.
func (d *Driver) RequestAddress(ctx context.Context, r *ipam.RequestAddressRequest) (*ipam.RequestAddressResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()
	id, err := parsePoolID(r.PoolID)
	if err != nil {
		return nil, err
	}
	d.dropChoice(id)
	var want netip.Addr
	if r.Address != "" {
		if want, err = netip.ParseAddr(r.Address); err != nil {
			return nil, fmt.Errorf("%.80q is not an address", r.Address)
		}
	}
	if r.Options[addressType] == addressGateway {
		if want.IsValid() && want != id.gateway() {
			return nil, fmt.Errorf("the gateway of %s is %s and no other: Azure fixes it; leave out --gateway", id.prefix, id.gateway())
		}
		return addressResponse(id, id.gateway()), nil
	}
	if want.IsValid() {
		if err := id.checkLendable(want); err != nil {
			return nil, fmt.Errorf("%s: %w", want, err)
		}
	}
	// If Reserve fails, an address that is asked for by name is lent all the same.
	if err := d.cfg.HoldAux(ctx); err != nil && !want.IsValid() {
		return nil, err
	}
	lease, err := d.cfg.Pool.Lease(ctx, pool.Request{Owner: id.owner(), MAC: id.mac, Prefix: id.prefix, Range: id.within, Addr: want})
	if errors.Is(err, pool.ErrNotOurs) && want.IsValid() && d.isNobodysToLend(ctx, id, want) {
		return addressResponse(id, want), nil
	}
	if errors.Is(err, pool.ErrInUse) {
		return nil, d.wordInUse(ctx, want, err)
	}
	if err != nil {
		return nil, err
	}
	if lease.Early {
		d.cfg.Warn(fmt.Sprintf("%s was released a moment ago and is lent again: no other address is left; give the NIC more ipconfigs", lease.Addr))
	}
	return addressResponse(id, lease.Addr), nil
}

// wordInUse words err in Docker's words. err says that addr is in use.
func (d *Driver) wordInUse(ctx context.Context, addr netip.Addr, err error) error {
	lease, held, unread := d.cfg.Pool.FindLease(ctx, addr)
	if unread != nil || !held {
		return err // the lease has ended meanwhile, or a container has the address without a lease
	}
	return fmt.Errorf("%w: %s %s; ask for another", pool.ErrInUse, addr, d.cfg.WhoHas(ctx, lease))
}

// isNobodysToLend tells an address that no ipconfig lends to this NIC's containers. One
// that the host holds is not isNobodysToLend: it may be lent yet.
func (d *Driver) isNobodysToLend(ctx context.Context, id poolID, addr netip.Addr) bool {
	_, subnet, err := d.cfg.Pool.Subnet(ctx, id.mac, id.prefix)
	return err == nil && !slices.Contains(subnet.Secondary, addr)
}

func addressResponse(id poolID, addr netip.Addr) *ipam.RequestAddressResponse {
	return &ipam.RequestAddressResponse{Address: netip.PrefixFrom(addr, id.prefix.Bits()).String()}
}

// checkLendable refuses what no ipconfig of Azure can be, in words that say why.
func (id poolID) checkLendable(addr netip.Addr) error {
	if !id.prefix.Contains(addr) {
		return fmt.Errorf("it lies outside the network's subnet %s", id.prefix)
	}
	if addr == id.gateway() {
		return errors.New("it is the subnet's gateway, which is Azure's")
	}
	return nil
}

// ReleaseAddress releases an address of the pool; one that is not held is
// success, and so is the gateway. An address whose link still stands is kept:
// it is released when the link is gone.
func (d *Driver) ReleaseAddress(ctx context.Context, r *ipam.ReleaseAddressRequest) error {
	id, err := parsePoolID(r.PoolID)
	if err != nil {
		return err
	}
	text, _, _ := strings.Cut(r.Address, "/")
	addr, err := netip.ParseAddr(text)
	if err != nil {
		return fmt.Errorf("%.80q is not an address", r.Address)
	}
	if addr == id.gateway() {
		return nil
	}
	return d.releaseAddress(ctx, id, addr)
}

func (d *Driver) releaseAddress(ctx context.Context, id poolID, addr netip.Addr) error {
	lease, held, err := d.cfg.Pool.FindLease(ctx, addr)
	if err != nil || !held || lease.Owner != id.owner() {
		return err
	}
	link, err := d.cfg.FindLink(ctx, addr)
	if err != nil {
		return fmt.Errorf("%s: is a container still attached: %w", addr, err)
	}
	if link != "" {
		return fmt.Errorf("%s is still attached to %s: it is released when that link is gone", addr, link)
	}
	_, err = d.cfg.Pool.Return(ctx, lease) // and not what the network's next container got meanwhile
	return err
}
