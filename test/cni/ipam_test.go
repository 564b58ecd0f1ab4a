// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// ipam runs azure-vnet-ipam as a main plugin does: with that plugin's environment
// and configuration.
func ipam(n test.Node, verb, id string, conf []byte) ([]byte, error) {
	out, _, err := n.Plugin(n.T.Context(), filepath.Join(n.Dir, "azure-vnet-ipam"), conf, n.Environ(verb, id, "/run/netns/"+id))
	return out, err
}

// other is a main plugin's configuration over azure-vnet-ipam.
func other(version, network string, more map[string]any) []byte {
	return test.Stdin(version, network, `{"type":"other","mode":"l2","master":"nobody0","mtu":"is not ours","ipam":{"type":"azure-vnet-ipam"}}`, more)
}

func TestIPAMForOtherMainPlugins(t *testing.T) {
	t.Parallel()
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 6}, vnetsim.VMConfig{})
	n := test.OnNode(vms[0])
	add := func(t *testing.T, id, version, network string) map[string]any {
		t.Helper()
		out, err := ipam(n, "ADD", id, other(version, network, nil))
		var r map[string]any
		if err == nil {
			err = json.Unmarshal(out, &r)
		}
		if err != nil {
			t.Fatalf("%s %v", out, err)
		}
		return map[string]any{"prevResult": r}
	}
	// leases are how many are held now.
	leases := func() int { return len(n.Holds().Leases) }
	done := func(t *testing.T, out []byte, err error) {
		t.Helper()
		if err != nil || len(out) > 0 {
			t.Errorf("%s %v", out, err)
		}
	}
	t.Run("every verb in every version", func(t *testing.T) {
		for _, v := range []string{"0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
			prev := add(t, "c1", v, "net")
			r := prev["prevResult"].(map[string]any)
			text, _ := json.Marshal(r)
			if r["cniVersion"] != v || !strings.Contains(string(text), `10.240.0.1"`) || !strings.Contains(string(text), `/16"`) || strings.Contains(string(text), "interface") {
				t.Errorf("%s: %s", v, text)
			}
			if out, err := ipam(n, "ADD", "c1", other(v, "net", nil)); !test.Says(err, 100, "keeps it") || leases() != 1 {
				t.Errorf("%s: added twice: %s %v", v, out, err)
			}
			out, err := ipam(n, "CHECK", "c1", other(v, "net", prev))
			if v >= "0.4.0" {
				done(t, out, err)
			} else if !test.Says(err, 1, "CHECK") {
				t.Errorf("%s: CHECK: %s %v", v, out, err)
			}
			for range 2 {
				out, err := ipam(n, "DEL", "c1", other(v, "net", nil))
				done(t, out, err)
			}
			for _, verb := range []string{"STATUS", "GC"} {
				out, err := ipam(n, verb, "", other(v, "net", map[string]any{"cni.dev/valid-attachments": nil}))
				if v >= "1.1.0" {
					done(t, out, err)
				} else if !test.Says(err, 1, verb) {
					t.Errorf("%s: %s: %s %v", v, verb, out, err)
				}
			}
			if leases() != 0 {
				t.Errorf("%s: %+v is held", v, n.Holds())
			}
		}
		if out, err := ipam(n, "VERSION", "", nil); err != nil || !strings.Contains(string(out), `"1.1.0"`) {
			t.Errorf("VERSION: %s %v", out, err)
		}
	})
	t.Run("CHECK compares what is held with what was told", func(t *testing.T) {
		prev := add(t, "c1", "1.1.0", "net")
		another := map[string]any{"prevResult": map[string]any{"cniVersion": "1.1.0", "ips": []any{map[string]any{"address": "10.240.9.9/16"}}}}
		for _, bad := range []struct {
			name, id string
			more     map[string]any
			code     uint
		}{{"no result", "c1", nil, 7}, {"another address", "c1", another, 102}, {"another container", "c2", prev, 3},
			{"a result of another version", "c1", map[string]any{"prevResult": map[string]any{"ips": "none"}}, 6}} {
			if out, err := ipam(n, "CHECK", bad.id, other("1.1.0", "net", bad.more)); !test.Says(err, bad.code, "") {
				t.Errorf("%s: %s %v", bad.name, out, err)
			}
		}
		out, err := ipam(n, "DEL", "c1", other("1.1.0", "net", prev))
		done(t, out, err)
	})
	t.Run("GC", func(t *testing.T) {
		l, pod := n.List("1.1.0", "net", test.Azure()), n.Pod("linked")
		n.Add(l, pod) // of the same network, and its link shows it
		for _, id := range []string{"c1", "c2", "c3"} {
			add(t, id, "1.1.0", "net")
		}
		add(t, "c1", "1.1.0", "another")
		gc := func(more map[string]any) ([]byte, error) { return ipam(n, "GC", "", other("1.1.0", "net", more)) }
		if out, err := gc(nil); !test.Says(err, 7, "valid-attachments is missing") || leases() != 5 {
			t.Errorf("without a list: %s %v, and %+v is held", out, err, n.Holds())
		}
		if out, err := gc(map[string]any{"cni.dev/valid-attachments": "all"}); !test.Says(err, 7, "valid-attachments") || leases() != 5 {
			t.Errorf("with what is no list: %s %v, and %+v is held", out, err, n.Holds())
		}
		out, err := gc(map[string]any{"cni.dev/valid-attachments": []any{map[string]string{"containerID": "c1", "ifname": "eth0"}, map[string]string{"containerID": "c2", "ifname": "eth1"}}})
		done(t, out, err)
		if leases() != 3 { // c1, the linked one, the other network's
			t.Errorf("with a list, %+v is held", n.Holds())
		}
		out, err = gc(map[string]any{"cni.dev/valid-attachments": nil})
		done(t, out, err)
		if s := n.Holds(); len(s.Leases) != 2 || len(s.Attachments) != 1 {
			t.Errorf("with null, %+v is held", s)
		}
		n.Del(l, pod)
		out, err = ipam(n, "DEL", "c1", other("1.1.0", "another", nil))
		done(t, out, err)
		n.Bare()
	})
	t.Run("STATUS fails where ADD would", func(t *testing.T) {
		conf := test.Stdin("1.1.0", "net", `{"type":"other","ipam":{"type":"azure-vnet-ipam","subnet":"10.9.0.0/16"}}`, nil)
		if out, err := ipam(n, "STATUS", "", conf); !test.Says(err, 50, "10.9.0.0/16") {
			t.Errorf("STATUS: %s %v", out, err)
		}
		if out, err := ipam(n, "ADD", "c1", conf); !test.Says(err, 7, "10.9.0.0/16") {
			t.Errorf("ADD: %s %v", out, err)
		}
		if out, err := ipam(test.OnNode(vms[1].In(t)), "STATUS", "", other("1.1.0", "net", nil)); !test.Says(err, 50, "az network nic ip-config create") {
			t.Errorf("STATUS without addresses: %s %v", out, err)
		}
	})
	t.Run("bad input", func(t *testing.T) {
		for _, bad := range []struct {
			name, ipam string
			code       uint
			says       string
		}{
			{"a subnet that is none", `{"type":"azure-vnet-ipam","subnet":7}`, 7, "ipam: subnet is a number"},
			{"an address of the host", fmt.Sprintf(`{"type":"azure-vnet-ipam","ipAddress":%q}`, n.Primary), 7, "own address"},
			{"an address of IPv6", `{"type":"azure-vnet-ipam","ipAddress":"fd00::1"}`, 7, "IPv4"},
			{"an environment of others", `{"type":"azure-vnet-ipam","environment":"aws"}`, 7, "fileIpam"},
			{"an interval that is none", `{"type":"azure-vnet-ipam","queryInterval":"often"}`, 7, "number"},
			{"a source that is not there", `{"type":"azure-vnet-ipam","environment":"/run/nobody.json"}`, 11, "/run/nobody.json"},
		} {
			out, err := ipam(n, "ADD", "c1", test.Stdin("1.0.0", "net", `{"type":"other","ipam":`+bad.ipam+`}`, nil))
			var told struct{ CNIVersion string }
			if !test.Says(err, bad.code, bad.says) || json.Unmarshal(out, &told) != nil || told.CNIVersion != "1.0.0" {
				t.Errorf("%s: %s %v", bad.name, out, err)
			}
		}
		if leases() != 0 {
			t.Errorf("%+v is held", n.Holds())
		}
	})
}

// Two containers under macvlan talk to each other over Azure's addresses. Azure
// itself drops their frames, which leave with MACs of their own.
func TestIPAMUnderMacvlan(t *testing.T) {
	t.Parallel()
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 3})
	n := test.OnNode(vms[0])
	l := n.List("1.1.0", "mac", `{"type":"macvlan","master":"eth0","mode":"bridge","ipam":{"type":"azure-vnet-ipam"}}`)
	one, two := n.Pod("m1"), n.Pod("m2")
	a1, _ := n.Add(l, one)
	a2, _ := n.Add(l, two)
	if own := n.Secondaries(); a1 == a2 || !slices.Contains(own, a1) || !slices.Contains(own, a2) {
		t.Errorf("%s and %s are had of %v", a1, a2, own)
	}
	if _, err := test.InPod(n, "m1", a1).Try("ping", "-c", "1", "-W", "3", a2.String()); err != nil {
		t.Errorf("the other is not reached: %v", err)
	}
	if err := n.CNI.CheckNetworkList(t.Context(), l, one); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	if err := n.CNI.GetStatusNetworkList(t.Context(), l); err != nil {
		t.Errorf("STATUS: %v", err)
	}
	// No link of ours shows them, and lent again they would be had twice.
	uninstall := filepath.Join(n.Dir, "azure-vnet")
	if out, err := n.Try(uninstall, "uninstall"); err == nil || !strings.Contains(err.Error(), "cni/mac/m1/eth0 (pod default/m1) ("+a1.String()+")") || len(n.Holds().Leases) != 2 {
		t.Errorf("uninstall while they run: %s %v", out, err)
	}
	if err := n.CNI.GCNetworkList(t.Context(), l, &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: "m1", IfName: "eth0"}}}); err != nil {
		t.Errorf("GC: %v", err)
	}
	if s := n.Holds(); !slices.Equal(s.Leases, []string{a1.String()}) {
		t.Errorf("after GC %+v is held", s)
	}
	n.Must("ip", "netns", "del", "m1")
	n.Del(l, one)
	if s := n.Holds(); len(s.Leases) > 0 {
		t.Errorf("after DEL %+v is held", s)
	}
	n.Must(uninstall, "uninstall")
}
