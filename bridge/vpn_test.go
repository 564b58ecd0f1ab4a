// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"azurevnet/internal/vnetsim"
)

// wireGuard connects a host to a peer by the real wireguard-go, as wg-quick does it: all of the host's traffic goes
// by the tunnel but for what main has a route to. It returns the addresses of the two ends.
func wireGuard(h, peer *host) (here, there netip.Addr) {
	h.t.Helper()
	here, there = netip.MustParseAddr("10.8.0.2"), netip.MustParseAddr("10.8.0.1")
	key := func() (private, public string) {
		private = strings.TrimSpace(h.sh("wg genkey"))
		return private, strings.TrimSpace(h.sh("echo " + private + " | wg pubkey"))
	}
	private, public := key()
	peersPrivate, peersPublic := key()
	up := func(h *host, conf string) {
		file := filepath.Join(h.t.TempDir(), "wg0.conf")
		if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
			h.t.Fatal(err)
		}
		h.sh("WG_QUICK_USERSPACE_IMPLEMENTATION=wireguard-go wg-quick up " + file + " 2>&1")
	}
	up(peer, fmt.Sprintf("[Interface]\nPrivateKey = %s\nAddress = %s/24\nListenPort = 51820\n[Peer]\nPublicKey = %s\nAllowedIPs = %s/32\n", peersPrivate, there, public, here))
	up(h, fmt.Sprintf("[Interface]\nPrivateKey = %s\nAddress = %s/24\n[Peer]\nPublicKey = %s\nAllowedIPs = 0.0.0.0/0\nEndpoint = %s:51820\n", private, here, peersPublic, peer.Primary))
	return here, there
}

// A VPN that takes all of the host's traffic takes its containers' too, and hides their addresses; what is the VNet's
// stays the VNet's, for each NIC. The VPN comes before our containers or after them.
func TestWireGuardTakesEverything(t *testing.T) {
	inBothModes(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1, NICs: []vnetsim.NICConfig{{Subnet: secondSubnet, Secondaries: 1}}}, vnetsim.VMConfig{Secondaries: 1})
		h, peer := hosts[0], hosts[1]
		var tunnel, server netip.Addr
		if mode == ModeTransparent {
			tunnel, server = wireGuard(h, peer)
		}
		h.ensureAll(mode)
		peer.ensureAll(mode)
		a, b := h.runningOn(0, 0, mode, Policy{SNAT: true}), h.runningOn(1, 0, mode, Policy{SNAT: true})
		far := peer.runningOn(0, 0, mode, Policy{})
		if mode == ModeBridge {
			tunnel, server = wireGuard(h, peer)
			h.reconcile()
		}
		behind := netip.MustParseAddr("198.18.0.7")
		peer.ip("addr add " + behind.String() + "/32 dev lo")
		peer.answerAt(peer.place(), netip.AddrPortFrom(netip.IPv4Unspecified(), tcpPort))
		c := &checks{t: t}
		c.sees(tunnel, h.place(), behind, tcpPort, 0)
		for _, from := range []*container{a, b} {
			c.sees(tunnel, from.place(), behind, tcpPort, 0)
			c.sees(tunnel, from.place(), server, tcpPort, 0)
			c.reaches(from.place(), a.addr, b.addr, h.Primary, peer.Primary, far.addr)
			c.sees(from.addr, from.place(), far.addr, tcpPort, udpPort)
			c.sees(far.addr, far.place(), from.addr, tcpPort, udpPort)
			c.reaches(h.place(), from.addr)
		}
		c.wait.Wait()
		h.whole("with a VPN")
		checkFabric(t, v, a.addr, b.addr, far.addr, h.Primary)
	})
}
