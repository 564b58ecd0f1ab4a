// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// InNamespace runs f on a thread of its own in the network namespace whose file is given, such as /run/netns/web or
// /proc/7/ns/net. Sockets that f opens belong to the namespace for as long as they live.
func InNamespace(file string, f func() error) error {
	ns, err := os.Open(file)
	if err != nil {
		return fmt.Errorf("enter the network namespace %s: %w", file, err)
	}
	defer ns.Close()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter the network namespace %s: %w", file, err)
			return
		}
		done <- f()
	}()
	return <-done
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

// Ping asks several addresses at once from the network namespace of a file, and again and again until
// all have answered or the time is over. It returns the addresses that are silent.
func Ping(file string, within time.Duration, to ...netip.Addr) (silent []netip.Addr, err error) {
	var conn net.PacketConn
	err = InNamespace(file, func() (err error) {
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

// Pings reports whether an address answers a ping from the namespace within two seconds.
func (n *Namespace) Pings(to netip.Addr) bool { return n.PingsFrom("", to) }

// PingsFrom reports the same of a namespace that ip netns add made in this one; none is this one itself.
func (n *Namespace) PingsFrom(name string, to netip.Addr) bool {
	file := fmt.Sprintf("/proc/%d/ns/net", n.PidOne())
	if name != "" {
		file = fmt.Sprintf("/proc/%d/root/run/netns/%s", n.PidOne(), name)
	}
	silent, err := Ping(file, 2*time.Second, to)
	return err == nil && len(silent) == 0
}

// AddNetns does what ip netns add and ip link set lo up do, without their processes. name is a file in /run/netns.
func (n *Namespace) AddNetns(name string) error {
	pid := n.PidOne()
	if pid == 0 {
		return fmt.Errorf("make %s on %s: it has no power", name, n.name)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		done <- addNetns(fmt.Sprintf("/proc/%d/ns/mnt", pid), "/run/netns/"+name)
	}()
	if err := <-done; err != nil {
		return fmt.Errorf("make %s on %s: %w", name, n.name, err)
	}
	return nil
}

// addNetns leaves the calling thread in the mount namespace of a file and in the network namespace that it mounts at path.
func addNetns(mountNamespace, path string) error {
	mnt, err := os.Open(mountNamespace)
	if err != nil {
		return err
	}
	defer mnt.Close()
	if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_FS); err != nil { // a thread enters a mount namespace with its own root
		return err
	}
	if err := loUp(); err != nil {
		return err
	}
	// The /proc of the other mount namespace does not show this thread, so that its namespace has to be opened before.
	ns, err := unix.OpenTree(unix.AT_FDCWD, "/proc/thread-self/ns/net", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(ns)
	if err := unix.Setns(int(mnt.Fd()), unix.CLONE_NEWNS); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL, 0)
	if err != nil {
		return err
	}
	f.Close()
	return unix.MoveMount(ns, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// loUp sets lo up in the calling thread's network namespace.
func loUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo)
}
