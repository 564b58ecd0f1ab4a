// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import "testing"

// TestBridgeNamesHaveOneRule is that of Docker's option and of the conflist's key, and not of what is read back.
func TestBridgeNamesHaveOneRule(t *testing.T) {
	t.Parallel()
	for name, ok := range map[string]bool{
		"azure0": true, "azure12": true, "a": true, "Br-1_x.100": true, "a23456789012345": true, "0": true,
		"": false, "a234567890123456": false, ".": false, "..": false, ".a": false, "-a": false, "_a": false, "a b": false, "a/b": false, `a\b`: false,
		"a:b": false, "a@b": false, "a%d": false, "a\n": false, "ä": false, "a*": false, "azv": false, "azc1": false, "azv0123456789ab": false,
	} {
		if err := CheckBridgeName(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// TestABridgeThatAnEarlierBuildNamedIsReadBack: such a build took more names, and its host.json is good.
func TestABridgeThatAnEarlierBuildNamedIsReadBack(t *testing.T) {
	t.Parallel()
	for name, ok := range map[string]bool{
		"azure0": true, "_azure": true, ".x": true, "br@0": true, "br#1": true, "azure,0": true,
		"..": false, "../x": false, "a b": false, "azv1": false, "a%d": false, "a2345678901234567": false,
	} {
		s := hostState{Version: stateVersion, NICs: map[string]nicState{"00:0d:3a:04:75:98": {Bridge: name}}}
		if err := s.Check(); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}
