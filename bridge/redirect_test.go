// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"strings"
	"testing"

	"azurevnet/internal/vnetsim"
)

// Two containers of one bridge reach each other by the host. The kernel takes the bridge for a shorter way, and would
// tell the containers so by ICMP redirects. No container gets a redirect.
func TestNoContainerIsToldAShorterWay(t *testing.T) {
	t.Parallel()
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2})
	h := hosts[0]
	h.mustEnsure(h.spec(ModeBridge))
	from, to := h.running(0, ModeBridge, Policy{}), h.running(1, ModeBridge, Policy{})
	told := func() string {
		from.sh("busybox ping -q -c 3 -i 0.2 " + to.addr.String())
		return strings.TrimSpace(from.sh(`awk '/^Icmp:/ { if (!n++) { for (i = 1; i <= NF; i++) at[$i] = i } else print $at["InRedirects"] }' /proc/net/snmp`))
	}
	if n := told(); n != "0" {
		t.Errorf("the container got %s redirects", n)
	}
	h.sh("nft flush chain bridge azure_vnet output")
	if n := told(); n == "0" {
		t.Error("without the rule it gets none either, so this test shows nothing")
	}
}
