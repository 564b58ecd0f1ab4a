// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"fmt"
	"strings"
	"testing"

	"azurevnet/internal/vnetsim"
)

// Rules of other programs stay in force, whatever our FORWARD accepts, and stop no container that they do
// not mean. They are loaded while containers run, with br_netfilter calling iptables or not.
func TestForeignRules(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		c := newCluster(t, mode)
		c.a.place().serve(t, "a", ":8081")
		c.node1.place().serve(t, "node1", ":8000")
		docker := c.node1.dockerContainer()
		docker.serve(t, "docker", ":80")
		docker.serve(t, "docker", ":81")
		for name, check := range map[string]func(*cluster, *checks){
			"calico-policy-only": map[Mode]func(*cluster, *checks){ModeBridge: (*cluster).expectOpen, ModeTransparent: (*cluster).expectCalico}[mode],
			"docker-27":          func(c *cluster, all *checks) { c.expectDocker(all, docker) },
			"hardened-image":     (*cluster).expectNoWayIn,
			"kube-router":        (*cluster).expectKubeRouter,
			"tailscale":          (*cluster).expectOpen,
			"ufw":                (*cluster).expectNoWayIn,
		} {
			for i, with := range []struct{ iptables, call string }{{"iptables-nft", "0"}, {"iptables-nft", "1"}, {"iptables-legacy", "1"}} {
				if !soaking && (with.iptables == "iptables-legacy" || (i == 0) != (mode == ModeTransparent)) {
					continue // a mode with call-iptables 0 and a mode with 1
				}
				if with.iptables == "iptables-legacy" && name != "docker-27" && name != "hardened-image" {
					continue // as iptables-nft does
				}
				t.Run(fmt.Sprintf("%s/%s call-iptables %s", name, with.iptables, with.call), func(t *testing.T) {
					c.node1.run(with.iptables+"-restore", c.recorded("foreign/"+name+".iptables-save.txt"))
					c.node1.sh("echo " + with.call + " >/proc/sys/net/bridge/bridge-nf-call-iptables")
					c.node1.reconcile()
					c.node1.whole("with the rules of others")
					all := &checks{t: t}
					check(c, all)
					all.wait.Wait()
					if name == "docker-27" || name == "tailscale" { // no rule of theirs decides before one that is appended
						c.checkSavedDrop(t, with.iptables)
					}
					c.unload()
				})
			}
		}
		checkFabric(t, c.v, c.a.addr, c.b.addr, c.far.addr, c.node1.Primary)
	})
}

// expectOpen demands that the containers reach each other, the VNet and the internet, and are reached.
func (c *cluster) expectOpen(all *checks) {
	for _, local := range []*container{c.a, c.b} {
		all.expectAnswers(local.place(), "tcp/"+c.far.addr.String()+":8080", answers{"far": local.addr.String()})
		all.expectAnswers(local.place(), "tcp/203.0.113.10:8000", answers{"internet": c.node1.Public.String()})
	}
	c.expectReached(all)
}

// expectReached demands that the containers are reached from their VM, from each other and from another VM.
func (c *cluster) expectReached(all *checks) {
	a, b := "tcp/"+c.a.addr.String()+":8080", "tcp/"+c.b.addr.String()+":8080"
	all.expectAnswers(c.far.place(), a, answers{"a": c.far.addr.String()})
	all.expectAnswers(c.far.place(), b, answers{"b": c.far.addr.String()})
	all.expectAnswers(c.node1.place(), a, answers{"a": c.node1.Primary.String()})
	all.expectAnswers(c.b.place(), a, answers{"a": c.b.addr.String()})
	all.expectAnswers(c.a.place(), b, answers{"b": c.a.addr.String()})
}

// expectNoWayIn is for firewalls that let nobody in but by ssh: to the host, which containers are not.
func (c *cluster) expectNoWayIn(all *checks) {
	c.expectOpen(all)
	for _, from := range []place{c.a.place(), c.far.place()} {
		all.expectAnswers(from, "tcp/"+c.node1.Primary.String()+":8000", nil)
	}
}

// expectKubeRouter is for a policy that lets far in to a's port 8080, and a out to the internet's port 8000.
func (c *cluster) expectKubeRouter(all *checks) {
	a, far, b := c.a.addr.String(), c.far.addr.String(), c.b.addr.String()
	all.expectAnswers(c.far.place(), "tcp/"+a+":8080", answers{"a": far})
	all.expectAnswers(c.far.place(), "tcp/"+a+":8081", nil)
	all.expectAnswers(c.other.place(), "tcp/"+a+":8080", nil)
	all.expectAnswers(c.b.place(), "tcp/"+a+":8080", nil)
	all.expectAnswers(c.node1.place(), "tcp/"+a+":8080", answers{"a": c.node1.Primary.String()})
	all.expectAnswers(c.a.place(), "tcp/203.0.113.10:8000", answers{"internet": c.node1.Public.String()})
	all.expectAnswers(c.a.place(), "tcp/203.0.113.10:80", nil)
	all.expectAnswers(c.a.place(), "tcp/"+far+":8080", nil)
	all.expectAnswers(c.a.place(), "tcp/"+b+":8080", nil)
	all.expectAnswers(c.b.place(), "tcp/"+far+":8080", answers{"far": b})
	all.expectAnswers(c.far.place(), "tcp/"+b+":8080", answers{"b": far})
}

// expectCalico is for a policy that lets a out to the internet's host alone, and everybody in. Calico does
// not know b's link, and drops what comes from it or goes to it.
func (c *cluster) expectCalico(all *checks) {
	a, far, b := c.a.addr.String(), c.far.addr.String(), c.b.addr.String()
	all.expectAnswers(c.a.place(), "tcp/203.0.113.10:8000", answers{"internet": c.node1.Public.String()})
	all.expectAnswers(c.a.place(), "tcp/"+far+":8080", nil)
	all.expectAnswers(c.a.place(), "tcp/"+b+":8080", nil)
	all.expectAnswers(c.far.place(), "tcp/"+a+":8080", answers{"a": far})
	all.expectAnswers(c.far.place(), "tcp/"+b+":8080", nil)
	all.expectAnswers(c.b.place(), "tcp/"+far+":8080", nil)
}

// expectDocker is for Docker's own bridge network: its container is reached at the port that it publishes,
// and at no other.
func (c *cluster) expectDocker(all *checks, docker place) {
	c.expectOpen(all)
	node1 := c.node1.Primary.String()
	all.expectAnswers(c.a.place(), "tcp/"+node1+":8081", answers{"docker": dockerHere})
	all.expectAnswers(c.far.place(), "tcp/"+node1+":8081", answers{"docker": c.far.addr.String()})
	all.expectAnswers(c.a.place(), "tcp/"+dockerPeer+":81", nil)
	all.expectAnswers(docker, "tcp/"+c.a.addr.String()+":8080", answers{"a": node1})
}

// checkSavedDrop demands that a drop which somebody appends behind our jump holds after the next round.
func (c *cluster) checkSavedDrop(t *testing.T, iptables string) {
	for _, rule := range []string{"-s " + c.b.addr.String(), "-i eth0 -d " + c.a.addr.String() + " -m conntrack --ctstate NEW"} {
		c.node1.sh(iptables + " -A FORWARD " + rule + " -j DROP")
	}
	c.node1.reconcile()
	all := &checks{t: t}
	defer all.wait.Wait()
	all.expectAnswers(c.b.place(), "tcp/"+c.far.addr.String()+":8080", nil)
	all.expectAnswers(c.b.place(), "tcp/"+c.a.addr.String()+":8080", nil)
	all.expectAnswers(c.far.place(), "tcp/"+c.a.addr.String()+":8080", nil)
	all.expectAnswers(c.a.place(), "tcp/203.0.113.10:8000", answers{"internet": c.node1.Public.String()})
}

// A FORWARD chain that iptables cannot read, such as one that its rules were translated to, keeps no
// container away. It is named with the remedy, and the remedy works.
func TestForwardOfNft(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1}, vnetsim.VMConfig{Secondaries: 1})
		h := hosts[0]
		h.run("nft", "table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; ct state vmap { established : accept, related : accept }; }; }")
		for _, h := range hosts {
			h.mustEnsure(h.spec(mode))
		}
		near, far := h.running(0, mode, Policy{SNAT: true}), hosts[1].running(0, mode, Policy{SNAT: true})
		far.place().serve(t, "far", ":8080")
		near.place().serve(t, "near", ":8080")
		checkAnswers(t, near.place(), "tcp/"+far.addr.String()+":8080", nil)
		wrong := h.broken()
		if len(wrong) != 1 {
			t.Fatalf("broken: %q, want one sentence", wrong)
		}
		_, remedy, _ := strings.Cut(wrong[0], ": nft ")
		h.sh("nft '" + strings.ReplaceAll(remedy, "; nft ", "' && nft '") + "'")
		checkAnswers(t, near.place(), "tcp/"+far.addr.String()+":8080", answers{"far": near.addr.String()})
		checkAnswers(t, far.place(), "tcp/"+near.addr.String()+":8080", answers{"near": far.addr.String()})
		h.whole("with the remedy")
		checkFabric(t, v, near.addr, far.addr)
	})
}

// A host whose FORWARD drops what nobody accepts, and that lacks the program to accept, gets no containers
// and says what it lacks. Where FORWARD may pass them, containers are attached and status says it.
func TestNoIPTables(t *testing.T) {
	for name, test := range map[string]struct {
		rules   string
		refused bool
	}{
		"policy drop":   {"iptables-nft -P FORWARD DROP", true},
		"policy accept": {"iptables-nft -P FORWARD ACCEPT", false},
		"legacy":        {"iptables-legacy -P FORWARD DROP", false}, // whose policy cannot be read without the program
	} {
		t.Run(name, func(t *testing.T) {
			_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
			h := hosts[0]
			h.sh(test.rules)
			const remedy = "install the package iptables"
			t.Setenv("PATH", "") // of this process, in which the product looks for iptables
			_, err := h.ensure(h.spec(ModeBridge))
			if refused := err != nil && strings.Contains(err.Error(), remedy); refused != test.refused || err != nil && !refused {
				t.Errorf("without iptables: %v, want the remedy: %v", err, test.refused)
			}
			if wrong := h.broken(); !test.refused && (len(wrong) != 1 || !strings.Contains(wrong[0], remedy)) {
				t.Errorf("without iptables: broken: %q, want the remedy", wrong)
			}
			t.Setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
			h.mustEnsure(h.spec(ModeBridge))
			h.reconcile()
			h.whole("with iptables")
		})
	}
}

// An nft chain of others that drops what its own rules do not accept is named with the remedy, wherever its drop
// stands, and the remedy works. A chain that lets containers pass is not named.
func TestNftChainsOfOthers(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1}, vnetsim.VMConfig{Secondaries: 1})
		h := hosts[0]
		for _, h := range hosts {
			h.mustEnsure(h.spec(mode))
		}
		near, far := h.running(0, mode, Policy{SNAT: true}), hosts[1].running(0, mode, Policy{SNAT: true})
		far.place().serve(t, "far", ":8080")
		near.place().serve(t, "near", ":8080")
		const forward, known = "chain forward { type filter hook forward priority 5; policy ", "ct state vmap { established : accept, related : accept, invalid : drop };"
		for _, test := range []struct {
			name, table, title string // no title: it is not named
		}{
			{"policy drop", "table inet fw { " + forward + "drop; " + known + " }; }", "inet fw forward"},
			{"a final drop", "table ip fw { " + forward + "accept; " + known + " counter drop; }; }", "ip fw forward"},
			{"a final reject, deep", "table inet fw { chain end { log prefix \"no\" reject; }; chain zones { iifname \"lo\" accept; goto end; }; " + forward + "accept; " + known + " jump zones; }; }", "inet fw forward"},
			{"nothing of containers", "table inet fw { chain guests { iifname \"virbr0\" drop; }; " + forward + "accept; " + known + " jump guests; meta l4proto tcp ip daddr 192.0.2.9 drop; }; }", ""},
			{"all accepted", "table inet fw { chain rest { accept; }; " + forward + "drop; " + known + " jump rest; drop; }; }", ""},
			{"not forwarded", "table inet fw { chain input { type filter hook input priority 5; policy drop; ip protocol icmp accept; tcp sport 8080 accept; }; }", ""},
		} {
			t.Run(test.name, func(t *testing.T) {
				h.run("nft", test.table)
				defer h.sh("nft delete table ip fw 2>/dev/null || nft delete table inet fw")
				passes := func(open bool) {
					t.Helper()
					all := &checks{t: t}
					defer all.wait.Wait()
					out, in := answers{"far": near.addr.String()}, answers{"near": far.addr.String()}
					if !open {
						out, in = nil, nil
					}
					all.expectAnswers(near.place(), "tcp/"+far.addr.String()+":8080", out)
					all.expectAnswers(far.place(), "tcp/"+near.addr.String()+":8080", in)
				}
				if test.title == "" {
					h.whole("with a chain that lets containers pass")
					passes(true)
					return
				}
				passes(false)
				wrong := h.broken()
				if len(wrong) != 1 || !strings.Contains(wrong[0], "the nft chain "+test.title+" drops") {
					t.Fatalf("broken: %q, want %s", wrong, test.title)
				}
				if mended := h.reconcile(); len(mended) > 0 {
					t.Errorf("mended %q", mended)
				}
				_, remedy, _ := strings.Cut(wrong[0], ": nft ")
				h.sh("nft '" + strings.ReplaceAll(remedy, "; nft ", "' && nft '") + "'")
				passes(true)
				h.whole("with the remedy")
			})
		}
		checkFabric(t, v, near.addr, far.addr)
	})
}

// A real ufw lets containers pass, since it filters by iptables, and lets nobody reach the host who is not to. Its own
// rules for what is forwarded hold, and a reload changes nothing of it.
func TestUFW(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		c := newCluster(t, mode)
		h := c.node1
		h.place().serve(t, "node1", ":8000")
		c.a.place().serve(t, "a", ":8081")
		h.sh("ufw allow 22/tcp && ufw route deny from " + c.far.addr.String() + " to " + c.a.addr.String() + " port 8081 proto tcp")
		for _, change := range []string{"ufw --force enable", "ufw reload"} {
			t.Run(change, func(t *testing.T) {
				h.sh(change)
				h.reconcile()
				h.whole("with ufw")
				all := &checks{t: t}
				defer all.wait.Wait()
				c.expectNoWayIn(all)
				all.expectAnswers(c.far.place(), "tcp/"+c.a.addr.String()+":8081", nil)
			})
		}
		checkFabric(t, c.v, c.a.addr, c.b.addr, c.far.addr, c.node1.Primary)
	})
}
