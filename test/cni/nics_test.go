// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// asSeen is the address by which the host of the internet sees a place; "" if
// nothing comes back.
func asSeen(from test.Place) string {
	got, _ := from.Try("timeout", "2", "busybox", "wget", "-q", "-O", "-", "http://"+vnetsim.InternetAddr.String()+"/")
	return got
}

func TestPodsUseTheNICTheyAreOf(t *testing.T) {
	t.Parallel()
	second := netip.MustParsePrefix("10.241.0.0/16")
	vnet, vms := test.NewVNet(t,
		vnetsim.VMConfig{Secondaries: 4, NICs: []vnetsim.NICConfig{{Subnet: second, Secondaries: 4}}},
		vnetsim.VMConfig{}, vnetsim.VMConfig{NICs: []vnetsim.NICConfig{{Subnet: second}}})
	n, plain, other := test.OnNode(vms[0]), test.OnHost(vms[1]), test.OnHost(vms[2])
	other.Addr = other.Host.NICs()[1].Primary
	plain.Host.Serve()
	other.Host.Serve()
	eth1 := n.NICs()[1]

	first := n.List("1.1.0", "azure", test.Azure())
	addr, _ := n.Add(first, n.Pod("p1"))
	n.Serve("p1")
	p1 := test.InPod(n, "p1", addr)
	t.Run("the second NIC has no bridge yet", func(t *testing.T) {
		test.Seen(t, p1, other.Addr, p1.Addr)
		test.Seen(t, p1, plain.Addr, p1.Addr)
		if got := asSeen(p1); got != n.Public.String() {
			t.Errorf("the internet sees %q, want %s", got, n.Public)
		}
	})
	l2 := n.List("1.1.0", "second", test.Azure(`"master":"eth1"`))
	addr, _ = n.Add(l2, n.Pod("p2"))
	n.Serve("p2")
	p2 := test.InPod(n, "p2", addr)
	l3 := n.List("1.1.0", "third", test.Azure(`"master":"eth1"`, `"mode":"transparent"`))
	addr, _ = n.Add(l3, n.Pod("p3"))
	n.Serve("p3")
	p3 := test.InPod(n, "p3", addr)
	t.Run("both have one", func(t *testing.T) {
		for _, pod := range []test.Place{p2, p3} {
			if !second.Contains(pod.Addr) {
				t.Errorf("%s has %s", pod.Name, pod.Addr)
			}
			test.Seen(t, pod, other.Addr, pod.Addr)
			test.Seen(t, other, pod.Addr, other.Addr)
			test.Seen(t, p1, pod.Addr, p1.Addr)
			test.Seen(t, pod, p1.Addr, pod.Addr)
			test.Seen(t, pod, plain.Addr, pod.Addr)
			if got := asSeen(pod); got != eth1.Primary.String() {
				t.Errorf("the internet sees %s as %q, want %s", pod.Name, got, eth1.Primary)
			}
			test.Probed(t, vnet, pod.Addr)
		}
		test.Seen(t, p2, p3.Addr, p2.Addr)
		test.Seen(t, p3, p2.Addr, p3.Addr)
		test.Probed(t, vnet, p1.Addr)
	})
	test.NothingDropped(t, vnet, p1.Addr, p2.Addr, p3.Addr)
	t.Run("a bridge that is another NIC's is a wrong configuration", func(t *testing.T) {
		n := n.In(t)
		rt := n.Pod("p4")
		for _, c := range []struct{ master, bridge string }{{"eth1", "azure0"}, {"eth0", "azure7"}} {
			l := n.List("1.1.0", "third", test.Azure(fmt.Sprintf(`"master":%q,"bridge":%q`, c.master, c.bridge)))
			if _, _, err := n.TryAdd(l, rt); !test.Says(err, 7, c.bridge) {
				t.Errorf("%s as the bridge of %s: %v", c.bridge, c.master, err)
			}
		}
	})
	n.Del(first, &libcni.RuntimeConf{ContainerID: "p1", IfName: "eth0"})
	n.Del(l2, &libcni.RuntimeConf{ContainerID: "p2", IfName: "eth0"})
	n.Del(l3, &libcni.RuntimeConf{ContainerID: "p3", IfName: "eth0"})
	n.Bare()
}

// A pod that a runtime gives two interfaces is reached at both, CHECK finds nothing wrong, and each DEL takes one away.
func TestAPodWithTwoInterfaces(t *testing.T) {
	t.Parallel()
	second := netip.MustParsePrefix("10.241.0.0/16")
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 8, NICs: []vnetsim.NICConfig{{Subnet: second, Secondaries: 4}}}, vnetsim.VMConfig{}, vnetsim.VMConfig{Subnet: second})
	n := test.OnNode(vms[0])
	var used []netip.Addr
	for _, mode := range []string{"bridge", "transparent"} {
		for name, more := range map[string][]string{
			"one NIC": {test.Azure(`"mode":"`+mode+`"`, `"mtu":1400`)}, "two NICs": {test.Azure(`"mode":"`+mode+`"`, `"master":"eth1"`)},
			"two NICs, and sbr in the chain": {test.Azure(`"mode":"`+mode+`"`, `"master":"eth1"`), `{"type":"sbr"}`},
		} {
			t.Run(name+", mode "+mode, func(t *testing.T) {
				n := n.In(t)
				lists := []*libcni.NetworkConfigList{n.List("1.1.0", "first", test.Azure(`"mode":"`+mode+`"`)), n.List("1.1.0", "second", more...)}
				rt := n.Pod("both")
				var pods []test.Place
				for i, l := range lists {
					rt.IfName = fmt.Sprintf("eth%d", i)
					addr, _ := n.Add(l, rt)
					pods = append(pods, test.InPod(n, "both", addr))
				}
				n.Serve("both")
				reached := func(pods ...test.Place) {
					t.Helper()
					for _, pod := range pods {
						for _, from := range []test.Place{test.OnHost(vms[0]), test.OnHost(vms[1]), test.OnHost(vms[2])} {
							if _, err := from.Try(test.Fetch(fmt.Sprintf("http://%s/cgi-bin/who", pod.Addr))...); err != nil {
								t.Errorf("%s does not reach %s: %v", from.Name, pod.Addr, err)
							}
						}
						used = append(used, pod.Addr)
					}
				}
				reached(pods...)
				checks := func(ifName string, l *libcni.NetworkConfigList, when, says string) {
					t.Helper()
					rt.IfName = ifName
					if err := n.CNI.CheckNetworkList(t.Context(), l, rt); err != nil != (says != "") || says != "" && !test.Says(err, 102, says) {
						t.Errorf("CHECK of %s, %s, says %v, want %q", ifName, when, err, says)
					}
				}
				checks("eth0", lists[0], "with both", "")
				checks("eth1", lists[1], "with both", "")
				rt.IfName = "eth0"
				n.Del(lists[0], rt)
				reached(pods[1])
				checks("eth1", lists[1], "without the first", "")
				// sbr moves the routes of its interface to a table of its own. A copy in a table of ours is no substitute.
				table := "main"
				if len(more) > 1 {
					table = "100"
				}
				n.Must("ip", "-n", "both", "route", "flush", "exact", "0.0.0.0/0", "dev", "eth1", "table", table)
				checks("eth1", lists[1], "without its default route", "lacks the route to 0.0.0.0/0")
				n.Del(lists[1], rt)
				n.Bare()
				n.Must("sh", "-c", "ip netns pids both | xargs -r kill; ip netns del both")
			})
		}
	}
	test.NothingDropped(t, vnet, used...)
}

func TestSNATAndDirectOfPods(t *testing.T) {
	t.Parallel()
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	n, plain := test.OnNode(vms[0]), test.OnHost(vms[1])
	plain.Host.Serve()
	for i, c := range []struct {
		name, keys   string
		there, world func(pod netip.Addr) string // as whom it is seen; "": an answer never comes
	}{
		{"as it is by default", "", netip.Addr.String, func(netip.Addr) string { return n.Public.String() }},
		{"snat off", `"snat":"off"`, netip.Addr.String, func(netip.Addr) string { return "" }}, // Azure drops a secondary's
		{"direct to one address", fmt.Sprintf(`"direct":"%s/32"`, plain.Addr), netip.Addr.String, func(netip.Addr) string { return n.Public.String() }},
		{"direct to none of these", `"direct":["192.0.2.0/24"]`, func(netip.Addr) string { return n.Primary.String() }, func(netip.Addr) string { return n.Public.String() }},
		{"direct to the internet", fmt.Sprintf(`"direct":["%s/32","10.0.0.0/8"]`, vnetsim.InternetAddr), netip.Addr.String, func(netip.Addr) string { return "" }},
	} {
		for _, mode := range []string{"bridge", "transparent"} {
			t.Run(c.name+", mode "+mode, func(t *testing.T) {
				n := n.In(t)
				keys := []string{`"mode":"` + mode + `"`}
				if c.keys != "" {
					keys = append(keys, c.keys)
				}
				l, rt := n.List("1.1.0", fmt.Sprintf("net%d", i), test.Azure(keys...)), n.Pod(fmt.Sprint(mode, i))
				addr, _ := n.Add(l, rt)
				pod := test.InPod(n, rt.ContainerID, addr)
				if got, err := pod.Try(test.Fetch(fmt.Sprintf("http://%s/cgi-bin/who", plain.Addr))...); got != c.there(addr) {
					t.Errorf("a VM sees %q, want %s: %v", got, c.there(addr), err)
				}
				if got := asSeen(pod); got != c.world(addr) {
					t.Errorf("the internet sees %q, want %q", got, c.world(addr))
				}
				n.Del(l, rt)
			})
		}
	}
	n.Bare() // and the fabric is not clean: it drops what a secondary address sends to the internet
}
