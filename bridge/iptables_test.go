// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// rulesNow is our rules in both back-ends, in their programs' words.
func rulesNow(t *testing.T, programs ...string) string {
	var out strings.Builder
	for _, p := range programs {
		for _, at := range []string{"filter -S FORWARD", "nat -S POSTROUTING"} {
			for line := range strings.Lines(sh(t, p+" -w -t "+at)) {
				if strings.Contains(line, "azure-vnet") {
					out.WriteString(strings.TrimPrefix(p, "iptables-") + " " + line)
				}
			}
		}
	}
	return out.String()
}

// TestRules holds that every back-end in use has each rule once, that rules that
// stand are left alone without an exec, and that nothing is left in the end.
func TestRules(t *testing.T) {
	one := []Bridge{{Name: "azure0"}}
	two := []Bridge{{Name: "azure0"}, {Name: "azure-2"}}
	const (
		oneAccept  = "-A FORWARD -i azure0 -o azure0 -m comment --comment \"azure-vnet:azure0/azure0\" -j ACCEPT\n"
		masquerade = "nft -A POSTROUTING -m comment --comment \"azure-vnet:snat\" -m mark --mark 0x10000/0x10000 -j MASQUERADE\n"
		twoAccepts = "-A FORWARD -i azure-2 -o azure-2 -m comment --comment \"azure-vnet:azure-2/azure-2\" -j ACCEPT\n" +
			"BACKEND -A FORWARD -i azure-2 -o azure0 -m comment --comment \"azure-vnet:azure-2/azure0\" -j ACCEPT\n" +
			"BACKEND -A FORWARD -i azure0 -o azure-2 -m comment --comment \"azure-vnet:azure0/azure-2\" -j ACCEPT\n"
	)
	for _, test := range []struct {
		name     string
		programs []string
		accepts  []string // back-ends
	}{
		{"nft", []string{"iptables-nft"}, []string{"nft"}},
		{"legacy too", []string{"iptables-nft", "iptables-legacy"}, []string{"nft", "legacy"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			inNamespace(t, func() {
				h := New(Config{Run: t.TempDir()})
				for _, p := range test.programs {
					sh(t, p+" -w -P FORWARD DROP")
				}
				want := func(bridges []Bridge, changes bool, rules string) {
					t.Helper()
					mended, err := h.ensureRules(bridges)
					if err != nil || len(mended) > 0 != changes {
						t.Errorf("ensure rules for %v: %v, %v", bridges, mended, err)
					}
					if diff := cmp.Diff(rules, rulesNow(t, test.programs...)); diff != "" {
						t.Errorf("rules for %v (-want +got):\n%s", bridges, diff)
					}
				}
				all := func(words string) (rules string) {
					for _, b := range test.accepts {
						rules += b + " " + strings.ReplaceAll(words, "BACKEND", b)
						if b == "nft" {
							rules += masquerade
						}
					}
					return rules
				}
				want(one, true, all(oneAccept))
				t.Setenv("PATH", "") // an exec would fail
				if mended, err := h.ensureRules(one); err != nil || mended != nil {
					t.Errorf("rules that stand: %v, %v", mended, err)
				}
				t.Setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
				want(two, true, all(twoAccepts+"BACKEND "+oneAccept))
				want(two, false, all(twoAccepts+"BACKEND "+oneAccept))
				sh(t, test.programs[len(test.programs)-1]+" -w -F FORWARD")
				want(two, true, all(twoAccepts+"BACKEND "+oneAccept))
				want(one, true, all(oneAccept))
				if err := h.dropRules(); err != nil {
					t.Error(err)
				}
				if left := rulesNow(t, test.programs...); left != "" {
					t.Errorf("left after dropping them:\n%s", left)
				}
			})
		})
	}
}
