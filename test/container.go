// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"azurevnet/internal/vnetsim"
)

// OpenNamespace opens the network namespace of a VM or of the internet.
func OpenNamespace(t *testing.T, n *vnetsim.Namespace) netns.NsHandle {
	t.Helper()
	ns, err := netns.GetFromPid(n.PidOne())
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

// fileOf names the file of an open namespace.
func fileOf(ns netns.NsHandle) string { return fmt.Sprintf("/proc/self/fd/%d", int(ns)) }

// Ping is vnetsim's, from an open namespace.
func Ping(ns netns.NsHandle, within time.Duration, to ...netip.Addr) (silent []netip.Addr, err error) {
	return vnetsim.Ping(fileOf(ns), within, to...)
}

const (
	PingTime    = 5 * time.Second        // for what has to answer
	SilenceTime = 300 * time.Millisecond // for what must not answer
)

// Container is a network namespace that plays a container.
type Container struct {
	Ns        netns.NsHandle
	Listeners map[uint16]net.Listener // by port
}

// Reaches says that all addresses answer the container.
func (c *Container) Reaches(t *testing.T, who string, to ...netip.Addr) {
	t.Helper()
	if silent, err := Ping(c.Ns, PingTime, to...); err != nil || len(silent) > 0 {
		t.Errorf("%s does not reach %v: %v", who, silent, err)
	}
}

// Listen has the container answer on a TCP port until it is closed. A second call does
// nothing.
func (c *Container) Listen(port uint16) error {
	if c.Listeners[port] != nil {
		return nil
	}
	var l net.Listener
	err := vnetsim.InNamespace(fileOf(c.Ns), func() (err error) {
		l, err = net.Listen("tcp4", fmt.Sprintf("0.0.0.0:%d", port))
		return err
	})
	if err != nil {
		return err
	}
	c.Listeners[port] = l
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return // closed
			}
			_, _ = conn.Write([]byte("container"))
			_ = conn.(*net.TCPConn).SetLinger(0) // a socket that lingers would keep the namespace
			_, _ = conn.Read(make([]byte, 1))    // until the client has read it and closes
			conn.Close()
		}
	}()
	return nil
}

// Close ends the namespace, and with it every link that is in it. A second call does
// nothing.
func (c *Container) Close() {
	for _, l := range c.Listeners {
		l.Close()
	}
	clear(c.Listeners)
	if c.Ns.IsOpen() {
		c.Ns.Close()
	}
}

// Greeting connects from a namespace and reads what the container says there.
func Greeting(ns netns.NsHandle, to netip.AddrPort) (string, error) {
	var conn net.Conn
	err := vnetsim.InNamespace(fileOf(ns), func() error {
		ctx, cancel := context.WithTimeout(context.Background(), PingTime)
		defer cancel()
		var err error
		conn, err = new(net.Dialer).DialContext(ctx, "tcp4", to.String())
		return err
	})
	if err != nil {
		return "", err
	}
	defer conn.Close()
	_ = conn.(*net.TCPConn).SetLinger(0)
	if err := conn.SetDeadline(time.Now().Add(PingTime)); err != nil {
		return "", err
	}
	said := make([]byte, len("container"))
	_, err = io.ReadFull(conn, said)
	return string(said), err
}

// newNamespace makes a network namespace, which lasts until its handle is closed
// and nothing else uses it.
func newNamespace() (netns.NsHandle, error) {
	type result struct {
		ns  netns.NsHandle
		err error
	}
	made := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		ns, err := netns.New()
		made <- result{ns, err}
	}()
	r := <-made
	return r.ns, r.err
}

// NewContainer makes one as engines do: lo is up, and there is no IPv6.
func NewContainer() (*Container, error) {
	ns, err := newNamespace()
	if err != nil {
		return nil, err
	}
	c := &Container{Ns: ns, Listeners: map[uint16]net.Listener{}}
	err = vnetsim.InNamespace(fileOf(ns), func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		for _, conf := range []string{"default", "all"} {
			path := "/proc/sys/net/ipv6/conf/" + conf + "/disable_ipv6"
			if err := os.WriteFile(path, []byte("1"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
		return netlink.LinkSetUp(lo)
	})
	if err != nil {
		c.Close()
	}
	return c, err
}
