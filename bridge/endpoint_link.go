// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// makeLink makes the veth and what hangs on it.
func (at *attaching) makeLink() error {
	ns := netns.None()
	if at.e.Netns != "" {
		var err error
		if ns, err = containerNamespace(at.e.Netns); err != nil {
			return err
		}
		defer ns.Close()
	}
	if err := at.h.at("link"); err != nil {
		return err
	}
	if err := at.createVeth(ns); err != nil {
		return err
	}
	l, err := at.nl.LinkByName(at.host)
	if err != nil {
		return fmt.Errorf("find %s again: %w", at.host, err)
	}
	at.undo = append(at.undo, func() error { return delLink(at.nl, l) })
	if err := at.h.at("port"); err != nil {
		return err
	}
	if err := setPort(l.Attrs().Index); err != nil {
		return fmt.Errorf("port %s: %w", at.host, err)
	}
	if err := at.h.at("fdb"); err != nil {
		return err
	}
	if err := at.nl.NeighSet(forwarding(l.Attrs().Index, at.a.mac)); err != nil {
		return fmt.Errorf("forwarding entry of %s: %w", at.host, err)
	}
	if at.e.Netns != "" {
		if err := at.h.at("namespace"); err != nil {
			return err
		}
		if err := at.e.configure(ns, l.Attrs().ParentIndex); err != nil {
			return fmt.Errorf("%s in %s: %w", at.e.IfName, at.e.Netns, err)
		}
	}
	if err := at.publish(); err != nil {
		return err
	}
	if err := at.h.at("alias"); err != nil {
		return err
	}
	return at.nl.LinkSetAlias(l, at.a.String())
}

// containerNamespace opens the namespace at path, which must not be the host's.
func containerNamespace(path string) (netns.NsHandle, error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return netns.None(), fmt.Errorf("the container's network namespace: %w", &os.PathError{Op: "open", Path: path, Err: err})
	}
	own, err := netns.Get()
	if err != nil {
		ns.Close()
		return netns.None(), err
	}
	defer own.Close()
	if ns.Equal(own) {
		ns.Close()
		return netns.None(), fmt.Errorf("%s is the host's own network namespace", path)
	}
	return ns, nil
}

// createVeth makes both ends in one message: each with its MAC, since udev
// rewrites one that the kernel drew, the host's end up and in the bridge, the
// container's in ns where that is open.
func (at *attaching) createVeth(ns netns.NsHandle) error {
	mtu := nl.Uint32Attr(uint32(at.bridge.MTU))
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Flags, msg.Change = unix.IFF_UP, unix.IFF_UP
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(at.host)))
	req.AddData(nl.NewRtAttr(unix.IFLA_ADDRESS, hostMAC(at.a.addr.Addr())))
	req.AddData(nl.NewRtAttr(unix.IFLA_MTU, mtu))
	req.AddData(nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(at.bridge.Index))))
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("veth"))
	peer := info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(nl.VETH_INFO_PEER, nil)
	nl.NewIfInfomsgChild(peer, unix.AF_UNSPEC)
	name := at.peer
	if ns.IsOpen() {
		name = at.e.IfName
		peer.AddRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(ns)))
	}
	peer.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name))
	peer.AddRtAttr(unix.IFLA_ADDRESS, at.a.mac)
	peer.AddRtAttr(unix.IFLA_MTU, mtu)
	req.AddData(info)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	if errors.Is(err, unix.EEXIST) && ns.IsOpen() {
		return fmt.Errorf("make %s: %w; is there a %s in %s already?", at.host, err, name, at.e.Netns)
	}
	if err != nil {
		return fmt.Errorf("make %s and %s: %w", at.host, name, err)
	}
	return nil
}

// configure gives the container's end, interface index of ns, its address and,
// unless its network is internal, its default route. Its lo is the runtime's.
func (e Endpoint) configure(ns netns.NsHandle, index int) error {
	in, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer in.Close()
	l := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index, Name: e.IfName}}
	if err := in.AddrAdd(l, &netlink.Addr{IPNet: ipNet(e.Addr)}); err != nil {
		return fmt.Errorf("address %s: %w", e.Addr, err)
	}
	if err := in.LinkSetUp(l); err != nil {
		return fmt.Errorf("up: %w", err)
	}
	if e.Policy.Internal {
		return nil
	}
	via := &netlink.Route{LinkIndex: index, Gw: e.Gateway.AsSlice()}
	if !e.Addr.Masked().Contains(e.Gateway) {
		via.Flags = int(netlink.FLAG_ONLINK)
	}
	err = in.RouteAdd(via)
	if errors.Is(err, unix.EEXIST) { // another interface of the container was first, and goes before
		via.Priority = index
		err = in.RouteAdd(via)
	}
	if err != nil {
		return fmt.Errorf("default route via %s: %w", e.Gateway, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}
}

// portFlags are what a port of an endpoint differs in from a new one. Nothing is
// learnt from a container and nothing unknown is flooded to it: its MAC is
// pinned. Hairpin, since a service's address may lead back to the same container.
var portFlags = []struct {
	attr  int
	name  string
	value byte
}{
	{nl.IFLA_BRPORT_MODE, "hairpin", 1},
	{nl.IFLA_BRPORT_LEARNING, "learning", 0},
	{nl.IFLA_BRPORT_UNICAST_FLOOD, "flood", 0},
	{nl.IFLA_BRPORT_MCAST_FLOOD, "mcast_flood", 1},
}

func setPort(index int) error {
	req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_BRIDGE)
	msg.Index = int32(index)
	req.AddData(msg)
	port := nl.NewRtAttr(unix.IFLA_PROTINFO|unix.NLA_F_NESTED, nil)
	for _, f := range portFlags {
		port.AddRtAttr(f.attr, []byte{f.value})
	}
	req.AddData(port)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// forwarding is the static entry of the container's MAC on its port.
func forwarding(port int, mac net.HardwareAddr) *netlink.Neigh {
	return &netlink.Neigh{LinkIndex: port, Family: unix.AF_BRIDGE, Flags: netlink.NTF_MASTER, State: netlink.NUD_NOARP, HardwareAddr: mac}
}

// neighbourFor is the host's own knowledge of the container's MAC. The protocol
// tells that it is ours to take away.
func neighbourFor(bridge int, a alias) message {
	m := make(message, neighbours.header)
	m[0] = unix.AF_INET
	native.PutUint32(m[4:], uint32(bridge))
	native.PutUint16(m[8:], unix.NUD_PERMANENT)
	m = appendAttr(m, unix.NDA_DST, a.addr.Addr().AsSlice())
	m = appendAttr(m, unix.NDA_LLADDR, a.mac)
	return appendAttr(m, ndaProtocol, []byte{ourProtocol})
}

func delLink(h *netlink.Handle, l netlink.Link) error {
	if err := h.LinkDel(l); err != nil && !absent(err) {
		return fmt.Errorf("delete %s: %w", l.Attrs().Name, err)
	}
	return nil
}
