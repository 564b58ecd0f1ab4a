// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ErrAttached says that a container has the endpoint already: its end of the
// veth lies in another namespace, and was left as it is.
var ErrAttached = errors.New("a running container has it")

// errSlow says that an attach needs what only the exclusive lock allows.
var errSlow = errors.New("the table or a neighbour is in the way")

// at is the seam of tests: it is called before each named step, whose error it
// may be.
func (h *Host) at(step string) error {
	if h.step == nil {
		return nil
	}
	return h.step(step)
}

// Attach makes a container's interface whole, or not at all: neighbour and map
// elements, veth, port, the container's end in its namespace, and last the alias
// that says so. A repeat for the same owner clears away what a crash left and
// succeeds. It fails with ErrAttached where a container has the endpoint, and
// with an error that names the other where another owner's link has the address.
func (h *Host) Attach(ctx context.Context, e Endpoint) (Attachment, error) {
	var err error
	if e.Ports, err = spelt(e.Ports); err != nil {
		return Attachment{}, fmt.Errorf("attach %q: %w", e.Owner, err)
	}
	a, err := e.alias()
	if err != nil {
		return Attachment{}, fmt.Errorf("attach %q: %w", e.Owner, err)
	}
	who := "attach " + e.Owner
	out, err := h.attachUnder(ctx, h.lockShared, who, e, a, h.claim)
	if errors.Is(err, errSlow) {
		out, err = h.attachUnder(ctx, h.lockExclusive, who, e, a, h.claimAlone)
	}
	if err != nil {
		return Attachment{}, fmt.Errorf("attach %s to %s: %w", e.Owner, e.Bridge, err)
	}
	return out, nil
}

// alias is what the endpoint's link will say, and checks the wish.
func (e Endpoint) alias() (alias, error) {
	if e.Lease == "" {
		e.Lease = e.Owner
	}
	if e.MAC == nil && e.Addr.Addr().Is4() {
		e.MAC = MACFor(e.Addr.Addr())
	}
	switch bad := func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }; {
	case e.Owner == "" || len(e.Owner) > 255 || strings.ContainsFunc(e.Owner, bad):
		return alias{}, errors.New("the owner must have 1 to 255 bytes and no space")
	case len(e.Lease) > 255 || strings.ContainsFunc(e.Lease, bad):
		return alias{}, errors.New("the lease's owner must have at most 255 bytes and no space")
	case !e.Addr.Addr().Is4() || e.Addr.Bits() < 0:
		return alias{}, fmt.Errorf("%v is not an IPv4 address with its mask", e.Addr)
	case len(e.MAC) != 6 || e.MAC[0]&1 != 0 || slices.Equal(e.MAC, make([]byte, 6)):
		return alias{}, fmt.Errorf("%s is not the MAC of one interface", e.MAC)
	case e.Netns != "" && (e.IfName == "" || len(e.IfName) >= unix.IFNAMSIZ):
		return alias{}, fmt.Errorf("%q is not a name for an interface: it must have 1 to 15 bytes", e.IfName)
	case e.Netns != "" && !e.Policy.Internal && !e.Gateway.Is4():
		return alias{}, errors.New("a container in a namespace needs an IPv4 gateway")
	}
	return alias{addr: e.Addr, mac: e.MAC, bridge: e.Bridge, policy: e.Policy.id(), owner: e.Owner, lease: e.Lease, ports: len(e.Ports)}, nil
}

// attaching is one attach on its way.
type attaching struct {
	h      *Host
	nl     *netlink.Handle
	nf     netfilter
	e      Endpoint
	a      alias
	host   string // its end's name
	peer   string // the container's, while here
	bridge *netlink.LinkAttrs
	ports  []Port  // claimed
	alone  *Bridge // the bridge again, where the exclusive lock is held
	undo   []func() error
}

// attachUnder attaches under a lock. claim gives the address to the endpoint:
// the neighbour and the map elements.
func (h *Host) attachUnder(ctx context.Context, lock func(context.Context, string) (func(), error), who string, e Endpoint, a alias,
	claim func(context.Context, *attaching) error) (Attachment, error) {
	at := &attaching{h: h, e: e, a: a}
	defer at.nf.close()
	unlock, err := lock(ctx, who)
	if err != nil {
		return Attachment{}, err
	}
	defer unlock()
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return Attachment{}, err
	}
	defer nl.Close()
	at.nl = nl
	at.host, at.peer = linkNames(e.Owner)
	if at.bridge, err = bridgeNamed(nl, e.Bridge); err != nil {
		return Attachment{}, err
	}
	if err := at.clear(ctx); err != nil {
		return Attachment{}, err
	}
	if err = claim(ctx, at); err == nil {
		err = at.makeLink()
	}
	// Not deferred: a panic leaves what a crash does, and a repeat finishes it.
	if err != nil {
		for _, undo := range slices.Backward(at.undo) {
			err = errors.Join(err, undo())
		}
		return Attachment{}, err
	}
	out := attachmentOf(at.host, at.peer, e.Netns != "", a)
	out.Ports = at.ports
	return out, nil
}

// bridgeNamed is a bridge of ours.
func bridgeNamed(nl *netlink.Handle, name string) (*netlink.LinkAttrs, error) {
	l, err := nl.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("bridge %q: %w; make it first", name, err)
	}
	if l.Type() != "bridge" || !strings.HasPrefix(l.Attrs().Alias, bridgeAlias) {
		return nil, fmt.Errorf("%s is not a bridge of azure-vnet", name)
	}
	return l.Attrs(), nil
}

// clear takes away what an earlier attach or half a detach of this owner left.
func (at *attaching) clear(ctx context.Context) error {
	l, err := at.nl.LinkByName(at.host)
	if absent(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for %s: %w", at.host, err)
	}
	old, whole := parseAlias(l.Attrs().Alias)
	switch {
	case !whole: // an attach died before its last step: nobody was told of it
		return at.nl.LinkDel(l)
	case old.owner != at.e.Owner && old.owner != hashed(at.e.Owner):
		return fmt.Errorf("the link %s is of %s, whose name hashes alike", at.host, old.owner)
	case l.Attrs().NetNsID >= 0:
		return fmt.Errorf("%s with %s: %w", at.host, old.addr, ErrAttached)
	}
	return at.h.detachLink(ctx, at.nl, &at.nf, l, old)
}

// claim is the way of nearly every attach: it asks the kernel once each. A
// neighbour entry is the claim's lock, for of two that add it one fails.
func (h *Host) claim(ctx context.Context, at *attaching) error {
	state, err := h.state()
	if err != nil {
		return err
	}
	if _, known := state.Policies[at.a.policy]; !known {
		return errSlow
	}
	if err := h.at("neighbour"); err != nil {
		return err
	}
	neighbour := neighbourFor(at.bridge.Index, at.a)
	if err := neighbours.send(neighbours.add, neighbour, unix.NLM_F_CREATE|unix.NLM_F_EXCL); errors.Is(err, unix.EEXIST) {
		return errSlow
	} else if err != nil {
		return err
	}
	at.undo = append(at.undo, func() error { return neighbours.remove(neighbour) })
	if err := h.at("elements"); err != nil {
		return err
	}
	if !at.nf.addElements(elementsOf(at.host, at.a)) {
		return errSlow
	}
	at.undo = append(at.undo, func() error { return at.nf.deleteElements(elementsOf(at.host, at.a)) })
	return at.claimPorts(ctx, nil)
}

// claimAlone claims alone on the host. Of many that came here for the same reason
// the first has done what all lacked; whether it served published ports as well
// shows later than that.
func (h *Host) claimAlone(ctx context.Context, at *attaching) error {
	if len(at.e.Ports) > 0 {
		return h.claimSlow(ctx, at)
	}
	err := h.claim(ctx, at)
	if !errors.Is(err, errSlow) {
		return err
	}
	for _, undo := range slices.Backward(at.undo) {
		if err := undo(); err != nil {
			return err
		}
	}
	at.undo = nil
	return h.claimSlow(ctx, at)
}

// claimSlow looks whose the address is, writes the policy down and makes the
// table whole.
func (h *Host) claimSlow(ctx context.Context, at *attaching) error {
	links, err := readLinks()
	if err != nil {
		return err
	}
	standing := map[string]alias{}
	for _, l := range links {
		a, ok := endpointOf(l)
		if ok && a.addr.Addr() == at.a.addr.Addr() {
			return fmt.Errorf("%s has the address %s (link %s): detach it first", a.owner, a.addr.Addr(), l.Attrs().Name)
		}
		if ok {
			standing[l.Attrs().Name] = a
		}
	}
	bridges := links.bridges()
	i := slices.IndexFunc(bridges, func(b Bridge) bool { return b.Name == at.e.Bridge })
	if i < 0 {
		return fmt.Errorf("the bridge %s is gone", at.e.Bridge)
	}
	if err := h.note(ctx, at.e.Policy, links); err != nil {
		return err
	}
	if err := h.at("neighbour"); err != nil {
		return err
	}
	neighbour := neighbourFor(at.bridge.Index, at.a)
	at.undo = append(at.undo, func() error { return neighbours.remove(neighbour) })
	if err := neighbours.put(neighbour, unix.NLM_F_REPLACE); err != nil {
		return err
	}
	if err := h.at("elements"); err != nil {
		return err
	}
	at.undo = append(at.undo, func() error { return at.nf.deleteElements(elementsOf(at.host, at.a)) })
	at.alone = &bridges[i]
	unpublished := at.a // until it has a link
	unpublished.ports = 0
	if _, err = h.syncTableWith(bridges[i], &unpublished); err != nil {
		return err
	}
	return at.claimPorts(ctx, standing)
}
