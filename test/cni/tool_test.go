// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// TestCNITool is the CNI project's own client at work, which knows our plugins
// by nothing but a directory of configurations.
func TestCNITool(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	n, plain := test.OnNode(vms[0]), test.OnHost(vms[1])
	var used []netip.Addr
	n.Must("mkdir", "-p", "/run/net.d")
	n.Must("ip", "netns", "add", "tool")
	for _, v := range []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		t.Run(v, func(t *testing.T) {
			n := n.In(t)
			name := "net-" + v
			n.Must("sh", "-c", `printf %s "$0" >/run/net.d/$1.conflist`, fmt.Sprintf(`{"cniVersion":%q,"name":%q,"plugins":[%s]}`, v, name, test.Azure()), v)
			tool := func(verb string) (string, error) {
				return n.Try("env", "NETCONFPATH=/run/net.d", "CNI_PATH="+n.Dir, n.Dir+"/cnitool", verb, name, "/run/netns/tool")
			}
			added := func() netip.Addr {
				t.Helper()
				out, err := tool("add")
				var r struct {
					CNIVersion string
					IPs        []struct{ Address netip.Prefix }
				}
				if err == nil {
					err = json.Unmarshal([]byte(out), &r)
				}
				if err != nil || r.CNIVersion != v || len(r.IPs) != 1 {
					t.Fatalf("add: %v in %s", err, out)
				}
				return r.IPs[0].Address.Addr()
			}
			fine := func(verbs ...string) {
				t.Helper()
				for _, verb := range verbs {
					out, err := tool(verb)
					if verb == "check" && v < "0.4.0" {
						if err == nil || !strings.Contains(err.Error(), "does not support the CHECK command") {
							t.Errorf("check in %s: %s %v", v, out, err)
						}
					} else if err != nil || out != "" {
						t.Errorf("%s: %s %v", verb, out, err)
					}
				}
			}
			addr := added()
			used = append(used, addr)
			if _, err := plain.Try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
				t.Errorf("not reached: %v", err)
			}
			fine("check", "status")
			if out, err := tool("add"); err == nil {
				t.Errorf("added twice: %s", out)
			}
			fine("check", "del", "del", "status")
			n.Bare()
			added()
			// Its gc holds nothing for valid and ends each attachment it knows of, but
			// then hands on no list. That is not an empty one: another runtime's
			// containers may be of this network.
			if out, err := tool("gc"); (err == nil) != (v < "1.1.0") || err != nil && !strings.Contains(err.Error(), "valid-attachments is missing") {
				t.Errorf("gc: %s %v", out, err)
			}
			n.Bare()
		})
	}
	test.NothingDropped(t, vnet, used...)
}
