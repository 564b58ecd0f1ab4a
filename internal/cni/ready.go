// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"context"
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"

	"azurevnet/pool"
)

// Ready is the answer to STATUS: an error if no container can be given an
// address, and none will be by waiting for others to end. A full NIC is no
// error: a node with many pods is not broken.
func (l *Lender) Ready(ctx context.Context) error {
	if err := l.ready(ctx); err != nil {
		return wrong(types.ErrPluginNotAvailable, "%v", err)
	}
	return nil
}

// ready chooses NIC and subnet as Lend does. The source is waited for where
// what is known has them not: no ADD comes to a node that is not ready, so
// nobody else would.
func (l *Lender) ready(ctx context.Context) error {
	mac, err := l.master(ctx)
	if err != nil {
		return err
	}
	nic, sub, err := l.Subnet(ctx, mac, l.call.Conf.IPAM.Subnet)
	if err == nil && len(sub.Secondary) == 0 {
		if _, err = l.NICs(ctx); err == nil {
			nic, sub, err = l.Subnet(ctx, mac, l.call.Conf.IPAM.Subnet)
		}
	}
	if err != nil {
		return err
	}
	st, err := l.Status(ctx)
	if err != nil {
		return err
	}
	if c := census(st, nic, sub); c.Free+c.Held+c.Cooling > 0 || c.OnHost > 0 && l.call.Conf.Reclaim {
		return nil
	}
	err = fmt.Errorf("no address of NIC %s in subnet %s can be lent", nic.MAC, sub.Prefix)
	if len(sub.Secondary) == 0 {
		err = fmt.Errorf("%w: it has no secondary ipconfig: add some with az network nic ip-config create", err)
	}
	for _, w := range st.Warnings {
		err = errors.Join(err, errors.New(w))
	}
	return err
}

// census is that of one subnet of a NIC.
func census(st pool.Status, nic pool.NIC, sub pool.Subnet) pool.Census {
	for _, n := range st.NICs {
		for _, s := range n.Subnets {
			if n.MAC == nic.MAC && s.Prefix == sub.Prefix {
				return s.Census
			}
		}
	}
	return pool.Census{}
}
