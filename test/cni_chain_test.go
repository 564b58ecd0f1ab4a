// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"azurevnet/internal/vnetsim"
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
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{Subnet: netip.MustParsePrefix("10.241.0.0/16")})
	n, m := onNode(vms[0]), onNode(vms[1])
	chain, err := libcni.NetworkConfFromBytes([]byte(documented))
	if err != nil {
		t.Fatal(err)
	}
	elsewhere, _ := m.add(m.list("1.1.0", "azure", azure()), m.pod("elsewhere"))
	ports := map[string]any{"portMappings": []map[string]any{ // as containerd spells them
		{"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""}}}
	own := n.list("1.1.0", "azure", azure(`"capabilities":{"portMappings":true}`))
	alone := n.list("1.1.0", "alone", azure(`"mode":"transparent"`, `"capabilities":{"portMappings":true}`))
	used := []netip.Addr{elsewhere, n.Primary}
	for _, way := range []struct {
		name string
		list *libcni.NetworkConfigList
	}{{"our own ports", own}, {"our own ports, without a bridge", alone}, {"the documented configuration, with a chained portmap", chain}} {
		t.Run(way.name, func(t *testing.T) {
			n := n.in(t)
			rt := n.pod("web")
			rt.CapabilityArgs = ports
			n.add(way.list, rt)
			n.serve("web")
			here, _ := n.add(way.list, n.pod("here"))
			reached := func() (failed []string) {
				url := fmt.Sprintf("http://%s:8080/cgi-bin/who", n.Primary)
				for _, from := range []place{onHost(vms[0]), onHost(vms[1]), onHost(vms[2]), inPod(n, "here", here), inPod(m.in(t), "elsewhere", elsewhere), inPod(n, "web", here)} {
					got, err := from.try(fetch(url)...)
					if err != nil {
						failed = append(failed, from.name+": "+err.Error())
						continue
					}
					// A pod that asks its own host port would get the question from itself. A chained portmap takes the whole subnet of the
					// pod for it: docs/kubernetes.md says so.
					want := from.addr
					if from.name == "web" || way.list == chain && n.Prefix.Contains(from.addr) {
						want = n.Primary
					}
					if got != want.String() {
						failed = append(failed, fmt.Sprintf("%s, with %s, is seen as %q and not as %s", from.name, from.addr, got, want))
					}
				}
				return failed
			}
			if failed := reached(); len(failed) > 0 {
				t.Errorf("not reached from:\n%s", strings.Join(failed, "\n"))
			}
			if way.list != chain {
				if err := n.cni.CheckNetworkList(t.Context(), way.list, rt); err != nil {
					t.Error(err)
				}
				rival := n.pod("rival")
				rival.CapabilityArgs = ports
				before := n.holds()
				if _, _, err := n.tryAdd(way.list, rival); err == nil || !strings.Contains(err.Error(), "8080") {
					t.Errorf("a port that is taken: %v", err)
				}
				if after := n.holds(); len(after.Leases) != len(before.Leases) || len(after.Attachments) != len(before.Attachments) {
					t.Errorf("what failed left something: %+v", after)
				}
				n.must("ip", "netns", "del", "rival")
			}
			n.del(way.list, rt)
			rt.CapabilityArgs = nil
			n.del(way.list, &libcni.RuntimeConf{ContainerID: "here", NetNS: "/run/netns/here", IfName: "eth0"})
			n.bare()
			n.must("sh", "-c", "ip netns pids web | xargs -r kill; ip netns del web; ip netns del here")
		})
	}
	for _, mode := range []string{"bridge", "transparent"} {
		t.Run("bandwidth and tuning in the chain, mode "+mode, func(t *testing.T) {
			n := n.in(t)
			l := n.list("1.1.0", "azure", azure(`"mode":"`+mode+`"`), `{"type":"tuning","sysctl":{"net.ipv4.ip_unprivileged_port_start":"80"}}`,
				`{"type":"bandwidth","capabilities":{"bandwidth":true}}`)
			rt := n.pod("slow-" + mode)
			rt.CapabilityArgs = map[string]any{"bandwidth": map[string]any{"egressRate": 8000000, "egressBurst": 8000000}}
			addr, _, err := n.tryAdd(l, rt)
			if err != nil {
				t.Fatal(err)
			}
			used = append(used, addr)
			if _, err := onHost(vms[1]).try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
				t.Errorf("not reached: %v", err)
			}
			if err := n.cni.CheckNetworkList(t.Context(), l, rt); err != nil {
				t.Error(err)
			}
			if shaped := n.must("tc", "qdisc"); !strings.Contains(shaped, "tbf") || !strings.Contains(shaped, "rate 8Mbit") {
				t.Errorf("nothing is shaped: %s", shaped)
			}
			n.del(l, rt)
			n.bare()
		})
		t.Run("tuning that changes the MAC is named, mode "+mode, func(t *testing.T) {
			n := n.in(t)
			l := n.list("1.1.0", "azure", azure(`"mode":"`+mode+`"`), `{"type":"tuning","mac":"02:00:00:00:00:77"}`)
			rt := n.pod("tuned-" + mode)
			addr, _ := n.add(l, rt)
			if err := n.cni.CheckNetworkList(t.Context(), l, rt); !says(err, 102, "02:00:00:00:00:77 and not") {
				t.Errorf("CHECK: %v", err)
			}
			out, _ := n.try("sh", "-c", n.dir+"/azure-vnet status 2>&1 || echo failed")
			if !strings.Contains(out, "("+addr.String()+", pod default/tuned-"+mode+"): eth0 in its container has the MAC 02:00:00:00:00:77") || !strings.Contains(out, "the capability mac") || !strings.Contains(out, "failed") {
				t.Errorf("status says %s", out)
			}
			n.del(l, rt)
			n.bare()
		})
	}
	clean(t, vnet, used...)
}
