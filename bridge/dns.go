// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"time"

	"github.com/godbus/dbus/v5"
)

// linkDNS is what systemd-resolved knows of one link, in the shapes of its bus:
// a link's servers die with its addresses.
type linkDNS struct {
	Servers      []dnsServer `json:"servers"`
	Domains      []dnsDomain `json:"domains"`
	DefaultRoute bool        `json:"defaultRoute"`
}

type dnsServer struct {
	Family  int32  `json:"family"`
	Address []byte `json:"address"`
}

type dnsDomain struct {
	Domain string `json:"domain"`
	Route  bool   `json:"route"` // for routing alone, not for searching
}

// resolvedWait bounds a visit to the bus.
const resolvedWait = 3 * time.Second

const resolved = "org.freedesktop.resolve1"

// errNoResolved says that this host has no systemd-resolved to tell.
var errNoResolved = errors.New("no systemd-resolved")

// visit calls do with the bus of the host's systemd-resolved, or returns
// errNoResolved.
func (h *Host) visit(ctx context.Context, do func(context.Context, dbus.BusObject, *dbus.Conn) error) error {
	socket := filepath.Join(h.cfg.Run, "dbus/system_bus_socket")
	if _, err := os.Stat(socket); errors.Is(err, fs.ErrNotExist) {
		return errNoResolved
	}
	ctx, cancel := context.WithTimeout(ctx, resolvedWait)
	defer cancel()
	conn, err := dbus.Connect("unix:path="+dbus.EscapeBusAddressValue(socket), dbus.WithContext(ctx))
	if err != nil {
		return fmt.Errorf("call the bus at %s: %w", socket, err)
	}
	defer conn.Close()
	err = do(ctx, conn.Object(resolved, "/org/freedesktop/resolve1"), conn)
	var reply dbus.Error
	if errors.As(err, &reply) && (reply.Name == "org.freedesktop.DBus.Error.ServiceUnknown" || reply.Name == "org.freedesktop.DBus.Error.NameHasNoOwner") {
		return errNoResolved
	}
	return err
}

// readDNS is what systemd-resolved knows of a link; nil when there is nothing
// to know.
func (h *Host) readDNS(ctx context.Context, index int) *linkDNS {
	var out *linkDNS
	_ = h.visit(ctx, func(ctx context.Context, manager dbus.BusObject, conn *dbus.Conn) (err error) {
		out, err = linkDNSOf(ctx, manager, conn, index)
		return err
	})
	return out
}

func linkDNSOf(ctx context.Context, manager dbus.BusObject, conn *dbus.Conn, index int) (*linkDNS, error) {
	var path dbus.ObjectPath
	if err := manager.CallWithContext(ctx, resolved+".Manager.GetLink", 0, int32(index)).Store(&path); err != nil {
		return nil, fmt.Errorf("ask systemd-resolved for link %d: %w", index, err)
	}
	var properties map[string]dbus.Variant
	err := conn.Object(resolved, path).CallWithContext(ctx, "org.freedesktop.DBus.Properties.GetAll", 0, resolved+".Link").Store(&properties)
	if err != nil {
		return nil, fmt.Errorf("ask systemd-resolved about link %d: %w", index, err)
	}
	d := &linkDNS{}
	if err := errors.Join(properties["DNS"].Store(&d.Servers), properties["Domains"].Store(&d.Domains)); err != nil {
		return nil, fmt.Errorf("understand systemd-resolved about link %d: %w", index, err)
	}
	if v, ok := properties["DefaultRoute"]; ok { // since systemd 240
		_ = v.Store(&d.DefaultRoute)
	}
	if len(d.Servers) == 0 && len(d.Domains) == 0 {
		return nil, nil
	}
	return d, nil
}

// writeDNS tells systemd-resolved the DNS of a link, unless it knows. No
// systemd-resolved, or nothing to tell, is success.
func (h *Host) writeDNS(ctx context.Context, index int, want *linkDNS) (changed bool, err error) {
	if want == nil {
		return false, nil
	}
	err = h.visit(ctx, func(ctx context.Context, manager dbus.BusObject, conn *dbus.Conn) error {
		has, err := linkDNSOf(ctx, manager, conn, index)
		if err != nil || reflect.DeepEqual(has, want) {
			return err
		}
		changed = true
		for _, call := range []struct {
			method string
			value  any
		}{{"SetLinkDNS", want.Servers}, {"SetLinkDomains", want.Domains}, {"SetLinkDefaultRoute", want.DefaultRoute}} {
			if err := manager.CallWithContext(ctx, resolved+".Manager."+call.method, 0, int32(index), call.value).Err; err != nil {
				return fmt.Errorf("tell systemd-resolved the DNS of link %d: %s: %w", index, call.method, err)
			}
		}
		return nil
	})
	if errors.Is(err, errNoResolved) {
		return false, nil
	}
	return changed, err
}
