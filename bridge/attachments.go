// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"

	"azurevnet/bridge/internal/conntrack"
	"azurevnet/bridge/internal/rtnl"
)

// Attachments lists what is attached. It reads links and their aliases, and the published ports from host.json.
func (h *Host) Attachments(ctx context.Context) ([]Attachment, error) {
	links, err := rtnl.ReadLinks()
	if err != nil {
		return nil, err
	}
	state, err := h.readState()
	if err != nil {
		return nil, err
	}
	var out []Attachment
	for _, l := range links {
		a, ok := endpointAliasOf(l)
		if !ok {
			continue
		}
		attachment := attachmentOf(l, a)
		if p := links.ByIndex(l.Attrs().ParentIndex); p != nil && !attachment.InContainer {
			attachment.Peer = p.Attrs().Name
		}
		if a.ports > 0 {
			attachment.Ports = notIdle(state.Ports[attachment.Link])
		}
		out = append(out, attachment)
	}
	return out, nil
}

func attachmentOf(l netlink.Link, a alias) Attachment {
	return Attachment{Owner: a.owner, Lease: a.lease, Pod: a.pod, Link: l.Attrs().Name, Bridge: a.bridge, NIC: a.nic, Addr: a.addr, MAC: a.mac,
		MTU: l.Attrs().MTU, InContainer: l.Attrs().NetNsID >= 0}
}

// Attachment finds owner's attachment, and reads less than Attachments does: one link by its name, and host.json if the
// endpoint has published ports. ok is false if there is none. It lists nothing, so other links that come and go cannot
// interrupt it.
func (h *Host) Attachment(ctx context.Context, owner string) (Attachment, bool, error) {
	host, peer := linkNames(owner)
	l, err := netlink.LinkByName(host)
	if rtnl.IsNotExist(err) {
		return Attachment{}, false, nil
	}
	if err != nil {
		return Attachment{}, false, fmt.Errorf("look for %s: %w", host, err)
	}
	a, ok := endpointAliasOf(l)
	if !ok || !a.isOf(owner) {
		return Attachment{}, false, nil
	}
	attachment := attachmentOf(l, a)
	if !attachment.InContainer {
		attachment.Peer = peer
	}
	if a.ports > 0 {
		state, err := h.readState()
		if err != nil {
			return Attachment{}, false, err
		}
		attachment.Ports = notIdle(state.Ports[attachment.Link])
	}
	return attachment, true, nil
}

// AddrsInContainers returns the addresses whose container end is in another namespace, so a container has them.
// It returns an error on a host with containers of an earlier build, whose links do not tell their addresses.
func (h *Host) AddrsInContainers(ctx context.Context) (map[netip.Addr]bool, error) {
	links, err := rtnl.ReadLinks()
	if err != nil {
		return nil, err
	}
	if err := refuseFormer(links); err != nil {
		return nil, err
	}
	inContainers := map[netip.Addr]bool{}
	for _, l := range links {
		if a, ok := endpointAliasOf(l); ok && l.Attrs().NetNsID >= 0 {
			inContainers[a.addr.Addr()] = true
		}
	}
	return inContainers, nil
}

// DeleteFlows deletes the tracked flows of addresses. A link that ends with its container's namespace leaves
// them, and they would mislead the next container that has the address. If there are no flows, that is success.
func (h *Host) DeleteFlows(addrs ...netip.Addr) error {
	var flows conntrack.Conn
	defer flows.Close()
	if err := deleteFlows(&flows, addrs...); err != nil {
		return fmt.Errorf("forget the flows of %v: %w", addrs, err)
	}
	return nil
}

// deleteFlows deletes the flows that these addresses began, and those that they answer.
func deleteFlows(c *conntrack.Conn, addrs ...netip.Addr) error {
	var all []conntrack.Flows
	for _, addr := range addrs {
		all = append(all, conntrack.Flows{From: addr}, conntrack.Flows{Answerer: addr})
	}
	return c.Delete(all...)
}
