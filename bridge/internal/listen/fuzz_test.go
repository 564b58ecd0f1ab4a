// Copyright (c) The azure-vnet authors. MIT licence.

package listen

import (
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"
)

// message is an answer of the kernel about s, as a socket of IPv4.
func message(s Socket) []byte {
	m := make([]byte, answerSize)
	m[answerFamilyOffset] = unix.AF_INET
	binary.BigEndian.PutUint16(m[answerPortOffset:], s.Addr.Port())
	copy(m[answerAddrOffset:], s.Addr.Addr().AsSlice())
	binary.NativeEndian.PutUint32(m[answerUIDOffset:], s.UID)
	return m
}

// FuzzInetDiag reads any answer about a socket. A socket that receives IPv4 has an IPv4 address and a port, its text
// tells how to find the program, and it is read again as the same. The corpus has answers that a kernel gave.
func FuzzInetDiag(f *testing.F) {
	f.Add(true, make([]byte, answerSize-1))
	f.Add(true, make([]byte, answerSize+3))
	v6 := append(make([]byte, answerSize), 5, 0, skV6Only, 0, 1, 0, 0, 0)
	v6[0], v6[5] = unix.AF_INET6, 80
	f.Add(false, v6)
	f.Add(false, append(v6[:answerSize:answerSize], 0, 0, skV6Only, 0)) // an attribute that has no end
	f.Fuzz(func(t *testing.T, tcp bool, m []byte) {
		proto := map[bool]string{true: "tcp", false: "udp"}[tcp]
		s, ok := parseSocket(proto, m)
		if !ok {
			return
		}
		if len(m) < answerSize || s.Proto != proto || !s.Addr.Addr().Is4() || s.Addr.Port() == 0 {
			t.Errorf("%x is read as %+v", m, s)
		}
		if again, ok := parseSocket(proto, message(s)); !ok || again != s || again.String() != s.String() {
			t.Errorf("%v is read again as %v, %v", s, again, ok)
		}
	})
}
