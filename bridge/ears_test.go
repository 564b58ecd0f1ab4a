// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"azurevnet/internal/vnetsim"
)

// ears are those who may hear a frame.
type ears byte

const (
	others  ears = 1 << iota // the other containers
	itself                   // the container that sent the frame
	theHost                  // sockets of the host
	wire                     // the fabric, to which the frame would leave by the NIC
	agent                    // the host agent's HTTP
	anybody = others | itself | theHost | wire | agent
)

func (e ears) String() string {
	var names []string
	for i, name := range []string{"another container", "the container itself", "the host", "the fabric", "the host agent"} {
		if e&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	return strings.Join(names, ", ")
}

// attack is a row of the table: frames that a container sends, and who must not hear them.
type attack struct {
	name   string
	secret ears // who must not hear the frames
	frames [][]byte
}

// notFor begins a mark, whose last byte says who must not hear a frame.
const notFor = "not for "

func mark(secret ears) []byte { return append([]byte(notFor), byte(secret)) }

// markOf returns who must not hear the frame, and whether it has a mark.
func markOf(frame []byte) (secret ears, marked bool) {
	_, rest, marked := bytes.Cut(frame, []byte(notFor))
	if !marked || len(rest) == 0 {
		return anybody, marked
	}
	return ears(rest[0]), true
}

// listener is a socket that hears frames, or packets without a frame's header.
type listener struct {
	who   ears
	name  string
	fd    int
	left  bool                    // hears what leaves by the link, and not what comes
	wrong func(heard []byte) bool // says that it must not hear this
	ended bool                    // has heard the end
	must  bool                    // must hear the end
}

// listen opens the ears of all.
func (s *scene) listen() {
	s.out = s.evil.openPacketSocket()
	add := func(l listener) { s.listeners = append(s.listeners, &l) }
	hostile := func(f []byte) bool {
		secret, marked := markOf(f)
		return marked && secret&others != 0 || !marked && !s.isOfConnection(f)
	}
	for _, c := range []*container{s.good, s.third} {
		add(listener{who: others, name: c.name, fd: c.openPacketSocket(), must: true, wrong: hostile})
	}
	add(listener{who: itself, name: "evil", fd: s.evil.openPacketSocket(), wrong: s.comesBack})
	for _, proto := range []int{unix.IPPROTO_ICMP, unix.IPPROTO_IGMP, unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_ESP, protoEIGRP, protoOSPF, protoVRRP, unix.IPPROTO_SCTP} {
		fd := openSocket(s.t, s.h.Do, func() (int, error) {
			return unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
		})
		add(listener{who: theHost, name: fmt.Sprintf("a socket of protocol %d", proto), fd: fd, must: proto == unix.IPPROTO_UDP, wrong: func(packet []byte) bool {
			secret, marked := markOf(packet)
			return marked && secret&theHost != 0
		}})
	}
	add(listener{who: wire, name: "eth0", fd: openSocket(s.t, s.h.Do, func() (int, error) { return packetSocket("eth0") }), left: true, must: true, wrong: s.leavesFalsely})
}

// isOfConnection says of a frame that it is from the other VM's end of a connection, whose kernel may send again.
func (s *scene) isOfConnection(f []byte) bool {
	return len(f) >= 36 && f[12] == 8 && f[13] == 0 && f[23] == unix.IPPROTO_TCP && addrAt(f, 26) == s.far.Primary && binary.BigEndian.Uint16(f[34:]) == connectedTo
}

// comesBack says of a frame to the container: it is the container's own, or its sender may not send to the container.
func (s *scene) comesBack(f []byte) bool {
	secret, marked := markOf(f)
	return !bytes.Equal(f[6:12], s.gw) || marked && secret&itself != 0 && !isICMPError(f)
}

// leavesFalsely says of a frame that leaves by the NIC that it has a false name, or was to be kept.
func (s *scene) leavesFalsely(f []byte) bool {
	nic := mustMAC(s.h.MAC)
	kind := [2]byte(f[12:14])
	switch {
	case !bytes.Equal(f[6:12], nic), f[0]&1 == 1 && kind != [2]byte{8, 6}:
		return true
	case kind == [2]byte{8, 6}:
		return !bytes.Equal(f[22:28], nic) || addrAt(f, 28) != s.h.Primary
	case kind != [2]byte{8, 0}:
		return true
	}
	if isHostAgentHTTP(f) {
		return true
	}
	if secret, marked := markOf(f); marked {
		return secret&wire != 0
	}
	return !slices.Contains([]netip.Addr{s.h.Primary, s.evil.addr, s.good.addr, s.third.addr}, addrAt(f, 26))
}

// isHostAgentHTTP says of a packet, or of the first of its fragments, that it goes to the HTTP ports of the host agent.
func isHostAgentHTTP(f []byte) bool {
	ports := 14 + int(f[14]&15)*4
	first := binary.BigEndian.Uint16(f[20:])&0x1fff == 0
	return addrAt(f, 30) == vnetsim.HostAgentAddr && f[23] == unix.IPPROTO_TCP && first && len(f) >= ports+4 &&
		slices.Contains([]uint16{80, 32526}, binary.BigEndian.Uint16(f[ports+2:]))
}

func addrAt(f []byte, at int) netip.Addr { return netip.AddrFrom4([4]byte(f[at : at+4])) }

// hear empties all ears, and returns what somebody must not hear.
func (s *scene) hear() (wrong []string) {
	for _, l := range s.listeners {
		for _, f := range read(l.fd, l.left) {
			if bytes.Contains(f, []byte(theEnd)) {
				l.ended = true
			} else if l.wrong(f) {
				wrong = append(wrong, fmt.Sprintf("%s (%s) hears % x", l.who, l.name, f))
			}
		}
	}
	return wrong
}

// openPacketSocket is a packet socket on the container's eth0.
func (c *container) openPacketSocket() (fd int) {
	c.t.Helper()
	return openSocket(c.t, c.place().do, func() (int, error) { return packetSocket("eth0") })
}

// openSocket opens a socket in a place, until the test ends.
func openSocket(t *testing.T, do func(func() error) error, open func() (int, error)) (fd int) {
	t.Helper()
	if err := do(func() (err error) { fd, err = open(); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 1<<22); err != nil {
		t.Fatal(err)
	}
	return fd
}

// packetSocket hears and sends all frames of a link of the calling thread's namespace.
func packetSocket(link string) (int, error) {
	const all = 0x0300 // ETH_P_ALL in network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, all)
	if err != nil {
		return -1, err
	}
	on, err := net.InterfaceByName(link)
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: on.Index})
}

// read empties a socket. Of a packet socket it returns the frames that came, or those that left.
func read(fd int, left bool) (frames [][]byte) {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			return frames
		}
		if l, ok := from.(*unix.SockaddrLinklayer); !ok || (l.Pkttype == unix.PACKET_OUTGOING) == left {
			frames = append(frames, bytes.Clone(buf[:n]))
		}
	}
}

// isICMPError says that a frame is what a router says of a packet, with the packet in it.
func isICMPError(f []byte) bool {
	return len(f) > 34 && f[12] == 8 && f[13] == 0 && f[23] == unix.IPPROTO_ICMP && slices.Contains([]byte{3, 11, 12}, f[34])
}

// hostEnd is the name of a container's link on the host.
func hostEnd(c *container) string {
	link, _ := linkNames("cni/net/" + c.name + "/eth0")
	return link
}

// listenUDP is a socket at the port that datagrams of the table go to. Nobody reads it, or a test does.
func (p place) listenUDP(t *testing.T) (conn net.PacketConn) {
	t.Helper()
	if err := p.do(func() (err error) { conn, err = net.ListenPacket("udp4", fmt.Sprintf(":%d", heardAt)); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// command runs lines of the shell in the network namespace of the place. It starts no process but the shell.
func (p place) command(lines string) error {
	return p.do(func() error {
		if out, err := exec.Command("sh", "-c", lines).CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, bytes.TrimSpace(out))
		}
		return nil
	})
}

// linkMAC is the MAC of a link of the host.
func (s *scene) linkMAC(name string) net.HardwareAddr {
	s.t.Helper()
	var link *net.Interface
	if err := s.h.Do(func() (err error) { link, err = net.InterfaceByName(name); return err }); err != nil {
		s.t.Fatal(err)
	}
	return link.HardwareAddr
}

// connect opens a connection to the other VM, which sends back all that it gets.
func (s *scene) connect(from place) (conn net.Conn) {
	s.t.Helper()
	if err := from.do(func() (err error) {
		conn, err = net.DialTimeout("tcp4", netip.AddrPortFrom(s.far.Primary, connectedTo).String(), patience)
		return err
	}); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	return conn
}

// echoTCP sends back all that comes to a port.
func (p place) echoTCP(t *testing.T, port uint16) {
	t.Helper()
	var l net.Listener
	if err := p.do(func() (err error) { l, err = net.Listen("tcp4", fmt.Sprintf(":%d", port)); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { conn.Close() })
			go io.Copy(conn, conn)
		}
	}()
}

// nextSegments are the segments that the two ends of a connection would send next.
func (s *scene) nextSegments(conn net.Conn) (near, far segment) {
	s.t.Helper()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		s.t.Fatal(err)
	}
	var sent, received int
	var failed error
	err = raw.Control(func(fd uintptr) {
		set := func(option, value int) {
			failed = errors.Join(failed, unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, option, value))
		}
		get := func(queue int) int {
			set(unix.TCP_REPAIR_QUEUE, queue)
			seq, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUEUE_SEQ)
			failed = errors.Join(failed, err)
			return seq
		}
		const receiveQueue, sendQueue = 1, 2
		set(unix.TCP_REPAIR, unix.TCP_REPAIR_ON)
		received, sent = get(receiveQueue), get(sendQueue)
		set(unix.TCP_REPAIR, unix.TCP_REPAIR_OFF_NO_WP)
	})
	if err := errors.Join(err, failed); err != nil {
		s.t.Fatal(err)
	}
	here, there := netip.MustParseAddrPort(conn.LocalAddr().String()), netip.MustParseAddrPort(conn.RemoteAddr().String())
	return segment{here, there, uint32(sent), uint32(received)}, segment{there, here, uint32(received), uint32(sent)}
}
