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

// ensureTime bounds the restoring of one network, so that one whose NIC is gone
// does not keep the others waiting.
const ensureTime = 15 * time.Second

// Restore makes the bridges of all networks stand and their auxiliary addresses
// held, as after a reboot. It goes on past a network that fails: the error joins
// those of each, and a call for such a network tries again by itself.
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

// restoreOrder is that in which networks are restored: those that name their NIC's bridge
// before those that take it as it is.
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

// nameHolder adds to hold's error who has the address.
func (d *Driver) nameHolder(ctx context.Context, id string, aux Aux, err error) error {
	var held *auxHeldError
	if !errors.As(err, &held) {
		return err
	}
	return fmt.Errorf("%s, %s: %w: it %s", aux.describe(d.networkName(ctx, id)), aux.Addr, pool.ErrInUse, d.WhoHas(ctx, held.lease))
}

// auxHeldError says that somebody else has an auxiliary address. It names nobody, for that costs a question to the
// engine, and Reserve goes on without the address.
type auxHeldError struct{ lease pool.Lease }

func (e *auxHeldError) Error() string { return pool.ErrInUse.Error() }
func (e *auxHeldError) Unwrap() error { return pool.ErrInUse }

// holdAux leases an auxiliary address anew if it is not held. The network may be removed
// meanwhile, after which nobody would release it: so it is looked for again. known says
// that no source is asked.
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
		_, err = d.cfg.Pool.Return(ctx, lease)
	}
	return err
}

// HoldAllAux leases every auxiliary address that is not leased and can be. The IpamDriver calls
// HoldAllAux before it lends any address. If the source was silent when Restore ran, an auxiliary
// address may have no lease, and would be lent to a container. HoldAllAux skips an auxiliary
// address that cannot be leased: nobody else can lease it either.
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
			known := err == nil // else the source is asked, as the lease would
			err = d.holdAux(ctx, id, n, aux, known)
			if err != nil && !errors.Is(err, pool.ErrNotOurs) && !errors.Is(err, pool.ErrInUse) {
				return fmt.Errorf("hold %s, %s, first: %w", aux.describe(d.networkName(ctx, id)), aux.Addr, err)
			}
		}
	}
	return nil
}

// releaseAux releases the auxiliary addresses of a network that is no more.
func (d *Driver) releaseAux(ctx context.Context, n Network) error {
	var errs []error
	for _, aux := range n.Aux {
		if aux.Owner == "" {
			continue
		}
		if _, err := d.cfg.Pool.Release(ctx, aux.Owner, aux.Addr); err != nil {
			errs = append(errs, err) // CollectAux releases it later
		}
	}
	return errors.Join(errs...)
}

// strayAge is how old an auxiliary lease must be before a network that does not
// list it says that it leaked: longer than any CreateNetwork.
const strayAge = 5 * time.Minute

// CollectAux releases auxiliary addresses that no network has, and returns them:
// what is left of a network whose removal was lost, or whose creation was.
func (d *Driver) CollectAux(ctx context.Context) ([]pool.Lease, error) {
	status, err := d.cfg.Pool.Status(ctx)
	if err != nil {
		return nil, err
	}
	file, err := d.readNetworks() // after the leases: a network lists what it has before it is old enough
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
			return released, err
		}
		if ended {
			released = append(released, lease)
		}
	}
	return released, nil
}

// keepAux makes the leases of the auxiliary addresses ones that no link needs to
// prove. RequestAddress could not know: to it they look like a container's --ip.
// What it did not lease is not this VM's to lend, and is written down.
func (d *Driver) keepAux(ctx context.Context, n Network, nic pool.NIC, asked map[string]any) ([]Aux, error) {
	var all []Aux
	for name, value := range asked {
		text, _ := value.(string)
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
