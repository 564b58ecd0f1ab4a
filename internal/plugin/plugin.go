// Copyright (c) The azure-vnet authors. MIT licence.

// Package plugin is the process of the managed Docker plugin. It serves both of libnetwork's drivers on one socket,
// until SIGTERM. Its words status and uninstall read and change the kernel and the files themselves, so they work while
// no plugin runs. It decides nothing about addresses and containers: packages pool and bridge do.
package plugin

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"

	"azurevnet/bridge"
	"azurevnet/driver"
	"azurevnet/internal/statefile"
	"azurevnet/internal/upkeep"
	"azurevnet/ipamdriver"
	"azurevnet/pool"
)

// The times of calls. An engine that ends waits for DeleteEndpoint and then for ReleaseAddress of each container, in
// parallel, and then for the plugin. After 15 s in all it gives up, and does not write its files. So a call that only
// takes away has 4 s. If both calls of a container hang, the engine still ends in time. A container with published
// ports has two calls more, Revoke and Leave: if all four hang, the engine gives up. The engine ignores the errors of
// these calls, and what they leave heals.
var (
	serving  = limits{deadline: 18 * time.Second, grace: 2 * time.Second} // 20 s in all: an engine waits 30 s for an answer
	takeAway = limits{deadline: 4 * time.Second, grace: time.Second}
)

// stopPatience is how long the plugin waits for calls in flight after SIGTERM. An engine kills a plugin 10 s after
// SIGTERM.
const stopPatience = 5 * time.Second

const usage = `azure-vnet-plugin gives Docker containers addresses of the Azure virtual network.

  azure-vnet-plugin            serve the engine; the settings are in the environment
  azure-vnet-plugin status     what is lent, attached and known; -json for programs
  azure-vnet-plugin uninstall  remove azure0, the rules and every other trace
  azure-vnet-plugin version

Flags say where things of the host are, as this process sees them:
`

// places are the paths of the host's things, as this process sees them.
type places struct {
	run    string // the host's /run
	sysctl string // the host's /proc/sys/net
	data   string // directory of networks.json; empty: findData looks for it
	socket string // that the engine calls

	version string // of this program
}

// Run runs the word that the arguments begin with, serve if there is none, and prints to out. version is the program's.
func Run(version string, args []string, out io.Writer) error {
	p := places{version: version}
	flags := flag.NewFlagSet("azure-vnet-plugin", flag.ContinueOnError)
	flags.StringVar(&p.run, "run", hostRun, "the host's /run")
	flags.StringVar(&p.sysctl, "sysctl", "/proc/sys/net", "the host's /proc/sys/net")
	flags.StringVar(&p.data, "data", "", "`directory` of networks.json, which outlives a reboot (found if empty)")
	flags.StringVar(&p.socket, "socket", "/run/docker/plugins/azure-vnet.sock", "socket that the engine calls")
	asJSON := flags.Bool("json", false, "status: print JSON")
	flags.Usage = func() { fmt.Fprint(flags.Output(), usage); flags.PrintDefaults() }
	word := "serve"
	if len(args) > 0 && args[0] != "" && args[0][0] != '-' {
		word, args = args[0], args[1:]
	}
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q: flags follow the word", flags.Arg(0))
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	switch word {
	case "serve":
		if err := dropCapabilities(); err != nil { // not in serve, which tests call in a process that needs them
			fmt.Fprintf(out, "the plugin keeps capabilities that it does not need: %v. Containers work all the same. To drop them, start the plugin with CAP_SETPCAP\n", err)
		}
		return serve(ctx, p, out)
	case "status":
		return printStatus(ctx, p, *asJSON, out)
	case "uninstall":
		return uninstall(ctx, p, out)
	case "version":
		_, err := fmt.Fprintln(out, version)
		return err
	}
	return fmt.Errorf("unknown word %q: status, uninstall, version, or none to serve", word)
}

// serve serves the engine until ctx is done. It listens before anything slow, because an engine does not wait long for
// the socket. Calls then wait at the gate until the networks are restored.
func serve(ctx context.Context, p places, out io.Writer) error {
	log := logrus.New()
	log.SetOutput(out) // the engine logs stderr as errors
	s, wrong := readSettings(os.Getenv, p.run)
	log.SetLevel(s.level)
	if p.data == "" {
		p.data = dataDir
	}
	host := bridge.New(bridge.Config{Run: p.run, Sysctl: p.sysctl})
	addresses, err := openPool(p, s, host)
	if err != nil {
		return err
	}
	l, err := listen(p.socket)
	if err != nil {
		return err
	}
	log.WithFields(logrus.Fields{"version": p.version, "source": s.source, "socket": p.socket}).Info("azure-vnet listens")
	if wrong != nil {
		log.Error(wrong)
	}

	if err := errors.Join(writeSettings(os.Getenv, p.run), writePlace(p)); err != nil {
		log.Warn(err) // this is no reason to end: an engine that starts disables a plugin that ends, for good
	}
	e, managed := findDockerd(p)
	networks, ipam := newDrivers(p, log, host, addresses, e)
	gate := newGate("the networks of before the restart are being restored")
	rounds := &reconciler{log: log, host: host, pool: addresses, networks: networks, reclaim: s.reclaim}
	rounds.logFailure(ctx, checkNIC, host.CheckReady(ctx)) // the plugin goes on: calls that need the NIC fail with the same words
	end := rounds.start(ctx, p, func(ctx context.Context) {
		gate.open()
		log.Info("ready")
		if managed {
			go rounds.compareNetworks(ctx, e)
		}
	})
	defer end()
	srv := &server{log: log, gate: gate, serving: serving, takeAway: takeAway}
	calls := methods(networks, ipam)
	if wrong != nil {
		refuseMaking(calls, wrong)
	}
	if err := srv.serve(l, calls, ctx.Done(), stopPatience); err != nil {
		return err
	}
	log.Info("stopped")
	return nil
}

// newDrivers makes the two drivers. Each of them calls the other.
func newDrivers(p places, log *logrus.Logger, host *bridge.Host, addresses *pool.Pool, e dockerd) (networks *driver.Driver, ipam *ipamdriver.Driver) {
	warn := func(text string) { log.Warn(text) }
	ipam = ipamdriver.New(ipamdriver.Config{
		Pool: addresses,
		FindNIC: func(ctx context.Context, nameOrMAC string) (string, error) {
			_, mac, err := host.NIC(ctx, nameOrMAC)
			return mac, err
		},
		FindLink: func(ctx context.Context, addr netip.Addr) (string, error) { return findLink(ctx, host, addr) },
		HoldAux:  func(ctx context.Context) error { return networks.HoldAllAux(ctx) },
		WhoHas:   func(ctx context.Context, lease pool.Lease) string { return networks.WhoHas(ctx, lease) },
		Warn:     warn,
	})
	networks = driver.New(driver.Config{
		Dir: p.data, OnHost: e.propagatedMount(), Host: host, Pool: addresses, AddressSpace: ipamdriver.AddressSpace, NetworkMade: ipam.NetworkMade, CheckNIC: ipam.CheckNIC,
		Engine: e, Warn: warn,
	})
	return networks, ipam
}

// lockPlugin takes the lock that shows uninstall that the plugin runs. If an uninstall runs, it waits for it. The
// plugin then makes again what the uninstall removed.
func lockPlugin(ctx context.Context, log *logrus.Logger, p places) (unlock func()) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	unlock, err := statefile.Lock(ctx, upkeep.PluginLock(p.run), "the plugin")
	if errors.Is(ctx.Err(), context.Canceled) && err != nil {
		return func() {} // the plugin stops
	} else if err != nil {
		log.Warnf("uninstall cannot see that the plugin runs: %v", err)
		return func() {}
	}
	return unlock
}

// openPool opens the pool with the plugin's settings.
func openPool(p places, s settings, host *bridge.Host) (*pool.Pool, error) {
	return pool.New(pool.Config{
		Dir: filepath.Join(p.run, "azure-vnet"), Source: s.source, QueryURL: s.queryURL, CoolDown: s.coolDown, Reclaim: s.reclaim, Remedy: reclaimRemedy(s.reclaim),
		Links: upkeep.ProvenLeases(host),
	})
}

// listen makes the socket. A plugin that was killed may have left one at the same path, which is replaced.
func listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("listen: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	return l, nil
}

// findLink returns the name of the host end that has the address. It is "" if none has.
func findLink(ctx context.Context, host *bridge.Host, addr netip.Addr) (string, error) {
	all, err := host.Attachments(ctx)
	if err != nil {
		return "", err
	}
	for _, link := range all {
		if link.Addr.Addr() == addr {
			return link.Link, nil
		}
	}
	return "", nil
}
