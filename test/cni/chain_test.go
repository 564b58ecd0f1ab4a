// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// documented is the configuration that Azure documented in 2018, as users have it.
const documented = `{
   "cniVersion":"0.3.0",
   "name":"azure",
   "plugins":[
      {
         "type":"azure-vnet",
         "mode":"bridge",
         "bridge":"azure0",
         "ipam":{
            "type":"azure-vnet-ipam"
         }
      },
      {
         "type":"portmap",
         "capabilities":{
            "portMappings":true
         },
         "snat":true
      }
   ]
}`

func TestPodsWithPortsAndOtherPlugins(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{Subnet: netip.MustParsePrefix("10.241.0.0/16")})
	n, m := test.OnNode(vms[0]), test.OnNode(vms[1])
	chain, err := libcni.NetworkConfFromBytes([]byte(documented))
	if err != nil {
		t.Fatal(err)
	}
	elsewhere, _ := m.Add(m.List("1.1.0", "azure", test.Azure()), m.Pod("elsewhere"))
	ports := map[string]any{"portMappings": []map[string]any{ // as containerd spells them
		{"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""}}}
	own := n.List("1.1.0", "azure", test.Azure(`"capabilities":{"portMappings":true}`))
	alone := n.List("1.1.0", "alone", test.Azure(`"mode":"transparent"`, `"capabilities":{"portMappings":true}`))
	used := []netip.Addr{elsewhere, n.Primary}
	for _, way := range []struct {
		name string
		list *libcni.NetworkConfigList
	}{{"our own ports", own}, {"our own ports, without a bridge", alone}, {"the documented configuration, with a chained portmap", chain}} {
		t.Run(way.name, func(t *testing.T) {
			n := n.In(t)
			rt := n.Pod("web")
			rt.CapabilityArgs = ports
			n.Add(way.list, rt)
			n.Serve("web")
			here, _ := n.Add(way.list, n.Pod("here"))
			reached := func() (failed []string) {
				url := fmt.Sprintf("http://%s:8080/cgi-bin/who", n.Primary)
				for _, from := range []test.Place{test.OnHost(vms[0]), test.OnHost(vms[1]), test.OnHost(vms[2]), test.InPod(n, "here", here), test.InPod(m.In(t), "elsewhere", elsewhere), test.InPod(n, "web", here)} {
					got, err := from.Try(test.Fetch(url)...)
					if err != nil {
						failed = append(failed, from.Name+": "+err.Error())
						continue
					}
					// A pod that asks its own host port would get the question from itself. A chained portmap takes the whole subnet of the
					// pod for it: docs/kubernetes.md says so.
					want := from.Addr
					if from.Name == "web" || way.list == chain && n.Prefix.Contains(from.Addr) {
						want = n.Primary
					}
					if got != want.String() {
						failed = append(failed, fmt.Sprintf("%s, with %s, is seen as %q and not as %s", from.Name, from.Addr, got, want))
					}
				}
				return failed
			}
			if failed := reached(); len(failed) > 0 {
				t.Errorf("not reached from:\n%s", strings.Join(failed, "\n"))
			}
			if way.list != chain {
				if err := n.CNI.CheckNetworkList(t.Context(), way.list, rt); err != nil {
					t.Error(err)
				}
				if out, err := n.Try("timeout", "1", "busybox", "nc", "-l", "-p", "8080"); err == nil || !strings.Contains(err.Error(), "exit status 124") { // timeout ended it
					t.Errorf("a socket keeps the port, and docs/docker.md says that CNI has none: %s %v", out, err)
				}
				rival := n.Pod("rival")
				rival.CapabilityArgs = ports
				before := n.Holds()
				if _, _, err := n.TryAdd(way.list, rival); err == nil || !strings.Contains(err.Error(), "8080") {
					t.Errorf("a port that is taken: %v", err)
				}
				if after := n.Holds(); len(after.Leases) != len(before.Leases) || len(after.Attachments) != len(before.Attachments) {
					t.Errorf("what failed left something: %+v", after)
				}
				n.Must("ip", "netns", "del", "rival")
			}
			n.Del(way.list, rt)
			rt.CapabilityArgs = nil
			n.Del(way.list, &libcni.RuntimeConf{ContainerID: "here", NetNS: "/run/netns/here", IfName: "eth0"})
			n.Bare()
			n.Must("sh", "-c", "ip netns pids web | xargs -r kill; ip netns del web; ip netns del here")
		})
	}
	for _, mode := range []string{"bridge", "transparent"} {
		t.Run("bandwidth and tuning in the chain, mode "+mode, func(t *testing.T) {
			n := n.In(t)
			l := n.List("1.1.0", "azure", test.Azure(`"mode":"`+mode+`"`), `{"type":"tuning","sysctl":{"net.ipv4.ip_unprivileged_port_start":"80"}}`,
				`{"type":"bandwidth","capabilities":{"bandwidth":true}}`)
			rt := n.Pod("slow-" + mode)
			rt.CapabilityArgs = map[string]any{"bandwidth": map[string]any{"ingressRate": 16000000, "ingressBurst": 16000000, "egressRate": 8000000, "egressBurst": 8000000}}
			addr, _, err := n.TryAdd(l, rt)
			if err != nil {
				t.Fatal(err)
			}
			used = append(used, addr)
			if _, err := test.OnHost(vms[1]).Try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
				t.Errorf("not reached: %v", err)
			}
			if err := n.CNI.CheckNetworkList(t.Context(), l, rt); err != nil {
				t.Error(err)
			}
			if shaped := n.Must("tc", "qdisc"); strings.Count(shaped, "tbf") != 2 || !strings.Contains(shaped, "rate 8Mbit") || !strings.Contains(shaped, "rate 16Mbit") {
				t.Errorf("not both directions are shaped: %s", shaped)
			}
			n.Del(l, rt)
			n.Bare()
		})
		t.Run("tuning that changes the MAC is named, mode "+mode, func(t *testing.T) {
			n := n.In(t)
			l := n.List("1.1.0", "azure", test.Azure(`"mode":"`+mode+`"`), `{"type":"tuning","mac":"02:00:00:00:00:77"}`)
			rt := n.Pod("tuned-" + mode)
			addr, _ := n.Add(l, rt)
			if err := n.CNI.CheckNetworkList(t.Context(), l, rt); !test.Says(err, 102, "02:00:00:00:00:77 and not") {
				t.Errorf("CHECK: %v", err)
			}
			out, _ := n.Try("sh", "-c", n.Dir+"/azure-vnet status 2>&1 || echo failed")
			if !strings.Contains(out, "("+addr.String()+", pod default/tuned-"+mode+"): eth0 in its container has the MAC 02:00:00:00:00:77") || !strings.Contains(out, "the capability mac") || !strings.Contains(out, "failed") {
				t.Errorf("status says %s", out)
			}
			n.Del(l, rt)
			n.Bare()
		})
	}
	test.NothingDropped(t, vnet, used...)
}
