// Copyright (c) The azure-vnet authors. MIT licence.

package driver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"azurevnet/bridge"
	"azurevnet/pool"
)

// names are an engine's: containers by endpoint, networks by id.
type names map[string]string

func (n names) Container(_ context.Context, endpoint string) (string, string, error) {
	if name, ok := n[endpoint]; ok {
		return name, "azure", nil
	}
	return "", "", errors.New("no such endpoint")
}

func (n names) Network(_ context.Context, id string) (string, error) {
	if name, ok := n[id]; ok {
		return name, nil
	}
	return "", errors.New("no such network")
}

// mute is an engine that nobody may ask.
type mute struct{ t *testing.T }

func (m mute) Container(context.Context, string) (string, string, error) {
	m.t.Error("the engine is asked for a container")
	return "", "", errors.New("mute")
}

func (m mute) Network(context.Context, string) (string, error) {
	m.t.Error("the engine is asked for a network")
	return "", errors.New("mute")
}

func TestHoldersInDockersWords(t *testing.T) {
	const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for name, c := range map[string]struct {
		engine      Engine
		owner, want string
	}{
		"a container":                             {names{id: "web"}, "docker/" + id, "container web of network azure"},
		"a container that the engine knows not":   {names{}, "docker/" + id, "the container whose EndpointID in docker network inspect is 0123456789ab…"},
		"a container, and no engine is asked":     {nil, "docker/" + id, "the container whose EndpointID in docker network inspect is 0123456789ab…"},
		"a runtime's container":                   {names{}, "cni/pods/c0ffee/eth0", "CNI container c0ffee (interface eth0, network pods)"},
		"a container of the word attach":          {names{}, "attach/pods/c0ffee/eth0", "CNI container c0ffee (interface eth0, network pods)"},
		"an owner whose alias has only its hash":  {names{}, "#0123", "#0123"},
		"an owner that nobody of ours would have": {names{}, "", ""},
	} {
		if got := New(Config{Engine: c.engine}).nameOwner(t.Context(), c.owner); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// The id of a pool or of an endpoint tells a Docker user nothing.
func TestErrorsDoNotNameTheEndpointByItsOwner(t *testing.T) {
	err := fmt.Errorf("attach %se1: %w", OwnerPrefix, bridge.ErrAttached)
	if got := New(Config{}).inDockersWords(t.Context(), "e1", err); got.Error() != "attach the endpoint: "+bridge.ErrAttached.Error() {
		t.Error(got)
	}
}

// The id of one endpoint may begin the id of another one.
func TestErrorsKeepOwnersThatOnlyBeginAlike(t *testing.T) {
	err := fmt.Errorf("detach docker/ab: docker/abcd has it, and docker/ab. /run/docker/ab: %w", bridge.ErrAttached)
	got := New(Config{}).inDockersWords(t.Context(), "ab", err)
	if want := "detach the endpoint: docker/abcd has it, and the endpoint. /run/docker/ab: " + bridge.ErrAttached.Error(); got.Error() != want {
		t.Errorf("%v, want %s", got, want)
	}
	if !errors.Is(got, bridge.ErrAttached) {
		t.Error("the error's chain is lost")
	}
}

// An error that names no owner is not changed.
func TestErrorsWithoutAHolderStayAsTheyAre(t *testing.T) {
	for _, err := range []error{bridge.ErrAttached, &bridge.InUseError{}, nil} {
		if got := New(Config{}).inDockersWords(t.Context(), "e", err); got != err {
			t.Errorf("%v became %v", err, got)
		}
	}
}

// Two networks have the same auxiliary address. The error of the second names both networks and, if networks.json has it,
// the address's name. An earlier release wrote no names there.
func TestAnAuxiliaryAddressThatAnotherHolds(t *testing.T) {
	addr := netip.MustParseAddr("10.240.0.5")
	network := func(owner, name string) Network {
		return Network{MAC: "00:0d:3a:04:75:98", Prefix: netip.MustParsePrefix("10.240.0.0/16"), Aux: []Aux{{Addr: addr, Owner: owner, Name: name}}}
	}
	d := withNetworks(t, map[string]Network{"a": network("docker/x", "printer"), "b": network("docker/y", "")})
	d.cfg.Engine = names{"a": "azure"}
	if err := d.holdAux(t.Context(), "a", d.must(t, "a"), d.must(t, "a").Aux[0], false); err != nil {
		t.Fatal(err)
	}
	aux := d.must(t, "b").Aux[0]
	err := d.nameHolder(t.Context(), "b", aux, d.holdAux(t.Context(), "b", d.must(t, "b"), aux, false))
	const want = "an auxiliary address of network b, 10.240.0.5: address in use: it is auxiliary address printer of network azure"
	if !errors.Is(err, pool.ErrInUse) || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	d.cfg.Engine = mute{t} // HoldAllAux words no error, so it asks for no name
	if err := d.HoldAllAux(t.Context()); err != nil {
		t.Errorf("it delays others: %v", err)
	}
}

func (d *Driver) must(t *testing.T, id string) Network {
	t.Helper()
	n, err := d.findNetwork(id)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// A network that an earlier release wrote down has no names of its auxiliary addresses: a repeat of its creation is
// success all the same, and its leases are its own.
func TestAuxiliaryAddressesWithoutAName(t *testing.T) {
	before := Aux{Addr: netip.MustParseAddr("10.240.0.5"), Owner: "docker/x"}
	now := before
	now.Name = "printer"
	n := Network{Aux: []Aux{before}}
	if !n.equal(Network{Aux: []Aux{now}}) || !before.same(now) || before.same(Aux{Addr: before.Addr, Owner: "docker/y"}) {
		t.Error("a name makes the difference")
	}
	if got := before.describe("azure") + ", " + now.describe("azure"); got != "an auxiliary address of network azure, auxiliary address printer of network azure" {
		t.Error(got)
	}
	if long := (Aux{Name: strings.Repeat("x", 1000)}).describe("azure"); len(long) > 100 {
		t.Error("a name of any length is told")
	}
}
