// Copyright (c) The azure-vnet authors. MIT licence.

package driver

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"azurevnet/bridge"
)

// Keys of the engine's protocol.
const (
	keyGeneric  = "com.docker.network.generic"
	keyIPv4     = "com.docker.network.enable_ipv4"
	keyIPv6     = "com.docker.network.enable_ipv6"
	keyInternal = "com.docker.network.internal"
)

// keyMode is the name that Azure's own plugin has for the option mode.
const keyMode = "com.microsoft.azure.network.mode"

// keyMTU is the name that Docker's own bridge has for the option mtu.
const keyMTU = "com.docker.network.driver.mtu"

// parsedOptions are the options of a network, as docker network create -o gives them.
type parsedOptions struct {
	master string      // NIC by name or MAC; empty: the one that has the subnet
	mode   bridge.Mode // empty: bridge.ModeBridge
	bridge string      // name; empty: see bridge.Spec
	mtu    int         // bytes; 0: the NIC's
	policy bridge.Policy
}

// optionParsers has, by name, each option of docker network create -o. A parser reads the option's value into o.
var optionParsers = map[string]func(o *parsedOptions, value string) error{
	"master": func(o *parsedOptions, v string) error { return parseNICName(&o.master, v) },
	"mode":   func(o *parsedOptions, v string) error { return parseMode(&o.mode, v) },
	keyMode:  func(o *parsedOptions, v string) error { return parseMode(&o.mode, v) },
	"bridge": func(o *parsedOptions, v string) error { return parseBridgeName(&o.bridge, v) },
	"mtu":    func(o *parsedOptions, v string) error { return parseMTU(&o.mtu, v) },
	keyMTU:   func(o *parsedOptions, v string) error { return parseMTU(&o.mtu, v) },
	"snat":   func(o *parsedOptions, v string) error { return parseOnOff(&o.policy.SNAT, v) },
	"direct": func(o *parsedOptions, v string) error { return parsePrefixes(&o.policy.Direct, v) },
	"metadata": func(o *parsedOptions, v string) error {
		on := true
		err := parseOnOff(&on, v)
		o.policy.NoMetadata = !on
		return err
	},
}

// leavingOptions are the options about what leaves a network by the NIC. They contradict --internal.
var leavingOptions = []string{"snat", "direct", "metadata"}

// parseNetworkOptions reads the Options of CreateNetwork.
func parseNetworkOptions(all map[string]any) (parsedOptions, error) {
	o := parsedOptions{policy: bridge.Policy{SNAT: true}}
	switch {
	case isTrue(all[keyIPv6]):
		return o, fmt.Errorf("--ipv6 is not served yet: create the network without it")
	case all[keyIPv4] != nil && !isTrue(all[keyIPv4]):
		return o, fmt.Errorf("a network without IPv4 is not served yet: leave out --ipv4=false")
	}
	if isTrue(all[keyInternal]) {
		o.policy = bridge.Policy{Internal: true}
	}
	if all[keyGeneric] == nil {
		return o, nil
	}
	generic, ok := all[keyGeneric].(map[string]any)
	if !ok {
		return o, fmt.Errorf("options (%s) are not a map of keys and values, as an engine sends", keyGeneric)
	}
	for _, key := range slices.Sorted(maps.Keys(generic)) {
		parse, known := optionParsers[key]
		if !known {
			return o, fmt.Errorf("unknown option %.80q: those of this driver are %s", key, strings.Join(slices.Sorted(maps.Keys(optionParsers)), ", "))
		}
		if o.policy.Internal && slices.Contains(leavingOptions, key) {
			return o, fmt.Errorf("-o %s has no meaning with --internal, since nothing leaves such a network: leave out one of them", key)
		}
		value, ok := generic[key].(string)
		if !ok {
			return o, fmt.Errorf("-o %s: its value is not a string: write it as -o KEY=VALUE", key)
		}
		if err := parse(&o, value); err != nil {
			return o, fmt.Errorf("-o %s=%.80s: %w", key, value, err)
		}
	}
	if o.mode == bridge.ModeTransparent && o.bridge != "" {
		return o, fmt.Errorf("-o bridge has no meaning with mode transparent, whose containers are in no bridge: leave out one of them")
	}
	return o, nil
}

// isTrue reads a flag of the engine's. Engines send a boolean, and old releases a string.
func isTrue(v any) bool {
	if s, ok := v.(string); ok {
		on, _ := strconv.ParseBool(s)
		return on
	}
	on, _ := v.(bool)
	return on
}

// parseBridgeName reads the name of a bridge.
func parseBridgeName(to *string, v string) error {
	*to = v
	return bridge.CheckBridgeName(v)
}

// parseMAC reads the MAC of an interface: six bytes.
func parseMAC(text string) (net.HardwareAddr, bool) {
	mac, err := net.ParseMAC(text)
	return mac, err == nil && len(mac) == 6
}

// parseNICName reads the name or the MAC of a NIC.
func parseNICName(to *string, v string) error {
	if mac, ok := parseMAC(v); ok {
		*to = mac.String()
		return nil
	}
	*to = v
	return bridge.CheckLinkName(v)
}

// parseMTU reads an MTU in bytes. IPv4 needs 68 (RFC 791), and a link can have 65535.
func parseMTU(to *int, v string) error {
	n, err := strconv.Atoi(v)
	if err != nil || n < 68 || n > 65535 {
		return fmt.Errorf("an MTU is a number of bytes from 68 to 65535")
	}
	*to = n
	return nil
}

// parseOnOff reads a switch.
func parseOnOff(to *bool, v string) error {
	if v != "on" && v != "off" {
		return fmt.Errorf("write on or off")
	}
	*to = v == "on"
	return nil
}

// parsePrefixes reads IPv4 prefixes with commas between them, sorts them, and drops duplicates.
func parsePrefixes(to *[]netip.Prefix, v string) error {
	for field := range strings.SplitSeq(v, ",") {
		p, err := netip.ParsePrefix(strings.TrimSpace(field))
		if err != nil || !p.Addr().Is4() {
			return fmt.Errorf("%.80q is not an IPv4 CIDR: write them as 10.0.0.0/8,192.168.0.0/16", field)
		}
		*to = append(*to, p.Masked())
	}
	slices.SortFunc(*to, netip.Prefix.Compare)
	*to = slices.Compact(*to)
	return nil
}

// parseMode reads a mode. The option has two names. If both are given, they must not contradict each other.
func parseMode(to *bridge.Mode, v string) error {
	m := bridge.Mode(v)
	switch {
	case !slices.Contains(bridge.Modes, m):
		return fmt.Errorf("write %s or %s", bridge.ModeBridge, bridge.ModeTransparent)
	case *to != "" && *to != m:
		return fmt.Errorf("%s asks for mode %s: leave out one of the two options", keyMode, *to)
	}
	*to = m
	return nil
}
