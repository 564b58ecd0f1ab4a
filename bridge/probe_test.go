// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"encoding/binary"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// probe is traffic between a host and a peer for as long as a test wishes: a
// datagram every millisecond, and one TCP connection that is never idle.
type probe struct {
	t       *testing.T
	udp     net.PacketConn // echoes, on the host
	ask     net.Conn       // asks, on the peer
	tcp     net.Conn       // of the peer
	served  net.Conn       // its other end
	stop    chan struct{}
	running sync.WaitGroup

	worst atomic.Int64 // longest time without an echo, ns
	sent  atomic.Int64
	back  atomic.Int64
	turns atomic.Int64 // of the TCP connection
}

// startProbe has peer talk to addr of host.
func startProbe(t *testing.T, on, peer *host, addr netip.Addr) *probe {
	t.Helper()
	p := &probe{t: t, stop: make(chan struct{})}
	var listener net.Listener
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("probe %s: %v", addr, err)
		}
	}
	must(on.Do(func() (err error) {
		if p.udp, err = net.ListenPacket("udp", ":0"); err == nil {
			listener, err = net.Listen("tcp", ":0")
		}
		return err
	}))
	defer listener.Close()
	port := func(a net.Addr) string { return a.String()[len("[::]:"):] }
	accepted := make(chan net.Conn, 1)
	go func() {
		c, _ := listener.Accept()
		accepted <- c
	}()
	must(peer.Do(func() (err error) {
		if p.ask, err = net.Dial("udp", net.JoinHostPort(addr.String(), port(p.udp.LocalAddr()))); err == nil {
			p.tcp, err = net.DialTimeout("tcp", net.JoinHostPort(addr.String(), port(listener.Addr())), 5*time.Second)
		}
		return err
	}))
	p.served = <-accepted
	for _, f := range []func(){p.echo, p.listen, p.send, p.serve, p.talk} {
		p.running.Go(f)
	}
	p.passes(50)
	return p
}

func (p *probe) echo() {
	buf := make([]byte, 64)
	for {
		n, from, err := p.udp.ReadFrom(buf)
		if n > 0 {
			_, _ = p.udp.WriteTo(buf[:n], from) // no route for a moment: the gap is measured where it is heard
		}
		if err != nil && p.stopped() {
			return
		}
	}
}

func (p *probe) send() {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			_, _ = p.ask.Write(binary.BigEndian.AppendUint64(nil, uint64(p.sent.Add(1))))
		case <-p.stop:
			return
		}
	}
}

func (p *probe) listen() {
	buf := make([]byte, 64)
	last := time.Now()
	for {
		n, err := p.ask.Read(buf)
		if p.stopped() {
			return
		}
		if err == nil && n > 0 {
			p.back.Add(1)
			p.worst.Store(max(p.worst.Load(), int64(time.Since(last))))
			last = time.Now()
		}
	}
}

func (p *probe) serve() {
	buf := make([]byte, 8)
	for {
		if _, err := p.served.Read(buf); err != nil {
			return
		}
		if _, err := p.served.Write(buf); err != nil {
			return
		}
	}
}

func (p *probe) talk() {
	buf := make([]byte, 8)
	for !p.stopped() {
		if _, err := p.tcp.Write(buf); err != nil {
			return
		}
		if _, err := p.tcp.Read(buf); err != nil {
			return
		}
		p.turns.Add(1)
		time.Sleep(time.Millisecond)
	}
}

func (p *probe) stopped() bool {
	select {
	case <-p.stop:
		return true
	default:
		return false
	}
}

// passes waits until the datagrams and the connection get n turns further.
func (p *probe) passes(n int64) {
	p.t.Helper()
	back, turns := p.back.Load(), p.turns.Load()
	for deadline := time.Now().Add(10 * time.Second); p.back.Load() < back+n || p.turns.Load() < turns+n; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatalf("the host cannot be reached: %d of %d datagrams and %d of %d turns of the connection in 10 s",
				p.back.Load()-back, n, p.turns.Load()-turns, n)
		}
	}
}

// end ends the probe and returns the longest silence.
func (p *probe) end() time.Duration {
	p.t.Helper()
	p.passes(20)
	close(p.stop)
	for _, c := range []interface{ Close() error }{p.tcp, p.served, p.udp, p.ask} {
		c.Close()
	}
	p.running.Wait()
	p.t.Logf("%d of %d datagrams, longest silence %v, %d turns of the connection",
		p.back.Load(), p.sent.Load(), time.Duration(p.worst.Load()).Round(time.Millisecond), p.turns.Load())
	return time.Duration(p.worst.Load())
}
