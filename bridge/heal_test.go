// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
)

// harm is what somebody does to the host by a command of their own.
type harm struct {
	line   string // of the shell; LINK, HW and ADDR are the container's, OTHER is another container's link
	names  string // part of a sentence that Broken says of it
	silent bool   // the kernel sends no event of it that Watch listens to
}

var hostHarms = []harm{
	{line: "ip rule del pref 10", names: "no routing rule 10"},
	{line: "ip rule flush; ip rule add pref 32766 lookup main proto kernel; ip rule add pref 32767 lookup default proto kernel", names: "no routing rule 10"},
	{line: "ip rule add pref 7 lookup 99 proto 168", names: "is nobody's", silent: true},
	{line: "ip route add 10.240.77.77/32 dev eth0 proto 168 scope link", names: "is nobody's", silent: true},
	{line: "nft flush ruleset; iptables-nft -P FORWARD DROP; iptables-nft -A FORWARD -s 192.0.2.2 -j DROP", names: "the nft table ip azure_vnet is gone"},
	{line: "nft delete table ip azure_vnet", names: "the nft table ip azure_vnet is gone"},
	{line: "nft flush chain ip azure_vnet forward", names: "the nft table ip azure_vnet is not as it should be"},
	{line: "nft add rule ip azure_vnet forward drop", names: "the nft table ip azure_vnet is not as it should be"},
	{line: "nft flush set ip azure_vnet nics", names: "the nft table ip azure_vnet is not as it should be", silent: true},
	{line: "nft delete element ip azure_vnet sources { ADDR }", names: "the nft table ip azure_vnet is not as it should be", silent: true},
	{line: "iptables-nft -D FORWARD 2", names: "the jump to AZURE-VNET"},
	{line: "iptables-nft -F AZURE-VNET", names: "is missing"},
	{line: "iptables-nft -D FORWARD 2; iptables-nft -I FORWARD -m comment --comment azure-vnet -j AZURE-VNET", names: "the jump to AZURE-VNET is not the last rule"},
	{line: "iptables-nft -D AZURE-VNET 2", names: "is missing"},
	{line: "echo 0 >/proc/sys/net/ipv4/ip_forward", names: "ip_forward is not 1"},
	{line: "echo 0 >/proc/sys/net/ipv4/conf/eth0/forwarding", names: "ipv4.conf.eth0.forwarding is not 1"},
	{line: "rm RUN/systemd/network/05-azure-vnet.network", names: "05-azure-vnet.network", silent: true},
	{line: "rm RUN/azure-vnet/host.json", names: "host.json", silent: true},
	{line: "echo '{' >RUN/azure-vnet/host.json", names: "host.json", silent: true},
	{line: "head -c 4096 /dev/zero >RUN/azure-vnet/host.json", names: "host.json", silent: true},
	{line: `echo '{"version":2042}' >RUN/azure-vnet/host.json`, names: "host.json", silent: true},
	{line: `echo '{"version":2,"boot":"another","nics":{"00:00:00:00:00:09":{"bridge":"azure9"}}}' >RUN/azure-vnet/host.json`, names: "host.json", silent: true},
}

var bridgeHarms = []harm{
	{line: "ip link del azure0", names: "azure0 is gone"},
	{line: "ip link set azure0 down", names: "azure0 is down"},
	{line: "ip link set azure0 down; ip link set azure0 up", names: "no route in table 16863"},
	{line: "ip link set azure0 address 02:11:22:33:44:55", names: "azure0 has the MAC"},
	{line: "ip link set azure0 mtu 1300", names: "azure0 has an MTU of 1300"},
	{line: "ip link set azure0 group 0", names: "azure0 is not in its link group"},
	{line: "ip link set azure0 type bridge mcast_snooping 1", names: "azure0 snoops multicast"},
	{line: "ip link set azure0 alias ''", names: "azure0 is half made"},
	{line: "ip addr add 10.240.99.1/16 dev azure0", names: "azure0 has the address"},
	{line: "ip addr add 10.240.99.1/16 dev azure0; ip addr del 10.240.99.1/16 dev azure0", names: "no neighbour entry"},
	{line: "ip link set LINK nomaster", names: "not in azure0"},
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
	{line: "ip neigh add 10.240.77.78 lladdr 02:00:00:00:00:02 dev azure0 protocol 168", names: "is nobody's", silent: true},
	{line: "ip route del ADDR/32 dev azure0", names: "no route in table 254"},
	{line: "ip route del ADDR/32 dev azure0 table 16863", names: "no route in table 16863"},
	{line: "ip route flush table 16863", names: "no route in table 16863"},
	{line: "nft delete table bridge azure_vnet", names: "the nft table bridge azure_vnet is gone"},
	{line: "nft flush set bridge azure_vnet own", names: "the nft table bridge azure_vnet is not", silent: true},
}

var transparentHarms = []harm{
	{line: "ip link set LINK down", names: "down"},
	{line: "ip link set LINK down; ip link set LINK up", names: "no route in table 16863"},
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
	inBothModes(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		c := h.container(0)
		e := c.endpoint(mode, Policy{SNAT: true})
		e.Ports = []Port{{Proto: "udp", HostAddr: netip.MustParseAddr("127.0.0.1"), HostPort: 5353, Port: 53}, {Proto: "tcp", HostPort: 8080, Port: 80}}
		a := h.mustAttach(e)
		other := h.running(1, mode, Policy{SNAT: true})
		otherLink, _ := linkNames(other.endpoint(mode, Policy{}).Owner)
		vars := strings.NewReplacer("LINK", a.Link, "HW", a.MAC.String(), "ADDR", c.addr.String(), "OTHER", otherLink, "RUN", h.cfg.Run)

		told := h.watch()
		heals := func(harms []harm) {
			for _, harm := range harms {
				t.Run(harm.line, func(t *testing.T) { harm.heals(t, c, other, told, vars) })
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

func (harm harm) heals(t *testing.T, c, other *container, told watching, vars *strings.Replacer) {
	whole, names := c.kernelState(), vars.Replace(harm.names)
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
	if mended := strings.Join(c.reconcile(), "\n"); !strings.Contains(mended, names) {
		t.Errorf("mended %q, and not %q", mended, names)
	}
	checkSame(t, "after a reconcile", whole, c.kernelState())
	if mended := c.reconcile(); len(mended) > 0 {
		t.Errorf("mended again: %q", mended)
	}
	if !c.try(ping(other.addr) + " && " + ping(vnetsim.HostAgentAddr)) {
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
	for range 50 {
		h.ip("link add azvwatch type veth peer azcwatch", "link del azvwatch")
		if told.within(100 * time.Millisecond) {
			told.drain()
			return told
		}
	}
	h.t.Fatal("Watch tells of nothing")
	return nil
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
