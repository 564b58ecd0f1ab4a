// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"fmt"
	"net"

	"azurevnet/bridge"
	"azurevnet/internal/cni"
)

// checkNames refuses a configuration with a bridge that cannot have its name, or a master that is neither a MAC nor the
// name of a link.
func checkNames(conf cni.Conf) error {
	if conf.Bridge != "" {
		if err := bridge.CheckBridgeName(conf.Bridge); err != nil {
			return fmt.Errorf("bridge %.40q: %w", conf.Bridge, err)
		}
	}
	if _, bad := net.ParseMAC(conf.Master); conf.Master != "" && bad != nil {
		if err := bridge.CheckLinkName(conf.Master); err != nil {
			return fmt.Errorf("master %.40q is neither a MAC nor a name: %w", conf.Master, err)
		}
	}
	return nil
}

// policyOf returns the policy that the configuration asks for.
func policyOf(conf cni.Conf) bridge.Policy {
	return bridge.Policy{SNAT: conf.SNAT, Direct: conf.Direct, NoMetadata: conf.NoMetadata}
}

// portsOf returns the published ports that the runtime asks for.
func portsOf(conf cni.Conf) (ports []bridge.PublishedPort) {
	for _, p := range conf.Ports {
		ports = append(ports, bridge.PublishedPort{Proto: p.Proto, HostAddr: p.HostAddr, HostPort: p.HostPort, Port: p.ContainerPort})
	}
	return ports
}
