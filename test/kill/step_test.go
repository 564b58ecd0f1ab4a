// Copyright (c) The azure-vnet authors. MIT licence.

package kill

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// call is a system call of a traced thread.
type call struct {
	nr   uint64
	args [6]uint64
}

// changing are the system calls by which the product changes something that outlives its process.
var changing = map[uint64]string{
	unix.SYS_WRITE:      "write",
	unix.SYS_PWRITE64:   "write",
	unix.SYS_WRITEV:     "write",
	unix.SYS_FTRUNCATE:  "write",
	unix.SYS_RENAMEAT2:  "rename",
	unix.SYS_UNLINKAT:   "unlink",
	unix.SYS_MKDIRAT:    "mkdir",
	unix.SYS_LINKAT:     "link",
	unix.SYS_SYMLINKAT:  "link",
	unix.SYS_MOUNT:      "mount",
	unix.SYS_MOVE_MOUNT: "mount",
	unix.SYS_BIND:       "bind",
	unix.SYS_SENDTO:     "send",
	unix.SYS_SENDMSG:    "send",
	unix.SYS_FSYNC:      "sync",
}

// step names what a call of a stopped thread will change if it succeeds; empty: nothing. tgid is the thread's process.
func step(tgid, tid int, c call) string {
	kind := changing[c.nr]
	if kind == "" {
		kind = older[c.nr]
	}
	switch kind {
	case "", "sync": // which changes nothing that a kill could cut in two
		return ""
	case "write":
		file, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", tid, int32(c.args[0])))
		if err != nil || !strings.HasPrefix(file, "/") || strings.HasPrefix(file, "/dev/") || strings.HasPrefix(file, "/memfd:") {
			return "" // a pipe, a socket, an eventfd, memory
		}
		return "write " + file
	case "bind":
		family, _ := socket(tgid, int(int32(c.args[0])))
		if family == unix.AF_NETLINK {
			return "" // which changes nothing
		}
		return fmt.Sprintf("bind of family %d", family)
	case "send":
		family, protocol := socket(tgid, int(int32(c.args[0])))
		if family != unix.AF_NETLINK {
			return ""
		}
		at := c.args[1]
		if c.nr == unix.SYS_SENDMSG {
			const iov = 16 // of struct msghdr on 64 bits
			at = word(tid, word(tid, at+iov))
		}
		return message(protocol, read(tid, at, unix.SizeofNlMsghdr))
	}
	return kind + " " + text(tid, c.args[path(c.nr)])
}

// synced is the file that a call writes out to the disk; empty: it is another call.
func synced(tid int, c call) string {
	if changing[c.nr] != "sync" {
		return ""
	}
	file, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", tid, int32(c.args[0])))
	return file
}

// renamed returns the old name of a file that the call renames. It returns an empty string for other calls, for relative
// names, and for files on tmpfs, of which a power cut leaves nothing.
func renamed(tid int, c call) string {
	if changing[c.nr] != "rename" && older[c.nr] != "rename" {
		return ""
	}
	from := text(tid, c.args[path(c.nr)-pathsApart(c.nr)])
	var disk unix.Statfs_t
	if err := unix.Statfs(fmt.Sprintf("/proc/%d/root%s", tid, from), &disk); err != nil || !strings.HasPrefix(from, "/") || disk.Type == unix.TMPFS_MAGIC {
		return ""
	}
	return from
}

// pathsApart is how many arguments stand between the old name and the new one.
func pathsApart(nr uint64) int {
	if path(nr) == 3 { // each has a descriptor before it
		return 2
	}
	return 1
}

// path is which argument of a call names what it changes.
func path(nr uint64) int {
	switch nr {
	case unix.SYS_RENAMEAT2, unix.SYS_LINKAT, unix.SYS_MOVE_MOUNT:
		return 3
	case unix.SYS_UNLINKAT, unix.SYS_MKDIRAT, unix.SYS_MOUNT:
		return 1
	case unix.SYS_SYMLINKAT:
		return 2
	}
	return olderPath[nr]
}

// message names what a netlink message changes; empty: it asks only.
func message(protocol int, header []byte) string {
	if len(header) < unix.SizeofNlMsghdr {
		return ""
	}
	kind := binary.NativeEndian.Uint16(header[4:])
	switch protocol {
	case unix.NETLINK_ROUTE:
		verb, noun := [...]string{"NEW", "DEL", "GET", "SET"}[kind&3], (kind-unix.RTM_BASE)/4
		if names := [...]string{"LINK", "ADDR", "ROUTE", "NEIGH", "RULE"}; verb != "GET" && int(noun) < len(names) {
			return "netlink " + verb + names[noun]
		} else if verb != "GET" {
			return fmt.Sprintf("netlink %d", kind)
		}
	case unix.NETLINK_NETFILTER:
		if kind == unix.NFNL_MSG_BATCH_BEGIN {
			return "netlink nft"
		}
		if kind>>8 == unix.NFNL_SUBSYS_CTNETLINK && kind&0xff != 1 && kind&0xff < 4 { // not one of the questions
			return "netlink conntrack"
		}
	}
	return ""
}

// socket tells what a descriptor of another process is; zeros: no socket.
func socket(tgid, fd int) (family, protocol int) {
	process, err := unix.PidfdOpen(tgid, 0)
	if err != nil {
		return 0, 0
	}
	defer unix.Close(process)
	own, err := unix.PidfdGetfd(process, fd, 0)
	if err != nil {
		return 0, 0
	}
	defer unix.Close(own)
	family, _ = unix.GetsockoptInt(own, unix.SOL_SOCKET, unix.SO_DOMAIN)
	protocol, _ = unix.GetsockoptInt(own, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	return family, protocol
}

// read reads a traced thread's memory, less of it where it ends.
func read(tid int, at uint64, size int) []byte {
	b := make([]byte, size)
	n, err := unix.ProcessVMReadv(tid, []unix.Iovec{{Base: &b[0], Len: uint64(size)}}, []unix.RemoteIovec{{Base: uintptr(at), Len: size}}, 0)
	if err != nil {
		return nil
	}
	return b[:n]
}

// text reads a string of a traced thread. It reads 256 bytes at most, and never beyond the page. It returns an empty
// string if the string does not end there.
func text(tid int, at uint64) string {
	b := read(tid, at, int(min(256, 4096-at%4096)))
	end := bytes.IndexByte(b, 0)
	return string(b[:max(end, 0)])
}

// word reads a 64-bit word of it.
func word(tid int, at uint64) uint64 {
	if b := read(tid, at, 8); len(b) == 8 {
		return binary.NativeEndian.Uint64(b)
	}
	return 0
}
