// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/conntrack"
	"azurevnet/bridge/internal/rtnl"
	"azurevnet/bridge/internal/ruleset"
)

// ErrAttached is in Attach's error if a container has the endpoint's interface already: the container end is in
// another namespace. Attach has changed nothing then.
var ErrAttached = errors.New("a running container has this interface: end that container first")

// Attach makes a container's interface whole, or not at all. It first finds out whether the endpoint can have all
// that it asks for, claims its ports, and writes down its policy. Only then it makes the parts. The last part is
// the alias, which says that the interface is whole. On a second NIC, the NIC's routing rules are mended after
// it. A repeat for the same owner removes what a crash left, and succeeds.
//
// Its error is ErrAttached if a container has the interface already, and InUseError if another endpoint has the
// address, the MAC or a port of the host.
func (h *Host) Attach(ctx context.Context, e Endpoint) (Attachment, error) {
	says, err := e.checkedAlias()
	if err != nil {
		return Attachment{}, fmt.Errorf("attach %q: %w", e.Owner, err)
	}
	a := &attacher{host: h, wish: e, alias: says}
	a.hostEnd, a.containerEnd = linkNames(e.Owner)
	a.wish.Ports, _ = normalizedPorts(e.Ports) // checkedAlias has looked at the error
	defer a.closeSockets()
	out, err := a.lockAndAttach(ctx)
	if err != nil {
		return Attachment{}, fmt.Errorf("attach %s: %w", e.Owner, err)
	}
	if out.InContainer {
		a.awaitCarrier()
	}
	return out, nil
}

// awaitCarrier waits until the host end and the bridge can send. The caller has given back the lock. After the
// container end is up, the kernel takes a moment to note it, longer while it is busy with links of others, and
// drops what is sent meanwhile. Nearly always the wait is zero. It is at most 0.1 s for each of the two links.
func (a *attacher) awaitCarrier() {
	for _, index := range []int{a.hostEndIndex, a.bridgeIndex} {
		for range 100 {
			l, err := netlink.LinkByIndex(index)
			if index == 0 || err != nil || l.Attrs().OperState == netlink.OperUp {
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
}

// checkedAlias checks the wish, and returns what the host end's alias will say. The errors are for the person
// who gave the names.
func (e Endpoint) checkedAlias() (alias, error) {
	if e.Lease == "" {
		e.Lease = e.Owner
	}
	if e.MAC == nil && e.Addr.Addr().Is4() {
		e.MAC = MACFor(e.Addr.Addr())
	}
	nic, macErr := parseMAC(e.NIC)
	bad := func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }
	switch {
	case e.Owner == "" || len(e.Owner) > 255 || strings.ContainsFunc(e.Owner, bad):
		return alias{}, errors.New("the owner must have 1 to 255 bytes and no space: give the network, the container or the interface another name")
	case len(e.Lease) > 255 || strings.ContainsFunc(e.Lease, bad):
		return alias{}, errors.New("the lease's owner must have at most 255 bytes and no space: give the network, the container or the interface another name")
	case macErr != nil:
		return alias{}, fmt.Errorf("the NIC: %w", macErr)
	case !e.Addr.Addr().Is4() || e.Addr.Bits() < 0:
		return alias{}, fmt.Errorf("%v is not an IPv4 address with its mask, such as 10.240.0.7/16", e.Addr)
	case len(e.MAC) != 6 || e.MAC[0]&1 != 0 || slices.Equal(e.MAC, make([]byte, 6)):
		return alias{}, fmt.Errorf("%s is not the MAC of one interface: ask for a unicast MAC of 6 bytes, or for none", e.MAC)
	case e.Netns != "" && (e.IfName == "" || len(e.IfName) >= unix.IFNAMSIZ || e.IfName == "." || e.IfName == ".." || strings.ContainsAny(e.IfName, "/: \t\n")):
		return alias{}, fmt.Errorf("%q is not a name for an interface: it must have 1 to 15 bytes, and no slash, colon or space", e.IfName)
	case e.Netns != "" && !e.Policy.Internal && !e.Gateway.Is4():
		return alias{}, errors.New("a container in a namespace needs an IPv4 gateway: let the IPAM plugin give one, or none")
	}
	if strings.ContainsFunc(e.Pod, bad) {
		e.Pod = "" // no pod of Kubernetes has such a name, and the alias could not be read back
	}
	ports, err := normalizedPorts(e.Ports)
	return alias{addr: e.Addr, mac: e.MAC, nic: nic.String(), bridge: e.Bridge, policy: e.Policy.id(), owner: e.Owner, lease: e.Lease, ports: len(ports), pod: e.Pod}, err
}

// attacher is one call of Attach: the wish, what was decided, and what was made.
type attacher struct {
	host         *Host
	wish         Endpoint
	alias        alias  // what the host end will say
	hostEnd      string // name of the host end
	containerEnd string // name of the container end while it is in the host's namespace

	// The fields below are set by prepareParts.
	ns              netns.NsHandle   // the container's namespace; not open if the container end stays in the host's
	bridgeIndex     int              // link index of the bridge; 0: transparent
	secondNIC       bool             // the NIC is not the primary one, so its containers need routing rules
	mtu             int              // of both ends, in bytes
	ports           []PublishedPort  // claimed in host.json for the endpoint
	rulesetEndpoint ruleset.Endpoint // the endpoint as plain values for the nft tables

	leftovers *detacher // has removed what an earlier attach left; nil: nothing was left

	// The fields below are set by makeParts.
	hostEndIndex      int            // link index
	containerEndIndex int            // link index in the container's namespace
	nsID              int            // the host's number for the container's namespace
	undo              []func() error // takes back what was made; called in the opposite order

	nft   ruleset.Conn
	flows conntrack.Conn
}

// closeSockets runs after the lock was given back, because closing a netfilter socket takes long: see
// ruleset.Conn.
func (a *attacher) closeSockets() {
	if a.leftovers != nil {
		a.leftovers.closeSockets()
	}
	a.nft.Close()
	a.flows.Close()
	if a.ns.IsOpen() {
		a.ns.Close()
	}
}

// lockAndAttach opens the container's namespace, takes the lock, and does the attach.
func (a *attacher) lockAndAttach(ctx context.Context) (Attachment, error) {
	a.ns = netns.None()
	if a.wish.Netns != "" {
		var err error
		if a.ns, err = OpenNetns(a.wish.Netns); err != nil {
			return Attachment{}, err
		}
	}
	unlock, err := a.host.lockHost(ctx, "attach "+a.wish.Owner)
	if err != nil {
		return Attachment{}, err
	}
	defer unlock()
	if err := a.removeLeftovers(ctx); err != nil {
		return Attachment{}, err
	}
	if err := a.prepareParts(ctx); err != nil {
		return Attachment{}, err
	}
	// The undoing is not deferred. After a panic the parts stay, as after a crash, and a repeat finishes them.
	if err := a.makeParts(); err != nil {
		return Attachment{}, errors.Join(err, a.undoAll())
	}
	out := Attachment{Owner: a.alias.owner, Lease: a.alias.lease, Pod: a.alias.pod, Link: a.hostEnd, Peer: a.containerEnd, Bridge: a.alias.bridge, NIC: a.alias.nic, Addr: a.alias.addr,
		MAC: a.alias.mac, MTU: a.mtu, Ports: a.ports, InContainer: a.ns.IsOpen()}
	if out.InContainer {
		out.Peer = ""
	}
	return out, nil
}

// removeLeftovers removes what an earlier attach, or a detach that died, has left for this owner. It refuses to
// touch a link that a container has, or that is not ours.
func (a *attacher) removeLeftovers(ctx context.Context) error {
	l, err := netlink.LinkByName(a.hostEnd)
	if rtnl.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for %s: %w", a.hostEnd, err)
	}
	old, whole := endpointAliasOf(l)
	switch {
	case !whole && halfMade(l): // no caller has had an answer about this link
		return deleteLink(l)
	case !whole:
		return fmt.Errorf("a link %s exists that is not ours: an older azure-vnet names its links alike; end the container that it leads to", a.hostEnd)
	case !old.isOf(a.wish.Owner):
		return fmt.Errorf("the link %s is of %s, whose name has the same hash: remove this container and make it anew, so that it gets another id", a.hostEnd, old.owner)
	case l.Attrs().NetNsID >= 0:
		return fmt.Errorf("%s with %s: %w", a.hostEnd, old.addr, ErrAttached)
	}
	a.leftovers = &detacher{host: a.host, link: l, alias: old}
	if err := a.leftovers.removeParts(ctx); err != nil {
		return err
	}
	return deleteLink(l)
}

// syncTables makes the nft tables what the host's endpoints need, and this endpoint too.
func (a *attacher) syncTables(v *view) error {
	c := v.rulesetConfig()
	c.Endpoints = append(c.Endpoints, a.rulesetEndpoint)
	_, err := c.Sync()
	return err
}

// rulesetConfig returns as much of the tables' configuration as the endpoint's own elements depend on.
func (a *attacher) rulesetConfig() ruleset.Config {
	return ruleset.Config{Policies: []ruleset.Policy{a.wish.Policy.rulesetPolicy()}}
}

// undoAll takes back all that was made, the last part first.
func (a *attacher) undoAll() error {
	var errs []error
	for _, undo := range slices.Backward(a.undo) {
		errs = append(errs, undo())
	}
	a.undo = nil
	return errors.Join(errs...)
}

// makeParts makes what prepareParts found to be possible. docs/design.md says why the order is so, and what a
// crash between two steps leaves.
//
// The routing rules of a second NIC come after the alias, because they derive from the view of whole endpoints.
// If they fail, undoAll works on a link that reads as whole. A crash in the midst of it leaves an endpoint
// without some of its parts, as a detach does that dies before it clears the alias.
func (a *attacher) makeParts() error {
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"elements", a.addElements},
		{"link", a.makeLink},
		{"port", a.setUpHostEnd},
		{"route", a.addRoutes},
		{"namespace", a.setUpContainerEnd},
		{"flows", a.deleteUDPFlows},
		{"alias", a.writeAlias},
	} {
		if err := a.host.beforeStep(step.name); err != nil {
			return err
		}
		if err := step.do(); err != nil {
			return err
		}
	}
	if a.secondNIC {
		return a.host.mendRouting()
	}
	return nil
}

// addElements adds the endpoint's elements to the nft tables, so that it may send. If the kernel refuses an
// element, a killed process has left one for this address. Then the tables are written anew.
func (a *attacher) addElements() error {
	a.undo = append(a.undo, func() error { return a.nft.RemoveEndpoint(a.rulesetConfig(), a.rulesetEndpoint) })
	if a.nft.AddEndpoint(a.rulesetConfig(), a.rulesetEndpoint) == nil {
		return nil
	}
	v, err := a.host.readEndpoints()
	if err != nil {
		return err
	}
	return a.syncTables(v)
}

// makeLink makes the veth pair, with the container end in the container's namespace.
func (a *attacher) makeLink() error {
	pair := rtnl.Veth{Name: a.hostEnd, MAC: hostMAC(a.alias.addr.Addr()), Group: a.alias.group(), Master: a.bridgeIndex, Up: a.bridgeIndex != 0,
		PeerName: a.containerEnd, PeerMAC: a.alias.mac, PeerNS: -1, MTU: a.mtu}
	if a.ns.IsOpen() {
		pair.PeerName, pair.PeerNS = a.wish.IfName, int(a.ns)
	}
	err := pair.Create()
	switch {
	case errors.Is(err, unix.EEXIST) && a.ns.IsOpen():
		return fmt.Errorf("make %s: %w: if %s is in %s already, remove it or ask for another name", a.hostEnd, err, pair.PeerName, a.wish.Netns)
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("make %s: %w: the kernel has no veth: load the module veth", a.hostEnd, err)
	case errors.Is(err, unix.EXFULL) || errors.Is(err, unix.EBUSY) && a.bridgeIndex != 0:
		return fmt.Errorf("make %s a port of %s: %w: a bridge takes 1,023 ports: end other containers, or use mode transparent, which has no bridge", a.hostEnd, a.alias.bridge, err)
	case err != nil:
		return fmt.Errorf("make %s and %s: %w", a.hostEnd, pair.PeerName, err)
	}
	l, err := netlink.LinkByName(a.hostEnd)
	if err != nil {
		return fmt.Errorf("find %s again: %w", a.hostEnd, err)
	}
	a.undo = append(a.undo, func() error { return deleteLink(l) })
	a.hostEndIndex, a.containerEndIndex, a.nsID = l.Attrs().Index, l.Attrs().ParentIndex, l.Attrs().NetNsID
	return nil
}

// setUpHostEnd makes the host end a bridge port that forwards only what is meant for the container. A
// transparent host end gets its settings and is set up.
func (a *attacher) setUpHostEnd() error {
	if a.bridgeIndex != 0 {
		if err := a.host.setSysctl(noIPv6(a.hostEnd)); err != nil {
			return err
		}
		if err := rtnl.SetPortFlags(a.hostEndIndex, bridgePortFlags); err != nil {
			return fmt.Errorf("set up the port %s: %w", a.hostEnd, err)
		}
		if err := rtnl.AddForwarding(rtnl.ForwardingEntry{Port: a.hostEndIndex, MAC: a.alias.mac}); err != nil {
			return fmt.Errorf("forwarding entry of %s: %w", a.alias.mac, err)
		}
		return nil
	}
	for _, s := range linkSysctls(a.hostEnd) { // before the link is up, so that it never forwards without them
		if err := a.host.setSysctl(s); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetUp(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: a.hostEndIndex}}); err != nil {
		return fmt.Errorf("set %s up: %w", a.hostEnd, err)
	}
	return nil
}

// addRoutes gives the host its way to the container: the neighbour entry and the two routes.
func (a *attacher) addRoutes() error {
	link := a.bridgeIndex
	if link == 0 {
		link = a.hostEndIndex
	}
	n := rtnl.Neighbour{Link: link, Addr: a.alias.addr.Addr(), MAC: a.alias.mac, Protocol: ourProtocol}
	if err := rtnl.PutNeighbour(n); err != nil {
		return fmt.Errorf("neighbour entry of %s: %w", n.Addr, err)
	}
	a.undo = append(a.undo, func() error { return ignoreMissing(rtnl.DeleteNeighbour(n)) })
	for _, table := range containerTables {
		r := a.alias.containerRoute(table, link, a.mtu)
		if err := putRoute(r); err != nil {
			return err
		}
		a.undo = append(a.undo, func() error { return deleteRoute(r) })
	}
	return nil
}

// deleteUDPFlows deletes flows that an earlier holder of the endpoint's UDP ports has left.
func (a *attacher) deleteUDPFlows() error { return deleteUDPFlows(&a.flows, notIdle(a.ports)) }

// writeAlias says that the interface is whole.
func (a *attacher) writeAlias() error {
	return netlink.LinkSetAlias(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: a.hostEndIndex}}, a.alias.String())
}

// ignoreMissing turns the error for an object that does not exist into nil.
func ignoreMissing(err error) error {
	if rtnl.IsNotExist(err) {
		return nil
	}
	return err
}
