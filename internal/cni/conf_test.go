// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

const least = `{"name":"azure","ipam":{"type":"azure-vnet-ipam"}`

var mainPlugin = Plugin{Main: true}

// asLeast is what the least configuration means, with a change.
func asLeast(change func(*Conf)) Conf {
	c := Conf{CNIVersion: "0.1.0", Network: "azure", SNAT: true, IPAM: IPAM{Type: IPAMType, Source: "auto"}}
	change(&c)
	return c
}

func TestConfigurations(t *testing.T) {
	for _, tt := range []struct {
		name, conf, args string
		want             Conf
	}{
		{"the least", least + `}`, "", asLeast(func(*Conf) {})},
		{"keys that a runtime adds", least + `,"capabilities":{"x":true},"disableIpvs":false,"ipsToRouteViaHost":["1.2.3.4"],"prevResult":null}`, "", asLeast(func(*Conf) {})},
		{"all of the main plugin's", least + `,"mode":"bridge","bridge":"azure1","master":"eth1","mtu":"1400","snat":"off","metadata":"off","direct":"10.0.0.0/8, 192.168.1.7/24","reclaim":"on"}`, "",
			asLeast(func(c *Conf) {
				c.Mode, c.Bridge, c.Master, c.MTU, c.Reclaim = ModeBridge, "azure1", "eth1", 1400, true
				c.SNAT, c.NoMetadata, c.Direct = false, true, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("192.168.1.0/24")}
			})},
		{"transparent, in the configuration that is shipped", least + `,"mode":"transparent","bridge":"azure0"}`, "", asLeast(func(c *Conf) { c.Mode = ModeTransparent })},
		{"JSON's own words for them", least + `,"mtu":1400,"snat":true,"metadata":true,"direct":["10.0.0.0/8"],"reclaim":false}`, "",
			asLeast(func(c *Conf) {
				c.MTU, c.Direct = 1400, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
			})},
		{"IPAM", `{"name":"azure","ipam":{"type":"azure-vnet-ipam","subnet":"10.240.0.0/16","ipAddress":"10.240.0.9","addressSpace":"local","environment":"mas","queryInterval":"30"}}`, "",
			asLeast(func(c *Conf) {
				c.Addr, c.AddrBy = netip.MustParseAddr("10.240.0.9"), "ipam.ipAddress"
				c.IPAM = IPAM{Type: IPAMType, Source: azureStackFile, Subnet: netip.MustParsePrefix("10.240.0.0/16"), Interval: 30e9}
			})},
		{"another's IPAM is not ours to read", `{"name":"azure","ipam":{"type":"host-local","subnet":7,"ranges":[[{}]]}}`, "",
			asLeast(func(c *Conf) { c.IPAM = IPAM{Type: "host-local"} })},
		{"a pod of Kubernetes", least + `}`, "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_UID=1",
			asLeast(func(*Conf) {})},
		{"an address and a MAC as podman has them", least + `}`, "IP=10.240.0.9;MAC=02:00:00:00:00:09", asLeast(func(c *Conf) {
			c.Addr, c.AddrBy, c.MAC = netip.MustParseAddr("10.240.0.9"), "CNI_ARGS: IP", net.HardwareAddr{2, 0, 0, 0, 0, 9}
		})},
		{"capabilities come before all else", `{"name":"azure","ipam":{"type":"azure-vnet-ipam","ipAddress":"10.240.0.3"},"args":{"cni":{"ips":["10.240.0.4"]}},
			"dns":{"nameservers":["1.1.1.1"],"domain":"d"},"runtimeConfig":{"ips":["10.240.0.5/16"],"mac":"02:00:00:00:00:05","dns":{"servers":["10.0.0.10"],"searches":["svc"],"options":["ndots:5"]},
			"portMappings":[{"HostPort":8080,"ContainerPort":80,"Protocol":"TCP","HostIP":""},{"hostPort":53,"containerPort":53,"protocol":"udp","hostIP":"10.0.0.4"},{"hostPort":8080,"containerPort":80,"hostIP":"::"}]}}`,
			"IP=10.240.0.6;MAC=02:00:00:00:00:06",
			asLeast(func(c *Conf) {
				c.Addr, c.AddrBy, c.MAC = netip.MustParseAddr("10.240.0.5"), "runtimeConfig.ips", net.HardwareAddr{2, 0, 0, 0, 0, 5}
				c.DNS = types.DNS{Nameservers: []string{"10.0.0.10"}, Domain: "d", Search: []string{"svc"}, Options: []string{"ndots:5"}}
				c.Ports = []PortMapping{{Proto: "tcp", HostPort: 8080, ContainerPort: 80}, {Proto: "udp", HostAddr: netip.MustParseAddr("10.0.0.4"), HostPort: 53, ContainerPort: 53}}
			})},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := readConf([]byte(tt.conf), tt.args, mainPlugin)
			if err != nil {
				t.Fatal(err)
			}
			opts := cmp.Options{cmpopts.IgnoreUnexported(Conf{}), cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})}
			if diff := cmp.Diff(tt.want, got, opts); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestConfigurationsThatAreRefused(t *testing.T) {
	for _, tt := range []struct {
		conf, says string
	}{
		{least + `,"mode":"tunnel"}`, `mode "tunnel" is not served: write "mode": "bridge" or leave it out, or "transparent"`},
		{least + `,"mode":"l2bridge"}`, `"mode": "bridge"`},
		{least + `,"mode":7}`, "mode is a number"},
		{least + `,"metadata":"none"}`, `"on"`},
		{`{"name":"azure"}`, "azure-vnet-ipam"},
		{`{"name":"azure","ipam":{"type":"../x"}}`, "path"},
		{least + `,"mtu":9}`, "68 to 65535"},
		{least + `,"mtu":"big"}`, "not a number"},
		{least + `,"snat":"maybe"}`, `"on"`},
		{least + `,"direct":"here"}`, "CIDR"},
		{least + `,"logTarget":"/etc/passwd"}`, "syslog"},
		{least + `,"logLevel":"loud"}`, "debug"},
		{`{"name":"azure","ipam":{"type":"azure-vnet-ipam","environment":"aws"}}`, "fileIpam"},
		{`{"name":"azure","ipam":{"type":"azure-vnet-ipam","subnet":"x"}}`, "10.240.0.0/16"},
		{`{"name":"azure","ipam":{"type":"azure-vnet-ipam","subnet":7}}`, "ipam: subnet is a number"},
		{least + `,"bridge":7}`, "bridge is a number"},
	} {
		_, err := readConf([]byte(tt.conf), "", mainPlugin)
		var e *types.Error
		if !errors.As(err, &e) || e.Code != types.ErrInvalidNetworkConfig || !strings.Contains(e.Msg, tt.says) {
			t.Errorf("%s: %v; code 7 is wanted with %q", tt.conf, err, tt.says)
		}
	}
}

// What one container asks for comes from several places. An error names the place, and has the code of CNI_ARGS, 4,
// only where CNI_ARGS is wrong.
func TestARefusedWishNamesWhereItIsMade(t *testing.T) {
	run := func(keys string) string { return least + `,"runtimeConfig":{` + keys + `}}` }
	arg := func(keys string) string { return least + `,"args":{"cni":{` + keys + `}}}` }
	for _, tt := range []struct {
		conf, args string
		code       uint
		want       string // the whole message
	}{
		{run(`"ips":["10.0.0.1","10.0.0.2"]`), "IP=10.0.0.3", 7, "the configuration of network azure: runtimeConfig.ips: 2 addresses are asked for ([10.0.0.1 10.0.0.2]), and an interface has one"},
		{run(`"ips":["fd00::1"]`), "", 7, `the configuration of network azure: runtimeConfig.ips: the address asked for, "fd00::1", is not an IPv4 one`},
		{run(`"ips":7`), "", 7, `the configuration of network azure: runtimeConfig.ips: it is neither a list of addresses nor one address: 7`},
		{run(`"mac":"01:00:00:00:00:01"`), "MAC=02:00:00:00:00:01", 7, `the configuration of network azure: runtimeConfig.mac: the MAC asked for, "01:00:00:00:00:01", is not that of one interface, such as 02:00:00:00:00:05`},
		{run(`"mac":7`), "", 7, `the network configuration: runtimeConfig.mac is a number, which it cannot be`},
		{run(`"portMappings":[{"hostPort":3000,"containerPort":80,"protocol":"sctp"}]`), "", 7, "the configuration of network azure: runtimeConfig.portMappings: port 80 of the container: SCTP is not served: remove the hostPort, for containers speak SCTP at their own addresses"},
		{run(`"portMappings":[{"HostPort":3000,"ContainerPort":80,"Protocol":"SCTP","HostIP":"::"}]`), "", 7, "the configuration of network azure: runtimeConfig.portMappings: port 80 of the container: SCTP is not served: remove the hostPort, for containers speak SCTP at their own addresses"},
		{run(`"portMappings":[{"hostPort":3000,"containerPort":80,"protocol":"dccp"}]`), "", 7, `the configuration of network azure: runtimeConfig.portMappings: port 80 of the container: protocol "dccp" is not served: tcp and udp are`},
		{run(`"portMappings":[{"hostPort":0,"containerPort":80}]`), "", 7, "the configuration of network azure: runtimeConfig.portMappings: port 80 of the container: hostPort and containerPort are from 1 to 65535"},
		{run(`"portMappings":[{"hostPort":70000,"containerPort":80}]`), "", 7, "the configuration of network azure: runtimeConfig.portMappings.hostPort is a number 70000, which it cannot be"},
		{run(`"portMappings":[{"hostPort":8080,"containerPort":80,"hostIP":"here"}]`), "", 7, `the configuration of network azure: runtimeConfig.portMappings: port 80 of the container: hostIP "here" is not an address`},
		{run(`"dns":{"servers":"10.0.0.10"}`), "", 7, "the configuration of network azure: runtimeConfig.dns.servers is a string, which it cannot be"},
		{arg(`"ips":["x"]`), "IP=10.0.0.3", 7, `the configuration of network azure: args.cni.ips: the address asked for, "x", is not an IPv4 one`},
		{arg(`"mac":"x"`), "", 7, `the configuration of network azure: args.cni.mac: the MAC asked for, "x", is not that of one interface, such as 02:00:00:00:00:05`},
		{`{"name":"azure","ipam":{"type":"azure-vnet-ipam","ipAddress":"x"}}`, "", 7, `the configuration of network azure: ipam.ipAddress: the address asked for, "x", is not an IPv4 one`},
		{least + `}`, "IP=x", 4, `CNI_ARGS: IP: the address asked for, "x", is not an IPv4 one`},
		{least + `}`, "MAC=01:00:00:00:00:01", 4, `CNI_ARGS: MAC: the MAC asked for, "01:00:00:00:00:01", is not that of one interface, such as 02:00:00:00:00:05`},
		{least + `}`, "nothing", 4, `CNI_ARGS: "nothing" is not KEY=VALUE`},
	} {
		_, err := readConf([]byte(tt.conf), tt.args, mainPlugin)
		var e *types.Error
		if !errors.As(err, &e) {
			t.Errorf("%s %s: %v", tt.conf, tt.args, err)
		} else if diff := cmp.Diff(types.Error{Code: tt.code, Msg: tt.want}, *e); diff != "" {
			t.Errorf("%s %s:\n%s", tt.conf, tt.args, diff)
		}
	}
	// A bandwidth is a chained plugin's, and whatever it is, it is not ours to refuse.
	if _, err := readConf([]byte(run(`"bandwidth":{"ingressRate":"much"}`)), "", mainPlugin); err != nil {
		t.Error(err)
	}
}

func TestWhatGCKeeps(t *testing.T) {
	for _, tt := range []struct {
		name, lists string
		stale       []string // of c1 and c2
		refused     bool
	}{
		{"both keys", `,"cni.dev/valid-attachments":[{"containerID":"c1","ifname":"eth0"}],"cni.dev/attachments":[{"containerID":"c1","ifname":"eth0"}]`, []string{"cni/azure/c2/eth0"}, false},
		{"the older key alone", `,"cni.dev/attachments":[{"containerID":"c2","ifname":"eth0"}]`, []string{"cni/azure/c1/eth0"}, false},
		{"an empty list", `,"cni.dev/valid-attachments":[]`, []string{"cni/azure/c1/eth0", "cni/azure/c2/eth0"}, false},
		{"null, as CRI-O without pods", `,"cni.dev/valid-attachments":null`, []string{"cni/azure/c1/eth0", "cni/azure/c2/eth0"}, false},
		{"another interface of c1", `,"cni.dev/valid-attachments":[{"containerID":"c1","ifname":"eth1"}]`, []string{"cni/azure/c1/eth0", "cni/azure/c2/eth0"}, false},
		{"no list", ``, nil, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conf, err := readConf([]byte(least+tt.lists+"}"), "", mainPlugin)
			if err != nil {
				t.Fatal(err)
			}
			c := &Call{Verb: "GC", Conf: conf}
			stale, err := c.Stale()
			if (err != nil) != tt.refused {
				t.Fatal(err)
			}
			var got []string
			for _, owner := range []string{"cni/azure/c1/eth0", "cni/azure/c2/eth0", "cni/azure2/c1/eth0", "docker/x"} {
				if err == nil && stale(owner) {
					got = append(got, owner)
				}
			}
			if diff := cmp.Diff(tt.stale, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// FuzzConf reads any configuration. If one is accepted, the pool and the bridge can work with its values.
func FuzzConf(f *testing.F) {
	f.Add([]byte(least+`,"direct":["10.0.0.0/8"],"mtu":"1500"}`), "IP=10.0.0.9")
	f.Add([]byte(least+`,"mode":"transparent","metadata":"off"}`), "")
	f.Add([]byte(`{"name":"azure","ipam":{"type":"azure-vnet-ipam","queryInterval":-1}}`), ";;=")
	f.Add([]byte(`{"args":{"cni":null},"runtimeConfig":{"ips":null}}`), "a=b=c")
	f.Fuzz(func(t *testing.T, conf []byte, args string) {
		readName(conf)
		c, err := readConf(conf, args, mainPlugin)
		if err != nil {
			return
		}
		if c.IPAM.Type == "" || strings.ContainsAny(c.IPAM.Type, `/\`) || c.MTU < 0 || c.MTU > 65535 || c.IPAM.Interval < 0 || c.Addr.IsValid() && !c.Addr.Is4() ||
			c.Mode != "" && c.Mode != ModeBridge && c.Mode != ModeTransparent {
			t.Errorf("accepted: %+v", c)
		}
	})
}
