// Copyright (c) The azure-vnet authors. MIT licence.

package repository

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"azurevnet/test"
)

// fuzzed are the kinds of input that others write, and the fuzz targets that read each kind.
var fuzzed = map[string][]string{
	"the host agent's answer":                       {"pool.FuzzXML"},
	"IMDS's answer":                                 {"pool.FuzzIMDS"},
	"the file of addresses":                         {"pool.FuzzFile"},
	"leases.json":                                   {"pool.FuzzLeases"},
	"networks.json, and what is restored from it":   {"driver.FuzzNetworks", "internal/plugin.FuzzRestore"},
	"host.json":                                     {"bridge.FuzzHostState"},
	"any state file":                                {"internal/statefile.FuzzUpdate"},
	"a link's alias":                                {"bridge.FuzzParseAlias"},
	"the body of a call of Docker":                  {"internal/plugin.FuzzBodies"},
	"the options of a network":                      {"driver.FuzzNetworkOptions"},
	"a PoolID":                                      {"ipamdriver.FuzzParsePoolID"},
	"the answers of Docker's API":                   {"internal/plugin.FuzzEngine"},
	"the plugin's settings, plugin.json, data.json": {"internal/plugin.FuzzSettings", "internal/plugin.FuzzLeftFiles"},
	"mountinfo":                                     {"internal/plugin.FuzzMounts"},
	"a CNI configuration":                           {"internal/cni.FuzzConf"},
	"CNI_ARGS":                                      {"internal/cni.FuzzArgs"},
	"a call of CNI":                                 {"cmd/azure-vnet.FuzzCall", "cmd/azure-vnet-ipam.FuzzCall"},
	"the result of another IPAM plugin":             {"cmd/azure-vnet.FuzzDelegated"},
	"the replies of firewalld on the bus":           {"bridge/internal/firewalld.FuzzReplies"},
	"the rules that iptables lists":                 {"bridge/internal/forward.FuzzRules"},
	"the nft rules of others":                       {"bridge/internal/nfnl.FuzzRule"},
	"our own nft tables, as the kernel tells them":  {"bridge/internal/ruleset.FuzzReadBack", "bridge/internal/ruleset.FuzzVerdict"},
	"sockets, as the kernel tells them":             {"bridge/internal/listen.FuzzInetDiag"},
	"the definition of a cluster":                   {"internal/plan.FuzzRead"},
	"a question to the simulated DNS":               {"internal/vnetsim.FuzzDNSReply"},
}

// TestForeignInputIsFuzzed: each kind of input has its targets, and each target is of a kind. The seeds of each target
// run with the package's tests. make soak looks for more. make test does not, for two reasons. To build the
// instrumented programs takes minutes. A test must give the same answer each time.
func TestForeignInputIsFuzzed(t *testing.T) {
	found := map[string]bool{}
	target := regexp.MustCompile(`(?m)^func (Fuzz\w+)\(`)
	for _, p := range packages(t) {
		files, err := filepath.Glob(filepath.Join(p.Dir, "*_test.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range files {
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range target.FindAllStringSubmatch(string(text), -1) {
				found[strings.TrimPrefix(p.ImportPath, module+"/")+"."+m[1]] = true
			}
		}
	}
	for kind, targets := range fuzzed {
		for _, name := range targets {
			if !found[name] {
				t.Errorf("%s: there is no target %s", kind, name)
			}
			delete(found, name)
		}
	}
	for name := range found {
		t.Errorf("%s reads nothing that is listed in %s", name, filepath.Join(test.Top, "test/repository/fuzz_test.go"))
	}
}
