// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"

	"azurevnet/internal/vnetsim"
)

// asking is a configuration under which each ADD asks the source anew.
const asking = `{"type":"azure-vnet","ipam":{"type":"azure-vnet-ipam","queryInterval":"1"}}`

// Whatever becomes of the sources, ADD takes 10 s at most: what is known is lent
// on, and where nothing is the error says what came instead.
func TestADDWhateverTheSourcesDo(t *testing.T) {
	t.Parallel() // it mostly waits
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 4})
	n := onNode(vms[0])
	l := n.list("1.1.0", "azure", asking)
	keeper := n.pod("keeper") // in use all the while
	kept, _ := n.add(l, keeper)
	rt := n.pod("pod")
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
			n := n.in(t)
			timed := func() (netip.Addr, error) {
				t.Helper()
				start := time.Now()
				addr, _, err := n.tryAdd(l, rt)
				if took := time.Since(start); took > 10*time.Second {
					t.Errorf("ADD took %v", took)
				}
				return addr, err
			}
			n.must("sed", "-i", `s/"at":-\?[0-9]*/"at":-60000000000/g;s/"failedAt":-\?[0-9]*/"failedAt":-60000000000/g`, "/run/azure-vnet/leases.json") // older than the interval
			fault(t, f)
			addr, err := timed()
			if err != nil || addr == kept {
				t.Errorf("with addresses known: %s %v", addr, err)
			}
			n.del(l, rt)
			n.must("rm", "-rf", "/run/azure-vnet")
			addr, err = timed()
			if told, fails := failures[f]; fails && !says(err, 11, told) || !fails && (err != nil || addr == kept) {
				t.Errorf("with none known: %s %v", addr, err)
			}
			n.del(l, rt)
			fault(t, vnetsim.Healthy)
			eventually(t, "all is well again", 10*time.Second, func() bool {
				_, _, err := n.tryAdd(l, rt)
				return err == nil
			})
			n.del(l, rt)
		})
	}
	n.del(l, keeper)
	n.bare()
	clean(t, vnet)
}

func TestAddressesThatComeAndGo(t *testing.T) {
	t.Parallel() // it mostly waits
	_, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 2})
	n := onNode(vms[0])
	l := n.list("1.1.0", "azure", asking)
	own := n.Secondaries()
	a, b := own[0], own[1]
	set := func(t *testing.T, addrs ...netip.Addr) {
		t.Helper()
		if err := vms[0].SetSecondaries(addrs); err != nil {
			t.Fatal(err)
		}
	}
	one, two := n.pod("one"), n.pod("two")

	t.Run("one that is withdrawn in use ends with its pod, and may come back", func(t *testing.T) {
		n := n.in(t)
		if got, _ := n.add(l, one); got != a {
			t.Fatalf("one has %s, not %s", got, a)
		}
		set(t, b)
		eventually(t, "it is known to be gone", 10*time.Second, func() bool {
			got, _, err := n.tryAdd(l, two)
			if err == nil && got != b {
				t.Errorf("two has %s, not %s", got, b)
			}
			n.del(l, two)
			return !strings.Contains(n.must("cat", "/run/azure-vnet/leases.json"), `"`+a.String()+`",`) // as it is listed, and not as it is held
		})
		if s := n.holds(); !slices.Equal(s.Leases, []string{a.String()}) {
			t.Errorf("of a withdrawn address in use, %+v is held", s)
		}
		n.del(l, one)
		n.add(l, two)
		if got, _, err := n.tryAdd(l, one); !says(err, 11, "2 ipconfigs: 1 the NIC's own, 1 held") {
			t.Errorf("with the other in use: %s %v", got, err)
		}
		set(t, a, b)
		eventually(t, "it is back", 10*time.Second, func() bool {
			got, _, err := n.tryAdd(l, one)
			return err == nil && got == a
		})
		n.del(l, one)
		n.del(l, two)
	})
	t.Run("one that another interface of the host has is not lent", func(t *testing.T) {
		n := n.in(t)
		n.must("sh", "-c", "ip link add name mine type bridge && ip addr add "+a.String()+"/32 dev mine && ip link set mine up")
		if got, _ := n.add(l, one); got != b {
			t.Errorf("one has %s, not %s", got, b)
		}
		if _, _, err := n.tryAdd(l, two); !says(err, 11, a.String()) || !says(err, 11, "interface mine") {
			t.Errorf("with no other left: %v", err)
		}
		n.must("ip", "link", "del", "mine")
		if got, _ := n.add(l, two); got != a {
			t.Errorf("two has %s, not %s", got, a)
		}
		n.del(l, one)
		n.del(l, two)
	})
	t.Run("one that cools is lent when no other is left, with a warning", func(t *testing.T) {
		n := n.in(t)
		n.add(l, one)
		n.del(l, one)
		n.add(l, one)
		n.add(l, two)
		log := n.must("tail", "-n", "1", "/var/log/azure-vnet.log")
		if !strings.Contains(log, "level=WARN") || !strings.Contains(log, "was released a moment ago") || !strings.Contains(log, "container=two") {
			t.Errorf("the log says %s", log)
		}
		n.del(l, one)
		n.del(l, two)
	})
	n.bare()
}

// A file that cannot be read is kept aside, what links show is known again, and
// running pods feel nothing of it.
func TestADDWhateverBecameOfItsState(t *testing.T) {
	t.Parallel()
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	n, plain := onNode(vms[0]), onHost(vms[1])
	l := n.list("1.1.0", "azure", azure())
	keeper, more := n.pod("keeper"), n.pod("more")
	kept, _ := n.add(l, keeper)
	alive := func(t *testing.T) {
		t.Helper()
		if _, err := plain.try("ping", "-c", "1", "-W", "3", kept.String()); err != nil {
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
			n := n.in(t)
			n.must("sh", "-c", bad.do, path)
			broken := n.must("md5sum", path)
			if addr, _ := n.add(l, more); addr == kept {
				t.Errorf("%s is lent twice", addr)
			}
			if aside := n.must("sh", "-c", "md5sum "+path+".bad-*"); strings.Fields(aside)[0] != strings.Fields(broken)[0] {
				t.Errorf("kept aside is %s, and not %s", aside, broken)
			}
			if s := n.holds(); len(s.Leases) != 2 || len(s.Attachments) != 2 {
				t.Errorf("%+v is held", s)
			}
			if _, _, err := n.tryAdd(l, keeper); !says(err, 100, kept.String()) {
				t.Errorf("a repeated ADD is not noticed: %v", err)
			}
			if err := n.cni.CheckNetworkList(t.Context(), l, keeper); err != nil {
				t.Errorf("CHECK: %v", err)
			}
			alive(t)
			n.del(l, more)
		})
	}
	t.Run("unwritable", func(t *testing.T) {
		n := n.in(t)
		doomed := n.pod("doomed")
		n.add(l, doomed)
		n.must("sh", "-c", "mount --bind /run/azure-vnet /run/azure-vnet && mount -o remount,ro,bind /run/azure-vnet")
		if _, _, err := n.tryAdd(l, more); !says(err, 5, "/run/azure-vnet") {
			t.Errorf("ADD: %v", err)
		}
		if err := n.cni.DelNetworkList(t.Context(), l, doomed); !says(err, 5, "/run/azure-vnet") || strings.Contains(err.Error(), "not found") {
			t.Errorf("DEL: %v", err)
		}
		alive(t)
		n.must("umount", "/run/azure-vnet")
		n.del(l, doomed)
		if s := n.holds(); len(s.Leases) != 1 || len(s.Attachments) != 1 {
			t.Errorf("%+v is held", s)
		}
	})
	t.Run("locked by a process that dies", func(t *testing.T) {
		n := n.in(t)
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
			_, _, err := n.tryAdd(l, more)
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
		n.del(l, more)
	})
	t.Run("the disk is full", func(t *testing.T) {
		n := n.in(t)
		n.must("sh", "-c", `mkdir /run/full && mount -t tmpfs -o size=32k full /run/full && cp -a /run/azure-vnet/. /run/full/ && mount --bind /run/full /run/azure-vnet && cat /dev/zero >/run/azure-vnet/fill 2>/dev/null; true`)
		if _, _, err := n.tryAdd(l, more); !says(err, 5, "no space left") {
			t.Errorf("ADD: %v", err)
		}
		alive(t)
		n.must("sh", "-c", "umount /run/azure-vnet && umount /run/full")
		n.add(l, more)
		n.del(l, more)
	})
	n.del(l, &libcni.RuntimeConf{ContainerID: "keeper", IfName: "eth0"})
	n.bare()
	clean(t, vnet, kept)
}
