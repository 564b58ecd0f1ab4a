// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"azurevnet/bridge"
	"azurevnet/driver"
	"azurevnet/internal/upkeep"
	"azurevnet/pool"
)

// errBroken is added to the errors of status if the host has faults, so that the exit status is 1.
var errBroken = errors.New("not all is as it should be: a plugin that runs mends within 30 s what can be mended")

// report is what status prints. It is read from files and the kernel, so it needs no plugin that runs. A part that
// cannot be read is empty, and Errors says why.
type report struct {
	Version     string                    `json:"version"`
	Pool        pool.Status               `json:"pool"`
	Bridges     []bridge.Bridge           `json:"bridges"`
	Attachments []bridge.Attachment       `json:"attachments"`
	Networks    map[string]driver.Network `json:"networks"`             // by Docker's id
	Containers  map[netip.Addr]string     `json:"containers,omitempty"` // names of Docker's containers, by address; empty if the engine does not answer
	Broken      []string                  `json:"broken,omitempty"`     // the faults of the host
	Errors      []string                  `json:"errors,omitempty"`
}

// readReport reads all parts of the report.
func readReport(ctx context.Context, p places) report {
	r := report{Version: p.version}
	note := func(err error) {
		if err != nil {
			r.Errors = append(r.Errors, err.Error())
		}
	}
	host := bridge.New(bridge.Config{Run: p.run, Sysctl: p.sysctl})
	var err error
	r.Pool, err = readPool(ctx, p, host)
	note(err)
	r.Bridges, err = host.Bridges(ctx)
	note(err)
	r.Attachments, err = host.Attachments(ctx)
	note(err)
	r.Broken, err = host.Broken(ctx)
	note(err)
	r.Networks, err = readNetworks(p)
	note(err)
	r.Containers = dockerd{socket: filepath.Join(p.run, "docker.sock")}.namesByAddress(ctx, slices.Collect(maps.Keys(r.Networks)))
	if macs := r.usedNICs(); len(r.Broken) == 0 && len(macs) > 0 {
		if err := host.CheckReady(ctx, macs...); err != nil { // Broken looks at the NICs that were used since the boot, and a network may use another one
			r.Broken = []string{err.Error()}
		}
	}
	return r
}

// readNetworks reads the networks, from networks.json wherever it is.
func readNetworks(p places) (map[string]driver.Network, error) {
	dir, err := findData(p)
	if err != nil {
		return nil, err
	}
	file, err := driver.ReadNetworks(dir)
	return file.Networks, err
}

// usedNICs returns the MACs of the networks' NICs. If there is no network, it returns the primary NIC, which a network
// would use.
func (r report) usedNICs() (macs []string) {
	for _, n := range r.Networks {
		macs = append(macs, n.MAC)
	}
	for _, nic := range r.Pool.NICs {
		if len(r.Networks) == 0 && nic.Primary {
			macs = append(macs, nic.MAC)
		}
	}
	slices.Sort(macs)
	return slices.Compact(macs)
}

// readPool reads the status of the pool, with the settings of the plugin that started last. A setting that is wrong has
// its default, and the error says so.
func readPool(ctx context.Context, p places, host *bridge.Host) (pool.Status, error) {
	s, wrong := readLastSettings(p.run)
	addresses, err := openPool(p, s, host)
	if err != nil {
		return pool.Status{}, err
	}
	status, err := addresses.Status(ctx)
	return status, errors.Join(wrong, err)
}

// printStatus prints the report. Its error has the parts that could not be read, and errBroken if the host has faults.
func printStatus(ctx context.Context, p places, asJSON bool, out io.Writer) error {
	r := readReport(ctx, p)
	if asJSON {
		encoder := json.NewEncoder(out)
		encoder.SetIndent("", "  ")
		if err := encoder.Encode(r); err != nil {
			return err
		}
	} else if err := r.printTables(out); err != nil {
		return err
	}
	if len(r.Broken) > 0 {
		r.Errors = append(r.Errors, errBroken.Error())
	}
	if len(r.Errors) > 0 {
		return errors.New(strings.Join(r.Errors, "; "))
	}
	return nil
}

// uninstall removes every trace of azure-vnet: see upkeep.Uninstall. If networks.json is not found, it removes
// everything else, and the error says so.
func uninstall(ctx context.Context, p places, out io.Writer) error {
	host := bridge.New(bridge.Config{Run: p.run, Sysctl: p.sysctl})
	addresses, err := openPool(p, settings{}, host)
	if err != nil {
		return fmt.Errorf("uninstall: %w", err)
	}
	data, missing := findData(p)
	removed, err := upkeep.Uninstall(ctx, host, addresses, upkeep.Removal{
		Run:   p.run,
		Keeps: func(lease pool.Lease) bool { return !strings.HasPrefix(lease.Owner, driver.OwnerPrefix) }, // Docker's leases end with its networks, whose file is removed too
		Files: func() error {
			if missing != nil {
				return nil
			}
			return errors.Join(os.RemoveAll(driver.NetworksFile(data)), os.RemoveAll(driver.NetworksFile(data)+".lock"))
		},
	})
	for _, name := range removed {
		fmt.Fprintf(out, "%s is removed\n", name)
	}
	if err != nil {
		return fmt.Errorf("uninstall: %w", err)
	}
	if data == dataDir {
		_ = os.Remove(data) // this fails if the directory is not empty, and then it stays
	}
	if missing != nil {
		return fmt.Errorf("uninstall: all else is removed, but %w", missing)
	}
	return nil
}

// printTables prints the report for people.
func (r report) printTables(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "azure-vnet %s\n\nSOURCE\tANSWERED\tFAILURE\n", r.Version)
	for _, s := range r.Pool.Sources {
		answered := "never"
		switch {
		case s.BeforeBoot:
			answered = "before the boot"
		case s.Answered:
			answered = fmt.Sprintf("%v ago", s.Age.Round(time.Second))
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", s.Name, answered, s.Failure)
	}
	fmt.Fprintf(w, "\nNIC\tSUBNET\tIPCONFIGS\n")
	for _, nic := range r.Pool.NICs {
		for _, s := range nic.Subnets {
			fmt.Fprintf(w, "%s\t%s\t%s\n", nic.MAC, s.Prefix, s.Census)
		}
	}
	fmt.Fprintf(w, "\nBRIDGE\tNIC\tMAC\tMTU\n")
	for _, b := range r.Bridges {
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\n", b.Name, b.NIC, b.MAC, b.MTU)
	}
	fmt.Fprintf(w, "\nNETWORK\tSUBNET\tNIC\tMODE\tSNAT\tAUXILIARY\n")
	for _, id := range slices.Sorted(maps.Keys(r.Networks)) {
		n := r.Networks[id]
		mode := cmp.Or(n.Mode, bridge.ModeBridge)
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%d\n", shortID(id), n.Prefix, n.MAC, mode, map[bool]string{true: "on", false: "off"}[n.SNAT], len(n.Aux))
	}
	r.printAddresses(w)
	for _, what := range r.Broken {
		fmt.Fprintf(w, "\nbroken: %s\n", what)
	}
	for _, warning := range r.Pool.Warnings {
		fmt.Fprintf(w, "\nwarning: %s\n", warning)
	}
	return w.Flush()
}

// printAddresses prints the addresses that are leased, and those that are attached without a lease.
func (r report) printAddresses(w io.Writer) {
	links := map[netip.Addr]bridge.Attachment{}
	rows := maps.Clone(r.Pool.Leases)
	if rows == nil {
		rows = map[netip.Addr]pool.Lease{}
	}
	for _, link := range r.Attachments {
		addr := link.Addr.Addr()
		links[addr] = link
		if _, lent := rows[addr]; !lent {
			rows[addr] = pool.Lease{Addr: addr, Owner: "nobody", Pod: link.Pod}
		}
	}
	fmt.Fprintf(w, "\nADDRESS\tLENT TO\tPOD OR CONTAINER\tLINK\tBRIDGE\tMAC\tSTATE\tPUBLISHED\n")
	for _, addr := range slices.SortedFunc(maps.Keys(rows), netip.Addr.Compare) {
		link, attached := links[addr]
		state, in := "not attached", link.Bridge
		if attached && in == "" {
			in = "transparent"
		}
		switch {
		case attached && link.InContainer:
			state = "in a container"
		case attached:
			state = "attached, no container"
		case rows[addr].Linkless:
			state = "kept"
		}
		var ports []string
		for _, p := range link.Ports {
			ports = append(ports, p.String())
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", addr, rows[addr].Owner, cmp.Or(rows[addr].Pod, link.Pod, r.Containers[addr]), link.Link, in, link.MAC, state, strings.Join(ports, ", "))
	}
}
