// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// kubernetesDoc is docs/kubernetes.md in one line.
func kubernetesDoc(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(test.Top, "docs", "kubernetes.md"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(strings.Fields(string(text)), " ")
}

// TestKubernetesDocNamesLinksAsTheyAre: policy engines, kube-proxy and firewalls are told to match the names that
// docs/kubernetes.md says. An omitted and an empty bridge have the same name.
func TestKubernetesDocNamesLinksAsTheyAre(t *testing.T) {
	t.Parallel()
	doc := kubernetesDoc(t)
	second := netip.MustParsePrefix("10.241.0.0/16")
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 3, NICs: []vnetsim.NICConfig{{Subnet: second, Secondaries: 2}}})
	n := test.OnNode(vms[0])
	index := strings.TrimSpace(n.Must("cat", "/sys/class/net/eth1/ifindex"))
	prefix := regexp.MustCompile("FELIX_INTERFACEPREFIX=([a-z]+)").FindStringSubmatch(doc)
	if prefix == nil {
		t.Fatal("the document does not say FELIX_INTERFACEPREFIX")
	}
	if want := "`azure0` for the primary NIC, `azure<ifindex>` for another"; !strings.Contains(doc, want) {
		t.Errorf("the document does not say %q", want)
	}
	hostEnd := regexp.MustCompile("^" + prefix[1] + "[0-9a-f]{11}$")
	for i, c := range []struct {
		keys   []string
		bridge string // empty: none
	}{
		{nil, "azure0"},
		{[]string{`"bridge":""`}, "azure0"},
		{[]string{`"master":"eth1"`}, "azure" + index},
		{[]string{`"master":"eth1"`, `"bridge":""`}, "azure" + index},
		{[]string{`"mode":"transparent"`, `"bridge":"azure0"`}, ""},
	} {
		id := fmt.Sprintf("pod%d", i)
		_, r := n.Add(n.List("1.1.0", "azure", test.Azure(c.keys...)), n.Pod(id))
		var links []string
		for _, l := range r.Interfaces {
			if l.Sandbox == "" {
				links = append(links, l.Name)
			}
		}
		host := links[len(links)-1]
		if bridges := strings.Join(links[:len(links)-1], " "); bridges != c.bridge || !hostEnd.MatchString(host) {
			t.Errorf("%q: the host's links are %q", c.keys, links)
		}
		by := links[0] // the link by which the host sees what the pod sends
		table := fmt.Sprintf("seen%d", i)
		n.Must("nft", fmt.Sprintf(`add table ip %[1]s; add chain ip %[1]s c { type filter hook prerouting priority 0 ; }; add rule ip %[1]s c ip saddr %[2]s iifname %[3]q counter`, table, r.IPs[0].Address.IP, by))
		_, _ = test.InPod(n, id, netip.Addr{}).Try("ping", "-c", "1", "-W", "2", n.Primary.String())
		if seen := n.Must("nft", "list", "table", "ip", table); strings.Contains(seen, "packets 0 ") {
			t.Errorf("%q: what the pod sends does not come by %s: %s", c.keys, by, seen)
		}
	}
}

// TestAPolicyEngineThatMatchesAddressesSeesPods is what kube-network-policies does, in both modes: an nftables chain on
// postrouting, of priority 95, that matches the addresses of pods. It sees traffic between pods of one node, and what a pod
// sends to the internet with the pod's address: SNAT comes later.
func TestAPolicyEngineThatMatchesAddressesSeesPods(t *testing.T) {
	t.Parallel()
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 4})
	n := test.OnNode(vms[0])
	for _, mode := range []string{"bridge", "transparent"} {
		t.Run(mode, func(t *testing.T) {
			n := n.In(t)
			l := n.List("1.1.0", "azure", test.Azure(`"mode":"`+mode+`"`))
			a, b := "a-"+mode, "b-"+mode
			from, _ := n.Add(l, n.Pod(a))
			to, _ := n.Add(l, n.Pod(b))
			ping := func(addr netip.Addr) bool {
				_, err := test.InPod(n, a, from).Try("ping", "-c", "1", "-W", "1", addr.String())
				return err == nil
			}
			engine := func(rule string) (end func()) {
				n.Must("nft", "add table inet engine; add chain inet engine postrouting { type filter hook postrouting priority srcnat - 5 ; }; add rule inet engine postrouting "+rule+" drop")
				return func() { n.Must("nft", "delete table inet engine") }
			}
			for _, to := range []netip.Addr{to, vnetsim.InternetAddr} {
				if !ping(to) {
					t.Errorf("%s is not reached without a policy", to)
				}
				for _, rule := range []string{"ip saddr " + from.String(), "ip daddr " + to.String()} {
					end := engine(rule)
					if ping(to) {
						t.Errorf("%s is reached although the engine drops %s", to, rule)
					}
					end()
				}
			}
		})
	}
}

// TestDisableGCLeavesWhatAnotherRuntimeAttached: a runtime's libcni that finds the key in the list asks nobody to collect.
// Without the key it takes the other runtime's container for garbage.
func TestDisableGCLeavesWhatAnotherRuntimeAttached(t *testing.T) {
	t.Parallel()
	if doc := kubernetesDoc(t); !strings.Contains(doc, `"disableGC": true`) {
		t.Error("the document does not say disableGC")
	}
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2})
	n := test.OnNode(vms[0])
	l := n.List("1.1.0", "azure", test.Azure())
	n.Add(l, n.Pod("theirs"))
	other := libcni.NewCNIConfigWithCacheDir([]string{n.Dir}, t.TempDir(), n.Exec())
	disabled, err := libcni.NetworkConfFromBytes(slices.Concat([]byte(`{"disableGC": true,`), l.Bytes[1:]))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		list *libcni.NetworkConfigList
		left int
	}{{disabled, 1}, {l, 0}} {
		if err := other.GCNetworkList(t.Context(), c.list, &libcni.GCArgs{}); err != nil {
			t.Error(err)
		}
		if s := n.Holds(); len(s.Leases) != c.left {
			t.Errorf("disableGC %v: %+v is held, and %d leases are wanted", c.list.DisableGC, s, c.left)
		}
	}
}
