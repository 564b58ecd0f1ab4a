// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"maps"
	"net"
	"slices"

	"azurevnet/bridge/internal/conntrack"
	"azurevnet/bridge/internal/ruleset"
)

// tableFaults are the nft tables that are not what the host's endpoints need.
func tableFaults(v *view) (all []fault, err error) {
	different, err := v.rulesetConfig().Differences()
	if err != nil {
		return nil, err
	}
	for _, what := range different {
		all = append(all, fault{what: what, mend: func() error { return mendTables(v) }})
	}
	return all, nil
}

// mendTables makes the nft tables what the view asks for. It then deletes flows of datagrams. The kernel decides on
// SNAT and DNAT with the first packet of a flow. A UDP flow may have begun without the tables. It would go on without
// SNAT and DNAT until it is idle. After the deletion, the kernel decides again on the next datagram. TCP needs no such
// help: its clients begin a new connection by themselves.
func mendTables(v *view) error {
	c := v.rulesetConfig()
	if _, err := c.Sync(); err != nil {
		return err
	}
	var flows conntrack.Conn
	defer flows.Close()
	var all []conntrack.Flows
	for _, e := range c.Endpoints {
		all = append(all, conntrack.Flows{Untranslated: e.Addr})
		for _, p := range e.Ports {
			if p.UDP {
				all = append(all, conntrack.Flows{UDPPort: p.HostPort})
			}
		}
	}
	return flows.Delete(all...)
}

// rulesetConfig returns the plain values that the nft tables derive from.
func (v *view) rulesetConfig() ruleset.Config {
	c := ruleset.Config{}
	for _, mac := range v.macs() {
		if name := v.nicName(mac); name != "" {
			c.NICs = append(c.NICs, name)
		}
		c.Bridges = c.Bridges || v.state.NICs[mac].Bridge != ""
		c.Transparent = c.Transparent || v.state.NICs[mac].Transparent
		c.Subnets = append(c.Subnets, v.subnets(mac)...)
	}
	policies := maps.Clone(v.state.Policies)
	for _, e := range v.endpoints {
		policies[e.policy] = policyOf(v.state.Policies, e.policy)
	}
	for _, id := range slices.Sorted(maps.Keys(policies)) {
		n := policies[id].rulesetPolicy()
		n.ID = id // a policy that host.json has lost is taken for the default, and keeps its id
		c.Policies = append(c.Policies, n)
	}
	ports := v.publishedPorts()
	for _, e := range v.endpoints {
		c.Endpoints = append(c.Endpoints, v.rulesetEndpoint(e.alias, e.link.Name, ports[e.link.Name]))
	}
	return c
}

// rulesetEndpoint returns an endpoint as plain values for the nft tables. link is the name of its host end.
func (v *view) rulesetEndpoint(a alias, link string, ports []PublishedPort) ruleset.Endpoint {
	p := policyOf(v.state.Policies, a.policy)
	e := ruleset.Endpoint{Link: link, MAC: a.mac, Addr: a.addr.Addr(), NIC: v.nicName(a.nic), PolicyID: a.policy, Internal: p.Internal, NoMetadata: p.NoMetadata}
	if a.bridge != "" {
		e.BridgeMAC = net.HardwareAddr{}
		if mac, err := parseMAC(a.nic); err == nil {
			e.BridgeMAC = bridgeMAC(mac)
		}
	}
	for _, p := range notIdle(ports) {
		e.Ports = append(e.Ports, ruleset.Port{UDP: p.Proto == "udp", HostAddr: p.HostAddr, HostPort: p.HostPort, Port: p.Port})
	}
	return e
}
