// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import "testing"

// TestBridgeNamesHaveOneRule is that of Docker's option and of the conflist's key, and of what is read back.
func TestBridgeNamesHaveOneRule(t *testing.T) {
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
