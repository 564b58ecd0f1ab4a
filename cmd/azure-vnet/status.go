// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"context"
	"errors"
	"slices"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"

	"azurevnet/bridge"
	"azurevnet/internal/cni"
	"azurevnet/internal/lender"
	"azurevnet/pool"
)

// status serves STATUS: it is an error if no ADD could succeed. Several reasons may hold at once, and the answer names
// one. A missing right to change the network comes first. A NIC in another bridge comes next, and then a bridge of others
// that has the name of the NIC's bridge: no other remedy helps before these are gone.
func status(ctx context.Context, c *cni.Call) error {
	l, err := lender.Open(c)
	if err != nil {
		return err
	}
	if err := l.Host.CheckPermitted(); err != nil {
		return err
	}
	nic, primary, err := checkCanAddress(ctx, c, l)
	var macs []string // if it stays empty, CheckReady looks at the NICs that were asked for since the boot
	if nic != "" {
		macs = []string{nic}
	}
	if taken := l.Host.CheckReady(ctx, macs...); taken != nil {
		return taken
	}
	if nic != "" {
		if bad := l.Host.CheckPresent(ctx, nic); bad != nil {
			return cni.Errorf(types.ErrPluginNotAvailable, "%v", bad)
		}
	}
	if nic != "" && c.Conf.Mode != cni.ModeTransparent {
		_, bad := l.Host.BridgeName(ctx, bridge.Spec{MAC: nic, Name: c.Conf.Bridge, Primary: primary})
		if errors.Is(bad, bridge.ErrNameTaken) {
			return bad
		}
	}
	if err != nil {
		return err
	}
	return checkChained(ctx, c)
}

// checkCanAddress is an error if no container can be given an address. nic is the MAC of the NIC that an ADD would take,
// "" if it is not known. primary reports whether it is the VM's primary NIC.
func checkCanAddress(ctx context.Context, c *cni.Call, l *lender.Lender) (nic string, primary bool, err error) {
	if lendsHere(c) {
		nic, err = l.CheckCanLend(ctx)
		nics, _ := l.Pool.KnownNICs(ctx) // if this fails, CheckCanLend has failed too, and says why
		primary = slices.ContainsFunc(nics, func(n pool.NIC) bool { return n.MAC == nic && n.Primary })
		return nic, primary, err
	}
	nic, primary, err = findMaster(ctx, c, l.Host)
	return nic, primary, errors.Join(err, delegateVerb(ctx, c, invoke.DelegateStatus))
}
