// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netns"
)

// serve answers with the client's address on tcp/80, and on udp/53.
func (c *container) serve() {
	c.t.Helper()
	dir := c.t.TempDir()
	who := filepath.Join(dir, "cgi-bin", "who")
	if err := errors.Join(os.Mkdir(filepath.Dir(who), 0o755), os.WriteFile(who, []byte("#!/bin/sh\necho\necho $REMOTE_ADDR\n"), 0o755), os.Chmod(filepath.Dir(dir), 0o755), os.Chmod(dir, 0o755)); err != nil {
		c.t.Fatal(err)
	}
	c.sh("busybox httpd -p 0.0.0.0:80 -h " + dir)
	var echo net.PacketConn
	if err := c.do(func() (err error) { echo, err = net.ListenPacket("udp4", ":53"); return err }); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { echo.Close() })
	go func() {
		buf := make([]byte, 512)
		for {
			n, from, err := echo.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = echo.WriteTo(fmt.Appendf(nil, "%s from %s", strings.TrimSpace(string(buf[:n])), from), from)
		}
	}()
}

const who = "curl -s -m 4 http://%s/cgi-bin/who"

// do runs f in the container's namespace, on a thread that Do takes back.
func (c *container) do(f func() error) error {
	return c.Do(func() error {
		ns, err := netns.GetFromPath(fmt.Sprintf("/proc/%d/root/run/netns/%s", c.PidOne(), c.name))
		if err != nil {
			return err
		}
		defer ns.Close()
		if err := netns.Set(ns); err != nil {
			return err
		}
		return f()
	})
}

// ask sends a datagram from a namespace and returns the answer.
func ask(from func(func() error) error, to netip.Addr, port int) string {
	var c net.Conn
	if err := from(func() (err error) {
		c, err = net.Dial("udp4", netip.AddrPortFrom(to, uint16(port)).String())
		return err
	}); err != nil {
		return err.Error()
	}
	defer c.Close()
	buf := make([]byte, 512)
	var err error
	for range 5 { // a datagram may be lost
		_, _ = c.Write([]byte("hello"))
		_ = c.SetReadDeadline(time.Now().Add(time.Second))
		var n int
		if n, err = c.Read(buf); err == nil {
			return string(buf[:n])
		}
	}
	return err.Error()
}

func published(e Endpoint, ports ...Port) Endpoint {
	e.Ports = ports
	return e
}

// Published ports are reached from everywhere, by every address of the host, with
// any FORWARD policy and bridge-nf-call-iptables, with SNAT and without.
func TestPublishedPortsAreReached(t *testing.T) {
	t.Parallel()
	v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 3}, vnetsim.VMConfig{Secondaries: 1})
	h, far := hosts[0], hosts[1].container(0)
	h.mustEnsure()
	hosts[1].mustEnsure()
	on, off, other := h.container(0), h.container(1), h.container(2)
	h.mustAttach(published(on.endpoint(Policy{SNAT: true}), Port{Proto: "tcp", HostPort: 8080, Port: 80}, Port{Proto: "udp", HostPort: 5353, Port: 53}))
	h.mustAttach(published(off.endpoint(Policy{}), Port{Proto: "tcp", HostPort: 8081, Port: 80}, Port{Proto: "udp", HostPort: 5354, Port: 53}))
	h.mustAttach(other.endpoint(Policy{SNAT: true}))
	hosts[1].mustAttach(far.endpoint(Policy{SNAT: true}))
	on.serve()
	off.serve()
	for _, call := range []string{"0", "1"} {
		for _, policy := range []string{"ACCEPT", "DROP"} {
			t.Run(fmt.Sprintf("forward %s call-iptables %s", policy, call), func(t *testing.T) {
				h.run("iptables-nft", "-P", "FORWARD", policy)
				if err := h.Do(func() error { _, err := h.setSysctl("bridge/bridge-nf-call-iptables", call); return err }); err != nil {
					t.Fatal(err)
				}
				checkPublished(t, v, h, hosts[1], far, []*container{on, off, other})
			})
		}
	}
	checkViolations(t, v)
	if mended := h.reconcile(); len(mended) > 0 {
		t.Errorf("reconcile mended what stood: %q", mended)
	}
}

func checkPublished(t *testing.T, v *vnetsim.VNet, h, peer *host, far *container, local []*container) {
	var wait sync.WaitGroup
	defer wait.Wait()
	fetch := func(name string, ns *vnetsim.Namespace, prefix []string, to netip.Addr, port int, want string) {
		wait.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			all := slices.Concat(prefix, []string{"sh", "-c", fmt.Sprintf(who, netip.AddrPortFrom(to, uint16(port)))})
			if got, err := ns.Run(ctx, all[0], all[1:]...); strings.TrimSpace(got) != want {
				t.Errorf("%s fetches from %s:%d and is seen as %q, want %q: %v", name, to, port, strings.TrimSpace(got), want, err)
			}
		})
	}
	asks := func(name string, from func(func() error) error, to netip.Addr, port int, want string) {
		wait.Go(func() {
			if got := ask(from, to, port); !strings.HasPrefix(got, "hello from "+want+":") {
				t.Errorf("%s asks %s:%d and is answered %q, want %q", name, to, port, got, "hello from "+want)
			}
		})
	}
	loopback, host := netip.MustParseAddr("127.0.0.1"), h.Primary.String()
	for tcp, udp := range map[int]int{8080: 5353, 8081: 5354} {
		seen := map[int]string{8080: "192.0.2.1", 8081: host}[tcp] // without SNAT the answer would go astray
		fetch("the internet", v.Internet, nil, h.Public, tcp, seen)
		asks("the internet", v.Internet.Do, h.Public, udp, seen)
		fetch("another VM", peer.Namespace, nil, h.Primary, tcp, host)
		asks("another VM", peer.Do, h.Primary, udp, host)
		for _, to := range []netip.Addr{h.Primary, loopback} {
			fetch("the host", h.Namespace, nil, to, tcp, host)
			asks("the host", h.Do, to, udp, host)
		}
		for _, c := range append(slices.Clone(local), far) {
			fetch(c.name+" of "+c.Name, c.Namespace, []string{"ip", "netns", "exec", c.name}, h.Primary, tcp, host)
			asks(c.name+" of "+c.Name, c.do, h.Primary, udp, host)
		}
	}
}

// Nobody on the wire reaches what the host keeps to 127.0.0.1.
func TestPublishingOpensNoLoopback(t *testing.T) {
	t.Parallel()
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
	h := hosts[0]
	h.mustEnsure()
	c := h.container(0)
	h.mustAttach(published(c.endpoint(Policy{SNAT: true}), Port{Proto: "tcp", HostPort: 8080, Port: 80}))
	var heard net.Listener
	if err := h.Do(func() (err error) { heard, err = net.Listen("tcp4", "127.0.0.1:7777"); return err }); err != nil {
		t.Fatal(err)
	}
	defer heard.Close()
	c.try(fmt.Sprintf("ip route del local 127.0.0.0/8 dev lo table local; ip addr del 127.0.0.1/8 dev lo; ip route add 127.0.0.0/8 via %s dev eth0; "+
		"sysctl -qw net.ipv4.conf.eth0.route_localnet=1; timeout 2 busybox nc 127.0.0.1 7777 </dev/null", h.Primary))
	if err := heard.(*net.TCPListener).SetDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if from, err := heard.Accept(); err == nil {
		t.Errorf("a container reaches the host's 127.0.0.1 from %s", from.RemoteAddr())
	}
	if err := h.detach(c.endpoint(Policy{}).Owner); err != nil {
		t.Fatal(err)
	}
	h.reconcile()
	if got := strings.TrimSpace(h.run("cat", "/proc/sys/net/ipv4/conf/azure0/route_localnet")); got != "0" {
		t.Errorf("with nothing published, route_localnet is %s", got)
	}
	if tables := h.run("nft", "list", "tables"); strings.Contains(tables, "ip azure_vnet") {
		t.Errorf("with nothing published, a table is left: %s", tables)
	}
}

// Who has a port is told, and a port is had by one.
func TestPortConflicts(t *testing.T) {
	t.Parallel()
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 3})
	h := hosts[0]
	h.mustEnsure()
	var taken []interface{ Close() error }
	if err := h.Do(func() error {
		for _, at := range []string{"0.0.0.0:1000", "127.0.0.1:1001"} {
			l, err := net.Listen("tcp4", at)
			if err != nil {
				return err
			}
			taken = append(taken, l)
		}
		both, err := net.Listen("tcp", "[::]:1002") // which takes IPv4 too
		six, err6 := net.Listen("tcp6", "[::1]:1003")
		udp, errU := net.ListenPacket("udp4", "127.0.0.53:1004")
		taken = append(taken, both, six, udp)
		return errors.Join(err, err6, errU)
	}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		for _, l := range taken {
			l.Close()
		}
	}()
	one, two := h.container(0).endpoint(Policy{SNAT: true}), h.container(1).endpoint(Policy{SNAT: true})
	primary, loopback := h.Primary, netip.MustParseAddr("127.0.0.1")
	h.mustAttach(published(one, Port{Proto: "tcp", HostPort: 2000, Port: 80}, Port{Proto: "tcp", HostAddr: primary, HostPort: 2001, Port: 80}))
	for _, c := range []struct {
		name  string
		ports []Port
		err   string
	}{
		{"a listener", []Port{{Proto: "tcp", HostPort: 1000, Port: 80}}, "publish port 1000/tcp of the host: the host itself listens at 0.0.0.0:1000 (uid 0; ss -tlnp names the program)"},
		{"a listener of one address", []Port{{Proto: "tcp", HostPort: 1001, Port: 80}}, "the host itself listens at 127.0.0.1:1001"},
		{"another address than a listener's", []Port{{Proto: "tcp", HostAddr: primary, HostPort: 1001, Port: 80}}, ""},
		{"a listener of IPv6 and IPv4", []Port{{Proto: "tcp", HostPort: 1002, Port: 80}}, "the host itself listens at 0.0.0.0:1002"},
		{"a listener of IPv6", []Port{{Proto: "tcp", HostPort: 1003, Port: 80}}, ""},
		{"a socket of UDP", []Port{{Proto: "udp", HostPort: 1004, Port: 80}}, "the host itself listens at 127.0.0.53:1004 (uid 0; ss -ulnp names the program)"},
		{"the other protocol", []Port{{Proto: "udp", HostPort: 1000, Port: 80}}, ""},
		{"another container", []Port{{Proto: "tcp", HostPort: 2000, Port: 81}}, "it is published to " + one.Addr.Addr().String() + " already (" + one.Owner + ")"},
		{"another container, one address", []Port{{Proto: "tcp", HostAddr: loopback, HostPort: 2000, Port: 81}}, "is published to"},
		{"another container of one address", []Port{{Proto: "tcp", HostPort: 2001, Port: 81}}, "is published to"},
		{"other addresses", []Port{{Proto: "tcp", HostAddr: loopback, HostPort: 2001, Port: 81}}, ""},
		{"twice", []Port{{Proto: "tcp", HostPort: 3000, Port: 81}, {Proto: "tcp", HostPort: 3000, Port: 82}}, "it is asked for twice, for 81 and 82"},
		{"an address of nobody", []Port{{Proto: "tcp", HostAddr: netip.MustParseAddr("10.9.9.9"), HostPort: 3000, Port: 81}}, "10.9.9.9 is not an address of this host"},
		{"SCTP", []Port{{Proto: "sctp", HostPort: 3000, Port: 81}}, `tcp and udp can be published, and "sctp" cannot`},
		{"a range that is taken", []Port{{Proto: "tcp", HostPort: 1000, HostPortEnd: 1001, Port: 80}}, "publish a port 1000-1001/tcp of the host: none is free; of the last, the host itself listens"},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := h.kernelState()
			_, err := h.attach(published(two, c.ports...))
			if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
				t.Errorf("%v, want %q", err, c.err)
			}
			if err == nil {
				if err := h.detach(two.Owner); err != nil {
					t.Error(err)
				}
			}
			if diff := cmp.Diff(before, h.kernelState()); diff != "" {
				t.Errorf("it left (-before +after):\n%s", diff)
			}
			if s, err := h.state(); err != nil || len(s.Ports) != 1 {
				t.Errorf("host.json has %v %v", s.Ports, err)
			}
		})
	}
	t.Run("the first of a range that is free", func(t *testing.T) {
		got, err := h.attach(published(two, Port{Proto: "tcp", HostPort: 1999, HostPortEnd: 2003, Port: 80}, Port{Proto: "tcp", HostPort: 1999, HostPortEnd: 2003, Port: 81}))
		want := []Port{{Proto: "tcp", HostPort: 1999, Port: 80}, {Proto: "tcp", HostPort: 2002, Port: 81}}
		if diff := cmp.Diff(want, got.Ports, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); err != nil || diff != "" {
			t.Errorf("%v %s", err, diff)
		}
		if err := h.detach(two.Owner); err != nil {
			t.Error(err)
		}
	})
	t.Run("a free one, the same for a repeat", func(t *testing.T) {
		wish := published(two, Port{Proto: "tcp", Port: 80}, Port{Proto: "tcp", Port: 81}, Port{Proto: "udp", Port: 81})
		wish.Netns, wish.IfName = "", ""
		first, err := h.attach(wish)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range first.Ports {
			if p.HostPort < firstFree || p.HostPort > lastFree {
				t.Errorf("%s is not of the ephemeral range", p)
			}
		}
		if second := h.mustAttach(wish); !slices.Equal(first.Ports, second.Ports) {
			t.Errorf("a repeat gets %v, not %v", second.Ports, first.Ports)
		}
		if err := h.detach(two.Owner); err != nil {
			t.Error(err)
		}
	})
	t.Run("what a crash left stands in nobody's way", func(t *testing.T) {
		three := published(h.container(2).endpoint(Policy{SNAT: true}), Port{Proto: "tcp", HostPort: 4000, Port: 80})
		for _, step := range []string{"ports", "link", "publish", "alias"} {
			if !h.crash(step, func() { _, _ = h.attach(published(two, three.Ports...)) }) {
				t.Errorf("no attach got to %q", step)
			}
			if _, err := h.attach(three); err != nil {
				t.Errorf("after an attach died at %q: %v", step, err)
			}
			if err := errors.Join(h.detach(three.Owner), h.detach(two.Owner)); err != nil {
				t.Errorf("after an attach died at %q: %v", step, err)
			}
		}
		h.reconcile()
		if s, err := h.state(); err != nil || len(s.Ports) != 1 {
			t.Errorf("host.json has %v %v", s.Ports, err)
		}
	})
}

// Ports outlive a flushed ruleset, a lost host.json and a lost bridge.
func TestPortsAreRestored(t *testing.T) {
	t.Parallel()
	v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1}, vnetsim.VMConfig{})
	h := hosts[0]
	h.mustEnsure()
	c := h.container(0)
	at := h.mustAttach(published(c.endpoint(Policy{SNAT: true}),
		Port{Proto: "tcp", HostPort: 8080, Port: 80}, Port{Proto: "tcp", HostAddr: h.Primary, Port: 80}, Port{Proto: "udp", HostPort: 5353, Port: 53}))
	c.serve()
	before := sortElements(h.run("nft", "list", "table", "ip", "azure_vnet"))
	for _, trouble := range []struct {
		name string
		make func()
	}{
		{"the ruleset flushed", func() { h.run("nft", "flush", "ruleset") }},
		{"host.json lost", func() {
			if err := os.Remove(h.path("host.json")); err != nil {
				t.Error(err)
			}
		}},
		{"both, one after the other", func() { h.run("nft", "delete", "table", "ip", "azure_vnet") }},
		{"the bridge lost", func() { h.run("ip", "link", "del", "azure0") }},
		{"loopback's way lost", func() { h.run("sysctl", "-w", "net.ipv4.conf.azure0.route_localnet=0") }},
	} {
		trouble.make()
		h.reconcile()
		if diff := cmp.Diff(before, sortElements(h.run("nft", "list", "table", "ip", "azure_vnet"))); diff != "" {
			t.Errorf("%s: the table is not as it was (-want +got):\n%s", trouble.name, diff)
		}
		s, err := h.state()
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(slices.SortedFunc(slices.Values(at.Ports), byPort), slices.SortedFunc(slices.Values(s.Ports[at.Link]), byPort)) {
			t.Errorf("%s: host.json has %v, want %v", trouble.name, s.Ports, at.Ports)
		}
		for _, to := range []string{fmt.Sprintf("%s:8080", h.Primary), fmt.Sprintf("%s:%d", h.Primary, at.Ports[1].HostPort), "127.0.0.1:8080"} {
			if !attempt(h.VM, "sh", "-c", fmt.Sprintf(who, to)) {
				t.Errorf("%s: %s is not reached", trouble.name, to)
			}
		}
	}
	checkViolations(t, v)
}

func byPort(a, b Port) int { return int(a.HostPort) - int(b.HostPort) }

// A client that has been sending all along is heard as soon as there is someone
// to hear, and again when another container has the port.
func TestDatagramsFindTheNewContainer(t *testing.T) {
	t.Parallel()
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
	h := hosts[0]
	h.mustEnsure()
	var ask net.Conn
	if err := hosts[1].Do(func() (err error) {
		ask, err = net.Dial("udp", netip.AddrPortFrom(h.Primary, 5353).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer ask.Close()
	heard := func() bool {
		buf := make([]byte, 512)
		for range 40 {
			_, _ = ask.Write([]byte("hello\n"))
			_ = ask.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			if n, err := ask.Read(buf); err == nil && n > 0 {
				return true
			}
		}
		return false
	}
	_, _ = ask.Write([]byte("anybody?\n"))
	for n := range 2 {
		c := h.container(n)
		h.mustAttach(published(c.endpoint(Policy{SNAT: true}), Port{Proto: "udp", HostPort: 5353, Port: 53}))
		c.serve()
		if !heard() {
			t.Errorf("container %d does not hear", n)
		}
		if err := h.detach(c.endpoint(Policy{}).Owner); err != nil {
			t.Fatal(err)
		}
		if flows := h.run("sh", "-c", "grep -c 'dport=5353' /proc/net/nf_conntrack || true"); strings.TrimSpace(flows) != "0" {
			t.Errorf("flows of the container that is gone: %s", flows)
		}
		_, _ = ask.Write([]byte("anybody?\n"))
	}
}

// TestPublishedTable holds the table against its golden file.
func TestPublishedTable(t *testing.T) {
	for name, p := range map[string]Policy{"on": {SNAT: true}, "off": {}} {
		inNamespace(t, func() {
			in := exampleInput(1, 2, p)
			in.ports = map[string][]Port{}
			for n, host := range slices.Sorted(maps.Keys(in.endpoints)) {
				a := in.endpoints[host]
				a.ports = 2
				in.endpoints[host] = a
				in.ports[host] = []Port{
					{Proto: "tcp", HostPort: uint16(8080 + n), Port: 80},
					{Proto: "udp", HostAddr: netip.MustParseAddr("127.0.0.1"), HostPort: uint16(5353 + n), Port: 53},
				}
			}
			write := func() bool {
				changed, err := writeTable(in.published())
				if err != nil {
					t.Error(err)
				}
				return changed
			}
			if !write() {
				t.Error("the first write reports no change")
			}
			got := sortElements(sh(t, "nft -nn list table ip azure_vnet"))
			golden(t, filepath.Join("testdata", "table", "published-"+name+".nft"), got)
			if write() {
				t.Error("writing the same table again reports a change")
			}
			read, err := readPublished()
			if err != nil {
				t.Error(err)
			}
			for host, want := range in.ports {
				have := read[in.endpoints[host].addr.Addr()]
				if !slices.Equal(slices.SortedFunc(slices.Values(want), byPort), slices.SortedFunc(slices.Values(have), byPort)) {
					t.Errorf("read %v, want %v", have, want)
				}
			}
			sh(t, "nft list table ip azure_vnet | nft -c -f -")
		})
	}
}
