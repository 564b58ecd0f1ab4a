// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"azurevnet/internal/dump"
	"azurevnet/internal/vnetsim"
)

// inNamespace runs f on a thread in a network namespace. The sockets that f opens
// belong to the namespace for as long as they live.
func inNamespace(ns netns.NsHandle, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		if err := unix.Setns(int(ns), unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
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

// openNamespace opens the network namespace of a VM or of the internet.
func openNamespace(t *testing.T, n *vnetsim.Namespace) netns.NsHandle {
	t.Helper()
	ns, err := netns.GetFromPid(n.PidOne())
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

// echoRequest is an ICMP echo request with its checksum.
func echoRequest(id uint16) []byte {
	p := []byte{8, 0, 0, 0, byte(id >> 8), byte(id), 0, 1}
	var sum uint32
	for i := 0; i < len(p); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(p[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(p[2:], ^uint16(sum))
	return p
}

// ping asks several addresses at once from a namespace, and again and again until
// all have answered or the time is over. It returns the addresses that are silent.
func ping(ns netns.NsHandle, within time.Duration, to ...netip.Addr) (silent []netip.Addr, err error) {
	var conn net.PacketConn
	err = inNamespace(ns, func() (err error) {
		conn, err = net.ListenPacket("ip4:icmp", "0.0.0.0")
		return err
	})
	if err != nil {
		return to, err
	}
	defer conn.Close()
	id, wait := uint16(rand.N(1<<16)), map[netip.Addr]bool{}
	for _, addr := range to {
		wait[addr] = true
	}
	request, answer := echoRequest(id), make([]byte, 1500)
	for end := time.Now().Add(within); len(wait) > 0 && time.Now().Before(end); {
		for addr := range wait {
			// A destination that is unreachable now may be reachable at the next try.
			_, _ = conn.WriteTo(request, &net.IPAddr{IP: addr.AsSlice()})
		}
		again := time.Now().Add(200 * time.Millisecond)
		for len(wait) > 0 && time.Now().Before(again) {
			if err := conn.SetReadDeadline(again); err != nil {
				return to, err
			}
			n, from, err := conn.ReadFrom(answer)
			if err == nil && n >= 8 && answer[0] == 0 && binary.BigEndian.Uint16(answer[4:]) == id {
				addr, _ := netip.AddrFromSlice(from.(*net.IPAddr).IP)
				delete(wait, addr.Unmap())
			}
		}
	}
	return slices.SortedFunc(maps.Keys(wait), netip.Addr.Compare), nil
}

const (
	pingTime    = 5 * time.Second        // for what has to answer
	silenceTime = 300 * time.Millisecond // for what must not answer
)

// container is a network namespace that plays a container.
type container struct {
	ns        netns.NsHandle
	listeners map[uint16]net.Listener // by port
}

// newContainer makes one as engines do: lo is up, and there is no IPv6.
func newContainer() (*container, error) {
	ns, err := newNamespace()
	if err != nil {
		return nil, err
	}
	c := &container{ns: ns, listeners: map[uint16]net.Listener{}}
	err = inNamespace(ns, func() error {
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
		c.close()
	}
	return c, err
}

// reaches says that all addresses answer the container.
func (c *container) reaches(t *testing.T, who string, to ...netip.Addr) {
	t.Helper()
	if silent, err := ping(c.ns, pingTime, to...); err != nil || len(silent) > 0 {
		t.Errorf("%s does not reach %v: %v", who, silent, err)
	}
}

// listen has the container answer on a TCP port until it is closed. A second call does
// nothing.
func (c *container) listen(port uint16) error {
	if c.listeners[port] != nil {
		return nil
	}
	var l net.Listener
	err := inNamespace(c.ns, func() (err error) {
		l, err = net.Listen("tcp4", fmt.Sprintf("0.0.0.0:%d", port))
		return err
	})
	if err != nil {
		return err
	}
	c.listeners[port] = l
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

// close ends the namespace, and with it every link that is in it. A second call does
// nothing.
func (c *container) close() {
	for _, l := range c.listeners {
		l.Close()
	}
	clear(c.listeners)
	if c.ns.IsOpen() {
		c.ns.Close()
	}
}

// greeting connects from a namespace and reads what the container says there.
func greeting(ns netns.NsHandle, to netip.AddrPort) (string, error) {
	var conn net.Conn
	err := inNamespace(ns, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), pingTime)
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
	if err := conn.SetDeadline(time.Now().Add(pingTime)); err != nil {
		return "", err
	}
	said := make([]byte, len("container"))
	_, err = io.ReadFull(conn, said)
	return string(said), err
}

// lent lists the addresses that the VM lends, by its file.
func (h host) lent() []string {
	h.t.Helper()
	var file struct{ Leases map[string]any }
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/run/azure-vnet/leases.json", h.PidOne()))
	if errors.Is(err, os.ErrNotExist) {
		return []string{}
	}
	if err == nil {
		err = json.Unmarshal(text, &file)
	}
	if err != nil {
		h.t.Fatal(err)
	}
	return append([]string{}, slices.Sorted(maps.Keys(file.Leases))...)
}

// containerLinks lists the links in the VM that lead to containers.
func (h host) containerLinks() []string {
	h.t.Helper()
	names := []string{}
	err := h.Do(func() error {
		links, err := dump.Whole(netlink.LinkList)
		for _, l := range links {
			if veth.MatchString(l.Attrs().Name) {
				names = append(names, l.Attrs().Name)
			}
		}
		return err
	})
	if err != nil {
		h.t.Fatal(err)
	}
	slices.Sort(names)
	return names
}

// traces lists the lines of the VM's kernel that name one of the words: rules and
// sets, routes of every table, permanent neighbours and forwarding entries.
func (h host) traces(words ...string) []string {
	h.t.Helper()
	found := []string{}
	if len(words) == 0 {
		return found
	}
	for i, w := range words {
		words[i] = regexp.QuoteMeta(w)
	}
	// An address is not part of a longer one, and may stand before a prefix length.
	of := regexp.MustCompile(`(^|[^0-9a-z.])(` + strings.Join(words, "|") + `)($|[^0-9a-z.])`)
	all := h.must("sh", "-c", `nft list ruleset; ip route show table all; ip rule; ip neigh show nud permanent; bridge fdb show`)
	for line := range strings.Lines(all) {
		if of.MatchString(line) {
			found = append(found, strings.TrimSpace(line))
		}
	}
	return found
}
