// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"context"
	"os"
	"testing"
	"time"
)

// newVNet starts a VNet that ends with the test, with a VM for each config.
func newVNet(t *testing.T, cfgs ...VMConfig) (*VNet, []*VM) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make namespaces")
	}
	v, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := v.Close(); err != nil {
			t.Error(err)
		}
	})
	var vms []*VM
	for _, cfg := range cfgs {
		vm, err := v.AddVM(cfg)
		if err != nil {
			t.Fatal(err)
		}
		vms = append(vms, vm)
	}
	return v, vms
}

// run fails the test if the command fails, and returns its output.
func mustRun(t *testing.T, n *Namespace, name string, arg ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	out, err := n.Run(ctx, name, arg...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestPing(t *testing.T) {
	v, vms := newVNet(t, VMConfig{Secondaries: 2}, VMConfig{})
	for _, a := range []string{"addr", "route", "-d link"} {
		_ = a
	}
	t.Log(mustRun(t, vms[0].Namespace, "sh", "-c", "ip addr; ip route; ps ax; mount; cat /etc/resolv.conf; hostname; cat /proc/self/cgroup"))
	t.Log(mustRun(t, vms[0].Namespace, "busybox", "ping", "-c1", "-W1", vms[1].Primary.String()))
	t.Log(mustRun(t, vms[0].Namespace, "busybox", "ping", "-c1", "-W1", "203.0.113.10"))
	t.Log(v.Violations())
}
