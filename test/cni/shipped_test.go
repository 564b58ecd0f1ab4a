// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// shipped is the configuration of the CNI package, as libcni reads it.
func shipped(t *testing.T) *libcni.NetworkConfigList {
	t.Helper()
	l, err := libcni.ConfListFromFile(filepath.Join(test.Top, "cni", "10-azure.conflist"))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// Whoever has the documented file is served as whoever has ours, but for the
// versions that a new runtime may choose from.
func TestTheShippedConfigurationIsTheDocumentedOne(t *testing.T) {
	var was, is map[string]any
	if err := json.Unmarshal([]byte(documented), &was); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(shipped(t).Bytes, &is); err != nil {
		t.Fatal(err)
	}
	was["cniVersions"] = []any{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}
	if diff := cmp.Diff(was, is); diff != "" {
		t.Error(diff)
	}
	if v := shipped(t).CNIVersion; v != "1.1.0" {
		t.Errorf("libcni takes version %s", v)
	}
}

func TestTheShippedConfigurationThroughAllVerbs(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
	n, plain := test.OnNode(vms[0]), test.OnHost(vms[1])
	l, rt := shipped(t), n.Pod("web")
	rt.CapabilityArgs = map[string]any{"portMappings": []map[string]any{{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}}}
	port := test.Fetch(fmt.Sprintf("http://%s:8080/cgi-bin/who", n.Primary))
	if err := n.CNI.GetStatusNetworkList(t.Context(), l); err != nil {
		t.Errorf("STATUS: %v", err)
	}
	// Of each table what ADD of the first pod makes for all that follow.
	n.Add(l, rt)
	n.Del(l, rt)
	before := n.Must("sh", "-c", "iptables-save | grep -v '^[#:]' | sort; iptables-save | grep '^:CNI' | sort")
	n.Add(l, rt)
	n.Serve("web")
	if got, err := plain.Try(port...); err != nil {
		t.Errorf("the host port is not reached: %q %v", got, err)
	}
	if err := n.CNI.CheckNetworkList(t.Context(), l, rt); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	if err := n.CNI.GetStatusNetworkList(t.Context(), l); err != nil {
		t.Errorf("STATUS: %v", err)
	}
	stale := n.Pod("stale")
	n.Add(l, stale)
	if err := n.CNI.GCNetworkList(t.Context(), l, &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: "web", IfName: "eth0"}}}); err != nil {
		t.Errorf("GC: %v", err)
	}
	if s := n.Holds(); len(s.Leases) != 1 || len(s.Attachments) != 1 {
		t.Errorf("after GC %+v is held", s)
	}
	if got, err := plain.Try(port...); err != nil {
		t.Errorf("the host port is not reached after GC: %q %v", got, err)
	}
	n.Del(l, rt)
	n.Bare()
	if got, err := plain.Try(port...); err == nil {
		t.Errorf("the host port outlives its pod: %q", got)
	}
	if after := n.Must("sh", "-c", "iptables-save | grep -v '^[#:]' | sort; iptables-save | grep '^:CNI' | sort"); after != before {
		t.Errorf("left in iptables: %s", cmp.Diff(before, after))
	}
	test.NothingDropped(t, vnet, n.Primary)
}
