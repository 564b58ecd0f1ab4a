// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

func TestANodeIsNotReadyOnlyWhenItDeservesIt(t *testing.T) {
	t.Parallel() // it mostly waits
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{}, vnetsim.VMConfig{Secondaries: 2, HoldSecondaries: true})
	status := func(n test.Node, l *libcni.NetworkConfigList) error {
		return n.CNI.GetStatusNetworkList(n.T.Context(), l)
	}

	t.Run("no source answers", func(t *testing.T) {
		n := test.OnNode(vms[0].In(t))
		l := n.List("1.1.0", "azure", `{"type":"azure-vnet","ipam":{"type":"azure-vnet-ipam","queryInterval":"1"}}`)
		for _, s := range []vnetsim.Source{vnetsim.HostAgent, vnetsim.IMDS} {
			if err := vms[0].SetFault(s, vnetsim.BlackHole); err != nil {
				t.Fatal(err)
			}
		}
		pod := n.Pod("early")
		start := time.Now()
		_, _, err := n.TryAdd(l, pod)
		if took := time.Since(start); took > 10*time.Second || !test.Says(err, 11, "no answer") {
			t.Errorf("after %v ADD says: %v", took, err)
		}
		if err := status(n, l); !test.Says(err, 50, "no answer") {
			t.Errorf("STATUS says: %v", err)
		}
		if err := vms[0].SetFault(vnetsim.HostAgent, vnetsim.Healthy); err != nil {
			t.Fatal(err)
		}
		test.Eventually(t, "the node is ready again", 15*time.Second, func() bool { return status(n, l) == nil })
		n.Add(l, pod)
		if err := vms[0].SetFault(vnetsim.HostAgent, vnetsim.BlackHole); err != nil {
			t.Fatal(err)
		}
		second := n.Pod("second")
		n.Add(l, second) // what is known is lent on
		if err := status(n, l); err != nil {
			t.Errorf("with all addresses in use STATUS says: %v", err)
		}
		if _, _, err := n.TryAdd(l, n.Pod("third")); !test.Says(err, 11, "2 held") {
			t.Errorf("with all addresses in use ADD says: %v", err)
		}
		n.Del(l, pod)
		n.Del(l, second)
		n.Bare()
	})
	t.Run("there are no addresses to lend", func(t *testing.T) {
		n := test.OnNode(vms[1].In(t))
		l := n.List("1.1.0", "azure", test.Azure())
		if err := status(n, l); !test.Says(err, 50, "az network nic ip-config create") {
			t.Errorf("STATUS says: %v", err)
		}
		if _, _, err := n.TryAdd(l, n.Pod("p")); !test.Says(err, 11, "az network nic ip-config create") {
			t.Errorf("ADD says: %v", err)
		}
	})
	t.Run("the host holds them all, as cloud-init has it", func(t *testing.T) {
		n := test.OnNode(vms[2].In(t))
		l := n.List("1.1.0", "azure", test.Azure())
		if err := status(n, l); !test.Says(err, 50, "reclaim") {
			t.Errorf("STATUS says: %v", err)
		}
		pod := n.Pod("p")
		if _, _, err := n.TryAdd(l, pod); !test.Says(err, 11, "reclaim") {
			t.Errorf("ADD says: %v", err)
		}
		l = n.List("1.1.0", "azure", test.Azure(`"reclaim":"on"`))
		if err := status(n, l); err != nil {
			t.Errorf("with reclaim, STATUS says: %v", err)
		}
		addr, _ := n.Add(l, pod)
		if _, err := test.OnHost(vms[1]).Try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
			t.Errorf("not reached: %v", err)
		}
		n.Del(l, pod)
		test.NothingDropped(t, vnet, addr)
	})
}
