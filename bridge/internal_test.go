// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"testing"
)

// TestTablesOfSomeHosts holds the tables of hosts that have more than plain
// networks of their one NIC.
func TestTablesOfSomeHosts(t *testing.T) {
	internal := exampleInput(1, 1, Policy{SNAT: true})
	for host, a := range exampleInput(2, 1, Policy{Internal: true}).endpoints {
		if a.bridge == "azure1" { // an address of its own, on the bridge that there is
			a.bridge = "azure0"
			internal.endpoints[host] = a
		}
	}
	second := exampleInput(2, 1, Policy{SNAT: true})
	second.egress = map[string]bool{"azure1": true}
	for name, in := range map[string]tableInput{"internal": internal, "second-nic": second} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inNamespace(t, func() { checkTable(t, name, in) })
		})
	}
}
