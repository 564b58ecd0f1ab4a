// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// bootTime is CLOCK_BOOTTIME: it counts suspend and is never set.
func bootTime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		panic(err) // Linux has had it since 2.6.39
	}
	return time.Duration(t.Nano())
}

func bootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the boot id: %w", err)
	}
	return strings.TrimSpace(string(id)), nil
}

// hostAddrs lists the IPv4 addresses on interfaces of this network namespace,
// and the interface of each.
func hostAddrs() (map[netip.Addr]string, error) {
	list, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_V4) })
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

// readHost reads what tells the primary addresses and the primary NIC apart.
// Several interfaces may have a NIC's MAC: its virtual function, which has no
// addresses, and the bridge it is in, which has those of the NIC. Hence MACs
// are taken together, whatever the kind.
func readHost() (host, error) {
	h := host{Addrs: map[string][]netip.Addr{}}
	links, err := dump(netlink.LinkList)
	if err != nil {
		return h, fmt.Errorf("read the host's links: %w", err)
	}
	list, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return h, fmt.Errorf("read the host's addresses: %w", err)
	}
	routes, err := dump(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return h, fmt.Errorf("read the host's routes: %w", err)
	}
	macs := map[int]string{}
	for _, l := range links {
		macs[l.Attrs().Index] = l.Attrs().HardwareAddr.String()
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

// dump repeats a dump that a change of the table broke off.
func dump[T any](list func() ([]T, error)) ([]T, error) {
	var got []T
	var err error
	for range 5 {
		if got, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return got, err
		}
	}
	return got, err
}
