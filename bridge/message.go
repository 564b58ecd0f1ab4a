// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// message is an address, a route, a rule or a neighbour of a link in the
// kernel's own words: an rtnetlink message less its header. Every attribute it
// has moves with it, also those nobody here has heard of. In its normal form it
// is free of the link (index 0, no name), of lifetimes and of passing state, so
// that two messages are the same thing when their bytes are.
type message []byte

// noun is a kind of message.
type noun struct {
	get, add, del int
	header        int // bytes before the attributes
}

var (
	addresses  = noun{unix.RTM_GETADDR, unix.RTM_NEWADDR, unix.RTM_DELADDR, unix.SizeofIfAddrmsg}
	routes     = noun{unix.RTM_GETROUTE, unix.RTM_NEWROUTE, unix.RTM_DELROUTE, unix.SizeofRtMsg}
	rules      = noun{unix.RTM_GETRULE, unix.RTM_NEWRULE, unix.RTM_DELRULE, unix.SizeofRtMsg}
	neighbours = noun{unix.RTM_GETNEIGH, unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH, unix.SizeofNdMsg}
)

// attrType masks the flags off an attribute's type: NLA_TYPE_MASK.
const attrType = 0x3fff

var native = binary.NativeEndian

// link is what of a link a message may name.
type link struct {
	index int
	name  string
}

// dump lists what the kernel has of n. A change in the middle of a dump makes
// it incomplete and is told by the kernel: ask again.
func (n noun) dump(family byte) ([]message, error) {
	for try := 0; ; try++ {
		req := nl.NewNetlinkRequest(n.get, unix.NLM_F_DUMP)
		req.RawData = make([]byte, n.header)
		req.RawData[0] = family
		out, err := req.Execute(unix.NETLINK_ROUTE, uint16(n.add))
		if errors.Is(err, nl.ErrDumpInterrupted) && try < 20 {
			continue
		}
		if err != nil {
			return nil, err
		}
		all := make([]message, 0, len(out))
		for _, m := range out {
			all = append(all, m)
		}
		return all, nil
	}
}

// put adds m, which must name its link. One that is there already is success.
func (n noun) put(m message, flags int) error {
	return n.send(n.add, m, unix.NLM_F_CREATE|flags, syscall.EEXIST)
}

// remove takes m away. One that is not there is success. NLM_F_EXCL would mean
// "all of them" since Linux 5.19.
func (n noun) remove(m message) error {
	return n.send(n.del, m, 0, syscall.ENOENT, syscall.ESRCH, syscall.EADDRNOTAVAIL, syscall.ENODEV)
}

func (n noun) send(proto int, m message, flags int, success ...syscall.Errno) error {
	req := nl.NewNetlinkRequest(proto, unix.NLM_F_ACK|flags)
	req.RawData = m
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	for _, errno := range success {
		if errors.Is(err, errno) {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("%s: %w", n.text(m), err)
	}
	return nil
}

// together sends requests that the kernel handles one after the other in one call:
// nothing comes between them, not even the sender's end. It returns the error of
// each; all of them have been handled when there is an error beside. The answers
// all wait in the socket meanwhile.
func together(requests ...*nl.NetlinkRequest) ([]error, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	for _, buffer := range []int{unix.SO_SNDBUFFORCE, unix.SO_RCVBUFFORCE} {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, buffer, 4<<20); err != nil {
			return nil, err
		}
	}
	var all []byte
	nth := map[uint32]int{}
	for i, r := range requests {
		nth[r.Seq] = i
		all = append(all, r.Serialize()...)
	}
	if err := unix.Sendto(fd, all, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	errs := make([]error, len(requests))
	buf := make([]byte, 1<<16)
	for left := len(requests); left > 0; {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		answers, err := syscall.ParseNetlinkMessage(buf[:n])
		if err != nil {
			return nil, err
		}
		for _, a := range answers {
			i, mine := nth[a.Header.Seq]
			if !mine || a.Header.Type != unix.NLMSG_ERROR || len(a.Data) < 4 {
				continue
			}
			left--
			if errno := -int32(native.Uint32(a.Data)); errno != 0 {
				errs[i] = syscall.Errno(errno)
			}
		}
	}
	return errs, nil
}

// attrs calls yield for each attribute of m.
func (n noun) attrs(m message) func(yield func(attr uint16, value []byte) bool) {
	return func(yield func(uint16, []byte) bool) {
		eachAttr(m[min(n.header, len(m)):], yield)
	}
}

func eachAttr(b []byte, yield func(uint16, []byte) bool) {
	for len(b) >= unix.SizeofRtAttr {
		size := int(native.Uint16(b))
		if size < unix.SizeofRtAttr || size > len(b) {
			return
		}
		if !yield(native.Uint16(b[2:])&attrType, b[unix.SizeofRtAttr:size]) {
			return
		}
		b = b[min(align(size), len(b)):]
	}
}

// attr is the first attribute of that type in m, or nil.
func (n noun) attr(m message, attr uint16) []byte {
	for a, v := range n.attrs(m) {
		if a == attr {
			return v
		}
	}
	return nil
}

// rewrite is m with the header and the attributes that edit makes of its own; a
// nil value leaves the attribute out.
func (n noun) rewrite(m message, header func([]byte), edit func(attr uint16, value []byte) []byte) message {
	out := slices.Clone(m[:n.header])
	header(out)
	for a, v := range n.attrs(m) {
		if v = edit(a, v); v != nil {
			out = appendAttr(out, a, v)
		}
	}
	return out
}

func appendAttr(b []byte, attr uint16, value []byte) []byte {
	b = native.AppendUint16(b, uint16(unix.SizeofRtAttr+len(value)))
	b = native.AppendUint16(b, attr)
	b = append(b, value...)
	return append(b, make([]byte, align(len(value))-len(value))...)
}

func align(n int) int { return (n + 3) &^ 3 }

// moveIndex is value, an interface index, with to in the place of from.
func moveIndex(value []byte, from, to int) []byte {
	if len(value) == 4 && native.Uint32(value) == uint32(from) {
		return native.AppendUint32(nil, uint32(to))
	}
	return value
}

// moveName is value, an interface's name or a label built on one, with to in
// the place of from.
func moveName(value []byte, from, to string) []byte {
	name, label, labelled := strings.Cut(unix.ByteSliceToString(value), ":")
	if name != from {
		return value
	}
	if labelled {
		label = ":" + label
	}
	if len(to)+len(label) >= unix.IFNAMSIZ {
		label = "" // no room: the label is for people
	}
	return append([]byte(to+label), 0)
}

// eachHop yields the nexthops in value, whole struct rtnexthops with their
// attributes, in place.
func eachHop(value []byte) func(yield func(hop []byte) bool) {
	return func(yield func([]byte) bool) {
		for b := value; len(b) >= unix.SizeofRtNexthop; {
			size := int(native.Uint16(b))
			if size < unix.SizeofRtNexthop || size > len(b) || !yield(b[:size]) {
				return
			}
			b = b[min(align(size), len(b)):]
		}
	}
}

// hops is value, the nexthops of a multipath route, with to in the place of
// from, and of their flags only what is configuration.
func hops(value []byte, from, to int) []byte {
	out := slices.Clone(value)
	for hop := range eachHop(out) {
		hop[2] &= routeKeptFlags
		copy(hop[4:8], moveIndex(hop[4:8], from, to))
	}
	return out
}

// text names m for people.
func (n noun) text(m message) string {
	switch n.get {
	case unix.RTM_GETADDR:
		return "address " + addressText(m)
	case unix.RTM_GETROUTE:
		return "route " + routeText(m)
	case unix.RTM_GETNEIGH:
		return "neighbour " + ipText(n.attr(m, unix.NDA_DST))
	}
	return fmt.Sprintf("rule of priority %d", wordOf(rules.attr(m, unix.FRA_PRIORITY)))
}

func contains(all []message, m message) bool {
	return slices.ContainsFunc(all, func(x message) bool { return bytes.Equal(x, m) })
}

func wordOf(value []byte) int {
	if len(value) != 4 {
		return 0
	}
	return int(native.Uint32(value))
}
