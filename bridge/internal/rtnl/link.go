// Copyright (c) The azure-vnet authors. MIT licence.

package rtnl

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"azurevnet/internal/dump"
)

// Veth describes a pair of veth links. Both MACs are given, because udev changes a MAC that the kernel chose.
type Veth struct {
	Name   string           // of the end that stays in the calling thread's namespace
	MAC    net.HardwareAddr // of that end
	Group  uint32           // of that end: a mark that the link has from its first moment
	Master int              // index of the bridge that that end becomes a port of; 0: none
	Up     bool             // that end is up at once

	PeerName string           // of the other end
	PeerMAC  net.HardwareAddr // of the other end
	PeerNS   int              // file descriptor of the other end's namespace; negative: the same namespace

	MTU int // of both ends, in bytes
}

// Create makes the pair in one message. The other end is down afterwards: the kernel refuses to create it up.
// The error is unix.EEXIST if either name is in use.
func (v Veth) Create() error {
	r := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	if v.Up {
		msg.Flags, msg.Change = unix.IFF_UP, unix.IFF_UP
	}
	r.AddData(msg)
	mtu := nl.Uint32Attr(uint32(v.MTU))
	r.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(v.Name)))
	r.AddData(nl.NewRtAttr(unix.IFLA_ADDRESS, v.MAC))
	r.AddData(nl.NewRtAttr(unix.IFLA_MTU, mtu))
	r.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(v.Group)))
	if v.Master != 0 {
		r.AddData(nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(v.Master))))
	}
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("veth"))
	peer := info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(nl.VETH_INFO_PEER, nil)
	nl.NewIfInfomsgChild(peer, unix.AF_UNSPEC)
	if v.PeerNS >= 0 {
		peer.AddRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(v.PeerNS)))
	}
	peer.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(v.PeerName))
	peer.AddRtAttr(unix.IFLA_ADDRESS, v.PeerMAC)
	peer.AddRtAttr(unix.IFLA_MTU, mtu)
	r.AddData(info)
	return execute(r)
}

// PortFlag is a setting of a bridge port.
type PortFlag struct {
	Kind  uint16
	Name  string // as the command bridge writes it, such as learning
	Value uint16
}

// encode returns the value in the size that the kernel takes.
func (f PortFlag) encode() []byte {
	if f.Kind == nl.IFLA_BRPORT_GROUP_FWD_MASK {
		return binary.NativeEndian.AppendUint16(nil, f.Value)
	}
	return []byte{byte(f.Value)}
}

// PortFlags are the flags of one bridge port, by kind. A kernel does not tell the flags that it does not
// know.
type PortFlags map[uint16]uint16

// SetPortFlags sets flags of the bridge port with that link index.
func SetPortFlags(index int, flags []PortFlag) error {
	r := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_BRIDGE)
	msg.Index = int32(index)
	r.AddData(msg)
	port := nl.NewRtAttr(unix.IFLA_PROTINFO|unix.NLA_F_NESTED, nil)
	for _, f := range flags {
		port.AddRtAttr(int(f.Kind), f.encode())
	}
	r.AddData(port)
	return execute(r)
}

// ReadPortFlags reads the flags of the ports of all bridges, by link index.
func ReadPortFlags() (map[int]PortFlags, error) {
	messages, err := dump.Whole(func() ([][]byte, error) {
		r := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)
		r.AddData(nl.NewIfInfomsg(unix.AF_BRIDGE))
		return r.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	})
	if err != nil {
		return nil, err
	}
	all := map[int]PortFlags{}
	for _, m := range messages {
		if len(m) >= unix.SizeofIfInfomsg {
			all[linkIndexOf(m)] = parsePortFlags(m)
		}
	}
	return all, nil
}

// parsePortFlags decodes the flags of the port that a message of the bridge family is about.
func parsePortFlags(message []byte) PortFlags {
	flags := PortFlags{}
	for kind, value := range nested(message, unix.SizeofIfInfomsg, unix.IFLA_PROTINFO) {
		switch len(value) {
		case 1:
			flags[kind] = uint16(value[0])
		case 2:
			flags[kind] = binary.NativeEndian.Uint16(value)
		}
	}
	return flags
}

// BridgeSettings are settings of a bridge that the netlink library does not read.
type BridgeSettings struct {
	STP           bool // the kernel, or a program in its place, speaks the spanning tree protocol on the bridge
	VLANFiltering bool
}

// ReadBridgeSettings reads the settings of the bridge with that link index. If there is no such link, the error
// is one that IsNotExist reports.
func ReadBridgeSettings(index int) (b BridgeSettings, err error) {
	message, err := getLink(index)
	if err != nil {
		return b, err
	}
	for kind, info := range nested(message, unix.SizeofIfInfomsg, unix.IFLA_LINKINFO) {
		if kind != nl.IFLA_INFO_DATA {
			continue
		}
		for kind, value := range attributes(info) {
			switch {
			case kind == nl.IFLA_BR_STP_STATE && len(value) == 4:
				b.STP = binary.NativeEndian.Uint32(value) != 0
			case kind == nl.IFLA_BR_VLAN_FILTERING && len(value) == 1:
				b.VLANFiltering = value[0] != 0
			}
		}
	}
	return b, nil
}

// StopSTP switches off the spanning tree protocol on the bridge with that link index.
func StopSTP(index int) error {
	return setBridgeSetting(index, nl.IFLA_BR_STP_STATE, nl.Uint32Attr(0))
}

// StopVLANFiltering switches off the filtering of VLANs on the bridge with that link index.
func StopVLANFiltering(index int) error {
	return setBridgeSetting(index, nl.IFLA_BR_VLAN_FILTERING, []byte{0})
}

// setBridgeSetting sets one setting. Each has a message of its own, because a kernel refuses a whole message
// with a setting that it does not know.
func setBridgeSetting(index, kind int, value []byte) error {
	r := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	r.AddData(msg)
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("bridge"))
	info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(kind, value)
	r.AddData(info)
	return execute(r)
}

// ReadLinkInNamespace reads the name and the MAC of the link with that index in another namespace. nsID is this
// namespace's number for it. Linux before 4.15 cannot do this: found is then false.
func ReadLinkInNamespace(nsID, index int) (name string, mac net.HardwareAddr, found bool, err error) {
	message, err := getLink(index, nl.NewRtAttr(unix.IFLA_TARGET_NETNSID, nl.Uint32Attr(uint32(nsID))))
	if err != nil {
		return "", nil, false, err
	}
	for kind, value := range Attributes(message, unix.SizeofIfInfomsg) {
		switch kind {
		case unix.IFLA_IFNAME:
			name = string(bytes.TrimRight(value, "\x00"))
		case unix.IFLA_ADDRESS:
			mac = net.HardwareAddr(value)
		case unix.IFLA_TARGET_NETNSID: // without it the kernel has ignored the number, and answered with a link of this namespace
			found = true
		}
	}
	return name, mac, found, nil
}

// HasNetAdmin reports whether this process may change the network of its namespace: whether it has
// CAP_NET_ADMIN in the user namespace that the network belongs to. The kernel checks this before it reads the
// message. The message names no link, so it changes nothing.
func HasNetAdmin() bool {
	r := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	r.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	err := execute(r)
	return !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES)
}

// getLink reads one link. The attributes are added to the request.
func getLink(index int, more ...nl.NetlinkRequestData) ([]byte, error) {
	r := nl.NewNetlinkRequest(unix.RTM_GETLINK, 0)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	r.AddData(msg)
	for _, attr := range more {
		r.AddData(attr)
	}
	messages, err := r.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if err == nil && len(messages) == 0 {
		err = unix.ENODEV
	}
	if err != nil {
		return nil, err
	}
	return messages[0], nil
}
