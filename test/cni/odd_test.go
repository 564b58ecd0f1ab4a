// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

func TestPodsComeAndGoInOddWays(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 8}, vnetsim.VMConfig{})
	n := test.OnNode(vms[0])
	l := n.List("1.1.0", "azure", test.Azure())
	conf := test.Stdin("1.1.0", "azure", test.Azure(), nil)
	var used []netip.Addr

	t.Run("DEL in every form that runtimes have for it", func(t *testing.T) {
		n := n.In(t)
		keeper, _ := n.Add(l, n.Pod("keeper"))
		used = append(used, keeper)
		prev := map[string]any{"prevResult": map[string]any{"cniVersion": "1.1.0", // of a pod of before the boot: keeper has its address now
			"interfaces": []any{map[string]any{"name": "eth0", "sandbox": "/run/netns/old"}},
			"ips":        []any{map[string]any{"interface": 0, "address": keeper.String() + "/16"}}}}
		for _, odd := range []struct {
			name, id, netns string
			conf            []byte
		}{
			{"never added", "never", "/run/netns/never", conf},
			{"of before the boot", "old", "", test.Stdin("1.1.0", "azure", test.Azure(), prev)},
			{"a short id", "k", "", conf},
			{"the beginning of another's id", "keepe", "/run/netns/keeper", conf},
			{"no configuration but the name", "gone", "", []byte(`{"cniVersion":"1.1.0","name":"azure","type":"azure-vnet"}`)},
			{"a mode that is refused", "gone", "", test.Stdin("0.3.0", "azure", test.Azure(`"mode":"transparent"`, `"mtu":"x"`), nil)},
			{"a namespace that is a file", "gone", "/etc/passwd", conf},
			{"the node's own namespace", "gone", "/proc/1/ns/net", conf},
		} {
			if out, err := n.Call("DEL", odd.id, odd.netns, odd.conf); err != nil || len(out) > 0 {
				t.Errorf("%s: %s %v", odd.name, out, err)
			}
		}
		if _, err := test.OnHost(vms[1]).Try("ping", "-c", "1", "-W", "3", keeper.String()); err != nil {
			t.Errorf("keeper is not reached any more: %v", err)
		}
		for _, netns := range []string{"gone before DEL", "there"} {
			rt := n.Pod("odd")
			n.Add(l, rt)
			if netns != "there" {
				n.Must("ip", "netns", "del", "odd")
				test.Eventually(t, "the pod's link is gone with it", 5*time.Second, func() bool { return len(n.Holds().Attachments) == 1 })
			}
			for range 2 {
				if _, err := n.Call("DEL", "odd", "", conf); err != nil {
					t.Errorf("its namespace %s: %v", netns, err)
				}
			}
			if s := n.Holds(); len(s.Leases) != 1 || len(s.Attachments) != 1 {
				t.Errorf("its namespace %s: %+v is held", netns, s)
			}
		}
		n.Must("ip", "netns", "del", "odd")
		n.Del(l, &libcni.RuntimeConf{ContainerID: "keeper", IfName: "eth0"})
		n.Bare()
	})
	t.Run("flows end with an address whose link died with its namespace", func(t *testing.T) {
		n := n.In(t)
		for _, way := range []string{"DEL", "another ADD", "reconcile"} {
			rt := n.Pod("mute")
			addr, _ := n.Add(l, rt)
			for _, flow := range []string{"-s " + addr.String() + " -d 8.8.8.8", "-s 8.8.8.8 -d 10.240.0.4 -r " + addr.String() + " -q 8.8.8.8"} {
				n.Must("sh", "-c", "conntrack -I -p udp --sport 5353 --dport 53 --reply-port-src 53 --reply-port-dst 5353 --timeout 100 "+flow)
			}
			n.Must("ip", "netns", "del", "mute")
			test.Eventually(t, "the pod's link is gone with it", 5*time.Second, func() bool { return len(n.Holds().Attachments) == 0 })
			switch way {
			case "DEL":
				n.Del(l, rt)
			case "another ADD":
				n.Add(l, n.Pod("mute"))
				n.Del(l, rt)
				n.Must("ip", "netns", "del", "mute")
			default:
				n.Must("sed", "-i", `s/"since":-\?[0-9]*/"since":-400000000000/`, "/run/azure-vnet/leases.json") // older than the grace
				n.Must(n.Dir+"/azure-vnet", "reconcile")
			}
			if left := n.Must("sh", "-c", "conntrack -L 2>/dev/null | grep -wF "+addr.String()+" || true"); left != "" {
				t.Errorf("after %s there are\n%s", way, left)
			}
			n.Bare()
		}
	})
	t.Run("a failed ADD leaves nothing, and says why", func(t *testing.T) {
		n := n.In(t)
		n.Must("ip", "netns", "add", "taken")
		n.Must("ip", "-n", "taken", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
		held := n.Primary.String()
		for _, bad := range []struct {
			name, netns string
			conf        []byte
			code        uint
			says        string
		}{
			{"no such namespace", "/run/netns/none", conf, 5, "/run/netns/none"},
			{"the node's own namespace", "/proc/1/ns/net", conf, 999, "own network namespace"},
			{"a name that is taken there", "/run/netns/taken", conf, 999, "eth0"},
			{"a name that is taken there, of a pod without a bridge", "/run/netns/taken", test.Stdin("0.3.0", "azure", test.Azure(`"mode":"transparent"`), nil), 999, "eth0"},
			{"an unknown mode", "/run/netns/taken", test.Stdin("0.3.0", "azure", test.Azure(`"mode":"tunnel"`), nil), 7, `"tunnel"`},
			{"no IPAM", "/run/netns/taken", test.Stdin("1.1.0", "azure", `{"type":"azure-vnet"}`, nil), 7, "ipam.type"},
			{"an IPAM that is not installed", "/run/netns/taken", test.Stdin("1.1.0", "azure", `{"type":"azure-vnet","ipam":{"type":"nobody"}}`, nil), 7, "nobody"},
			{"a NIC that is not there", "/run/netns/taken", test.Stdin("1.1.0", "azure", test.Azure(`"master":"eth7"`), nil), 7, "eth7"},
			{"another subnet", "/run/netns/taken", test.Stdin("1.1.0", "azure", `{"type":"azure-vnet","ipam":{"type":"azure-vnet-ipam","subnet":"10.9.0.0/16"}}`, nil), 7, "10.240.0.0/16"},
			{"the node's own address", "/run/netns/taken", test.Stdin("1.1.0", "azure", `{"type":"azure-vnet","ipam":{"type":"azure-vnet-ipam","ipAddress":"`+held+`"}}`, nil), 7, "own address"},
			{"another bridge", "/run/netns/taken", test.Stdin("1.1.0", "azure", test.Azure(`"bridge":"azure7"`), nil), 7, "azure0"},
			{"a version to come", "/run/netns/taken", test.Stdin("9.9.9", "azure", test.Azure(), nil), 1, "incompatible"},
		} {
			out, err := n.Call("ADD", "failed", bad.netns, bad.conf)
			var told types.Error
			if err == nil || json.Unmarshal(out, &told) != nil || told.Code != bad.code || !strings.Contains(told.Error(), bad.says) {
				t.Errorf("%s: %s %v, and code %d is wanted with %q", bad.name, out, err, bad.code, bad.says)
			}
			n.Bare()
		}
	})
	t.Run("with its state lost, no running pod's address is lent", func(t *testing.T) {
		n := n.In(t)
		first, _ := n.Add(l, n.Pod("first"))
		n.Must("rm", "-rf", "/run/azure-vnet")
		for i := range 3 {
			if addr, _ := n.Add(l, n.Pod(fmt.Sprintf("after%d", i))); addr == first {
				t.Errorf("%s is lent twice", addr)
			}
		}
		if _, _, err := n.TryAdd(l, &libcni.RuntimeConf{ContainerID: "first", NetNS: "/run/netns/first", IfName: "eth0"}); err == nil {
			t.Error("a repeated ADD is not noticed")
		}
		if _, err := n.Call("GC", "", "", test.Stdin("1.1.0", "azure", test.Azure(), map[string]any{"cni.dev/valid-attachments": []any{}})); err != nil {
			t.Error(err)
		}
		n.Bare()
	})
	t.Run("the log has a line for each call", func(t *testing.T) {
		n := n.In(t)
		log := n.Must("cat", "/var/log/azure-vnet.log")
		for _, want := range []string{"pod=default/keeper", "address=", "level=ERROR", "took="} {
			if !strings.Contains(log, want) {
				t.Errorf("the log has no %s:\n%.2000s", want, log)
			}
		}
		if got := cmp.Diff("", n.Must("sh", "-c", "grep -v ^time= /var/log/azure-vnet.log || true")); got != "" {
			t.Errorf("torn lines: %s", got)
		}
	})
	test.NothingDropped(t, vnet, used...)
}

// TestStatusNamesWhatIsBroken, until the next ADD mends it: nobody else looks after
// this node. (What its pods say while there is no table breaks Azure's rules.)
func TestStatusNamesWhatIsBroken(t *testing.T) {
	t.Parallel()
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 6})
	n := test.OnNode(vms[0])
	n.Must("iptables", "-P", "FORWARD", "DROP") // as engines and kubelets do
	azure0, alone := n.List("1.1.0", "azure", test.Azure()), n.List("1.1.0", "alone", test.Azure(`"mode":"transparent"`))
	seen, r := n.Add(azure0, n.Pod("seen"))
	lone, rl := n.Add(alone, n.Pod("lone"))
	hostEnd := func(r *current.Result) string {
		i := slices.IndexFunc(r.Interfaces, func(i *current.Interface) bool { return test.Veth.MatchString(i.Name) })
		if i < 0 {
			t.Fatalf("no host end in %+v", r)
		}
		return r.Interfaces[i].Name
	}
	port, link := hostEnd(r), hostEnd(rl)
	told := n.Must(n.Dir+"/azure-vnet", "status")
	for _, want := range []string{seen.String(), port, lone.String(), link} {
		if !strings.Contains(told, want) || strings.Contains(told, "broken") {
			t.Errorf("with all as it should be, status lacks %s or names a fault:\n%s", want, told)
		}
	}
	for _, harm := range []struct{ what, named string }{
		{"ip link set " + port + " nomaster", port + " (" + seen.String() + ", pod default/seen): not in azure0"},
		{"ip link set " + link + " group 0", link + " (" + lone.String() + ", pod default/lone): not in its link group"},
		{"ip rule del lookup 16863", "no routing rule"},
		{"ip route flush table 16863", "no route in table 16863"},
		{"ip neigh del " + seen.String() + " dev azure0", "no neighbour entry"},
		{"ip neigh del " + lone.String() + " dev " + link, "no neighbour entry"},
		{"ip addr add 10.240.99.1/16 dev azure0", "azure0 has the address 10.240.99.1"},
		{"sysctl -w net.ipv4.conf." + link + ".proxy_arp=0", "net.ipv4.conf." + link + ".proxy_arp is not 1"},
		{"nft delete table bridge azure_vnet", "the nft table bridge azure_vnet is gone"},
		{"nft delete table ip azure_vnet", "the nft table ip azure_vnet is gone"},
		{"iptables -F FORWARD", "the jump to AZURE-VNET"},
		{"ip link del azure0", "azure0 is gone"},
	} {
		n.Must("sh", "-c", harm.what)
		out, err := n.Try("sh", "-c", n.Dir+"/azure-vnet status 2>&1 || echo failed")
		if err != nil || !strings.Contains(out, "broken: ") || !strings.Contains(out, harm.named) || !strings.Contains(out, "failed") {
			t.Errorf("after %s status does not name %q: %s %v", harm.what, harm.named, out, err)
		}
		n.Must("touch", "-d", "2 minutes ago", "/run/azure-vnet/reconciled")
		n.Add(azure0, n.Pod("next"))
		n.Del(azure0, &libcni.RuntimeConf{ContainerID: "next", NetNS: "/run/netns/next", IfName: "eth0"})
		n.Must("ip", "netns", "del", "next")
		if out, err := n.Try(n.Dir+"/azure-vnet", "status"); err != nil {
			t.Errorf("after %s and an ADD: %s %v", harm.what, out, err)
		}
	}
	n.Del(azure0, &libcni.RuntimeConf{ContainerID: "seen", NetNS: "/run/netns/seen", IfName: "eth0"})
	n.Del(alone, &libcni.RuntimeConf{ContainerID: "lone", NetNS: "/run/netns/lone", IfName: "eth0"})
	n.Bare()
}

// TestAnAddressWithALeftRouteIsLent: a route that a crash left keeps nobody from the last free address. The ADD that needs
// it looks the host over.
func TestAnAddressWithALeftRouteIsLent(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
	n := test.OnNode(vms[0])
	l := n.List("1.1.0", "azure", test.Azure())
	first, _ := n.Add(l, n.Pod("first"))
	left := n.Secondaries()[0]
	if left == first {
		left = n.Secondaries()[1]
	}
	for _, table := range []string{"main", "16863"} {
		n.Must("ip", "route", "add", left.String()+"/32", "dev", "azure0", "proto", "168", "table", table)
	}
	second, _ := n.Add(l, n.Pod("second"))
	if second != left {
		t.Errorf("the second pod has %s, and %s was free", second, left)
	}
	if _, err := test.OnHost(vms[1]).Try("ping", "-c", "1", "-W", "3", second.String()); err != nil {
		t.Errorf("%s is not reached: %v", second, err)
	}
	test.NothingDropped(t, vnet, second)
}
