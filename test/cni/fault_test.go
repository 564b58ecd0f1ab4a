// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// asking is a configuration under which each ADD asks the source anew.
const asking = `{"type":"azure-vnet","ipam":{"type":"azure-vnet-ipam","queryInterval":"1"}}`

// Whatever becomes of the sources, ADD takes 10 s at most: what is known is lent
// on, and where nothing is the error says what came instead.
func TestADDWhateverTheSourcesDo(t *testing.T) {
	t.Parallel() // it mostly waits
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 4})
	n := test.OnNode(vms[0])
	l := n.List("1.1.0", "azure", asking)
	keeper := n.Pod("keeper") // in use all the while
	kept, _ := n.Add(l, keeper)
	rt := n.Pod("pod")
	fault := func(t *testing.T, f vnetsim.Fault) {
		t.Helper()
		for _, s := range []vnetsim.Source{vnetsim.HostAgent, vnetsim.IMDS} {
			if err := vms[0].SetFault(s, f); err != nil {
				t.Fatal(err)
			}
		}
	}
	failures := map[vnetsim.Fault]string{ // of what is no failure, nothing
		vnetsim.BlackHole: "no answer", vnetsim.Refused: "refused", vnetsim.Status500: "500", vnetsim.Status401: "Metadata Security Protocol",
		vnetsim.Throttled: "429", vnetsim.HTML: "HTML", vnetsim.Truncated: "ends too early", vnetsim.Huge: "longer than", vnetsim.Empty: "lists no NIC",
	}
	for _, f := range vnetsim.Faults {
		t.Run(string(f), func(t *testing.T) {
			n := n.In(t)
			timed := func() (netip.Addr, error) {
				t.Helper()
				start := time.Now()
				addr, _, err := n.TryAdd(l, rt)
				if took := time.Since(start); took > 10*time.Second {
					t.Errorf("ADD took %v", took)
				}
				return addr, err
			}
			n.Must("sed", "-i", `s/"at":-\?[0-9]*/"at":-60000000000/g;s/"failedAt":-\?[0-9]*/"failedAt":-60000000000/g`, "/run/azure-vnet/leases.json") // older than the interval
			fault(t, f)
			addr, err := timed()
			if err != nil || addr == kept {
				t.Errorf("with addresses known: %s %v", addr, err)
			}
			n.Del(l, rt)
			n.Must("rm", "-rf", "/run/azure-vnet")
			addr, err = timed()
			if told, fails := failures[f]; fails && !test.Says(err, 11, told) || !fails && (err != nil || addr == kept) {
				t.Errorf("with none known: %s %v", addr, err)
			}
			n.Del(l, rt)
			fault(t, vnetsim.Healthy)
			test.Eventually(t, "all is well again", 10*time.Second, func() bool {
				_, _, err := n.TryAdd(l, rt)
				return err == nil
			})
			n.Del(l, rt)
		})
	}
	n.Del(l, keeper)
	n.Bare()
	test.NothingDropped(t, vnet)
}

func TestAddressesThatComeAndGo(t *testing.T) {
	t.Parallel() // it mostly waits
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2})
	n := test.OnNode(vms[0])
	l := n.List("1.1.0", "azure", asking)
	own := n.Secondaries()
	a, b := own[0], own[1]
	set := func(t *testing.T, addrs ...netip.Addr) {
		t.Helper()
		if err := vms[0].SetSecondaries(addrs); err != nil {
			t.Fatal(err)
		}
	}
	one, two := n.Pod("one"), n.Pod("two")

	t.Run("one that is withdrawn in use ends with its pod, and may come back", func(t *testing.T) {
		n := n.In(t)
		if got, _ := n.Add(l, one); got != a {
			t.Fatalf("one has %s, not %s", got, a)
		}
		set(t, b)
		test.Eventually(t, "it is known to be gone", 10*time.Second, func() bool {
			got, _, err := n.TryAdd(l, two)
			if err == nil && got != b {
				t.Errorf("two has %s, not %s", got, b)
			}
			n.Del(l, two)
			return !strings.Contains(n.Must("cat", "/run/azure-vnet/leases.json"), `"`+a.String()+`",`) // as it is listed, and not as it is held
		})
		if s := n.Holds(); !slices.Equal(s.Leases, []string{a.String()}) {
			t.Errorf("of a withdrawn address in use, %+v is held", s)
		}
		n.Del(l, one)
		n.Add(l, two)
		if got, _, err := n.TryAdd(l, one); !test.Says(err, 11, "2 ipconfigs: 1 the NIC's own, 1 held") {
			t.Errorf("with the other in use: %s %v", got, err)
		}
		set(t, a, b)
		test.Eventually(t, "it is back", 10*time.Second, func() bool {
			got, _, err := n.TryAdd(l, one)
			return err == nil && got == a
		})
		n.Del(l, one)
		n.Del(l, two)
	})
	t.Run("one that another interface of the host has is not lent", func(t *testing.T) {
		n := n.In(t)
		n.Must("sh", "-c", "ip link add name mine type bridge && ip addr add "+a.String()+"/32 dev mine && ip link set mine up")
		if got, _ := n.Add(l, one); got != b {
			t.Errorf("one has %s, not %s", got, b)
		}
		if _, _, err := n.TryAdd(l, two); !test.Says(err, 11, a.String()) || !test.Says(err, 11, "interface mine") {
			t.Errorf("with no other left: %v", err)
		}
		n.Must("ip", "link", "del", "mine")
		if got, _ := n.Add(l, two); got != a {
			t.Errorf("two has %s, not %s", got, a)
		}
		n.Del(l, one)
		n.Del(l, two)
	})
	t.Run("one that cools is lent when no other is left, with a warning", func(t *testing.T) {
		n := n.In(t)
		n.Add(l, one)
		n.Del(l, one)
		n.Add(l, one)
		n.Add(l, two)
		log := n.Must("tail", "-n", "1", "/var/log/azure-vnet.log")
		if !strings.Contains(log, "level=WARN") || !strings.Contains(log, "was released a moment ago") || !strings.Contains(log, "container=two") {
			t.Errorf("the log says %s", log)
		}
		n.Del(l, one)
		n.Del(l, two)
	})
	n.Bare()
}

// A file that cannot be read is kept aside, what links show is known again, and
// running pods feel nothing of it.
func TestADDWhateverBecameOfItsState(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	n, plain := test.OnNode(vms[0]), test.OnHost(vms[1])
	l := n.List("1.1.0", "azure", test.Azure())
	keeper, more := n.Pod("keeper"), n.Pod("more")
	kept, _ := n.Add(l, keeper)
	alive := func(t *testing.T) {
		t.Helper()
		if _, err := plain.Try("ping", "-c", "1", "-W", "3", kept.String()); err != nil {
			t.Errorf("the running pod is not reached: %v", err)
		}
	}
	const path = "/run/azure-vnet/leases.json"
	for _, bad := range []struct{ name, do string }{
		{"empty", ": >$0"},
		{"truncated", "truncate -s -20 $0"},
		{"full of NULs", "head -c 500 /dev/zero >$0"},
		{"not JSON", "echo '<leases/>' >$0"},
		{"a list", "echo '[]' >$0"},
		{"of a version to come", `sed -i 's/"version":1/"version":99/' $0`},
		{"a lease of 2^63", `sed -i 's/"since":-\?[0-9]*/"since":9223372036854775808/' $0`},
		{"a lease of centuries ahead", `sed -i 's/"since":-\?[0-9]*/"since":9223372036854775807/' $0`},
		{"a lease of IPv6", `sed -i 's/"leases":{/"leases":{"fd00::5":{"owner":"o","mac":"","prefix":"fd00::\/64","since":1},/' $0`},
		{"a lease of nobody", `sed -i 's/"leases":{/"leases":{"10.240.0.9":null,/' $0`},
		{"leases of the wrong kind", `sed -i 's/"leases":{/"leases":7,"x":{/' $0`},
	} {
		t.Run(bad.name, func(t *testing.T) {
			n := n.In(t)
			n.Must("sh", "-c", bad.do, path)
			broken := n.Must("md5sum", path)
			if addr, _ := n.Add(l, more); addr == kept {
				t.Errorf("%s is lent twice", addr)
			}
			if aside := n.Must("sh", "-c", "md5sum "+path+".bad-*"); strings.Fields(aside)[0] != strings.Fields(broken)[0] {
				t.Errorf("kept aside is %s, and not %s", aside, broken)
			}
			if s := n.Holds(); len(s.Leases) != 2 || len(s.Attachments) != 2 {
				t.Errorf("%+v is held", s)
			}
			if _, _, err := n.TryAdd(l, keeper); !test.Says(err, 100, kept.String()) {
				t.Errorf("a repeated ADD is not noticed: %v", err)
			}
			if err := n.CNI.CheckNetworkList(t.Context(), l, keeper); err != nil {
				t.Errorf("CHECK: %v", err)
			}
			alive(t)
			n.Del(l, more)
		})
	}
	t.Run("unwritable", func(t *testing.T) {
		n := n.In(t)
		doomed := n.Pod("doomed")
		n.Add(l, doomed)
		n.Must("sh", "-c", "mount --bind /run/azure-vnet /run/azure-vnet && mount -o remount,ro,bind /run/azure-vnet")
		if _, _, err := n.TryAdd(l, more); !test.Says(err, 5, "/run/azure-vnet") {
			t.Errorf("ADD: %v", err)
		}
		if err := n.CNI.DelNetworkList(t.Context(), l, doomed); !test.Says(err, 5, "/run/azure-vnet") || strings.Contains(err.Error(), "not found") {
			t.Errorf("DEL: %v", err)
		}
		alive(t)
		n.Must("umount", "/run/azure-vnet")
		n.Del(l, doomed)
		if s := n.Holds(); len(s.Leases) != 1 || len(s.Attachments) != 1 {
			t.Errorf("%+v is held", s)
		}
	})
	t.Run("locked by a process that dies", func(t *testing.T) {
		n := n.In(t)
		holder := n.Command(t.Context(), "flock", path+".lock", "sh", "-c", "echo held; sleep 60")
		out, err := holder.StdoutPipe()
		if err == nil {
			err = holder.Start()
		}
		if err == nil {
			_, err = out.Read(make([]byte, 1))
		}
		if err != nil {
			t.Fatal(err)
		}
		added := make(chan error, 1)
		go func() {
			_, _, err := n.TryAdd(l, more)
			added <- err
		}()
		select {
		case err := <-added:
			t.Errorf("ADD does not wait: %v", err)
		case <-time.After(500 * time.Millisecond):
			_ = syscall.Kill(-holder.Process.Pid, syscall.SIGKILL)
			if err := <-added; err != nil {
				t.Errorf("the lock outlives its holder: %v", err)
			}
		}
		_ = holder.Wait()
		n.Del(l, more)
	})
	t.Run("the disk is full", func(t *testing.T) {
		n := n.In(t)
		n.Must("sh", "-c", `mkdir /run/full && mount -t tmpfs -o size=32k full /run/full && cp -a /run/azure-vnet/. /run/full/ && mount --bind /run/full /run/azure-vnet && cat /dev/zero >/run/azure-vnet/fill 2>/dev/null; true`)
		if _, _, err := n.TryAdd(l, more); !test.Says(err, 5, "no space left") {
			t.Errorf("ADD: %v", err)
		}
		alive(t)
		n.Must("sh", "-c", "umount /run/azure-vnet && umount /run/full")
		n.Add(l, more)
		n.Del(l, more)
	})
	n.Del(l, &libcni.RuntimeConf{ContainerID: "keeper", IfName: "eth0"})
	n.Bare()
	test.NothingDropped(t, vnet, kept)
}
