// Copyright (c) The azure-vnet authors. MIT licence.

// Command demo shows azure-vnet on a simulated VNet: two VMs with a Docker
// engine and the plugin each, containers that talk by VNet addresses, and what
// the fabric saw of it. It proves nothing that the tests do not; it is for
// people.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"azurevnet/internal/vnetsim"
)

const plugin = "azure-vnet:latest"

// demo is what one run holds.
type demo struct {
	dir   string // build/plugin, ready for docker plugin create
	vnet  *vnetsim.VNet
	vm    []*vnetsim.VM // vm1 and vm2 run Docker, vm3 is plain
	rows  []row
	start time.Time
}

// row is one line of the closing table.
type row struct{ who, address, whom, result string }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: demo <plugin directory>; make demo calls it")
		os.Exit(2)
	}
	dir, err := filepath.Abs(os.Args[1])
	d := &demo{dir: dir, start: time.Now()}
	if err == nil {
		err = d.run(ctx)
	}
	if d.vnet != nil {
		if err == nil && os.Getenv("KEEP") != "" && os.Getenv("KEEP") != "0" {
			d.keep(ctx)
		}
		say("removing the VMs and all they ran")
		err = errors.Join(err, d.vnet.Close())
	}
	switch {
	case err != nil && ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "demo: interrupted")
		os.Exit(130)
	case err != nil:
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func (d *demo) run(ctx context.Context) error {
	for _, step := range []func(context.Context) error{d.boot, d.install, d.containers, d.reach, d.table} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// boot makes the VNet and its VMs.
func (d *demo) boot(context.Context) (err error) {
	say("a VNet, 10.240.0.0/16, with Azure's rules: foreign MACs and addresses are dropped, and counted")
	if d.vnet, err = vnetsim.New(vnetsim.Config{}); err != nil {
		return err
	}
	for i, secondaries := range []int{4, 4, 0} {
		vm, err := d.vnet.AddVM(vnetsim.VMConfig{Name: fmt.Sprintf("vm%d", i+1), Secondaries: secondaries})
		if err != nil {
			return err
		}
		d.vm = append(d.vm, vm)
		say("%s: %s, %d secondary addresses", vm.Name, vm.Primary, secondaries)
	}
	return nil
}

// install starts an engine on vm1 and vm2 and gives it the plugin and a network. vm1
// has one of each mode.
func (d *demo) install(ctx context.Context) error {
	for _, vm := range d.vm[:2] {
		say("%s: dockerd, and docker plugin create %s", vm.Name, plugin)
		if err := vm.StartDocker(ctx); err != nil {
			return err
		}
		if err := vm.ImportBusybox(ctx); err != nil {
			return err
		}
		for _, command := range [][]string{
			{"plugin", "create", plugin, d.dir},
			{"plugin", "enable", plugin},
		} {
			if _, err := vm.Docker(ctx, command...); err != nil {
				return err
			}
		}
		create := []string{"network", "create", "-d", plugin, "--ipam-driver", plugin, "--subnet", d.vnet.Subnet.String()}
		if err := show(ctx, vm, append(create, "azure")...); err != nil {
			return err
		}
		if vm != d.vm[0] {
			continue
		}
		if err := show(ctx, vm, append(create, "-o", "mode=transparent", "alone")...); err != nil {
			return err
		}
	}
	return nil
}

// containers runs a web server on each network of vm1, and a client on vm2.
func (d *demo) containers(ctx context.Context) error {
	for _, c := range []struct{ name, network string }{{"web", "azure"}, {"lone", "alone"}} {
		page := "echo container " + c.name + ", with an address of the VNet > /index.html; exec httpd -f -p 80"
		if err := show(ctx, d.vm[0], "run", "-d", "--name", c.name, "--network", c.network, "busybox", "sh", "-c", page); err != nil {
			return err
		}
	}
	return show(ctx, d.vm[1], "run", "-d", "--name", "client", "--network", "azure", "busybox", "sleep", "3600")
}

// reach fetches the pages from everywhere, and the internet from a container.
func (d *demo) reach(ctx context.Context) error {
	at := map[string]string{}
	for name, vm := range map[string]*vnetsim.VM{"web": d.vm[0], "lone": d.vm[0], "client": d.vm[1]} {
		var err error
		if at[name], err = address(ctx, vm, name); err != nil {
			return err
		}
	}
	web, lone, client := at["web"], at["lone"], at["client"]
	url, loneURL := "http://"+web+"/", "http://"+lone+"/"
	fetch := []string{"busybox", "timeout", "10", "busybox", "wget", "-q", "-O", "-"}
	in := func(name string) []string { return append([]string{"docker", "exec", name}, fetch...) }
	for _, f := range []struct {
		who, address string
		vm           *vnetsim.VM
		command      []string
		url, whom    string
	}{
		{"container client on vm2", client, d.vm[1], in("client"), url, "web on vm1, mode bridge"},
		{"container client on vm2", client, d.vm[1], in("client"), loneURL, "lone on vm1, mode transparent"},
		{"container lone on vm1", lone, d.vm[0], in("lone"), url, "web on vm1"},
		{"plain VM vm3", d.vm[2].Primary.String(), d.vm[2], fetch, url, "web on vm1"},
		{"plain VM vm3", d.vm[2].Primary.String(), d.vm[2], fetch, loneURL, "lone on vm1"},
		{"its own host vm1", d.vm[0].Primary.String(), d.vm[0], fetch, url, "web on vm1"},
		{"container client on vm2", client, d.vm[1], in("client"), "http://" + vnetsim.InternetAddr.String() + "/", "the internet, by SNAT"},
		{"container lone on vm1", lone, d.vm[0], in("lone"), "http://" + vnetsim.InternetAddr.String() + "/", "the internet, by SNAT"},
	} {
		out, err := f.vm.Run(ctx, f.command[0], append(f.command[1:], f.url)...)
		if err != nil {
			return fmt.Errorf("%s does not reach %s: %w", f.who, f.whom, err)
		}
		d.rows = append(d.rows, row{f.who, f.address, f.whom, strings.TrimSpace(out)})
	}
	return nil
}

// table prints who reached whom, and what the fabric dropped.
func (d *demo) table(context.Context) error {
	fmt.Println()
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "FROM\tADDRESS\tTO\tGOT")
	for _, r := range d.rows {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", r.who, r.address, r.whom, r.result)
	}
	w.Flush()
	violations, err := d.vnet.Violations()
	if err != nil {
		return err
	}
	total := uint64(0)
	for name, n := range violations {
		if total += n; n > 0 {
			fmt.Printf("  dropped by the fabric: %s: %d\n", name, n)
		}
	}
	fmt.Printf("\nfabric violations: %d (in %.0f s)\n\n", total, time.Since(d.start).Seconds())
	if total > 0 {
		return errors.New("the fabric dropped frames: Azure would have, too")
	}
	return nil
}

// keep waits for Ctrl-C and tells how to look around.
func (d *demo) keep(ctx context.Context) {
	say("kept up until Ctrl-C; look around with")
	for _, vm := range d.vm {
		fmt.Printf("  sudo %s    # %s, %s\n", vm.Enter(), vm.Name, vm.Primary)
	}
	<-ctx.Done()
}

// show runs a docker command and prints it.
func show(ctx context.Context, vm *vnetsim.VM, arg ...string) error {
	say("%s: docker %s", vm.Name, strings.Join(arg, " "))
	_, err := vm.Docker(ctx, arg...)
	return err
}

func address(ctx context.Context, vm *vnetsim.VM, container string) (string, error) {
	out, err := vm.Docker(ctx, "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", container)
	return strings.TrimSpace(out), err
}

func say(format string, arg ...any) { fmt.Printf("• "+format+"\n", arg...) }
