// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"azurevnet/internal/cni"
	"azurevnet/internal/lender"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
)

// oddities are hosts that are not as a VM boots.
var oddities = map[string]func(nic netlink.Link) error{
	"syslog listens":                listenAsSyslog,
	"somebody's bridge has the NIC": func(nic netlink.Link) error { return enslave(nic, "") },
	"an earlier build's bridge has the NIC": func(nic netlink.Link) error {
		return enslave(nic, "azv1 bridge "+nic.Attrs().HardwareAddr.String())
	},
}

func enslave(nic netlink.Link, alias string) error {
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "azure0"}}
	if err := netlink.LinkAdd(br); err != nil {
		return err
	}
	if err := netlink.LinkSetAlias(br, alias); err != nil {
		return err
	}
	return netlink.LinkSetMaster(nic, br)
}

// serveVerbs serves the verbs on the host of this process, and prints a document for
// each: what the plugin answered, or {} where it answered nothing. What ADD answers is
// the prevResult of all that follow. A word in small letters is one of wordsOfTests, or an
// argument of the plugin; what it prints is the document's text.
func serveVerbs(words []string) int {
	conf, err := io.ReadAll(os.Stdin)
	if err != nil {
		return 2
	}
	for _, word := range words {
		if word == strings.ToLower(word) {
			text, err := saidTo(word)
			doc, _ := json.Marshal(answered{Text: text})
			fmt.Println(string(doc))
			if err != nil {
				fmt.Fprintln(os.Stderr, word, err, text)
				return 2
			}
			continue
		}
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), onHost, "CNI_COMMAND="+word)
		cmd.Stdin, cmd.Stderr = bytes.NewReader(conf), os.Stderr
		out, err := cmd.Output()
		if len(out) == 0 {
			out = []byte("{}")
		}
		fmt.Println(strings.TrimSpace(string(out)))
		if word == "ADD" && err == nil {
			conf = append(bytes.TrimSuffix(conf, []byte("}")), fmt.Sprintf(`,"prevResult":%s}`, out)...)
		}
	}
	return 0
}

// wordsOfTests do something to the host that no argument of the plugin does.
var wordsOfTests = map[string]func() ([]byte, error){
	"syslog":       readSyslog,
	"log":          func() ([]byte, error) { return os.ReadFile("/var/log/azure-vnet.log") },
	"lose-leases":  func() ([]byte, error) { return nil, os.Remove(filepath.Join(cni.StateDir, "leases.json")) },
	"break-routes": func() ([]byte, error) { return exec.Command("ip", "route", "flush", "table", "16863").CombinedOutput() },
}

// saidTo is what the word prints.
func saidTo(word string) (string, error) {
	if do := wordsOfTests[word]; do != nil {
		out, err := do()
		return string(out), err
	}
	cmd := exec.Command("/proc/self/exe", word)
	cmd.Env = append(os.Environ(), onHost)
	out, err := cmd.CombinedOutput()
	if word == "status" { // which fails where something is broken
		err = nil
	}
	return string(out), err
}

// answered is a document of the plugin's.
type answered struct {
	Text       string `json:",omitempty"`
	Interfaces []*current.Interface
	IPs        []*current.IPConfig
	Code       uint
	Msg        string
}

// onOneHost has the plugin serve the verbs, and returns its answers.
func onOneHost(t *testing.T, odd, conf, path string, words ...string) []answered {
	t.Helper()
	return onOneHostWith(t, "", odd, conf, path, words...)
}

// onOneHostWith has CNI_ARGS in the environment too.
func onOneHostWith(t *testing.T, args, odd, conf, path string, words ...string) []answered {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make namespaces: sudo make test")
	}
	env := []string{verbs + strings.Join(words, " "), oddity + odd, "CNI_PATH=" + path, "CNI_CONTAINERID=c1", "CNI_NETNS=/run/netns/c1", "CNI_IFNAME=eth0", "CNI_ARGS=" + args}
	code, out, stderr := call(t, env, []byte(conf))
	var all []answered
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var a answered
		if err := dec.Decode(&a); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("%v in %s %s", err, out, stderr)
		}
		all = append(all, a)
	}
	if code != 0 || len(all) != len(words) {
		t.Fatalf("exit %d: %s %s", code, out, stderr)
	}
	return all
}

// with is the configuration of a network on the host, and more.
func with(more string) string { return strings.Replace(host, `"name"`, more+`"name"`, 1) }

const (
	link      = "azvf64b4ba4fb1" // of cni/azure/c1/eth0
	bridgeHas = "06:0d:3a:04:75:98"
)

func TestTheInterfacesOfAResult(t *testing.T) {
	both := func(mtu int) []*current.Interface {
		return []*current.Interface{
			{Name: link, Mac: "fe:42:0a:f0:00:05", Mtu: mtu},
			{Name: "eth0", Mac: "02:42:0a:f0:00:05", Mtu: mtu, Sandbox: "/run/netns/c1"},
		}
	}
	azure0 := &current.Interface{Name: "azure0", Mac: bridgeHas, Mtu: 1500}
	for _, tt := range []struct {
		name, conf string
		want       []*current.Interface
	}{
		{"no mode", host, append([]*current.Interface{azure0}, both(1500)...)},
		{"bridge", with(`"mode":"bridge","bridge":"azure0",`), append([]*current.Interface{azure0}, both(1500)...)},
		{"bridge, and an MTU", with(`"mtu":1400,`), append([]*current.Interface{azure0}, both(1400)...)},
		{"transparent", with(`"mode":"transparent","bridge":"azure0",`), both(1500)},
		{"transparent, an MTU and no metadata", with(`"mode":"transparent","mtu":1400,"metadata":"off",`), both(1400)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			all := onOneHost(t, "", tt.conf, "/nowhere", "STATUS", "ADD", "CHECK", "DEL", "STATUS")
			if diff := cmp.Diff(tt.want, all[1].Interfaces); diff != "" {
				t.Error(diff)
			}
			if ips := all[1].IPs; len(ips) != 1 || ips[0].Interface == nil || *ips[0].Interface != len(tt.want)-1 {
				t.Errorf("the address is not the container's: %+v", ips)
			}
			for i, a := range all {
				if a.Code != 0 {
					t.Errorf("answer %d: code %d, %s", i, a.Code, a.Msg)
				}
			}
		})
	}
}

func TestAnMTUThatIsNotTheNICsIsRefused(t *testing.T) {
	all := onOneHost(t, "", with(`"mtu":9000,`), "/nowhere", "ADD", "CHECK")
	if all[0].Code != types.ErrInvalidNetworkConfig || !strings.Contains(all[0].Msg, "eth0 has an MTU of 1500 bytes") {
		t.Errorf("ADD: code %d, %s", all[0].Code, all[0].Msg)
	}
	if all[1].Code != types.ErrUnknownContainer {
		t.Errorf("a link was left: CHECK says %d, %s", all[1].Code, all[1].Msg)
	}
}

func TestAHostWhoseNICIsInABridgeIsNotTouched(t *testing.T) {
	ipam := otherIPAM(t)
	for odd, says := range map[string]string{
		"somebody's bridge has the NIC":         "eth0 is in azure0, a bridge that is not ours",
		"an earlier build's bridge has the NIC": "eth0 is in azure0, where an earlier build of azure-vnet put it",
	} {
		for name, conf := range map[string]string{"": host, "named": with(`"bridge":"azure0",`), "transparent": with(`"mode":"transparent",`), "another IPAM": strings.Replace(host, "azure-vnet-ipam", "other", 1)} {
			t.Run(odd+", "+name, func(t *testing.T) {
				t.Parallel()
				all := onOneHost(t, odd, conf, ipam, "STATUS", "ADD", "DEL")
				for i, word := range []string{"STATUS", "ADD"} {
					if all[i].Code != types.ErrPluginNotAvailable || !strings.Contains(all[i].Msg, says) || !strings.Contains(all[i].Msg, "Drain this VM") {
						t.Errorf("%s: code %d, %s", word, all[i].Code, all[i].Msg)
					}
				}
				if all[2].Code != 0 {
					t.Errorf("DEL: code %d, %s", all[2].Code, all[2].Msg)
				}
			})
		}
	}
}

// otherIPAM makes an IPAM plugin "other", and returns its directory.
func otherIPAM(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	const script = `#!/bin/sh
while read -r line; do :; done
[ "$CNI_COMMAND" != ADD ] || echo '{"cniVersion":"1.1.0","ips":[{"address":"10.240.0.77/16","gateway":"10.240.0.1"}],"routes":[
	{"dst":"0.0.0.0/0"},{"dst":"10.240.0.0/16"},{"dst":"10.240.0.1/32"},{"dst":"172.16.0.0/12"},
	{"dst":"192.168.0.0/16","gw":"10.240.0.9"},{"dst":"10.250.0.0/16","scope":253}]}'
`
	if err := os.WriteFile(filepath.Join(dir, "other"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// CHECK looks for each route of the result.
func TestTheRoutesOfAnotherIPAM(t *testing.T) {
	for _, mode := range []string{"bridge", "transparent"} {
		conf := strings.Replace(with(`"mode":"`+mode+`",`), "azure-vnet-ipam", "other", 1)
		for i, a := range onOneHost(t, "", conf, otherIPAM(t), "STATUS", "ADD", "CHECK", "DEL") {
			if a.Code != 0 {
				t.Errorf("%s, answer %d: code %d, %s", mode, i, a.Code, a.Msg)
			}
		}
	}
}

func TestRoutesThatAnotherIPAMWants(t *testing.T) {
	g := &grant{addr: netip.MustParsePrefix("10.240.0.77/16"), gateway: netip.MustParseAddr("10.240.0.1")}
	onLink, table := int(netlink.SCOPE_LINK), 7
	for _, tt := range []struct {
		name string
		r    types.Route
		made bool   // by Attach already
		want string // else
	}{
		{"the subnet", types.Route{Dst: cidr("10.240.0.0/16")}, true, ""},
		{"the subnet by the gateway", types.Route{Dst: cidr("10.240.0.0/16"), GW: net.IPv4(10, 240, 0, 1)}, true, ""},
		{"the gateway", types.Route{Dst: cidr("10.240.0.1/32")}, true, ""},
		{"the subnet in another table", types.Route{Dst: cidr("10.240.0.0/16"), Table: &table}, false, "10.240.0.0/16 via 10.240.0.1 onlink=false"},
		{"the subnet by another", types.Route{Dst: cidr("10.240.0.0/16"), GW: net.IPv4(10, 240, 0, 9)}, false, "10.240.0.0/16 via 10.240.0.9 onlink=true"},
		{"no next hop", types.Route{Dst: cidr("172.16.0.0/12")}, false, "172.16.0.0/12 via 10.240.0.1 onlink=false"},
		{"a next hop of the subnet", types.Route{Dst: cidr("172.16.0.0/12"), GW: net.IPv4(10, 240, 0, 9)}, false, "172.16.0.0/12 via 10.240.0.9 onlink=true"},
		{"on the link", types.Route{Dst: cidr("172.16.0.0/12"), Scope: &onLink}, false, "172.16.0.0/12 via <nil> onlink=false"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if made := g.attachMade(&tt.r); made != tt.made {
				t.Fatalf("attachMade: %v", made)
			}
			if tt.made {
				return
			}
			r := g.kernelRoute(&tt.r, 3)
			got := fmt.Sprintf("%s via %s onlink=%v", r.Dst, r.Gw, r.Flags&int(netlink.FLAG_ONLINK) != 0)
			if got != tt.want || r.LinkIndex != 3 {
				t.Errorf("%s on %d, want %s", got, r.LinkIndex, tt.want)
			}
		})
	}
}

func cidr(s string) net.IPNet { return lender.IPNet(netip.MustParsePrefix(s)) }
