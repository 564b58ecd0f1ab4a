// Copyright (c) The azure-vnet authors. MIT licence.

package lender

import (
	"context"
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"

	"azurevnet/internal/cni"
	"azurevnet/pool"
)

// CheckCanLend answers STATUS: it is an error if no container could be given an address, however many others end first.
// A full NIC is no error, since a node with many pods is not broken. nic is the MAC of the NIC that an ADD would take.
// It is "" if that NIC is not known.
func (l *Lender) CheckCanLend(ctx context.Context) (nic string, err error) {
	if nic, err = l.checkCanLend(ctx); err != nil {
		err = cni.Errorf(types.ErrPluginNotAvailable, "%v", err)
	}
	return nic, err
}

// checkCanLend chooses the NIC and the subnet as Lend does. If no ipconfig is known there, it asks the source and
// waits for the answer. A runtime sends no ADD to a node that is not ready, so no other call would ask.
func (l *Lender) checkCanLend(ctx context.Context) (mac string, err error) {
	if mac, err = l.master(ctx); err != nil {
		return "", err
	}
	nic, sub, err := l.Pool.Subnet(ctx, mac, l.call.Conf.IPAM.Subnet)
	if err == nil && len(sub.Secondary) == 0 {
		if _, err = l.Pool.NICs(ctx); err == nil {
			nic, sub, err = l.Pool.Subnet(ctx, mac, l.call.Conf.IPAM.Subnet)
		}
	}
	if err != nil {
		return mac, err
	}
	st, err := l.Pool.Status(ctx)
	if err != nil {
		return nic.MAC, err
	}
	if c := censusOf(st, nic, sub); c.Free+c.Held+c.Cooling+c.Routed > 0 || c.OnHost > 0 && l.call.Conf.Reclaim {
		return nic.MAC, nil
	}
	err = fmt.Errorf("no address of NIC %s in subnet %s can be lent", nic.MAC, sub.Prefix)
	if len(sub.Secondary) == 0 {
		err = fmt.Errorf("%w: it has no secondary ipconfig: add some with az network nic ip-config create", err)
	}
	for _, w := range st.Warnings {
		err = errors.Join(err, errors.New(w))
	}
	return nic.MAC, err
}

// censusOf finds the census of one subnet of a NIC. It is zero if the status does not list the subnet.
func censusOf(st pool.Status, nic pool.NIC, sub pool.Subnet) pool.Census {
	for _, n := range st.NICs {
		for _, s := range n.Subnets {
			if n.MAC == nic.MAC && s.Prefix == sub.Prefix {
				return s.Census
			}
		}
	}
	return pool.Census{}
}
