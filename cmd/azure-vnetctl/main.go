// Copyright (c) The azure-vnet authors. MIT licence.

// Command azure-vnetctl is for whoever runs azure-vnet. Its words are subcommands, and each says in its help what its
// exit status means. It serves no runtime: azure-vnet and azure-vnet-ipam answer CNI, and azure-vnet-plugin answers
// Docker.
package main

import (
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
)

// version is set when linking.
var version = "devel"

// Exit statuses. The help of the command explains them.
const (
	statusWrong = 1 // it was done, and something is wrong
	statusUsage = 2 // it was not done, because the command is not usable as it was given
)

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

// run runs a command, and returns its exit status.
func run(args []string, in io.Reader, out, errOut io.Writer) (status int) {
	root := newRoot(&status)
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errOut)
	if err := root.Execute(); err != nil {
		fmt.Fprintf(errOut, "azure-vnetctl: %v\n", err)
		return statusUsage
	}
	return status
}

// newRoot returns the command with all its words. A word that was done, and that found something wrong, sets the status.
func newRoot(status *int) *cobra.Command {
	root := &cobra.Command{
		Use:   "azure-vnetctl",
		Short: "See and plan how containers get addresses of the Azure virtual network",
		Long: `azure-vnetctl is for whoever runs azure-vnet, which gives containers addresses
of the Azure virtual network.

Exit status:
  0  it was done, and nothing is wrong
  1  it was done, and something is wrong
  2  the command is not usable as it was given`,
		Version:       version,
		SilenceErrors: true, // run prints them
		SilenceUsage:  true,
	}
	root.AddCommand(newPlan(status))
	return root
}
