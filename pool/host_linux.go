// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"azurevnet/internal/dump"
)

// bootTime returns CLOCK_BOOTTIME: the time since the boot, suspend included. Nobody can set this clock.
func bootTime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		panic(err) // Linux has this clock since 2.6.39
	}
	return time.Duration(t.Nano())
}

// readOccupied reads the addresses that links of the host have, and those that routes lead to.
func readOccupied() (occupied, error) {
	onHost, err := hostAddrs()
	if err != nil {
		return occupied{}, err
	}
	routed, err := hostRoutes()
	return occupied{onHost, routed, linkName}, err
}

// hostAddrs returns the IPv4 addresses on links of this network namespace, and the name of each one's link.
func hostAddrs() (map[netip.Addr]string, error) {
	list, err := dump.Whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("read the host's addresses: %w", err)
	}
	addrs := make(map[netip.Addr]string, len(list))
	for _, a := range list {
		if addr, ok := netip.AddrFromSlice(a.IP); ok {
			addrs[addr.Unmap()] = a.Label
		}
	}
	return addrs, nil
}

// hostRoutes returns the IPv4 addresses that a route of the main table leads to alone (/32), and for each the index of
// the route's link. The index is 0 if the route has no link, or several. Every container of the host that has an
// address of its own has such a route, whoever made it. The host's own addresses have theirs in the table local.
//
// Each lease reads these routes. So their messages are parsed here, and no further than needed.
func hostRoutes() (map[netip.Addr]int, error) {
	s, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("read the host's routes: %w", err)
	}
	defer s.Close()
	// With this option the kernel lists the main table only. A kernel before 4.20 lists all tables.
	_ = unix.SetsockoptInt(s.GetFd(), unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
	routes, err := dump.Whole(func() (all []hostRoute, err error) {
		r := nl.NewNetlinkRequest(unix.RTM_GETROUTE, unix.NLM_F_DUMP)
		r.AddData(&nl.RtMsg{RtMsg: unix.RtMsg{Family: unix.AF_INET, Table: unix.RT_TABLE_MAIN}})
		r.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: s}}
		err = r.ExecuteIter(unix.NETLINK_ROUTE, unix.RTM_NEWROUTE, func(m []byte) bool {
			if route, ok := readHostRoute(m); ok {
				all = append(all, route)
			}
			return true
		})
		return all, err
	})
	if errors.Is(err, unix.ENOENT) { // a namespace in which no route was ever made has no such table
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the host's routes: %w", err)
	}
	routed := make(map[netip.Addr]int, len(routes))
	for _, r := range routes {
		routed[r.to] = r.link
	}
	return routed, nil
}

// hostRoute is a route to one address.
type hostRoute struct {
	to   netip.Addr
	link int // index; 0: none, or several
}

// readHostRoute reads an rtmsg with its attributes. ok is false unless it is a /32 route of the main table. The second
// byte of an rtmsg is the length of the destination, and the fifth the table.
func readHostRoute(m []byte) (r hostRoute, ok bool) {
	if len(m) < unix.SizeofRtMsg || m[1] != 32 || m[4] != unix.RT_TABLE_MAIN {
		return r, false
	}
	for rest := m[unix.SizeofRtMsg:]; len(rest) >= unix.SizeofRtAttr; {
		size := int(binary.NativeEndian.Uint16(rest))
		if size < unix.SizeofRtAttr || size > len(rest) {
			return r, false
		}
		value := rest[unix.SizeofRtAttr:size]
		switch binary.NativeEndian.Uint16(rest[2:]) {
		case unix.RTA_DST:
			r.to, ok = netip.AddrFromSlice(value)
		case unix.RTA_OIF:
			if len(value) == 4 {
				r.link = int(binary.NativeEndian.Uint32(value))
			}
		}
		rest = rest[min((size+3)&^3, len(rest)):]
	}
	return r, ok
}

// linkName returns the name of a link for people to read. It uses an ioctl and not netlink, because it is called under
// the pool's lock, where no listing may be waited for.
func linkName(index int) string {
	if index == 0 {
		return "no link of its own"
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Sprintf("link %d", index)
	}
	defer unix.Close(fd)
	ask, err := unix.NewIfreq("")
	if err == nil {
		ask.SetUint32(uint32(index))
		err = unix.IoctlIfreq(fd, unix.SIOCGIFNAME, ask)
	}
	if err != nil {
		return fmt.Sprintf("link %d", index) // the link is gone by now
	}
	return ask.Name()
}

// readHostLinks reads the MACs and addresses of the host's links, and the default route. Several links may have the
// MAC of a NIC: the NIC itself, its virtual function, and a bridge around it. The virtual function has no addresses. A
// bridge has the NIC's addresses. So the addresses of one MAC are taken together.
func readHostLinks() (hostLinks, error) {
	h := hostLinks{Addrs: map[string][]netip.Addr{}}
	links, err := dump.Whole(netlink.LinkList)
	if err != nil {
		return h, fmt.Errorf("read the host's links: %w", err)
	}
	list, err := dump.Whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return h, fmt.Errorf("read the host's addresses: %w", err)
	}
	routes, err := dump.Whole(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return h, fmt.Errorf("read the host's routes: %w", err)
	}
	macs := map[int]string{}
	for _, l := range links {
		mac := l.Attrs().HardwareAddr.String()
		macs[l.Attrs().Index] = mac
		if l.Attrs().Flags&net.FlagLoopback == 0 && mac != "" {
			h.MACs = append(h.MACs, mac)
		}
	}
	for _, a := range list {
		if addr, ok := netip.AddrFromSlice(a.IP); ok && macs[a.LinkIndex] != "" {
			h.Addrs[macs[a.LinkIndex]] = append(h.Addrs[macs[a.LinkIndex]], addr.Unmap())
		}
	}
	best := -1
	for _, r := range routes {
		isDefault := r.Dst == nil || r.Dst.String() == "0.0.0.0/0"
		if isDefault && macs[r.LinkIndex] != "" && (best < 0 || r.Priority < best) {
			best, h.Default = r.Priority, macs[r.LinkIndex]
		}
	}
	return h, nil
}
