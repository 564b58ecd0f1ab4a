// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
)

// Remove undoes the bridge: the NIC is the host's own again, and nothing of the
// bridge is left. It refuses while endpoints are attached. No such bridge is
// success. On failure the host is back on the bridge, or, where only traces of
// the bridge are left, the next Remove or Reconcile finishes.
func (h *Host) Remove(ctx context.Context, name string) error {
	unlock, err := h.lockExclusive(ctx, "remove "+name)
	if err != nil {
		return err
	}
	defer unlock()
	s, err := h.known()
	if err != nil {
		return err
	}
	return h.removeKnown(ctx, s, name)
}

// RemoveAll is Remove for every bridge of ours, also one that a crash left half
// made or half removed and of which only traces are there. It returns the links
// that the host is home on. forget is called when all is gone and nobody else can
// begin anew yet: a state that is deleted later may be another's.
func (h *Host) RemoveAll(ctx context.Context, forget func() error) (homes []string, err error) {
	unlock, err := h.lockExclusive(ctx, "remove all bridges")
	if err != nil {
		return nil, err
	}
	defer unlock()
	s, err := h.known()
	if err != nil {
		return nil, err
	}
	for _, name := range s.names() {
		if err := h.removeKnown(ctx, s, name); err != nil {
			return homes, err
		}
		homes = append(homes, s.Bridges[name].NIC)
	}
	return homes, forget()
}

func (h *Host) removeKnown(ctx context.Context, s *hostState, name string) error {
	st := s.Bridges[name]
	if st == nil {
		return nil
	}
	on, err := h.endpointsOn(ctx, name)
	if err != nil {
		return err
	}
	if len(on) > 0 {
		return fmt.Errorf("remove %s: attached to it: %s", name, strings.Join(on, ", "))
	}
	if err := removeHalfMade(); err != nil {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	if err := h.lower(ctx, name, st); err != nil {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	return nil
}

// removeHalfMade deletes the links that an attach died over. The caller holds
// the exclusive lock, under which no attach is on its way.
func removeHalfMade() error {
	links, err := readLinks()
	if err != nil {
		return err
	}
	for _, l := range links {
		if !halfMade(l) {
			continue
		}
		if err := netlink.LinkDel(l); err != nil && !absent(err) {
			return fmt.Errorf("delete %s, which is half made: %w", l.Attrs().Name, err)
		}
	}
	return nil
}

// lower walks down, and back up if that fails while the bridge is still there.
func (h *Host) lower(ctx context.Context, name string, st *bridgeState) error {
	m, err := h.newMove(name, st)
	if err != nil {
		return err
	}
	if err = m.walk(ctx, m.down()); err == nil {
		return nil
	}
	if m.gone || m.bridge.index == 0 {
		return err
	}
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoWait)
	defer cancel()
	if _, bad := h.raise(undo, name, st); bad != nil {
		err = errors.Join(err, fmt.Errorf("and then undo it: %w", bad))
	}
	return err
}

// endpointsOn names the endpoints attached to a bridge.
func (h *Host) endpointsOn(ctx context.Context, name string) ([]string, error) {
	all, err := h.Attachments(ctx)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, a := range all {
		if a.Bridge == name {
			out = append(out, fmt.Sprintf("%s (%s)", a.Owner, a.Addr.Addr()))
		}
	}
	slices.Sort(out)
	return out, nil
}
