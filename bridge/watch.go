// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
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

	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/firewalld"
	"azurevnet/bridge/internal/forward"
	"azurevnet/bridge/internal/rtnl"
	"azurevnet/bridge/internal/ruleset"
)

// watchPause is how long Watch gathers events before it calls changed once for all of them.
const watchPause = 200 * time.Millisecond

// Watch calls changed whenever something may have changed that Reconcile looks after:
//
//   - our links and bridge ports, and the NICs;
//   - our routes, routing rules, neighbour entries and forwarding entries;
//   - our nft tables, and the table of iptables-nft's FORWARD chain;
//   - sysctls, as far as the kernel tells of them: forwarding, rp_filter and proxy_arp;
//   - firewalld's zones.
//
// All events of 200 ms are one call. If the kernel could not deliver an event, changed is called too. Legacy iptables
// sends no event. The first call comes without an event, as soon as Watch listens: nobody saw the changes before that.
//
// Two changes of each container are no event, because its attach or detach makes them completely. One is a change of
// elements of the nft tables. The other is a new endpoint that is whole and up within 200 ms. An endpoint that has no
// alias by then, or is down, was left by a crash.
//
// Watch works on the calling goroutine, so that it stays in the caller's network namespace. Only the system bus has a
// goroutine of its own: its socket is a file, and belongs to no network namespace. Watch returns ctx's error when ctx
// ends, and any error of a socket at once.
func (h *Host) Watch(ctx context.Context, changed func()) error {
	w := &watcher{host: h, linkKinds: map[int]linkKind{}, unready: map[int]bool{}, ready: map[int]endState{}}
	if err := w.openSockets(); err != nil {
		w.closeSockets()
		return fmt.Errorf("watch the host's network: %w", err)
	}
	defer w.closeSockets()
	stop := context.AfterFunc(ctx, func() { w.wake.Write([]byte{0}) })
	defer stop()
	busCtx, leaveBus := context.WithCancel(ctx)
	var busListener sync.WaitGroup
	busListener.Go(func() { firewalld.Watch(busCtx, h.systemBus(), func() { w.wake.Write([]byte{0}) }) })
	defer busListener.Wait() // after leaveBus
	defer leaveBus()
	pending := true                      // a change has not been told yet
	callAt := time.Now().Add(watchPause) // when to call changed; zero: not before another event
	for ctx.Err() == nil {
		timeout := -1 // milliseconds; -1: none
		if !callAt.IsZero() {
			timeout = max(0, int(time.Until(callAt).Milliseconds())+1)
		}
		if _, err := unix.Poll(w.fds, timeout); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("watch the host's network: %w", err)
		}
		if ctx.Err() != nil {
			break
		}
		seen, err := w.readEvents()
		if err != nil {
			return fmt.Errorf("watch the host's network: %w", err)
		}
		pending = pending || seen
		if (pending || len(w.unready) > 0) && callAt.IsZero() {
			callAt = time.Now().Add(watchPause)
		}
		if callAt.IsZero() || time.Now().Before(callAt) {
			continue
		}
		callAt = time.Time{}
		if pending || len(w.unready) > 0 { // host ends that became ready in time are no longer unready
			pending = false
			clear(w.unready)
			changed()
		}
	}
	return ctx.Err()
}

// watcher is the state of one Watch.
type watcher struct {
	host        *Host
	fds         []unix.PollFd // the pipe's end that is read, a socket of rtnetlink, a socket of nf_tables, in this order
	woken, wake *os.File      // both ends of a pipe: a byte in it ends a poll, when ctx ends or firewalld changed
	buf         [1 << 16]byte // bytes: larger than any message of the kernel

	// The state of links as events have told it, by link index.
	linkKinds map[int]linkKind // every link of the host
	unready   map[int]bool     // host ends that are not ready: being made, or left by a crash
	ready     map[int]endState // host ends that are ready: whole, and up
}

// linkKind says what a link is to us.
type linkKind int

// A higher kind than foreignLink is one that Reconcile looks after.
const (
	foreignLink linkKind = iota + 1
	nicLink
	bridgeLink
	endLink // the host end of an endpoint
)

// endState is what must not change of a host end while it is ready. A change of it is an event.
type endState struct {
	master     int // index of its bridge; 0: transparent
	mtu, group uint32
	mac        string
}

// openSockets joins the groups first and reads the links then. In the other order, a link that is made in between
// would be missed.
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

// readLinkKinds reads anew what each link is. It forgets which host ends were ready.
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
	clear(w.ready)
	for _, l := range links {
		w.linkKinds[l.Attrs().Index] = foreignLink
		if _, ours := bridgeAliasOf(l); ours {
			w.linkKinds[l.Attrs().Index] = bridgeLink
		} else if l.Attrs().Group == ruleset.GroupBridge || l.Attrs().Group == ruleset.GroupTransparent {
			w.linkKinds[l.Attrs().Index] = endLink
			if _, whole := endpointAliasOf(l); whole && l.Attrs().Flags&net.FlagUp != 0 {
				w.ready[l.Attrs().Index] = endState{l.Attrs().MasterIndex, uint32(l.Attrs().MTU), l.Attrs().Group, l.Attrs().HardwareAddr.String()}
			}
		}
	}
	macs := slices.Collect(maps.Keys(s.NICs))
	for _, b := range ourBridges(links) {
		macs = append(macs, b.NICMAC)
	}
	for _, mac := range macs {
		if nic, err := findNIC(links, mac, s.NICs[mac].Name); err == nil {
			w.linkKinds[nic.Attrs().Index] = nicLink
		}
	}
	return nil
}

// readEvents takes all events out of the sockets and reports whether any of them concerns us. It does not wait. After
// an overflow it reads the links anew: any of the lost events may have concerned us.
func (w *watcher) readEvents() (seen bool, err error) {
	if w.fds[0].Revents&unix.POLLIN != 0 {
		_, _ = unix.Read(int(w.fds[0].Fd), w.buf[:])
		w.fds[0].Revents = 0 // an interrupted poll does not reset it, and the next read of the empty pipe would wait
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
			if errors.Is(err, unix.ENOBUFS) {
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
					seen = ruleset.ConcernsEvent(m) || forward.ConcernsEvent(m) || seen
				}
			}
		}
	}
	return seen, nil
}

// concernsRouteEvent reports whether an event of rtnetlink may have broken something of ours, or may ask for something
// new.
func (w *watcher) concernsRouteEvent(m syscall.NetlinkMessage) bool {
	switch m.Header.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		e, ok := rtnl.ParseLinkEvent(m)
		if ok && e.ByBridge {
			return w.concernsBridgePort(e)
		}
		return ok && w.concernsLink(e)
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		e, ok := rtnl.ParseEntryEvent(m)
		return ok && w.concernsEntry(e)
	case unix.RTM_NEWNETCONF:
		link, ok := rtnl.SysctlEventLink(m)
		return ok && w.concernsSysctl(link)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		link, ok := rtnl.AddrEventLink(m)
		return ok && w.linkKinds[link] > foreignLink
	case unix.RTM_NEWRULE: // a rule of others may have come before our rule that leads to containers
		protocol, ok := rtnl.EventProtocol(m)
		return ok && protocol != ourProtocol
	case unix.RTM_DELROUTE, unix.RTM_DELRULE:
		protocol, ok := rtnl.EventProtocol(m)
		return ok && protocol == ourProtocol
	}
	return false
}

// concernsLink keeps account of the links. A new link that is not ours counts: it may be a NIC, or a VPN's link that
// containers are to leave by.
func (w *watcher) concernsLink(e rtnl.LinkEvent) bool {
	was, known := w.linkKinds[e.Index]
	if e.Deleted {
		delete(w.linkKinds, e.Index)
		delete(w.unready, e.Index)
		delete(w.ready, e.Index)
		return was > foreignLink
	}
	ourGroup := e.Group == ruleset.GroupBridge || e.Group == ruleset.GroupTransparent
	switch {
	case strings.HasPrefix(e.Alias, bridgeAlias):
		w.linkKinds[e.Index] = bridgeLink
	case was == endLink || ourGroup && strings.HasPrefix(e.Name, hostPrefix):
		w.linkKinds[e.Index] = endLink
		return w.concernsHostEnd(e, ourGroup)
	case !known:
		w.linkKinds[e.Index] = foreignLink
		return !strings.HasPrefix(e.Name, peerPrefix)
	}
	return was > foreignLink
}

// concernsHostEnd reports whether a host end that was ready has changed. The kernel deletes a link's routes when the
// link goes down, so this counts also if the link is up again at once.
func (w *watcher) concernsHostEnd(e rtnl.LinkEvent, ourGroup bool) bool {
	before, wasReady := w.ready[e.Index]
	if _, whole := parseAlias(e.Alias); !whole || !e.Up || !ourGroup {
		w.unready[e.Index] = true
		delete(w.ready, e.Index)
		return wasReady
	}
	now := endState{master: e.Master, mtu: e.MTU, group: e.Group, mac: e.MAC}
	delete(w.unready, e.Index)
	w.ready[e.Index] = now
	return wasReady && now != before
}

// concernsBridgePort reports whether a port of ours has lost a flag. While an endpoint is made, its port does not have
// the flags yet; so only a host end that is ready counts.
func (w *watcher) concernsBridgePort(e rtnl.LinkEvent) bool {
	if _, ready := w.ready[e.Index]; !ready || e.Deleted {
		return false
	}
	return slices.ContainsFunc(slices.Concat(bridgePortFlags, bridgePortDefaults), func(f rtnl.PortFlag) bool {
		value, told := e.PortFlags[f.Kind]
		return told && value != f.Value
	})
}

// concernsEntry looks for two things: a neighbour entry of ours that was deleted, and a forwarding entry of a bridge of
// ours that was deleted or leads to another port now. A new neighbour entry does not count: the host learns neighbours
// all the time.
func (w *watcher) concernsEntry(e rtnl.EntryEvent) bool {
	if !e.Forwarding {
		return e.Deleted && e.Protocol == ourProtocol
	}
	_, ready := w.ready[e.Link]
	return w.linkKinds[e.Bridge] == bridgeLink && (e.Deleted || ready || w.linkKinds[e.Link] == foreignLink)
}

// concernsSysctl reports whether a sysctl of that link is one that Reconcile looks after. A host end that is not ready
// yet gets its sysctls from the attach that makes it.
func (w *watcher) concernsSysctl(link int) bool {
	_, ready := w.ready[link]
	return ready || link == rtnl.AllLinks || w.linkKinds[link] == nicLink || w.linkKinds[link] == bridgeLink
}
