// Copyright (c) The azure-vnet authors. MIT licence.

// Command bench measures, on VMs of the simulated VNet, what a CNI call costs and
// what the wire costs a packet: azure-vnet beside the reference plugins and beside two
// VMs without any, in one run. All that is compared takes turns, so that a busy machine
// is busy for all of it.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"strconv"

	"azurevnet/internal/vnetsim"
)

func main() {
	rounds := flag.Int("rounds", 40, "calls of each kind, and twice the rounds of each path")
	standing := flag.Int("standing", 0, "containers of azure-vnet that stand meanwhile, on each VM")
	// What the program starts itself with, in a VM or a container.
	dir := flag.String("inside", "", "where the plugins lie")
	more := flag.Int("pods", -1, "make pods, and so many more")
	mode := flag.String("mode", "bridge", "of the pods that are made")
	answer := flag.Bool("echo", false, "answer")
	server := flag.String("ask", "", "measure the path to it")
	flag.Parse()
	var err error
	switch {
	case *answer:
		err = echo()
	case *server != "":
		err = ask(*server)
	case *more >= 0:
		err = pods(*dir, *mode, *more)
	case *dir != "":
		err = calls(*dir, *rounds, *standing)
	default:
		err = outside(*rounds, *standing)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// outside builds the plugins and makes the VMs.
func outside(rounds, standing int) error {
	dir, err := os.MkdirTemp("", "azure-vnet-bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	const ref = "github.com/containernetworking/plugins/plugins/"
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", dir+"/", "azurevnet/cmd/azure-vnet", ref+"main/bridge", ref+"ipam/host-local")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the plugins: %w\n%s", err, out)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := callsOnAVM(dir, self, rounds, standing); err != nil {
		return err
	}
	return paths(dir, self, (rounds+1)/2, standing)
}

func callsOnAVM(dir, self string, rounds, standing int) error {
	vnet, err := vnetsim.New(vnetsim.Config{})
	if err != nil {
		return err
	}
	defer vnet.Close()
	vm, err := vnet.AddVM(vnetsim.VMConfig{Secondaries: standing + 64})
	if err != nil {
		return err
	}
	cmd := vm.Command(context.Background(), self, "-inside", dir, "-rounds", strconv.Itoa(rounds), "-standing", strconv.Itoa(standing))
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}
