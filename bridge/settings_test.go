// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
)

// sysctlsOfOthers are settings as administrators, distributions and other programs make them. LINK is
// the link that leads to containers; one that is not there yet is passed over.
var sysctlsOfOthers = []string{
	"ipv4/conf/all/arp_ignore=1", "ipv4/conf/all/arp_ignore=2", "ipv4/conf/all/arp_ignore=8",
	"ipv4/conf/eth0/arp_ignore=2", "ipv4/conf/LINK/arp_ignore=8", "ipv4/conf/default/arp_ignore=8",
	"ipv4/conf/all/arp_filter=1", "ipv4/conf/LINK/arp_filter=1 ipv4/conf/default/arp_filter=1",
	"ipv4/conf/all/arp_announce=2",
	"ipv4/conf/all/rp_filter=0 ipv4/conf/eth0/rp_filter=0", "ipv4/conf/all/rp_filter=1", "ipv4/conf/all/rp_filter=2",
	"ipv4/conf/LINK/rp_filter=0", "ipv4/conf/LINK/rp_filter=2", "ipv4/conf/eth0/rp_filter=1", "ipv4/conf/default/rp_filter=0",
	"ipv4/conf/all/src_valid_mark=1",
	"ipv4/conf/LINK/forwarding=0", "ipv4/conf/eth0/forwarding=0", "ipv4/conf/default/forwarding=0", "ipv4/conf/all/forwarding=0", "ipv4/ip_forward=0",
	"ipv4/conf/LINK/proxy_arp=0", "ipv4/conf/LINK/proxy_arp_pvlan=0", "ipv4/neigh/LINK/proxy_delay=80", "ipv4/neigh/default/proxy_delay=80",
	"ipv4/conf/all/send_redirects=1", "ipv4/conf/LINK/send_redirects=1",
	"ipv4/conf/LINK/route_localnet=0", "ipv6/conf/LINK/disable_ipv6=0",
	"bridge/bridge-nf-call-iptables=1 bridge/bridge-nf-call-arptables=1",
}

// Settings of others, made before or after, keep no container from host, VNet and internet; or Broken says so, and
// Reconcile mends it. Containers ask for their gateway by ARP, as Docker's do.
func TestSettingsOfOthers(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
		h, peer := hosts[0], hosts[1]
		h.ensureAll(mode)
		a := h.container(0)
		e := a.endpoint(mode, Policy{SNAT: true})
		link, _ := linkNames(e.Owner)
		if mode == ModeBridge {
			link = "azure0"
		}
		other := h.running(1, mode, Policy{SNAT: true})
		reached := func(wait time.Duration) error {
			a.sh("ip neigh del " + a.Gateway.String() + " dev eth0 2>/dev/null || ip neigh flush dev eth0")
			errs := make(chan error)
			asks := map[netip.Addr]place{h.Primary: a.place(), peer.Primary: a.place(), vnetsim.InternetAddr: a.place(), other.addr: a.place()}
			for to, from := range asks {
				go func() { errs <- echo(from, to, small, wait) }()
			}
			for _, from := range []place{h.place(), peer.place(), other.place()} {
				go func() { errs <- echo(from, a.addr, small, wait) }()
			}
			var all error
			for range len(asks) + 3 {
				all = errors.Join(all, <-errs)
			}
			return all
		}
		// write makes settings and returns the line that undoes them.
		write := func(settings string) (undo string) {
			var line strings.Builder
			for s := range strings.FieldsSeq(strings.ReplaceAll(settings, "LINK", link)) {
				name, value, _ := strings.Cut(s, "=")
				fmt.Fprintf(&line, "f=/proc/sys/net/%s; if [ -e $f ]; then echo \"echo $(cat $f) >$f;\"; echo %s >$f; fi\n", name, value)
			}
			return h.sh(line.String())
		}
		check := func(when, settings string) {
			t.Helper()
			err := reached(1500 * time.Millisecond)
			broken := h.broken()
			if err != nil && len(broken) == 0 {
				t.Errorf("%s %s an attach: %v, and nothing is said to be broken", settings, when, err)
			}
			if len(broken) == 0 {
				return
			}
			h.reconcile()
			h.whole(settings)
			if err := reached(patience); err != nil {
				t.Errorf("%s %s an attach, and Reconcile: %v", settings, when, err)
			}
		}
		for i, settings := range sysctlsOfOthers {
			if !strings.Contains(settings, "LINK") && inShare(i, mode) {
				undo := write(settings)
				h.mustAttach(e)
				check("before", settings)
				h.mustDetach(e.Owner)
				h.sh(undo)
			}
		}
		h.reconcile()
		h.mustAttach(e)
		for i, settings := range sysctlsOfOthers {
			if !inShare(i+1, mode) {
				continue
			}
			undo := write(settings)
			check("after", settings)
			h.sh(undo)
			h.reconcile()
		}
		checkFabric(t, v, a.addr)
	})
}

// Somebody switches IPv6 on or off while containers run: for one link, for all, for new ones, or by an MTU that is too
// small for it. Containers still come, and rounds still mend. IPv6 that is on where it must be off is named.
func TestIPv6IsSwitchedAtRunTime(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		c := h.running(0, mode, Policy{SNAT: true})
		link, _ := linkNames(c.endpoint(mode, Policy{}).Owner)
		other := h.container(1)
		heals := func(t *testing.T, h *host, named string) {
			t.Helper()
			h.sh("ip route flush table 16863; ip link set " + link + " down")
			if wrong := strings.Join(h.broken(), "\n"); !strings.Contains(wrong, "down") || !strings.Contains(wrong, named) {
				t.Errorf("broken: %q, and not %q", wrong, named)
			}
			h.reconcile()
			h.whole("after a round")
			e := other.endpoint(mode, Policy{SNAT: true})
			e.MTU = 1000 // without IPv6, which needs 1,280
			h.mustAttach(e)
			h.whole("with another container")
			checks := &checks{t: t}
			checks.reaches(hosts[1].place(), c.addr, other.addr)
			checks.wait.Wait()
			h.mustDetach(e.Owner)
		}
		on := "ipv6.conf." + map[Mode]string{ModeBridge: "azure0", ModeTransparent: link}[mode] + ".disable_ipv6 is not 1"
		for _, s := range []struct{ name, settings, named string }{
			{"off everywhere", "all=1", ""},
			{"on everywhere", "all=0", on},
			{"off for new links", "default=1", ""},
			{"on for new links", "default=0", ""},
			{"on at the container's link and azure0", link + "=0 azure0=0", map[Mode]string{ModeTransparent: on}[mode]},
		} {
			t.Run(s.name, func(t *testing.T) {
				for set := range strings.FieldsSeq(s.settings) {
					conf, value, _ := strings.Cut(set, "=")
					h.sh("f=/proc/sys/net/ipv6/conf/" + conf + "/disable_ipv6; [ ! -e $f ] || echo " + value + " >$f")
				}
				heals(t, h, s.named)
			})
		}
		t.Run("a kernel without it", func(t *testing.T) {
			settings := t.TempDir() // /proc/sys/net as it is after a boot with ipv6.disable=1
			for _, name := range []string{"ipv4", "core"} {
				if err := os.Symlink("/proc/sys/net/"+name, filepath.Join(settings, name)); err != nil {
					t.Fatal(err)
				}
			}
			without := &host{VM: h.VM, Host: New(Config{Run: h.cfg.Run, Sysctl: settings}), t: t}
			heals(t, without, "")
		})
		checkFabric(t, v, c.addr, other.addr)
	})
}

// The neighbour table is the kernel's, of all namespaces together, and holds 1,024 entries by default. A container
// takes one of them, and the host one for all its containers' peers, however many they are.
func TestNeighboursOfContainersAreFew(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		const peers = 10
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{Secondaries: peers})
		h, far := hosts[0], hosts[1]
		h.ensureAll(mode)
		far.ensureAll(mode)
		cni, docker := h.running(0, mode, Policy{SNAT: true}), h.container(1)
		e := docker.endpoint(mode, Policy{SNAT: true})
		e.Netns, e.IfName = "", ""
		at := h.mustAttach(e)
		h.ip("link set " + at.Peer + " netns " + docker.name + " name eth0")
		gateway := docker.Gateway.String()
		docker.sh("ip addr add " + e.Addr.String() + " dev eth0 noprefixroute; ip link set eth0 up; ip route add " + gateway + " dev eth0; ip route add default via " + gateway +
			"; ip route add " + docker.Prefix.String() + " via " + gateway) // as libnetwork makes it of Join's answer
		c := &checks{t: t}
		for n := range peers {
			to := far.running(n, mode, Policy{SNAT: true}).addr
			c.reaches(cni.place(), to)
			c.reaches(docker.place(), to)
		}
		c.reaches(cni.place(), h.Primary, docker.addr)
		c.reaches(docker.place(), h.Primary, cni.addr)
		c.wait.Wait()
		for _, from := range []*container{cni, docker} {
			if got := strings.TrimSpace(from.sh("ip -4 neigh show | cut -d' ' -f1-3")); got != gateway+" dev eth0" {
				t.Errorf("%s has the neighbours %q, want its gateway alone", from.name, got)
			}
		}
		if got := strings.TrimSpace(h.sh("ip -4 neigh show | grep -v PERMANENT | cut -d' ' -f1-3")); got != gateway+" dev eth0" {
			t.Errorf("the host has the neighbours %q, want its gateway alone", got)
		}
	})
}

// A bridge that has all the ports it can have says so, and nothing of the attach is left.
func TestBridgeIsFull(t *testing.T) {
	t.Parallel()
	if !soaking {
		t.Skip("makes a thousand links: make soak")
	}
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2})
	h := hosts[0]
	h.ensureAll(ModeBridge)
	c, d := h.running(0, ModeBridge, Policy{SNAT: true}), h.container(1)
	const ports = 1022 // and the container's
	h.sh(fmt.Sprintf("{ for i in $(seq %d); do echo link add v$i group 9 type veth peer name w$i group 9; done; "+
		"for i in $(seq %[1]d); do echo link set v$i master azure0; echo link set w$i master azure0; done; } | ip -batch -", ports/2))
	before := h.kernelState()
	_, err := h.attach(d.endpoint(ModeBridge, Policy{SNAT: true}))
	if err == nil || !strings.Contains(err.Error(), "a port of azure0") || !strings.Contains(err.Error(), "a bridge takes 1,023 ports") {
		t.Errorf("attach to a bridge that is full: %v", err)
	}
	checkSame(t, "what the attach left", before, h.kernelState())
	checks := &checks{t: t}
	checks.reaches(c.place(), h.Primary)
	checks.wait.Wait()
	h.ip("link del v1")
	h.mustAttach(d.endpoint(ModeBridge, Policy{SNAT: true}))
	h.ip("link del group 9")
}

// Traffic control of others on the host end, such as that of the bandwidth plugin and of eBPF programs, works and is
// not passed by; we put nothing in its place.
func TestTrafficControlOfOthers(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
		h, peer := hosts[0], hosts[1]
		h.ensureAll(mode)
		c, other := h.running(0, mode, Policy{SNAT: true}).answer(), h.running(1, mode, Policy{SNAT: true})
		link, _ := linkNames(c.endpoint(mode, Policy{}).Owner)
		if got := strings.Fields(h.sh("tc qdisc show dev " + link)); !slices.Contains(got, "noqueue") || strings.Count(strings.Join(got, " "), "qdisc") != 1 {
			t.Errorf("%s has queueing of ours: %q", link, got)
		}
		if got := h.sh("tc filter show dev " + link + " ingress; tc filter show dev " + link + " egress"); got != "" {
			t.Errorf("%s has filters of ours: %q", link, got)
		}
		takes := func(from, to place, addr netip.Addr) time.Duration {
			t.Helper()
			start := time.Now()
			if _, err := fetch(from, netip.AddrPortFrom(addr, tcpPort), megabyte, 2*patience); err != nil {
				t.Errorf("a megabyte from %s to %s: %v", from.name, to.name, err)
			}
			return time.Since(start)
		}
		// 8 Mbit/s take a second for the megabyte, less what the bucket holds.
		const atLeast = 700 * time.Millisecond
		h.sh("tc qdisc add dev " + link + " root tbf rate 8mbit burst 32kb latency 400ms")
		for _, from := range []place{peer.place(), h.place(), other.place()} {
			if took := takes(from, c.place(), c.addr); took < atLeast {
				t.Errorf("a shaped container takes a megabyte of %s in %v", from.name, took)
			}
		}
		h.whole("with a tbf")
		h.sh("tc qdisc del dev " + link + " root")

		// The bandwidth plugin's other direction: an ingress qdisc, and a filter that takes all.
		h.sh("tc qdisc add dev " + link + " handle ffff: ingress && tc filter add dev " + link + " parent ffff: protocol ip u32 match u32 0 0 action mirred egress mirror dev lo")
		checks := &checks{t: t}
		checks.reaches(c.place(), h.Primary, peer.Primary, other.addr)
		checks.wait.Wait()
		if got := h.sh("tc -s filter show dev " + link + " parent ffff:"); !strings.Contains(got, "Sent ") || strings.Contains(got, "Sent 0 bytes") {
			t.Errorf("a filter on ingress saw nothing: %s", got)
		}
		h.whole("with an ingress qdisc")
		h.sh("tc qdisc del dev " + link + " ingress")

		// A program that drops: 2 is TC_ACT_SHOT.
		h.sh("tc qdisc add dev " + link + " clsact && tc filter add dev " + link + " ingress bpf da bytecode '1,6 0 0 2'")
		for to, from := range map[netip.Addr]place{h.Primary: c.place(), other.addr: c.place(), peer.Primary: c.place()} {
			if err := echo(from, to, small, time.Second); err == nil {
				t.Errorf("a program drops all of %s, and it reaches %s", from.name, to)
			}
		}
		h.sh("tc filter del dev " + link + " ingress && tc filter add dev " + link + " egress bpf da bytecode '1,6 0 0 2'")
		for _, from := range []place{h.place(), peer.place(), other.place()} {
			if err := echo(from, c.addr, small, time.Second); err == nil {
				t.Errorf("a program drops all that goes to a container, and %s reaches it", from.name)
			}
		}
		if mended := h.reconcile(); len(mended) > 0 {
			t.Errorf("reconcile mended %q", mended)
		}
		if got := h.sh("tc filter show dev " + link + " egress"); !strings.Contains(got, "bpf") {
			t.Errorf("reconcile took a program away: %q", got)
		}
		h.sh("tc filter del dev " + link + " egress")
		checks.reaches(c.place(), h.Primary, peer.Primary, other.addr)
		checks.reaches(peer.place(), c.addr)
		checks.wait.Wait()
		h.mustDetach(c.endpoint(mode, Policy{}).Owner)
		checkFabric(t, v, c.addr)
	})
}

// Settings of azure0 that we do not look at keep no container from anybody, and open nothing.
func TestBridgeSettingsThatDoNoHarm(t *testing.T) {
	t.Parallel()
	v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
	h, peer := hosts[0], hosts[1]
	h.ensureAll(ModeBridge)
	a, b := h.running(0, ModeBridge, Policy{SNAT: true}), h.running(1, ModeBridge, Policy{SNAT: true})
	for _, setting := range []string{"ageing_time 0", "forward_delay 3000", "group_fwd_mask 0xfff8", "mcast_querier 1", "nf_call_iptables 1", "nf_call_arptables 1", "priority 1"} {
		if !h.try("ip link set azure0 type bridge " + setting) {
			t.Logf("this kernel cannot: %s", setting)
			continue
		}
		a.sh("ip neigh flush dev eth0")
		c := &checks{t: t}
		c.reaches(a.place(), h.Primary, peer.Primary, b.addr, vnetsim.HostAgentAddr)
		c.reaches(peer.place(), a.addr)
		c.reaches(h.place(), a.addr, b.addr)
		c.wait.Wait()
		if t.Failed() {
			t.Fatal(setting)
		}
	}
	checkFabric(t, v, a.addr)
}
