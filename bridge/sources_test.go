// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"azurevnet/internal/vnetsim"
)

// A container with two interfaces is reached at both of its addresses from everywhere, and answers by the one that
// was asked: on one NIC, on two, and on two in one subnet, with strict reverse path filters everywhere. When either
// interface goes, the other goes on, and when it comes back both do. Nothing piles up meanwhile.
func TestTwoInterfacesOfOneContainer(t *testing.T) {
	t.Parallel()
	for name, nics := range map[string][]vnetsim.NICConfig{
		"one NIC":                nil,
		"two NICs":               {{Subnet: secondSubnet, Secondaries: 2}},
		"two NICs in one subnet": {{Secondaries: 2}},
	} {
		t.Run(name, func(t *testing.T) {
			inOneMode(t, func(t *testing.T, mode Mode) {
				v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 4, NICs: nics}, vnetsim.VMConfig{}, vnetsim.VMConfig{Subnet: secondSubnet})
				h := hosts[0]
				h.ensureAll(mode)
				last := h.NICs()[len(h.NICs())-1]
				first := h.container(0)
				second := &container{h, first.name, last, last.Secondaries[1]}
				beside, besideToo := h.runningOn(0, 2, mode, Policy{SNAT: true}), h.runningOn(len(nics), 3-3*len(nics), mode, Policy{SNAT: true})
				first.sh("for f in all default; do echo 1 >/proc/sys/net/ipv4/conf/$f/rp_filter; done")
				h.sh("for f in all eth0; do echo 1 >/proc/sys/net/ipv4/conf/$f/rp_filter; done")
				one, two := first.endpoint(mode, Policy{SNAT: true}), second.endpoint(mode, Policy{SNAT: true})
				two.Owner, two.IfName = strings.TrimSuffix(two.Owner, "eth0")+"eth1", "eth1"

				paths := func(when string, mine ...*container) {
					t.Helper()
					c := &checks{t: t}
					for _, at := range mine {
						for _, from := range []place{h.place(), hosts[1].place(), hosts[2].place(), beside.place(), besideToo.place()} {
							c.reaches(from, at.addr)
						}
						c.sees(hosts[1].Primary, hosts[1].place(), at.addr, tcpPort, 0)
						c.sees(hosts[2].Primary, hosts[2].place(), at.addr, tcpPort, 0)
						c.sees(beside.addr, beside.place(), at.addr, tcpPort, 0)
						for _, to := range []netip.Addr{h.Primary, hosts[1].Primary, hosts[2].Primary, beside.addr, besideToo.addr, vnetsim.HostAgentAddr} {
							c.expect(true, fmt.Sprintf("%s, %s: pings %s", when, at.addr, to), func() bool {
								return at.try(fmt.Sprintf("busybox ping -q -c 1 -W 3 -I %s %s", at.addr, to))
							})
						}
					}
					c.reaches(first.place(), h.Primary, hosts[1].Primary, hosts[2].Primary, beside.addr, besideToo.addr)
					c.wait.Wait()
					h.whole(when)
					if t.Failed() {
						t.Fatalf("%s:\n%s\n%s", when, first.sh("ip rule; ip route show table all | grep -v -e broadcast -e local"), h.sh("ip rule"))
					}
				}
				h.mustAttach(one)
				first.answer()
				if got := first.sh("ip rule | grep 16864 || true"); got != "" {
					t.Errorf("with one interface, the container has the rules %q", got)
				}
				h.mustAttach(two)
				paths("with both", first, second)
				first.sh("ip rule add pref 100 lookup 16863 proto 168") // as of an azure-vnet that runs in the container
				h.mustDetach(one.Owner)
				paths("without the first", second)
				h.mustAttach(one)
				paths("with the first again", first, second)
				h.mustDetach(two.Owner)
				paths("without the second", first)
				for range 3 {
					h.mustAttach(two)
					h.mustDetach(two.Owner)
				}
				h.mustAttach(two)
				if rules := first.sh("ip rule"); strings.Count(rules, "16864") != 2 || !strings.Contains(rules, "100:\tfrom all lookup 16863 ") {
					t.Errorf("the container has other rules than two of ours and one of its own:\n%s", rules)
				}
				checkFabric(t, v, first.addr, second.addr)
			})
		})
	}
}

// An interface that somebody else made in the container gets no rule and no table of ours.
func TestAnInterfaceOfOthersBeside(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		c := h.container(0)
		h.sh("ip link add other type veth peer name net1 netns " + c.name + "; ip addr add 172.30.0.1/24 dev other; ip link set other up")
		c.sh("ip addr add 172.30.0.2/24 dev net1; ip link set net1 up")
		h.mustAttach(c.endpoint(mode, Policy{SNAT: true}))
		if got := c.sh("ip rule | grep -e 16864 -e proto || true"); strings.Contains(got, "16864") {
			t.Errorf("rules beside an interface of others: %q", got)
		}
		if !c.pings(h.Primary) || !c.pings(netip.MustParseAddr("172.30.0.1")) {
			t.Error("the container is cut off")
		}
	})
}
