// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/types"

	"azurevnet/pool"
)

// tryState writes a file in the directory that every ADD writes in, and removes it.
func tryState(plugin string) error {
	path := filepath.Join(callsDir, plugin+"-status")
	err := os.MkdirAll(callsDir, 0o755)
	if err == nil {
		err = os.WriteFile(path, []byte("STATUS"), 0o600)
		_ = os.Remove(path)
	}
	if err != nil {
		return wrong(types.ErrPluginNotAvailable, "%v", unwritable(err))
	}
	return nil
}

// unwritable adds to err, the error of a write in the state directory, what to do.
func unwritable(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("the state in %s cannot be written: %w: that is for root of the host, which no plain user is, nor root of a user namespace, as in a rootless container engine: run the container runtime as root of the host", stateDir, err)
	}
	return fmt.Errorf("the state in %s cannot be written: %w: give it a file system that can be written to and has room", stateDir, err)
}

// Ready is an error for STATUS if no container can be given an address, and none can
// be when others have ended. A full NIC is no error: a node with many pods, be they
// another plugin's, is not broken. nic is the MAC of the NIC that an ADD would take, empty if it is not known.
func (l *Lender) Ready(ctx context.Context) (nic string, err error) {
	if nic, err = l.ready(ctx); err != nil {
		err = wrong(types.ErrPluginNotAvailable, "%v", err)
	}
	return nic, err
}

// ready chooses NIC and subnet as Lend does. It waits for the source where what is
// known does not have them: no ADD comes to a node that is not ready, so nobody else
// would ask the source.
func (l *Lender) ready(ctx context.Context) (mac string, err error) {
	if mac, err = l.master(ctx); err != nil {
		return "", err
	}
	nic, sub, err := l.Subnet(ctx, mac, l.call.Conf.IPAM.Subnet)
	if err == nil && len(sub.Secondary) == 0 {
		if _, err = l.NICs(ctx); err == nil {
			nic, sub, err = l.Subnet(ctx, mac, l.call.Conf.IPAM.Subnet)
		}
	}
	if err != nil {
		return mac, err
	}
	st, err := l.Status(ctx)
	if err != nil {
		return nic.MAC, err
	}
	if c := census(st, nic, sub); c.Free+c.Held+c.Cooling+c.Led > 0 || c.OnHost > 0 && l.call.Conf.Reclaim {
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
