// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// tunnel makes a point-to-point link tun0 like a VPN's between two places, with an address at each end.
func (h *host) tunnel(a, b place, addrA, addrB netip.Addr) {
	h.t.Helper()
	connectTuns(h.t, a, b)
	for _, end := range []struct {
		place
		own, peer netip.Addr
	}{{a, addrA, addrB}, {b, addrB, addrA}} {
		if err := end.do(func() error {
			shell(h.t, fmt.Sprintf("ip addr add %s peer %s dev tun0 && ip link set tun0 up", end.own, end.peer))
			return nil
		}); err != nil {
			h.t.Fatal(err)
		}
	}
}

// room is a network namespace on the VM that is nobody's container.
func (h *host) room(name string) *container {
	h.t.Helper()
	h.netns(name)
	return &container{host: h, name: name}
}

// The ports of the servers that answer starts.
const tcpPort, udpPort = 80, 53

// answer serves tcp/80 and udp/53 at every address of the place: a client is told its own address
// as the server sees it, and over TCP gets back all that it sent before.
func (c *container) answer() *container {
	c.t.Helper()
	c.host.answerAt(c.place(), netip.AddrPortFrom(netip.IPv4Unspecified(), tcpPort))
	return c
}

// answerAt serves TCP at the address and port, and UDP at the address and port 53.
func (h *host) answerAt(p place, at netip.AddrPort) {
	h.t.Helper()
	var tcp net.Listener
	var udp net.PacketConn
	if err := p.do(func() (err error) {
		if tcp, err = net.Listen("tcp4", at.String()); err != nil {
			return err
		}
		udp, err = net.ListenPacket("udp4", netip.AddrPortFrom(at.Addr(), udpPort).String())
		return err
	}); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { tcp.Close(); udp.Close() })
	go func() {
		for {
			conn, err := tcp.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				got, err := io.ReadAll(conn)
				if err == nil {
					fmt.Fprintln(conn, addrOf(conn.RemoteAddr()))
					_, _ = conn.Write(got)
				}
			}()
		}
	}()
	go func() {
		buf := make([]byte, 1<<16)
		for {
			_, from, err := udp.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = udp.WriteTo(fmt.Appendln(nil, addrOf(from)), from)
		}
	}()
}

func addrOf(a net.Addr) netip.Addr { return netip.MustParseAddrPort(a.String()).Addr().Unmap() }

// patience bounds what a client waits for. The machine may be busy with other tests.
const patience = 10 * time.Second

// fetch sends data over TCP and returns what the server sees as the client's address. The error
// tells if the data do not come back as they were.
func fetch(from place, to netip.AddrPort, data []byte, wait time.Duration) (seen string, err error) {
	var conn net.Conn
	err = from.do(func() (err error) {
		conn, err = (&net.Dialer{Timeout: wait}).Dial("tcp4", to.String())
		return err
	})
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(wait)); err != nil {
		return "", err
	}
	if _, err := conn.Write(data); err != nil {
		return "", err
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return "", err
	}
	got, err := io.ReadAll(conn)
	first, rest, _ := bytes.Cut(got, []byte("\n"))
	if err == nil && !bytes.Equal(rest, data) {
		err = fmt.Errorf("%d bytes came back of %d", len(rest), len(data))
	}
	return string(first), err
}

// ask sends a datagram until it is answered, and returns what the server sees as the client's address.
func ask(from place, to netip.AddrPort, wait time.Duration) (seen string, err error) {
	var conn net.Conn
	if err := from.do(func() (err error) {
		conn, err = net.Dial("udp4", to.String())
		return err
	}); err != nil {
		return "", err
	}
	defer conn.Close()
	buf := make([]byte, 512)
	for end := time.Now().Add(wait); time.Now().Before(end); { // a datagram may be lost
		if _, err = conn.Write([]byte("hello")); err != nil {
			time.Sleep(100 * time.Millisecond) // refused
			continue
		}
		_ = conn.SetReadDeadline(time.Now().Add(min(time.Second, wait)))
		var n int
		if n, err = conn.Read(buf); err == nil {
			return strings.TrimSpace(string(buf[:n])), nil
		}
	}
	return "", err
}

// echo sends a ping of so many bytes, with its IP header, that must not be fragmented, until it is
// answered. EMSGSIZE says that the way is known to be too narrow.
func echo(from place, to netip.Addr, size int, wait time.Duration) error {
	fd := -1
	if err := from.do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
		return err
	}); err != nil {
		return err
	}
	defer unix.Close(fd)
	id := uint16(fd)<<8 ^ uint16(time.Now().UnixNano())
	packet := icmp4(8, 0, append([]byte{byte(id >> 8), byte(id), 0, 1}, make([]byte, size-28)...)...)
	if size%2 == 1 {
		packet = packet[:size-20]
	}
	if err := errors.Join(
		unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000}),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 1<<18),
	); err != nil {
		return err
	}
	buf := make([]byte, 1<<16)
	for end := time.Now().Add(wait); ; {
		if err := unix.Sendto(fd, packet, 0, &unix.SockaddrInet4{Addr: to.As4()}); err != nil {
			return err
		}
		for again := time.Now().Add(min(wait, time.Second)); time.Now().Before(again); {
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if err == nil && n >= size && buf[20] == 0 && buf[24] == byte(id>>8) && buf[25] == byte(id) && netip.AddrFrom4([4]byte(buf[12:16])) == to {
				return nil
			}
		}
		if time.Now().After(end) {
			return fmt.Errorf("no answer to a ping of %d bytes", size)
		}
	}
}

// small is the size of a ping that fits through everything.
const small = 84 // bytes

// reaches checks that pings of the place are answered, as pings does without a process for each.
func (c *checks) reaches(from place, to ...netip.Addr) {
	for _, a := range to {
		c.wait.Go(func() {
			if err := echo(from, a, small, patience); err != nil {
				c.t.Errorf("%s pings %s: %v", from.name, a, err)
			}
		})
	}
}

// sees checks that the server behind to, tcp and udp, sees the client at that address. No port is no check.
func (c *checks) sees(want netip.Addr, from place, to netip.Addr, tcp, udp uint16) {
	c.wait.Go(func() {
		if got, err := fetch(from, netip.AddrPortFrom(to, tcp), []byte("hello"), patience); got != want.String() || err != nil {
			c.t.Errorf("%s fetches from %s:%d and is seen as %q, want %s: %v", from.name, to, tcp, got, want, err)
		}
	})
	if udp == 0 {
		return
	}
	c.wait.Go(func() {
		if got, err := ask(from, netip.AddrPortFrom(to, udp), patience); got != want.String() {
			c.t.Errorf("%s asks %s:%d and is seen as %q, want %s: %v", from.name, to, udp, got, want, err)
		}
	})
}

// refuses checks that nothing answers at to, tcp and udp.
func (c *checks) refuses(from place, to netip.Addr, tcp, udp uint16) {
	const wait = 1500 * time.Millisecond
	c.wait.Go(func() {
		if got, err := fetch(from, netip.AddrPortFrom(to, tcp), nil, wait); err == nil {
			c.t.Errorf("%s fetches from %s:%d and is seen as %q, want nobody to answer", from.name, to, tcp, got)
		}
	})
	c.wait.Go(func() {
		if got, err := ask(from, netip.AddrPortFrom(to, udp), wait); err == nil {
			c.t.Errorf("%s asks %s:%d and is seen as %q, want nobody to answer", from.name, to, udp, got)
		}
	})
}
