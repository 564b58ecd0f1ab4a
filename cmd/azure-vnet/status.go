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

// printStatus prints what is broken, as far as it can be told, how many ipconfigs there are, and who has
// which address, with the link that shows it. Something broken is an error; a container of
// another plugin is not.
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
	for addr, link := range unleased {
		rows[addr] = []string{"nobody: another plugin's container has it", "", link, "", ""}
	}
	for _, lease := range leases {
		rows[lease.Addr] = []string{lease.Owner, lease.Pod, "", "", ""}
	}
	for _, at := range attached {
		var ports []string
		for _, p := range at.Ports {
			ports = append(ports, p.String())
		}
		owner, pod := at.Owner, at.Pod
		if row, lent := rows[at.Addr.Addr()]; lent {
			owner, pod = row[0], cmp.Or(row[1], pod)
		}
		rows[at.Addr.Addr()] = []string{owner, pod, at.Link, cmp.Or(at.Bridge, string(bridge.ModeTransparent)), strings.Join(ports, ", ")}
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
