// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"azurevnet/bridge/internal/ruleset"
	"azurevnet/internal/vnetsim"

	"golang.org/x/sys/unix"
)

// The addresses of what a VM of these tests has besides Azure's network. Its VPN's tunnel is a tun device,
// which FORWARD accepts are for. A peer by a veth and a container of Docker's bridge are somebody's
// containers for all that azure-vnet knows.
const (
	tunHere, tunPeer       = "10.8.0.1", "10.8.0.2"
	tunNet, tunTable       = "10.50.0.1", "10.60.0.1" // behind the tunnel, by a route of main and by one of table 52
	tunDefault             = "198.18.0.1"             // behind the tunnel, by OpenVPN's two halves of the internet
	vethHere, vethPeer     = "10.9.0.1", "10.9.0.2"
	dockerHere, dockerPeer = "172.17.0.1", "172.17.0.2"
)

// crossroads is a VM with every kind of link that containers may leave by, and a container of each policy.
type crossroads struct {
	v          *vnetsim.VNet
	h          *host
	far        *container
	containers map[string]*container // by policy
}

// Policies of networks by the names that the tests give them.
var snatPolicies = map[string]Policy{
	"on":     {SNAT: true},
	"off":    {},
	"listed": {SNAT: true, Direct: prefixes("10.8.0.0/16", "172.17.0.0/16")},
	"all":    {SNAT: true, Direct: prefixes("0.0.0.0/0")},
	"none":   {SNAT: true, Direct: prefixes()},
}

func newCrossroads(t *testing.T, mode Mode) *crossroads {
	v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: len(snatPolicies)}, vnetsim.VMConfig{Secondaries: 1})
	c := &crossroads{v: v, h: hosts[0], containers: map[string]*container{}}
	for _, h := range hosts {
		h.mustEnsure(h.spec(mode))
	}
	c.far = hosts[1].running(0, mode, Policy{SNAT: true})
	for name, policy := range snatPolicies {
		c.containers[name] = c.h.running(len(c.containers), mode, policy)
	}

	tun, veth, docker := c.h.otherNetns("tunnel"), c.h.otherNetns("branch"), c.h.dockerContainer()
	connectTuns(t, c.h.place(), tun)
	c.h.ip("address add "+tunHere+"/24 dev tun0", "link set tun0 up",
		"route add 10.50.0.0/16 dev tun0", "rule add pref 5270 lookup 52", "route add 10.60.0.0/16 dev tun0 table 52",
		"route add 0.0.0.0/1 dev tun0", "route add 128.0.0.0/1 dev tun0", "route add "+vnetsim.InternetAddr.String()+" via "+c.h.Gateway.String(),
		"-n tunnel address add "+tunPeer+"/24 dev tun0", "-n tunnel link set tun0 up", "-n tunnel route add default dev tun0",
		"-n tunnel address add "+tunNet+"/32 dev lo", "-n tunnel address add "+tunTable+"/32 dev lo", "-n tunnel address add "+tunDefault+"/32 dev lo",
		"link add vpn1 type veth peer name eth0 netns branch", "address add "+vethHere+"/24 dev vpn1", "link set vpn1 up",
		"-n branch address add "+vethPeer+"/24 dev eth0", "-n branch link set eth0 up", "-n branch route add default via "+vethHere)
	for server, p := range map[string]place{"tun": tun, "veth": veth, "docker": docker, "far": c.far.place(), "on": c.containers["on"].place()} {
		p.serve(t, server, ":8000")
	}
	internet(v).serve(t, "internet", vnetsim.InternetAddr.String()+":8000")
	internet(v).serve(t, "agent", vnetsim.HostAgentAddr.String()+":8000")
	internet(v).serve(t, "imds", vnetsim.IMDSAddr.String()+":8000")
	c.h.reconcile() // FORWARD accepts the tunnel, which came after the containers
	return c
}

// dockerContainer makes Docker's bridge on the VM, with one container in it.
func (h *host) dockerContainer() place {
	h.t.Helper()
	docker := h.otherNetns("docker")
	h.ip("link add docker0 type bridge", "address add "+dockerHere+"/16 dev docker0", "link set docker0 up",
		"link add veth0 master docker0 type veth peer name eth0 netns docker", "link set veth0 up",
		"-n docker address add "+dockerPeer+"/16 dev eth0", "-n docker link set eth0 up", "-n docker route add default via "+dockerHere)
	return docker
}

// connectTuns makes a tun device tun0 in each of two places, and carries packets from one to the other.
func connectTuns(t *testing.T, places ...place) {
	var files []*os.File
	for _, p := range places {
		if err := p.do(func() error {
			fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			request, err := unix.NewIfreq("tun0")
			if err == nil {
				request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
				err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
			}
			files = append(files, os.NewFile(uintptr(fd), "tun0")) // not before: Go would wait for a file that cannot be polled
			return err
		}); err != nil {
			t.Fatalf("tun0 in %s: %v", p.name, err)
		}
	}
	carry := func(from, to *os.File) {
		buf := make([]byte, 65536)
		for {
			n, err := from.Read(buf)
			if err != nil {
				return
			}
			_, _ = to.Write(buf[:n]) // a device that is down takes nothing
		}
	}
	go carry(files[0], files[1])
	go carry(files[1], files[0])
	t.Cleanup(func() { files[0].Close(); files[1].Close() })
}

// own stands for the asking container's address in expected answers.
const own = "own"

// expect asks each destination from the containers of each policy. want is the client's address that the
// destination's server sees, by policy and server; a server that is missing does not answer.
func (c *crossroads) expect(t *testing.T, want map[string]answers) {
	t.Helper()
	c.h.forgetFlows() // a connection from the port of an earlier one would be translated by the earlier rules
	all := &checks{t: t}
	defer all.wait.Wait()
	for policy, seen := range want {
		from := c.containers[policy]
		for to, server := range map[string]string{
			c.far.addr.String(): "far", c.containers["on"].addr.String(): "on", vnetsim.InternetAddr.String(): "internet",
			vnetsim.HostAgentAddr.String(): "agent", vnetsim.IMDSAddr.String(): "imds",
			tunPeer: "tun", tunNet: "tunNet", tunTable: "tunTable", tunDefault: "tunDefault", vethPeer: "veth", dockerPeer: "docker",
		} {
			client, answered := seen[server]
			expected := answers{}
			if answered {
				if client == own {
					client = from.addr.String()
				}
				if strings.HasPrefix(server, "tun") {
					server = "tun"
				}
				expected[server] = client
			}
			if to != from.addr.String() {
				all.expectAnswers(place{policy + ": " + from.place().name, from.place().do}, "tcp/"+to+":8000", expected)
			}
		}
	}
}

// with is the answers with changes. An empty address takes the server out.
func (a answers) with(changes answers) answers {
	out := answers{}
	for _, from := range []answers{a, changes} {
		for server, client := range from {
			if out[server] = client; client == "" {
				delete(out, server)
			}
		}
	}
	return out
}

// wanted is what each policy means, with no rules of others.
func (c *crossroads) wanted() map[string]answers {
	primary, public := c.h.Primary.String(), c.h.Public.String()
	on := answers{"far": own, "on": own, "internet": public, "agent": own, "imds": primary,
		"tun": tunHere, "tunNet": tunHere, "tunTable": tunHere, "tunDefault": tunHere, "veth": vethHere, "docker": dockerHere}
	off := answers{"far": own, "on": own, "agent": own,
		"tun": own, "tunNet": own, "tunTable": own, "tunDefault": own, "veth": own, "docker": own}
	return map[string]answers{
		"on":     on,
		"off":    off,
		"listed": on.with(answers{"far": primary, "tun": own, "docker": own}),
		"all":    off.with(answers{"imds": primary}),
		"none":   on.with(answers{"far": primary}),
	}
}

// What leaves the VM has the source address that the network's policy says, by whatever link it leaves.
// An administrator's rules come after ours: what ours leave as it is, theirs may masquerade.
func TestSNAT(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		c := newCrossroads(t, mode)
		for _, call := range callIptables(mode) {
			c.h.sh("echo " + call + " >/proc/sys/net/bridge/bridge-nf-call-iptables")
			t.Run("call-iptables "+call, func(t *testing.T) {
				t.Run("alone", func(t *testing.T) { c.expect(t, c.wanted()) })
				t.Run("after DNAT", c.checkDNAT)
				if call == "1" || soaking { // marks are set in the host's IP layer, for both values alike
					t.Run("foreign marks", c.checkMarks)
				}
				t.Run("documented rule", c.checkDocumentedRule)
				t.Run("ip-masq-agent", c.checkMasqAgent)
			})
		}
		t.Run("forward policy DROP", func(t *testing.T) {
			c.h.sh("iptables-nft -P FORWARD DROP")
			defer c.h.sh("iptables-nft -P FORWARD ACCEPT")
			c.h.reconcile()
			want := c.wanted()
			for policy := range want { // what may be somebody's containers needs an accept of somebody else
				want[policy] = want[policy].with(answers{"veth": "", "docker": ""})
			}
			c.expect(t, want)
		})
		c.h.whole("at the end")
		checkFabric(t, c.v, c.far.addr, c.containers["on"].addr, c.containers["off"].addr, c.containers["listed"].addr,
			c.containers["all"].addr, c.containers["none"].addr, c.h.Primary)
	})
}

// checkDNAT demands that the destination that counts is the one after DNAT.
func (c *crossroads) checkDNAT(t *testing.T) {
	for from, to := range map[string]string{"10.96.1.8": vnetsim.InternetAddr.String(), "198.51.100.20": c.far.addr.String()} {
		rule := fmt.Sprintf("PREROUTING -d %s -p tcp --dport 80 -j DNAT --to-destination %s:8000", from, to)
		c.h.sh("iptables-nft -t nat -A " + rule)
		defer c.h.sh("iptables-nft -t nat -D " + rule)
	}
	for policy, want := range map[string][2]answers{
		"on":  {{"internet": c.h.Public.String()}, {"far": c.containers["on"].addr.String()}},
		"off": {nil, {"far": c.containers["off"].addr.String()}},
	} {
		checkAnswers(t, c.containers[policy].place(), "tcp/10.96.1.8:80", want[0])
		checkAnswers(t, c.containers[policy].place(), "tcp/198.51.100.20:80", want[1])
	}
}

// checkMarks demands that packet marks of others decide nothing, and come through as they are.
func (c *crossroads) checkMarks(t *testing.T) {
	for name, test := range map[string]struct {
		mark  string
		rules []string // of iptables' table mangle
	}{
		"kube-router": {"0x10000", []string{"PREROUTING -j MARK --set-xmark 0x10000/0x10000"}},
		"calico":      {"0xffff0000", []string{"PREROUTING -j MARK --set-xmark 0xffff0000/0xffff0000"}},
		"connmark": {"0x51", []string{"PREROUTING -j CONNMARK --restore-mark", "PREROUTING -m mark --mark 0 -j MARK --set-xmark 0x51/0xffffffff",
			"POSTROUTING -j CONNMARK --save-mark"}},
	} {
		t.Run(name, func(t *testing.T) {
			for _, rule := range test.rules {
				c.h.sh("iptables-nft -t mangle -A " + rule)
			}
			c.h.run("nft", fmt.Sprintf("table ip watch { chain post { type filter hook postrouting priority 300; "+
				"iifgroup { %[2]d, %[3]d } meta mark %[1]s counter; iifgroup { %[2]d, %[3]d } meta mark != %[1]s counter; }; }", test.mark, ruleset.GroupBridge, ruleset.GroupTransparent))
			defer c.h.sh("nft delete table ip watch; iptables-nft -t mangle -F")
			c.expect(t, c.wanted())
			var counts []string
			for line := range strings.Lines(c.h.sh("nft list chain ip watch post")) {
				if _, count, ok := strings.Cut(line, "counter packets "); ok {
					counts = append(counts, strings.Fields(count)[0])
				}
			}
			if len(counts) != 2 || counts[0] == "0" || counts[1] != "0" {
				t.Errorf("forwarded packets with the mark %s and without: %v, want some and 0", test.mark, counts)
			}
		})
	}
}

// checkDocumentedRule has beside our rules the one that Azure's documentation gives for hosts without SNAT.
func (c *crossroads) checkDocumentedRule(t *testing.T) {
	const rule = "POSTROUTING -m iprange ! --dst-range 168.63.129.16 -m addrtype ! --dst-type local ! -d 10.0.0.0/8 -j MASQUERADE"
	c.h.sh("iptables-nft -t nat -A " + rule)
	defer c.h.sh("iptables-nft -t nat -D " + rule)
	want := c.wanted()
	theirs := answers{"internet": c.h.Public.String(), "imds": c.h.Primary.String(), "tunDefault": tunHere, "docker": dockerHere}
	for policy := range want {
		want[policy] = want[policy].with(theirs)
	}
	c.expect(t, want)
}

// checkMasqAgent has beside our rules those that ip-masq-agent writes with its defaults. It masquerades
// towards the host agent too, which answers the VM's primary address as well.
func (c *crossroads) checkMasqAgent(t *testing.T) {
	const chain = "IP-MASQ-AGENT"
	jump := `POSTROUTING -m comment --comment "ip-masq-agent: ensure nat POSTROUTING directs all non-LOCAL destination traffic to our custom IP-MASQ-AGENT chain" -m addrtype ! --dst-type LOCAL -j ` + chain
	c.h.sh("iptables-nft -t nat -N " + chain + " && iptables-nft -t nat -A " + jump)
	defer c.h.sh("iptables-nft -t nat -D " + jump + " && iptables-nft -t nat -F " + chain + " && iptables-nft -t nat -X " + chain)
	for _, local := range []string{"169.254.0.0/16", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"} {
		c.h.sh("iptables-nft -t nat -A " + chain + " -d " + local + ` -m comment --comment "ip-masq-agent: local traffic is not subject to MASQUERADE" -j RETURN`)
	}
	c.h.sh("iptables-nft -t nat -A " + chain + ` -m comment --comment "ip-masq-agent: outbound traffic is subject to MASQUERADE (must be last in chain)" -j MASQUERADE --random-fully`)
	want := c.wanted()
	theirs := answers{"internet": c.h.Public.String(), "agent": c.h.Primary.String(), "tunDefault": tunHere}
	for policy := range want {
		want[policy] = want[policy].with(theirs)
	}
	c.expect(t, want)
}
