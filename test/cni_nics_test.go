// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"azurevnet/internal/vnetsim"
)

// asSeen is the address by which the host of the internet sees a place; "" if
// nothing comes back.
func asSeen(from place) string {
	got, _ := from.try("timeout", "2", "busybox", "wget", "-q", "-O", "-", "http://"+vnetsim.InternetAddr.String()+"/")
	return got
}

func TestPodsUseTheNICTheyAreOf(t *testing.T) {
	t.Parallel()
	second := netip.MustParsePrefix("10.241.0.0/16")
	vnet, vms := newVNet(t,
		vnetsim.VMConfig{Secondaries: 4, NICs: []vnetsim.NICConfig{{Subnet: second, Secondaries: 4}}},
		vnetsim.VMConfig{}, vnetsim.VMConfig{NICs: []vnetsim.NICConfig{{Subnet: second}}})
	n, plain, other := onNode(vms[0]), onHost(vms[1]), onHost(vms[2])
	other.addr = other.on.NICs()[1].Primary
	plain.on.serve()
	other.on.serve()
	eth1 := n.NICs()[1]

	first := n.list("1.1.0", "azure", azure())
	addr, _ := n.add(first, n.pod("p1"))
	n.serve("p1")
	p1 := inPod(n, "p1", addr)
	t.Run("the second NIC has no bridge yet", func(t *testing.T) {
		seen(t, p1, other.addr, p1.addr)
		seen(t, p1, plain.addr, p1.addr)
		if got := asSeen(p1); got != n.Public.String() {
			t.Errorf("the internet sees %q, want %s", got, n.Public)
		}
	})
	l2 := n.list("1.1.0", "second", azure(`"master":"eth1"`))
	addr, _ = n.add(l2, n.pod("p2"))
	n.serve("p2")
	p2 := inPod(n, "p2", addr)
	l3 := n.list("1.1.0", "third", azure(`"master":"eth1"`, `"mode":"transparent"`))
	addr, _ = n.add(l3, n.pod("p3"))
	n.serve("p3")
	p3 := inPod(n, "p3", addr)
	t.Run("both have one", func(t *testing.T) {
		for _, pod := range []place{p2, p3} {
			if !second.Contains(pod.addr) {
				t.Errorf("%s has %s", pod.name, pod.addr)
			}
			seen(t, pod, other.addr, pod.addr)
			seen(t, other, pod.addr, other.addr)
			seen(t, p1, pod.addr, p1.addr)
			seen(t, pod, p1.addr, pod.addr)
			seen(t, pod, plain.addr, pod.addr)
			if got := asSeen(pod); got != eth1.Primary.String() {
				t.Errorf("the internet sees %s as %q, want %s", pod.name, got, eth1.Primary)
			}
			probed(t, vnet, pod.addr)
		}
		seen(t, p2, p3.addr, p2.addr)
		seen(t, p3, p2.addr, p3.addr)
		probed(t, vnet, p1.addr)
	})
	clean(t, vnet, p1.addr, p2.addr, p3.addr)
	t.Run("a bridge that is another NIC's is a wrong configuration", func(t *testing.T) {
		n := n.in(t)
		rt := n.pod("p4")
		for _, c := range []struct{ master, bridge string }{{"eth1", "azure0"}, {"eth0", "azure7"}} {
			l := n.list("1.1.0", "third", azure(fmt.Sprintf(`"master":%q,"bridge":%q`, c.master, c.bridge)))
			if _, _, err := n.tryAdd(l, rt); !says(err, 7, c.bridge) {
				t.Errorf("%s as the bridge of %s: %v", c.bridge, c.master, err)
			}
		}
	})
	n.del(first, &libcni.RuntimeConf{ContainerID: "p1", IfName: "eth0"})
	n.del(l2, &libcni.RuntimeConf{ContainerID: "p2", IfName: "eth0"})
	n.del(l3, &libcni.RuntimeConf{ContainerID: "p3", IfName: "eth0"})
	n.bare()
}

// A pod that a runtime gives two interfaces is reached at both, CHECK finds nothing wrong, and each DEL takes one away.
func TestAPodWithTwoInterfaces(t *testing.T) {
	t.Parallel()
	second := netip.MustParsePrefix("10.241.0.0/16")
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 8, NICs: []vnetsim.NICConfig{{Subnet: second, Secondaries: 4}}}, vnetsim.VMConfig{}, vnetsim.VMConfig{Subnet: second})
	n := onNode(vms[0])
	var used []netip.Addr
	for _, mode := range []string{"bridge", "transparent"} {
		for name, more := range map[string]string{"one NIC": `"mtu":1400`, "two NICs": `"master":"eth1"`} {
			t.Run(name+", mode "+mode, func(t *testing.T) {
				n := n.in(t)
				lists := []*libcni.NetworkConfigList{n.list("1.1.0", "first", azure(`"mode":"`+mode+`"`)), n.list("1.1.0", "second", azure(`"mode":"`+mode+`"`, more))}
				rt := n.pod("both")
				var pods []place
				for i, l := range lists {
					rt.IfName = fmt.Sprintf("eth%d", i)
					addr, _ := n.add(l, rt)
					pods = append(pods, inPod(n, "both", addr))
				}
				n.serve("both")
				reached := func(pods ...place) {
					t.Helper()
					for _, pod := range pods {
						for _, from := range []place{onHost(vms[0]), onHost(vms[1]), onHost(vms[2])} {
							if _, err := from.try(fetch(fmt.Sprintf("http://%s/cgi-bin/who", pod.addr))...); err != nil {
								t.Errorf("%s does not reach %s: %v", from.name, pod.addr, err)
							}
						}
						used = append(used, pod.addr)
					}
				}
				reached(pods...)
				for i, l := range lists {
					rt.IfName = fmt.Sprintf("eth%d", i)
					if err := n.cni.CheckNetworkList(t.Context(), l, rt); err != nil {
						t.Errorf("CHECK of %s: %v", rt.IfName, err)
					}
				}
				rt.IfName = "eth0"
				n.del(lists[0], rt)
				reached(pods[1])
				rt.IfName = "eth1"
				if err := n.cni.CheckNetworkList(t.Context(), lists[1], rt); err != nil {
					t.Errorf("CHECK without the first: %v", err)
				}
				n.del(lists[1], rt)
				n.bare()
				n.must("sh", "-c", "ip netns pids both | xargs -r kill; ip netns del both")
			})
		}
	}
	clean(t, vnet, used...)
}

func TestSNATAndDirectOfPods(t *testing.T) {
	t.Parallel()
	_, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	n, plain := onNode(vms[0]), onHost(vms[1])
	plain.on.serve()
	for i, c := range []struct {
		name, keys   string
		there, world func(pod netip.Addr) string // as whom it is seen; "": an answer never comes
	}{
		{"as it is by default", "", netip.Addr.String, func(netip.Addr) string { return n.Public.String() }},
		{"snat off", `"snat":"off"`, netip.Addr.String, func(netip.Addr) string { return "" }}, // Azure drops a secondary's
		{"direct to one address", fmt.Sprintf(`"direct":"%s/32"`, plain.addr), netip.Addr.String, func(netip.Addr) string { return n.Public.String() }},
		{"direct to none of these", `"direct":["192.0.2.0/24"]`, func(netip.Addr) string { return n.Primary.String() }, func(netip.Addr) string { return n.Public.String() }},
		{"direct to the internet", fmt.Sprintf(`"direct":["%s/32","10.0.0.0/8"]`, vnetsim.InternetAddr), netip.Addr.String, func(netip.Addr) string { return "" }},
	} {
		for _, mode := range []string{"bridge", "transparent"} {
			t.Run(c.name+", mode "+mode, func(t *testing.T) {
				n := n.in(t)
				keys := []string{`"mode":"` + mode + `"`}
				if c.keys != "" {
					keys = append(keys, c.keys)
				}
				l, rt := n.list("1.1.0", fmt.Sprintf("net%d", i), azure(keys...)), n.pod(fmt.Sprint(mode, i))
				addr, _ := n.add(l, rt)
				pod := inPod(n, rt.ContainerID, addr)
				if got, err := pod.try(fetch(fmt.Sprintf("http://%s/cgi-bin/who", plain.addr))...); got != c.there(addr) {
					t.Errorf("a VM sees %q, want %s: %v", got, c.there(addr), err)
				}
				if got := asSeen(pod); got != c.world(addr) {
					t.Errorf("the internet sees %q, want %q", got, c.world(addr))
				}
				n.del(l, rt)
			})
		}
	}
	n.bare() // and the fabric is not clean: it drops what a secondary address sends to the internet
}
