// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"azurevnet/bridge/internal/firewalld"
)

// systemBus returns the path of the system bus's socket.
func (h *Host) systemBus() string { return filepath.Join(h.cfg.Run, "dbus/system_bus_socket") }

// zoneReading is one reading of firewalld's zones.
type zoneReading struct {
	zones *firewalld.Zones // nil: the host has no firewalld, or err says why it was not read
	err   error
}

// readZones asks firewalld for its zones. A bus that hangs costs 2 s.
func (h *Host) readZones(ctx context.Context) (z zoneReading) {
	z.zones, z.err = firewalld.ReadZones(ctx, h.systemBus())
	return z
}

// zoneLinks returns our links that should be in a zone, each with the names of its NICs. A NIC that is gone has
// no name.
func (v *view) zoneLinks() map[string][]string {
	links := map[string][]string{}
	add := func(link, nic string) {
		names := links[link]
		if nic != "" {
			names = append(names, nic)
		}
		links[link] = names
	}
	for _, mac := range v.macs() {
		n := v.state.NICs[mac]
		if n.Bridge != "" {
			add(n.Bridge, v.nicName(mac))
		}
		if n.Transparent {
			add(hostPrefix+"+", v.nicName(mac))
		}
	}
	return links
}

// zoneFaults are the links that are not in the zone that they should be in.
func (h *Host) zoneFaults(v *view) (all []fault) {
	z := v.zones
	if z.err != nil {
		return []fault{{what: z.err.Error()}}
	}
	if z.zones == nil {
		return nil
	}
	for _, s := range z.zones.Steps(v.zoneLinks(), v.state.Zones) {
		f := fault{what: s.What, mend: func() error { return h.takeZoneStep(z.zones, s) }}
		if s.Act == firewalld.Report {
			f.mend = nil
		}
		all = append(all, f)
	}
	return all
}

// takeZoneStep puts a link into a zone or takes it out. host.json has the zones that we put links into, and
// uninstall takes links out of these only. So the zone is noted before a link joins it, and the note is deleted
// after the link has left.
func (h *Host) takeZoneStep(z *firewalld.Zones, s firewalld.Step) error {
	ctx := context.Background()
	note := func(zone string) error {
		return h.updateState(ctx, "note the zone of "+s.Link, func(state *hostState) error {
			delete(state.Zones, s.Link)
			if zone != "" {
				state.Zones[s.Link] = zone
			}
			return nil
		})
	}
	if s.Act == firewalld.Join {
		if err := note(s.Zone); err != nil {
			return err
		}
		if err := h.beforeStep("join"); err != nil {
			return err
		}
		return z.MoveLink(ctx, s.Link, s.Zone)
	}
	if s.Act == firewalld.Leave {
		if err := z.MoveLink(ctx, s.Link, ""); err != nil {
			return err
		}
	}
	if err := h.beforeStep("forget zone"); err != nil {
		return err
	}
	return note("")
}

// leaveZones takes our links out of the zones that we put them into.
func (h *Host) leaveZones(ctx context.Context) error {
	s, err := h.readState()
	if err != nil || len(s.Zones) == 0 {
		return err
	}
	z := h.readZones(ctx)
	if z.err != nil {
		return fmt.Errorf("%w. Some of our links stay in its zones until its next reload or the boot", z.err)
	}
	if z.zones == nil {
		return nil // firewalld is gone, and will start without our links
	}
	var errs []error
	for _, step := range z.zones.Steps(nil, s.Zones) {
		errs = append(errs, h.takeZoneStep(z.zones, step))
	}
	return errors.Join(errs...)
}
