// Copyright (c) The azure-vnet authors. MIT licence.

// Package listen lists the host's sockets that receive IPv4, by sock_diag(7). It does not try to bind a port instead:
// the test would take the port from a program that binds it in the same moment, and a TCP port in TIME_WAIT would seem
// to be in use.
package listen

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"azurevnet/internal/dump"
)

// Socket is a socket of the host that receives IPv4.
type Socket struct {
	Proto string         // tcp or udp
	Addr  netip.AddrPort // IPv4; the unspecified address: every address of the host
	UID   uint32         // of the socket's owner
}

// String names the socket, and a command that names its program.
func (s Socket) String() string {
	return fmt.Sprintf("%s (uid %d; ss -%clnp names the program)", s.Addr, s.UID, s.Proto[0])
}

// ReadSockets lists the sockets of TCP that listen and the sockets of UDP that are not connected. If the kernel
// has no sock_diag, the list is empty.
func ReadSockets() ([]Socket, error) {
	var all []Socket
	for _, q := range []struct {
		proto  string
		number byte
		states uint32
	}{{"tcp", unix.IPPROTO_TCP, tcpListen}, {"udp", unix.IPPROTO_UDP, udpUnconnected}} {
		for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
			body := encodeRequest(family, q.number, q.states)
			messages, err := dump.Whole(func() ([][]byte, error) {
				r := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
				r.AddRawData(body)
				return r.Execute(unix.NETLINK_INET_DIAG, nl.SOCK_DIAG_BY_FAMILY)
			})
			if errors.Is(err, unix.ENOENT) { // the kernel has no sock_diag, or no IPv6
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("list the host's %s sockets: %w", q.proto, err)
			}
			for _, m := range messages {
				if s, ok := parseSocket(q.proto, m); ok {
					all = append(all, s)
				}
			}
		}
	}
	return all, nil
}
