// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// habit is what a container with NET_ADMIN does in its own namespace, by lines of the shell. The names in capitals are
// those of scene.names.
type habit struct {
	name string
	do   string
	from []string                // addresses from which it then speaks to all, and nobody must hear it
	sees func(frame []byte) bool // waits until the container has sent such a frame
	undo string
}

// batch runs lines of the ip tool in one process.
func batch(lines ...string) string {
	return "ip -batch - <<END\n" + strings.Join(lines, "\n") + "\nEND\n"
}

// wayBack gives eth0 again what the attach gave it.
var wayBack = batch(
	"link set eth0 address MAC up", "addr replace EVIL/16 dev eth0 noprefixroute",
	"route replace GATEWAY dev eth0 scope link src EVIL", "neigh replace GATEWAY lladdr GWMAC dev eth0 nud permanent",
	"route replace SUBNET via GATEWAY src EVIL", "route replace default via GATEWAY src EVIL")

// by leads packets to all others by another link, and byNoMore ends that.
func by(link string) string       { return batch(waysBy("replace", link)...) }
func byNoMore(link string) string { return batch(waysBy("del", link)...) }

func waysBy(verb, link string) (lines []string) {
	for _, to := range []string{"GOOD", "THIRD", "HOST", "FAR"} {
		lines = append(lines, "neigh "+verb+" "+to+" lladdr GWMAC dev "+link+" nud permanent", "route "+verb+" "+to+" dev "+link)
	}
	return lines
}

func pretends(address string) habit {
	return habit{do: "ip addr add " + address + "/32 dev eth0", from: []string{address}, undo: "ip addr del " + address + "/32 dev eth0"}
}

// underMAC is evil's own address from another MAC.
func underMAC(mac string) habit {
	return habit{do: batch("link set eth0 address "+mac, "neigh replace GATEWAY lladdr GWMAC dev eth0 nud permanent"), from: []string{"EVIL"}, undo: wayBack}
}

// stacked is a link upon eth0, from an address that is not lent. Nothing says that the kernel can make such a link.
func stacked(kind string) habit {
	return habit{do: batch("link add link eth0 name up0 type "+kind, "addr add UNLENT/32 dev up0", "link set up0 up") + by("up0"),
		from: []string{"UNLENT"}, undo: "ip link del up0"}
}

func isBPDU(f []byte) bool { return bytes.HasPrefix(f, []byte{1, 0x80, 0xc2, 0, 0, 0}) }

func habits() (all []habit) {
	named := func(name string, h habit) habit { h.name = name; return h }
	return []habit{
		named("adds another container's address", pretends("GOOD")),
		named("adds the host's address", pretends("HOST")),
		named("adds an ipconfig that is not lent", pretends("UNLENT")),
		named("adds the gateway's address", habit{do: batch("route del GATEWAY", "addr add GATEWAY/32 dev eth0") + by("eth0"), from: []string{"GATEWAY"},
			undo: "ip addr del GATEWAY/32 dev eth0\n" + byNoMore("eth0") + wayBack}),
		named("adds the host agent's address", pretends("AGENT")),
		named("adds the other VM's address", pretends("FAR")),
		named("takes another container's MAC", underMAC("HISMAC")),
		named("takes the gateway's MAC", underMAC("GWMAC")),
		named("takes the NIC's MAC", underMAC("NICMAC")),
		named("takes a MAC that nobody has", underMAC("02:00:00:00:00:99")),
		named("takes another container's MAC and address", habit{do: batch("link set eth0 address HISMAC", "addr add GOOD/32 dev eth0", "neigh replace GATEWAY lladdr GWMAC dev eth0 nud permanent"),
			from: []string{"GOOD", "EVIL"}, undo: "ip addr del GOOD/32 dev eth0\n" + wayBack}),
		named("has a macvlan", stacked("macvlan mode bridge")),
		named("has a macvlan with the MAC of eth0", stacked("macvlan mode passthru")),
		named("has an ipvlan", stacked("ipvlan mode l2")),
		named("has a VLAN", stacked("vlan id 7")),
		named("has a VLAN of a provider", stacked("vlan proto 802.1ad id 7")),
		named("has a dummy with another's address", habit{do: batch("link add up0 type dummy", "addr add GOOD/32 dev up0", "link set up0 up"), from: []string{"GOOD"}, undo: "ip link del up0"}),
		named("has a bridge that speaks STP", habit{do: batch("link add up0 type bridge stp_state 1 hello_time 100 priority 0", "link set eth0 master up0", "link set up0 up"), sees: isBPDU, undo: "ip link del up0"}),
		named("forwards for others", habit{do: "echo 1 >/proc/sys/net/ipv4/ip_forward; ip addr add UNLENT/32 dev eth0",
			from: []string{"UNLENT"}, undo: "echo 0 >/proc/sys/net/ipv4/ip_forward; ip addr del UNLENT/32 dev eth0"}),
		named("answers ARP for all", habit{do: "cd /proc/sys/net/ipv4; echo 1 >ip_forward; echo 1 >conf/eth0/proxy_arp; echo 1 >conf/eth0/proxy_arp_pvlan; echo 0 >neigh/eth0/proxy_delay",
			undo: "cd /proc/sys/net/ipv4; echo 0 >ip_forward; echo 0 >conf/eth0/proxy_arp; echo 0 >conf/eth0/proxy_arp_pvlan"}),
		named("leads the host agent by another container", habit{do: "ip route replace AGENT via GOOD dev eth0 onlink", undo: "ip route del AGENT"}),
		named("leads the host agent by another container's MAC", habit{do: batch("neigh replace AGENT lladdr HISMAC dev eth0 nud permanent", "route replace AGENT dev eth0"), undo: batch("route del AGENT", "neigh del AGENT dev eth0")}),
		named("sends back all that it gets", habit{do: "tc qdisc add dev eth0 clsact && tc filter add dev eth0 ingress protocol all u32 match u32 0 0 action mirred egress mirror dev eth0", undo: "tc qdisc del dev eth0 clsact"}),
		named("takes another container for its gateway", habit{do: "ip neigh replace GATEWAY lladdr HISMAC dev eth0 nud permanent", from: []string{"EVIL"}, undo: wayBack}),
		named("hears all frames", habit{do: "ip link set eth0 promisc on allmulticast on", undo: "ip link set eth0 promisc off allmulticast off"}),
		named("has the largest MTU", habit{do: "ip link set eth0 mtu 65535 && { timeout 0.2 busybox ping -q -c 1 -s 60000 GOOD >/dev/null || true; }", undo: "ip link set eth0 mtu 1500"}),
		named("has the smallest MTU", habit{do: "ip link set eth0 mtu 68", undo: "ip link set eth0 mtu 1500\n" + wayBack}),
		named("speaks IPv6", habit{do: "echo 0 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6; ip -6 addr add fe80::bad/64 dev eth0 nodad; timeout 0.2 busybox ping -6 -q -c 1 ff02::1%eth0 >/dev/null || true", undo: "ip -6 addr flush dev eth0"}),
		named("renames eth0, and sets it down and up", habit{do: batch("link set eth0 down", "link set eth0 name lan0", "link set lan0 up"), undo: batch("link set lan0 down", "link set lan0 name eth0") + wayBack}),
	}
}

// names has what the names in capitals stand for.
func (s *scene) names() *strings.Replacer {
	return strings.NewReplacer("GOOD", s.good.addr.String(), "THIRD", s.third.addr.String(), "HOST", s.h.Primary.String(), "FAR", s.far.Primary.String(),
		"EVIL", s.evil.addr.String(), "UNLENT", s.unlent.String(), "GATEWAY", s.evil.Gateway.String(), "AGENT", "168.63.129.16", "SUBNET", s.evil.Prefix.String(),
		"NICMAC", s.h.MAC, "HISMAC", s.his.String(), "GWMAC", s.gw.String(), "MAC", s.mine.String())
}

// A container with NET_ADMIN may do what it likes in its own namespace. It speaks in no other name, hears nothing that is
// for others, and does not reach the host agent's HTTP. All others still speak.
func TestHabitsHurtNobody(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode Mode) {
		s := newScene(t, mode)
		s.talk("before")
		before, names := s.picture(), s.names()
		tried := 0
		for i, habit := range habits() {
			if inMode := i%2 == slices.Index(Modes, mode); inMode || soaking { // make test tries each in one mode
				s.has(habit, names)
				tried++
			}
		}
		t.Logf("FIGURE hostile container: %d habits", tried)
		checkSame(t, "entries of others", before, s.picture())
		s.talk("after all habits")
		s.h.whole("after all habits")
		s.lendTaken()
		s.deleteEth0()
		checkFabric(t, s.v, s.good.addr, s.evil.addr)
	})
}

// has lets the container have a habit, and checks that it hurts nobody.
func (s *scene) has(habit habit, names *strings.Replacer) {
	s.t.Helper()
	s.hear()
	if err := s.evil.place().command(names.Replace("set -e\n" + habit.do)); err != nil {
		s.t.Logf("this kernel cannot: the container %s: %v", habit.name, err)
		_ = s.evil.place().command(names.Replace(habit.undo))
		return
	}
	for end := time.Now().Add(patience); habit.sees != nil && !anyOf(read(s.out, true), habit.sees); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			s.t.Errorf("the container %s: it never sends what it should", habit.name)
			break
		}
	}
	for _, from := range habit.from {
		s.speak(s.evil.place(), netip.MustParseAddr(names.Replace(from)), mark(anybody), s.good.addr, s.third.addr, s.h.Primary, s.far.Primary)
	}
	s.speak(s.good.place(), s.good.addr, mark(anybody&^wire), s.far.Primary)
	s.speak(s.h.place(), s.h.Primary, mark(anybody&^itself), s.evil.addr)
	s.dialAgent()
	heard := s.hearToTheEnd()
	for _, wrong := range heard {
		s.t.Errorf("the container %s: %s", habit.name, wrong)
	}
	c := &checks{t: s.t}
	c.reaches(s.good.place(), s.third.addr, s.h.Primary, s.far.Primary)
	c.reaches(s.h.place(), s.good.addr)
	c.reaches(s.far.place(), s.good.addr, s.h.Primary)
	c.wait.Wait()
	if soaking {
		s.checkOthersWhole("while a container " + habit.name)
	}
	if err := s.evil.place().command(names.Replace(habit.undo)); err != nil {
		s.t.Errorf("undo %s: %v", habit.name, err)
	}
	if s.t.Failed() {
		s.t.Fatalf("the container %s", habit.name)
	}
}

func anyOf(frames [][]byte, is func([]byte) bool) bool {
	for _, f := range frames {
		if is(f) {
			return true
		}
	}
	return false
}

// speak sends a datagram with the mark from an address of a place to each of the others. It may well fail.
func (s *scene) speak(p place, from netip.Addr, mark []byte, to ...netip.Addr) {
	s.t.Helper()
	var conn net.PacketConn
	if err := p.do(func() (err error) {
		conn, err = net.ListenPacket("udp4", netip.AddrPortFrom(from, 0).String())
		return err
	}); err != nil {
		s.t.Errorf("%s has no address %s: %v", p.name, from, err)
		return
	}
	defer conn.Close()
	for _, a := range to {
		if a != from {
			_, _ = conn.WriteTo(mark, net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, heardAt)))
		}
	}
}

// dialAgent begins a connection to each HTTP port of the host agent from whatever addresses evil has. The first segment
// leaves at once. The NIC's listener says if it leaves the VM.
func (s *scene) dialAgent() {
	s.t.Helper()
	for _, port := range []int{80, 32526} {
		if err := s.evil.place().do(func() error {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			_ = unix.Connect(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{168, 63, 129, 16}})
			return nil
		}); err != nil {
			s.t.Error(err)
		}
	}
}

// checkOthersWhole checks that nothing is broken but what is the hostile container's own.
func (s *scene) checkOthersWhole(when string) {
	s.t.Helper()
	for _, fault := range s.h.broken() {
		if !strings.Contains(fault, hostEnd(s.evil)) && !strings.Contains(fault, s.evil.addr.String()) {
			s.t.Errorf("%s: broken: %s", when, fault)
		}
	}
}

// lendTaken gives an address to a container while the hostile one has put it on its own eth0.
func (s *scene) lendTaken() {
	s.t.Helper()
	s.evil.sh(fmt.Sprintf("ip addr add %s/32 dev eth0", s.unlent))
	fourth := s.h.running(3, s.mode, Policy{SNAT: true})
	c := &checks{t: s.t}
	c.reaches(fourth.place(), s.good.addr, s.h.Primary, s.far.Primary)
	for _, from := range []place{s.h.place(), s.far.place(), s.good.place()} {
		c.reaches(from, s.unlent)
	}
	c.wait.Wait()
	s.evil.sh(fmt.Sprintf("ip addr del %s/32 dev eth0", s.unlent))
}

// deleteEth0 has the container delete its interface. Others do not notice it, and a detach and a round leave nothing.
func (s *scene) deleteEth0() {
	s.t.Helper()
	e := s.evil.endpoint(s.mode, Policy{SNAT: true})
	s.evil.sh("ip link del eth0")
	c := &checks{t: s.t}
	c.reaches(s.good.place(), s.third.addr, s.h.Primary, s.far.Primary)
	c.wait.Wait()
	s.h.mustDetach(e.Owner)
	s.h.reconcile()
	s.h.whole("after the detach")
	state := s.h.kernelState()
	for _, left := range []string{hostEnd(s.evil), s.evil.addr.String(), s.mine.String()} {
		for line := range strings.Lines(state) {
			if strings.Contains(line, left) {
				s.t.Errorf("a container that deleted its eth0 leaves %s", line)
			}
		}
	}
	s.h.mustAttach(e)
	c.reaches(s.evil.place(), s.good.addr, s.h.Primary, s.far.Primary)
	c.wait.Wait()
}

// A container with NET_ADMIN over a user namespace of its own cannot touch the links of the host. In the host's user
// namespace it could: the kernel lets it name the network namespace at the other end of its eth0, and SECURITY.md says so.
func TestNetAdminInItsOwnUserNamespace(t *testing.T) {
	t.Parallel()
	s := newScene(t, ModeBridge)
	var eth0 *net.Interface
	if err := s.h.Do(func() (err error) { eth0, err = net.InterfaceByName("eth0"); return err }); err != nil {
		t.Fatal(err)
	}
	onTheNIC := fmt.Sprintf("ip link add mv0 link if%d link-netnsid 0 type macvlan mode bridge", eth0.Index)
	hasMacvlan := s.h.place().command("ip link add mv9 link eth0 type macvlan && ip link del mv9") == nil
	if err := s.evil.place().command(onTheNIC); err != nil && hasMacvlan {
		t.Errorf("in the host's user namespace a container makes no macvlan on the NIC, and docs/security.md says that it can: %v", err)
	}
	_ = s.evil.place().command("ip link del mv0") // there may be none

	own := exec.Command("unshare", "--user", "--map-root-user", "--net", "sh", "-c", "ip link set lo up && echo ready && exec sleep 600")
	ready, err := own.StdoutPipe()
	if err == nil {
		err = own.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { own.Process.Kill(); own.Wait() })
	if _, err := io.ReadFull(ready, make([]byte, 6)); err != nil {
		t.Skipf("this kernel makes no user namespace: %v", err)
	}
	e := s.evil.endpoint(s.mode, Policy{SNAT: true})
	e.Owner, e.Addr, e.Netns = "cni/net/own/eth0", netip.PrefixFrom(s.unlent, e.Addr.Bits()), fmt.Sprintf("/proc/%d/ns/net", own.Process.Pid)
	s.h.mustAttach(e)
	before := s.h.kernelState()
	inside := func(line string) (string, error) {
		out, err := exec.Command("nsenter", "--target", fmt.Sprint(own.Process.Pid), "--user", "--net", "--preserve-credentials", "sh", "-c", line).CombinedOutput()
		return string(out), err
	}
	if out, err := inside("ip link set eth0 mtu 1400 && ip link set eth0 mtu 1500 && ip netns list-id"); err != nil || !strings.Contains(out, "nsid 0") {
		t.Errorf("the container cannot change its own eth0, or does not see where the other end is: %v: %s", err, out)
	}
	if out, err := inside(onTheNIC); err == nil || !strings.Contains(out, "not permitted") {
		t.Errorf("a macvlan on the NIC: %v: %s", err, out)
	}
	checkSame(t, "the host", before, s.h.kernelState())
	s.talk("after all that")
}
