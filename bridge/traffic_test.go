// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"

	"github.com/google/go-cmp/cmp"
)

// place is a network namespace that a test opens sockets in.
type place struct {
	name string
	do   func(func() error) error
}

func (h *host) place() place { return place{h.Name, h.Do} }

func (c *container) place() place {
	return place{c.name + " on " + c.Name, func(f func() error) error { return c.inNetns(c.name, f) }}
}

func internet(v *vnetsim.VNet) place { return place{"the internet", v.Internet.Do} }

// otherNetns makes a network namespace on the VM that is no container of ours.
func (h *host) otherNetns(name string) place {
	h.t.Helper()
	h.netns(name)
	return place{name + " on " + h.Name, func(f func() error) error { return h.inNetns(name, f) }}
}

// inNetns runs f in a network namespace that ip netns made on the VM. f starts no goroutine.
func (h *host) inNetns(name string, f func() error) error {
	return h.Do(func() error {
		ns, err := OpenNetns(fmt.Sprintf("/proc/%d/root/run/netns/%s", h.PidOne(), name))
		if err != nil {
			return err
		}
		defer ns.Close()
		return runInNamespace(ns, f)
	})
}

// serve answers each TCP connection to the address with the server's name and the client's address
// as the server sees it.
func (p place) serve(t *testing.T, server, address string) {
	t.Helper()
	var l net.Listener
	if err := p.do(func() (err error) {
		l, err = net.Listen("tcp4", address)
		return err
	}); err != nil {
		t.Fatalf("%s: %v", p.name, err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(conn, server+" "+clientOf(conn.RemoteAddr()))
			conn.Close()
		}
	}()
}

// serveUDP answers each packet as serve does each connection.
func (p place) serveUDP(t *testing.T, server, address string) {
	t.Helper()
	var conn net.PacketConn
	if err := p.do(func() (err error) {
		conn, err = net.ListenPacket("udp4", address)
		return err
	}); err != nil {
		t.Fatalf("%s: %v", p.name, err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		buf := make([]byte, 64)
		for {
			_, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			conn.WriteTo([]byte(server+" "+clientOf(from)), from)
		}
	}()
}

func clientOf(a net.Addr) string {
	return netip.MustParseAddrPort(a.String()).Addr().Unmap().String()
}

// How long a test waits for an answer that must come on a busy machine, and for one that must not.
const answerWait, silenceWait = 10 * time.Second, 1500 * time.Millisecond

// ask opens a connection from a place to network/address, such as tcp/10.96.1.1:80, and reads the
// answer.
func (p place) ask(to string, wait time.Duration) (server, client string, err error) {
	network, address, _ := strings.Cut(to, "/")
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	var conn net.Conn
	if err := p.do(func() (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, network+"4", address)
		return err
	}); err != nil {
		return "", "", err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	conn.SetDeadline(deadline)
	// vnetsim's servers speak HTTP and answer after this.
	if _, err := io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		return "", "", err
	}
	buf := make([]byte, 4096)
	n, err := conn.Read(buf)
	server, client, _ = strings.Cut(string(buf[:n]), " ")
	return server, client, err
}

// answers are the servers that a question may reach, each with the client's address that it sees. None
// of them: nobody answers.
type answers map[string]string

// manyAsks is how often a question is asked until each of its servers has answered. Two servers that
// are chosen at random leave one of them out once in 2^39.
const manyAsks = 40

// expectAnswers fails the test unless a question from the place reaches each of the servers, and no other.
func (c *checks) expectAnswers(from place, to string, want answers) {
	c.wait.Go(func() {
		if len(want) == 0 {
			if server, client, err := from.ask(to, silenceWait); err == nil || server != "" {
				c.t.Errorf("%s asks %s: %s answers %s, want no answer", from.name, to, server, client)
			}
			return
		}
		got := answers{}
		for range manyAsks {
			server, client, err := from.ask(to, answerWait)
			if err != nil {
				c.t.Errorf("%s asks %s: %v, want %v", from.name, to, err, want)
				return
			}
			if had, ok := got[server]; ok && had != client {
				client = had + " and " + client
			}
			if got[server] = client; maps.Equal(got, want) {
				return
			}
		}
		c.t.Errorf("%s asks %s (-want +got):\n%s", from.name, to, cmp.Diff(want, got))
	})
}

// checkAnswers asks one question and waits for the answer.
func checkAnswers(t *testing.T, from place, to string, want answers) {
	t.Helper()
	c := &checks{t: t, wait: sync.WaitGroup{}}
	c.expectAnswers(from, to, want)
	c.wait.Wait()
}
