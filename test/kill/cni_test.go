// Copyright (c) The azure-vnet authors. MIT licence.

package kill

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// node is a VM with CNI plugins, and another one that watches it.
type node struct {
	test.Node
	probes *probes
}

func newNode(t *testing.T, vm vnetsim.VMConfig) node {
	t.Helper()
	if older == nil {
		t.Skip("the tracer knows amd64 and arm64 only")
	}
	_, vms := test.NewVNet(t, vm, vnetsim.VMConfig{})
	n := node{Node: test.OnNode(vms[0])}
	n.probes = startProbes(t, vms[1], n.Primary)
	return n
}

// dropForward gives iptables a policy of FORWARD, as engines and kubelets do, and all chains that iptables-restore makes. From
// then on each round runs programs of iptables.
func (n node) dropForward() {
	n.T.Helper()
	n.Must("sh", "-euc", "iptables -P FORWARD DROP; iptables-save | iptables-restore")
}

// in is the node, failing a subtest instead.
func (n node) in(t *testing.T) node { return node{n.Node.In(t), n.probes} }

// conf is a configuration that asks for one address of the NIC, by its number. So the histories with and without a
// kill have the same address.
func (n node) conf(nic, number int, more map[string]any) []byte {
	all := map[string]any{"ipam": map[string]any{"type": "azure-vnet-ipam", "ipAddress": n.NICs()[nic].Secondaries[number].String()}}
	for key, value := range more {
		all[key] = value
	}
	return test.Stdin("1.1.0", "azure", test.Azure(), all)
}

// published has a pod publish a TCP and a UDP port.
var published = map[string]any{"runtimeConfig": map[string]any{"portMappings": []any{
	map[string]any{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
	map[string]any{"hostPort": 5353, "containerPort": 53, "protocol": "udp"}}}}

// hostEnd is the host's link to a pod.
func hostEnd(id string) string {
	sum := sha256.Sum256([]byte("cni/azure/" + id + "/eth0"))
	return "azv" + hex.EncodeToString(sum[:])[:11]
}

func netnsOf(id string) string {
	if id == "" {
		return ""
	}
	return "/run/netns/" + id
}

// traced makes a call under the tracer.
func (n node) traced(tr *trace, verb, id string, conf []byte) {
	n.T.Helper()
	n.tracedWord(tr, n.Environ(verb, id, netnsOf(id)), conf)
}

// tracedWord runs azure-vnet under the tracer. If it was not killed, it succeeds.
func (n node) tracedWord(tr *trace, environ []string, stdin []byte, word ...string) {
	n.T.Helper()
	tr.program = filepath.Join(n.Dir, "azure-vnet")
	cmd := n.Command(n.T.Context(), tr.program, word...)
	var out bytes.Buffer
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = environ, bytes.NewReader(stdin), &out, &out
	code, err := tr.run(cmd)
	if err != nil || code != 0 && !tr.ended() {
		n.T.Fatalf("%s under the tracer: code %d, %v: %s", cmd, code, err, &out)
	}
}

// calls makes a call that succeeds.
func (n node) calls(verb, id string, conf []byte) {
	n.T.Helper()
	if out, err := n.Call(verb, id, netnsOf(id), conf); err != nil {
		n.T.Errorf("%s of %s: %s %v", verb, id, out, err)
	}
}

// heal is a round past the grace.
func (n node) heal() {
	n.T.Helper()
	if _, err := os.Stat(fmt.Sprintf("/proc/%d/root/run/azure-vnet/leases.json", n.PidOne())); err == nil {
		n.LeasesAged()
	}
	n.Must(n.Dir+"/azure-vnet", "reconcile")
}

// wipe removes all that azure-vnet made, and sets back what an uninstall leaves. It is cheaper than calls and an uninstall.
func (n node) wipe() {
	n.T.Helper()
	var said string
	if err := n.Do(func() error {
		said = command("link del group 16862\nlink del group 16863\nrule flush protocol 168\nroute flush table all protocol 168\n", "ip", "-force", "-batch", "-") +
			command("destroy table bridge azure_vnet\ndestroy table arp azure_vnet\ndestroy table ip azure_vnet\nflush chain ip filter FORWARD\ndestroy chain ip filter AZURE-VNET\n", "nft", "-f", "-")
		return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0)
	}); err != nil {
		n.T.Fatal(err, said)
	}
	for _, path := range []string{"/run/azure-vnet", "/run/systemd"} {
		if err := os.RemoveAll(fmt.Sprintf("/proc/%d/root%s", n.PidOne(), path)); err != nil {
			n.T.Fatal(err, said)
		}
	}
}

// again returns begin for a host that is wiped after each time. From the second time on it writes the files and the rules of
// iptables that begin left, and has a round make the rest. That is cheaper than first calls: a tenth as many programs run.
func (n node) again(begin func()) func() {
	saved := ""
	return func() {
		n.T.Helper()
		if saved != "" {
			n.Must("sh", "-euc", `mkdir -p /run/azure-vnet; cp $0/*.json /run/azure-vnet; iptables-restore <$0/iptables; $1/azure-vnet reconcile`, saved, n.Dir)
			return
		}
		begin()
		saved = n.Must("mktemp", "-d", "/run/saved.XXXXXX")
		n.Must("sh", "-euc", `cp /run/azure-vnet/host.json /run/azure-vnet/leases.json $0; iptables-save >$0/iptables`, saved)
	}
}

// addAgain is what runtimes do after an ADD that was killed: one ends the container and makes it anew, one tries again, and
// one comes back long after. Each pod runs in the end.
func (n node) addAgain(id string, conf []byte) func(way int, heal func()) {
	return func(way int, heal func()) {
		n.T.Helper()
		switch way {
		case 0:
			n.calls("DEL", id, conf)
		case 2:
			heal()
			n.calls("DEL", id, conf)
		}
		out, err := n.Call("ADD", id, netnsOf(id), conf)
		var told *types.Error
		if errors.As(err, &told) && told.Code == 100 && way == 1 {
			err = nil // it was killed with all done, or not at all
		}
		if err != nil {
			n.T.Errorf("the ADD that follows: %s %v", out, err)
		}
	}
}

// secondNIC is a NIC beside the primary one.
var secondNIC = vnetsim.NICConfig{Subnet: netip.MustParsePrefix("10.241.0.0/16"), Secondaries: 2}

// onSecondNIC and transparent are keys of configurations for pods of that NIC, and for pods without a bridge.
var (
	onSecondNIC = map[string]any{"master": "eth1"}
	transparent = map[string]any{"mode": "transparent"}

	transparentOnSecondNIC = map[string]any{"mode": "transparent", "master": "eth1"}
)

// TestKilledCalls kills calls on a node that has a pod already.
func TestKilledCalls(t *testing.T) {
	t.Parallel()
	n := newNode(t, vnetsim.VMConfig{Secondaries: 4, NICs: []vnetsim.NICConfig{secondNIC}})
	n.dropForward()
	n.Netns("keeper", "pod", "stale")
	keeper := n.conf(0, 0, nil)
	n.calls("ADD", "keeper", keeper)
	for i, c := range []struct {
		name    string
		history func(n node) history
	}{
		{"ADD", func(n node) history { return n.adding(n.conf(0, 1, nil)) }},
		{"ADD with ports", func(n node) history { return n.adding(n.conf(0, 1, published)) }},
		{"DEL", func(n node) history { return n.deleting(n.conf(0, 1, published)) }},
		{"DEL on the second NIC", func(n node) history { return n.deleting(n.conf(1, 1, onSecondNIC)) }},
		{"DEL in transparent mode", func(n node) history { return n.deleting(n.conf(0, 1, transparent)) }},
		{"DEL in transparent mode on the second NIC", func(n node) history { return n.deleting(n.conf(1, 1, transparentOnSecondNIC)) }},
		{"GC", func(n node) history {
			conf := test.Stdin("1.1.0", "azure", test.Azure(), map[string]any{
				"cni.dev/valid-attachments": []any{map[string]any{"containerID": "keeper", "ifname": "eth0"}}})
			return history{
				begin: func() {
					n.calls("ADD", "pod", n.conf(0, 1, published))
					n.calls("ADD", "stale", n.conf(0, 2, nil))
				},
				call: func(tr *trace) { n.traced(tr, "GC", "", conf) },
				next: func(way int, heal func()) {
					if way == 2 {
						heal()
					}
					n.calls("GC", "", conf)
				},
				end: func() {},
			}
		}},
		{"reconcile", func(n node) history { return n.reconciling() }},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := n.in(t)
			h := c.history(n)
			h.heal, h.pods = n.heal, []string{"keeper", "pod"}
			h.try(t, n.Host, n.probes, 2*i)
		})
	}
}

// adding kills the ADD of a pod.
func (n node) adding(conf []byte) history {
	return history{
		call: func(tr *trace) { n.traced(tr, "ADD", "pod", conf) },
		next: n.addAgain("pod", conf),
		end:  func() { n.calls("DEL", "pod", conf) },
	}
}

// deleting kills the DEL of a pod.
func (n node) deleting(conf []byte) history {
	return history{
		begin: func() { n.calls("ADD", "pod", conf) },
		call:  func(tr *trace) { n.traced(tr, "DEL", "pod", conf) },
		next: func(way int, heal func()) {
			if way == 2 {
				heal()
			}
			n.calls("DEL", "pod", conf)
		},
		end: func() {},
	}
}

// reconciling kills a round that has much to mend.
func (n node) reconciling() history {
	pod, stale := n.conf(0, 1, published), n.conf(0, 2, nil)
	return history{
		begin: func() {
			n.calls("ADD", "pod", pod)
			n.calls("ADD", "stale", stale)
			n.LeasesAged()
			n.Must("sh", "-euc", strings.NewReplacer("KEEPER", hostEnd("keeper"), "POD", hostEnd("pod"), "STALE", hostEnd("stale")).Replace(`
				ip link del STALE # its lease leaks, and its routes are strays
				ip link set POD nomaster
				ip neigh flush dev azure0 nud permanent
				ip route flush table 16863
				ip rule del lookup 16863
				ip addr add 10.240.99.1/32 dev azure0
				echo 0 >/proc/sys/net/ipv4/conf/azure0/forwarding
				echo 0 >/proc/sys/net/ipv4/conf/azure0/proxy_arp
				nft delete table bridge azure_vnet
				nft delete chain ip azure_vnet postrouting
				iptables -F FORWARD
				iptables -F AZURE-VNET
				iptables -X AZURE-VNET`))
		},
		call: func(tr *trace) { n.tracedWord(tr, os.Environ(), nil, "reconcile") },
		next: func(way int, heal func()) {
			if way == 1 { // a container comes and goes meanwhile
				n.calls("ADD", "stale", stale)
				n.calls("DEL", "stale", stale)
			}
		},
		end: func() { n.calls("DEL", "pod", pod) },
	}
}

// TestKilledFirsts kills the first calls of a boot, which make a host's bridge and tables, and uninstall, which
// removes them.
func TestKilledFirsts(t *testing.T) {
	t.Parallel()
	n := newNode(t, vnetsim.VMConfig{Secondaries: 4, NICs: []vnetsim.NICConfig{secondNIC}})
	if test.Soaking {
		n.dropForward() // else half of the time of a first call goes into some twenty programs of iptables: TestKilledCalls has a round that runs them
	}
	n.Netns("keeper", "pod")
	keeper := n.conf(0, 0, nil)
	for i, c := range []struct {
		name   string
		nic    int
		more   map[string]any
		beside bool // another pod
	}{
		{"ADD, first of the boot", 0, nil, false},
		{"ADD with an unknown policy", 0, map[string]any{"snat": false, "direct": []any{"10.50.0.0/16"}, "metadata": false}, true},
		{"ADD, first on the second NIC", 1, onSecondNIC, true},
		{"ADD, first in transparent mode", 0, transparent, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := n.in(t)
			h := n.adding(n.conf(c.nic, 1, c.more))
			h.end = n.wipe
			if c.beside {
				h.begin = func() { n.calls("ADD", "keeper", keeper) }
			}
			h.heal, h.pods = n.heal, []string{"keeper", "pod"}
			h.try(t, n.Host, n.probes, i+4)
		})
	}
	t.Run("uninstall", func(t *testing.T) {
		n := n.in(t)
		n.dropForward()
		pod := n.conf(1, 1, onSecondNIC)
		uninstall := func() { n.Must(n.Dir+"/azure-vnet", "uninstall") }
		history{
			begin: n.again(func() {
				for id, conf := range map[string][]byte{"keeper": keeper, "pod": pod} {
					n.calls("ADD", id, conf)
					n.calls("DEL", id, conf)
				}
			}),
			call: func(tr *trace) { n.tracedWord(tr, os.Environ(), nil, "uninstall") },
			next: func(way int, heal func()) {
				switch way {
				case 1:
					n.calls("ADD", "keeper", keeper)
					n.calls("DEL", "keeper", keeper)
				case 2:
					heal()
				}
				uninstall()
			},
			heal: n.heal,
			end:  n.wipe,
		}.try(t, n.Host, n.probes, 4)
	})
}
