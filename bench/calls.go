// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const hostLocal = `"ipam":{"type":"host-local","dataDir":"/run/cni-nets","subnet":"172.31.0.0/16","routes":[{"dst":"0.0.0.0/0"}]}`

// chain is a plugin with its configuration.
type chain struct{ name, plugin, conf string }

var chains = []chain{
	{"azure-vnet", "azure-vnet", `"ipam":{"type":"azure-vnet-ipam"}`},
	{"bridge + host-local", "bridge", `"bridge":"cni0","isGateway":true,` + hostLocal},
	{"bridge + host-local + ipMasq", "bridge", `"bridge":"cni0","isGateway":true,"ipMasq":true,` + hostLocal},
}

// cost is of one call.
type cost struct{ cpu, wall time.Duration }

// call runs a plugin and measures it.
func call(dir string, c chain, verb, id string) (cost, error) {
	conf, err := json.Marshal(json.RawMessage(fmt.Sprintf(`{"cniVersion":"1.0.0","name":%q,"type":%q,%s}`, strings.ReplaceAll(c.name, " + ", "-"), c.plugin, c.conf)))
	if err != nil {
		return cost{}, err
	}
	cmd := exec.Command(filepath.Join(dir, c.plugin))
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + id, "CNI_NETNS=/run/netns/" + id, "CNI_IFNAME=eth0", "CNI_PATH=" + dir}
	cmd.Stdin = bytes.NewReader(conf)
	start := time.Now()
	out, err := cmd.Output()
	wall := time.Since(start)
	if err != nil {
		return cost{}, fmt.Errorf("%s of %s: %w: %s", verb, c.name, err, out)
	}
	return cost{cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), wall}, nil
}

// calls measures CNI calls, in the VM. CPU is user and system time of the plugin and
// all that it starts; wall is what a runtime waits.
func calls(dir string, rounds, standing int) error {
	if err := syscall.Mount("log", "/var/log", "tmpfs", 0, ""); err != nil {
		return err
	}
	var names []string
	for i := range max(standing, 31) {
		names = append(names, fmt.Sprintf("p%d", i))
	}
	for _, name := range names {
		if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
			return fmt.Errorf("make a namespace: %w: %s", err, out)
		}
	}
	for _, name := range names[:standing] {
		if _, err := call(dir, chains[0], "ADD", name); err != nil {
			return err
		}
	}
	if out, err := exec.Command("ip", "netns", "add", "one").CombinedOutput(); err != nil {
		return fmt.Errorf("make a namespace: %w: %s", err, out)
	}
	costs := map[string][]cost{}
	for round := range rounds + 1 {
		for _, c := range chains {
			for _, verb := range []string{"VERSION", "ADD", "DEL"} {
				one, err := call(dir, c, verb, "one")
				if err != nil {
					return err
				}
				if round > 0 { // the first makes the bridge
					costs[c.name+" "+verb] = append(costs[c.name+" "+verb], one)
				}
			}
		}
	}
	fmt.Printf("%-30s %-8s %9s %9s %9s %9s   (ms, %d calls, %d containers stand)\n", "chain", "verb", "CPU p50", "CPU mean", "wall p50", "wall p95", rounds, standing)
	for _, c := range chains {
		for _, verb := range []string{"VERSION", "ADD", "DEL"} {
			report(c.name, verb, costs[c.name+" "+verb])
		}
	}
	if standing > 0 {
		return nil
	}
	return burst(dir, names[:30])
}

func report(name, verb string, all []cost) {
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	var cpu, wall []time.Duration
	var sum time.Duration
	for _, c := range all {
		cpu, wall, sum = append(cpu, c.cpu), append(wall, c.wall), sum+c.cpu
	}
	slices.Sort(cpu)
	slices.Sort(wall)
	fmt.Printf("%-30s %-8s %9.2f %9.2f %9.2f %9.2f\n", name, verb, ms(cpu[len(cpu)/2]), ms(sum)/float64(len(all)), ms(wall[len(wall)/2]), ms(wall[len(wall)*95/100]))
}

// burst adds and deletes containers all at once.
func burst(dir string, names []string) error {
	for _, c := range chains[:2] {
		for _, verb := range []string{"ADD", "DEL"} {
			errs := make([]error, len(names))
			var all sync.WaitGroup
			start := time.Now()
			for i, name := range names {
				all.Go(func() { _, errs[i] = call(dir, c, verb, name) })
			}
			all.Wait()
			took := time.Since(start)
			failed := 0
			for _, err := range errs {
				if err != nil {
					failed++
					fmt.Fprintln(os.Stderr, err)
				}
			}
			fmt.Printf("%-30s %-8s %d at once: %.0f/s, %d failed\n", c.name, verb, len(names), float64(len(names))/took.Seconds(), failed)
		}
	}
	return nil
}
