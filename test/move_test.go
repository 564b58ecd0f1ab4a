// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"azurevnet/internal/vnetsim"
)

// conversation is a TCP connection between two hosts on which a byte goes back
// and forth. Its ends were made in the hosts' namespaces and stay there.
type conversation struct {
	near, far net.Conn
	count     atomic.Int64 // bytes that came back
	worst     atomic.Int64 // longest wait for one, ns
	failed    atomic.Pointer[error]
}

// talk connects from one host to another.
func talk(t *testing.T, from, to host) *conversation {
	t.Helper()
	var l net.Listener
	err := to.Do(func() (err error) {
		l, err = net.Listen("tcp4", netip.AddrPortFrom(to.Primary, 0).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := &conversation{}
	err = from.Do(func() (err error) {
		c.near, err = net.DialTimeout("tcp4", l.Addr().String(), 5*time.Second)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if c.far, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.near.Close(); c.far.Close() })
	go func() {
		for b := make([]byte, 1); ; {
			if _, err := c.far.Read(b); err != nil {
				return
			}
			c.far.Write(b)
		}
	}()
	go func() {
		for b := make([]byte, 1); ; time.Sleep(time.Millisecond) {
			start := time.Now()
			c.near.SetDeadline(start.Add(5 * time.Second))
			_, err := c.near.Write(b)
			if err == nil {
				_, err = c.near.Read(b)
			}
			if err != nil {
				c.failed.Store(&err)
				return
			}
			c.count.Add(1)
			c.worst.Store(max(c.worst.Load(), int64(time.Since(start))))
		}
	}()
	return c
}

// goesOn says that the connection still carries bytes.
func (c *conversation) goesOn(t *testing.T) {
	t.Helper()
	before := c.count.Load()
	eventually(t, "the TCP connection goes on", 5*time.Second, func() bool {
		if err := c.failed.Load(); err != nil {
			t.Fatalf("the TCP connection broke: %v", *err)
		}
		return c.count.Load() > before+3
	})
}

// picture is all of a host's network, in the words of its tools: a line each. Two
// sysctls stay as they became, as docs/docker.md says.
func (h host) picture() []string {
	h.t.Helper()
	var all []string
	for _, script := range []string{
		"nft list ruleset | sed 's/ packets [0-9]* bytes [0-9]*//'",
		"iptables-save | grep -v '^#' | sed 's/ \\[[0-9:]*\\]//'", "iptables-legacy-save | grep -v '^#' | sed 's/ \\[[0-9:]*\\]//'",
		"ip -d link | sed 's/_timer *[0-9.]*//g'", "ip addr", "ip route show table all | sort", "ip -6 route show table all | sort",
		"ip rule", "ip -6 rule", "bridge fdb | sort", "sysctl -a -r '^net\\.' 2>/dev/null | grep -v -e nf_conntrack -e ipv4.ip_forward -e ipv4.conf.all.send_redirects | sort",
	} {
		out, _ := h.try("sh", "-c", script) // grep fails where nothing is left
		for line := range strings.Lines(out) {
			all = append(all, strings.TrimSpace(line))
		}
	}
	return all
}

func TestTheHostKeepsItsNetwork(t *testing.T) {
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
	h, plain := vms[0], vms[1]
	h.withPlugin()
	// What an operator may have set, besides what Azure's DHCP gives.
	h.must("ip", "route", "add", "10.99.0.0/16", "via", h.Gateway.String(), "dev", "eth0", "metric", "77")
	h.must("ip", "route", "add", "10.98.0.0/16", "via", h.Gateway.String(), "dev", "eth0", "table", "42")
	routes := func() []string {
		return []string{
			h.must("sh", "-c", "ip -4 route show table all type unicast | sed 's/ dev [a-z]*0//; s/  */ /g; s/ $//' | grep -v docker0 | sort"),
			h.must("sh", "-c", "ip -4 rule"), h.must("cat", "/etc/resolv.conf"),
		}
	}
	before, all := routes(), h.picture()
	in, out := talk(t, plain, h), talk(t, h, plain)
	in.goesOn(t)
	out.goesOn(t)

	h.network("azure")
	in.goesOn(t)
	out.goesOn(t)
	if diff := cmp.Diff(before, routes()); diff != "" {
		t.Errorf("the move to azure0 changed routes (- before, + after):\n%s", diff)
	}
	h.container("azure", "cc", "sleep 1000")
	h.docker("rm", "-f", "cc")
	h.docker("network", "rm", "azure")
	h.docker("plugin", "disable", plugin)
	h.must(top+"/build/azure-vnet-plugin", "uninstall")
	in.goesOn(t)
	out.goesOn(t)
	if diff := cmp.Diff(before, routes()); diff != "" {
		t.Errorf("uninstall left other routes (- before, + after):\n%s", diff)
	}
	if diff := cmp.Diff(all, h.picture()); diff != "" {
		t.Errorf("uninstall left something (- before, + after):\n%s", diff)
	}
	for _, gone := range []string{"ip link show azure0", "nft list table bridge azure_vnet", "ls -d /run/azure-vnet /run/systemd/network/05-azure-vnet.network"} {
		if out, err := h.try("sh", "-c", gone); err == nil {
			t.Errorf("%s: it is still there: %s", gone, out)
		}
	}
	t.Logf("longest wait of a byte over both moves: in %v, out %v",
		time.Duration(in.worst.Load()).Round(time.Millisecond), time.Duration(out.worst.Load()).Round(time.Millisecond))
	clean(t, vnet)
}
