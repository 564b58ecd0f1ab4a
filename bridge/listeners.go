// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// listener is a socket of the host that takes what comes to a port.
type listener struct {
	proto string
	at    netip.AddrPort // IPv4, or the unspecified address for every one
	uid   uint32         // of its owner, in the host's eyes
}

type listenerList []listener

// Of linux/inet_diag.h, which no library here spells.
const (
	diagRequest = 56 // bytes of inet_diag_req_v2
	diagAnswer  = 72 // bytes of inet_diag_msg
	diagV6Only  = 11 // INET_DIAG_SKV6ONLY
	tcpListen   = 1 << 10
	udpUnbound  = 1 << 7 // to a peer: it takes what comes from anywhere
)

// listeners are the host's sockets that take IPv4. The kernel is asked, for to
// bind a port in order to know would take it from whoever tries meanwhile, and a
// TCP port in TIME_WAIT would seem taken.
func listeners() (listenerList, error) {
	var out listenerList
	for _, q := range []struct {
		proto  string
		number byte
		states uint32
	}{{"tcp", unix.IPPROTO_TCP, tcpListen}, {"udp", unix.IPPROTO_UDP, udpUnbound}} {
		for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
			body := make([]byte, diagRequest)
			body[0], body[1] = family, q.number
			native.PutUint32(body[4:], q.states)
			req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
			req.AddRawData(body)
			messages, err := req.Execute(unix.NETLINK_INET_DIAG, nl.SOCK_DIAG_BY_FAMILY)
			if errors.Is(err, unix.ENOENT) { // a kernel that cannot tell, or has no IPv6
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("list the host's %s sockets: %w", q.proto, err)
			}
			for _, m := range messages {
				if l, ok := parseListener(q.proto, m); ok {
					out = append(out, l)
				}
			}
		}
	}
	return out, nil
}

// parseListener reads an inet_diag_msg; ok is false for one that takes no IPv4.
func parseListener(proto string, m []byte) (l listener, ok bool) {
	if len(m) < diagAnswer {
		return listener{}, false
	}
	l = listener{proto: proto, uid: native.Uint32(m[64:])}
	port := binary.BigEndian.Uint16(m[4:])
	if m[0] == unix.AF_INET {
		l.at = netip.AddrPortFrom(netip.AddrFrom4([4]byte(m[8:12])), port)
		return l, port != 0
	}
	addr := netip.AddrFrom16([16]byte(m[8:24])).Unmap()
	if only := (noun{header: diagAnswer}).attr(m, diagV6Only); len(only) > 0 && only[0] != 0 {
		return listener{}, false
	}
	if addr.IsUnspecified() {
		addr = netip.IPv4Unspecified()
	}
	l.at = netip.AddrPortFrom(addr, port)
	return l, port != 0 && addr.Is4()
}

// on says who listens on p.
func (all listenerList) on(p Port) error {
	for _, l := range all {
		if l.proto != p.Proto || l.at.Port() != p.HostPort {
			continue
		}
		if l.at.Addr().IsUnspecified() || !p.HostAddr.IsValid() || l.at.Addr() == p.HostAddr {
			return fmt.Errorf("the host itself listens at %s (uid %d; ss -%clnp names the program)", l.at, l.uid, p.Proto[0])
		}
	}
	return nil
}
