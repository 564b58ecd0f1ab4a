// Copyright (c) The azure-vnet authors. MIT licence.

package ipamdriver

import (
	"net/netip"
	"testing"
)

func TestAPoolIDSaysAllThatALaterCallNeeds(t *testing.T) {
	for _, c := range []struct {
		id   poolID
		want string
	}{
		{poolID{"00:0d:3a:04:75:98", netip.MustParsePrefix("10.240.0.0/16"), netip.Prefix{}, "0123456789ab"}, "000d3a047598-10.240.0.0_16--0123456789ab"},
		{poolID{"00:0d:3a:04:75:98", netip.MustParsePrefix("10.240.0.0/16"), netip.MustParsePrefix("10.240.7.0/24"), "0123456789ab"}, "000d3a047598-10.240.0.0_16-10.240.7.0_24-0123456789ab"},
	} {
		if got := c.id.String(); got != c.want {
			t.Errorf("got %s, want %s", got, c.want)
		}
		if got, err := parsePoolID(c.want); err != nil || got != c.id {
			t.Errorf("%s reads as %v, %v", c.want, got, err)
		}
	}
}

func TestForeignPoolIDsAreRefused(t *testing.T) {
	for _, s := range []string{
		"", "LocalDefault/10.240.0.0/16", "000d3a047598-10.240.0.0_16-0123456789ab",
		"000D3A047598-10.240.0.0_16--0123456789ab",              // upper case
		"000d3a047598-10.240.0.1_16--0123456789ab",              // host bits
		"000d3a047598-10.240.0.0_16-10.250.0.0_24-0123456789ab", // range outside
		"000d3a047598-10.240.0.0_16-10.0.0.0_8-0123456789ab",    // range around
		"000d3a047598-10.240.0.0_16--0123",                      // short serial
		"000d3a047598-10.240.0.0_16--0123456789ab-",             // more
		"000d3a047598-fd00::_64--0123456789ab",                  // IPv6
		"../../etc/passwd", "000d3a047598-10.240.0.0_16--0123456789ab\n",
	} {
		if id, err := parsePoolID(s); err == nil {
			t.Errorf("%q reads as %v", s, id)
		}
	}
}

func FuzzParsePoolID(f *testing.F) {
	f.Add("000d3a047598-10.240.0.0_16-10.240.7.0_24-0123456789ab")
	f.Add("000d3a047598-10.240.0.0_16--0123456789ab")
	f.Add("---")
	f.Fuzz(func(t *testing.T, s string) {
		if id, err := parsePoolID(s); err == nil && id.String() != s {
			t.Errorf("%q is written back as %q", s, id)
		}
	})
}

func TestSerialsDiffer(t *testing.T) {
	if a, b := newSerial(), newSerial(); a == b {
		t.Errorf("%s twice", a)
	}
}
