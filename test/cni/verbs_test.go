// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

func TestAPodIsAFirstClassCitizen(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 8}, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	one, two, plain := test.OnNode(vms[0]), test.OnNode(vms[1]), vms[2]
	var used []netip.Addr

	t.Run("in every version of the specification", func(t *testing.T) {
		n := one.In(t)
		for _, v := range []string{"0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
			for mode, links := range map[string]int{"bridge": 3, "transparent": 2} {
				l, rt := n.List(v, mode, test.Azure(`"mode":"`+mode+`"`)), n.Pod(mode+v)
				addr, r := n.Add(l, rt)
				used = append(used, addr)
				if _, err := test.OnHost(plain).Try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
					t.Errorf("%s, %s: not reached: %v", v, mode, err)
				}
				if v >= "0.3.0" {
					if len(r.Interfaces) != links || links == 3 && r.Interfaces[0].Name != "azure0" || r.Interfaces[links-1].Sandbox != rt.NetNS || *r.IPs[0].Interface != links-1 {
						t.Errorf("%s, %s: the result is %+v", v, mode, r)
					}
				}
				if err := n.CNI.CheckNetworkList(t.Context(), l, rt); v >= "0.4.0" && err != nil {
					t.Errorf("%s, %s: CHECK: %v", v, mode, err)
				}
				if err := n.CNI.GetStatusNetworkList(t.Context(), l); err != nil {
					t.Errorf("%s, %s: STATUS: %v", v, mode, err)
				}
				n.Del(l, rt)
				n.Del(l, rt)
				n.Bare()
			}
		}
	})

	l := one.List("1.1.0", "azure", test.Azure())
	var pods []test.Place
	alone := one.List("1.1.0", "alone", test.Azure(`"mode":"transparent"`))
	for _, p := range []struct {
		n  test.Node
		l  *libcni.NetworkConfigList
		id string
	}{{one, l, "p1"}, {one, l, "p2"}, {two, l, "p3"}, {one, alone, "p4"}} {
		addr, _ := p.n.Add(p.l, p.n.Pod(p.id))
		used = append(used, addr)
		p.n.Serve(p.id)
		pods = append(pods, test.InPod(p.n, p.id, addr))
	}
	t.Run("everyone reaches every pod, and is seen with their own address", func(t *testing.T) {
		for _, from := range append([]test.Place{test.OnHost(vms[0]), test.OnHost(vms[1]), test.OnHost(plain)}, pods...) {
			for _, to := range pods {
				got, err := from.Try(test.Fetch(fmt.Sprintf("http://%s/cgi-bin/who", to.Addr))...)
				if err != nil || got != from.Addr.String() {
					t.Errorf("%s fetches from %s and is seen as %q, want %s: %v", from.Name, to.Name, got, from.Addr, err)
				}
			}
		}
	})
	t.Run("the internet sees the node, once, whatever else masquerades", func(t *testing.T) {
		url := "http://" + vnetsim.InternetAddr.String() + "/"
		try := func() {
			t.Helper()
			for _, pod := range []test.Place{pods[0], pods[3]} {
				if got, err := pod.Try(test.Fetch(url)...); err != nil || got != one.Public.String() {
					t.Errorf("the internet sees %s as %q, want %s: %v", pod.Name, got, one.Public, err)
				}
			}
		}
		try()
		documented := []string{"-t", "nat", "-A", "POSTROUTING", "-m", "iprange", "!", "--dst-range", "168.63.129.16", "-m", "addrtype", "!", "--dst-type", "local", "!", "-d", "10.0.0.0/8", "-j", "MASQUERADE"}
		one.In(t).Must("iptables", documented...)
		try()
		documented[2] = "-D"
		one.In(t).Must("iptables", documented...)
		agent := `iptables -t nat -N IP-MASQ-AGENT && iptables -t nat -A IP-MASQ-AGENT -d 10.0.0.0/8 -j RETURN &&
			iptables -t nat -A IP-MASQ-AGENT -j MASQUERADE && iptables -t nat -I POSTROUTING -m addrtype ! --dst-type LOCAL -j IP-MASQ-AGENT`
		one.In(t).Must("sh", "-c", agent)
		try()
		if got, err := pods[0].Try(test.Fetch(fmt.Sprintf("http://%s/cgi-bin/who", pods[2].Addr))...); err != nil || got != pods[0].Addr.String() {
			t.Errorf("another node's pod sees %q, want %s: %v", got, pods[0].Addr, err)
		}
	})
	t.Run("a service's address leads to its pods, wherever they are", func(t *testing.T) {
		for i, to := range pods {
			service := fmt.Sprintf("10.96.0.%d", 10+i)
			for _, n := range []test.Node{one.In(t), two.In(t)} {
				n.Must("sh", "-c", fmt.Sprintf(`for c in PREROUTING OUTPUT; do iptables -t nat -A $c -d %s -p tcp --dport 80 -j DNAT --to %s:80; done
					iptables -t nat -A POSTROUTING -s %[2]s -d %[2]s -j MASQUERADE`, service, to.Addr))
			}
			for _, from := range append([]test.Place{test.OnHost(vms[0])}, pods...) {
				want := from.Addr.String()
				if from.Addr == to.Addr {
					want = one.Primary.String() // through the hairpin, masqueraded
					if from.Name == "p3" {
						want = two.Primary.String()
					}
				}
				got, err := from.Try(test.Fetch("http://" + service + "/cgi-bin/who")...)
				if err != nil || got != want {
					t.Errorf("%s fetches from the service of %s and is seen as %q, want %s: %v", from.Name, to.Name, got, want, err)
				}
			}
		}
	})
	t.Run("an address and a MAC are had as asked for", func(t *testing.T) {
		n := two.In(t)
		want := n.Secondaries()[3]
		l := n.List("1.1.0", "azure", test.Azure(`"capabilities":{"ips":true,"mac":true,"dns":true}`))
		rt := n.Pod("asked")
		rt.CapabilityArgs = map[string]any{"ips": []string{want.String() + "/16"}, "mac": "02:aa:bb:cc:dd:ee", "dns": map[string]any{"servers": []string{"10.0.0.10"}, "searches": []string{"svc.cluster.local"}}}
		addr, r := n.Add(l, rt)
		got := []any{addr, r.Interfaces[2].Mac, r.DNS}
		if diff := cmp.Diff([]any{want, "02:aa:bb:cc:dd:ee", types.DNS{Nameservers: []string{"10.0.0.10"}, Search: []string{"svc.cluster.local"}}}, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Error(diff)
		}
		if _, err := test.OnHost(plain).Try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
			t.Errorf("not reached: %v", err)
		}
		n.Del(l, rt)
		rt.CapabilityArgs = nil
		rt.Args = [][2]string{{"IgnoreUnknown", "1"}, {"IP", want.String()}, {"MAC", "02:aa:bb:cc:dd:ef"}} // as podman sends them
		if addr, r := n.Add(l, rt); addr != want || r.Interfaces[2].Mac != "02:aa:bb:cc:dd:ef" {
			t.Errorf("CNI_ARGS: %s and %s are had", addr, r.Interfaces[2].Mac)
		}
		n.Del(l, rt)
	})
	t.Run("a repeated ADD is an error and hurts nobody", func(t *testing.T) {
		n := one.In(t)
		before := n.Holds()
		_, _, err := n.TryAdd(l, &libcni.RuntimeConf{ContainerID: "p1", NetNS: "/run/netns/p1", IfName: "eth0"})
		var told *types.Error
		if !errors.As(err, &told) || told.Code != 100 || !strings.Contains(told.Msg, pods[0].Addr.String()) {
			t.Errorf("the error is %v", err)
		}
		if diff := cmp.Diff(before, n.Holds()); diff != "" {
			t.Error(diff)
		}
		if _, err := test.OnHost(plain).Try("ping", "-c", "1", "-W", "3", pods[0].Addr.String()); err != nil {
			t.Errorf("p1 is not reached any more: %v", err)
		}
	})
	t.Run("CHECK notices what is missing", func(t *testing.T) {
		n := one.In(t)
		rt := n.Pod("checked")
		addr, r := n.Add(l, rt)
		check := func() error { return n.CNI.CheckNetworkList(t.Context(), l, rt) }
		table := n.Must("nft", "list", "table", "bridge", "azure_vnet")
		n.Must("sh", "-c", "ip -n checked route save >/run/routes")
		restore := "ip -n checked route restore </run/routes 2>/dev/null || true" // some are there still
		for _, damage := range []struct{ says, do, undo string }{
			{"lacks the address", "ip -n checked addr del " + addr.String() + "/16 dev eth0", "ip -n checked addr add " + addr.String() + "/16 dev eth0 noprefixroute; " + restore},
			{"lacks the route", "ip -n checked route del default", restore},
			{"is down", "ip -n checked link set eth0 down", "ip -n checked link set eth0 up; " + restore},
			{"has the MAC", "ip -n checked link set eth0 address 02:00:00:00:00:09", "ip -n checked link set eth0 address " + r.Interfaces[2].Mac},
			{"not in azure0", "ip link set " + r.Interfaces[1].Name + " nomaster", filepath.Join(n.Dir, "azure-vnet") + " reconcile"},
		} {
			n.Must("sh", "-c", damage.do)
			if err := check(); err == nil || !strings.Contains(err.Error(), damage.says) {
				t.Errorf("%s: CHECK says %v", damage.do, err)
			}
			n.Must("sh", "-c", damage.undo)
			if err := check(); err != nil {
				t.Errorf("%s: CHECK says %v", damage.undo, err)
			}
		}
		if now := n.Must("nft", "list", "table", "bridge", "azure_vnet"); now != table {
			t.Errorf("CHECK or the damage changed the table:\n%s", cmp.Diff(table, now))
		}
		n.Must("nft", fmt.Sprintf("delete element bridge azure_vnet own { %s . %s . %s . %s }", r.Interfaces[1].Name, r.Interfaces[2].Mac, r.Interfaces[0].Mac, addr))
		if err := check(); err == nil || !strings.Contains(err.Error(), "azure_vnet") {
			t.Errorf("without an element of the table CHECK says %v", err)
		}
		n.Del(l, rt)
	})
	t.Run("GC releases what is not listed, of its own network", func(t *testing.T) {
		n := one.In(t)
		other := n.List("1.1.0", "other", test.Azure())
		kept, _ := n.Add(other, n.Pod("o1"))
		stale, _ := n.Add(l, n.Pod("stale"))
		conf := func(more map[string]any) []byte { return test.Stdin("1.1.0", "azure", test.Azure(), more) }
		if _, err := n.Call("GC", "", "", conf(nil)); err == nil || !strings.Contains(err.Error(), "valid-attachments is missing") {
			t.Errorf("without a list: %v", err)
		}
		valid := []map[string]string{{"containerID": "p1", "ifname": "eth0"}, {"containerID": "p2", "ifname": "eth0"}}
		if _, err := n.Call("GC", "", "", conf(map[string]any{"cni.dev/valid-attachments": valid})); err != nil {
			t.Error(err)
		}
		for _, alive := range []netip.Addr{pods[0].Addr, pods[1].Addr, kept} {
			if _, err := test.OnHost(plain).Try("ping", "-c", "1", "-W", "3", alive.String()); err != nil {
				t.Errorf("GC took %s: %v", alive, err)
			}
		}
		if s := n.Holds(); len(s.Leases) != 4 { // p4 is of another network too
			t.Errorf("after GC of %s, %+v is held", stale, s)
		}
		if _, err := n.Call("GC", "", "", conf(map[string]any{"cni.dev/valid-attachments": nil, "cni.dev/attachments": nil})); err != nil {
			t.Error(err)
		}
		if s := n.Holds(); len(s.Leases) != 2 {
			t.Errorf("a runtime without containers sends null, and %+v is held", s)
		}
		n.Del(other, &libcni.RuntimeConf{ContainerID: "o1", IfName: "eth0"})
		n.Del(alone, &libcni.RuntimeConf{ContainerID: "p4", IfName: "eth0"})
		n.Bare()
	})
	test.NothingDropped(t, vnet, used...)
}
