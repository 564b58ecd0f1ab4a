// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// OpenNetns opens the container's network namespace at path. It refuses the host's own namespace, a path that
// is no namespace, and a namespace of another kind. It never waits, also if the path is a FIFO. The caller
// closes the handle.
func OpenNetns(path string) (netns.NsHandle, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return netns.None(), fmt.Errorf("the container's network namespace: %w", &os.PathError{Op: "open", Path: path, Err: err})
	}
	ns := netns.NsHandle(fd)
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil || fs.Type != unix.NSFS_MAGIC {
		ns.Close()
		return netns.None(), fmt.Errorf("the container's network namespace: %s is not a namespace: name one such as /proc/PID/ns/net or /run/netns/NAME", path)
	}
	if kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE); err == nil && kind != unix.CLONE_NEWNET {
		ns.Close()
		return netns.None(), fmt.Errorf("the container's network namespace: %s is a namespace of another kind: name one such as /proc/PID/ns/net or /run/netns/NAME", path)
	}
	own, err := netns.Get()
	if err != nil {
		ns.Close()
		return netns.None(), err
	}
	defer own.Close()
	if ns.Equal(own) {
		ns.Close()
		return netns.None(), fmt.Errorf("%s is the host's own network namespace: name the container's, and give a container of the host's network no interface", path)
	}
	return ns, nil
}

// setUpContainerEnd gives the container end its address and its routes. All routes lead by the gateway, the
// route to the subnet too. So the container holds one neighbour entry, and all that it sends passes the host's
// IP layer. An internal network has no default route. The container's runtime sets up lo. If the container end
// stays in the host's namespace, nothing is done.
func (a *attacher) setUpContainerEnd() error {
	if !a.ns.IsOpen() {
		return nil
	}
	if err := a.setUpContainerEndIn(a.ns); err != nil {
		return fmt.Errorf("%s in %s: %w", a.wish.IfName, a.wish.Netns, err)
	}
	return nil
}

func (a *attacher) setUpContainerEndIn(ns netns.NsHandle) error {
	in, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer in.Close()
	// With accept_ra, a router advertisement would give the container another gateway.
	if err := runInNamespace(ns, func() error { return writeIfExists("/proc/sys/net/ipv6/conf/"+a.wish.IfName+"/accept_ra", "0") }); err != nil {
		return err
	}
	l := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: a.containerEndIndex, Name: a.wish.IfName}}
	if err := in.AddrAdd(l, &netlink.Addr{IPNet: ipNet(a.wish.Addr), Flags: unix.IFA_F_NOPREFIXROUTE}); err != nil {
		return fmt.Errorf("address %s: %w", a.wish.Addr, err)
	}
	if err := in.LinkSetUp(l); err != nil {
		return fmt.Errorf("up: %w", err)
	}
	if !a.wish.Gateway.Is4() {
		return nil
	}
	gateway := &netlink.Neigh{LinkIndex: a.containerEndIndex, Family: unix.AF_INET, State: netlink.NUD_PERMANENT, IP: a.wish.Gateway.AsSlice(), HardwareAddr: a.gatewayMAC()}
	if err := in.NeighSet(gateway); err != nil {
		return fmt.Errorf("neighbour entry of the gateway: %w", err)
	}
	routes := []netlink.Route{
		{Dst: ipNet(netip.PrefixFrom(a.wish.Gateway, 32)), Scope: netlink.SCOPE_LINK},
		{Dst: ipNet(a.wish.Addr.Masked()), Gw: a.wish.Gateway.AsSlice()},
	}
	if !a.wish.Policy.Internal {
		routes = append(routes, netlink.Route{Gw: a.wish.Gateway.AsSlice()})
	}
	for _, r := range routes {
		r.LinkIndex, r.Src = a.containerEndIndex, a.wish.Addr.Addr().AsSlice()
		err := in.RouteAdd(&r)
		if errors.Is(err, unix.EEXIST) { // another interface of the container has the route, and keeps its precedence
			r.Priority = a.containerEndIndex
			err = in.RouteAdd(&r)
		}
		if err != nil {
			return fmt.Errorf("route to %s: %w", prefixOf(r.Dst), err)
		}
	}
	return a.routeBySource(in)
}

// gatewayMAC returns the MAC that answers the container for Azure's gateway.
func (a *attacher) gatewayMAC() []byte {
	if a.bridgeIndex == 0 {
		return hostMAC(a.alias.addr.Addr())
	}
	return a.rulesetEndpoint.BridgeMAC
}

// runInNamespace calls f on a thread that has entered the namespace. f must not start a goroutine, which would
// run in another namespace.
func runInNamespace(ns netns.NsHandle, f func() error) error {
	runtime.LockOSThread()
	own, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer own.Close()
	if err := netns.Set(ns); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter the container's network namespace: %w", err)
	}
	err = f()
	if back := netns.Set(own); back != nil {
		return errors.Join(err, back) // the thread stays locked, so it ends with its goroutine
	}
	runtime.UnlockOSThread()
	return err
}

// writeIfExists writes a sysctl. If the kernel does not have it, that is success.
func writeIfExists(file, value string) error {
	err := os.WriteFile(file, []byte(value), 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.EINVAL) {
		return nil
	}
	return err
}
