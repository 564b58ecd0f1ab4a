// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"

	"github.com/spf13/cobra"

	"azurevnet/internal/plan"
)

// planFlags are the flags of plan.
type planFlags struct {
	subnet                  string
	nodes, maxPods, masters int
	output                  string
}

// newPlan returns the word plan.
func newPlan(status *int) *cobra.Command {
	var f planFlags
	cmd := &cobra.Command{
		Use:   "plan FILE | --subnet CIDR --nodes N",
		Short: "Say whether a subnet has enough addresses for a cluster",
		Long: `plan reads the definition of a Kubernetes cluster for ACS-Engine or AKS-Engine.
It says how many addresses the cluster needs, how many are left, how many more
nodes fit, and what an upgrade needs. It names all that is wrong in the
definition by line and column. FILE may be -, for stdin. Remarks (-->) and
ellipses, as in the documentation's example, are left out.

Without FILE, it plans a subnet with nodes of one kind.

plan needs no Azure, no cluster and no root. It changes nothing.

Exit status:
  0  the cluster fits, and nothing is wrong; there may be warnings
  1  it does not fit, or something is wrong in the definition
  2  the command is not usable as it was given, or FILE cannot be read`,
		Example: `  azure-vnetctl plan cluster.json
  azure-vnetctl plan -o json - <cluster.json
  azure-vnetctl plan --subnet 10.0.0.0/20 --nodes 3 --max-pods 30`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := f.plan(cmd, args)
			if err != nil {
				return err
			}
			if !p.OK {
				*status = statusWrong
			}
			return f.print(cmd.OutOrStdout(), p)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&f.subnet, "subnet", "", "range of the subnet, such as 10.0.0.0/20, without FILE")
	flags.IntVar(&f.nodes, "nodes", 0, "number of nodes, with --subnet")
	flags.IntVar(&f.maxPods, "max-pods", 30, "pods of each node, 1 to 250, with --subnet")
	flags.IntVar(&f.masters, "masters", 0, "masters beside the nodes, 0, 1, 3 or 5, with --subnet")
	flags.StringVarP(&f.output, "output", "o", "text", "text, or json for programs")
	cobra.CheckErr(cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp)))
	return cmd
}

// plan returns the plan of the file or of the flags.
func (f planFlags) plan(cmd *cobra.Command, args []string) (p plan.Plan, err error) {
	if f.output != "text" && f.output != "json" {
		return p, fmt.Errorf("unknown output %.40q: write -o text or -o json", f.output)
	}
	if len(args) == 0 {
		return f.size()
	}
	for _, name := range []string{"subnet", "nodes", "max-pods", "masters"} {
		if cmd.Flags().Changed(name) {
			return p, fmt.Errorf("--%s and a FILE were given: leave out one of the two", name)
		}
	}
	text, err := readDefinition(args[0], cmd.InOrStdin())
	if err != nil {
		return p, err
	}
	return plan.Read(text), nil
}

// size plans the subnet of the flags.
func (f planFlags) size() (p plan.Plan, err error) {
	subnet, err := netip.ParsePrefix(f.subnet)
	switch {
	case f.subnet == "":
		return p, errors.New("give a FILE with the definition of a cluster, or --subnet and --nodes: see azure-vnetctl plan --help")
	case err != nil || !subnet.Addr().Is4():
		return p, fmt.Errorf("--subnet %.40q is no range of IPv4: write it as a CIDR, such as 10.0.0.0/20", f.subnet)
	case subnet != subnet.Masked():
		return p, fmt.Errorf("--subnet %s has host bits: write %s", subnet, subnet.Masked())
	case subnet.Bits() > 29 || subnet.Bits() < 8:
		return p, fmt.Errorf("--subnet %s cannot be a subnet of Azure: write a range from /8 to /29", subnet)
	case f.nodes < 1 || f.nodes > 65536:
		return p, fmt.Errorf("--nodes %d cannot be: write the number of nodes, from 1 to 65536", f.nodes)
	case f.maxPods < 1 || f.maxPods > 250:
		return p, fmt.Errorf("--max-pods %d cannot be: a node has 1 to 250 pods", f.maxPods)
	case f.masters != 0 && f.masters != 1 && f.masters != 3 && f.masters != 5:
		return p, fmt.Errorf("--masters %d cannot be: a cluster has 1, 3 or 5 masters; 0 if they are in another subnet", f.masters)
	}
	return plan.Size(plan.Cluster{
		Subnet:  subnet,
		Masters: plan.Nodes{Name: "masters", Count: f.masters, PerNode: 1 + f.maxPods},
		Pools:   []plan.Nodes{{Name: "nodes", Count: f.nodes, PerNode: 1 + f.maxPods}},
	}), nil
}

// mostBytes is more than any definition has. A file that is larger is another one.
const mostBytes = 1 << 20

// readDefinition reads a file, or stdin by the name -.
func readDefinition(name string, in io.Reader) ([]byte, error) {
	if name != "-" {
		file, err := os.Open(name)
		if err != nil {
			return nil, fmt.Errorf("the definition cannot be read: %w", err)
		}
		defer file.Close()
		in = file
	}
	text, err := io.ReadAll(io.LimitReader(in, mostBytes+1))
	if err != nil {
		return nil, fmt.Errorf("the definition cannot be read: %w", err)
	}
	if len(text) > mostBytes {
		return nil, fmt.Errorf("%s is larger than 1 MiB, so it is no definition of a cluster: give another file", name)
	}
	return text, nil
}

// print prints the plan in the form that was asked for.
func (f planFlags) print(out io.Writer, p plan.Plan) error {
	text := []byte(p.Text())
	if f.output == "json" {
		var err error
		if text, err = p.JSON(); err != nil {
			return fmt.Errorf("write the plan as JSON: %w", err)
		}
	}
	_, err := out.Write(text)
	return err
}
