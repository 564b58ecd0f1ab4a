// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"azurevnet/internal/statefile"
	"azurevnet/internal/vnetsim"
)

// harm is what somebody does to the host by a command of their own.
type harm struct {
	line      string // of the shell; LINK, HW and ADDR are the container's, OTHER is another container's link, HOST is the host's address
	names     string // part of a sentence that Broken says of it
	silent    bool   // the kernel sends no event of it that Watch listens to
	needs     string // of the kernel: a line of the shell that fails where the harm is not possible
	unchecked bool   // Check of the container does not look at it: it is of the whole host, or nobody's
}

var hostHarms = []harm{
	{line: "ip rule del pref 100", names: "no routing rule 100"},
	{line: "ip rule flush; ip rule add pref 32766 lookup main proto kernel; ip rule add pref 32767 lookup default proto kernel", names: "no routing rule 100"},
	{line: "ip rule add pref 7 lookup 99 proto 168", names: "is nobody's", silent: true},
	{line: "ip route add 10.240.77.77/32 dev eth0 proto 168 scope link", names: "is nobody's", silent: true, unchecked: true},
	{line: "ip route add 10.240.77.79/32 dev eth0 proto 168 scope link; ip route add unreachable 10.240.77.79/32 metric 9 proto 168", names: "is nobody's", silent: true, unchecked: true},
	{line: "nft flush ruleset; iptables-nft -P FORWARD DROP; iptables-nft -A FORWARD -s 192.0.2.2 -j DROP", names: "the nft table ip azure_vnet is gone"},
	{line: "nft delete table ip azure_vnet", names: "the nft table ip azure_vnet is gone"},
	{line: "nft flush chain ip azure_vnet forward", names: "the nft table ip azure_vnet is not as it should be", unchecked: true},
	{line: "nft add rule ip azure_vnet forward drop", names: "the nft table ip azure_vnet is not as it should be", unchecked: true},
	{line: "nft flush set ip azure_vnet nics", names: "the nft table ip azure_vnet is not as it should be", silent: true, unchecked: true},
	{line: "nft delete element ip azure_vnet sources { ADDR }", names: "the nft table ip azure_vnet is not as it should be", silent: true},
	{line: "iptables-nft -D FORWARD 2", names: "the jump to AZURE-VNET", unchecked: true},
	{line: "iptables-nft -F AZURE-VNET", names: "is missing", unchecked: true},
	{line: "iptables-nft -D FORWARD 2; iptables-nft -I FORWARD -m comment --comment azure-vnet -j AZURE-VNET", names: "the jump to AZURE-VNET is not the last rule", unchecked: true},
	{line: "iptables-nft -D AZURE-VNET 2", names: "is missing", unchecked: true},
	{line: "echo 0 >/proc/sys/net/ipv4/ip_forward", names: "ip_forward is not 1"},
	{line: "echo 0 >/proc/sys/net/ipv4/conf/eth0/forwarding", names: "ipv4.conf.eth0.forwarding is not 1"},
	{line: "rm -r RUN/systemd/network", names: "05-azure-vnet.network", silent: true, unchecked: true},
	{line: "rm RUN/azure-vnet/host.json", names: "host.json", silent: true, unchecked: true},
	{line: "echo '{' >RUN/azure-vnet/host.json", names: "host.json", silent: true, unchecked: true},
	{line: "head -c 4096 /dev/zero >RUN/azure-vnet/host.json", names: "host.json", silent: true, unchecked: true},
	{line: `echo '{"version":2042}' >RUN/azure-vnet/host.json`, names: "host.json", silent: true, unchecked: true},
	{line: `echo '{"version":2,"boot":"BOOT","nics":{"00:00:00:00:00:09":{"bridge":"../../x","subnet":"fd00::/64"}}}' >RUN/azure-vnet/host.json`, names: "host.json", silent: true, unchecked: true},
	{line: `echo '{"version":2,"boot":"BOOT","nics":{"NIC":{"bridge":"azure0","transparent":true,"primary":true}},"policies":{"00000001":{"SNAT":true,"Direct":["fd00::/8"]}}}' >RUN/azure-vnet/host.json`, names: "host.json", silent: true, unchecked: true},
	{line: `echo '{"version":2,"boot":"BOOT","nics":null,"policies":{"no id":{}},"ports":{"LINK":[{"proto":"icmp","hostPort":0}]}}' >RUN/azure-vnet/host.json`, names: "host.json", silent: true, unchecked: true},
	{line: `echo '{"version":2,"boot":"another","nics":{"00:00:00:00:00:09":{"bridge":"azure9"}}}' >RUN/azure-vnet/host.json`, names: "host.json", silent: true, unchecked: true},
}

var bridgeHarms = []harm{
	{line: "ip link del azure0", names: "azure0 is gone"},
	{line: "ip link set azure0 down", names: "azure0 is down"},
	{line: "ip link set azure0 down; ip link set azure0 up", names: "no route in table 16863"},
	{line: "ip link set azure0 address 02:11:22:33:44:55", names: "azure0 has the MAC"},
	{line: "ip link set azure0 mtu 1300", names: "azure0 has an MTU of 1300"},
	{line: "ip link set azure0 group 0", names: "azure0 is not in its link group"},
	{line: "ip link set azure0 type bridge mcast_snooping 1", names: "azure0 snoops multicast"},
	{line: "ip link set azure0 type bridge stp_state 1", names: "azure0 speaks the spanning tree protocol"},
	{line: "ip link set azure0 type bridge vlan_filtering 1", names: "azure0 filters VLANs", needs: "ip link add br9 type bridge vlan_filtering 1 && ip link del br9"},
	{line: "ip link set azure0 arp off", names: "azure0 answers no ARP"},
	{line: "ip link set azure0 alias ''", names: "azure0 is half made"},
	{line: "ip addr add 10.240.99.1/16 dev azure0", names: "azure0 has the address"},
	{line: "ip addr add 10.240.99.1/16 dev azure0; ip addr del 10.240.99.1/16 dev azure0", names: "no neighbour entry"},
	{line: "ip link set LINK nomaster", names: "not in azure0"},
	{line: "ip link set LINK address 02:11:22:33:44:66", names: "the host end has the MAC 02:11:22:33:44:66"},
	{line: "ip addr add HOST/16 dev LINK", names: "LINK has the address HOST/16"},
	{line: "ip addr add HOST/16 dev LINK noprefixroute", names: "LINK has the address HOST/16"},
	{line: "bridge link set dev LINK isolated on", names: "port flag isolated"},
	{line: "bridge link set dev LINK state 0", names: "its port does not forward", silent: true},
	{line: "ip link set LINK down", names: "down"},
	{line: "bridge link set dev LINK hairpin off", names: "port flag hairpin"},
	{line: "bridge link set dev LINK learning on", names: "port flag learning"},
	{line: "bridge link set dev LINK flood on", names: "port flag flood"},
	{line: "bridge link set dev LINK mcast_flood on", names: "port flag mcast_flood"},
	{line: "bridge link set dev LINK bcast_flood on", names: "port flag bcast_flood"},
	{line: "bridge fdb del HW dev LINK master", names: "no forwarding entry"},
	{line: "bridge fdb replace HW dev OTHER master static", names: "its MAC HW is OTHER's"},
	{line: "ip neigh del ADDR dev azure0", names: "no neighbour entry"},
	{line: "ip neigh replace ADDR lladdr 02:00:00:00:00:01 nud permanent dev azure0", names: "no neighbour entry", silent: true},
	{line: "ip neigh add 10.240.77.78 lladdr 02:00:00:00:00:02 dev azure0 protocol 168", names: "is nobody's", silent: true, unchecked: true},
	{line: "ip route del ADDR/32 dev azure0", names: "no route in table 254"},
	{line: "ip route del ADDR/32 dev azure0 table 16863", names: "no route in table 16863"},
	{line: "ip route flush table 16863", names: "no route in table 16863"},
	{line: "nft delete table bridge azure_vnet", names: "the nft table bridge azure_vnet is gone"},
	{line: "nft flush set bridge azure_vnet own", names: "the nft table bridge azure_vnet is not", silent: true},
}

var transparentHarms = []harm{
	{line: "ip link set LINK down", names: "down"},
	{line: "ip link set LINK down; ip link set LINK up", names: "no route in table 16863"},
	{line: "ip link set LINK address 02:11:22:33:44:66", names: "the host end has the MAC 02:11:22:33:44:66"},
	{line: "ip link set LINK arp off", names: "answers no ARP"},
	{line: "ip addr add HOST/16 dev LINK", names: "LINK has the address HOST/16"},
	{line: "ip link set LINK group 0", names: "not in its link group"},
	{line: "ip link add br9 type bridge && ip link set LINK master br9", names: "in a bridge"},
	{line: "ip addr add 10.240.99.1/16 dev LINK", names: "has the address"},
	{line: "ip addr add 10.240.99.1/16 dev LINK; ip addr del 10.240.99.1/16 dev LINK", names: "no route"},
	{line: "ip neigh del ADDR dev LINK", names: "no neighbour entry"},
	{line: "ip route del ADDR/32 dev LINK", names: "no route in table 254"},
	{line: "ip route del ADDR/32 dev LINK table 16863", names: "no route in table 16863"},
	{line: "nft delete table arp azure_vnet", names: "the nft table arp azure_vnet is gone"},
	{line: "nft flush set arp azure_vnet own", names: "the nft table arp azure_vnet is not", silent: true},
	{line: "nft flush set ip azure_vnet own", names: "the nft table ip azure_vnet is not", silent: true},
}

// settingHarms sets each of our settings of a link to another value.
func settingHarms(link string) (all []harm) {
	for _, s := range linkSysctls(link) {
		other := "0"
		if s.value == "0" {
			other = "80" // proxy_delay is in units of 10 ms, of which the kernel rounds small ones to 0
		}
		told := []string{"forwarding", "rp_filter", "proxy_arp"} // of which the kernel sends events
		all = append(all, harm{
			line:   "echo " + other + " >/proc/sys/net/" + s.name,
			names:  strings.ReplaceAll(s.name, "/", "."),
			silent: !slices.Contains(told, filepath.Base(s.name)),
		})
	}
	return all
}

// Whatever somebody does to the host by a command of their own, Broken names it, Watch tells of it at once where
// the kernel does, one Reconcile makes all what it was, a second finds nothing, and the container's packets pass.
func TestReconcileHeals(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		c := h.container(0)
		e := c.endpoint(mode, Policy{SNAT: true})
		e.Ports = []PublishedPort{{Proto: "udp", HostAddr: netip.MustParseAddr("127.0.0.1"), HostPort: 5353, Port: 53}, {Proto: "tcp", HostPort: 8080, Port: 80}}
		a := h.mustAttach(e)
		other := h.running(1, mode, Policy{SNAT: true})
		otherLink, _ := linkNames(other.endpoint(mode, Policy{}).Owner)
		boot, err := statefile.BootID()
		if err != nil {
			t.Fatal(err)
		}
		vars := strings.NewReplacer("LINK", a.Link, "HW", a.MAC.String(), "ADDR", c.addr.String(), "OTHER", otherLink, "RUN", h.cfg.Run, "HOST", h.Primary.String(), "BOOT", boot, "NIC", h.MAC)

		told := h.watch()
		heals := func(harms []harm) {
			whole := h.kernelState()
			for i, harm := range harms {
				if !inShare(i, mode) {
					continue
				}
				t.Run(harm.line, func(t *testing.T) { harm.heals(t, e.Owner, c, other, told, vars, whole) })
			}
		}
		h.whole("before")
		if mode == ModeBridge {
			heals(bridgeHarms)
			heals(settingHarms("azure0"))
		} else {
			heals(transparentHarms)
			heals(settingHarms(a.Link))
		}
		h.sh("iptables-nft -P FORWARD DROP; iptables-nft -A FORWARD -s 192.0.2.2 -j DROP") // now, because iptables is slow
		h.reconcile()
		heals(hostHarms)
		checkFabric(t, v, c.addr)
	})
}

func (harm harm) heals(t *testing.T, owner string, c, other *container, told watching, vars *strings.Replacer, whole string) {
	names := vars.Replace(harm.names)
	if harm.needs != "" && !c.host.try(harm.needs) {
		t.Skip("this kernel cannot")
	}
	if !harm.silent {
		told.drain()
	}
	c.host.sh(vars.Replace(harm.line))
	if !harm.silent && !told.within(time.Second) {
		t.Error("Watch does not tell")
	}
	if wrong := strings.Join(c.broken(), "\n"); !strings.Contains(wrong, names) {
		t.Errorf("broken: %q, and not %q", wrong, names)
	}
	err := c.Do(func() error { return c.Check(t.Context(), owner) })
	if wrong := err != nil; wrong == harm.unchecked {
		t.Errorf("check: %v", err)
	}
	if mended := strings.Join(c.reconcile(), "\n"); !strings.Contains(mended, names) {
		t.Errorf("mended %q, and not %q", mended, names)
	}
	checkSame(t, "after a reconcile", whole, c.kernelState())
	if mended := c.reconcile(); len(mended) > 0 {
		t.Errorf("mended again: %q", mended)
	}
	if !c.pings(other.addr) || !c.pings(vnetsim.HostAgentAddr) {
		t.Error("the container is cut off")
	}
}

// watching is what Watch told.
type watching chan struct{}

// watch runs Watch on the host until the test ends, and returns when it listens.
func (h *host) watch() watching {
	h.t.Helper()
	told := make(watching, 1000)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- h.Do(func() error { return h.Watch(ctx, func() { told <- struct{}{} }) }) }()
	h.t.Cleanup(func() {
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			h.t.Errorf("Watch ended with %v", err)
		}
	})
	if !told.within(patience) {
		h.t.Fatal("Watch does not say that it listens")
	}
	told.drain()
	return told
}

func (w watching) within(d time.Duration) bool {
	select {
	case <-w:
		return true
	case <-time.After(d):
		return false
	}
}

// drain waits until all is told that was done before.
func (w watching) drain() {
	for w.within(watchPause + 100*time.Millisecond) {
	}
}

// Rules of legacy iptables tell nobody, and are looked at in each round. A policy of DROP breaks nothing.
func TestLegacyForwardIsMended(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		c := h.running(0, mode, Policy{SNAT: true})
		h.sh("iptables-legacy -P FORWARD DROP")
		if mended := h.reconcile(); len(mended) == 0 {
			t.Error("a new policy of DROP went unnoticed")
		}
		h.sh("iptables-legacy -P FORWARD ACCEPT; iptables-legacy -P FORWARD DROP")
		h.whole("after the policy was set again")
		h.sh("iptables-legacy -F FORWARD")
		if wrong := strings.Join(h.broken(), "\n"); !strings.Contains(wrong, "iptables-legacy: the jump to AZURE-VNET") {
			t.Errorf("broken: %q", wrong)
		}
		h.reconcile()
		h.whole("after a reconcile")
		if !c.pings(vnetsim.HostAgentAddr) {
			t.Error("the container is cut off")
		}
	})
}

// An iptables that does not work is told, and keeps nothing else from being mended.
func TestReconcileHealsWithoutIptables(t *testing.T) {
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
	h := hosts[0]
	h.mustEnsure(h.spec(ModeBridge))
	h.running(0, ModeBridge, Policy{SNAT: true})
	h.sh("iptables-nft -P FORWARD DROP")
	h.reconcile()
	whole := h.kernelState()
	h.sh("nft flush ruleset; iptables-nft -P FORWARD DROP; ip link del azure0")
	path := os.Getenv("PATH")
	t.Setenv("PATH", "")
	err := h.Do(func() error { _, err := h.Reconcile(t.Context()); return err })
	if err == nil || !strings.Contains(err.Error(), "install the package iptables") {
		t.Errorf("reconcile without iptables: %v", err)
	}
	t.Setenv("PATH", path)
	if wrong := h.broken(); len(wrong) == 0 || slices.ContainsFunc(wrong, func(w string) bool { return !strings.HasPrefix(w, "iptables-nft: ") }) {
		t.Errorf("more than iptables' rules is broken: %q", wrong)
	}
	checkSame(t, "reconciled with iptables", whole, h.settled())
}

// A network that wants a list of its own has it again after host.json was lost, for whoever knows the network says
// it. Until then its containers keep their place.
func TestALostPolicyIsLearntAgain(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 3})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		own := Policy{SNAT: true, Direct: prefixes("203.0.113.0/24")}
		c := h.running(0, mode, own)
		h.running(1, mode, Policy{Internal: true})
		h.running(2, mode, Policy{SNAT: true, NoMetadata: true})
		whole := h.kernelState()
		for _, order := range []string{"learn, reconcile", "reconcile, learn"} {
			if err := os.Remove(h.path("host.json")); err != nil {
				t.Fatal(err)
			}
			if order == "reconcile, learn" {
				h.reconcile()
				h.whole(order)
				if !c.pings(h.Primary) {
					t.Error("the container of the lost policy is cut off")
				}
			}
			if err := h.Do(func() error { return h.LearnPolicy(t.Context(), own) }); err != nil {
				t.Fatal(err)
			}
			checkSame(t, order, whole, h.settled())
		}
	})
}

// A secondary address that comes up on the host is named, with the remedy, and is the administrator's to take away.
func TestTheHostHoldsAContainersAddress(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		c := h.running(0, mode, Policy{SNAT: true})
		told := h.watch()
		h.ip("addr add " + c.addr.String() + "/32 dev eth0")
		if !told.within(time.Second) {
			t.Error("Watch does not tell")
		}
		remedy := "ip addr del " + c.addr.String() + "/32 dev eth0"
		for range 2 {
			if wrong := strings.Join(h.broken(), "\n"); !strings.Contains(wrong, "eth0 holds its address too") || !strings.Contains(wrong, strings.Replace(remedy, "/32", "", 1)) {
				t.Errorf("broken: %q", wrong)
			}
			if mended := h.reconcile(); len(mended) > 0 {
				t.Errorf("mended %q", mended)
			}
		}
		h.sh(remedy)
		h.reconcile()
		h.whole("when it was taken away")
		if !c.pings(h.Primary) {
			t.Error("the container is cut off")
		}
	})
}

// A NIC that somebody puts into a bridge of theirs stays there. It is named, with words that cut nobody off, and
// when it is back all is as it was.
func TestTheNICIsTakenAtRunTime(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		c := h.running(0, mode, Policy{SNAT: true})
		whole := h.kernelState()
		told := h.watch()
		h.ip("link add br0 type bridge", "link set eth0 master br0")
		if !told.within(time.Second) {
			t.Error("Watch does not tell")
		}
		if wrong := strings.Join(h.broken(), "\n"); !strings.Contains(wrong, "eth0 is in br0") || !strings.Contains(wrong, "Drain this VM and reboot") {
			t.Errorf("broken: %q", wrong)
		}
		_ = h.Do(func() error { _, err := h.Reconcile(t.Context()); return err })
		if !h.try("ip link show eth0 | grep -q 'master br0'") {
			t.Error("eth0 was taken out of br0")
		}
		if _, err := h.ensure(h.spec(mode)); !errors.Is(err, ErrTaken) {
			t.Errorf("ensure: %v", err)
		}
		h.ip("link set eth0 nomaster", "link del br0")
		checkSame(t, "with the NIC back", whole, h.settled())
		h.whole("with the NIC back")
		if !c.pings(vnetsim.HostAgentAddr) {
			t.Error("the container is cut off")
		}
	})
}

// Watch tells of no container that comes to stand, and of nothing that happens to links and tables of others.
func TestWatchKeepsQuiet(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		h.running(0, mode, Policy{SNAT: true}) // whose policy is new to the table
		second := h.container(1)
		h.sh("ip netns add other; ip link add docker9 type bridge; ip link set docker9 up; ip link add v9 type veth peer w9 netns other; ip link set v9 master docker9")
		told := h.watch()
		for name, do := range map[string]func(){
			"a container":       func() { h.mustAttach(second.endpoint(mode, Policy{SNAT: true})) },
			"another's address": func() { h.ip("addr add 192.0.2.11/32 dev docker9", "addr del 192.0.2.11/32 dev docker9") },
			"another's port":    func() { h.sh("ip link set v9 up; bridge link set dev v9 learning off; ip link set v9 nomaster") },
			"another's route":   func() { h.sh("ip route add 198.51.100.0/24 dev docker9; ip route del 198.51.100.0/24 dev docker9") },
			"another's table":   func() { h.sh("nft add table ip other; nft add chain ip other x; nft delete table ip other") },
			"a neighbour": func() {
				h.sh("ip neigh add 10.240.0.99 lladdr 02:00:00:00:00:01 dev eth0; ip neigh del 10.240.0.99 dev eth0")
			},
			"another's sysctl": func() { h.sh("echo 1 >/proc/sys/net/ipv4/conf/v9/rp_filter") },
			"another's fdb": func() {
				h.sh("bridge fdb add 02:00:00:00:00:05 dev docker9 self local; bridge fdb del 02:00:00:00:00:05 dev docker9 self local")
			},
			"an element of ours": func() { h.sh("nft add element ip azure_vnet no_metadata { 192.0.2.9 }") },
		} {
			told.drain()
			do()
			if told.within(watchPause + 200*time.Millisecond) {
				t.Errorf("%s: told", name)
			}
		}
	})
}

// A plugin that changes the MAC of a container after us cuts it off. Check and Broken name it, with the remedy.
// No round changes anything in a container.
func TestAContainersMACIsChanged(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		c := h.running(0, mode, Policy{SNAT: true})
		h.running(1, mode, Policy{SNAT: true})
		owner := c.endpoint(mode, Policy{}).Owner
		check := func() error { return h.Do(func() error { return h.Check(t.Context(), owner) }) }
		c.sh("ip link set eth0 address 02:00:00:00:00:77")
		for range 2 {
			broken := h.broken()
			if len(broken) != 1 || !strings.Contains(broken[0], c.addr.String()+"): eth0 in its container has the MAC 02:00:00:00:00:77 and not "+MACFor(c.addr).String()) {
				t.Errorf("broken: %q", broken)
			}
			if err := check(); err == nil || !strings.Contains(err.Error(), "tuning") {
				t.Errorf("check: %v", err)
			}
			if mended := h.reconcile(); len(mended) > 0 {
				t.Errorf("mended %q", mended)
			}
		}
		c.sh("ip link set eth0 address " + MACFor(c.addr).String())
		h.whole("with its MAC again")
		if err := check(); err != nil {
			t.Error(err)
		}
		if !c.pings(h.Primary) {
			t.Error("the container is cut off")
		}
	})
}
