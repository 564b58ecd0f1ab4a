// Copyright (c) The azure-vnet authors. MIT licence.

package driver

import (
	"errors"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"azurevnet/internal/statefile"
)

// FuzzNetworks reads any networks.json. Docker tells no network twice. So a file that cannot be read stays as it is,
// byte for byte, and the error says where it is and what to do. A file that can be read has networks that other
// packages can take, and a change keeps each of them.
func FuzzNetworks(f *testing.F) {
	files, err := filepath.Glob("testdata/networks*.json")
	if err != nil || len(files) == 0 {
		f.Fatal(files, err)
	}
	for _, name := range files {
		body, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(body)
		f.Add(body[:len(body)/2])
		f.Add(make([]byte, len(body))) // as a power cut leaves it
	}
	f.Add([]byte(earlier))
	f.Add([]byte(`{"version":2,"networks":{}}`))
	f.Add([]byte(`{"version":1,"networks":{"a":{"mac":"m","prefix":"0.0.0.0/0","gateway":"255.255.255.255","mtu":-1,"mode":"other","bridge":"../x"}}}`))
	f.Add([]byte(`{"version":1,"networks":{"a":{"prefix":"10.0.0.0/31"},"A":{"prefix":"10.0.0.0/32","gateway":"10.0.0.0","later":{}}},"more":[1]}`))
	d := New(Config{Dir: f.TempDir(), OnHost: "/on/the/host"})
	path := NetworksFile(d.cfg.Dir)
	f.Fuzz(func(t *testing.T, body []byte) {
		if err := os.WriteFile(path, body, 0o600); err != nil {
			t.Fatal(err)
		}
		file, err := ReadNetworks(d.cfg.Dir)
		if err != nil {
			if !errors.Is(err, statefile.ErrUnreadable) || !strings.Contains(err.Error(), path) {
				t.Errorf("the error does not name the file: %v", err)
			}
			checkLeftAsItIs(t, d, body)
			return
		}
		for id, n := range file.Networks {
			checkNetwork(t, id, n)
		}
		ids := slices.Sorted(maps.Keys(file.Networks))
		if order := file.restoreOrder(); !slices.Equal(slices.Sorted(slices.Values(order)), ids) {
			t.Errorf("%q are restored, and there are %q", order, ids)
		}
		checkChange(t, d, file.Networks)
	})
}

// checkLeftAsItIs calls what would change the file.
func checkLeftAsItIs(t *testing.T, d *Driver, body []byte) {
	t.Helper()
	path := NetworksFile(d.cfg.Dir)
	_, compared := d.ForgetUnlisted(t.Context(), nil)
	changed := d.changeNetworks(t.Context(), "fuzz", func(all map[string]Network) error { clear(all); return nil })
	for _, err := range []error{compared, changed, d.Restore(t.Context())} {
		if err == nil || !strings.Contains(err.Error(), "/on/the/host/networks.json: put a copy in its place") {
			t.Errorf("of an unreadable file: %v", err)
		}
	}
	if left, err := os.ReadFile(path); err != nil || string(left) != string(body) || len(statefile.ListAside(path)) > 0 {
		t.Errorf("the file was %q and is %q, %v; set aside: %q", body, left, err, statefile.ListAside(path))
	}
}

// checkNetwork looks at what the routes of a container derive from.
func checkNetwork(t *testing.T, id string, n Network) {
	t.Helper()
	if n.Prefix.IsValid() && (!n.Prefix.Addr().Is4() || n.Prefix != n.Prefix.Masked()) || n.Gateway.IsValid() && !n.Prefix.Contains(n.Gateway) {
		t.Errorf("network %q has the subnet %s and the gateway %s", id, n.Prefix, n.Gateway)
	}
	for _, p := range n.bridgePolicy().Direct {
		if !p.IsValid() || !p.Addr().Is4() {
			t.Errorf("network %q has direct %s", id, p)
		}
	}
	for _, a := range n.Aux {
		if !a.Addr.Is4() {
			t.Errorf("network %q has the auxiliary address %s", id, a.Addr)
		}
	}
	if !n.Gateway.IsValid() {
		return
	}
	for _, r := range routesByGateway(n.Prefix, n.Gateway) {
		if p, err := netip.ParsePrefix(r.Destination); err != nil || !n.Prefix.Overlaps(p) || p.Bits() < n.Prefix.Bits() {
			t.Errorf("network %q of %s has a route to %s", id, n.Prefix, r.Destination)
		}
	}
}

// checkChange adds a network and takes it away again.
func checkChange(t *testing.T, d *Driver, before map[string]Network) {
	t.Helper()
	const added = "an id that no engine has"
	alike := cmp.Options{cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})}
	want := maps.Clone(before)
	if want == nil {
		want = map[string]Network{}
	}
	want[added] = Network{MAC: "00:0d:3a:04:75:98", Prefix: netip.MustParsePrefix("10.240.0.0/16"), SNAT: true}
	for _, change := range []func(map[string]Network){
		func(all map[string]Network) { all[added] = want[added] },
		func(all map[string]Network) { delete(all, added); delete(want, added) },
	} {
		if err := d.changeNetworks(t.Context(), "fuzz", func(all map[string]Network) error { change(all); return nil }); err != nil {
			t.Fatal(err)
		}
		after, err := ReadNetworks(d.cfg.Dir)
		if diff := cmp.Diff(want, after.Networks, alike); err != nil || diff != "" {
			t.Fatalf("%v (-want +got):\n%s", err, diff)
		}
	}
	if forgotten, err := d.ForgetUnlisted(t.Context(), nil); err != nil || len(forgotten) > 0 {
		t.Errorf("one list without them forgets %q: %v", forgotten, err)
	}
	clear(d.missing)
}
