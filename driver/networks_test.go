// Copyright (c) The azure-vnet authors. MIT licence.

package driver

import (
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/docker/go-plugins-helpers/network"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"azurevnet/bridge"
)

// earlier is networks.json as the release wrote it that moved the NIC into its bridge.
const earlier = `{"version":1,"networks":{"a":{"mac":"00:0d:3a:04:75:98","primary":true,"bridge":"azure0","mtu":1400,
	"nics":["00:0d:3a:04:75:98"],"prefix":"10.240.0.0/16","gateway":"10.240.0.1","snat":true,"direct":["10.0.0.0/8"]}}}`

func TestNetworksOfAnEarlierReleaseAreRead(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(NetworksFile(dir), []byte(earlier), 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := ReadNetworks(dir)
	if err != nil {
		t.Fatal(err)
	}
	n := file.Networks["a"]
	same := cmpopts.EquateComparable(netip.Prefix{})
	wantSpec := bridge.Spec{MAC: "00:0d:3a:04:75:98", Name: "azure0", Primary: true, Subnet: n.Prefix, NICs: []string{"00:0d:3a:04:75:98"}}
	if diff := cmp.Diff(wantSpec, n.bridgeSpec(), same); diff != "" {
		t.Errorf("spec:\n%s", diff)
	}
	wantPolicy := bridge.Policy{SNAT: true, Direct: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
	if diff := cmp.Diff(wantPolicy, n.bridgePolicy(), same); diff != "" {
		t.Errorf("policy:\n%s", diff)
	}
	again := n
	again.Mode = bridge.ModeBridge // as this release writes it, if it is asked for
	if !n.equal(again) || n.Transparent() {
		t.Errorf("%+v is not the network that was created", n)
	}
}

// A file that is JSON and that no release wrote ends no process: it is refused with the reason, and stays where it is.
func TestNetworksThatAreAbsurd(t *testing.T) {
	for name, n := range map[string]string{
		"a subnet of IPv6":            `"prefix":"fd00::/16","gateway":"10.240.0.1"`,
		"a gateway and no subnet":     `"gateway":"10.240.0.1"`,
		"a gateway of elsewhere":      `"prefix":"10.240.0.0/16","gateway":"192.0.2.1"`,
		"host bits":                   `"prefix":"10.240.0.7/16","gateway":"10.240.0.1"`,
		"direct of IPv6":              `"prefix":"10.240.0.0/16","gateway":"10.240.0.1","direct":["fd00::/8"]`,
		"direct of nothing":           `"prefix":"10.240.0.0/16","gateway":"10.240.0.1","direct":[""]`,
		"an auxiliary IPv6 address":   `"prefix":"10.240.0.0/16","gateway":"10.240.0.1","aux":[{"addr":"fd00::9"}]`,
		"an MTU of 2^63":              `"prefix":"10.240.0.0/16","gateway":"10.240.0.1","mtu":9223372036854775808`,
		"a list in place of a subnet": `"prefix":["10.240.0.0/16"]`,
	} {
		t.Run(name, func(t *testing.T) {
			d := New(Config{Dir: t.TempDir()})
			body := `{"version":1,"networks":{"` + strings.Repeat("a", 64) + `":{"mac":"00:0d:3a:04:75:98",` + n + `}}}`
			if err := os.WriteFile(NetworksFile(d.cfg.Dir), []byte(body), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := d.Join(t.Context(), &network.JoinRequest{NetworkID: strings.Repeat("a", 64), EndpointID: strings.Repeat("b", 64)}); err == nil || !strings.Contains(err.Error(), "put a copy in its place") {
				t.Errorf("Join: %v", err)
			}
			if err := d.Restore(t.Context()); err == nil {
				t.Error("Restore: no error")
			}
			if left, err := os.ReadFile(NetworksFile(d.cfg.Dir)); err != nil || string(left) != body {
				t.Errorf("the file is %s, %v", left, err)
			}
		})
	}
}

func TestNetworksThatDiffer(t *testing.T) {
	n := Network{MAC: "m", Prefix: netip.MustParsePrefix("10.240.0.0/16"), SNAT: true}
	for name, change := range map[string]func(*Network){
		"mode":     func(n *Network) { n.Mode = bridge.ModeTransparent },
		"MTU":      func(n *Network) { n.MTU = 1400 },
		"metadata": func(n *Network) { n.NoMetadata = true },
		"snat":     func(n *Network) { n.SNAT = false },
		"internal": func(n *Network) { n.Internal = true },
		"bridge":   func(n *Network) { n.Bridge = "azure1" },
	} {
		other := n
		change(&other)
		if n.equal(other) {
			t.Errorf("networks of another %s are taken for one", name)
		}
	}
}

func TestNetworksOfOneNIC(t *testing.T) {
	named := Network{MAC: "m", Bridge: "foo", MTU: 1400}
	for _, c := range []struct {
		name   string
		n      Network
		bridge string // that it has after all
		err    string
	}{
		{"takes the name", Network{MAC: "m"}, "foo", ""},
		{"has another MTU", Network{MAC: "m", MTU: 1300}, "foo", ""},
		{"is transparent", Network{MAC: "m", Mode: bridge.ModeTransparent}, "", ""},
		{"is of another NIC", Network{MAC: "o"}, "", ""},
		{"wants another name", Network{MAC: "m", Bridge: "bar"}, "bar", "network a has foo, this one asks for bar"},
	} {
		t.Run(c.name, func(t *testing.T) {
			all := map[string]Network{"a": named, "t": {MAC: "m", Mode: bridge.ModeTransparent}}
			n := c.n.withSharedBridge(all)
			if n.Bridge != c.bridge {
				t.Errorf("bridge %q, want %q", n.Bridge, c.bridge)
			}
			if err := n.checkSharedBridge(all); (err != nil) != (c.err != "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("error %v, want one with %q", err, c.err)
			}
		})
	}
}
