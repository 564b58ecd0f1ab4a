// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"context"
	"encoding/json"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/invoke"
	current "github.com/containernetworking/cni/pkg/types/100"
	cniversion "github.com/containernetworking/cni/pkg/version"

	"azurevnet/internal/lender"
)

// answering is an IPAM plugin that prints what it is made of.
type answering struct {
	cniversion.PluginDecoder
	stdout []byte
}

func (a *answering) ExecPlugin(context.Context, string, []byte, []string) ([]byte, error) {
	return a.stdout, nil
}

func (a *answering) FindInPath(plugin string, _ []string) (string, error) { return plugin, nil }

// FuzzDelegated takes any answer of another IPAM plugin. After a refusal its address is given back, so a refusal is an
// error and no panic. An accepted answer has one IPv4 address. Its routes can be written in every version of CNI.
func FuzzDelegated(f *testing.F) {
	for _, answer := range []string{
		`{"cniVersion":"1.0.0","ips":[{"address":"10.240.0.9/16","gateway":"10.240.0.1"}],"routes":[{"dst":"0.0.0.0/0"},{"dst":"10.1.0.0/16","gw":"10.240.0.7","mtu":1300,"table":7,"scope":253}],"dns":{"nameservers":["10.0.0.10"]}}`,
		`{"cniVersion":"0.3.1","ips":[{"version":"4","address":"192.168.7.9/24"}]}`,
		`{"cniVersion":"0.2.0","ip4":{"ip":"10.240.0.9/16","gateway":"10.240.0.1","routes":[{"dst":"0.0.0.0/0"}]}}`,
		`{"ip4":{"ip":"10.240.0.9/16"},"ip6":{"ip":"fd00::9/64"}}`,
		`{"cniVersion":"1.0.0","ips":[{"address":"10.240.0.9/16"},{"address":"fd00::9/64","gateway":"fd00::1"}]}`,
		`{"cniVersion":"1.0.0","ips":[{"address":"255.255.255.255/32","gateway":"fd00::1"}],"routes":[{"dst":"fd00::/8","gw":"fd00::1"}]}`,
		`{"cniVersion":"1.0.0","ips":[{"address":"10.240.0.9/16"}],"routes":[null]}`,
		`{"cniVersion":"1.0.0","ips":[null]}`, `{"cniVersion":"0.4.0","ips":[null]}`, `{"cniVersion":"0.4.0","ips":[{"address":"10.240.0.9/16"}],"interfaces":[null],"routes":[null]}`,
		`{"cniVersion":"0.2.0","ip4":null}`, `{"cniVersion":"9.9.9"}`, `{}`, `null`, `[]`, ``, `{"code":11,"msg":"full"}`,
	} {
		f.Add([]byte(answer))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		raw, err := invoke.ExecPluginWithResult(t.Context(), "other", []byte(host), &invoke.Args{}, &answering{stdout: answer})
		if err != nil {
			return // the library refuses it, before anything of ours reads it
		}
		g := &grant{nic: "00:0d:3a:04:75:98"}
		if err := g.readResult(raw); err != nil {
			if strings.TrimSpace(err.Error()) == "" {
				t.Error("an error without words")
			}
			return
		}
		if !g.addr.IsValid() || !g.addr.Addr().Is4() || len(g.routes) == 0 {
			t.Fatalf("taken: %s, routes %v", g.addr, g.routes)
		}
		for _, r := range g.routes {
			g.attachMade(r)
			if route := g.kernelRoute(r, 7); route.Dst == nil || route.LinkIndex != 7 {
				t.Errorf("route %v is %v", r, route)
			}
		}
		result := &current.Result{Routes: g.routes, DNS: g.dns, IPs: []*current.IPConfig{{Address: lender.IPNet(g.addr), Gateway: g.gateway.AsSlice()}}}
		for _, v := range cniversion.All.SupportedVersions() {
			told, err := result.GetAsVersion(v)
			if err == nil {
				_, err = json.Marshal(told)
			}
			if err != nil {
				t.Errorf("the result cannot be told as CNI %s: %v", v, err)
			}
		}
		again := &grant{nic: g.nic}
		if err := again.readResult(result); err != nil || again.addr != g.addr || again.gateway != g.gateway || len(again.routes) != len(g.routes) {
			t.Errorf("%+v is read again as %+v: %v", g, again, err)
		}
	})
}

// An answer with null in a list is refused in every version. Its address can then be given back, which no panic does.
func TestDelegatedAnswersWithNull(t *testing.T) {
	const list = `[{"address":"10.240.0.9/16","version":"4"}]`
	for _, v := range []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		for _, lists := range []string{`"ips":[null]`, `"ips":` + list + `,"routes":[null]`, `"ips":` + list + `,"interfaces":[null]`} {
			answer := []byte(`{"cniVersion":"` + v + `",` + lists + `}`)
			raw, err := invoke.ExecPluginWithResult(t.Context(), "other", []byte(host), &invoke.Args{}, &answering{stdout: answer})
			if err != nil {
				t.Fatal(err)
			}
			if err := new(grant).readResult(raw); err == nil || !strings.Contains(err.Error(), "null") {
				t.Errorf("%s: %v", answer, err)
			}
		}
	}
}
