// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"azurevnet/bridge"
	"azurevnet/internal/cni"
	"azurevnet/internal/upkeep"
	"azurevnet/pool"
)

const usage = `azure-vnet is a CNI plugin: a runtime starts it without an argument. With one, it serves the host:

  azure-vnet status      name what is broken, and who has which address
  azure-vnet reconcile   make what stands as it should be; a timer calls it
  azure-vnet uninstall   remove azure0, the rules and every other trace
  azure-vnet attach [-name pod -namespace namespace] <conflist> <container-id> <netns>
                         run ADD of the whole conflist, and print the address
  azure-vnet detach <conflist> <container-id> [<netns>]
                         run DEL of the whole conflist
  azure-vnet hold        wait until SIGTERM, to keep a container's network namespace
  azure-vnet version
`

// wordTime bounds a word, except hold. It is longer than the deadlines of all that a word calls.
const wordTime = 90 * time.Second

// serveWord runs the word that the arguments begin with, and returns the exit status.
func serveWord(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := runWord(ctx, args[0], args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "azure-vnet:", err)
		return 1
	}
	return 0
}

// runWord runs a word, and prints to out.
func runWord(ctx context.Context, name string, args []string, out io.Writer) error {
	if name == "hold" {
		<-ctx.Done()
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, wordTime)
	defer cancel()
	switch name {
	case "status":
		return printStatus(ctx, out)
	case "reconcile":
		return reconcile(ctx, out)
	case "uninstall":
		return uninstall(ctx, out)
	case "attach":
		return attach(ctx, args, out)
	case "detach":
		return detach(ctx, args)
	case "version":
		_, err := fmt.Fprintln(out, version)
		return err
	case "help", "-h", "-help", "--help":
		_, err := fmt.Fprint(out, usage)
		return err
	}
	return fmt.Errorf("unknown word %.40q\n\n%s", name, usage)
}

// reconcile does on a host without the managed plugin what the plugin does every 30 s. It mends the host, ends the leases
// that no container has any more, and leases again the addresses that running containers have and nobody holds. It
// prints what it changed, so nothing if all was as it should be.
func reconcile(ctx context.Context, out io.Writer) error {
	host := bridge.New(bridge.Config{})
	mended, err := host.Reconcile(ctx)
	for _, what := range mended {
		fmt.Fprintln(out, "mended:", what)
	}
	cni.RemoveLeftLocks()
	err = errors.Join(err, moveEarlierResults())
	p, bad := pool.New(pool.Config{Dir: cni.StateDir})
	if bad != nil {
		return errors.Join(err, bad)
	}
	released, bad := upkeep.ReleaseLeaked(ctx, host, p)
	err = errors.Join(err, bad)
	for _, lease := range released {
		fmt.Fprintf(out, "released: %s, which %s has no more\n", lease.Addr, lease.Holder())
	}
	adopted, bad := upkeep.AdoptLost(ctx, host, p)
	for _, lease := range adopted {
		fmt.Fprintf(out, "leased again: %s, which %s has\n", lease.Addr, lease.Holder())
	}
	return errors.Join(err, bad, refreshNICs(ctx, p))
}

// refreshNICs asks the sources for the VM's addresses if the last answer is old. It waits longer for a slow source than
// an ADD does, so ADDs find a fresh answer. If the sources never answered on this host, it asks nothing: the host's
// networks have other sources, which only their configurations name.
func refreshNICs(ctx context.Context, p *pool.Pool) error {
	_, err := p.KnownNICs(ctx)
	if errors.Is(err, pool.ErrSource) {
		return nil
	}
	if err == nil {
		_, err = p.NICs(ctx)
	}
	return err
}

// uninstall removes every trace of azure-vnet: see upkeep.Uninstall. An auxiliary address of a Docker network keeps
// everything too, because without its lease the address would be lent to a container.
func uninstall(ctx context.Context, out io.Writer) error {
	p, err := pool.New(pool.Config{Dir: cni.StateDir})
	if err != nil {
		return err
	}
	removed, err := upkeep.Uninstall(ctx, bridge.New(bridge.Config{}), p, upkeep.Removal{
		Run:   filepath.Dir(cni.StateDir),
		Keeps: func(pool.Lease) bool { return true },
		Files: func() error { return nil },
	})
	for _, name := range removed {
		fmt.Fprintf(out, "%s is removed\n", name)
	}
	return err
}
