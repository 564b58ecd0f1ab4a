// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"

	"azurevnet/internal/vnetsim"
)

func TestAPodIsAFirstClassCitizen(t *testing.T) {
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 8}, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	one, two := onNode(vms[0]), onNode(vms[1])
	plain := onHost(vms[2])

	t.Run("in every version of the specification", func(t *testing.T) {
		n := one.in(t)
		for _, v := range []string{"0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
			l, rt := n.list(v, "azure", azure()), n.pod("v"+v)
			addr, r := n.add(l, rt)
			if _, err := plain.try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
				t.Errorf("%s: not reached: %v", v, err)
			}
			if v >= "0.3.0" {
				if len(r.Interfaces) != 3 || r.Interfaces[0].Name != "azure0" || r.Interfaces[2].Sandbox != rt.NetNS || *r.IPs[0].Interface != 2 {
					t.Errorf("%s: the result is %+v", v, r)
				}
			}
			if err := n.cni.CheckNetworkList(t.Context(), l, rt); v >= "0.4.0" && err != nil {
				t.Errorf("%s: CHECK: %v", v, err)
			}
			if err := n.cni.GetStatusNetworkList(t.Context(), l); err != nil {
				t.Errorf("%s: STATUS: %v", v, err)
			}
			n.del(l, rt)
			n.del(l, rt)
			n.bare()
		}
	})
	_ = two
	_ = fmt.Sprint
	_ = errors.New
	_ = netip.Addr{}
	_ = libcni.GCArgs{}
	_ = types.Error{}
	_ = cmp.Diff
	clean(t, vnet)
}
