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
	"strings"
	"syscall"
	"time"

	"azurevnet/bridge"
	"azurevnet/internal/cni"
	"azurevnet/internal/statefile"
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

// stateDir is where the processes of the host meet.
const stateDir = "/run/azure-vnet"

// wordTime bounds a word. It is above the deadlines of what it calls.
const wordTime = 90 * time.Second

// serveWord does what the arguments say and returns the exit status.
func serveWord(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := word(ctx, args[0], args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "azure-vnet:", err)
		return 1
	}
	return 0
}

func word(ctx context.Context, name string, args []string, out io.Writer) error {
	if name == "hold" {
		<-ctx.Done()
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, wordTime)
	defer cancel()
	switch name {
	case "status":
		return tell(ctx, out)
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

// reconcile does what the managed plugin does every 30 s, for hosts that have no
// plugin. It mends the host, then releases leases that no container has any more, and
// leases again what running containers have and nobody holds. It prints what it mended,
// and nothing if all stood.
func reconcile(ctx context.Context, out io.Writer) error {
	host := bridge.New(bridge.Config{})
	mended, err := host.Reconcile(ctx)
	for _, what := range mended {
		fmt.Fprintln(out, "mended:", what)
	}
	err = errors.Join(err, claimEarlier())
	p, bad := pool.New(pool.Config{Dir: stateDir})
	if bad != nil {
		return errors.Join(err, bad)
	}
	released, bad := p.Collect(ctx, host.Away)
	err = errors.Join(err, bad)
	for _, lease := range released {
		fmt.Fprintf(out, "released: %s, which %s has no more\n", lease.Addr, lease.Holder())
		err = errors.Join(err, host.Forget(lease.Addr))
	}
	lost, bad := p.AdoptLost(ctx, func(ctx context.Context) (leases []pool.Lease, err error) {
		all, err := host.Attachments(ctx)
		for _, at := range all {
			if at.Away {
				leases = append(leases, cni.LeaseOf(at))
			}
		}
		return leases, err
	})
	for _, lease := range lost {
		fmt.Fprintf(out, "leased again: %s, which %s has\n", lease.Addr, lease.Holder())
	}
	return errors.Join(err, bad, hear(ctx, p))
}

// hear keeps what is known young, with more patience for a slow source than an
// ADD has. A host where these sources never answered has others, if any: only
// its networks' configurations name them.
func hear(ctx context.Context, p *pool.Pool) error {
	_, err := p.Known(ctx)
	if errors.Is(err, pool.ErrSource) {
		return nil
	}
	if err == nil {
		_, err = p.NICs(ctx)
	}
	return err
}

// uninstall refuses while a container is attached. It refuses too while a container
// of another main plugin has an address of ours, which no link of ours proves: lent
// again, two containers would have it. It refuses on a host with a bridge of an earlier
// build, whose containers' leases would be forgotten.
func uninstall(ctx context.Context, out io.Writer) error {
	host := bridge.New(bridge.Config{})
	unlock, ok, err := statefile.TryLock(filepath.Join(stateDir, "plugin.lock"), "uninstall")
	if err == nil && !ok {
		err = errors.New("the managed Docker plugin runs, and needs what would go: make uninstall, or docker plugin disable -f azure-vnet:latest, first")
	}
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := host.Away(ctx); err != nil {
		return err
	}
	if err := unheld(ctx); err != nil {
		return err
	}
	removed, err := host.RemoveAll(ctx, func() error {
		if err := unheld(ctx); err != nil { // an ADD may have come before the lock
			return err
		}
		return os.RemoveAll(stateDir)
	})
	for _, name := range removed {
		fmt.Fprintf(out, "%s is removed\n", name)
	}
	return err
}

// unheld refuses while addresses are lent that no link proves. The others are
// their links', which RemoveAll looks at.
func unheld(ctx context.Context) error {
	p, err := pool.New(pool.Config{Dir: stateDir})
	if err != nil {
		return err
	}
	all, err := p.Leases(ctx)
	if err != nil {
		return err
	}
	var held []string
	for _, lease := range all {
		if lease.Linkless {
			held = append(held, fmt.Sprintf("%s (%s)", lease.Holder(), lease.Addr))
		}
	}
	if len(held) > 0 {
		return fmt.Errorf("addresses are held that no link of azure-vnet shows: %s: end these containers first, so that their runtime calls DEL, and remove these networks of Docker's", strings.Join(held, ", "))
	}
	return nil
}
