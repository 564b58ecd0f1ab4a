// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"

	"azurevnet/bridge/internal/forward"
	"azurevnet/bridge/internal/ruleset"
)

// RemoveBridge removes the bridge of that name, and what else its NIC no longer needs. It refuses while
// endpoints are attached to the bridge. If there is no such bridge, that is success.
func (h *Host) RemoveBridge(ctx context.Context, name string) error {
	unlock, err := h.lockHost(ctx, "remove "+name)
	if err != nil {
		return err
	}
	defer unlock()
	v, err := h.readView()
	if err != nil {
		return err
	}
	for mac, n := range v.state.NICs {
		if n.Bridge != name {
			continue
		}
		if on := v.attachedEndpoints(func(e endpoint) bool { return e.bridge == name }); len(on) > 0 {
			return fmt.Errorf("remove %s: containers are attached to it: %s: end them first", name, strings.Join(on, ", "))
		}
		n.Bridge = ""
		if err := h.withdrawAsked(ctx, mac, n); err != nil {
			return fmt.Errorf("remove %s: %w", name, err)
		}
	}
	return nil
}

// attachedEndpoints names the endpoints for which want is true, in the words of an error.
func (v *view) attachedEndpoints(want func(endpoint) bool) (out []string) {
	for _, e := range v.endpoints {
		if want(e) {
			out = append(out, fmt.Sprintf("%s (%s)", e.owner, e.label()))
		}
	}
	slices.Sort(out)
	return out
}

// RemoveAll removes everything of ours, half-made links included. It returns the names of the removed bridges. It
// refuses while endpoints are attached. It calls deleteState, which deletes the caller's state, when everything is
// gone and while it still holds the lock. After that another call may begin anew, and the state would be that call's.
//
// ip_forward and the NICs' forwarding stay on: an engine or a kubelet that was started since may rely on them.
func (h *Host) RemoveAll(ctx context.Context, deleteState func() error) (removed []string, err error) {
	unlock, err := h.lockHost(ctx, "remove all")
	if err != nil {
		return nil, err
	}
	defer unlock()
	v, err := h.readView()
	if err != nil {
		return nil, err
	}
	if err := refuseFormer(v.links); err != nil {
		return nil, err // deleteState would delete the leases of the earlier build's containers
	}
	if on := v.attachedEndpoints(func(endpoint) bool { return true }); len(on) > 0 {
		return nil, fmt.Errorf("containers are attached: %s: end them first", strings.Join(on, ", "))
	}
	for _, l := range v.links {
		if _, ours := bridgeAliasOf(l); !ours && !halfMade(l) {
			continue
		}
		if err := h.beforeStep("remove " + l.Type()); err != nil {
			return removed, err
		}
		if err := deleteLink(l); err != nil {
			return removed, err
		}
		if l.Type() == "bridge" {
			removed = append(removed, l.Attrs().Name)
		}
	}
	if err := h.beforeStep("remove rules"); err != nil {
		return removed, err
	}
	if err := h.removeAllButLinks(); err != nil {
		return removed, err
	}
	left := h.leaveZones(ctx) // an error of firewalld ends nothing; it is returned at the end
	if err := h.beforeStep("forget"); err != nil {
		return removed, err
	}
	return removed, errors.Join(deleteState(), left)
}

// removeUnasked removes what nobody asks for any more. The caller holds the lock.
func (h *Host) removeUnasked(ctx context.Context) error {
	s, err := h.readState()
	if err != nil {
		return err
	}
	if !s.isAsked() {
		return errors.Join(h.removeAllButLinks(), h.leaveZones(ctx))
	}
	r := h.doRound(ctx)
	return errors.Join(r.hostErr, r.bearableErr)
}

// removeAllButLinks removes our routes, rules, neighbour entries, nft tables, rules in FORWARD, and drop-ins.
// The caller holds the lock.
func (h *Host) removeAllButLinks() error {
	v, err := h.readView()
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range v.ourRoutingRules {
		errs = append(errs, netlink.RuleDel(&r))
	}
	none := &view{state: &hostState{}, links: v.links, ourRoutes: v.ourRoutes, neighbours: v.neighbours}
	for _, f := range strayFaults(none) {
		errs = append(errs, f.mend())
	}
	return errors.Join(append(errs, forward.RemoveAll(), ruleset.DeleteTables(), h.removeDropIns())...)
}
