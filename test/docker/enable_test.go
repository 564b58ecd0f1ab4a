// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"testing"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// TestANetworkRightAfterEnable: docker network create and docker run may follow docker
// plugin enable at once, though the source takes more than a second to answer.
func TestANetworkRightAfterEnable(t *testing.T) {
	t.Parallel() // it mostly waits
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{Secondaries: 2})
	for _, source := range []vnetsim.Source{vnetsim.HostAgent, vnetsim.IMDS} {
		if err := vnet.SetFault(source, vnetsim.Slow); err != nil {
			t.Fatal(err)
		}
	}
	for i, source := range []string{"SOURCE=wireserver", "SOURCE=auto"} {
		t.Run(source, func(t *testing.T) {
			if i > 0 && !test.Soaking {
				t.Skip("one much like it runs: make soak")
			}
			h := vms[i].In(t)
			run := []string{"run", "--rm", "--network", "azure", "busybox", "true"}
			h.WithPlugin(source)
			h.Network("azure")
			h.Docker(run...)

			h.Docker("plugin", "disable", "-f", test.Plugin)
			h.Must("sh", "-c", "rm /run/azure-vnet/leases.json") // as after a boot
			h.Docker("plugin", "enable", test.Plugin)
			h.Docker(run...)
			h.Network("second")

			h.Docker("network", "rm", "azure", "second")
			h.Empty()
		})
	}
	test.NothingDropped(t, vnet)
}
