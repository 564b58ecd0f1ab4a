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
	"github.com/google/go-cmp/cmp"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// recorder is an IPAM plugin that writes down how it was called. It gives the
// address in /run/fake/address.
const recorder = `#!/bin/sh
cat >/run/fake/$CNI_COMMAND.stdin
env | grep ^CNI_ | sort >/run/fake/$CNI_COMMAND.env
[ ! -e /run/fake/fail ] || { echo '{"cniVersion":"1.1.0","code":111,"msg":"the recorder has none"}'; exit 1; }
[ $CNI_COMMAND != ADD ] || printf '{"cniVersion":"1.1.0","ips":[{"address":"%s/16","gateway":"10.240.0.1"}],"routes":[{"dst":"0.0.0.0/0"},{"dst":"10.99.0.0/16"}],"dns":{"nameservers":["10.0.0.53"]}}' $(cat /run/fake/address)
`

func TestAnotherIPAMIsAskedAsTheRuntimeAsksUs(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	n, plain := test.OnNode(vms[0]), test.OnHost(vms[1])
	n.Must("sh", "-c", `mkdir -p /run/fake && printf %s "$0" >/run/fake/fake-ipam && chmod +x /run/fake/fake-ipam && echo $1 >/run/fake/address`, recorder, n.Secondaries()[3].String())
	n.CNI = libcni.NewCNIConfigWithCacheDir([]string{n.Dir, "/run/fake"}, t.TempDir(), n.Exec())
	l := n.List("1.1.0", "azure", `{"type":"azure-vnet","capabilities":{"ips":true,"mac":true},"args":{"cni":{"labels":[{"key":"app","value":"web"}]}},"ipam":{"type":"fake-ipam","pools":["a","b"],"subnet":7}}`)
	rt := n.Pod("pod")
	rt.CapabilityArgs = map[string]any{"ips": []string{n.Secondaries()[3].String() + "/16"}, "mac": "02:aa:bb:cc:dd:ee", "unknown": "is not declared"}
	// heard is what the plugin was given: the configuration, and the environment.
	heard := func(verb string) (conf map[string]any, env string) {
		t.Helper()
		if err := json.Unmarshal([]byte(n.Must("cat", "/run/fake/"+verb+".stdin")), &conf); err != nil {
			t.Fatal(err)
		}
		return conf, n.Must("cat", "/run/fake/"+verb+".env")
	}
	compare := func(verb string, want map[string]any) {
		t.Helper()
		got, env := heard(verb)
		base := map[string]any{"cniVersion": "1.1.0", "name": "azure", "type": "azure-vnet", "capabilities": map[string]any{"ips": true, "mac": true},
			"args": map[string]any{"cni": map[string]any{"labels": []any{map[string]any{"key": "app", "value": "web"}}}},
			"ipam": map[string]any{"type": "fake-ipam", "pools": []any{"a", "b"}, "subnet": 7.}}
		for k, v := range want {
			base[k] = v
		}
		if diff := cmp.Diff(base, got); diff != "" {
			t.Errorf("%s: the configuration is\n%s", verb, diff)
		}
		says := []string{"CNI_COMMAND=" + verb, "CNI_PATH=" + n.Dir + ":/run/fake"}
		if verb != "GC" && verb != "STATUS" {
			says = append(says, "CNI_CONTAINERID=pod", "CNI_IFNAME=eth0", "CNI_NETNS=/run/netns/pod")
			for _, arg := range rt.Args {
				if !strings.Contains(env, arg[0]+"="+arg[1]) {
					t.Errorf("%s: CNI_ARGS lacks %s=%s:\n%s", verb, arg[0], arg[1], env)
				}
			}
		}
		for _, one := range says {
			if !slices.Contains(strings.Split(env, "\n"), one) {
				t.Errorf("%s: the environment lacks %s:\n%s", verb, one, env)
			}
		}
	}
	runtimeConfig := map[string]any{"ips": []any{n.Secondaries()[3].String() + "/16"}, "mac": "02:aa:bb:cc:dd:ee"}

	if err := n.CNI.GetStatusNetworkList(t.Context(), l); err != nil {
		t.Errorf("STATUS: %v", err)
	}
	compare("STATUS", nil)
	addr, r := n.Add(l, rt)
	compare("ADD", map[string]any{"runtimeConfig": runtimeConfig})
	if addr != n.Secondaries()[3] || r.Interfaces[2].Mac != "02:aa:bb:cc:dd:ee" || !slices.Equal(r.DNS.Nameservers, []string{"10.0.0.53"}) || len(r.Routes) != 2 {
		t.Errorf("the result is %+v", r)
	}
	if routes := n.Must("ip", "-n", "pod", "route"); !strings.Contains(routes, "10.99.0.0/16 via 10.240.0.1") {
		t.Errorf("the routes are\n%s", routes)
	}
	if _, err := plain.Try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
		t.Errorf("not reached: %v", err)
	}
	var prev map[string]any
	text, err := json.Marshal(r)
	if err == nil {
		err = json.Unmarshal(text, &prev)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := n.CNI.CheckNetworkList(t.Context(), l, rt); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	compare("CHECK", map[string]any{"runtimeConfig": runtimeConfig, "prevResult": prev})
	valid := []types.GCAttachment{{ContainerID: "pod", IfName: "eth0"}}
	if err := n.CNI.GCNetworkList(t.Context(), l, &libcni.GCArgs{ValidAttachments: valid}); err != nil {
		t.Errorf("GC: %v", err)
	}
	list := []any{map[string]any{"containerID": "pod", "ifname": "eth0"}}
	compare("GC", map[string]any{"cni.dev/valid-attachments": list, "cni.dev/attachments": list})
	n.Del(l, rt)
	compare("DEL", map[string]any{"runtimeConfig": runtimeConfig, "prevResult": prev})
	n.Bare()

	t.Run("its error is ours, and leaves nothing", func(t *testing.T) {
		n := n.In(t)
		n.Must("touch", "/run/fake/fail")
		if _, _, err := n.TryAdd(l, rt); !test.Says(err, 111, "IPAM plugin fake-ipam: the recorder has none") {
			t.Errorf("ADD: %v", err)
		}
		if err := n.CNI.GetStatusNetworkList(t.Context(), l); !test.Says(err, 111, "the recorder has none") {
			t.Errorf("STATUS: %v", err)
		}
		if err := n.CNI.DelNetworkList(t.Context(), l, rt); !test.Says(err, 111, "the recorder has none") {
			t.Errorf("DEL: %v", err)
		}
		n.Must("rm", "/run/fake/fail")
		n.Bare()
	})
	t.Run("what it gives is given back when the rest fails", func(t *testing.T) {
		n := n.In(t)
		n.Must("sh", "-c", "rm -f /run/fake/DEL.*; ip -n pod link add eth0 type veth peer name eth1")
		if _, _, err := n.TryAdd(l, rt); !test.Says(err, 999, "eth0") {
			t.Errorf("ADD: %v", err)
		}
		compare("DEL", map[string]any{"runtimeConfig": runtimeConfig})
		n.Must("ip", "-n", "pod", "link", "del", "eth0")
		n.Bare()
	})
	used := []netip.Addr{addr}
	t.Run("host-local", func(t *testing.T) {
		n := n.In(t)
		local := fmt.Sprintf(`{"type":"azure-vnet","ipam":{"type":"host-local","dataDir":"/run/nets","ranges":[[{"subnet":"10.240.0.0/16","rangeStart":%q,"rangeEnd":%q}]]}}`, n.Secondaries()[0], n.Secondaries()[1])
		l := n.List("1.1.0", "local", local)
		var addrs []netip.Addr
		for _, id := range []string{"l1", "l2"} {
			addr, _ := n.Add(l, n.Pod(id))
			addrs = append(addrs, addr)
		}
		used = append(used, addrs...)
		for i, id := range []string{"l1", "l2"} {
			if _, err := plain.Try("ping", "-c", "1", "-W", "3", addrs[i].String()); err != nil {
				t.Errorf("%s is not reached: %v", id, err)
			}
			if _, err := test.InPod(n, id, addrs[i]).Try("ping", "-c", "1", "-W", "3", addrs[1-i].String()); err != nil {
				t.Errorf("%s does not reach the other: %v", id, err)
			}
			if got := asSeen(test.InPod(n, id, addrs[i])); got != n.Public.String() {
				t.Errorf("the internet sees %s as %q", id, got)
			}
		}
		if _, _, err := n.TryAdd(l, n.Pod("l3")); err == nil || !strings.Contains(err.Error(), "host-local") {
			t.Errorf("with none left: %v", err)
		}
		for _, id := range []string{"l1", "l2", "l3"} {
			n.Del(l, &libcni.RuntimeConf{ContainerID: id, NetNS: "/run/netns/" + id, IfName: "eth0"})
		}
		if left := n.Must("sh", "-c", "ls /run/nets/local | grep ^10 || true"); left != "" {
			t.Errorf("host-local holds %s", left)
		}
		n.Bare()
	})
	test.NothingDropped(t, vnet, used...)
}

// TestAnotherIPAMsAddressBeginsAnew: a container whose namespace died before its DEL leaves nothing to the next one that
// another IPAM gives the address.
func TestAnotherIPAMsAddressBeginsAnew(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	n := test.OnNode(vms[0])
	n.Must("sh", "-c", `mkdir -p /run/fake && printf %s "$0" >/run/fake/fake-ipam && chmod +x /run/fake/fake-ipam && echo $1 >/run/fake/address`, recorder, n.Secondaries()[3].String())
	n.CNI = libcni.NewCNIConfigWithCacheDir([]string{n.Dir, "/run/fake"}, t.TempDir(), n.Exec())
	list := func(metadata string) *libcni.NetworkConfigList {
		return n.List("1.1.0", "azure", `{"type":"azure-vnet","metadata":"`+metadata+`","ipam":{"type":"fake-ipam"}}`)
	}
	asks := func(pod string, addr netip.Addr) error {
		_, err := test.InPod(n, pod, addr).Try("timeout", "3", "busybox", "wget", "-q", "-O", "/dev/null", "http://169.254.169.254/metadata/instance/network?api-version=2021-02-01")
		return err
	}
	first := n.Pod("first")
	addr, _ := n.Add(list("off"), first)
	if asks("first", addr) == nil {
		t.Error("a pod without metadata is answered")
	}
	n.Must("ip", "netns", "del", "first")
	test.Eventually(t, "the link is gone", 10*time.Second, func() bool { return len(n.ContainerLinks()) == 0 })
	n.Del(list("off"), first)
	n.Forgotten()
	n.Add(list("on"), n.Pod("second"))
	if out, err := test.InPod(n, "second", addr).Try("timeout", "3", "busybox", "nc", "-w", "2", "169.254.169.254", "80"); err != nil {
		t.Errorf("the next pod does not reach the metadata service: %s %v", out, err)
	}
	test.NothingDropped(t, vnet) // what is masqueraded has the host's address
}
