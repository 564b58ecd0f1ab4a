// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"

	"azurevnet/bridge"
	"azurevnet/internal/cni"
	"azurevnet/pool"
)

// printStatus prints the faults, the counts of ipconfigs, and the leases. For each lease it prints the holder, the
// address and the link. If one part cannot be read, the others are printed, and the error says which. It is an error
// if something is broken. An address of another plugin's container is none.
func printStatus(ctx context.Context, out io.Writer) error {
	host := bridge.New(bridge.Config{})
	broken, err := host.Broken(ctx)
	for _, what := range broken {
		fmt.Fprintln(out, "broken:", what)
	}
	p, bad := pool.New(pool.Config{Dir: cni.StateDir})
	if bad != nil {
		return errors.Join(err, bad)
	}
	leases, bad := p.Leases(ctx)
	err = errors.Join(err, bad)
	attached, bad := host.Attachments(ctx)
	err = errors.Join(err, bad)
	unleased, bad := p.Unleased(ctx)
	err = errors.Join(err, bad)
	counts, bad := p.CountIPConfigs(ctx)
	err = errors.Join(err, bad)
	rows := map[netip.Addr][]string{} // owner, pod, link, bridge, published ports
	for addr, name := range unleased {
		rows[addr] = []string{"nobody: another plugin's container has it", "", name, "", ""}
	}
	for _, lease := range leases {
		rows[lease.Addr] = []string{lease.Owner, lease.Pod, "", "", ""}
	}
	for _, link := range attached {
		var ports []string
		for _, p := range link.Ports {
			ports = append(ports, p.String())
		}
		owner, pod := link.Owner, link.Pod
		if row, lent := rows[link.Addr.Addr()]; lent {
			owner, pod = row[0], cmp.Or(row[1], pod)
		}
		rows[link.Addr.Addr()] = []string{owner, pod, link.Link, cmp.Or(link.Bridge, string(bridge.ModeTransparent)), strings.Join(ports, ", ")}
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	if len(counts) > 0 {
		fmt.Fprintln(w, "NIC\tSUBNET\tIPCONFIGS")
	}
	for _, nic := range counts {
		for _, s := range nic.Subnets {
			fmt.Fprintf(w, "%s\t%s\t%s\n", nic.MAC, s.Prefix, s.Census)
		}
	}
	fmt.Fprintln(w, "\nADDRESS\tLENT TO\tPOD\tLINK\tBRIDGE\tPUBLISHED")
	for _, addr := range slices.SortedFunc(maps.Keys(rows), netip.Addr.Compare) {
		fmt.Fprintf(w, "%s\t%s\n", addr, strings.Join(rows[addr], "\t"))
	}
	if len(broken) > 0 {
		err = cmp.Or(err, errors.New("not all is as it should be: azure-vnet reconcile mends what can be mended"))
	}
	return errors.Join(w.Flush(), err)
}
