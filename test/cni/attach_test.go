// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// noted is an IPAM plugin that notes the list of a GC.
const noted = `#!/bin/sh
cat >/run/noted/$CNI_COMMAND
[ $CNI_COMMAND != ADD ] || printf '{"cniVersion":"1.1.0","ips":[{"address":"%s/16","gateway":"10.240.0.1"}]}' $(cat /run/noted/address)
`

// What docker-run.sh attached is in no runtime's list. The GC of a runtime that has containers on the same network
// leaves it alone: the plugin's part of a GC, libcni's, which looks at its own files, and that of another IPAM. Also
// what an earlier build attached stays. detach still ends all of it.
func TestARuntimesGCLeavesWhatDockerRunAttached(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 6}, vnetsim.VMConfig{})
	n, plain := test.OnNode(vms[0]), test.OnHost(vms[1])
	n.Must("mount", "-t", "tmpfs", "lib", "/var/lib")
	// The runtime's libcni, with the directory that all runtimes have by default.
	n.CNI = libcni.NewCNIConfigWithCacheDir([]string{n.Dir}, fmt.Sprintf("/proc/%d/root/var/lib/cni", n.PidOne()), n.Exec())
	l := n.List("1.1.0", "azure", test.Azure(), `{"type":"portmap","capabilities":{"portMappings":true}}`)
	n.Must("sh", "-c", `mkdir -p /run/net.d && printf %s "$0" >/run/net.d/10-azure.conflist`, string(l.Bytes))
	holder := func(id string) (netns string) { // a process with a namespace, as docker-run.sh's holder has
		n.Must("sh", "-c", "ip netns add "+id+" && ip -n "+id+" link set lo up; nsenter --net=/run/netns/"+id+" setsid busybox sleep 1000 >/dev/null 2>&1 & echo $! >/run/"+id+".pid")
		return "/proc/" + n.Must("cat", "/run/"+id+".pid") + "/ns/net"
	}
	attach := func(id, netns string) netip.Addr {
		t.Helper()
		out, err := n.Try(filepath.Join(n.Dir, "azure-vnet"), "attach", "-name", "web", "-namespace", "shop", "/run/net.d/10-azure.conflist", id, netns)
		addr, bad := netip.ParseAddr(out)
		if err != nil || bad != nil {
			t.Fatalf("attach: %s %v", out, err)
		}
		return addr
	}
	reached := func(when string, addrs ...netip.Addr) {
		t.Helper()
		for _, addr := range addrs {
			if _, err := plain.Try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
				t.Errorf("%s: %s is not reached: %v", when, addr, err)
			}
		}
	}
	held := strings.Repeat("a1", 32)
	netns := holder(held)
	mine := attach(held, netns)
	if out, err := n.Try(filepath.Join(n.Dir, "azure-vnet"), "attach", "/run/net.d/10-azure.conflist", held, netns); err == nil {
		t.Errorf("attached twice: %s", out)
	}
	// As an earlier build attached: with the owner of a runtime's container, and in the runtime's libcni.
	early := strings.Repeat("e2", 32)
	earlier, _ := n.Add(l, &libcni.RuntimeConf{ContainerID: early, NetNS: holder(early), IfName: "eth0",
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "shop"}, {"K8S_POD_NAME", "old"}}})
	n.Must(filepath.Join(n.Dir, "azure-vnet"), "reconcile") // as the timer does, 30 s after an upgrade at most
	pod, _ := n.Add(l, n.Pod("pod"))
	gone, _ := n.Add(l, n.Pod("gone"))
	reached("before", mine, earlier, pod, gone)

	valid := []types.GCAttachment{{ContainerID: "pod", IfName: "eth0"}}
	if err := n.CNI.GCNetworkList(t.Context(), l, &libcni.GCArgs{ValidAttachments: valid}); err != nil {
		t.Error(err)
	}
	reached("after GC", mine, earlier, pod)
	if s := n.Holds(); len(s.Leases) != 3 || len(s.Attachments) != 3 {
		t.Errorf("after GC, which was to take %s alone, %+v is held", gone, s)
	}
	if err := n.CNI.GCNetworkList(t.Context(), l, &libcni.GCArgs{}); err != nil && !strings.Contains(err.Error(), "valid-attachments") {
		t.Error(err)
	}
	reached("after GC of a runtime without containers", mine, earlier)

	t.Run("another IPAM is told to keep them", func(t *testing.T) {
		n := n.In(t)
		n.Must("sh", "-c", `mkdir -p /run/noted && printf %s "$0" >/run/noted/noted && chmod +x /run/noted/noted`, noted)
		conf := test.Stdin("1.1.0", "azure", `{"type":"azure-vnet","ipam":{"type":"noted"}}`, map[string]any{"cni.dev/valid-attachments": valid})
		if out, err := n.Call("GC", "", "", conf, "CNI_PATH="+n.Dir+":/run/noted"); err != nil {
			t.Errorf("%s %v", out, err)
		}
		var told struct {
			Valid []types.GCAttachment `json:"cni.dev/valid-attachments"`
		}
		text := n.Must("cat", "/run/noted/GC")
		if err := json.Unmarshal([]byte(text), &told); err != nil || len(told.Valid) != 3 || !strings.Contains(text, held) || !strings.Contains(text, early) {
			t.Errorf("it was told %s: %v", text, err)
		}
	})
	for id, netns := range map[string]string{held: netns, early: ""} {
		for range 2 {
			if out, err := n.Try(filepath.Join(n.Dir, "azure-vnet"), "detach", "/run/net.d/10-azure.conflist", id, netns); err != nil {
				t.Errorf("detach: %s %v", out, err)
			}
		}
	}
	n.Bare()
	if left := n.Must("sh", "-c", "ls /run/azure-vnet/results /var/lib/cni/results; kill $(cat /run/*.pid)"); strings.Contains(left, held) || strings.Contains(left, early) {
		t.Errorf("left is %s", left)
	}
	test.NothingDropped(t, vnet, mine, earlier, pod)
}
