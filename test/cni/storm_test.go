// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netns"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// storm is a node that is given as many pods at once as its NIC has secondary addresses, in both modes by turns.
type storm struct {
	test.Node
	peer netns.NsHandle // of another VM
	pods []stormPod
}

type stormPod struct {
	id   string
	conf []byte
}

// stormNetworks are the networks of the pods, by turns. Each has its mode.
var stormNetworks = map[string]string{"azure": test.Azure(), "alone": test.Azure(`"mode":"transparent"`)}

// newStorm makes the node and the namespaces of its pods.
func newStorm(t *testing.T, pods int) (*vnetsim.VNet, *storm) {
	t.Helper()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: pods}, vnetsim.VMConfig{})
	s := &storm{Node: test.OnNode(vms[0]), peer: test.OpenNamespace(t, vms[1].Namespace)}
	t.Cleanup(func() { s.peer.Close() })
	s.Must("iptables", "-P", "FORWARD", "DROP") // as engines and kubelets do
	names := slices.Sorted(maps.Keys(stormNetworks))
	for i := range pods {
		network := names[i%len(names)]
		p := stormPod{fmt.Sprintf("pod%d", i+1), test.Stdin("1.1.0", network, stormNetworks[network], nil)}
		s.Netns(p.id)
		s.pods = append(s.pods, p)
	}
	return vnet, s
}

// in is the storm, failing a subtest instead.
func (s *storm) in(t *testing.T) *storm { return &storm{s.Node.In(t), s.peer, s.pods} }

// fifth are a fifth of the pods. They are of both modes, as the modes take turns by two.
func (s *storm) fifth() (some []stormPod) {
	for i := rand.IntN(5); i < len(s.pods); i += 5 {
		some = append(some, s.pods[i])
	}
	return some
}

// add is an ADD that succeeds, and the address that it told.
func (s *storm) add(p stormPod) (addr netip.Addr) {
	out, err := s.Call("ADD", p.id, "/run/netns/"+p.id, p.conf)
	var r struct {
		IPs []struct{ Address netip.Prefix }
	}
	if err == nil {
		err = json.Unmarshal(out, &r)
	}
	if err != nil || len(r.IPs) != 1 {
		s.T.Errorf("ADD of %s: %s %v", p.id, out, err)
		return addr
	}
	return r.IPs[0].Address.Addr()
}

// del is a DEL that succeeds.
func (s *storm) del(p stormPod) {
	if out, err := s.Call("DEL", p.id, "/run/netns/"+p.id, p.conf); err != nil {
		s.T.Errorf("DEL of %s: %s %v", p.id, out, err)
	}
}

// addAgain is what runtimes do after an ADD that was killed. Some end the pod before they make it anew, and some only if
// the ADD that they repeat says that the pod has its interface.
func (s *storm) addAgain(p stormPod) netip.Addr {
	if rand.IntN(2) == 0 {
		out, err := s.Call("ADD", p.id, "/run/netns/"+p.id, p.conf)
		var r struct {
			IPs []struct{ Address netip.Prefix }
		}
		if err == nil && json.Unmarshal(out, &r) == nil && len(r.IPs) == 1 {
			return r.IPs[0].Address.Addr()
		}
		if !test.Says(err, 100, "already, and keeps it") {
			s.T.Errorf("ADD of %s, which was killed before: %s %v", p.id, out, err)
		}
	}
	s.del(p)
	return s.add(p)
}

// addAll adds pods at once. The calls of those in killed are killed. It returns the addresses of the others.
func (s *storm) addAll(pods, killed []stormPod, add func(p stormPod) netip.Addr) (has map[string]netip.Addr, took time.Duration) {
	has = map[string]netip.Addr{}
	var mu sync.Mutex
	took = s.callAll("ADD", pods, killed, func(p stormPod) {
		addr := add(p)
		mu.Lock()
		defer mu.Unlock()
		has[p.id] = addr
	})
	return has, took
}

// delAll deletes pods at once. The calls of those in killed are killed.
func (s *storm) delAll(pods, killed []stormPod) (took time.Duration) {
	return s.callAll("DEL", pods, killed, s.del)
}

// callAll makes a call for pods, for all of them at the same time. Those in killed are killed as soon as some of the others
// have had their answer, or at once. It says how long all took.
func (s *storm) callAll(verb string, pods, killed []stormPod, call func(p stormPod)) time.Duration {
	var answered atomic.Int32
	start := time.Now()
	var wait sync.WaitGroup
	for _, p := range pods {
		wait.Go(func() {
			if !s.isOneOf(p, killed) {
				call(p)
				answered.Add(1)
				return
			}
			some := rand.Int32N(int32(len(pods) - len(killed)))
			killCall(s.Node, verb, p.id, p.conf, func() {
				for answered.Load() < some {
					time.Sleep(time.Millisecond)
				}
			})
		})
	}
	wait.Wait()
	return time.Since(start)
}

func (s *storm) isOneOf(p stormPod, some []stormPod) bool {
	return slices.ContainsFunc(some, func(other stormPod) bool { return other.id == p.id })
}

// areReached says that each pod has an address of its own, and that the other VM reaches all.
func (s *storm) areReached(has map[string]netip.Addr) {
	s.T.Helper()
	holder := map[netip.Addr]string{}
	for id, addr := range has {
		if other := holder[addr]; other != "" {
			s.T.Errorf("%s and %s both have %s", id, other, addr)
		}
		holder[addr] = id
	}
	silent, err := test.Ping(s.peer, 2*test.PingTime, slices.Collect(maps.Keys(holder))...)
	if err != nil {
		s.T.Error(err)
	}
	for _, addr := range silent {
		s.T.Errorf("%s is not reached at %s", holder[addr], addr)
	}
}

// nothingLeft says that no pod has anything.
func (s *storm) nothingLeft() {
	s.T.Helper()
	s.Bare()
	if left := s.Must("ls", "/run/azure-vnet/calls"); left != "" {
		s.T.Errorf("calls left %q", left)
	}
}

// TestStormOfADDsAndDELs: a node is given as many pods at once as its NIC has addresses, and loses them at once. No call
// fails, each pod has an address of its own and is reached from another VM, and nothing is left. If a fifth of the
// calls are killed at any moment, the others succeed all the same. Then runtimes repeat the calls: each pod gets an
// address, so none is lost, and nothing is left. make test has 30 pods, and make soak 200, three times.
func TestStormOfADDsAndDELs(t *testing.T) {
	t.Parallel()
	pods, rounds := 30, 1
	if test.Soaking {
		pods, rounds = 200, 3
	}
	vnet, s := newStorm(t, pods)
	for round := range rounds {
		t.Run(fmt.Sprintf("no call is killed, round %d", round+1), func(t *testing.T) {
			s := s.in(t)
			has, adds := s.addAll(s.pods, nil, s.add)
			s.areReached(has)
			dels := s.delAll(s.pods, nil)
			s.nothingLeft()
			t.Logf("%d ADDs in %v, and as many DELs in %v", pods, adds.Round(time.Millisecond), dels.Round(time.Millisecond))
		})
	}
	t.Run("the log has a line for each call", func(t *testing.T) {
		s := s.in(t)
		log := s.Must("cat", "/var/log/azure-vnet.log")
		for _, verb := range []string{"ADD", "DEL"} {
			if got := strings.Count(log, "verb="+verb+" network="); got != pods*rounds {
				t.Errorf("of %d times %d %ss at once, %d are in the log", rounds, pods, verb, got)
			}
		}
		if torn := s.Must("sh", "-c", "grep -v ^time= /var/log/azure-vnet.log || true"); torn != "" {
			t.Errorf("torn lines: %s", torn)
		}
	})
	for round := range rounds {
		t.Run(fmt.Sprintf("a fifth of the calls are killed, round %d", round+1), func(t *testing.T) {
			s := s.in(t)
			killed := s.fifth()
			has, adds := s.addAll(s.pods, killed, s.add)
			s.areReached(has)
			held := s.Holds()
			again, _ := s.addAll(killed, nil, s.addAgain)
			maps.Copy(has, again)
			s.areReached(has)
			if len(has) != pods {
				t.Errorf("%d of %d pods have an address", len(has), pods)
			}
			killed = s.fifth()
			dels := s.delAll(s.pods, killed)
			left := s.Holds()
			s.delAll(killed, nil)
			s.LeasesAged()
			s.Must(s.Dir+"/azure-vnet", "reconcile")
			s.nothingLeft()
			t.Logf("%d ADDs in %v, %d of them killed: %d pods had a link, and %d a lease. As many DELs in %v, %d of them killed: %d links and %d leases were left",
				pods, adds.Round(time.Millisecond), len(killed), len(held.Attachments), len(held.Leases), dels.Round(time.Millisecond), len(killed), len(left.Attachments), len(left.Leases))
		})
	}
	t.Run("one GC ends all", func(t *testing.T) {
		s := s.in(t)
		has, _ := s.addAll(s.pods, nil, s.add)
		s.areReached(has)
		for network, plugin := range stormNetworks {
			if _, err := s.Call("GC", "", "", test.Stdin("1.1.0", network, plugin, map[string]any{"cni.dev/valid-attachments": nil})); err != nil {
				t.Error(err)
			}
		}
		s.nothingLeft()
	})
	test.NothingDropped(t, vnet, s.Secondaries()...)
	t.Logf("FIGURE storms: %d calls, %d kills", pods*(4*rounds+1), 2*rounds*pods/5)
}

// killCall starts a call, waits for a moment that is chosen, and kills it.
func killCall(n test.Node, verb, id string, conf []byte, wait func(), more ...string) {
	n.T.Helper()
	cmd := n.Command(context.Background(), filepath.Join(n.Dir, "azure-vnet"))
	cmd.Env, cmd.Stdin = n.Environ(verb, id, "/run/netns/"+id, more...), strings.NewReader(string(conf))
	if err := cmd.Start(); err != nil {
		n.T.Error(err)
		return
	}
	wait()
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	_ = cmd.Wait()
}
