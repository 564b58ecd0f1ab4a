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
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
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

// Containers of each NIC reach at once what the host reaches, whatever kind of route it has. They also reach the
// addresses that node-local-dns makes on the host, by its rules, which keep packets from connection tracking.
func TestContainersReachWhatTheHostReaches(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1, NICs: []vnetsim.NICConfig{{Subnet: secondSubnet, Secondaries: 1}}}, vnetsim.VMConfig{})
		h, peer := hosts[0], hosts[1]
		h.ensureAll(mode)
		a, b := h.runningOn(0, 0, mode, Policy{SNAT: true}), h.runningOn(1, 0, mode, Policy{SNAT: true, NoMetadata: true}) // which concerns no other link-local address
		site, here := h.room("site"), netip.MustParseAddr("192.168.99.1")
		h.tunnel(h.place(), site.place(), here, netip.MustParseAddr("192.168.99.2"))
		behind := netip.MustParseAddr("192.0.2.7")
		site.sh("ip addr add " + behind.String() + "/32 dev lo")
		h.answerAt(site.place(), netip.AddrPortFrom(netip.IPv4Unspecified(), tcpPort))
		for _, r := range []struct {
			name      string
			make, end []string
		}{
			{"FRR's nexthop objects",
				[]string{"nexthop add id 17 dev tun0", "nexthop add id 19 group 17", "route add 192.0.2.0/24 nhid 19"},
				[]string{"route del 192.0.2.0/24", "nexthop del id 19", "nexthop del id 17"}},
			{"strongSwan's table",
				[]string{"rule add pref 220 lookup 220", "route add 192.0.2.0/24 dev tun0 table 220 src " + here.String()},
				[]string{"rule del pref 220", "route flush table 220"}},
			{"tailscale's exit node",
				[]string{"rule add pref 5210 fwmark 0x80000/0xff0000 lookup main", "rule add pref 5230 fwmark 0x80000/0xff0000 lookup default",
					"rule add pref 5250 fwmark 0x80000/0xff0000 unreachable", "rule add pref 5270 lookup 52",
					"route add default dev tun0 table 52", "route add throw " + h.Prefix.String() + " table 52", "route add throw " + secondSubnet.String() + " table 52",
					"route add throw 168.63.129.16 table 52"},
				[]string{"rule del pref 5210", "rule del pref 5230", "rule del pref 5250", "rule del pref 5270", "route flush table 52"}},
			{"a route by a gateway in the tunnel",
				[]string{"route add 192.0.2.0/24 via 192.168.99.2 metric 20"},
				[]string{"route del 192.0.2.0/24 metric 20"}},
		} {
			t.Run(r.name, func(t *testing.T) {
				h.ip(r.make...)
				c := &checks{t: t}
				for _, from := range []*container{a, b} {
					c.sees(here, from.place(), behind, tcpPort, 0)
					c.reaches(from.place(), a.addr, b.addr, h.Primary, b.nic.Primary, peer.Primary, vnetsim.HostAgentAddr)
					c.reaches(h.place(), from.addr)
					c.reaches(peer.place(), from.addr)
				}
				c.sees(here, h.place(), behind, tcpPort, 0)
				c.reaches(h.place(), peer.Primary)
				c.wait.Wait()
				h.whole(r.name)
				h.ip(r.end...)
			})
		}
		t.Run("node-local-dns", func(t *testing.T) {
			h.checkNodeLocalDNS(t, map[Mode]string{ModeBridge: "iptables-nft", ModeTransparent: "iptables-legacy"}[mode], a, b)
		})
		h.whole("at the end")
		checkFabric(t, v, a.addr, b.addr, h.Primary)
	})
}

// checkNodeLocalDNS makes the link and the rules that node-local-dns makes, and asks for what it serves from containers
// and the host. It listens at an address of its own and, where kube-proxy uses iptables, at the DNS service's. INPUT drops
// what no rule accepts, as on a hardened node. The kernel tracks none of these packets.
func (h *host) checkNodeLocalDNS(t *testing.T, iptables string, clients ...*container) {
	h.ip("link add nodelocaldns type dummy 2>/dev/null || ip link add nodelocaldns type bridge") // not every kernel has the type dummy. The link stays down
	rules := "*raw\n%s*filter\n:INPUT DROP\n-A INPUT -i lo -j ACCEPT\n-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n%s"
	var raw, filter strings.Builder
	served := []netip.Addr{netip.MustParseAddr("169.254.20.10"), netip.MustParseAddr("10.96.0.10")}
	for _, addr := range served {
		h.ip("addr add " + addr.String() + "/32 dev nodelocaldns")
		h.answerAt(h.place(), netip.AddrPortFrom(addr, udpPort)) // by TCP too
		for _, proto := range []string{"tcp", "udp"} {
			to, from := fmt.Sprintf("-p %s -d %s --dport 53", proto, addr), fmt.Sprintf("-p %s -s %s --sport 53", proto, addr)
			fmt.Fprintf(&raw, "-A PREROUTING %s -j NOTRACK\n-A OUTPUT %s -j NOTRACK\n-A OUTPUT %s -j NOTRACK\n", to, from, to)
			fmt.Fprintf(&filter, "-A INPUT %s -j ACCEPT\n-A OUTPUT %s -j ACCEPT\n", to, from)
		}
	}
	h.sh(fmt.Sprintf("printf '"+rules+"' | %s-restore --noflush", raw.String()+"COMMIT\n", filter.String()+"COMMIT\n", iptables))
	for _, call := range []string{"0", "1"} {
		h.sh("echo " + call + " >/proc/sys/net/bridge/bridge-nf-call-iptables")
		h.reconcile()
		c := &checks{t: t}
		for _, addr := range served {
			c.sees(addr, h.place(), addr, udpPort, udpPort)
			for _, from := range clients {
				c.sees(from.addr, from.place(), addr, udpPort, udpPort)
			}
		}
		c.wait.Wait()
	}
	if tracked := h.sh("conntrack -L 2>/dev/null | grep -E 'dst=(169.254.20.10|10.96.0.10) ' || true"); tracked != "" {
		t.Errorf("the kernel tracks what node-local-dns says that it should not:\n%s", tracked)
	}
	h.sh(iptables + " -P INPUT ACCEPT")
}
