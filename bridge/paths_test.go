// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"fmt"
	"testing"

	"azurevnet/internal/vnetsim"
)

// Containers reach all that a VM reaches and are reached, under any FORWARD policy and with or without
// bridge-nf-call-iptables; the internet with SNAT only; the host agent's HTTP never. Whatever a container
// sends, the fabric sees nothing that it has to refuse.
func TestContainersOnTheVNet(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{Secondaries: 1})
		h1, h2 := hosts[0], hosts[1]
		for _, h := range hosts {
			h.mustEnsure(h.spec(mode))
		}
		on, off := h1.running(0, mode, Policy{SNAT: true}), h1.running(1, mode, Policy{})
		plain := h1.running(2, mode, Policy{SNAT: true, Direct: prefixes("10.240.0.0/16")})
		blind := h1.running(3, mode, Policy{SNAT: true, NoMetadata: true})
		far := h2.running(0, mode, Policy{SNAT: true})
		for _, call := range callIptables(mode) {
			for _, policy := range []string{"ACCEPT", "DROP"} {
				t.Run(fmt.Sprintf("forward %s call-iptables %s", policy, call), func(t *testing.T) {
					for _, h := range hosts {
						h.run("iptables-nft", "-P", "FORWARD", policy)
						h.sh("echo " + call + " >/proc/sys/net/bridge/bridge-nf-call-iptables")
						h.reconcile()
					}
					checkPaths(t, on, off, plain, blind, far)
				})
			}
		}
		for _, h := range hosts {
			h.whole("at the end")
		}
		checkFabric(t, v, on.addr, off.addr, plain.addr, blind.addr, far.addr, h1.Primary, h2.Primary)
	})
}

func checkPaths(t *testing.T, on, off, plain, blind, far *container) {
	c := &checks{t: t}
	defer c.wait.Wait()
	for _, from := range []*container{on, off, plain, blind} {
		c.pings(true, from, on.addr, off.addr, plain.addr, far.addr, on.Primary, far.Primary, vnetsim.HostAgentAddr)
		c.pings(true, far, from.addr)
		c.hostPings(true, from.host, from.addr)
		c.hostPings(true, far.host, from.addr)
		c.expect(false, from.name+" fetches from the host agent", func() bool { return from.try("curl -s -m 1 http://168.63.129.16/") })
		c.expect(true, from.name+" asks the host agent's DNS", func() bool { return from.try("busybox nslookup internet.test 168.63.129.16") })
	}
	const imds = "curl -s -m 2 -H Metadata:true 'http://169.254.169.254/metadata/instance/network?api-version=2021-02-01'"
	for _, from := range []*container{on, plain, blind} {
		c.expect(true, from.name+" is its VM to the internet", func() bool { return from.try("curl -s -m 5 http://203.0.113.10/ | grep -qx " + from.Public.String()) })
		c.expect(from != blind, from.name+" asks IMDS", func() bool { return from.try(imds) })
	}
	// As it is it leaves, which Azure drops without calling it foul.
	c.pings(false, off, vnetsim.InternetAddr, vnetsim.IMDSAddr)
}
