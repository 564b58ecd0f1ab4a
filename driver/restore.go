// Copyright (c) The azure-vnet authors. MIT licence.

package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"azurevnet/pool"
)

// ensureTime bounds the restoring of one network, so that a network whose NIC is gone does not keep the others waiting.
const ensureTime = 15 * time.Second

// Restore ensures the bridges of all networks, and leases their auxiliary addresses, as it is needed after a reboot. If a
// network fails, Restore goes on with the others, and its error joins those of all. The calls for a network that failed
// ensure its bridge again.
func (d *Driver) Restore(ctx context.Context) error {
	file, err := d.readNetworks()
	if err != nil {
		return err
	}
	var errs []error
	for _, id := range file.restoreOrder() {
		if err := d.restoreNetwork(ctx, id, file.Networks[id]); err != nil {
			errs = append(errs, fmt.Errorf("restore network %.12s: %w", id, err))
		}
	}
	return errors.Join(errs...)
}

// restoreOrder lists the networks' ids in Restore's order: first the networks that name a bridge, then those that use
// the bridge of another network.
func (f Networks) restoreOrder() []string {
	var named, unnamed []string
	for _, id := range slices.Sorted(maps.Keys(f.Networks)) {
		if f.Networks[id].Bridge != "" {
			named = append(named, id)
		} else {
			unnamed = append(unnamed, id)
		}
	}
	return append(named, unnamed...)
}

// restoreNetwork restores one network. It goes on after an error.
func (d *Driver) restoreNetwork(ctx context.Context, id string, n Network) error {
	ctx, cancel := context.WithTimeout(ctx, ensureTime)
	defer cancel()
	err := d.cfg.Host.LearnPolicy(ctx, n.bridgePolicy())
	_, bad := d.cfg.Host.Ensure(ctx, n.bridgeSpec())
	err = errors.Join(err, bad)
	for _, aux := range n.Aux {
		err = errors.Join(err, d.nameHolder(ctx, id, aux, d.holdAux(ctx, id, n, aux, false)))
	}
	return err
}

// nameHolder adds to an error of holdAux who has the auxiliary address.
func (d *Driver) nameHolder(ctx context.Context, id string, aux Aux, err error) error {
	var held *auxHeldError
	if !errors.As(err, &held) {
		return err
	}
	return fmt.Errorf("%s, %s: %w: it %s", aux.describe(d.networkName(ctx, id)), aux.Addr, pool.ErrInUse, d.WhoHas(ctx, held.lease))
}

// auxHeldError is the error of holdAux if somebody else has the auxiliary address. It does not name the holder: that costs
// a question to the engine, and HoldAllAux does not need the name.
type auxHeldError struct{ lease pool.Lease }

func (e *auxHeldError) Error() string { return pool.ErrInUse.Error() }
func (e *auxHeldError) Unwrap() error { return pool.ErrInUse }

// holdAux leases an auxiliary address if it is not leased, and marks its lease as linkless. known says that no source is
// asked. The network may be removed while holdAux runs, and then nobody would release the lease. So holdAux looks for the
// network once more, after it leased the address.
func (d *Driver) holdAux(ctx context.Context, id string, n Network, aux Aux, known bool) error {
	if aux.Owner == "" {
		return nil
	}
	lease, held, err := d.cfg.Pool.FindLease(ctx, aux.Addr)
	switch {
	case err != nil:
		return err
	case held && lease.Owner != aux.Owner:
		return &auxHeldError{lease}
	case held && lease.Linkless:
		return nil
	case held:
		return d.cfg.Pool.MakeLinkless(ctx, lease)
	}
	lease, err = d.cfg.Pool.Lease(ctx, pool.Request{Owner: aux.Owner, MAC: n.MAC, Prefix: n.Prefix, Addr: aux.Addr, Linkless: true, Known: known})
	if err != nil {
		return err
	}
	file, err := d.readNetworks()
	if err == nil && !slices.ContainsFunc(file.Networks[id].Aux, aux.same) {
		if _, err = d.cfg.Pool.Return(ctx, lease); err != nil {
			err = fmt.Errorf("return %s: %w", lease.Addr, err)
		}
	}
	return err
}

// HoldAllAux leases every auxiliary address that is not leased and can be. The IpamDriver calls it before it lends an
// address. Without that, an auxiliary address could be lent to a container, if the source was silent when Restore ran. An
// auxiliary address that cannot be leased is skipped: nobody else can lease it either.
func (d *Driver) HoldAllAux(ctx context.Context) error {
	file, err := d.readNetworks()
	if err != nil {
		return err
	}
	leases, err := d.cfg.Pool.Leases(ctx)
	if err != nil {
		return err
	}
	kept := map[Aux]bool{}
	for _, lease := range leases {
		kept[Aux{Addr: lease.Addr, Owner: lease.Owner}] = lease.Linkless
	}
	for id, n := range file.Networks {
		for _, aux := range n.Aux {
			if aux.Owner == "" || kept[aux.unnamed()] {
				continue
			}
			_, err := d.cfg.Pool.KnownNICs(ctx)
			known := err == nil // without a known answer of a source, the lease has to ask the source
			err = d.holdAux(ctx, id, n, aux, known)
			if err != nil && !errors.Is(err, pool.ErrNotOurs) && !errors.Is(err, pool.ErrInUse) {
				return fmt.Errorf("hold %s, %s, first: %w", aux.describe(d.networkName(ctx, id)), aux.Addr, err)
			}
		}
	}
	return nil
}

// releaseAux releases the auxiliary addresses of a network that was removed.
func (d *Driver) releaseAux(ctx context.Context, n Network) error {
	var errs []error
	for _, aux := range n.Aux {
		if aux.Owner == "" {
			continue
		}
		if _, err := d.cfg.Pool.Release(ctx, aux.Owner, aux.Addr); err != nil {
			errs = append(errs, fmt.Errorf("release %s: %w", aux.Addr, err)) // CollectAux releases it later
		}
	}
	return errors.Join(errs...)
}

// strayAge is how old the lease of an auxiliary address must be before it counts as leaked because no network lists it. No
// CreateNetwork takes that long between the lease and networks.json.
const strayAge = 5 * time.Minute

// CollectAux releases the auxiliary addresses that no network has, and returns their leases. A network leaves such
// addresses if the call that created or removed it was lost halfway.
func (d *Driver) CollectAux(ctx context.Context) ([]pool.Lease, error) {
	status, err := d.cfg.Pool.Status(ctx)
	if err != nil {
		return nil, err
	}
	file, err := d.readNetworks() // read after the leases, so that it lists every address whose lease is old enough
	if err != nil {
		return nil, err
	}
	listed := map[Aux]bool{}
	for _, n := range file.Networks {
		for _, aux := range n.Aux {
			listed[aux.unnamed()] = true
		}
	}
	var released []pool.Lease
	for addr, lease := range status.Leases {
		if !lease.Linkless || !strings.HasPrefix(lease.Owner, OwnerPrefix) || listed[Aux{Addr: addr, Owner: lease.Owner}] || status.Now-lease.Since < strayAge {
			continue
		}
		ended, err := d.cfg.Pool.Return(ctx, lease)
		if err != nil {
			return released, fmt.Errorf("return %s: %w", lease.Addr, err)
		}
		if ended {
			released = append(released, lease)
		}
	}
	return released, nil
}

// keepAux makes the leases of a new network's auxiliary addresses linkless. RequestAddress leased them like a container's
// --ip, since it cannot tell one from the other. An address that RequestAddress did not lease is not this VM's to lend: it
// is listed with the network, without an owner.
func (d *Driver) keepAux(ctx context.Context, n Network, nic pool.NIC, asked map[string]any) ([]Aux, error) {
	var all []Aux
	for name, value := range asked {
		text, _ := value.(string) // another kind of value is refused as an address
		prefix, err := netip.ParsePrefix(text)
		if err != nil {
			return nil, fmt.Errorf("--aux-address %.40s: %.80q is not an address", name, text)
		}
		lease, held, err := d.cfg.Pool.FindLease(ctx, prefix.Addr())
		if err != nil {
			return nil, fmt.Errorf("--aux-address %.40s: %w", name, err)
		}
		ours := slices.ContainsFunc(nic.Subnets, func(s pool.Subnet) bool { return slices.Contains(s.Secondary, prefix.Addr()) })
		if !held && !ours {
			all = append(all, Aux{Addr: prefix.Addr(), Name: name})
			continue
		}
		if !held {
			return nil, fmt.Errorf("--aux-address %.40s: %s is not held for this network", name, prefix.Addr())
		}
		if !strings.HasPrefix(lease.Owner, OwnerPrefix) || lease.MAC != n.MAC || lease.Prefix != n.Prefix {
			return nil, fmt.Errorf("--aux-address %.40s: %s %s", name, prefix.Addr(), d.WhoHas(ctx, lease))
		}
		if err := d.cfg.Pool.MakeLinkless(ctx, lease); err != nil {
			return nil, fmt.Errorf("--aux-address %.40s: %w", name, err)
		}
		all = append(all, Aux{Addr: prefix.Addr(), Owner: lease.Owner, Name: name})
	}
	slices.SortFunc(all, func(a, b Aux) int { return a.Addr.Compare(b.Addr) })
	return all, nil
}
