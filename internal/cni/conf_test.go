// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"azurevnet/bridge"
)

const least = `{"name":"azure","ipam":{"type":"azure-vnet-ipam"}`

// asLeast is what the least configuration means, with a change.
func asLeast(change func(*Conf)) Conf {
	c := Conf{CNIVersion: "0.1.0", Network: "azure", Policy: bridge.Policy{SNAT: true}, IPAM: IPAM{Type: IPAMType, Source: "auto"}}
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
				c.Mode, c.Bridge, c.Master, c.MTU, c.Reclaim = bridge.ModeBridge, "azure1", "eth1", 1400, true
				c.Policy = bridge.Policy{NoMetadata: true, Direct: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("192.168.1.0/24")}}
			})},
		{"transparent, in the configuration that is shipped", least + `,"mode":"transparent","bridge":"azure0"}`, "", asLeast(func(c *Conf) { c.Mode = bridge.ModeTransparent })},
		{"JSON's own words for them", least + `,"mtu":1400,"snat":true,"metadata":true,"direct":["10.0.0.0/8"],"reclaim":false}`, "",
			asLeast(func(c *Conf) {
				c.MTU, c.Policy.Direct = 1400, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
			})},
		{"IPAM", `{"name":"azure","ipam":{"type":"azure-vnet-ipam","subnet":"10.240.0.0/16","ipAddress":"10.240.0.9","addressSpace":"local","environment":"mas","queryInterval":"30"}}`, "",
			asLeast(func(c *Conf) {
				c.Addr = netip.MustParseAddr("10.240.0.9")
				c.IPAM = IPAM{Type: IPAMType, Source: azureStackFile, Subnet: netip.MustParsePrefix("10.240.0.0/16"), Interval: 30e9}
			})},
		{"another's IPAM is not ours to read", `{"name":"azure","ipam":{"type":"host-local","subnet":7,"ranges":[[{}]]}}`, "",
			asLeast(func(c *Conf) { c.IPAM = IPAM{Type: "host-local"} })},
		{"a pod of Kubernetes", least + `}`, "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_UID=1",
			asLeast(func(c *Conf) { c.Pod = "default/web" })},
		{"an address and a MAC as podman has them", least + `}`, "IP=10.240.0.9;MAC=02:00:00:00:00:09", asLeast(func(c *Conf) {
			c.Addr, c.MAC = netip.MustParseAddr("10.240.0.9"), net.HardwareAddr{2, 0, 0, 0, 0, 9}
		})},
		{"capabilities come before all else", `{"name":"azure","ipam":{"type":"azure-vnet-ipam","ipAddress":"10.240.0.3"},"args":{"cni":{"ips":["10.240.0.4"]}},
			"dns":{"nameservers":["1.1.1.1"],"domain":"d"},"runtimeConfig":{"ips":["10.240.0.5/16"],"mac":"02:00:00:00:00:05","dns":{"servers":["10.0.0.10"],"searches":["svc"],"options":["ndots:5"]},
			"portMappings":[{"HostPort":8080,"ContainerPort":80,"Protocol":"TCP","HostIP":""},{"hostPort":53,"containerPort":53,"protocol":"udp","hostIP":"10.0.0.4"},{"hostPort":8080,"containerPort":80,"hostIP":"::"}]}}`,
			"IP=10.240.0.6;MAC=02:00:00:00:00:06",
			asLeast(func(c *Conf) {
				c.Addr, c.MAC = netip.MustParseAddr("10.240.0.5"), net.HardwareAddr{2, 0, 0, 0, 0, 5}
				c.DNS = types.DNS{Nameservers: []string{"10.0.0.10"}, Domain: "d", Search: []string{"svc"}, Options: []string{"ndots:5"}}
				c.Ports = []bridge.Port{{Proto: "tcp", HostPort: 8080, Port: 80}, {Proto: "udp", HostAddr: netip.MustParseAddr("10.0.0.4"), HostPort: 53, Port: 53}}
			})},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := readConf([]byte(tt.conf), tt.args, true)
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
		conf, args string
		code       uint
		says       string
	}{
		{least + `,"mode":"tunnel"}`, "", 7, `mode "tunnel" is not served: write "mode": "bridge" or leave it out, or "transparent"`},
		{least + `,"mode":"l2bridge"}`, "", 7, `"mode": "bridge"`},
		{least + `,"mode":7}`, "", 7, "Mode"},
		{least + `,"metadata":"none"}`, "", 7, `"on"`},
		{`{"name":"azure"}`, "", 7, "azure-vnet-ipam"},
		{`{"name":"azure","ipam":{"type":"../x"}}`, "", 7, "path"},
		{least + `,"mtu":9}`, "", 7, "68 to 65535"},
		{least + `,"mtu":"big"}`, "", 7, "not a number"},
		{least + `,"snat":"maybe"}`, "", 7, `"on"`},
		{least + `,"direct":"here"}`, "", 7, "CIDR"},
		{least + `,"bridge":"a/b"}`, "", 7, "name of an interface"},
		{least + `,"logTarget":"/etc/passwd"}`, "", 7, "syslog"},
		{least + `,"logLevel":"loud"}`, "", 7, "debug"},
		{`{"name":"azure","ipam":{"type":"azure-vnet-ipam","environment":"aws"}}`, "", 7, "fileIpam"},
		{`{"name":"azure","ipam":{"type":"azure-vnet-ipam","subnet":"x"}}`, "", 7, "10.240.0.0/16"},
		{least + `,"runtimeConfig":{"portMappings":[{"hostPort":0,"containerPort":80}]}}`, "", 7, "hostPort"},
		{least + `,"runtimeConfig":{"portMappings":[{"hostPort":70000,"containerPort":80}]}}`, "", 7, "70000"},
		{least + `,"runtimeConfig":{"ips":["10.0.0.1","10.0.0.2"]}}`, "", 4, "has one"},
		{least + `,"runtimeConfig":{"ips":["fd00::1"]}}`, "", 4, "IPv4"},
		{least + `}`, "MAC=01:00:00:00:00:01", 4, "MAC"},
		{least + `}`, "nothing", 4, "KEY=VALUE"},
	} {
		_, err := readConf([]byte(tt.conf), tt.args, true)
		var e *types.Error
		if !errors.As(err, &e) || e.Code != tt.code || !strings.Contains(e.Msg, tt.says) {
			t.Errorf("%s %s: %v; code %d is wanted with %q", tt.conf, tt.args, err, tt.code, tt.says)
		}
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
			conf, err := readConf([]byte(least+tt.lists+"}"), "", true)
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

// FuzzConf reads any configuration. What is accepted has values that the bridge
// and the pool can do something with.
func FuzzConf(f *testing.F) {
	f.Add([]byte(least+`,"direct":["10.0.0.0/8"],"mtu":"1500"}`), "IP=10.0.0.9")
	f.Add([]byte(least+`,"mode":"transparent","metadata":"off"}`), "")
	f.Add([]byte(`{"name":"azure","ipam":{"type":"azure-vnet-ipam","queryInterval":-1}}`), ";;=")
	f.Add([]byte(`{"args":{"cni":null},"runtimeConfig":{"ips":null}}`), "a=b=c")
	f.Fuzz(func(t *testing.T, conf []byte, args string) {
		readName(conf)
		c, err := readConf(conf, args, true)
		if err != nil {
			return
		}
		if c.IPAM.Type == "" || strings.ContainsAny(c.IPAM.Type, `/\`) || c.MTU < 0 || c.MTU > 65535 || c.IPAM.Interval < 0 || c.Addr.IsValid() && !c.Addr.Is4() ||
			c.Mode != "" && !slices.Contains(bridge.Modes, c.Mode) {
			t.Errorf("accepted: %+v", c)
		}
	})
}
