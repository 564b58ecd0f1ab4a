// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"

	"azurevnet/internal/vnetsim"
)

// says tells whether err is of a plugin, with that code and text.
func says(err error, code uint, text string) bool {
	var told *types.Error
	return errors.As(err, &told) && told.Code == code && strings.Contains(told.Error(), text)
}

func TestANodeIsNotReadyOnlyWhenItDeservesIt(t *testing.T) {
	t.Parallel() // it mostly waits
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{}, vnetsim.VMConfig{Secondaries: 2, HoldSecondaries: true})
	status := func(n node, l *libcni.NetworkConfigList) error { return n.cni.GetStatusNetworkList(n.t.Context(), l) }

	t.Run("no source answers", func(t *testing.T) {
		n := onNode(vms[0].in(t))
		l := n.list("1.1.0", "azure", `{"type":"azure-vnet","ipam":{"type":"azure-vnet-ipam","queryInterval":"1"}}`)
		for _, s := range []vnetsim.Source{vnetsim.HostAgent, vnetsim.IMDS} {
			if err := vms[0].SetFault(s, vnetsim.BlackHole); err != nil {
				t.Fatal(err)
			}
		}
		pod := n.pod("early")
		start := time.Now()
		_, _, err := n.tryAdd(l, pod)
		if took := time.Since(start); took > 10*time.Second || !says(err, 11, "no answer") {
			t.Errorf("after %v ADD says: %v", took, err)
		}
		if err := status(n, l); !says(err, 50, "no answer") {
			t.Errorf("STATUS says: %v", err)
		}
		if err := vms[0].SetFault(vnetsim.HostAgent, vnetsim.Healthy); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the node is ready again", 15*time.Second, func() bool { return status(n, l) == nil })
		n.add(l, pod)
		if err := vms[0].SetFault(vnetsim.HostAgent, vnetsim.BlackHole); err != nil {
			t.Fatal(err)
		}
		second := n.pod("second")
		n.add(l, second) // what is known is lent on
		if err := status(n, l); err != nil {
			t.Errorf("with all addresses in use STATUS says: %v", err)
		}
		if _, _, err := n.tryAdd(l, n.pod("third")); !says(err, 11, "2 held") {
			t.Errorf("with all addresses in use ADD says: %v", err)
		}
		n.del(l, pod)
		n.del(l, second)
		n.bare()
	})
	t.Run("there are no addresses to lend", func(t *testing.T) {
		n := onNode(vms[1].in(t))
		l := n.list("1.1.0", "azure", azure())
		if err := status(n, l); !says(err, 50, "az network nic ip-config create") {
			t.Errorf("STATUS says: %v", err)
		}
		if _, _, err := n.tryAdd(l, n.pod("p")); !says(err, 11, "az network nic ip-config create") {
			t.Errorf("ADD says: %v", err)
		}
	})
	t.Run("the host holds them all, as cloud-init has it", func(t *testing.T) {
		n := onNode(vms[2].in(t))
		l := n.list("1.1.0", "azure", azure())
		if err := status(n, l); !says(err, 50, "reclaim") {
			t.Errorf("STATUS says: %v", err)
		}
		pod := n.pod("p")
		if _, _, err := n.tryAdd(l, pod); !says(err, 11, "reclaim") {
			t.Errorf("ADD says: %v", err)
		}
		l = n.list("1.1.0", "azure", azure(`"reclaim":"on"`))
		if err := status(n, l); err != nil {
			t.Errorf("with reclaim, STATUS says: %v", err)
		}
		addr, _ := n.add(l, pod)
		if _, err := onHost(vms[1]).try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
			t.Errorf("not reached: %v", err)
		}
		n.del(l, pod)
		clean(t, vnet, addr)
	})
}
