// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
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
			At: 1, Notes: []string{"ünicode", `a "quote"`}, Failure: "<html>\n\\\"", FailedAt: 2, Waited: 3,
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
	for _, want := range []state{{Version: 1}, {Version: 1, Leases: map[netip.Addr]record{addr("10.0.0.5"): {Lease: Lease{Owner: "o"}}}}, everything()} {
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

// absurd are files that are JSON, and that no program writes. BOOT is this boot's id. What
// is said of leases and of rested addresses has the file set aside.
var absurd = []struct{ name, leases, freed, answers string }{
	{name: "a lease of an IPv6 address", leases: `"fd00::5":{"owner":"o","mac":"m","prefix":"fd00::/64","since":1}`},
	{name: "a lease of an IPv4 address as IPv6", leases: `"::ffff:10.0.0.5":{"owner":"o","since":1}`},
	{name: "a lease of no address", leases: `"":{"owner":"o","since":1}`},
	{name: "a lease of nobody", leases: `"10.0.0.5":null`},
	{name: "a lease in a subnet of IPv6", leases: `"10.0.0.5":{"owner":"o","prefix":"fd00::/64","since":1}`},
	{name: "a lease of 2^62 ns", leases: `"10.0.0.5":{"owner":"o","since":4611686018427387904}`},
	{name: "a lease of 2^63 ns", leases: `"10.0.0.5":{"owner":"o","since":9223372036854775808}`},
	{name: "a lease of -2^63 ns", leases: `"10.0.0.5":{"owner":"o","since":-9223372036854775808}`},
	{name: "a lease confirmed at 1e300", leases: `"10.0.0.5":{"owner":"o","since":1,"confirmed":1e300}`},
	{name: "an owner that is a list", leases: `"10.0.0.5":{"owner":["o"],"since":1}`},
	{name: "a lease that is a number", leases: `"10.0.0.5":7`},
	{name: "a rested address of IPv6", freed: `"fd00::6":{"at":1,"until":2}`},
	{name: "an address that cools for ever", freed: `"10.0.0.5":{"at":1,"until":9223372036854775807}`},
	{name: "an answer in the far future", answers: `"wireserver":{"at":9223372036854775807,"nics":NICS}`},
	{name: "an answer that comes yet", answers: `"wireserver":{"at":3153600000000000000,"nics":NICS}`},
	{name: "an answer with a subnet of IPv6", answers: `"wireserver":{"at":1,"nics":[{"mac":"00:0d:3a:04:75:98","subnets":[{"prefix":"fd00::/64","secondary":["fd00::5"]}]}]}`},
	{name: "an answer without a prefix", answers: `"wireserver":{"at":1,"nics":[{"mac":"00:0d:3a:04:75:98","subnets":[{"prefix":"","secondary":["10.0.0.9"]}]}]}`},
	{name: "an answer with addresses of elsewhere", answers: `"wireserver":{"at":1,"nics":[{"mac":"00:0d:3a:04:75:98","primary":true,"subnets":[{"prefix":"10.0.0.0/24","secondary":["192.0.2.9",""]}]}]}`},
	{name: "an answer without a MAC", answers: `"wireserver":{"at":1,"nics":[{"mac":"","subnets":[{"prefix":"10.0.0.0/24","secondary":["10.0.0.9"]}]}]}`},
	{name: "an answer without a subnet", answers: `"wireserver":{"at":1,"nics":[{"mac":"00:0d:3a:04:75:98","subnets":null}]}`},
	{name: "null for everything", answers: `"wireserver":null`},
}

// file is the absurd part in a file that is as it should be otherwise.
func absurdFile(leases, freed, answers string) string {
	boot, err := statefile.BootID()
	if err != nil {
		panic(err)
	}
	or := func(part string) string {
		if part == "" {
			return "null"
		}
		return "{" + part + "}"
	}
	nics := `[{"mac":"00:0d:3a:04:75:98","primary":true,"subnets":[{"prefix":"10.0.0.0/24","primary":"10.0.0.4","secondary":["10.0.0.9"]}]}]`
	return `{"version":1,"boot":"` + boot + `","adopted":true,"leases":` + or(leases) + `,"freed":` + or(freed) + `,"answers":` + or(strings.ReplaceAll(answers, "NICS", nics)) + `}`
}

// State that is JSON and absurd inside ends no process. It is kept aside, and what links prove is known again. An
// absurd answer costs itself alone.
func TestAStateThatIsAbsurd(t *testing.T) {
	for _, test := range absurd {
		t.Run(test.name, func(t *testing.T) {
			p := newPool(t, azure(nic(mac1, "10.0.0.0/24", 4)))
			running := Lease{Addr: addr("10.0.0.6"), Owner: "running", MAC: mac1, Prefix: prefix("10.0.0.0/24")}
			p.cfg.Links = func(context.Context) ([]Lease, error) { return []Lease{running}, nil }
			body := absurdFile(test.leases, test.freed, test.answers)
			if err := os.WriteFile(p.path, []byte(body), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := p.Status(t.Context())
			if err != nil {
				t.Errorf("status: %v", err)
			}
			if _, err := p.Collect(t.Context(), func(context.Context) (map[netip.Addr]bool, error) {
				return map[netip.Addr]bool{running.Addr: true}, nil
			}); err != nil {
				t.Errorf("collect: %v", err)
			}
			if l := p.must(t, Request{Owner: "new"}); l.Addr != addr("10.0.0.5") || l.Prefix != prefix("10.0.0.0/24") {
				t.Errorf("lent %+v", l)
			}
			aside := statefile.ListAside(p.path)
			if test.answers != "" {
				if len(aside) > 0 {
					t.Errorf("leases were set aside because of an answer: %q", aside)
				}
				return
			}
			if len(aside) != 1 {
				t.Fatalf("set aside are %q", aside)
			}
			if kept, err := os.ReadFile(aside[0]); err != nil || string(kept) != body {
				t.Errorf("kept aside is %s, %v", kept, err)
			}
			if l, ok, err := p.FindLease(t.Context(), running.Addr); !ok || l.Owner != "running" || err != nil {
				t.Errorf("of the running container, %+v is known, %v", l, err)
			}
		})
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
	boot, err := statefile.BootID()
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
	for _, a := range absurd {
		f.Add([]byte(absurdFile(a.leases, a.freed, a.answers)))
	}
	f.Add([]byte(`{"version":1,"boot":"` + boot + `","leases":{"10.0.0.5":{"owner":"o","since":1,"new":{}}},"more":[1]}`))
}
