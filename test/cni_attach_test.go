// Copyright (c) The azure-vnet authors. MIT licence.

package test

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
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 6}, vnetsim.VMConfig{})
	n, plain := onNode(vms[0]), onHost(vms[1])
	n.must("mount", "-t", "tmpfs", "lib", "/var/lib")
	// The runtime's libcni, with the directory that all runtimes have by default.
	n.cni = libcni.NewCNIConfigWithCacheDir([]string{n.dir}, fmt.Sprintf("/proc/%d/root/var/lib/cni", n.PidOne()), n.exec())
	l := n.list("1.1.0", "azure", azure(), `{"type":"portmap","capabilities":{"portMappings":true}}`)
	n.must("sh", "-c", `mkdir -p /run/net.d && printf %s "$0" >/run/net.d/10-azure.conflist`, string(l.Bytes))
	holder := func(id string) (netns string) { // a process with a namespace, as docker-run.sh's holder has
		n.must("sh", "-c", "ip netns add "+id+" && ip -n "+id+" link set lo up; nsenter --net=/run/netns/"+id+" setsid busybox sleep 1000 >/dev/null 2>&1 & echo $! >/run/"+id+".pid")
		return "/proc/" + n.must("cat", "/run/"+id+".pid") + "/ns/net"
	}
	attach := func(id, netns string) netip.Addr {
		t.Helper()
		out, err := n.try(filepath.Join(n.dir, "azure-vnet"), "attach", "-name", "web", "-namespace", "shop", "/run/net.d/10-azure.conflist", id, netns)
		addr, bad := netip.ParseAddr(out)
		if err != nil || bad != nil {
			t.Fatalf("attach: %s %v", out, err)
		}
		return addr
	}
	reached := func(when string, addrs ...netip.Addr) {
		t.Helper()
		for _, addr := range addrs {
			if _, err := plain.try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
				t.Errorf("%s: %s is not reached: %v", when, addr, err)
			}
		}
	}
	held := strings.Repeat("a1", 32)
	netns := holder(held)
	mine := attach(held, netns)
	if out, err := n.try(filepath.Join(n.dir, "azure-vnet"), "attach", "/run/net.d/10-azure.conflist", held, netns); err == nil {
		t.Errorf("attached twice: %s", out)
	}
	// As an earlier build attached: with the owner of a runtime's container, and in the runtime's libcni.
	early := strings.Repeat("e2", 32)
	earlier, _ := n.add(l, &libcni.RuntimeConf{ContainerID: early, NetNS: holder(early), IfName: "eth0",
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "shop"}, {"K8S_POD_NAME", "old"}}})
	n.must(filepath.Join(n.dir, "azure-vnet"), "reconcile") // as the timer does, 30 s after an upgrade at most
	pod, _ := n.add(l, n.pod("pod"))
	gone, _ := n.add(l, n.pod("gone"))
	reached("before", mine, earlier, pod, gone)

	valid := []types.GCAttachment{{ContainerID: "pod", IfName: "eth0"}}
	if err := n.cni.GCNetworkList(t.Context(), l, &libcni.GCArgs{ValidAttachments: valid}); err != nil {
		t.Error(err)
	}
	reached("after GC", mine, earlier, pod)
	if s := n.holds(); len(s.Leases) != 3 || len(s.Attachments) != 3 {
		t.Errorf("after GC, which was to take %s alone, %+v is held", gone, s)
	}
	if err := n.cni.GCNetworkList(t.Context(), l, &libcni.GCArgs{}); err != nil && !strings.Contains(err.Error(), "valid-attachments") {
		t.Error(err)
	}
	reached("after GC of a runtime without containers", mine, earlier)

	t.Run("another IPAM is told to keep them", func(t *testing.T) {
		n := n.in(t)
		n.must("sh", "-c", `mkdir -p /run/noted && printf %s "$0" >/run/noted/noted && chmod +x /run/noted/noted`, noted)
		conf := stdin("1.1.0", "azure", `{"type":"azure-vnet","ipam":{"type":"noted"}}`, map[string]any{"cni.dev/valid-attachments": valid})
		if out, err := n.call("GC", "", "", conf, "CNI_PATH="+n.dir+":/run/noted"); err != nil {
			t.Errorf("%s %v", out, err)
		}
		var told struct {
			Valid []types.GCAttachment `json:"cni.dev/valid-attachments"`
		}
		text := n.must("cat", "/run/noted/GC")
		if err := json.Unmarshal([]byte(text), &told); err != nil || len(told.Valid) != 3 || !strings.Contains(text, held) || !strings.Contains(text, early) {
			t.Errorf("it was told %s: %v", text, err)
		}
	})
	for id, netns := range map[string]string{held: netns, early: ""} {
		for range 2 {
			if out, err := n.try(filepath.Join(n.dir, "azure-vnet"), "detach", "/run/net.d/10-azure.conflist", id, netns); err != nil {
				t.Errorf("detach: %s %v", out, err)
			}
		}
	}
	n.bare()
	if left := n.must("sh", "-c", "ls /run/azure-vnet/results /var/lib/cni/results; kill $(cat /run/*.pid)"); strings.Contains(left, held) || strings.Contains(left, early) {
		t.Errorf("left is %s", left)
	}
	clean(t, vnet, mine, earlier, pod)
}
