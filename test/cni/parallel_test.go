// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// stickyIPAM gives a container the one address that is written down for it, however often it is asked, and writes
// down who has it. DEL takes the container's note away. So an ADD that fails and has it called for the container
// would take the address from the one that succeeded.
const stickyIPAM = `#!/bin/sh
cat >/dev/null
note=/run/sticky/$CNI_CONTAINERID.has
case $CNI_COMMAND in
ADD) touch $note; printf '{"cniVersion":"1.1.0","ips":[{"address":"%s/16","gateway":"10.240.0.1"}]}' $(cat /run/sticky/address) ;;
DEL) rm -f $note ;;
esac
`

// addsAtOnce starts many ADDs of one container and interface, and returns the addresses that they answered. Some
// may be killed at a moment of their own.
func addsAtOnce(n test.Node, id string, conf []byte, count, killed int, more ...string) (won []netip.Addr) {
	n.T.Helper()
	var wait sync.WaitGroup
	var mu sync.Mutex
	for i := range count {
		wait.Go(func() {
			if i < killed {
				killCall(n, "ADD", id, conf, func() { time.Sleep(rand.N(60 * time.Millisecond)) }, more...)
				return
			}
			out, err := n.Call("ADD", id, "/run/netns/"+id, conf, more...)
			mu.Lock()
			defer mu.Unlock()
			var told *types.Error
			if errors.As(err, &told) && told.Code == 100 && strings.Contains(told.Msg, "already, and keeps it") {
				return
			}
			var r struct {
				IPs []struct{ Address netip.Prefix }
			}
			if err != nil || json.Unmarshal(out, &r) != nil || len(r.IPs) != 1 {
				n.T.Errorf("ADD: %s %v", out, err)
				return
			}
			won = append(won, r.IPs[0].Address.Addr())
		})
	}
	wait.Wait()
	return won
}

// Of 20 ADDs of one container and interface at once one wins, and the others harm nothing: the container has one
// link and one lease, is reached from another VM, and DEL leaves nothing. With some of them killed at any moment,
// it is the same for those that live on.
func TestADDsOfOneInterfaceAtOnce(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 30}, vnetsim.VMConfig{})
	n, plain := test.OnNode(vms[0]), test.OnHost(vms[1])
	n.Must("sh", "-c", `mkdir -p /run/sticky && printf %s "$0" >/run/sticky/sticky && chmod +x /run/sticky/sticky && echo $1 >/run/sticky/address`, stickyIPAM, n.Secondaries()[29].String())
	var used []netip.Addr
	for name, conf := range map[string][]byte{
		"bridge":       test.Stdin("1.1.0", "azure", test.Azure(), nil),
		"transparent":  test.Stdin("1.1.0", "azure", test.Azure(`"mode":"transparent"`), nil),
		"another IPAM": test.Stdin("1.1.0", "azure", `{"type":"azure-vnet","ipam":{"type":"sticky"}}`, nil),
	} {
		for round, killed := range []int{0, 0, 7, 7} {
			t.Run(fmt.Sprintf("%s, round %d", name, round), func(t *testing.T) {
				n := n.In(t)
				path := "CNI_PATH=" + n.Dir + ":/run/sticky"
				id := fmt.Sprintf("one%d", round)
				n.Netns(id)
				won := addsAtOnce(n, id, conf, 20, killed, path)
				if len(won) > 1 || len(won) == 0 && killed == 0 {
					t.Errorf("%v won", won)
				}
				s := n.Holds()
				other := name == "another IPAM"
				if len(s.Attachments) != 1 || !other && len(s.Leases) != 1 {
					t.Fatalf("%+v is held", s)
				}
				addr := n.Secondaries()[29]
				if !other {
					addr = netip.MustParseAddr(s.Leases[0])
				} else if _, err := n.Try("test", "-e", "/run/sticky/"+id+".has"); err != nil {
					t.Error("the other IPAM was told to take the winner's address back")
				}
				if len(won) == 1 && won[0] != addr {
					t.Errorf("the winner was told %s, and %s is held", won[0], addr)
				}
				used = append(used, addr)
				if _, err := plain.Try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
					t.Errorf("the container is not reached: %v", err)
				}
				if _, err := n.Call("DEL", id, "/run/netns/"+id, conf, path); err != nil {
					t.Error(err)
				}
				n.Bare()
				n.Must("ip", "netns", "del", id)
			})
		}
	}
	t.Run("ADDs and DELs of one interface at once", func(t *testing.T) {
		n := n.In(t)
		conf := test.Stdin("1.1.0", "azure", test.Azure(), nil)
		n.Netns("both")
		var wait sync.WaitGroup
		for i := range 20 {
			wait.Go(func() {
				verb := []string{"ADD", "DEL"}[i%2]
				out, err := n.Call(verb, "both", "/run/netns/both", conf)
				var told *types.Error
				if err != nil && !(verb == "ADD" && errors.As(err, &told) && told.Code == 100) {
					t.Errorf("%s: %s %v", verb, out, err)
				}
			})
		}
		wait.Wait()
		if s := n.Holds(); len(s.Leases) != len(s.Attachments) {
			t.Errorf("%+v is held", s)
		}
		if _, err := n.Call("DEL", "both", "", conf); err != nil {
			t.Error(err)
		}
		n.Bare()
	})
	t.Run("the IPAM plugin alone", func(t *testing.T) {
		n := n.In(t)
		conf := other("1.1.0", "net", nil)
		for range 3 {
			var wait sync.WaitGroup
			var mu sync.Mutex
			won := 0
			for range 20 {
				wait.Go(func() {
					out, err := ipam(n, "ADD", "c1", conf)
					mu.Lock()
					defer mu.Unlock()
					if err == nil {
						won++
					} else if !test.Says(err, 100, "keeps it") {
						t.Errorf("%s %v", out, err)
					}
				})
			}
			wait.Wait()
			if s := n.Holds(); won != 1 || len(s.Leases) != 1 {
				t.Errorf("%d won, and %+v is held", won, s)
			}
			if _, err := ipam(n, "DEL", "c1", conf); err != nil {
				t.Error(err)
			}
			n.Bare()
		}
		if left := n.Must("sh", "-c", "ls /run/azure-vnet/calls"); left != "" {
			t.Errorf("calls left %q", left)
		}
	})
	test.NothingDropped(t, vnet, used...)
}

// A GC that finds 200 leases of containers that are gone ends them all in one round, and looks the host over once for
// all of them. A container that stands keeps its network meanwhile.
func TestGCWith200StaleLeases(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 204}, vnetsim.VMConfig{})
	n, plain := test.OnNode(vms[0]), test.OnHost(vms[1])
	l := n.List("1.1.0", "azure", test.Azure())
	n.Must("iptables", "-P", "FORWARD", "DROP") // as engines and kubelets do: each look at the host runs iptables
	addr, _ := n.Add(l, n.Pod("alive"))

	// As nodes were cut off from power or their runtimes' state was lost: leases, and no links.
	var file struct {
		Version int                       `json:"version"`
		Boot    string                    `json:"boot"`
		Adopted bool                      `json:"adopted"`
		Answers json.RawMessage           `json:"answers"`
		Leases  map[string]map[string]any `json:"leases"`
	}
	if err := json.Unmarshal([]byte(n.Must("cat", "/run/azure-vnet/leases.json")), &file); err != nil {
		t.Fatal(err)
	}
	const stale = 200
	for _, a := range n.Secondaries() {
		if len(file.Leases) > stale {
			break
		}
		if a == addr {
			continue
		}
		lease := map[string]any{}
		for k, v := range file.Leases[addr.String()] {
			lease[k] = v
		}
		lease["owner"] = fmt.Sprintf("cni/azure/gone%d/eth0", len(file.Leases))
		file.Leases[a.String()] = lease
	}
	text, err := json.Marshal(file)
	if err != nil {
		t.Fatal(err)
	}
	write := n.Command(t.Context(), "sh", "-c", "cat >/run/azure-vnet/leases.json")
	write.Stdin = strings.NewReader(string(text))
	if out, err := write.CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	if s := n.Holds(); len(s.Leases) != stale+1 {
		t.Fatalf("%d leases are held", len(s.Leases))
	}
	valid := []map[string]string{{"containerID": "alive", "ifname": "eth0"}}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	gc := n.Command(ctx, filepath.Join(n.Dir, "azure-vnet"))
	gc.Env, gc.Stdin = n.Environ("GC", "", ""), strings.NewReader(string(test.Stdin("1.1.0", "azure", test.Azure(), map[string]any{"cni.dev/valid-attachments": valid})))
	if out, err := gc.CombinedOutput(); err != nil {
		t.Errorf("%v %s", err, out)
	}
	cpu := gc.ProcessState.UserTime() + gc.ProcessState.SystemTime()
	t.Logf("GC of %d leases took %v of CPU", stale, cpu)
	if cpu > time.Second { // looking the host over for each lease takes several times that
		t.Errorf("GC of %d leases took %v of CPU", stale, cpu)
	}
	if s := n.Holds(); len(s.Leases) != 1 || s.Leases[0] != addr.String() {
		t.Errorf("after GC, %d leases are held", len(s.Leases))
	}
	if _, err := plain.Try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
		t.Errorf("the container that stands is not reached: %v", err)
	}
	n.Del(l, &libcni.RuntimeConf{ContainerID: "alive", NetNS: "/run/netns/alive", IfName: "eth0"})
	n.Bare()
	test.NothingDropped(t, vnet, addr)
}

// A GC leaves an interface alone that an ADD is at work on: the runtime that asks knows of none that is not done.
func TestGCLeavesARunningADDAlone(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
	n, plain := test.OnNode(vms[0]), test.OnHost(vms[1])
	l := n.List("1.1.0", "azure", test.Azure())
	n.Add(l, n.Pod("first")) // so that all else stands
	n.Netns("slow")
	cmd := n.Command(t.Context(), filepath.Join(n.Dir, "azure-vnet"))
	cmd.Env, cmd.Stdin = n.Environ("ADD", "slow", "/run/netns/slow"), strings.NewReader(string(test.Stdin("1.1.0", "azure", test.Azure(), nil)))
	unlock := holdLock(n, "/run/azure-vnet/bridge.lock") // at which the ADD waits, with its lease
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	test.Eventually(t, "the ADD has its lease", 10*time.Second, func() bool { return len(n.Holds().Leases) == 2 })
	gc := make(chan error, 1)
	go func() {
		valid := []map[string]string{{"containerID": "first", "ifname": "eth0"}}
		_, err := n.Call("GC", "", "", test.Stdin("1.1.0", "azure", test.Azure(), map[string]any{"cni.dev/valid-attachments": valid}))
		gc <- err
	}()
	if err := <-gc; err != nil {
		t.Error(err)
	}
	unlock()
	if err := cmd.Wait(); err != nil {
		t.Errorf("ADD: %v", err)
	}
	s := n.Holds()
	if len(s.Leases) != 2 || len(s.Attachments) != 2 {
		t.Errorf("%+v is held", s)
	}
	for _, addr := range s.Leases {
		if _, err := plain.Try("ping", "-c", "1", "-W", "3", addr); err != nil {
			t.Errorf("%s is not reached: %v", addr, err)
		}
	}
	for _, id := range []string{"first", "slow"} {
		n.Del(l, &libcni.RuntimeConf{ContainerID: id, NetNS: "/run/netns/" + id, IfName: "eth0"})
	}
	n.Bare()
	test.NothingDropped(t, vnet)
}

// holdLock has a process of its own hold a lock file until unlock.
func holdLock(n test.Node, path string) (unlock func()) {
	n.T.Helper()
	cmd := n.Command(context.Background(), "flock", path, "sh", "-c", "echo held; exec sleep 60")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err == nil {
		_, err = out.Read(make([]byte, 5))
	}
	if err != nil {
		n.T.Fatal(err)
	}
	return func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
	}
}
