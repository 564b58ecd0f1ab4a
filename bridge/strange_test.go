// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
)

// Hosts are stranger than one thinks: each of these cut containers off, or told nobody.

// An address that somebody adds to the NIC from elsewhere is no subnet of the virtual network.
func TestAForeignAddressOnTheNIC(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2, NICs: []vnetsim.NICConfig{{Subnet: secondSubnet, Secondaries: 1}}}, vnetsim.VMConfig{Secondaries: 1})
		h, peer := hosts[0], hosts[1]
		spec := func(n int) Spec {
			s := h.specOf(n, mode)
			s.Subnet = h.NICs()[n].Prefix
			return s
		}
		h.ip("addr add 10.0.5.9/24 dev eth0", "addr add 10.0.6.1/24 dev eth1")
		for n := range h.NICs() {
			h.mustEnsure(spec(n))
		}
		a, b := h.runningOn(0, 0, mode, Policy{SNAT: true}), h.runningOn(1, 0, mode, Policy{SNAT: true})
		check := func(when string) {
			t.Helper()
			c := &checks{t: t}
			for _, from := range []*container{a, b} {
				c.reaches(from.place(), a.addr, b.addr, h.Primary, peer.Primary, vnetsim.HostAgentAddr)
				c.reaches(peer.place(), from.addr)
			}
			c.wait.Wait()
			h.whole(when)
		}
		check("with addresses that were there before")
		h.ip("addr add 10.0.7.1/24 dev eth0", "addr add 10.0.8.8/24 dev eth1")
		h.reconcile()
		check("with addresses that came later")
		checkFabric(t, v, a.addr, b.addr)
	})
}

// Links with the NIC's MAC, such as those of a virtual switch, are not taken for the NIC.
func TestOtherLinksHaveTheNICsMAC(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
		h, peer := hosts[0], hosts[1]
		h.mustEnsure(h.spec(mode))
		a := h.running(0, mode, Policy{SNAT: true})
		h.ip("tuntap add dtap0 mode tap", "tuntap add dtap1 mode tap", "link set dtap0 address "+h.MAC, "link set dtap1 address "+h.MAC, "link set dtap0 up")
		h.reconcile()
		h.whole("with taps")
		b := h.running(1, mode, Policy{SNAT: true})
		c := &checks{t: t}
		for _, to := range []netip.Addr{a.addr, b.addr} {
			c.reaches(peer.place(), to)
		}
		c.reaches(a.place(), b.addr, h.Primary, peer.Primary)
		c.wait.Wait()
		// Nor is anything changed by a guess once the NIC's name is not known either.
		h.ip("link set eth0 down", "link set eth0 name lan0", "link set lan0 up")
		before := h.kernelState()
		err := h.Do(func() error { _, err := h.Reconcile(t.Context()); return err })
		if err == nil || !strings.Contains(err.Error(), "both have the MAC "+h.MAC) {
			t.Errorf("reconcile with three links that may be the NIC: %v", err)
		}
		checkSame(t, "after a round that could not tell the NIC", before, h.kernelState())
		checkFabric(t, v, a.addr, b.addr)
	})
}

// A datagram flow that began while nft's tables were gone is not without SNAT for ever.
func TestDatagramsAfterTheRulesWereGone(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		a := h.running(0, mode, Policy{SNAT: true})
		internet(v).serveUDP(t, "internet", vnetsim.InternetAddr.String()+":5353")
		h.sh("iptables-legacy -A INPUT -m conntrack --ctstate INVALID -j DROP") // somebody goes on tracking
		var conn net.Conn
		if err := a.place().do(func() (err error) {
			d := net.Dialer{LocalAddr: &net.UDPAddr{Port: 4000}}
			conn, err = d.Dial("udp4", vnetsim.InternetAddr.String()+":5353")
			return err
		}); err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		ask := func(wait time.Duration) string {
			conn.Write([]byte("hello"))
			conn.SetReadDeadline(time.Now().Add(wait))
			buf := make([]byte, 64)
			n, _ := conn.Read(buf)
			return string(buf[:n])
		}
		want := "internet " + h.Public.String()
		asked := func() (got string) { // a datagram may be lost
			for end := time.Now().Add(answerWait); got != want && time.Now().Before(end); {
				got = ask(200 * time.Millisecond)
			}
			return got
		}
		if got := asked(); got != want {
			t.Fatalf("the answer is %q, want %q", got, want)
		}
		h.forgetFlows()
		h.sh("nft delete table ip azure_vnet")
		if got := ask(silenceWait); got != "" {
			t.Fatalf("without rules, the answer is %q", got)
		}
		h.reconcile()
		if got := asked(); got != want {
			t.Errorf("after a round, the answer is %q, want %q", got, want)
		}
		h.whole("at the end")
	})
}

// What the VM forwards for others, between its NICs, goes as it went.
func TestForwardedTrafficOfOthers(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1, NICs: []vnetsim.NICConfig{{Subnet: secondSubnet, Secondaries: 1}}}, vnetsim.VMConfig{})
		h := hosts[0]
		h.sh("sysctl -qw net.ipv4.ip_forward=1")
		way := func() string {
			return h.sh("ip route get 10.241.0.77 from " + hosts[1].Primary.String() + " iif eth0; ip route get " + hosts[1].Primary.String() + " from 10.241.0.77 iif eth1")
		}
		before := way()
		h.ensureAll(mode)
		h.runningOn(0, 0, mode, Policy{SNAT: true})
		h.runningOn(1, 0, mode, Policy{SNAT: true})
		checkSame(t, "the way of what is forwarded for others", before, way())
	})
}

// The containers of a primary NIC that is down leave by no other NIC.
func TestThePrimaryNICIsDown(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1, NICs: []vnetsim.NICConfig{{Secondaries: 1}}}, vnetsim.VMConfig{})
		h := hosts[0]
		h.ensureAll(mode)
		a, b := h.runningOn(0, 0, mode, Policy{SNAT: true}), h.runningOn(1, 0, mode, Policy{SNAT: true})
		c := &checks{t: t}
		c.reaches(a.place(), hosts[1].Primary)
		c.wait.Wait()
		h.ip("route add default via "+b.nic.Gateway.String()+" dev eth1 metric 300", "link set eth0 down")
		h.reconcile()
		c.pings(false, a, hosts[1].Primary, vnetsim.InternetAddr, vnetsim.HostAgentAddr)
		c.reaches(b.place(), hosts[1].Primary)
		c.reaches(a.place(), b.addr)
		c.wait.Wait()
		checkFabric(t, v, a.addr, b.addr)
	})
}

// A bridge of somebody else's whose name begins as ours do is none of our business.
func TestABridgeOfOthersThatIsNamedLikeOurs(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
		h := hosts[0]
		h.ip("link add azure-dev type bridge", "link add veth9 master azure-dev type veth peer name veth8", "link set azure-dev up")
		h.mustEnsure(h.spec(mode))
		if err := h.Do(func() error { return h.CheckReady(t.Context(), h.MAC) }); err != nil {
			t.Errorf("ready: %v", err)
		}
		h.whole("beside it")
		h.sh("echo 0 >/proc/sys/net/ipv4/ip_forward")
		if all := h.broken(); len(all) == 0 || !strings.Contains(strings.Join(all, " "), "ip_forward") {
			t.Errorf("broken: %q", all)
		}
	})
}

// A rule of somebody else's with the lowest number there is does not come between the host and its containers.
func TestARuleBeforeAllOthers(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1, NICs: []vnetsim.NICConfig{{Subnet: secondSubnet, Secondaries: 1}}}, vnetsim.VMConfig{})
		h := hosts[0]
		h.ensureAll(mode)
		a, b := h.runningOn(0, 0, mode, Policy{SNAT: true}), h.runningOn(1, 0, mode, Policy{SNAT: true})
		h.ip("route add blackhole default table 300")
		for _, pref := range []int{3, 2, 1} {
			h.ip(fmt.Sprintf("rule add pref %d to %s lookup 300", pref, netip.PrefixFrom(a.addr, 30).Masked()))
			h.reconcile()
			h.whole(fmt.Sprintf("with a rule of priority %d", pref))
			c := &checks{t: t}
			c.reaches(h.place(), a.addr, b.addr)
			c.reaches(hosts[1].place(), b.addr)
			c.reaches(b.place(), a.addr, hosts[1].Primary)
			c.wait.Wait()
		}
		checkFabric(t, v, b.addr)
	})
}

// A rule in our chain that is not ours goes, whatever its comment says.
func TestAQuotedCommentInOurChain(t *testing.T) {
	t.Parallel()
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
	h := hosts[0]
	h.run("iptables-nft", "-P", "FORWARD", "DROP")
	h.mustEnsure(h.spec(ModeBridge))
	h.sh(`iptables-nft -A AZURE-VNET -s 192.0.2.1 -m comment --comment 'two "quoted" words' -j DROP`)
	if mended := h.reconcile(); !slices.ContainsFunc(mended, func(s string) bool { return strings.Contains(s, "AZURE-VNET") }) {
		t.Errorf("mended: %q", mended)
	}
	if rules := h.run("iptables-nft", "-S", "AZURE-VNET"); strings.Contains(rules, "quoted") {
		t.Errorf("the rule is there still:\n%s", rules)
	}
	h.whole("after a round")
}

// A wall clock that steps leaves the time of the last round in the past or in the future. The next call that makes
// something does a round all the same.
func TestAClockThatStepsDelaysNoRound(t *testing.T) {
	t.Parallel()
	_, hosts := newHosts(t, vnetsim.VMConfig{})
	h := hosts[0]
	h.mustEnsure(h.spec(ModeBridge))
	for _, step := range []time.Duration{-10 * 365 * 24 * time.Hour, time.Minute, 10 * 365 * 24 * time.Hour} {
		h.sh("ip rule del pref 100")
		last := time.Now().Add(step)
		if err := os.Chtimes(h.path("reconciled"), last, last); err != nil {
			t.Fatal(err)
		}
		if b := h.mustEnsure(h.spec(ModeBridge)); len(b.Mended) == 0 {
			t.Errorf("with the last round %v from now, nothing is mended", step)
		}
	}
}
