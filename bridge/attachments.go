// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
)

// Attachments lists what is attached: what the links and their aliases say, and
// the ports that host.json knows of them.
func (h *Host) Attachments(ctx context.Context) ([]Attachment, error) {
	links, err := readLinks()
	if err != nil {
		return nil, err
	}
	state, err := h.state()
	if err != nil {
		return nil, err
	}
	var out []Attachment
	bridges := links.bridges()
	for _, l := range links {
		a, ok := endpointOf(l)
		if !ok {
			continue
		}
		away := l.Attrs().NetNsID >= 0
		peer := ""
		if p := links.at(l.Attrs().ParentIndex); p != nil && !away {
			peer = p.Attrs().Name
		}
		at := attachmentOf(l.Attrs().Name, peer, away, a)
		if a.ports > 0 {
			at.Ports = state.Ports[at.Link]
		}
		if i := slices.IndexFunc(bridges, func(b Bridge) bool { return b.Name == a.bridge }); i >= 0 {
			at.NIC = bridges[i].MAC.String()
		}
		out = append(out, at)
	}
	return out, nil
}

// Away is the set of addresses whose end of the link lies in another namespace:
// containers have them.
func (h *Host) Away(ctx context.Context) (map[netip.Addr]bool, error) {
	all, err := h.Attachments(ctx)
	away := map[netip.Addr]bool{}
	for _, at := range all {
		if at.Away {
			away[at.Addr.Addr()] = true
		}
	}
	return away, err
}

func attachmentOf(host, peer string, away bool, a alias) Attachment {
	if away {
		peer = ""
	}
	return Attachment{Owner: a.owner, Lease: a.lease, Link: host, Peer: peer, Bridge: a.bridge, Addr: a.addr, MAC: a.mac, Away: away}
}

// Attachment finds what owner has attached, with less to read than Attachments.
func (h *Host) Attachment(ctx context.Context, owner string) (Attachment, bool, error) {
	host, peer := linkNames(owner)
	l, err := netlink.LinkByName(host)
	if absent(err) {
		return Attachment{}, false, nil
	}
	if err != nil {
		return Attachment{}, false, fmt.Errorf("look for %s: %w", host, err)
	}
	a, ok := endpointOf(l)
	if !ok || a.owner != owner && a.owner != hashed(owner) {
		return Attachment{}, false, nil
	}
	return attachmentOf(host, peer, l.Attrs().NetNsID >= 0, a), true, nil
}
