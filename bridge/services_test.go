// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"azurevnet/internal/vnetsim"
)

// cluster is two VMs with kube-proxy's rules on the first, and what its services lead to.
type cluster struct {
	v            *vnetsim.VNet
	node1, node2 *host
	a, b         *container                // on node1; recorded as 10.240.0.20 and 10.240.0.21
	far          *container                // on node2; recorded as 10.240.0.30
	other        *container                // on node2; no endpoint of any service
	relay        *container                // on node1; publishes port 8090, and sends what comes to the host agent
	knowPods     func(rules string) string // writes another way to know pods in place of the recorded clusterCIDR
}

// recordedCIDR is the clusterCIDR of the recorded kube-proxy. It is the range of the VNet.
const recordedCIDR = "10.240.0.0/16"

// internetClient is the address that the internet's side of the simulated VNet asks from.
const internetClient = "192.0.2.1"

func newCluster(t *testing.T, mode Mode) *cluster {
	v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 3}, vnetsim.VMConfig{Secondaries: 2})
	c := &cluster{v: v, node1: hosts[0], node2: hosts[1], knowPods: func(rules string) string { return rules }}
	for _, h := range hosts {
		h.mustEnsure(h.spec(mode))
	}
	on := Policy{SNAT: true}
	c.a, c.b = c.node1.running(0, mode, on), c.node1.running(1, mode, on)
	c.relay = c.node1.running(2, mode, on, PublishedPort{Proto: "tcp", HostPort: 8090, Port: 80})
	c.far, c.other = c.node2.running(0, mode, on), c.node2.running(1, mode, on)
	c.a.place().serve(t, "a", ":8080")
	c.b.place().serve(t, "b", ":8080")
	c.far.place().serve(t, "far", ":8080")
	c.b.place().serveUDP(t, "b", ":53")
	c.far.place().serveUDP(t, "far", ":53")
	internet(v).serve(t, "internet", vnetsim.InternetAddr.String()+":8000")
	internet(v).serve(t, "agent", vnetsim.HostAgentAddr.String()+":32526")
	internet(v).serve(t, "agent", vnetsim.HostAgentAddr.String()+":8000")
	c.relay.sh("echo 1 >/proc/sys/net/ipv4/ip_forward" +
		" && iptables-nft -t nat -A PREROUTING -p tcp --dport 80 -j DNAT --to-destination 168.63.129.16:80" +
		" && iptables-nft -t nat -A POSTROUTING -d 168.63.129.16 -j MASQUERADE")
	return c
}

// recorded is a copy of a file of testdata with the addresses of the simulated VMs, and the link of
// container a, in place of the recorded ones.
func (c *cluster) recorded(file string) string {
	c.node1.t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", file))
	if err != nil {
		c.node1.t.Fatal(err)
	}
	link, _ := linkNames("cni/net/" + c.a.name + "/eth0")
	simulated := map[string]string{
		"10.240.0.4": c.node1.Primary.String(), "10.240.0.5": c.node2.Primary.String(),
		"10.240.0.20": c.a.addr.String(), "10.240.0.21": c.b.addr.String(), "10.240.0.30": c.far.addr.String(),
		"azv20": link,
	}
	replaced := regexp.MustCompile(`\b(?:10\.240\.0\.[0-9]+|azv20)\b`).ReplaceAllFunc(text, func(recorded []byte) []byte {
		return []byte(cmp.Or(simulated[string(recorded)], string(recorded)))
	})
	path := filepath.Join(c.node1.t.TempDir(), filepath.Base(file))
	if err := os.WriteFile(path, []byte(c.knowPods(string(replaced))), 0o644); err != nil {
		c.node1.t.Fatal(err)
	}
	return path
}

// proxyMode is a way in which kube-proxy writes its rules. Each load adds a NodePort 31009 that leads to
// the host agent's HTTP, in kube-proxy's own words, which nobody had when the files were recorded.
type proxyMode struct {
	name  string
	load  func(c *cluster)
	admin string // the iptables that the administrator of such a node uses
}

var proxyModes = []proxyMode{
	{"nft", func(c *cluster) {
		c.node1.run("nft", "-f", c.recorded("kube-proxy/nft.txt"))
		c.node1.run("nft", `add chain ip kube-proxy external-hostagent
			add rule ip kube-proxy external-hostagent jump mark-for-masquerade
			add rule ip kube-proxy external-hostagent goto service-UIXEB2UX-default/hostagent/tcp/http
			add element ip kube-proxy service-nodeports { tcp . 31009 : goto external-hostagent }`)
	}, "iptables-nft"},
	{"iptables-nft", func(c *cluster) { c.loadIPTables("iptables-nft") }, "iptables-nft"},
	{"iptables-legacy", func(c *cluster) { c.loadIPTables("iptables-legacy") }, "iptables-legacy"},
}

func (c *cluster) loadIPTables(program string) {
	c.node1.run(program+"-restore", c.recorded("kube-proxy/iptables-save.txt"))
	c.node1.sh(fmt.Sprintf("%[1]s -P FORWARD DROP"+
		" && %[1]s -t nat -A KUBE-NODEPORTS -p tcp --dport 31009 -j KUBE-MARK-MASQ"+
		" && %[1]s -t nat -A KUBE-NODEPORTS -p tcp --dport 31009 -j KUBE-SVC-OAFP32OB6PSRAX7U"+
		" && echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet", program)) // as kube-proxy does
}

// unload takes all rules away, ours too, which the next round writes again. The flows go as well: a connection
// from the port of an earlier one would be led by the earlier rules.
func (c *cluster) unload() {
	c.node1.forgetFlows()
	c.node1.sh("nft flush ruleset; printf '*raw\nCOMMIT\n*mangle\nCOMMIT\n*nat\nCOMMIT\n*filter\n:INPUT ACCEPT\n:FORWARD ACCEPT\nCOMMIT\n' | iptables-legacy-restore" +
		"; echo 0 >/proc/sys/net/ipv4/conf/all/route_localnet")
}

// Every way to a service that kube-proxy's rules make leads to its endpoints, with the client's address
// that kube-proxy means them to see, whether br_netfilter calls iptables or not. The host agent's HTTP
// stays out of reach whatever leads there. The fabric sees nothing that it has to refuse.
func TestServices(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		c := newCluster(t, mode)
		for _, proxy := range proxyModes {
			proxy.load(c)
			for _, call := range callIptables(mode) {
				t.Run(fmt.Sprintf("%s call-iptables %s", proxy.name, call), func(t *testing.T) {
					c.node1.sh("echo " + call + " >/proc/sys/net/bridge/bridge-nf-call-iptables")
					c.node1.reconcile()
					c.node1.whole("with kube-proxy's rules")
					c.checkServices(t, proxy.name != "nft")
					c.checkHostAgent(t, proxy.admin)
				})
			}
			c.unload()
			if proxy.name == map[Mode]string{ModeBridge: "nft", ModeTransparent: "iptables-legacy"}[mode] { // one is enough, and takes its time
				t.Run(proxy.name+" knows pods in another way", func(t *testing.T) { c.checkWaysToKnowPods(t, mode, proxy) })
			}
		}
		checkFabric(t, c.v, c.a.addr, c.b.addr, c.far.addr, c.other.addr, c.node1.Primary, c.node2.Primary)
	})
}

// checkWaysToKnowPods writes what docs/kubernetes.md says about clusterCIDR and detectLocalMode in place of the recorded
// clusterCIDR, with which checkServices sees the pods' own addresses. It loads and unloads kube-proxy's rules.
func (c *cluster) checkWaysToKnowPods(t *testing.T, mode Mode, proxy proxyMode) {
	a, node1 := c.a.addr.String(), c.node1.Primary.String()
	link, links, nftLinks := "azure0", "azure0", "azure0" // in the configuration, in rules of iptables, in rules of nft
	if mode == ModeTransparent {
		link, links, nftLinks = "azv", "azv+", "azv*"
	}
	for _, way := range []struct {
		name     string
		knowPods func(rules string) string
		client   string  // the address of pod a, as the endpoints of a service see it
		policy   answers // at a NodePort with externalTrafficPolicy Local, of a node without an endpoint
	}{
		{"clusterCIDR is not the pods'", strings.NewReplacer(recordedCIDR, "10.244.0.0/16").Replace, node1, nil},
		{"clusterCIDR is empty", func(rules string) string { return withCIDR.ReplaceAllString(rules, "") }, a, nil},
		{"detectLocalMode with " + link, strings.NewReplacer("-s "+recordedCIDR, "-i "+links,
			"ip saddr != "+recordedCIDR, `iifname != "`+nftLinks+`"`, "ip saddr "+recordedCIDR, `iifname "`+nftLinks+`"`).Replace, a, answers{"far": a}},
	} {
		t.Run(way.name, func(t *testing.T) {
			recorded := c.knowPods
			c.knowPods = way.knowPods
			defer func() { c.knowPods = recorded }()
			proxy.load(c)
			defer c.unload()
			c.node1.reconcile()
			all := &checks{t: t}
			defer all.wait.Wait()
			all.expectAnswers(c.a.place(), "tcp/10.96.1.4:80", answers{"b": way.client, "far": way.client})
			all.expectAnswers(c.a.place(), "udp/10.96.0.10:53", answers{"b": way.client, "far": way.client})
			all.expectAnswers(c.a.place(), "tcp/"+node1+":31002", way.policy)
		})
	}
}

// withCIDR matches the rules that kube-proxy writes only if it has a clusterCIDR.
var withCIDR = regexp.MustCompile(`(?m)^.*` + regexp.QuoteMeta(recordedCIDR) + `.*\n`)

// checkServices asks for every service of testdata/kube-proxy. The masquerade of a hairpin, and of what
// comes from outside the cluster, is kube-proxy's own.
func (c *cluster) checkServices(t *testing.T, localhostNodePorts bool) {
	all := &checks{t: t}
	defer all.wait.Wait()
	a, b, node1 := c.a.addr.String(), c.b.addr.String(), c.node1.Primary.String()
	nodePort := func(n int) string { return fmt.Sprintf("tcp/%s:%d", node1, n) }

	from := c.a.place()
	all.expectAnswers(from, "tcp/10.96.1.1:80", answers{"a": node1, "far": a}) // its endpoints: the client itself and another VM's
	all.expectAnswers(from, "tcp/10.96.1.2:80", answers{"a": node1})
	all.expectAnswers(from, "tcp/10.96.1.3:80", answers{"far": a})
	all.expectAnswers(from, "tcp/10.96.1.4:80", answers{"b": a, "far": a})
	all.expectAnswers(from, "tcp/10.96.1.8:80", answers{"internet": c.node1.Public.String()})
	all.expectAnswers(from, "udp/10.96.0.10:53", answers{"b": a, "far": a})
	all.expectAnswers(from, "tcp/198.51.100.20:80", answers{"a": node1, "far": node1})
	all.expectAnswers(from, "tcp/198.51.100.21:80", answers{"a": node1, "far": node1})
	all.expectAnswers(from, nodePort(31000), answers{"far": node1})
	all.expectAnswers(from, nodePort(31001), answers{"b": a, "far": a})
	all.expectAnswers(from, nodePort(31002), answers{"far": a})

	from = c.b.place()
	all.expectAnswers(from, "tcp/10.96.1.1:80", answers{"a": b, "far": b})
	all.expectAnswers(from, "udp/10.96.0.10:53", answers{"b": node1, "far": b})

	from = c.node1.place()
	all.expectAnswers(from, "tcp/10.96.1.1:80", answers{"a": node1, "far": node1})
	all.expectAnswers(from, "tcp/10.96.1.8:80", answers{"internet": c.node1.Public.String()})
	all.expectAnswers(from, "udp/10.96.0.10:53", answers{"b": node1, "far": node1})
	all.expectAnswers(from, "tcp/198.51.100.20:80", answers{"a": node1, "far": node1})
	all.expectAnswers(from, nodePort(31000), answers{"far": node1})
	if localhostNodePorts {
		all.expectAnswers(from, "tcp/127.0.0.1:31000", answers{"far": node1})
		all.expectAnswers(from, "tcp/127.0.0.1:31003", answers{"a": node1, "far": node1})
	}

	for _, from := range []place{c.node2.place(), c.other.place(), c.far.place()} {
		all.expectAnswers(from, nodePort(31000), answers{"far": node1})
		all.expectAnswers(from, nodePort(31003), answers{"a": node1, "far": node1})
	}

	// The internet is no pod: what comes from there is held to externalTrafficPolicy Local.
	from = internet(c.v)
	public := func(n int) string { return fmt.Sprintf("tcp/%s:%d", c.node1.Public, n) }
	all.expectAnswers(from, public(31000), answers{"far": node1})
	all.expectAnswers(from, public(31001), answers{"b": internetClient})
	all.expectAnswers(from, public(31002), nil)
	all.expectAnswers(from, public(31003), answers{"a": node1, "far": node1})

	for _, from := range []place{c.a.place(), c.b.place(), c.node1.place()} {
		all.wait.Go(func() { checkAffinity(t, from, "tcp/10.96.1.7:80") })
	}
}

// checkAffinity asks often and demands that one server answers all.
func checkAffinity(t *testing.T, from place, to string) {
	first := ""
	for range 8 {
		server, _, err := from.ask(to, answerWait)
		if err != nil || first != "" && server != first {
			t.Errorf("%s asks %s: %q after %q, %v", from.name, to, server, first, err)
			return
		}
		first = server
	}
}

// checkHostAgent asks for the host agent's HTTP, at both of its ports, through everything that may lead
// there: services, a published port, and an administrator's own DNAT rules. Only the host itself is answered.
// The host agent's port 8000 shows that the administrator's rules lead there.
func (c *cluster) checkHostAgent(t *testing.T, iptables string) {
	for port, to := range map[string]string{"9080": "80", "9526": "32526", "9000": "8000"} {
		rule := " -t nat -%s PREROUTING -p tcp --dport " + port + " -j DNAT --to-destination 168.63.129.16:" + to
		c.node1.sh(fmt.Sprintf(iptables+rule, "I"))
		defer c.node1.sh(fmt.Sprintf(iptables+rule, "D"))
	}
	for _, rule := range []string{" -t nat -%s POSTROUTING -d 168.63.129.16 -j MASQUERADE", " -%s FORWARD -d 168.63.129.16 -j ACCEPT", " -%s FORWARD -s 168.63.129.16 -j ACCEPT"} {
		c.node1.sh(fmt.Sprintf(iptables+rule, "I"))
		defer c.node1.sh(fmt.Sprintf(iptables+rule, "D"))
	}
	all := &checks{t: t}
	defer all.wait.Wait() // before the rules go
	node1 := c.node1.Primary.String()
	outside := []place{c.a.place(), c.other.place(), c.node2.place()}
	for _, from := range append(outside, c.node1.place()) {
		all.expectAnswers(from, "tcp/"+node1+":8090", nil)
	}
	for _, from := range outside {
		for _, port := range []string{"31009", "9080", "9526"} {
			all.expectAnswers(from, "tcp/"+node1+":"+port, nil)
		}
		all.expectAnswers(from, "tcp/"+node1+":9000", answers{"agent": node1})
	}
	all.expectAnswers(c.a.place(), "tcp/10.96.1.9:80", nil)
	all.expectAnswers(c.a.place(), "tcp/168.63.129.16:80", nil)
	all.expectAnswers(c.a.place(), "tcp/168.63.129.16:32526", nil)
	for _, to := range []string{"10.96.1.9:80", "168.63.129.16:80"} {
		all.expect(true, "the host asks "+to, func() bool { _, _, err := c.node1.place().ask("tcp/"+to, answerWait); return err == nil })
	}
}
