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

// ErrAttached says that a container has the endpoint already: its end of the veth lies in another
// namespace, and was left as it is.
var ErrAttached = errors.New("a running container has this interface: end that container first")

// Attach makes a container's interface whole, or not at all. It decides first and acts then; its last
// act is the alias, which says that the interface is whole. A repeat for the same owner clears away
// what a crash left and succeeds. It fails with ErrAttached where a container has the endpoint, and
// with an error that names the other where another owner's link has the address or the MAC.
func (h *Host) Attach(ctx context.Context, e Endpoint) (Attachment, error) {
	a, err := e.normal()
	if err != nil {
		return Attachment{}, fmt.Errorf("attach %q: %w", e.Owner, err)
	}
	at := &attach{h: h, e: e, a: a}
	at.link, at.peer = linkNames(e.Owner)
	at.e.Ports, _ = normalPorts(e.Ports) // looked at by normal
	defer at.close()
	out, err := at.run(ctx)
	if err != nil {
		return Attachment{}, fmt.Errorf("attach %s: %w", e.Owner, err)
	}
	if out.Away {
		at.awaitCarrier()
	}
	return out, nil
}

// awaitCarrier waits, without the lock, until the kernel has taken note that the container's link is up, and that the
// bridge has a port that is. It does so a moment after they are, later while it is busy with links of others, and drops
// what is sent meanwhile. Nearly always it has by now.
func (at *attach) awaitCarrier() {
	for _, index := range []int{at.index, at.bridge} {
		for range 100 {
			l, err := netlink.LinkByIndex(index)
			if index == 0 || err != nil || l.Attrs().OperState == netlink.OperUp {
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
}

// normal checks the wish, and returns what the endpoint's link will say.
func (e Endpoint) normal() (alias, error) {
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
		e.Pod = "" // no pod has such a name, and the alias cannot keep it
	}
	ports, err := normalPorts(e.Ports)
	return alias{addr: e.Addr, mac: e.MAC, nic: nic.String(), bridge: e.Bridge, policy: e.Policy.id(), owner: e.Owner, lease: e.Lease, ports: len(ports), pod: e.Pod}, err
}

// attach is one Attach on its way.
type attach struct {
	h    *Host
	e    Endpoint
	a    alias
	link string // name of the host end
	peer string // name of the container end, while it lies here

	ns     netns.NsHandle   // the container's; not open if the container end stays here
	bridge int              // index of the bridge; 0: transparent
	mtu    int              // bytes
	ports  []Port           // claimed
	rules  ruleset.Endpoint // the endpoint as the nft tables take it

	index, peerIndex int // of the ends, once they are made; peerIndex is of ns
	nsID             int // the host's number for ns
	undo             []func() error

	nft   ruleset.Conn
	flows conntrack.Conn
}

// close comes after the lock was given back: see ruleset.Conn.
func (at *attach) close() {
	at.nft.Close()
	at.flows.Close()
	if at.ns.IsOpen() {
		at.ns.Close()
	}
}

func (at *attach) run(ctx context.Context) (Attachment, error) {
	at.ns = netns.None()
	if at.e.Netns != "" {
		var err error
		if at.ns, err = OpenNetns(at.e.Netns); err != nil {
			return Attachment{}, err
		}
	}
	unlock, err := at.h.lock(ctx, "attach "+at.e.Owner)
	if err != nil {
		return Attachment{}, err
	}
	defer unlock()
	if err := at.clearOld(ctx); err != nil {
		return Attachment{}, err
	}
	secondNIC, err := at.decide(ctx)
	if err != nil {
		return Attachment{}, err
	}
	// The undoing is not deferred: a panic leaves what a crash does, and a repeat finishes it.
	if err := at.act(secondNIC); err != nil {
		return Attachment{}, errors.Join(err, at.undoAll())
	}
	out := Attachment{Owner: at.a.owner, Lease: at.a.lease, Pod: at.a.pod, Link: at.link, Peer: at.peer, Bridge: at.a.bridge, NIC: at.a.nic, Addr: at.a.addr,
		MAC: at.a.mac, MTU: at.mtu, Ports: at.ports, Away: at.ns.IsOpen()}
	if out.Away {
		out.Peer = ""
	}
	return out, nil
}

// clearOld takes away what an earlier attach or half a detach of this owner left.
func (at *attach) clearOld(ctx context.Context) error {
	l, err := netlink.LinkByName(at.link)
	if rtnl.NotThere(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for %s: %w", at.link, err)
	}
	old, whole := endpointOf(l)
	switch {
	case !whole && halfMade(l): // nobody was told of it
		return delLink(l)
	case !whole:
		return fmt.Errorf("a link %s exists that is not ours: an older azure-vnet names its links alike; end the container that it leads to", at.link)
	case !old.is(at.e.Owner):
		return fmt.Errorf("the link %s is of %s, whose name has the same hash: remove this container and make it anew, so that it gets another id", at.link, old.owner)
	case l.Attrs().NetNsID >= 0:
		return fmt.Errorf("%s with %s: %w", at.link, old.addr, ErrAttached)
	}
	d := &detach{h: at.h, link: l, a: old}
	defer d.close()
	if err := d.removeParts(ctx); err != nil {
		return err
	}
	return delLink(l)
}

// syncTables makes the tables what the host needs and the endpoint will.
func (at *attach) syncTables(v *view) error {
	c := v.ruleset()
	c.Endpoints = append(c.Endpoints, at.rules)
	_, err := c.Sync()
	return err
}

// config is as much of the tables' input as the endpoint's own elements rest on.
func (at *attach) config() ruleset.Config {
	return ruleset.Config{Networks: []ruleset.Network{at.e.Policy.network()}}
}

func (at *attach) undoAll() error {
	var errs []error
	for _, undo := range slices.Backward(at.undo) {
		errs = append(errs, undo())
	}
	at.undo = nil
	return errors.Join(errs...)
}

// act makes what decide found to be possible.
func (at *attach) act(secondNIC bool) error {
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"elements", at.addElements},
		{"link", at.makeLink},
		{"port", at.plug},
		{"route", at.addRoutes},
		{"namespace", at.configure},
		{"flows", at.forgetDatagrams},
		{"alias", at.sign},
	} {
		if err := at.h.hook(step.name); err != nil {
			return err
		}
		if err := step.do(); err != nil {
			return err
		}
	}
	if secondNIC {
		return at.h.mendRouting()
	}
	return nil
}

func (at *attach) addElements() error {
	at.undo = append(at.undo, func() error { return at.nft.Remove(at.config(), at.rules) })
	if at.nft.Add(at.config(), at.rules) == nil {
		return nil
	}
	// An element that a killed process left for this address is in the way.
	v, err := at.h.readEndpoints()
	if err != nil {
		return err
	}
	return at.syncTables(v)
}

// makeLink makes the pair, with the container end in its namespace.
func (at *attach) makeLink() error {
	pair := rtnl.Veth{Name: at.link, MAC: hostMAC(at.a.addr.Addr()), Group: at.a.group(), Master: at.bridge, Up: at.bridge != 0,
		PeerName: at.peer, PeerMAC: at.a.mac, PeerNS: -1, MTU: at.mtu}
	if at.ns.IsOpen() {
		pair.PeerName, pair.PeerNS = at.e.IfName, int(at.ns)
	}
	err := pair.Create()
	switch {
	case errors.Is(err, unix.EEXIST) && at.ns.IsOpen():
		return fmt.Errorf("make %s: %w: if %s is in %s already, remove it or ask for another name", at.link, err, pair.PeerName, at.e.Netns)
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("make %s: %w: the kernel has no veth: load the module veth", at.link, err)
	case errors.Is(err, unix.EXFULL) || errors.Is(err, unix.EBUSY) && at.bridge != 0:
		return fmt.Errorf("make %s a port of %s: %w: a bridge takes 1,023 ports: end other containers, or use mode transparent, which has no bridge", at.link, at.a.bridge, err)
	case err != nil:
		return fmt.Errorf("make %s and %s: %w", at.link, pair.PeerName, err)
	}
	l, err := netlink.LinkByName(at.link)
	if err != nil {
		return fmt.Errorf("find %s again: %w", at.link, err)
	}
	at.undo = append(at.undo, func() error { return delLink(l) })
	at.index, at.peerIndex, at.nsID = l.Attrs().Index, l.Attrs().ParentIndex, l.Attrs().NetNsID
	return nil
}

// plug makes the host end a well-behaved port, or, transparent, a link that stands alone.
func (at *attach) plug() error {
	if at.bridge != 0 {
		if err := at.h.setSysctl(noIPv6(at.link)); err != nil {
			return err
		}
		if err := rtnl.SetPortFlags(at.index, portFlags); err != nil {
			return fmt.Errorf("set up the port %s: %w", at.link, err)
		}
		if err := rtnl.AddForwarding(rtnl.ForwardingEntry{Port: at.index, MAC: at.a.mac}); err != nil {
			return fmt.Errorf("forwarding entry of %s: %w", at.a.mac, err)
		}
		return nil
	}
	for _, s := range linkSysctls(at.link) { // before it is up
		if err := at.h.setSysctl(s); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetUp(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: at.index}}); err != nil {
		return fmt.Errorf("set %s up: %w", at.link, err)
	}
	return nil
}

// addRoutes tells the host its way to the container.
func (at *attach) addRoutes() error {
	link := at.bridge
	if link == 0 {
		link = at.index
	}
	n := rtnl.Neighbour{Link: link, Addr: at.a.addr.Addr(), MAC: at.a.mac, Protocol: ourProtocol}
	if err := rtnl.PutNeighbour(n); err != nil {
		return fmt.Errorf("neighbour entry of %s: %w", n.Addr, err)
	}
	at.undo = append(at.undo, func() error { return ignoreMissing(rtnl.DelNeighbour(n)) })
	for _, table := range containerTables {
		r := at.a.route(table, link, at.mtu)
		if err := putRoute(r); err != nil {
			return err
		}
		at.undo = append(at.undo, func() error { return delRoute(r) })
	}
	return nil
}

func (at *attach) forgetDatagrams() error { return forgetDatagrams(&at.flows, live(at.ports)) }

// sign says that the interface is whole.
func (at *attach) sign() error {
	return netlink.LinkSetAlias(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: at.index}}, at.a.String())
}

func ignoreMissing(err error) error {
	if rtnl.NotThere(err) {
		return nil
	}
	return err
}
