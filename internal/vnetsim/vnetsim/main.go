// Copyright (c) The azure-vnet authors. MIT licence.

// Command vnetsim holds a simulated Azure VNet up for a person to play with:
//
//	vnetsim up [-vms 2] [-secondaries 8] [-docker]
//
// It prints how to enter each VM, and ends, leaving nothing, with Ctrl-C.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"azurevnet/internal/vnetsim"
)

func main() {
	flags := flag.NewFlagSet("vnetsim up", flag.ExitOnError)
	vms := flags.Int("vms", 2, "how many VMs")
	secondaries := flags.Int("secondaries", 8, "secondary addresses of each")
	docker := flags.Bool("docker", false, "start dockerd in each")
	if len(os.Args) < 2 || os.Args[1] != "up" {
		fmt.Fprintln(os.Stderr, "usage: vnetsim up [flags]")
		flags.PrintDefaults()
		os.Exit(2)
	}
	flags.Parse(os.Args[2:])
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := up(ctx, *vms, *secondaries, *docker); err != nil {
		fmt.Fprintln(os.Stderr, "vnetsim:", err)
		os.Exit(1)
	}
}

// up shows a VNet until ctx ends, and then what its fabric refused.
func up(ctx context.Context, vms, secondaries int, docker bool) (err error) {
	v, err := vnetsim.New(vnetsim.Config{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	for range vms {
		vm, err := v.AddVM(vnetsim.VMConfig{Secondaries: secondaries})
		if err != nil {
			return err
		}
		if docker {
			if err := vm.StartDocker(ctx); err != nil {
				return err
			}
			if err := vm.ImportBusybox(ctx); err != nil {
				return err
			}
		}
		fmt.Printf("%s  %s  secondaries %v\n    %s\n", vm.Name, vm.Primary, vm.Secondaries(), vm.Enter())
	}
	fmt.Printf("internet  %s\n    %s\nCtrl-C ends it.\n", vnetsim.InternetAddr, v.Internet.Enter())
	<-ctx.Done()
	refused, err := v.Violations()
	if err != nil {
		return err
	}
	fmt.Printf("\nrefused by the fabric: %v\n", refused)
	return nil
}
