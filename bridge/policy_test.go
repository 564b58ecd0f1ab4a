// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"fmt"
	"testing"

	"azurevnet/internal/vnetsim"
)

// A policy has one id however it is written, and another policy another.
func TestPolicyID(t *testing.T) {
	t.Parallel()
	same := func(a, b Policy, want bool) {
		t.Helper()
		if (a.id() == b.id()) != want {
			t.Errorf("%q and %q have the ids %s and %s", a.text(), b.text(), a.id(), b.id())
		}
	}
	same(Policy{SNAT: true, Direct: prefixes("10.0.0.0/8", "172.16.0.0/12")}, Policy{SNAT: true, Direct: prefixes("172.16.9.9/12", "10.1.0.0/8", "10.0.0.0/8")}, true)
	same(Policy{}, Policy{Direct: prefixes("10.0.0.0/8")}, true)
	same(Policy{Internal: true}, Policy{Internal: true, SNAT: true, Direct: prefixes("10.0.0.0/8")}, true)
	same(Policy{}, Policy{SNAT: true}, false)
	same(Policy{}, Policy{Internal: true}, false)
	same(Policy{}, Policy{NoMetadata: true}, false)
	same(Policy{SNAT: true}, Policy{SNAT: true, Direct: prefixes()}, false)
}

// A policy without a list is known by its id where host.json was lost, and any other is taken for the default.
func TestPolicyOf(t *testing.T) {
	t.Parallel()
	for _, p := range []Policy{{Internal: true}, {}, {SNAT: true}, {SNAT: true, NoMetadata: true}, {NoMetadata: true}} {
		if got := policyOf(nil, p.id()); got.id() != p.id() {
			t.Errorf("%q is taken for %q", p.text(), got.text())
		}
	}
	own := Policy{SNAT: true, Direct: prefixes("203.0.113.0/24")}
	if got := policyOf(nil, own.id()); got.text() != (Policy{SNAT: true}).text() {
		t.Errorf("a lost list is taken for %q", got.text())
	}
	if got := policyOf(map[string]Policy{own.id(): own}, own.id()); got.text() != own.text() {
		t.Errorf("a known list is taken for %q", got.text())
	}
}

// A host that has seen many policies forgets those that no endpoint has.
func TestPoliciesAreForgotten(t *testing.T) {
	t.Parallel()
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
	h := hosts[0]
	h.mustEnsure(h.spec(ModeBridge))
	used := Policy{SNAT: true, Direct: prefixes("203.0.113.0/24")}
	h.running(0, ModeBridge, used)
	if err := h.Do(func() error {
		for i := range policiesBeforeForgetting + 2 {
			if err := h.LearnPolicy(t.Context(), Policy{SNAT: true, Direct: prefixes(fmt.Sprintf("10.%d.0.0/16", i))}); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	s, err := h.readState()
	if err != nil {
		t.Fatal(err)
	}
	if _, known := s.Policies[used.id()]; !known || len(s.Policies) > policiesBeforeForgetting {
		t.Errorf("%d policies are known; the used one: %v", len(s.Policies), known)
	}
	h.whole("with many policies")
}
