// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"azurevnet/internal/statefile"
)

var compareState = cmp.Options{compareAddr, cmpopts.EquateEmpty()}

// everything is a state with every field set, and with what JSON must escape.
func everything() state {
	return state{
		Version: 1, Boot: "b", Adopted: true,
		Answers: map[string]answer{"wireserver": {
			NICs: []NIC{{MAC: mac1, Primary: true, Subnets: []Subnet{
				{Prefix: prefix("10.0.0.0/24"), Primary: addr("10.0.0.4"), Secondary: []netip.Addr{addr("10.0.0.5"), addr("10.0.0.6")}},
				{Prefix: prefix("10.0.1.0/24")}}}},
			At: 1, Notes: []string{"ünicode", `a "quote"`}, Failure: "<html>\n\\\"", FailedAt: 2,
		}, "imds": {}},
		Leases: map[netip.Addr]record{
			addr("10.0.0.5"):   {Lease{Owner: "docker/a", MAC: mac1, Prefix: prefix("10.0.0.0/24"), Since: 3, Linkless: true, Early: true}, 4},
			addr("10.0.0.100"): {Lease: Lease{Owner: "cni/<é\x00\"\\>/x", MAC: mac2, Prefix: prefix("10.0.1.0/24"), Since: time.Hour}},
		},
		Freed: map[netip.Addr]rest{addr("10.0.0.6"): {-1, 6}},
	}
}

func TestAStateIsReadBackAsItWasWritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "leases.json")
	for _, want := range []state{{Version: 1}, {Version: 1, Leases: map[netip.Addr]record{addr("10.0.0.5"): {}}}, everything()} {
		err := statefile.Update(t.Context(), path, "test", func(s *state) error { *s = want; return nil })
		if err != nil {
			t.Fatal(err)
		}
		got, err := statefile.Read[state](path)
		if diff := cmp.Diff(want, got, compareState); err != nil || diff != "" {
			t.Errorf("read back: %v (-want +got):\n%s", err, diff)
		}
	}
}

// Whatever the file holds, a lease is given or refused, and the file can be read
// afterwards. Try it with -fuzzminimizetime 5x: it works on a real file.
func FuzzLeases(f *testing.F) {
	leasesSeeds(f)
	vm := azure(nic(mac1, "10.0.0.0/24", 4))
	p := newPool(f, vm)
	p.sources[0].fetch = func(context.Context) ([]byte, error) { return []byte(vm.body), nil } // no HTTP, for speed
	f.Fuzz(func(t *testing.T, body []byte) {
		if err := os.WriteFile(p.path, body, 0o600); err != nil {
			t.Fatal(err)
		}
		vm.pass(time.Hour) // an earlier turn's answer or failure is old
		l, err := p.Lease(t.Context(), Request{Owner: "fuzz"})
		if err == nil {
			err = p.Confirm(t.Context(), l)
		}
		s, readErr := statefile.Read[state](p.path)
		if readErr != nil || err == nil && s.Leases[l.Addr].Owner != "fuzz" {
			t.Fatalf("lease %+v, %v; the file: %+v, %v", l, err, s, readErr)
		}
	})
}

// leasesSeeds are files as they are, as crashes leave them, and as a newer
// version writes them.
func leasesSeeds(f *testing.F) {
	s := everything()
	boot, err := bootID()
	if err != nil {
		f.Fatal(err)
	}
	s.Boot = boot // else its leases are void
	body, err := json.Marshal(&s)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(body)
	f.Add(body[:len(body)/2])
	f.Add(make([]byte, 64))
	f.Add([]byte(`{"version":1,"boot":"` + boot + `","leases":{"10.0.0.5":{"owner":"o","since":1,"new":{}}},"more":[1]}`))
}
