// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/firewalld"
	"azurevnet/bridge/internal/rtnl"
	"azurevnet/bridge/internal/ruleset"
)

// watchPause is how long Watch lets events gather before it tells of them.
const watchPause = 200 * time.Millisecond

// Watch calls changed whenever something that Reconcile looks after may have changed: our links and bridge ports,
// the NICs, our routes, rules, neighbour and forwarding entries, our nft tables, the rules of iptables-nft's FORWARD,
// those sysctls that the kernel tells of (forwarding, rp_filter and proxy_arp), and firewalld's zones. Events of 200 ms
// are one call, and events that the kernel could not deliver are one too. A new endpoint is no event if it stands within
// 200 ms: its attach needs no mending. One that has no alias then, or is down, was left by a crash. Elements of the
// tables are no event: they come and go with endpoints. Legacy iptables tells nobody.
//
// It works on the calling goroutine alone, so that it stays in the caller's namespace, but for the system bus, whose
// socket is a file. It returns ctx's error when ctx ends.
func (h *Host) Watch(ctx context.Context, changed func()) error {
	w := &watcher{host: h, linkKinds: map[int32]linkKind{}, unready: map[int32]bool{}, whole: map[int32]endState{}}
	if err := w.openSockets(); err != nil {
		w.closeSockets()
		return fmt.Errorf("watch the host's network: %w", err)
	}
	defer w.closeSockets()
	stop := context.AfterFunc(ctx, func() { w.wake.Write([]byte{0}) })
	defer stop()
	bus, leave := context.WithCancel(ctx)
	var listens sync.WaitGroup
	listens.Go(func() { firewalld.Watch(bus, h.systemBus(), func() { w.wake.Write([]byte{0}) }) })
	defer listens.Wait()
	defer leave()
	var due time.Time
	told := false
	for ctx.Err() == nil {
		wait := -1
		if !due.IsZero() {
			wait = max(0, int(time.Until(due).Milliseconds())+1)
		}
		if _, err := unix.Poll(w.fds, wait); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("watch the host's network: %w", err)
		}
		if ctx.Err() != nil {
			break
		}
		seen, err := w.readEvents()
		if err != nil {
			return fmt.Errorf("watch the host's network: %w", err)
		}
		told = told || seen
		if (told || len(w.unready) > 0) && due.IsZero() {
			due = time.Now().Add(watchPause)
		}
		if due.IsZero() || time.Now().Before(due) {
			continue
		}
		due = time.Time{}
		if told || len(w.unready) > 0 {
			told = false
			clear(w.unready)
			changed()
		}
	}
	return ctx.Err()
}

type watcher struct {
	host        *Host
	fds         []unix.PollFd // the end of the pipe that ctx and firewalld write to, then a socket for rtnetlink and one for nf_tables
	woken, wake *os.File
	linkKinds   map[int32]linkKind // links by index
	unready     map[int32]bool     // indexes of endpoints' links that do not stand yet
	whole       map[int32]endState // endpoints' links that stand, by index
	buf         [1 << 16]byte
}

// linkKind is what a link is to us.
type linkKind int

const (
	foreignLink linkKind = iota + 1
	nicLink
	bridgeLink
	endLink // the host end of an endpoint
)

// endState is what an endpoint's link must keep while it stands.
type endState struct {
	master, mtu, group uint32
	mac                string
}

// openSockets subscribes first and then reads what is there, so that nothing falls
// between.
func (w *watcher) openSockets() (err error) {
	if w.woken, w.wake, err = os.Pipe(); err != nil {
		return err
	}
	w.fds = append(w.fds, unix.PollFd{Fd: int32(w.woken.Fd()), Events: unix.POLLIN})
	for _, s := range []struct {
		family int
		groups []int
	}{
		{unix.NETLINK_ROUTE, []int{unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV4_NETCONF}},
		{unix.NETLINK_NETFILTER, []int{unix.NFNLGRP_NFTABLES}},
	} {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, s.family)
		if err != nil {
			return err
		}
		w.fds = append(w.fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
		if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return err
		}
		for _, g := range s.groups {
			if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, g); err != nil {
				return err
			}
		}
	}
	return w.readLinkKinds()
}

func (w *watcher) closeSockets() {
	for _, fd := range w.fds[min(1, len(w.fds)):] {
		unix.Close(int(fd.Fd))
	}
	if w.woken != nil {
		w.woken.Close()
		w.wake.Close()
	}
}

// readLinkKinds notes what each link is.
func (w *watcher) readLinkKinds() error {
	links, err := rtnl.ReadLinks()
	if err != nil {
		return err
	}
	s, err := w.host.readState()
	if err != nil {
		return err
	}
	clear(w.linkKinds)
	clear(w.whole)
	for _, l := range links {
		w.linkKinds[int32(l.Attrs().Index)] = foreignLink
		if _, ours := bridgeAliasOf(l); ours {
			w.linkKinds[int32(l.Attrs().Index)] = bridgeLink
		} else if l.Attrs().Group == ruleset.GroupBridge || l.Attrs().Group == ruleset.GroupTransparent {
			w.linkKinds[int32(l.Attrs().Index)] = endLink
			if _, whole := endpointAliasOf(l); whole && l.Attrs().Flags&net.FlagUp != 0 {
				w.whole[int32(l.Attrs().Index)] = endState{uint32(l.Attrs().MasterIndex), uint32(l.Attrs().MTU), l.Attrs().Group, l.Attrs().HardwareAddr.String()}
			}
		}
	}
	macs := slices.Collect(maps.Keys(s.NICs))
	for _, b := range ourBridges(links) {
		macs = append(macs, b.NICMAC)
	}
	for _, mac := range macs {
		if nic, err := findNIC(links, mac, s.NICs[mac].Name); err == nil {
			w.linkKinds[int32(nic.Attrs().Index)] = nicLink
		}
	}
	return nil
}

// readEvents takes all that the sockets hold and tells whether any of it matters.
func (w *watcher) readEvents() (seen bool, err error) {
	if w.fds[0].Revents&unix.POLLIN != 0 {
		_, _ = unix.Read(int(w.fds[0].Fd), w.buf[:])
		w.fds[0].Revents = 0 // an interrupted poll leaves it as it is, and the next read would wait
		seen = true
	}
	for i, fd := range w.fds[1:] {
		for {
			n, _, err := unix.Recvfrom(int(fd.Fd), w.buf[:], 0)
			if errors.Is(err, unix.EAGAIN) {
				break
			}
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if errors.Is(err, unix.ENOBUFS) { // events were lost: any may have been ours
				seen = true
				if err := w.readLinkKinds(); err != nil {
					return false, err
				}
				continue
			}
			if err != nil {
				return false, err
			}
			messages, err := syscall.ParseNetlinkMessage(w.buf[:n])
			if err != nil {
				return false, err
			}
			for _, m := range messages {
				if i == 0 {
					seen = w.concernsRouteEvent(m) || seen
				} else {
					seen = concernsTableEvent(m) || seen
				}
			}
		}
	}
	return seen, nil
}

// concernsRouteEvent reports whether an event of rtnetlink may have broken something of ours, or asks for something new.
func (w *watcher) concernsRouteEvent(m syscall.NetlinkMessage) bool {
	switch m.Header.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		switch {
		case len(m.Data) < unix.SizeofIfInfomsg:
			return false
		case m.Data[0] == unix.AF_BRIDGE:
			return m.Header.Type == unix.RTM_NEWLINK && w.concernsBridgePort(m)
		}
		return m.Data[0] == unix.AF_UNSPEC && w.concernsLink(m)
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		return len(m.Data) >= unix.SizeofNdMsg && w.concernsNeighbour(m)
	case unix.RTM_NEWNETCONF:
		return len(m.Data) >= sizeofNetconfmsg && w.concernsSysctl(m)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		return len(m.Data) >= unix.SizeofIfAddrmsg && w.linkKinds[int32(native.Uint32(m.Data[4:]))] > foreignLink
	case unix.RTM_NEWRULE: // which may stand before the rule that leads to containers
		return len(m.Data) >= unix.SizeofRtMsg && protocolOf(m) != ourProtocol
	case unix.RTM_DELROUTE, unix.RTM_DELRULE:
		return len(m.Data) >= unix.SizeofRtMsg && protocolOf(m) == ourProtocol
	}
	return false
}

// concernsLink keeps account of the links. A link that is new may be a NIC, or a VPN's that containers are to
// leave by.
func (w *watcher) concernsLink(m syscall.NetlinkMessage) bool {
	index := int32(native.Uint32(m.Data[4:]))
	up := native.Uint32(m.Data[8:])&unix.IFF_UP != 0
	name, alias, now := "", "", endState{}
	for kind, v := range rtnl.Attributes(m.Data, unix.SizeofIfInfomsg) {
		switch kind {
		case unix.IFLA_IFNAME:
			name = unix.ByteSliceToString(v)
		case unix.IFLA_IFALIAS:
			alias = unix.ByteSliceToString(v)
		case unix.IFLA_GROUP:
			now.group = native.Uint32(v)
		case unix.IFLA_MASTER:
			now.master = native.Uint32(v)
		case unix.IFLA_MTU:
			now.mtu = native.Uint32(v)
		case unix.IFLA_ADDRESS:
			now.mac = net.HardwareAddr(v).String()
		}
	}
	was, seen := w.linkKinds[index]
	if m.Header.Type == unix.RTM_DELLINK {
		delete(w.linkKinds, index)
		delete(w.unready, index)
		delete(w.whole, index)
		return was > foreignLink
	}
	ours := now.group == ruleset.GroupBridge || now.group == ruleset.GroupTransparent
	switch {
	case strings.HasPrefix(alias, bridgeAlias):
		w.linkKinds[index] = bridgeLink
	case was == endLink || ours && strings.HasPrefix(name, hostPrefix):
		w.linkKinds[index] = endLink
		before, stood := w.whole[index]
		if _, whole := parseAlias(alias); !whole || !up || !ours {
			w.unready[index] = true
			delete(w.whole, index)
			return stood // routes die when a link is down, also where it is up again at once
		}
		delete(w.unready, index)
		w.whole[index] = now
		return stood && now != before
	case !seen:
		w.linkKinds[index] = foreignLink
		return !strings.HasPrefix(name, peerPrefix)
	}
	return was > foreignLink
}

// concernsBridgePort looks at the flags of a bridge port. While an endpoint is made they are not set yet.
func (w *watcher) concernsBridgePort(m syscall.NetlinkMessage) bool {
	if _, stands := w.whole[int32(native.Uint32(m.Data[4:]))]; !stands {
		return false
	}
	for kind, v := range rtnl.Attributes(m.Data, unix.SizeofIfInfomsg) {
		if kind != unix.IFLA_PROTINFO {
			continue
		}
		for kind, v := range rtnl.Attributes(v, 0) {
			if slices.ContainsFunc(slices.Concat(bridgePortFlags, bridgePortDefaults), func(f rtnl.PortFlag) bool { return f.Kind == kind && !f.Matches(v) }) {
				return true
			}
		}
	}
	return false
}

// concernsNeighbour looks for a neighbour entry of ours that is deleted, and for a forwarding entry of a bridge of
// ours that is deleted or now names another port. Neighbours that come are no event: the host learns them all the
// time.
func (w *watcher) concernsNeighbour(m syscall.NetlinkMessage) bool {
	link, gone := int32(native.Uint32(m.Data[4:])), m.Header.Type == unix.RTM_DELNEIGH
	protocol, master := byte(0), int32(0)
	for kind, v := range rtnl.Attributes(m.Data, unix.SizeofNdMsg) {
		switch {
		case kind == rtnl.NDAProtocol && len(v) == 1:
			protocol = v[0]
		case kind == rtnl.NDAMaster && len(v) == 4:
			master = int32(native.Uint32(v))
		}
	}
	if m.Data[0] != unix.AF_BRIDGE {
		return gone && protocol == ourProtocol
	}
	_, stands := w.whole[link]
	return w.linkKinds[master] == bridgeLink && (gone || stands || w.linkKinds[link] == foreignLink)
}

// Of linux/netconf.h, which no library here names.
const (
	sizeofNetconfmsg = 4 // bytes of struct netconfmsg, padded
	netconfaIfindex  = 1
	netconfaAll      = -1 // index that stands for all links
)

// concernsSysctl looks for a setting of a link that stands, or of all links.
func (w *watcher) concernsSysctl(m syscall.NetlinkMessage) bool {
	for kind, v := range rtnl.Attributes(m.Data, sizeofNetconfmsg) {
		if kind == netconfaIfindex && len(v) == 4 {
			index := int32(native.Uint32(v))
			_, stands := w.whole[index]
			return stands || index == netconfaAll || w.linkKinds[index] == nicLink || w.linkKinds[index] == bridgeLink
		}
	}
	return false
}

// protocolOf is who made the route or rule of an event.
func protocolOf(m syscall.NetlinkMessage) byte {
	if m.Header.Type != unix.RTM_DELRULE && m.Header.Type != unix.RTM_NEWRULE {
		return m.Data[5] // struct rtmsg
	}
	for kind, v := range rtnl.Attributes(m.Data, unix.SizeofRtMsg) {
		if kind == unix.FRA_PROTOCOL && len(v) == 1 {
			return v[0]
		}
	}
	return 0
}

// concernsTableEvent reports whether an event of nf_tables is of a table of ours, or of the one that has iptables-nft's
// FORWARD chain. Every object but a transaction's end has its table's name as attribute 1.
func concernsTableEvent(m syscall.NetlinkMessage) bool {
	switch m.Header.Type & 0xff {
	case unix.NFT_MSG_NEWGEN, unix.NFT_MSG_NEWSETELEM, unix.NFT_MSG_DELSETELEM:
		return false
	}
	for kind, v := range rtnl.Attributes(m.Data, nl.SizeofNfgenmsg) {
		if kind == 1 {
			name := unix.ByteSliceToString(v)
			return name == ruleset.Name || name == "filter" && m.Data[0] == unix.NFPROTO_IPV4
		}
	}
	return false
}

var native = binary.NativeEndian
