// Copyright (c) The azure-vnet authors. MIT licence.

package test

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
)

func TestAPodIsAFirstClassCitizen(t *testing.T) {
	t.Parallel()
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 8}, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	one, two, plain := onNode(vms[0]), onNode(vms[1]), vms[2]
	var used []netip.Addr

	t.Run("in every version of the specification", func(t *testing.T) {
		n := one.in(t)
		for _, v := range []string{"0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
			for mode, links := range map[string]int{"bridge": 3, "transparent": 2} {
				l, rt := n.list(v, mode, azure(`"mode":"`+mode+`"`)), n.pod(mode+v)
				addr, r := n.add(l, rt)
				used = append(used, addr)
				if _, err := onHost(plain).try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
					t.Errorf("%s, %s: not reached: %v", v, mode, err)
				}
				if v >= "0.3.0" {
					if len(r.Interfaces) != links || links == 3 && r.Interfaces[0].Name != "azure0" || r.Interfaces[links-1].Sandbox != rt.NetNS || *r.IPs[0].Interface != links-1 {
						t.Errorf("%s, %s: the result is %+v", v, mode, r)
					}
				}
				if err := n.cni.CheckNetworkList(t.Context(), l, rt); v >= "0.4.0" && err != nil {
					t.Errorf("%s, %s: CHECK: %v", v, mode, err)
				}
				if err := n.cni.GetStatusNetworkList(t.Context(), l); err != nil {
					t.Errorf("%s, %s: STATUS: %v", v, mode, err)
				}
				n.del(l, rt)
				n.del(l, rt)
				n.bare()
			}
		}
	})

	l := one.list("1.1.0", "azure", azure())
	var pods []place
	alone := one.list("1.1.0", "alone", azure(`"mode":"transparent"`))
	for _, p := range []struct {
		n  node
		l  *libcni.NetworkConfigList
		id string
	}{{one, l, "p1"}, {one, l, "p2"}, {two, l, "p3"}, {one, alone, "p4"}} {
		addr, _ := p.n.add(p.l, p.n.pod(p.id))
		used = append(used, addr)
		p.n.serve(p.id)
		pods = append(pods, inPod(p.n, p.id, addr))
	}
	t.Run("everyone reaches every pod, and is seen with their own address", func(t *testing.T) {
		for _, from := range append([]place{onHost(vms[0]), onHost(vms[1]), onHost(plain)}, pods...) {
			for _, to := range pods {
				got, err := from.try(fetch(fmt.Sprintf("http://%s/cgi-bin/who", to.addr))...)
				if err != nil || got != from.addr.String() {
					t.Errorf("%s fetches from %s and is seen as %q, want %s: %v", from.name, to.name, got, from.addr, err)
				}
			}
		}
	})
	t.Run("the internet sees the node, once, whatever else masquerades", func(t *testing.T) {
		url := "http://" + vnetsim.InternetAddr.String() + "/"
		try := func() {
			t.Helper()
			for _, pod := range []place{pods[0], pods[3]} {
				if got, err := pod.try(fetch(url)...); err != nil || got != one.Public.String() {
					t.Errorf("the internet sees %s as %q, want %s: %v", pod.name, got, one.Public, err)
				}
			}
		}
		try()
		documented := []string{"-t", "nat", "-A", "POSTROUTING", "-m", "iprange", "!", "--dst-range", "168.63.129.16", "-m", "addrtype", "!", "--dst-type", "local", "!", "-d", "10.0.0.0/8", "-j", "MASQUERADE"}
		one.in(t).must("iptables", documented...)
		try()
		documented[2] = "-D"
		one.in(t).must("iptables", documented...)
		agent := `iptables -t nat -N IP-MASQ-AGENT && iptables -t nat -A IP-MASQ-AGENT -d 10.0.0.0/8 -j RETURN &&
			iptables -t nat -A IP-MASQ-AGENT -j MASQUERADE && iptables -t nat -I POSTROUTING -m addrtype ! --dst-type LOCAL -j IP-MASQ-AGENT`
		one.in(t).must("sh", "-c", agent)
		try()
		if got, err := pods[0].try(fetch(fmt.Sprintf("http://%s/cgi-bin/who", pods[2].addr))...); err != nil || got != pods[0].addr.String() {
			t.Errorf("another node's pod sees %q, want %s: %v", got, pods[0].addr, err)
		}
	})
	t.Run("a service's address leads to its pods, wherever they are", func(t *testing.T) {
		for i, to := range pods {
			service := fmt.Sprintf("10.96.0.%d", 10+i)
			for _, n := range []node{one.in(t), two.in(t)} {
				n.must("sh", "-c", fmt.Sprintf(`for c in PREROUTING OUTPUT; do iptables -t nat -A $c -d %s -p tcp --dport 80 -j DNAT --to %s:80; done
					iptables -t nat -A POSTROUTING -s %[2]s -d %[2]s -j MASQUERADE`, service, to.addr))
			}
			for _, from := range append([]place{onHost(vms[0])}, pods...) {
				want := from.addr.String()
				if from.addr == to.addr {
					want = one.Primary.String() // through the hairpin, masqueraded
					if from.name == "p3" {
						want = two.Primary.String()
					}
				}
				got, err := from.try(fetch("http://" + service + "/cgi-bin/who")...)
				if err != nil || got != want {
					t.Errorf("%s fetches from the service of %s and is seen as %q, want %s: %v", from.name, to.name, got, want, err)
				}
			}
		}
	})
	t.Run("an address and a MAC are had as asked for", func(t *testing.T) {
		n := two.in(t)
		want := n.Secondaries()[3]
		l := n.list("1.1.0", "azure", azure(`"capabilities":{"ips":true,"mac":true,"dns":true}`))
		rt := n.pod("asked")
		rt.CapabilityArgs = map[string]any{"ips": []string{want.String() + "/16"}, "mac": "02:aa:bb:cc:dd:ee", "dns": map[string]any{"servers": []string{"10.0.0.10"}, "searches": []string{"svc.cluster.local"}}}
		addr, r := n.add(l, rt)
		got := []any{addr, r.Interfaces[2].Mac, r.DNS}
		if diff := cmp.Diff([]any{want, "02:aa:bb:cc:dd:ee", types.DNS{Nameservers: []string{"10.0.0.10"}, Search: []string{"svc.cluster.local"}}}, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Error(diff)
		}
		if _, err := onHost(plain).try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
			t.Errorf("not reached: %v", err)
		}
		n.del(l, rt)
		rt.CapabilityArgs = nil
		rt.Args = [][2]string{{"IgnoreUnknown", "1"}, {"IP", want.String()}, {"MAC", "02:aa:bb:cc:dd:ef"}} // as podman sends them
		if addr, r := n.add(l, rt); addr != want || r.Interfaces[2].Mac != "02:aa:bb:cc:dd:ef" {
			t.Errorf("CNI_ARGS: %s and %s are had", addr, r.Interfaces[2].Mac)
		}
		n.del(l, rt)
	})
	t.Run("a repeated ADD is an error and hurts nobody", func(t *testing.T) {
		n := one.in(t)
		before := n.holds()
		_, _, err := n.tryAdd(l, &libcni.RuntimeConf{ContainerID: "p1", NetNS: "/run/netns/p1", IfName: "eth0"})
		var told *types.Error
		if !errors.As(err, &told) || told.Code != 100 || !strings.Contains(told.Msg, pods[0].addr.String()) {
			t.Errorf("the error is %v", err)
		}
		if diff := cmp.Diff(before, n.holds()); diff != "" {
			t.Error(diff)
		}
		if _, err := onHost(plain).try("ping", "-c", "1", "-W", "3", pods[0].addr.String()); err != nil {
			t.Errorf("p1 is not reached any more: %v", err)
		}
	})
	t.Run("CHECK notices what is missing", func(t *testing.T) {
		n := one.in(t)
		rt := n.pod("checked")
		addr, r := n.add(l, rt)
		check := func() error { return n.cni.CheckNetworkList(t.Context(), l, rt) }
		table := n.must("nft", "list", "table", "bridge", "azure_vnet")
		n.must("sh", "-c", "ip -n checked route save >/run/routes")
		restore := "ip -n checked route restore </run/routes 2>/dev/null || true" // some are there still
		for _, damage := range []struct{ says, do, undo string }{
			{"lacks the address", "ip -n checked addr del " + addr.String() + "/16 dev eth0", "ip -n checked addr add " + addr.String() + "/16 dev eth0 noprefixroute; " + restore},
			{"lacks the route", "ip -n checked route del default", restore},
			{"is down", "ip -n checked link set eth0 down", "ip -n checked link set eth0 up; " + restore},
			{"has the MAC", "ip -n checked link set eth0 address 02:00:00:00:00:09", "ip -n checked link set eth0 address " + r.Interfaces[2].Mac},
			{"not in azure0", "ip link set " + r.Interfaces[1].Name + " nomaster", filepath.Join(n.dir, "azure-vnet") + " reconcile"},
		} {
			n.must("sh", "-c", damage.do)
			if err := check(); err == nil || !strings.Contains(err.Error(), damage.says) {
				t.Errorf("%s: CHECK says %v", damage.do, err)
			}
			n.must("sh", "-c", damage.undo)
			if err := check(); err != nil {
				t.Errorf("%s: CHECK says %v", damage.undo, err)
			}
		}
		if now := n.must("nft", "list", "table", "bridge", "azure_vnet"); now != table {
			t.Errorf("CHECK or the damage changed the table:\n%s", cmp.Diff(table, now))
		}
		n.must("nft", fmt.Sprintf("delete element bridge azure_vnet own { %s . %s . %s . %s }", r.Interfaces[1].Name, r.Interfaces[2].Mac, r.Interfaces[0].Mac, addr))
		if err := check(); err == nil || !strings.Contains(err.Error(), "azure_vnet") {
			t.Errorf("without an element of the table CHECK says %v", err)
		}
		n.del(l, rt)
	})
	t.Run("GC releases what is not listed, of its own network", func(t *testing.T) {
		n := one.in(t)
		other := n.list("1.1.0", "other", azure())
		kept, _ := n.add(other, n.pod("o1"))
		stale, _ := n.add(l, n.pod("stale"))
		conf := func(more map[string]any) []byte { return stdin("1.1.0", "azure", azure(), more) }
		if _, err := n.call("GC", "", "", conf(nil)); err == nil || !strings.Contains(err.Error(), "valid-attachments is missing") {
			t.Errorf("without a list: %v", err)
		}
		valid := []map[string]string{{"containerID": "p1", "ifname": "eth0"}, {"containerID": "p2", "ifname": "eth0"}}
		if _, err := n.call("GC", "", "", conf(map[string]any{"cni.dev/valid-attachments": valid})); err != nil {
			t.Error(err)
		}
		for _, alive := range []netip.Addr{pods[0].addr, pods[1].addr, kept} {
			if _, err := onHost(plain).try("ping", "-c", "1", "-W", "3", alive.String()); err != nil {
				t.Errorf("GC took %s: %v", alive, err)
			}
		}
		if s := n.holds(); len(s.Leases) != 4 { // p4 is of another network too
			t.Errorf("after GC of %s, %+v is held", stale, s)
		}
		if _, err := n.call("GC", "", "", conf(map[string]any{"cni.dev/valid-attachments": nil, "cni.dev/attachments": nil})); err != nil {
			t.Error(err)
		}
		if s := n.holds(); len(s.Leases) != 2 {
			t.Errorf("a runtime without containers sends null, and %+v is held", s)
		}
		n.del(other, &libcni.RuntimeConf{ContainerID: "o1", IfName: "eth0"})
		n.del(alone, &libcni.RuntimeConf{ContainerID: "p4", IfName: "eth0"})
		n.bare()
	})
	clean(t, vnet, used...)
}
