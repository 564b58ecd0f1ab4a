// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"

	"azurevnet/bridge"
	"azurevnet/internal/cni"
	"azurevnet/internal/lender"
	"azurevnet/pool"
)

// grant is the address that an IPAM plugin gave for a container.
type grant struct {
	nic     string       // MAC of the NIC that has the address
	primary bool         // that NIC is the VM's primary NIC
	nics    []string     // MACs of all NICs of the VM, as far as they are known
	addr    netip.Prefix // the address with its subnet's mask
	gateway netip.Addr
	routes  []*types.Route // the default route first
	dns     types.DNS

	confirm func(context.Context) error // is an error if the container does not hold the address any more
	release func(context.Context) error // gives the address back
}

// lendsHere reports whether the address is lent in this process, and not by a program of another IPAM plugin.
func lendsHere(c *cni.Call) bool { return c.Conf.IPAM.Type == cni.IPAMType }

// getAddress gets an address for the container: here, or from the IPAM plugin that the configuration names.
func getAddress(ctx context.Context, c *cni.Call, l *lender.Lender) (*grant, error) {
	if lendsHere(c) {
		return lendAddress(ctx, c, l)
	}
	return delegateAddress(ctx, c, l)
}

// lendAddress leases an address of the pool.
func lendAddress(ctx context.Context, c *cni.Call, l *lender.Lender) (*grant, error) {
	lease, err := l.Lend(ctx, false)
	if err != nil {
		return nil, err
	}
	r := lender.Result(lease)
	g := &grant{
		nic: lease.MAC, addr: netip.PrefixFrom(lease.Addr, lease.Prefix.Bits()), gateway: lease.Prefix.Addr().Next(), routes: r.Routes,
		confirm: func(ctx context.Context) error { return l.Confirm(ctx, lease) },
		release: func(ctx context.Context) error { return l.Return(ctx, lease) }, // this very lease: the owner may have got another one since
	}
	nics, err := l.Pool.KnownNICs(ctx)
	if err != nil {
		undo, cancel := cni.Undo(ctx)
		defer cancel()
		return nil, errors.Join(err, g.release(undo))
	}
	g.noteNICs(nics)
	return g, nil
}

// noteNICs takes the VM's NICs down, and whether the address's NIC is the primary one.
func (g *grant) noteNICs(nics []pool.NIC) {
	for _, nic := range nics {
		g.primary = g.primary || nic.Primary && nic.MAC == g.nic
		g.nics = append(g.nics, nic.MAC)
	}
}

// delegateAddress has another IPAM plugin give an address. That plugin is given the configuration as it came, with all
// that the runtime added.
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
	if nics, err := l.Pool.KnownNICs(ctx); err == nil { // where another IPAM gives all addresses, maybe no call ever asked for the NICs
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

// findMaster returns the MAC of a network's NIC, if the addresses come from another IPAM. The NIC is the one in the
// configuration, or else the one of the default route.
func findMaster(ctx context.Context, c *cni.Call, host *bridge.Host) (mac string, primary bool, err error) {
	_, mac, err = host.NIC(ctx, "")
	if c.Conf.Master == "" {
		return mac, true, err
	}
	_, named, err := host.NIC(ctx, c.Conf.Master)
	if err != nil {
		return "", false, cni.Errorf(types.ErrInvalidNetworkConfig, "master: %v", err)
	}
	return named, named == mac, nil
}

// readResult takes the address and the routes from the result of another IPAM plugin. An interface has one address.
func (g *grant) readResult(raw types.Result) error {
	r, err := cni.ConvertResult(raw)
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
	g.gateway = g.addr.Masked().Addr().Next() // Azure's gateway is the first address of a subnet
	if gw, ok := netip.AddrFromSlice(r.IPs[0].Gateway); ok {
		g.gateway = gw.Unmap()
	}
	g.dns = r.DNS
	g.routes = []*types.Route{{Dst: lender.IPNet(netip.PrefixFrom(netip.IPv4Unspecified(), 0)), GW: g.gateway.AsSlice()}}
	for _, route := range r.Routes {
		if ones, _ := route.Dst.Mask.Size(); ones > 0 {
			g.routes = append(g.routes, route)
		}
	}
	return nil
}

// delegateVerb calls another IPAM plugin with a verb that has no result: DEL, CHECK, GC or STATUS.
func delegateVerb(ctx context.Context, c *cni.Call, call func(context.Context, string, []byte, invoke.Exec) error) error {
	if err := checkInstalled(c); err != nil {
		return err
	}
	if err := call(ctx, c.Conf.IPAM.Type, c.Stdin, nil); err != nil {
		return fmt.Errorf("IPAM plugin %s: %w", c.Conf.IPAM.Type, err)
	}
	return nil
}

// checkInstalled is an error if the program of the IPAM plugin is missing.
func checkInstalled(c *cni.Call) error {
	if _, err := invoke.FindInPath(c.Conf.IPAM.Type, filepath.SplitList(os.Getenv("CNI_PATH"))); err != nil {
		return cni.Errorf(types.ErrInvalidNetworkConfig, "IPAM plugin %s: %v: install it there, or name another as ipam.type", c.Conf.IPAM.Type, err)
	}
	return nil
}
