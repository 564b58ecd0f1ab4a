// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import "testing"

// TestTableOfAnInternalNetwork holds the table of a host that has one beside a
// plain network.
func TestTableOfAnInternalNetwork(t *testing.T) {
	in := exampleInput(1, 1, Policy{SNAT: true})
	for host, a := range exampleInput(2, 1, Policy{Internal: true}).endpoints {
		if a.bridge == "azure1" { // an address of its own, on the bridge that there is
			a.bridge = "azure0"
			in.endpoints[host] = a
		}
	}
	inNamespace(t, func() { checkTable(t, "internal", in) })
}
