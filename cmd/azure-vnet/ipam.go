// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"azurevnet/internal/cni"
	"azurevnet/internal/lender"
	"azurevnet/pool"
)

// grant is what IPAM gave for a container, and how it is given back.
type grant struct {
	nic     string   // its MAC
	primary bool     // the VM's primary NIC
	nics    []string // the MACs of all NICs of the VM, as far as known
	addr    netip.Prefix
	gateway netip.Addr
	routes  []*types.Route
	dns     types.DNS

	confirm func(context.Context) error // it is still held
	release func(context.Context) error
}

// lendsHere tells whether the address is lent in this process.
func lendsHere(c *cni.Call) bool { return c.Conf.IPAM.Type == cni.IPAMType }

func getAddress(ctx context.Context, c *cni.Call, l *lender.Lender) (*grant, error) {
	if lendsHere(c) {
		return lendAddress(ctx, c, l)
	}
	return delegateAddress(ctx, c, l)
}

// lendAddress lends an address in this process.
func lendAddress(ctx context.Context, c *cni.Call, l *lender.Lender) (*grant, error) {
	lease, err := l.Lend(ctx, false)
	if err != nil {
		return nil, err
	}
	r := lender.Result(lease)
	g := &grant{
		nic: lease.MAC, addr: netip.PrefixFrom(lease.Addr, lease.Prefix.Bits()), gateway: lease.Prefix.Addr().Next(), routes: r.Routes,
		confirm: func(ctx context.Context) error { return l.Confirm(ctx, lease) },
		release: func(ctx context.Context) error {
			_, err := l.Return(ctx, lease) // and no other that the owner may have got since
			return err
		},
	}
	nics, err := l.KnownNICs(ctx)
	if err != nil {
		undo, cancel := cni.Undo(ctx)
		defer cancel()
		return nil, errors.Join(err, g.release(undo))
	}
	g.noteNICs(nics)
	return g, nil
}

// noteNICs notes the VM's NICs.
func (g *grant) noteNICs(nics []pool.NIC) {
	for _, nic := range nics {
		g.primary = g.primary || nic.Primary && nic.MAC == g.nic
		g.nics = append(g.nics, nic.MAC)
	}
}

// delegateAddress has another IPAM plugin give an address. It reads our configuration
// as it came, with all that the runtime added.
func delegateAddress(ctx context.Context, c *cni.Call, l *lender.Lender) (*grant, error) {
	nic, primary, err := findMaster(ctx, c, l.Host)
	if err != nil {
		return nil, err
	}
	if err := checkInstalled(c); err != nil {
		return nil, err
	}
	raw, err := invoke.DelegateAdd(ctx, c.Conf.IPAM.Type, c.Stdin, nil)
	if err != nil {
		return nil, fmt.Errorf("IPAM plugin %s: %w", c.Conf.IPAM.Type, err)
	}
	g := &grant{
		nic: nic, primary: primary, confirm: func(context.Context) error { return nil },
		release: func(ctx context.Context) error { return delegateVerb(ctx, c, invoke.DelegateDel) },
	}
	if nics, err := l.KnownNICs(ctx); err == nil { // or nobody has asked: another gives the addresses
		g.noteNICs(nics)
	}
	if err := g.readResult(raw); err != nil {
		undo, cancel := cni.Undo(ctx)
		defer cancel()
		err = cni.Errorf(types.ErrInvalidNetworkConfig, "IPAM plugin %s: %v", c.Conf.IPAM.Type, err)
		return nil, errors.Join(err, g.release(undo))
	}
	c.Note("address", g.addr.Addr().String())
	return g, nil
}

// readResult takes the one address that an interface has, and the routes.
func (g *grant) readResult(raw types.Result) error {
	r, err := current.NewResultFromResult(raw)
	if err != nil {
		return err
	}
	if len(r.IPs) != 1 {
		return fmt.Errorf("it gave %d addresses, and an interface has exactly one: configure it to give one", len(r.IPs))
	}
	addr, ok := netip.AddrFromSlice(r.IPs[0].Address.IP)
	bits, size := r.IPs[0].Address.Mask.Size()
	if addr = addr.Unmap(); !ok || !addr.Is4() || size != 32 {
		return fmt.Errorf("it gave %s, and IPv6 is not served yet: configure it to give IPv4", r.IPs[0].Address.IP)
	}
	g.addr = netip.PrefixFrom(addr, bits)
	g.gateway = g.addr.Masked().Addr().Next() // Azure's
	if gw, ok := netip.AddrFromSlice(r.IPs[0].Gateway); ok {
		g.gateway = gw.Unmap()
	}
	g.dns = r.DNS
	g.routes = []*types.Route{{Dst: ipNet(netip.PrefixFrom(netip.IPv4Unspecified(), 0)), GW: g.gateway.AsSlice()}}
	for _, route := range r.Routes {
		if ones, _ := route.Dst.Mask.Size(); ones > 0 {
			g.routes = append(g.routes, route)
		}
	}
	return nil
}

// delegateVerb calls the IPAM plugin for a verb without a result.
func delegateVerb(ctx context.Context, c *cni.Call, call func(context.Context, string, []byte, invoke.Exec) error) error {
	if err := checkInstalled(c); err != nil {
		return err
	}
	if err := call(ctx, c.Conf.IPAM.Type, c.Stdin, nil); err != nil {
		return fmt.Errorf("IPAM plugin %s: %w", c.Conf.IPAM.Type, err)
	}
	return nil
}

// checkInstalled refuses a configuration whose IPAM plugin is not there.
func checkInstalled(c *cni.Call) error {
	if _, err := invoke.FindInPath(c.Conf.IPAM.Type, filepath.SplitList(os.Getenv("CNI_PATH"))); err != nil {
		return cni.Errorf(types.ErrInvalidNetworkConfig, "IPAM plugin %s: %v: install it there, or name another as ipam.type", c.Conf.IPAM.Type, err)
	}
	return nil
}

func ipNet(p netip.Prefix) net.IPNet {
	return net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}
}
