// Copyright (c) The azure-vnet authors. MIT licence.

package driver

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"azurevnet/bridge"
)

// Keys of the engine's protocol.
const (
	keyPortMap    = "com.docker.network.portmap"
	engineOptions = "com.docker.network." // begins the endpoint options that the engine serves itself
	keyIfName     = "com.docker.network.endpoint.ifname"
)

// portBinding is a published port as the engine sends it with an endpoint (its types.PortBinding).
type portBinding struct {
	Proto       uint8
	Port        uint16
	HostIP      string
	HostPort    uint16 // 0: any free one
	HostPortEnd uint16 // the last port of a range, any of which will do; 0: no range
}

// parseEndpointOptions reads the published ports from the Options of CreateEndpoint. It refuses a --driver-opt that the
// engine does not serve itself, because nobody would serve it.
func parseEndpointOptions(all map[string]any) ([]bridge.PublishedPort, error) {
	for _, key := range slices.Sorted(maps.Keys(all)) {
		if !strings.HasPrefix(key, engineOptions) {
			return nil, fmt.Errorf("unknown --driver-opt %.80q: this driver has none", key)
		}
		if key == keyIfName {
			return nil, fmt.Errorf("--driver-opt %s is not served: the engine names the interfaces of a plugin's networks eth0, eth1 and so on; leave it out", key)
		}
	}
	if all[keyPortMap] == nil {
		return nil, nil
	}
	text, err := json.Marshal(all[keyPortMap])
	if err != nil {
		return nil, fmt.Errorf("published ports (%s): %w", keyPortMap, err)
	}
	var asked []portBinding
	if err := json.Unmarshal(text, &asked); err != nil {
		return nil, fmt.Errorf("published ports (%s): %w", keyPortMap, err)
	}
	var ports []bridge.PublishedPort
	for _, b := range asked {
		p, err := b.bridgePort()
		if err != nil {
			return nil, fmt.Errorf("publish port %d: %w", b.Port, err)
		}
		if !slices.Contains(ports, p) || p.HostPort == 0 {
			ports = append(ports, p)
		}
	}
	return ports, nil
}

// bridgePort returns the published port as package bridge takes it.
func (b portBinding) bridgePort() (bridge.PublishedPort, error) {
	p := bridge.PublishedPort{HostPort: b.HostPort, HostPortEnd: b.HostPortEnd, Port: b.Port}
	switch b.Proto {
	case unix.IPPROTO_TCP:
		p.Proto = "tcp"
	case unix.IPPROTO_UDP:
		p.Proto = "udp"
	case unix.IPPROTO_SCTP:
		return p, fmt.Errorf("SCTP is not served: containers speak it at their own addresses, without -p")
	default:
		return p, fmt.Errorf("IP protocol %d is not served: tcp and udp are", b.Proto)
	}
	if b.HostIP != "" {
		addr, err := netip.ParseAddr(b.HostIP)
		if err != nil {
			return p, fmt.Errorf("%.80q is not an address", b.HostIP)
		}
		if !addr.Unmap().Is4() {
			return p, fmt.Errorf("IPv6 is not served yet: give an IPv4 address of the host, or none")
		}
		p.HostAddr = addr.Unmap()
	}
	return p, nil
}

// portsText returns published ports as docker ps writes them.
func portsText(ports []bridge.PublishedPort) string {
	var words []string
	for _, p := range ports {
		words = append(words, p.String())
	}
	return strings.Join(words, ", ")
}
