// Copyright (c) The azure-vnet authors. MIT licence.

package driver

import (
	"context"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/docker/go-plugins-helpers/network"
	"github.com/google/go-cmp/cmp"

	"azurevnet/pool"
)

// withNetworks is a driver whose networks.json has those networks.
func withNetworks(t *testing.T, networks map[string]Network) *Driver {
	t.Helper()
	dir := t.TempDir()
	source := filepath.Join(dir, "interfaces.json")
	if err := os.WriteFile(source, []byte(`{"Interfaces":[{"MacAddress":"000D3A047598","IsPrimary":true,"IPSubnets":[{"Prefix":"10.240.0.0/16",
		"IPAddresses":[{"Address":"10.240.0.4","IsPrimary":true},{"Address":"10.240.0.5"}]}]}`+ofThisMachine()), 0o600); err != nil {
		t.Fatal(err)
	}
	addresses, err := pool.New(pool.Config{Dir: dir, Source: source})
	if err != nil {
		t.Fatal(err)
	}
	d := New(Config{Dir: dir, Pool: addresses})
	if err := d.changeNetworks(t.Context(), "test", func(all map[string]Network) error { maps.Copy(all, networks); return nil }); err != nil {
		t.Fatal(err)
	}
	return d
}

// ofThisMachine is an entry of the list: a list without any NIC of the machine is not believed.
func ofThisMachine() string {
	mac := ""
	all, _ := net.Interfaces() // none: then every list is believed
	for _, i := range all {
		if len(i.HardwareAddr) == 6 && i.Flags&net.FlagLoopback == 0 {
			mac = i.HardwareAddr.String()
		}
	}
	return `,{"MacAddress":"` + mac + `","IPSubnets":[{"Prefix":"10.99.0.0/16","IPAddresses":[{"Address":"10.99.0.4","IsPrimary":true}]}]}]}`
}

// compare gives the driver a list and returns what is known after it.
func compare(t *testing.T, d *Driver, listed ...string) (known []string) {
	t.Helper()
	ids := map[string]bool{}
	for _, id := range listed {
		ids[id] = true
	}
	if _, err := d.ForgetUnlisted(t.Context(), ids); err != nil {
		t.Fatal(err)
	}
	file, err := ReadNetworks(d.cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	return slices.Sorted(maps.Keys(file.Networks))
}

func TestANetworkThatTheEngineLostIsForgotten(t *testing.T) {
	type step struct {
		after  time.Duration
		create string   // a network created just before the list
		listed []string // by the engine
		known  []string // after it
	}
	for name, steps := range map[string][]step{
		"listed always, never": {{0, "", []string{"a", "b"}, []string{"a", "b"}}, {time.Hour, "", []string{"a", "b"}, []string{"a", "b"}}},
		"missing twice, a minute apart": {
			{0, "", []string{"a"}, []string{"a", "b"}},
			{59 * time.Second, "", []string{"a"}, []string{"a", "b"}},
			{time.Second, "", []string{"a"}, []string{"a"}},
		},
		"missing once, then listed, then missing": {
			{0, "", []string{"a"}, []string{"a", "b"}},
			{time.Minute, "", []string{"a", "b"}, []string{"a", "b"}},
			{time.Minute, "", []string{"a"}, []string{"a", "b"}},
		},
		"created again by the same id meanwhile": {
			{0, "", []string{"a"}, []string{"a", "b"}},
			{time.Minute, "b", []string{"a"}, []string{"a", "b"}},
			{time.Minute, "", []string{"a"}, []string{"a"}},
		},
		"all of them": {{0, "", nil, []string{"a", "b"}}, {time.Minute, "", nil, nil}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := withNetworks(t, map[string]Network{"a": {}, "b": {}})
				for i, s := range steps {
					time.Sleep(s.after)
					if s.create != "" {
						d.unmarkMissing(s.create)
					}
					if diff := cmp.Diff(s.known, compare(t, d, s.listed...)); diff != "" {
						t.Errorf("after list %d:\n%s", i+1, diff)
					}
				}
			})
		})
	}
}

func TestAForgottenNetworkGivesBackItsAuxiliaryAddresses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		addr := netip.MustParseAddr("10.240.0.5")
		d := withNetworks(t, map[string]Network{"a": {Aux: []Aux{{Addr: addr, Owner: "docker/x"}}}})
		held := func() bool {
			_, held, err := d.cfg.Pool.FindLease(t.Context(), addr)
			if err != nil {
				t.Fatal(err)
			}
			return held
		}
		want := pool.Request{Owner: "docker/x", MAC: "00:0d:3a:04:75:98", Prefix: netip.MustParsePrefix("10.240.0.0/16"), Addr: addr, Linkless: true}
		if _, err := d.cfg.Pool.Lease(t.Context(), want); err != nil {
			t.Fatal(err)
		}
		compare(t, d)
		if !held() {
			t.Error("it is released after one list")
		}
		time.Sleep(time.Minute)
		compare(t, d)
		if held() {
			t.Error("it is still held")
		}
	})
}

func TestARemovedNetworkGivesBackItsAuxiliaryAddresses(t *testing.T) {
	aux := Aux{Addr: netip.MustParseAddr("10.240.0.5"), Owner: "docker/x", Name: "router"}
	n := Network{MAC: "00:0d:3a:04:75:98", Prefix: netip.MustParsePrefix("10.240.0.0/16"), Aux: []Aux{aux, {Addr: netip.MustParseAddr("10.240.0.9")}}}
	d := withNetworks(t, map[string]Network{"a": n})
	held := func() bool {
		_, held, err := d.cfg.Pool.FindLease(t.Context(), aux.Addr)
		if err != nil {
			t.Fatal(err)
		}
		return held
	}
	if err := d.HoldAllAux(t.Context()); err != nil || !held() {
		t.Fatalf("held: %v, %v", held(), err)
	}
	if err := d.DeleteNetwork(t.Context(), &network.DeleteNetworkRequest{NetworkID: "a"}); err != nil || held() {
		t.Errorf("after the network held: %v, %v", held(), err)
	}
	// A round that read networks.json before.
	if err := d.holdAux(t.Context(), "a", n, aux, false); err != nil || held() {
		t.Errorf("after a late round held: %v, %v", held(), err)
	}
}

func TestAListThatCannotBeWrittenDownIsTakenAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := withNetworks(t, map[string]Network{"a": {}})
		compare(t, d)
		time.Sleep(time.Minute)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := d.ForgetUnlisted(ctx, nil); err == nil {
			t.Error("no error")
		}
		if known := compare(t, d); known != nil {
			t.Errorf("%v is still known", known)
		}
	})
}

// Releases before wrote down no name but the one that was asked for.
func TestNetworksThatNameTheirBridgeAreRestoredFirst(t *testing.T) {
	f := Networks{Networks: map[string]Network{"a": {}, "b": {Bridge: "foo"}, "c": {}, "d": {Bridge: "bar"}}}
	if diff := cmp.Diff([]string{"b", "d", "a", "c"}, f.restoreOrder()); diff != "" {
		t.Error(diff)
	}
}
