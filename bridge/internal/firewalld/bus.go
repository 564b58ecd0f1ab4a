// Copyright (c) The azure-vnet authors. MIT licence.

package firewalld

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/nfnl"
)

// The names of firewalld on the bus.
const (
	busName  = "org.fedoraproject.FirewallD1"
	busPath  = "/org/fedoraproject/FirewallD1"
	busZones = busName + ".zone"
)

// busTimeout bounds each visit to the bus. Callers hold locks meanwhile.
const busTimeout = 2 * time.Second

// ReadZones reads the zones. bus is the path of the system bus's socket. It returns nil if there is no
// firewalld. An error of the bus counts only while firewalld's nft table exists.
//
// A firewalld older than 0.9 with the back-end iptables counts as none. It leaves to the end of FORWARD what no
// zone decides on, and an accept there is enough.
func ReadZones(ctx context.Context, bus string) (*Zones, error) {
	z, err := readZones(ctx, bus)
	if err == nil && !z.isTooOld() {
		return z, nil
	}
	stands, failed := nfnl.ChainExists(unix.NFPROTO_INET, "firewalld", "filter_FORWARD") // firewalld has this chain since 0.6
	switch {
	case !stands:
		return nil, failed
	case err != nil:
		return nil, fmt.Errorf("ask firewalld for its zones: %w", err)
	}
	return z, nil
}

func readZones(ctx context.Context, bus string) (*Zones, error) {
	z := &Zones{bus: bus, zoneOfLink: map[string]string{}, zones: map[string]zone{}}
	err := visitBus(ctx, bus, func(f *daemon) error {
		if err := f.callMethod(busName + ".getDefaultZone").Store(&z.defaultZone); err != nil {
			return err
		}
		var active map[string]map[string][]string
		if err := f.callMethod(busZones + ".getActiveZones").Store(&active); err != nil {
			return err
		}
		if _, is := active[z.defaultZone]; !is {
			active[z.defaultZone] = nil
		}
		for name, binds := range active {
			for _, link := range binds["interfaces"] {
				z.zoneOfLink[link] = name
			}
			var err error
			if z.zones[name], err = f.readZone(name); err != nil {
				return err
			}
		}
		return nil
	})
	return z, err
}

// readZone reads what the settings of a zone mean for containers.
func (f *daemon) readZone(name string) (is zone, err error) {
	var settings map[string]dbus.Variant
	err = f.callMethod(busZones+".getZoneSettings2", name).Store(&settings)
	if errorName(err) == "org.freedesktop.DBus.Error.UnknownMethod" {
		return zone{old: true, accepts: name == "trusted"}, nil
	}
	is.forwards, _ = settings["forward"].Value().(bool)
	is.masquerades, _ = settings["masquerade"].Value().(bool)
	target, _ := settings["target"].Value().(string)
	is.accepts = target == "ACCEPT"
	return is, err
}

// MoveLink puts a link that is in no zone into the zone to. If to is empty, it takes the link out of the zone
// that this reading found it in.
func (z *Zones) MoveLink(ctx context.Context, link, to string) error {
	from := z.zoneOfLink[link]
	if from == to {
		return nil
	}
	err := visitBus(ctx, z.bus, func(f *daemon) error {
		if to == "" {
			return f.callMethod(busZones+".removeInterface", from, link).Err
		}
		return f.callMethod(busZones+".addInterface", to, link).Err // firewalld refuses a link that is in another zone
	})
	if err != nil {
		return fmt.Errorf("move %s from %q to %q among firewalld's zones: %w", link, from, to, err)
	}
	z.zoneOfLink[link] = to
	return nil
}

// Watch calls changed whenever firewalld may have forgotten what it was told at run time, or has changed the
// zones of links. It returns when ctx ends. It finds a bus that starts later, or again, within watchPause.
func Watch(ctx context.Context, bus string, changed func()) {
	for ctx.Err() == nil {
		if _, err := os.Stat(bus); err == nil {
			_ = hearSignals(ctx, bus, changed) // an error means that the bus has ended
		}
		select {
		case <-ctx.Done():
		case <-time.After(watchPause):
		}
	}
}

const watchPause = 5 * time.Second

// startTimeout bounds how long firewalld may take from having its name on the bus to its first answer.
const startTimeout = time.Minute

// signals are the signals of firewalld that Watch listens to. Others are frequent on some hosts, such as those
// for rules that fail2ban adds.
var signals = [][]dbus.MatchOption{
	{dbus.WithMatchSender("org.freedesktop.DBus"), dbus.WithMatchMember("NameOwnerChanged"), dbus.WithMatchArg(0, busName)},
	{dbus.WithMatchSender(busName), dbus.WithMatchMember("Reloaded")},
	{dbus.WithMatchSender(busName), dbus.WithMatchMember("DefaultZoneChanged")},
	{dbus.WithMatchSender(busName), dbus.WithMatchMember("InterfaceAdded")},
	{dbus.WithMatchSender(busName), dbus.WithMatchMember("InterfaceRemoved")},
	{dbus.WithMatchSender(busName), dbus.WithMatchMember("ZoneOfInterfaceChanged")},
	{dbus.WithMatchSender(busName), dbus.WithMatchMember("ZoneUpdated")},
}

func hearSignals(ctx context.Context, bus string, changed func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	late := time.AfterFunc(busTimeout, cancel)
	f, err := connectBus(ctx, bus)
	if err != nil {
		return err
	}
	defer f.conn.Close()
	heard := make(chan *dbus.Signal, 16)
	f.conn.Signal(heard)
	for _, s := range signals {
		if err := f.conn.AddMatchSignalContext(ctx, s...); err != nil {
			return err
		}
	}
	if !late.Stop() {
		return ctx.Err()
	}
	changed() // signals from before the subscription were not heard
	for s := range heard {
		if s.Name == "org.freedesktop.DBus.NameOwnerChanged" {
			// firewalld takes its name before it has made its rules. It answers calls when it has.
			bounded, cancel := context.WithTimeout(ctx, startTimeout)
			_ = (&daemon{bounded, f.conn}).callMethod(busName + ".getDefaultZone").Err
			cancel()
		}
		changed()
	}
	return nil
}

// daemon is firewalld, by a connection to the bus.
type daemon struct {
	ctx  context.Context
	conn *dbus.Conn
}

// connectBus opens a connection to the bus, which ends when ctx ends.
func connectBus(ctx context.Context, bus string) (*daemon, error) {
	conn, err := dbus.Connect("unix:path="+dbus.EscapeBusAddressValue(bus), dbus.WithContext(ctx))
	return &daemon{ctx, conn}, err
}

// callMethod calls a method of firewalld. It does not start firewalld.
func (f *daemon) callMethod(method string, args ...any) *dbus.Call {
	return f.conn.Object(busName, busPath).CallWithContext(f.ctx, method, dbus.FlagNoAutoStart, args...)
}

// visitBus connects to the bus and calls do with firewalld. Both together take no longer than busTimeout.
func visitBus(ctx context.Context, bus string, do func(*daemon) error) error {
	bounded, cancel := context.WithTimeout(ctx, busTimeout)
	defer cancel()
	f, err := connectBus(bounded, bus)
	if err == nil {
		err = do(f)
		f.conn.Close()
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case bounded.Err() != nil:
		return fmt.Errorf("%s gave no answer within %v: see systemctl status dbus firewalld", bus, busTimeout)
	case errorName(err) == "org.freedesktop.DBus.Error.ServiceUnknown", errorName(err) == "org.freedesktop.DBus.Error.NameHasNoOwner":
		return errors.New("its rules stand, and it does not run: systemctl restart firewalld && firewall-cmd --reload")
	}
	return err
}

// errorName returns the name of an error that came over the bus, or "" for another error.
func errorName(err error) string {
	var said dbus.Error
	if !errors.As(err, &said) {
		return ""
	}
	return strings.TrimSpace(said.Name)
}
