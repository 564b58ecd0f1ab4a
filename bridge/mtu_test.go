// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"azurevnet/internal/vnetsim"

	"golang.org/x/sys/unix"
)

// megabyte is enough to fill every window and to need every size of packet.
var megabyte = bytes.Repeat([]byte("0123456789abcdef"), 1<<16)

// fits checks that pings of so many bytes pass from one place to an address, and that a larger one is
// answered: the client learns that the way is too narrow. largest 0 is no check of the latter.
func (c *checks) fits(from place, to netip.Addr, size, larger int) {
	c.wait.Go(func() {
		err := echo(from, to, size, patience)
		if errors.Is(err, unix.EMSGSIZE) { // the ICMP error of an earlier, larger packet may come late
			err = echo(from, to, size, patience)
		}
		if err != nil {
			c.t.Errorf("%s pings %s with %d bytes: %v", from.name, to, size, err)
		}
		if larger == 0 {
			return
		}
		if err := echo(from, to, larger, patience); !errors.Is(err, unix.EMSGSIZE) {
			c.t.Errorf("%s pings %s with %d bytes: %v, want to hear that they are too many", from.name, to, larger, err)
		}
	})
}

// transfers bounds how many megabytes are on their way at once, so that each of them is in time on a
// machine that is busy.
var transfers = make(chan struct{}, 4)

// carries checks that a megabyte goes to the server and comes back.
func (c *checks) carries(from place, to netip.Addr, port uint16) {
	c.wait.Go(func() {
		transfers <- struct{}{}
		defer func() { <-transfers }()
		if _, err := fetch(from, netip.AddrPortFrom(to, port), megabyte, 2*patience); err != nil {
			c.t.Errorf("a megabyte from %s to %s:%d: %v", from.name, to, port, err)
		}
	})
}

// withMTU makes the n-th container, attaches it with that MTU, and has it answer.
func (h *host) withMTU(n int, mode Mode, mtu int, ports ...PublishedPort) *container {
	h.t.Helper()
	c := h.container(n)
	e := publishing(c.endpoint(mode, Policy{SNAT: true}), ports...)
	e.MTU = mtu
	a := h.mustAttach(e)
	if mtu != 0 && a.MTU != mtu {
		h.t.Errorf("an endpoint for which %d bytes are asked has an MTU of %d", mtu, a.MTU)
	}
	return c.answer()
}

// Whatever the MTU of a container, of its neighbours and of the NIC, and however the NIC's changes: what is too
// large is answered, and nothing vanishes.
func TestMTU(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 3, MTU: 9000}, vnetsim.VMConfig{Secondaries: 1, MTU: 9000})
		h, peer := hosts[0], hosts[1]
		const internetPort = 7070
		h.answerAt(internet(v), netip.AddrPortFrom(vnetsim.InternetAddr, internetPort))
		h.answerAt(h.place(), netip.AddrPortFrom(h.Primary, tcpPort))
		peer.answerAt(peer.place(), netip.AddrPortFrom(peer.Primary, tcpPort))
		h.ip("link set eth0 mtu 1500")
		h.mustEnsure(h.spec(mode))
		old, narrow := h.withMTU(0, mode, 0), h.withMTU(1, mode, 1400, tcpAndUDP(netip.Addr{}, 8080, 5353)...)
		far := peer
		peer.mustEnsure(peer.spec(mode))
		wideFar := far.running(0, mode, Policy{SNAT: true}).answer()

		both := func(when string) {
			t.Helper()
			h.whole(when)
			c := &checks{t: t}
			for _, from := range []*container{old, narrow, wideFar} {
				c.carries(from.place(), vnetsim.InternetAddr, internetPort)
				c.carries(from.place(), peer.Primary, tcpPort)
				c.carries(from.place(), h.Primary, tcpPort)
			}
			for _, to := range []*container{old, narrow} {
				for _, from := range []place{peer.place(), h.place(), wideFar.place(), old.place(), narrow.place()} {
					c.carries(from, to.addr, tcpPort)
				}
			}
			c.carries(internet(v), h.Public, 8080)
			c.carries(peer.place(), h.Primary, 8080)
			c.carries(h.place(), loopback, 8080)
			for _, from := range []place{peer.place(), wideFar.place(), h.place(), old.place()} {
				c.fits(from, narrow.addr, 1400, 1401)
			}
			c.wait.Wait()
			if t.Failed() {
				t.Fatal(when)
			}
		}
		both("a NIC of 1500 bytes")

		h.ip("link set eth0 mtu 9000")
		if broken := h.broken(); mode == ModeBridge && !slices.ContainsFunc(broken, func(s string) bool {
			return strings.Contains(s, "azure0 has an MTU of 1500 bytes and not the 9000 of eth0")
		}) {
			t.Errorf("the NIC's MTU grew: broken says %q", broken)
		}
		h.reconcile()
		wide := h.withMTU(2, mode, 0)
		both("the NIC's MTU grew")
		c := &checks{t: t}
		for _, from := range []place{peer.place(), wideFar.place(), h.place(), wide.place()} {
			c.fits(from, old.addr, 1500, 1501)
		}
		for _, from := range []place{peer.place(), wideFar.place(), h.place()} {
			c.fits(from, wide.addr, 9000, 0)
		}
		c.fits(wide.place(), peer.Primary, 9000, 0)
		c.fits(wide.place(), wideFar.addr, 9000, 0)
		c.fits(wide.place(), vnetsim.InternetAddr, 1500, 1501)
		for _, to := range []netip.Addr{old.addr, narrow.addr, peer.Primary, h.Primary, wideFar.addr} {
			c.carries(wide.place(), to, tcpPort)
		}
		c.carries(wide.place(), vnetsim.InternetAddr, internetPort)
		c.carries(peer.place(), wide.addr, tcpPort)
		c.wait.Wait()

		if err := v.SetInternetMTU(1300); err != nil {
			t.Fatal(err)
		}
		for _, from := range []*container{old, narrow, wide} {
			from.sh("ip route flush cache")
			c.fits(from.place(), vnetsim.InternetAddr, 1300, 1301)
			c.carries(from.place(), vnetsim.InternetAddr, internetPort)
		}
		c.wait.Wait()
		if err := v.SetInternetMTU(0); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			t.Fatal("a narrow way to the internet")
		}

		for _, h := range hosts {
			h.ip("link set eth0 mtu 1500")
			h.reconcile()
		}
		if broken := h.broken(); len(broken) != 1 || !strings.Contains(broken[0], wide.addr.String()) || !strings.Contains(broken[0], "MTU of 9000 bytes is more than the 1500 of eth0") {
			t.Errorf("the NIC's MTU shrank: broken says %q", broken)
		}
		for _, to := range []netip.Addr{old.addr, narrow.addr, peer.Primary, h.Primary, wideFar.addr} {
			c.carries(wide.place(), to, tcpPort)
		}
		c.carries(wide.place(), vnetsim.InternetAddr, internetPort)
		c.carries(old.place(), wide.addr, tcpPort)
		c.fits(wide.place(), peer.Primary, 1500, 1501)
		c.fits(old.place(), wide.addr, 1500, 0)
		c.wait.Wait()
		checkFabric(t, v, old.addr, narrow.addr, wide.addr, wideFar.addr)
	})
}

// An MTU that is larger than the NIC's is refused: larger packets would vanish.
func TestMTUOfMoreThanTheNIC(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		e := h.container(0).endpoint(mode, Policy{})
		e.MTU = 1501
		want := fmt.Sprintf("an MTU of %d bytes is more than the 1500 of eth0", e.MTU)
		if _, err := h.attach(e); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	})
}
