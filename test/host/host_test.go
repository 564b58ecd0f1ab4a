// Copyright (c) The azure-vnet authors. MIT licence.

package host

import (
	"net/netip"
	"regexp"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// part is one kind of what a host has, as a tool prints it.
type part struct {
	name   string
	script string
	ours   *regexp.Regexp // lines that speak of what is azure-vnet's; nil: none
	blocks *regexp.Regexp // first lines of what is azure-vnet's up to its brace; nil: none
}

// parts are all of a host's network, and the files that configure it.
var parts = []part{
	{name: "nft", script: "nft list ruleset | sed 's/ packets [0-9]* bytes [0-9]*//'",
		ours: regexp.MustCompile("jump AZURE-VNET"), blocks: regexp.MustCompile("^table .* azure_vnet {|chain AZURE-VNET {")},
	{name: "iptables", script: "iptables-save | grep -v '^#' | sed 's/ \\[[0-9:]*\\]//'", ours: regexp.MustCompile("AZURE-VNET")},
	{name: "iptables-legacy", script: "iptables-legacy-save | grep -v '^#' | sed 's/ \\[[0-9:]*\\]//'", ours: regexp.MustCompile("AZURE-VNET")},
	{name: "links", script: "ip -o -d link | sed 's/_timer *[0-9.]*//g'", ours: regexp.MustCompile(`^\d+: (azure0|azv[0-9a-f]{11})[@:]`)},
	{name: "addresses", script: "ip -o addr"}, // our links never have one
	{name: "routes", script: "ip -4 route show table all", ours: regexp.MustCompile("proto 168")},
	{name: "IPv6 routes", script: "ip -6 route show table all", ours: regexp.MustCompile(` dev (azure0|azv)`)},
	{name: "nexthops", script: "ip nexthop"},
	{name: "rules", script: "ip -d rule", ours: regexp.MustCompile("proto 168")},
	{name: "IPv6 rules", script: "ip -d -6 rule"},
	{name: "neighbours", script: "ip neigh show nud permanent; ip neigh show proxy; ip -6 neigh show proxy", ours: regexp.MustCompile("proto 168")},
	{name: "qdiscs", script: "tc qdisc show", ours: regexp.MustCompile(" dev (azure0|azv)")},
	{name: "forwarding entries", script: "bridge fdb", ours: regexp.MustCompile(" dev (azure0|azv)")},
	{name: "sysctls", script: "sysctl -a -r '^net\\.' 2>/dev/null | grep -v nf_conntrack_count", ours: regexp.MustCompile(`\.(azure0|azv[0-9a-f]{11})\.`)},
	// What engines, runtimes and the iptables programs keep for themselves is left out.
	{name: "files", script: "find /etc /run \\( -path '/run/docker*' -o -path '/run/containerd*' -o -path '/run/netns*' -o -path /run/xtables.lock \\) -prune -o -type f -exec md5sum {} +",
		ours: regexp.MustCompile(` /run/(azure-vnet/|systemd/network/05-azure-vnet\.network$)`)},
}

// picture is all of a host's network: for each part its lines. others leaves out what
// is azure-vnet's.
func picture(h test.Host, others bool) map[string][]string {
	h.T.Helper()
	all := map[string][]string{}
	for _, p := range parts {
		out, _ := h.Try("sh", "-c", p.script) // grep fails where nothing is left
		all[p.name] = []string{}
		end := "" // of the block that is left out
		for line := range strings.Lines(out) {
			indent := line[:len(line)-len(strings.TrimLeft(line, "\t"))]
			switch line = strings.TrimSpace(line); {
			case end != "":
				if indent+line == end {
					end = ""
				}
			case line == "":
			case others && p.blocks != nil && p.blocks.MatchString(line):
				end = indent + "}"
			case others && p.ours != nil && p.ours.MatchString(line):
			default:
				all[p.name] = append(all[p.name], line)
			}
		}
	}
	return all
}

// same compares pictures of a host. Lines that match but are allowed to change.
func same(h test.Host, when string, want, got map[string][]string, but *regexp.Regexp) {
	h.T.Helper()
	kept := cmpopts.IgnoreSliceElements(func(line string) bool { return but != nil && but.MatchString(line) })
	sorted := cmpopts.SortSlices(func(a, b string) bool { return a < b })
	for _, p := range parts {
		if diff := cmp.Diff(want[p.name], got[p.name], kept, sorted); diff != "" {
			h.T.Errorf("%s, %s of %s (- before, + now):\n%s", when, p.name, h.Name, diff)
		}
	}
}

// administered gives the host what administrators have: routes, rules and filters that
// name the NIC, and settings that are not the kernel's own.
func administered(h test.Host) {
	h.T.Helper()
	h.Must("sh", "-euc", strings.NewReplacer("GATEWAY", h.Gateway.String()).Replace(`
		ip route add 10.99.0.0/16 via GATEWAY dev eth0 metric 77
		ip route add 10.98.0.0/16 via GATEWAY dev eth0 table 42
		ip nexthop add id 7 via GATEWAY dev eth0
		ip route add 10.97.0.0/16 nhid 7
		ip rule add fwmark 0x4000 lookup 42 priority 5000
		ip neigh add 10.240.77.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent
		tc qdisc add dev eth0 root handle 1: tbf rate 10gbit burst 1mb latency 50ms
		iptables -A INPUT -i eth0 -p tcp --dport 9999 -j DROP
		iptables -A FORWARD -i eth0 -d 10.96.0.0/16 -j DROP
		iptables -t nat -A POSTROUTING -s 192.168.99.0/24 -o eth0 -j MASQUERADE
		nft 'add table inet admin; add chain inet admin in { type filter hook input priority 0; }; add rule inet admin in iifname eth0 tcp dport 9998 drop'
		sysctl -q -w net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.eth0.rp_filter=1 net.ipv4.conf.eth0.send_redirects=0`))
}

// TestTheHostKeepsItsNetwork: azure-vnet changes nothing on the host that is not its own
// but what docs/design.md lists under Sysctls. After uninstall no trace of it is left.
func TestTheHostKeepsItsNetwork(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
	plain := test.OnHost(vms[2])
	reaches := func(t *testing.T, from test.Place) {
		t.Helper()
		if _, err := from.Try("ping", "-c", "1", "-W", "3", plain.Addr.String()); err != nil {
			t.Errorf("%s does not reach another VM: %v", from.Name, err)
		}
	}
	var used []netip.Addr
	t.Run("Docker", func(t *testing.T) {
		h := vms[0].In(t)
		h.WithEngine()
		administered(h)
		others, all := picture(h, true), picture(h, false)
		h.EnablePlugin()
		h.Network("azure")
		h.Network("alone", "mode=transparent")
		for _, network := range []string{"azure", "alone"} {
			c := test.InContainer(h, network, h.Container(network, network, "sleep 1000", "-p", "80"))
			used = append(used, c.Addr)
			reaches(t, c)
		}
		same(h, "while containers run", others, picture(h, true), nil)
		h.Docker("rm", "-f", "azure", "alone")
		h.Docker("network", "rm", "azure", "alone")
		h.Docker("plugin", "disable", test.Plugin)
		h.Must(test.PluginBinary, "uninstall")
		h.Must("sh", "-c", "! test -e /run/azure-vnet")
		same(h, "after uninstall", all, picture(h, false), nil)
	})
	t.Run("CNI", func(t *testing.T) {
		n := test.OnNode(vms[1].In(t))
		administered(n.Host)
		others, all := picture(n.Host, true), picture(n.Host, false)
		// No engine has set ip_forward here. The kernel sets the others with it.
		derived := regexp.MustCompile(`^net\.ipv4\.(ip_forward|conf\.[^.]*\.forwarding|conf\.all\.accept_redirects) =`)
		modes := []string{"bridge", "transparent"}
		list := func(mode string) *libcni.NetworkConfigList {
			return n.List("1.1.0", mode, test.Azure(`"mode":"`+mode+`"`))
		}
		for _, mode := range modes {
			addr, _ := n.Add(list(mode), n.Pod(mode))
			used = append(used, addr)
			reaches(t, test.InPod(n, mode, addr))
		}
		same(n.Host, "while pods run", others, picture(n.Host, true), derived)
		for _, mode := range modes {
			n.Del(list(mode), &libcni.RuntimeConf{ContainerID: mode, NetNS: "/run/netns/" + mode, IfName: "eth0"})
			n.Must("ip", "netns", "del", mode)
		}
		n.Must(n.Dir+"/azure-vnet", "uninstall")
		n.Must("sh", "-c", "! test -e /run/azure-vnet")
		same(n.Host, "after uninstall", all, picture(n.Host, false), derived)
	})
	test.NothingDropped(t, vnet, used...)
}
