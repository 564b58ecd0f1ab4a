// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// watchPause is how long Watch lets events gather before it tells of them.
const watchPause = 200 * time.Millisecond

// Watch calls changed whenever something that Reconcile looks after may have
// changed: our links, their addresses and routes, our nft tables. Events of
// 200 ms are one call, and events that the kernel could not deliver are one too.
// An endpoint that comes to stand within that time is no event, nor are elements
// of the tables, which come and go with endpoints.
// It works on the calling goroutine alone, so that it stays in the caller's
// namespace, and returns ctx's error when ctx ends.
func (h *Host) Watch(ctx context.Context, changed func()) error {
	w := &watcher{host: h, ours: map[int32]bool{}, unready: map[int32]bool{}}
	if err := w.open(); err != nil {
		w.close()
		return fmt.Errorf("watch the host's network: %w", err)
	}
	defer w.close()
	stop := context.AfterFunc(ctx, func() { w.wake.Write([]byte{0}) })
	defer stop()
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
		seen, err := w.read()
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
	fds         []unix.PollFd // the pipe's end, then a socket for links and one for nft
	woken, wake *os.File
	ours        map[int32]bool // indexes of our bridges and NICs
	unready     map[int32]bool // indexes of endpoints' links that do not stand yet, or no more
	buf         [1 << 16]byte
}

// open subscribes first and then reads what is there, so that nothing falls
// between.
func (w *watcher) open() (err error) {
	if w.woken, w.wake, err = os.Pipe(); err != nil {
		return err
	}
	w.fds = append(w.fds, unix.PollFd{Fd: int32(w.woken.Fd()), Events: unix.POLLIN})
	for _, s := range []struct {
		family int
		groups []int
	}{
		{unix.NETLINK_ROUTE, []int{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE}},
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
	return w.relearn()
}

func (w *watcher) close() {
	for _, fd := range w.fds[min(1, len(w.fds)):] {
		unix.Close(int(fd.Fd))
	}
	if w.woken != nil {
		w.woken.Close()
		w.wake.Close()
	}
}

// relearn notes which links are ours.
func (w *watcher) relearn() error {
	t, err := readLinks()
	if err != nil {
		return err
	}
	for _, b := range t.bridges() {
		for _, name := range []string{b.Name, b.NIC} {
			if l := t.named(name); l != nil {
				w.ours[int32(l.Attrs().Index)] = true
			}
		}
	}
	return nil
}

// read takes all that the sockets hold and tells whether any of it matters.
func (w *watcher) read() (seen bool, err error) {
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
				if err := w.relearn(); err != nil {
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
					seen = w.ofLink(m) || seen
				} else {
					seen = ofTable(m) || seen
				}
			}
		}
	}
	return seen, nil
}

// ofLink tells whether an event is of a link of ours: all about bridges and
// NICs, and of endpoints the link alone.
func (w *watcher) ofLink(m syscall.NetlinkMessage) bool {
	switch m.Header.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		if len(m.Data) < unix.SizeofIfInfomsg {
			return false
		}
		index := int32(native.Uint32(m.Data[4:]))
		name, alias, master := "", "", 0
		for a, v := range (noun{header: unix.SizeofIfInfomsg}).attrs(m.Data) {
			switch a {
			case unix.IFLA_IFNAME:
				name = unix.ByteSliceToString(v)
			case unix.IFLA_IFALIAS:
				alias = unix.ByteSliceToString(v)
			case unix.IFLA_MASTER:
				master = wordOf(v)
			}
		}
		if strings.HasPrefix(alias, bridgeAlias) || w.ours[int32(master)] && !strings.HasPrefix(name, hostPrefix) {
			w.ours[index] = true // a bridge, or the NIC in it
		}
		was := w.ours[index]
		if m.Header.Type == unix.RTM_DELLINK && m.Data[0] == unix.AF_UNSPEC {
			delete(w.ours, index)
			delete(w.unready, index)
			return was || strings.HasPrefix(name, hostPrefix)
		}
		if strings.HasPrefix(name, hostPrefix) && m.Data[0] == unix.AF_UNSPEC {
			_, whole := parseAlias(alias)
			if w.unready[index] = true; whole && w.ours[int32(master)] && native.Uint32(m.Data[8:])&unix.IFF_UP != 0 {
				delete(w.unready, index)
			}
		}
		return was
	case unix.RTM_DELRULE:
		return len(m.Data) >= rules.header && isEgress(m.Data)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		return len(m.Data) >= addresses.header && w.ours[int32(native.Uint32(m.Data[4:]))]
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		return len(m.Data) >= routes.header && w.ours[int32(wordOf(routes.attr(m.Data, unix.RTA_OIF)))]
	}
	return false
}

// ofTable tells whether an nft event is of a table of ours. Every object but a
// transaction's end has its table's name as attribute 1.
func ofTable(m syscall.NetlinkMessage) bool {
	switch m.Header.Type & 0xff {
	case unix.NFT_MSG_NEWGEN, unix.NFT_MSG_NEWSETELEM, unix.NFT_MSG_DELSETELEM:
		return false
	}
	return strings.HasPrefix(unix.ByteSliceToString(noun{header: nl.SizeofNfgenmsg}.attr(m.Data, 1)), tableName)
}
