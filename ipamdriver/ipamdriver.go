// Copyright (c) The azure-vnet authors. MIT licence.

// Package ipamdriver is libnetwork's IpamDriver: it translates Docker's pools and addresses for package pool. It makes
// no link. No call fails for want of what an earlier call said, because a PoolID says all. Two maps keep what engines asked
// lately. They only make errors better, and a restart empties them.
//
// Errors do not name the call, because the engine puts its name before them.
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

// AddressSpace is the name of both the local and the global address space. Engines from 27 compare a pool with the
// routes of the host, unless the two names are the same. A subnet of a VNet would fail this comparison.
const AddressSpace = "azure-vnet"

// Keys of the engine's protocol.
const (
	gatewayData    = "com.docker.network.gateway"
	addressType    = "RequestAddressType"
	addressGateway = "com.docker.network.gateway"
)

// Config says what the driver works on. The fields from HoldAux on may be nil.
type Config struct {
	Pool     *pool.Pool
	FindNIC  func(ctx context.Context, nameOrMAC string) (mac string, err error) // returns the MAC of a NIC of the host
	FindLink func(ctx context.Context, addr netip.Addr) (link string, err error) // returns the host end that has the address, "" if none has

	HoldAux func(ctx context.Context) error                    // leases all auxiliary addresses, before any other address is lent
	WhoHas  func(ctx context.Context, lease pool.Lease) string // says in Docker's words who has a leased address: "is held by …" or "is …"; nil: the owner is named
	Warn    func(text string)                                  // is called with what is no failure, but worth a line in the log
}

// Driver answers the IpamDriver calls. Its methods are safe for parallel use.
type Driver struct {
	cfg Config

	mu     sync.Mutex              // guards the maps
	chosen map[netip.Prefix]choice // by subnet: the pool that was chosen for an engine and that no network uses yet
	lately map[poolID]time.Time    // when each pool was requested; for CheckNIC
}

// choice is a pool that the driver chose, because the engine asked for any pool.
type choice struct {
	id     string
	madeAt time.Time
}

// choiceAge is how long an unused choice counts as the last one of the same engine: see noteChoice. An engine that asks
// again does so within a millisecond.
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

// GetCapabilities says that the driver needs neither MAC addresses nor a replay of requests after a restart.
func (d *Driver) GetCapabilities(context.Context) (*ipam.CapabilitiesResponse, error) {
	return &ipam.CapabilitiesResponse{}, nil
}

// GetDefaultAddressSpaces returns AddressSpace for both scopes.
func (d *Driver) GetDefaultAddressSpaces(context.Context) (*ipam.AddressSpacesResponse, error) {
	return &ipam.AddressSpacesResponse{LocalDefaultAddressSpace: AddressSpace, GlobalDefaultAddressSpace: AddressSpace}, nil
}

// RequestPool checks that the pool is exactly a subnet of a NIC of this VM. If the engine asks for any pool, it chooses
// the first subnet of the NIC. It takes nothing, so a pool that is never released leaks nothing.
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
		if want, err = parseExactPrefix(r.Pool); err != nil {
			return nil, fmt.Errorf("--subnet %w", err)
		}
	}
	if r.SubPool != "" {
		if r.Pool == "" {
			return nil, errors.New("--ip-range needs --subnet")
		}
		if within, err = parseExactPrefix(r.SubPool); err != nil {
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

// findMaster returns the MAC of the NIC that --ipam-opt master= names. It is "" without this option.
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

// noteChoice notes the pool that the driver chose for an engine that asked for any pool. An engine before 27 asks again
// as long as the pool overlaps a route of the host. A subnet of a VNet always does, and only an error ends this loop.
// So a second request within choiceAge is an error.
func (d *Driver) noteChoice(id poolID) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if last, ok := d.chosen[id.prefix]; ok && time.Since(last.madeAt) < choiceAge {
		return fmt.Errorf("this engine does not let a driver choose the subnet: pass --subnet %s", id.prefix)
	}
	d.chosen[id.prefix] = choice{id: id.String(), madeAt: time.Now()}
	return nil
}

// NetworkMade tells the driver that a network was made of the subnet, on the NIC with the MAC. The pool that was chosen
// for it is in use now, and the oldest of the pools that were requested lately is the network's.
func (d *Driver) NetworkMade(prefix netip.Prefix, mac string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.chosen, prefix)
	var its poolID
	for id, requested := range d.lately {
		if id.prefix == prefix && id.mac == mac && (its == poolID{} || requested.Before(d.lately[its])) {
			its = id
		}
	}
	delete(d.lately, its)
}

// requestAge is how long after RequestPool its network may be created. The calls in between take less.
const requestAge = time.Minute

// noteRequest notes when a pool was requested, for CheckNIC.
func (d *Driver) noteRequest(id poolID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	maps.DeleteFunc(d.lately, func(_ poolID, requested time.Time) bool { return time.Since(requested) > requestAge })
	d.lately[id] = time.Now()
}

// CheckNIC is an error if pools of the subnet were requested lately, and all of them on other NICs than the one with
// the MAC. Then --ipam-opt master= and -o master= name different NICs, and the engine tells neither driver what it told
// the other.
//
// After a restart of the plugin no request is known, and CheckNIC finds nothing wrong. The network's first container is
// refused instead.
func (d *Driver) CheckNIC(subnet netip.Prefix, mac string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	other := ""
	for id, requested := range d.lately {
		if id.prefix != subnet || time.Since(requested) > requestAge {
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

// dropChoice forgets that the pool was chosen: the engine uses it, or has released it.
func (d *Driver) dropChoice(id poolID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.chosen[id.prefix].id == id.String() {
		delete(d.chosen, id.prefix)
	}
}

// ReleasePool releases the addresses that the pool still holds and no link has: auxiliary addresses, and those that a
// lost call left.
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

// requestTime bounds RequestAddress. A container that starts keeps an engine from ending, and an engine that ends waits
// 15 s at most. The longest question to the sources takes 8 s of it.
const requestTime = 9 * time.Second

// RequestAddress leases an address of the pool. If the engine asks for one, it gets that one. Else an address that was
// never lent comes first, and then the one whose release is longest ago. The gateway is Azure's, and is answered
// without a lease.
//
// An engine asks for --ip and for --aux-address in the same words, and an auxiliary address may be anybody's. So an
// address of the subnet that is not this VM's is answered without a lease, too. The NetworkDriver gives no container an
// address that is not leased.
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
	// If HoldAux fails, any address might be an auxiliary one. An address that is asked for by name is lent all the same.
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

// err says that addr is in use. wordInUse adds the holder, in Docker's words.
func (d *Driver) wordInUse(ctx context.Context, addr netip.Addr, err error) error {
	lease, held, unread := d.cfg.Pool.FindLease(ctx, addr)
	if unread != nil || !held {
		return err // the lease has ended meanwhile, or another plugin's container has the address without a lease
	}
	return fmt.Errorf("%w: %s %s; ask for another", pool.ErrInUse, addr, d.cfg.WhoHas(ctx, lease))
}

// isNobodysToLend reports whether addr is no secondary ipconfig of the NIC. An ipconfig that the host itself holds is
// lendable: the host may give it up.
func (d *Driver) isNobodysToLend(ctx context.Context, id poolID, addr netip.Addr) bool {
	_, subnet, err := d.cfg.Pool.Subnet(ctx, id.mac, id.prefix)
	return err == nil && !slices.Contains(subnet.Secondary, addr)
}

// addressResponse returns the answer with an address of the pool.
func addressResponse(id poolID, addr netip.Addr) *ipam.RequestAddressResponse {
	return &ipam.RequestAddressResponse{Address: netip.PrefixFrom(addr, id.prefix.Bits()).String()}
}

// checkLendable refuses an address that no ipconfig of the subnet can have.
func (id poolID) checkLendable(addr netip.Addr) error {
	if !id.prefix.Contains(addr) {
		return fmt.Errorf("it lies outside the network's subnet %s", id.prefix)
	}
	if addr == id.gateway() {
		return errors.New("it is the subnet's gateway, which is Azure's")
	}
	return nil
}

// ReleaseAddress releases an address of the pool. It is a success if the pool does not hold the address, and for the
// gateway. It is an error if a link still has the address: the lease then stays until the link is gone.
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

// releaseAddress ends the pool's lease of addr, unless a link has the address.
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
	// This very lease: the address may be leased to the network's next container by now.
	if _, err = d.cfg.Pool.Return(ctx, lease); err != nil {
		return fmt.Errorf("return %s: %w", addr, err)
	}
	return nil
}
