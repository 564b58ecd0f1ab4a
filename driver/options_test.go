// Copyright (c) The azure-vnet authors. MIT licence.

package driver

import (
	"encoding/json"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"azurevnet/bridge"
)

func TestNetworkOptions(t *testing.T) {
	on := bridge.Policy{SNAT: true}
	for _, c := range []struct {
		name, json string
		want       parsedOptions
		err        string
	}{
		{"none", `{}`, parsedOptions{policy: on}, ""},
		{"an empty map", `{"com.docker.network.generic":{}}`, parsedOptions{policy: on}, ""},
		{"what an engine adds", `{"com.docker.network.enable_ipv4":true,"com.docker.network.enable_ipv6":false,"com.docker.network.internal":false,"com.docker.network.generic":null}`, parsedOptions{policy: on}, ""},
		{"all", `{"com.docker.network.generic":{"master":"eth1","bridge":"azure1","mtu":"1400","mode":"bridge","snat":"off","metadata":"off","direct":"192.168.0.0/16, 10.1.2.3/8,10.0.0.0/8","com.microsoft.azure.network.mode":"bridge"}}`,
			parsedOptions{"eth1", bridge.ModeBridge, "azure1", 1400, bridge.Policy{NoMetadata: true, Direct: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("192.168.0.0/16")}}}, ""},
		{"transparent", `{"com.docker.network.generic":{"mode":"transparent"}}`, parsedOptions{mode: bridge.ModeTransparent, policy: on}, ""},
		{"transparent, as Azure's own plugin names it", `{"com.docker.network.generic":{"com.microsoft.azure.network.mode":"transparent"}}`, parsedOptions{mode: bridge.ModeTransparent, policy: on}, ""},
		{"transparent and --internal", `{"com.docker.network.internal":true,"com.docker.network.generic":{"mode":"transparent"}}`, parsedOptions{mode: bridge.ModeTransparent, policy: bridge.Policy{Internal: true}}, ""},
		{"mtu, as Docker's bridge names it", `{"com.docker.network.generic":{"com.docker.network.driver.mtu":"1400"}}`, parsedOptions{mtu: 1400, policy: on}, ""},
		{"metadata=on", `{"com.docker.network.generic":{"metadata":"on"}}`, parsedOptions{policy: on}, ""},
		{"metadata=off", `{"com.docker.network.generic":{"metadata":"off"}}`, parsedOptions{policy: bridge.Policy{SNAT: true, NoMetadata: true}}, ""},
		{"--internal", `{"com.docker.network.internal":true}`, parsedOptions{policy: bridge.Policy{Internal: true}}, ""},
		{"a NIC by its MAC", `{"com.docker.network.generic":{"master":"00-0D-3A-04-75-98"}}`, parsedOptions{master: "00:0d:3a:04:75:98", policy: on}, ""},

		{"unknown", `{"com.docker.network.generic":{"color":"red"}}`, parsedOptions{}, `unknown option "color": those of this driver are bridge, com.docker.network.driver.mtu, com.microsoft.azure.network.mode, direct, master, metadata, mode, mtu, snat`},
		{"--ipv6", `{"com.docker.network.enable_ipv6":true}`, parsedOptions{}, "--ipv6 is not served yet: create the network without it"},
		{"--ipv6 of an old engine", `{"com.docker.network.enable_ipv6":"true"}`, parsedOptions{}, "--ipv6 is not served yet: create the network without it"},
		{"--internal with snat", `{"com.docker.network.internal":true,"com.docker.network.generic":{"snat":"off"}}`, parsedOptions{}, "-o snat has no meaning with --internal, since nothing leaves such a network: leave out one of them"},
		{"--ipv4=false", `{"com.docker.network.enable_ipv4":false}`, parsedOptions{}, "a network without IPv4 is not served yet: leave out --ipv4=false"},
		{"not a map", `{"com.docker.network.generic":[1]}`, parsedOptions{}, "options (com.docker.network.generic) are not a map of keys and values, as an engine sends"},
		{"not a string", `{"com.docker.network.generic":{"mtu":1400}}`, parsedOptions{}, "-o mtu: its value is not a string: write it as -o KEY=VALUE"},
		{"mtu", `{"com.docker.network.generic":{"mtu":"67"}}`, parsedOptions{}, "-o mtu=67: an MTU is a number of bytes from 68 to 65535"},
		{"mode", `{"com.docker.network.generic":{"mode":"tunnel"}}`, parsedOptions{}, "-o mode=tunnel: write bridge or transparent"},
		{"mode, as Azure's own plugin names it", `{"com.docker.network.generic":{"com.microsoft.azure.network.mode":"tunnel"}}`, parsedOptions{}, "-o com.microsoft.azure.network.mode=tunnel: write bridge or transparent"},
		{"two modes", `{"com.docker.network.generic":{"mode":"bridge","com.microsoft.azure.network.mode":"transparent"}}`, parsedOptions{}, "-o mode=bridge: com.microsoft.azure.network.mode asks for mode transparent: leave out one of the two options"},
		{"a transparent network with a bridge", `{"com.docker.network.generic":{"mode":"transparent","bridge":"azure0"}}`, parsedOptions{}, "-o bridge has no meaning with mode transparent, whose containers are in no bridge: leave out one of them"},
		{"metadata", `{"com.docker.network.generic":{"metadata":"no"}}`, parsedOptions{}, "-o metadata=no: write on or off"},
		{"--internal with metadata", `{"com.docker.network.internal":true,"com.docker.network.generic":{"metadata":"off"}}`, parsedOptions{}, "-o metadata has no meaning with --internal, since nothing leaves such a network: leave out one of them"},
		{"snat", `{"com.docker.network.generic":{"snat":"true"}}`, parsedOptions{}, "-o snat=true: write on or off"},
		{"direct, IPv6", `{"com.docker.network.generic":{"direct":"fd00::/8"}}`, parsedOptions{}, `-o direct=fd00::/8: "fd00::/8" is not an IPv4 CIDR: write them as 10.0.0.0/8,192.168.0.0/16`},
		{"direct, empty", `{"com.docker.network.generic":{"direct":""}}`, parsedOptions{}, `-o direct=: "" is not an IPv4 CIDR: write them as 10.0.0.0/8,192.168.0.0/16`},
		{"a path for a bridge", `{"com.docker.network.generic":{"bridge":"../x"}}`, parsedOptions{}, "-o bridge=../x: an interface name is 1 to 15 letters, digits, dots, dashes or underscores, and begins with a letter or a digit"},
		{"the name of an endpoint for a bridge", `{"com.docker.network.generic":{"bridge":"azv0"}}`, parsedOptions{}, "-o bridge=azv0: names that begin with azv or azc are those of containers' links: give the bridge another"},
		{"too long a name", `{"com.docker.network.generic":{"bridge":"a23456789012345x"}}`, parsedOptions{}, "-o bridge=a23456789012345x: an interface name is 1 to 15 letters, digits, dots, dashes or underscores, and begins with a letter or a digit"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := parseNetworkOptions(parse(t, c.json))
			checkError(t, err, c.err)
			if diff := cmp.Diff(c.want, got, cmp.AllowUnexported(parsedOptions{}), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); c.err == "" && diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestEndpointOptions(t *testing.T) {
	for _, c := range []struct {
		name, json string
		want       []bridge.PublishedPort
		err        string
	}{
		{"none", `{}`, nil, ""},
		{"what an engine adds", `{"com.docker.network.portmap":[],"com.docker.network.endpoint.exposedports":[{"Proto":6,"Port":80}],"com.docker.network.endpoint.macaddress":"AkIK8AAH"}`, nil, ""},
		{"no ports", `{"com.docker.network.portmap":null}`, nil, ""},
		{"not a list", `{"com.docker.network.portmap":7}`, nil, "published ports (com.docker.network.portmap): json: cannot unmarshal number into Go value of type []driver.portBinding"},
		{"-p 8080:80 -p 8080:80", `{"com.docker.network.portmap":[{"Proto":6,"IP":"","Port":80,"HostIP":"","HostPort":8080,"HostPortEnd":8080},{"Proto":6,"Port":80,"HostPort":8080,"HostPortEnd":8080}]}`,
			[]bridge.PublishedPort{{Proto: "tcp", HostPort: 8080, HostPortEnd: 8080, Port: 80}}, ""},
		{"-p 127.0.0.1:5000-5010:53/udp -P", `{"com.docker.network.portmap":[{"Proto":17,"Port":53,"HostIP":"127.0.0.1","HostPort":5000,"HostPortEnd":5010},{"Proto":6,"Port":80}]}`,
			[]bridge.PublishedPort{{Proto: "udp", HostAddr: netip.MustParseAddr("127.0.0.1"), HostPort: 5000, HostPortEnd: 5010, Port: 53}, {Proto: "tcp", Port: 80}}, ""},
		{"-p 80:80/sctp", `{"com.docker.network.portmap":[{"Proto":132,"Port":80,"HostPort":80}]}`, nil, "publish port 80: SCTP is not served: containers speak it at their own addresses, without -p"},
		{"no protocol", `{"com.docker.network.portmap":[{"Port":80}]}`, nil, "publish port 80: IP protocol 0 is not served: tcp and udp are"},
		{"-p [::1]:80:80", `{"com.docker.network.portmap":[{"Proto":6,"Port":80,"HostIP":"::1"}]}`, nil, "publish port 80: IPv6 is not served yet: give an IPv4 address of the host, or none"},
		{"not a host address", `{"com.docker.network.portmap":[{"Proto":6,"Port":80,"HostIP":"x"}]}`, nil, "publish port 80: \"x\" is not an address"},
		{"not a port", `{"com.docker.network.portmap":[{"Proto":6,"Port":70000}]}`, nil, "published ports (com.docker.network.portmap): json: cannot unmarshal number 70000 into Go struct field portBinding.Port of type uint16"},
		{"--driver-opt, a name", `{"com.docker.network.endpoint.ifname":"lan0"}`, nil, "--driver-opt com.docker.network.endpoint.ifname is not served: the engine names the interfaces of a plugin's networks eth0, eth1 and so on; leave it out"},
		{"--driver-opt", `{"qos":"high"}`, nil, `unknown --driver-opt "qos": this driver has none`},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := parseEndpointOptions(parse(t, c.json))
			checkError(t, err, c.err)
			if diff := cmp.Diff(c.want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func parse(t *testing.T, text string) (m map[string]any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &m); err != nil {
		t.Fatal(err)
	}
	return m
}

func checkError(t *testing.T, err error, want string) {
	t.Helper()
	got := ""
	if err != nil {
		got = err.Error()
	}
	if got != want {
		t.Errorf("error %q\nwant  %q", got, want)
	}
}

func FuzzNetworkOptions(f *testing.F) {
	f.Add(`{"com.docker.network.generic":{"master":"eth1","mtu":"1400","direct":"10.0.0.0/8"}}`)
	f.Add(`{"com.docker.network.generic":{"mtu":{}}}`)
	f.Add(`{"com.docker.network.generic":{"mode":"transparent","metadata":"off","com.microsoft.azure.network.mode":"bridge"}}`)
	f.Fuzz(func(t *testing.T, text string) {
		var m map[string]any
		if json.Unmarshal([]byte(text), &m) != nil {
			t.Skip()
		}
		o, err := parseNetworkOptions(m)
		if err != nil {
			return
		}
		for _, p := range o.policy.Direct {
			if p != p.Masked() || !p.Addr().Is4() {
				t.Errorf("direct %s", p)
			}
		}
		if o.bridge != "" && (bridge.CheckBridgeName(o.bridge) != nil || o.mode == bridge.ModeTransparent) {
			t.Errorf("bridge %q, mode %q", o.bridge, o.mode)
		}
		if o.mode != "" && !slices.Contains(bridge.Modes, o.mode) {
			t.Errorf("mode %q", o.mode)
		}
	})
}
