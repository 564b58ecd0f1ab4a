// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"testing"

	"azurevnet/internal/vnetsim"
)

// TestANetworkRightAfterEnable: docker network create and docker run may follow docker
// plugin enable at once, though the source takes more than a second to answer.
func TestANetworkRightAfterEnable(t *testing.T) {
	t.Parallel() // it mostly waits
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{Secondaries: 2})
	for _, source := range []vnetsim.Source{vnetsim.HostAgent, vnetsim.IMDS} {
		if err := vnet.SetFault(source, vnetsim.Slow); err != nil {
			t.Fatal(err)
		}
	}
	for i, source := range []string{"SOURCE=wireserver", "SOURCE=auto"} {
		t.Run(source, func(t *testing.T) {
			h := vms[i].in(t)
			run := []string{"run", "--rm", "--network", "azure", "busybox", "true"}
			h.withPlugin(source)
			h.network("azure")
			h.docker(run...)

			h.docker("plugin", "disable", "-f", plugin)
			h.must("sh", "-c", "rm /run/azure-vnet/leases.json") // as after a boot
			h.docker("plugin", "enable", plugin)
			h.docker(run...)
			h.network("second")

			h.docker("network", "rm", "azure", "second")
			h.empty()
		})
	}
	clean(t, vnet)
}
