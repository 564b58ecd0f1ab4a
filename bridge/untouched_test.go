// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"azurevnet/internal/vnetsim"
)

// richHost gives a host what hosts of the field have: addresses, routes, rules, neighbours, queueing disciplines,
// firewalls and bridges of others. HOST and GATEWAY are its own.
const richHost = `set -e
ip netns add site; ip link add site0 type veth peer name site1 netns site
ip addr add 192.168.9.1/24 dev site0; ip link set site0 up
ip -n site addr add 192.168.9.2/24 dev site1; ip -n site link set site1 up; ip -n site link set lo up; ip -n site route add default via 192.168.9.1
ip link add docker9 type bridge; ip addr add 172.19.0.1/16 dev docker9; ip link set docker9 up
ip link add v9 type veth peer name w9; ip link set v9 master docker9; ip link set v9 up; ip link set w9 up
ip addr add 10.240.200.1/16 dev eth0 label eth0:1 noprefixroute; ip addr add 10.240.200.2/32 dev eth0 valid_lft 3600 preferred_lft 3600
ip -6 addr add fd00::5/64 dev docker9 nodad
ip tuntap add tun7 mode tun; ip addr add 10.8.0.1/24 dev tun7; ip link set tun7 up
ip route add 192.0.2.0/24 via GATEWAY dev eth0 metric 50 mtu lock 1400
ip route add 192.0.2.0/24 via 192.168.9.2 dev site0 metric 70
ip route add 198.51.100.0/24 nexthop via GATEWAY dev eth0 weight 2 nexthop via 192.168.9.2 dev site0 weight 1
ip nexthop add id 17 via GATEWAY dev eth0; ip nexthop add id 18 via 192.168.9.2 dev site0; ip nexthop add id 19 group 17/18
ip route add 198.18.0.0/16 nhid 17; ip route add 198.19.0.0/16 nhid 19
ip route add 10.8.0.0/16 dev tun7; ip route add blackhole 203.0.114.0/24; ip route add unreachable 203.0.115.0/24
ip route add 100.64.0.0/10 dev tun7 table 52; ip route add 10.240.0.0/16 dev eth0 src HOST table 220; ip route add default via GATEWAY dev eth0 table 220
ip -6 route add fd01::/64 via fd00::1 dev docker9
ip rule add pref 5210 fwmark 0x80000/0xff0000 lookup main; ip rule add pref 5270 lookup 52; ip rule add pref 220 from 192.168.9.0/24 lookup 220
ip rule add pref 30000 iif docker9 lookup main suppress_prefixlength 0; ip -6 rule add pref 5270 lookup 52
ip neigh add 10.240.0.250 lladdr 12:34:56:78:9a:bc nud permanent dev eth0; ip neigh add proxy 10.240.0.251 dev eth0
tc qdisc add dev eth0 root handle 1: htb default 1; tc class add dev eth0 parent 1: classid 1:1 htb rate 10gbit; tc qdisc add dev eth0 ingress
tc filter add dev eth0 parent ffff: protocol ip prio 9 u32 match ip dst 203.0.113.99/32 action mirred egress redirect dev w9
iptables-nft -A INPUT -i eth0 -p icmp -s PEER -j DROP; iptables-nft -A INPUT -i eth0 -p tcp --dport 22 -j ACCEPT
iptables-nft -N DOCKER-USER; iptables-nft -A DOCKER-USER -i eth0 -p tcp --dport 9999 -j DROP; iptables-nft -A FORWARD -j DOCKER-USER
iptables-nft -P FORWARD DROP; iptables-nft -A FORWARD -i site0 -j ACCEPT; iptables-nft -A FORWARD -o site0 -m conntrack --ctstate ESTABLISHED -j ACCEPT
iptables-nft -t nat -A POSTROUTING -s 192.168.9.0/24 -o eth0 -j MASQUERADE
iptables-nft -t mangle -A PREROUTING -i eth0 -j CONNMARK --restore-mark; iptables-legacy -A INPUT -i eth0 -p udp --dport 1234 -j DROP
nft add table inet fw; nft 'add chain inet fw input { type filter hook input priority 5; policy drop; }'
nft add rule inet fw input iifname { lo, eth0, site0 } accept; nft add rule inet fw input iifname '"az*"' accept
nft add table ip azure_vnet_of_others; nft 'add set ip azure_vnet_of_others s { type ifname; elements = { "eth0" }; }'
bridge fdb add 02:00:00:00:00:77 dev v9 master static
echo 'search corp.example' >>/etc/resolv.conf
`

// pictureOfOthers prints what of a host is not ours.
const pictureOfOthers = `ip -d -o link; ip -d -o addr; ip -4 route show table all; ip -6 route show table all; ip -4 rule; ip -6 rule
ip nexthop; ip neigh show nud permanent; ip neigh show proxy; tc qdisc show; tc filter show dev eth0 parent ffff:
bridge fdb show | grep static; bridge -d -o link show; bridge vlan show 2>/dev/null || true
iptables-legacy -S; cat /etc/resolv.conf; ls -lR /etc/systemd/network /etc/netplan 2>/dev/null || true`

var (
	ofOurs = regexp.MustCompile(`\baz(ure0|v[0-9a-f]{11})\b|AZURE-VNET|\bproto 168\b`)
	// Lifetimes count down, and the names of a veth's other namespace come and go.
	countsDown = regexp.MustCompile(`_lft \d+sec|link-netns\w* \S+|timer +[\d.]+|NO-CARRIER,|,LOWER_UP|state \S+`)
	ourTables  = regexp.MustCompile(`(?ms)^table \S+ azure_vnet \{.*?^\}\n|^\tchain AZURE-VNET \{.*?^\t\}\n`)
)

func (h *host) others() string {
	h.t.Helper()
	var out strings.Builder
	for l := range strings.Lines(h.sh(pictureOfOthers) + ourTables.ReplaceAllString(h.sh("nft -s list ruleset"), "")) {
		if !ofOurs.MatchString(l) && strings.TrimSpace(l) != "" {
			out.WriteString(countsDown.ReplaceAllString(l, ""))
		}
	}
	return out.String()
}

// allSysctls reads all of /proc/sys/net but what is of a link of ours.
func (h *host) allSysctls() map[string]string {
	h.t.Helper()
	all := map[string]string{}
	if err := h.Do(func() error {
		const root = "/proc/thread-self/root/proc/sys/net"
		return filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || ofOurs.MatchString(file) {
				return nil
			}
			text, err := os.ReadFile(file)
			if err == nil { // some may only be written
				all[strings.TrimPrefix(file, root+"/")] = strings.TrimSpace(string(text))
			}
			return nil
		})
	}); err != nil {
		h.t.Fatal(err)
	}
	return all
}

// allowedSysctls are the settings that may differ, and the value that they may have. Those in the second group are
// the kernel's doing, when ip_forward is set.
var allowedSysctls = map[string]string{
	"ipv4/ip_forward":           "1",
	"ipv4/conf/eth0/forwarding": "1",

	"ipv4/conf/all/forwarding":       "1",
	"ipv4/conf/default/forwarding":   "1",
	"ipv4/conf/lo/forwarding":        "1",
	"ipv4/conf/docker9/forwarding":   "1",
	"ipv4/conf/site0/forwarding":     "1",
	"ipv4/conf/tun7/forwarding":      "1",
	"ipv4/conf/v9/forwarding":        "1",
	"ipv4/conf/w9/forwarding":        "1",
	"ipv4/conf/all/accept_redirects": "0", // a router follows none
}

// countingSysctls change by themselves.
var countingSysctls = []string{"netfilter/nf_conntrack_count"}

func checkSysctls(t *testing.T, when string, before, after map[string]string) {
	t.Helper()
	names := slices.Sorted(maps.Keys(before))
	for name := range after {
		if _, ok := before[name]; !ok {
			t.Errorf("%s: the setting %s is new", when, name)
		}
	}
	for _, name := range names {
		is := after[name]
		if before[name] != is && !slices.Contains(countingSysctls, name) && allowedSysctls[name] != is {
			t.Errorf("%s: %s was %q and is %q", when, name, before[name], is)
		}
	}
}

// What is not ours stays what it was while containers of both modes come and go, and when all of ours is removed
// again. Of all settings of the network only ip_forward and the NIC's forwarding differ. Nothing of ours is left.
func TestNothingOfOthersIsTouched(t *testing.T) {
	t.Parallel()
	v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	h, peer := hosts[0], hosts[1]
	h.sh(strings.NewReplacer("GATEWAY", h.Gateway.String(), "HOST", h.Primary.String(), "PEER", peer.Primary.String()).Replace(richHost))
	others, settings, ours := h.others(), h.allSysctls(), h.kernelState()
	if !strings.Contains(others, "nhid 19") || !strings.Contains(others, "qdisc htb") || !strings.Contains(others, "policy drop") || len(settings) < 500 {
		t.Fatalf("the picture is not of a rich host: %d settings\n%s", len(settings), others)
	}
	checkRulesOfOthers := func(when string) {
		t.Helper()
		c := &checks{t: t}
		defer c.wait.Wait()
		c.expect(false, when+": the peer gets past INPUT -i eth0 -j DROP", func() bool { return peer.Pings(h.Primary) })
		c.expect(true, when+": the site reaches the internet by -o eth0 -j MASQUERADE", func() bool {
			return h.PingsFrom("site", vnetsim.InternetAddr)
		})
		c.hostPings(true, h, vnetsim.HostAgentAddr, vnetsim.InternetAddr)
	}
	same := func(when string) {
		t.Helper()
		checkSame(t, when, others, h.others())
		checkSysctls(t, when, settings, h.allSysctls())
	}

	h.mustEnsure(h.spec(ModeBridge))
	h.mustEnsure(h.spec(ModeTransparent))
	same("prepared")
	var running []*container
	for i, e := range []struct {
		mode Mode
		p    Policy
	}{{ModeBridge, Policy{SNAT: true}}, {ModeTransparent, Policy{SNAT: true}}, {ModeBridge, Policy{Internal: true}}, {ModeTransparent, Policy{Direct: prefixes("0.0.0.0/0")}}} {
		running = append(running, h.running(i, e.mode, e.p, PublishedPort{Proto: "tcp", HostPort: uint16(8080 + i), Port: 80}))
	}
	same("with containers")
	checkRulesOfOthers("with containers")
	c := &checks{t: t}
	for _, from := range running[:2] {
		c.pings(true, from, vnetsim.HostAgentAddr, vnetsim.InternetAddr, h.Primary)
		c.pings(true, from, running[0].addr, running[1].addr)
	}
	c.wait.Wait()
	h.reconcile()
	same("reconciled")
	h.whole("reconciled")

	for _, c := range running {
		h.mustDetach(c.endpoint(ModeTransparent, Policy{}).Owner)
	}
	if err := h.removeAll(); err != nil {
		t.Fatal(err)
	}
	same("removed")
	checkRulesOfOthers("removed")
	checkSame(t, "what of ours was left", ours, h.kernelState())
	for _, dir := range []string{h.cfg.Run, "/run/azure-vnet", "/run/systemd/network"} {
		left := h.sh("find " + dir + " -type f 2>/dev/null || true")
		if left != "" {
			t.Errorf("left in %s: %s", dir, left)
		}
	}
	checkFabric(t, v, h.Primary, running[0].addr, running[1].addr)
	if left := h.sh("ip -o link | grep -E ' az(ure|v|c)' || true"); left != "" {
		t.Errorf("links were left: %s", left)
	}
}
