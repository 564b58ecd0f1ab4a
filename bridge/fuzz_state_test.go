// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"azurevnet/internal/statefile"
)

// FuzzHostState has any host.json. An unreadable file is set aside, byte for byte, before a new one is written. A
// readable file of this boot keeps its entries when one of them changes, and all its addresses are IPv4.
func FuzzHostState(f *testing.F) {
	boot, err := statefile.BootID()
	if err != nil {
		f.Fatal(err)
	}
	good := `{"version":2,"boot":"` + boot + `","nics":{"00:0d:3a:04:75:98":{"name":"eth0","bridge":"azure0","primary":true,"subnet":"10.240.0.0/16","prepared":true},"00:0d:3a:04:75:99":{"transparent":true}},` +
		`"policies":{"1b2c3d4e":{"snat":true,"direct":["10.0.0.0/8"]}},"ports":{"azv1a2b3c4d5e6":[{"proto":"tcp","hostPort":8080,"port":80}]},"zones":{"azure0":"public"},"later":[1]}`
	f.Add([]byte(good))
	f.Add([]byte(good[:len(good)/2]))
	f.Add(make([]byte, 64))
	f.Add([]byte(`{"version":1,"boot":"` + boot + `"}`))
	f.Add([]byte(`{"version":2,"boot":"another","nics":null}`))
	f.Add([]byte(`{"version":2,"boot":"` + boot + `","nics":{"00:0d:3a:04:75:98":{"bridge":"../x"}}}`))
	f.Add([]byte(`{"version":2,"boot":"` + boot + `","policies":{"1b2c3d4e":{"direct":["fd00::/8"]}},"ports":{"":[{"hostPort":0}]}}`))
	h := New(Config{Run: f.TempDir()})
	path := h.path("host.json")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		f.Fatal(err)
	}
	alike := cmp.Options{cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})}
	f.Fuzz(func(t *testing.T, body []byte) {
		for _, old := range statefile.ListAside(path) {
			os.Remove(old)
		}
		if err := os.WriteFile(path, body, 0o600); err != nil {
			t.Fatal(err)
		}
		raw, rawErr := statefile.Read[hostState](path)
		before, err := h.readState()
		if err != nil || rawErr != nil && !errors.Is(rawErr, statefile.ErrUnreadable) {
			t.Fatal(err, rawErr)
		}
		if rawErr == nil && raw.Boot == boot && len(before.NICs) != len(raw.NICs) {
			t.Errorf("%d NICs of %d are read", len(before.NICs), len(raw.NICs))
		}
		const mac = "02:00:00:00:00:01"
		if err := h.updateState(t.Context(), "fuzz", func(s *hostState) error { s.NICs[mac] = nicState{Name: "fuzz"}; return nil }); err != nil {
			t.Fatal(err)
		}
		before.NICs[mac] = nicState{Name: "fuzz"}
		after, err := statefile.Read[hostState](path)
		if diff := cmp.Diff(*before, after, alike); err != nil || diff != "" {
			t.Errorf("%v (-want +got):\n%s", err, diff)
		}
		for mac, n := range after.NICs {
			if hw, err := parseMAC(mac); err != nil || hw.String() != mac || n.Subnet.IsValid() && !n.Subnet.Addr().Is4() {
				t.Errorf("NIC %q has the subnet %s: %v", mac, n.Subnet, err)
			}
		}
		aside := statefile.ListAside(path)
		if rawErr == nil {
			if len(aside) > 0 {
				t.Errorf("a file that can be read was set aside: %q", body)
			}
			return
		}
		if len(aside) != 1 {
			t.Fatalf("%q is unreadable, and set aside are %q", body, aside)
		}
		if kept, err := os.ReadFile(aside[0]); err != nil || string(kept) != string(body) {
			t.Errorf("%q was set aside as %q: %v", body, kept, err)
		}
	})
}
