// Copyright (c) The azure-vnet authors. MIT licence.

package kill

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// probes ping an address every 20 ms from another VM.
type probes struct {
	to   netip.Addr
	conn net.PacketConn

	mu       sync.Mutex
	sent     uint16          // guarded by mu: the number of the last one
	answered map[uint16]bool // guarded by mu
}

// startProbes begins, and ends with the test.
func startProbes(t *testing.T, from test.Host, to netip.Addr) *probes {
	t.Helper()
	p := &probes{to: to, answered: map[uint16]bool{}}
	if err := vnetsim.InNamespace(fmt.Sprintf("/proc/%d/ns/net", from.PidOne()), func() (err error) {
		p.conn, err = net.ListenPacket("ip4:icmp", "0.0.0.0")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	t.Cleanup(func() { close(stop); p.conn.Close() })
	go p.hear()
	go func() {
		for tick := time.Tick(20 * time.Millisecond); ; {
			select {
			case <-stop:
				return
			case <-tick:
				p.send()
			}
		}
	}()
	return p
}

const probeID = 0x6b69

// send sends the next one.
func (p *probes) send() {
	p.mu.Lock()
	p.sent++
	n := p.sent
	delete(p.answered, n) // of 20 minutes ago
	p.mu.Unlock()
	request := binary.BigEndian.AppendUint16([]byte{8, 0, 0, 0, probeID >> 8, probeID & 0xff}, n)
	sum := uint32(8<<8) + probeID + uint32(n)
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(request[2:], ^uint16(sum))
	_, _ = p.conn.WriteTo(request, &net.IPAddr{IP: p.to.AsSlice()}) // one that cannot be sent is not answered
}

// hear notes the answers.
func (p *probes) hear() {
	answer := make([]byte, 1500)
	for {
		n, _, err := p.conn.ReadFrom(answer)
		if err != nil {
			return // closed
		}
		if n >= 8 && answer[0] == 0 && binary.BigEndian.Uint16(answer[4:]) == probeID {
			p.mu.Lock()
			p.answered[binary.BigEndian.Uint16(answer[6:])] = true
			p.mu.Unlock()
		}
	}
}

// last is the number of the last one that was sent.
func (p *probes) last() uint16 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.sent
}

// lost counts those that were sent after a number and have no answer within a second.
func (p *probes) lost(after uint16) int {
	upTo, lost := p.last(), 0
	for deadline := time.Now().Add(time.Second); ; time.Sleep(5 * time.Millisecond) {
		lost = 0
		p.mu.Lock()
		for n := after + 1; n != upTo+1; n++ {
			if !p.answered[n] {
				lost++
			}
		}
		p.mu.Unlock()
		if lost == 0 || time.Now().After(deadline) {
			return lost
		}
	}
}

// TestProbesNoticeASilentHost: the matrix fails for a host that does not answer for a while.
func TestProbesNoticeASilentHost(t *testing.T) {
	t.Parallel()
	n := newNode(t, vnetsim.VMConfig{})
	before := n.probes.last()
	n.Must("sh", "-c", "iptables -I INPUT -p icmp -j DROP; sleep 0.3; iptables -D INPUT 1")
	if lost := n.probes.lost(before); lost < 2 {
		t.Errorf("%d probes were lost", lost)
	}
}
