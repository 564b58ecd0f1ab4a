// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// After a power cut a runtime makes its pods anew, with new ids, and only then
// deletes the old ones: without a namespace, and with the result that libcni kept
// on the disk. One address went to two pods where that result was believed.
func TestLateDELsAfterAReboot(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	n, plain := test.OnNode(vms[0]), test.OnHost(vms[1])
	l := n.List("1.1.0", "azure", test.Azure())
	const pods = 3
	had := map[netip.Addr]bool{}
	for i := range pods {
		addr, _ := n.Add(l, n.Pod(fmt.Sprintf("old%d", i)))
		had[addr] = true
	}
	if err := vms[0].PowerCut(); err != nil {
		t.Fatal(err)
	}
	if err := vms[0].Boot(); err != nil {
		t.Fatal(err)
	}
	n.Must("mount", "-t", "tmpfs", "log", "/var/log")
	var now []netip.Addr
	for i := range pods {
		addr, _ := n.Add(l, n.Pod(fmt.Sprintf("new%d", i)))
		if !had[addr] {
			t.Errorf("new%d has %s, which no old pod had: then this proves nothing", i, addr)
		}
		now = append(now, addr)
	}
	before := n.Holds()
	for i := range pods {
		rt := &libcni.RuntimeConf{ContainerID: fmt.Sprintf("old%d", i), IfName: "eth0"}
		if prev, err := n.CNI.GetNetworkListCachedResult(l, rt); err != nil || prev == nil {
			t.Errorf("libcni kept no result of %s: %v", rt.ContainerID, err)
		}
		for range 2 { // the second time without it
			n.Del(l, rt)
		}
	}
	valid := &libcni.GCArgs{}
	for i := range pods {
		valid.ValidAttachments = append(valid.ValidAttachments, types.GCAttachment{ContainerID: fmt.Sprintf("new%d", i), IfName: "eth0"})
	}
	if err := n.CNI.GCNetworkList(t.Context(), l, valid); err != nil {
		t.Errorf("GC: %v", err)
	}
	if after := n.Holds(); !slices.Equal(before.Leases, after.Leases) || !slices.Equal(before.Attachments, after.Attachments) || len(after.Leases) != pods {
		t.Errorf("held were %+v, and now %+v", before, after)
	}
	for _, addr := range now {
		if _, err := plain.Try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
			t.Errorf("%s is not reached: %v", addr, err)
		}
	}
	if addr, _ := n.Add(l, n.Pod("more")); slices.Contains(now, addr) {
		t.Errorf("%s is lent twice", addr)
	}
	test.NothingDropped(t, vnet, now...)
}
