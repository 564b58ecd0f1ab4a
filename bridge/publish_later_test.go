// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"net/netip"
	"strings"
	"testing"

	"azurevnet/internal/vnetsim"
)

// publish is the package's, on the VM.
func (h *host) publish(owner string, ports ...PublishedPort) (got []PublishedPort, err error) {
	err = h.Do(func() (err error) { got, err = h.Publish(h.t.Context(), owner, ports); return err })
	return got, err
}

// Ports that are claimed lead to their container from Publish on, and until it is told of none; whoever dies in
// between, a repeat or a round finishes it. Nobody else is given them meanwhile.
func TestPortsAreClaimedThenPublished(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 3}, vnetsim.VMConfig{})
		h, peer := hosts[0], hosts[1]
		h.mustEnsure(h.spec(mode))
		ports := tcpAndUDP(netip.Addr{}, 8080, 5353)
		idle := func() []PublishedPort {
			var all []PublishedPort
			for _, p := range ports {
				p.Idle = true
				all = append(all, p)
			}
			return all
		}
		a, b := h.container(0), h.container(1)
		owner := a.endpoint(mode, Policy{}).Owner
		h.mustAttach(publishing(a.endpoint(mode, Policy{SNAT: true}), idle()...))
		a.answer()
		check := func(when string, leads bool) {
			t.Helper()
			c := &checks{t: t}
			if leads {
				c.sees(peer.Primary, peer.place(), h.Primary, 8080, 5353)
			} else {
				c.refuses(peer.place(), h.Primary, 8080, 5353)
			}
			c.wait.Wait()
			h.whole(when)
			if t.Failed() {
				t.Fatal(when)
			}
		}
		check("claimed", false)
		if _, err := h.attach(publishing(b.endpoint(mode, Policy{SNAT: true}), idle()...)); err == nil || !strings.Contains(err.Error(), "published to "+a.addr.String()) {
			t.Errorf("a claimed port is claimed again: %v", err)
		}
		for _, step := range []string{"publish alias", "publish claims", "publish elements", "publish flows", ""} {
			for _, wish := range [][]PublishedPort{ports, nil} {
				if step != "" {
					h.crash(step, func() { _, _ = h.publish(owner, wish...) })
					if len(wish) == 0 { // an engine does not repeat it: the round, or the container's end, does
						h.reconcile()
					}
				}
				got, err := h.publish(owner, wish...)
				if err != nil || len(got) != len(wish) {
					t.Fatalf("publish %v after a crash at %q: %v, %v", wish, step, got, err)
				}
				check("after a crash at "+step, len(wish) > 0)
			}
		}
		if _, err := h.publish("cni/net/nobody/eth0", ports...); err == nil {
			t.Error("ports of a container that is not attached are published")
		}
		// An idle claim yields to a container that has its default route here.
		h.mustAttach(b.endpoint(mode, Policy{SNAT: true}))
		b.answer()
		if got, err := h.publish(b.endpoint(mode, Policy{}).Owner, ports...); err != nil || len(got) != 2 {
			t.Fatalf("%v, %v", got, err)
		}
		check("published to the second", true)
		if _, err := h.publish(owner, ports...); err == nil || !strings.Contains(err.Error(), "published to "+b.addr.String()) {
			t.Errorf("a port has two containers: %v", err)
		}
		third := h.container(2)
		h.mustAttach(third.endpoint(mode, Policy{}))
		if _, err := h.publish(third.endpoint(mode, Policy{}).Owner, ports...); err == nil {
			t.Error("a port has a container that was connected later, and another one")
		}
		h.whole("after a refusal") // it says nowhere that the container has ports
		h.mustDetach(third.endpoint(mode, Policy{}).Owner)
		// The end of the first, as an engine tells it, takes nothing from the second.
		if _, err := h.publish(owner); err != nil {
			t.Error(err)
		}
		h.mustDetach(owner)
		check("after the first ended", true)
		h.mustDetach(b.endpoint(mode, Policy{}).Owner)
		check("after both ended", false)
		checkFabric(t, v, h.Primary)
	})
}

// Claims that were lost with host.json are named until their container is told its ports again. An engine that takes
// them back changes nothing of that.
func TestLostClaimsAreNamed(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		e := h.container(0).endpoint(mode, Policy{SNAT: true})
		h.mustAttach(publishing(e, PublishedPort{Proto: "tcp", HostPort: 8080, Port: 80, Idle: true}))
		h.sh("rm " + h.path("host.json"))
		h.reconcile()
		named := func(when string) {
			t.Helper()
			if wrong := h.broken(); len(wrong) != 1 || !strings.HasPrefix(wrong[0], "the published ports of "+e.Owner) {
				t.Errorf("%s: broken: %q", when, wrong)
			}
		}
		named("lost")
		if got, err := h.publish(e.Owner); err != nil || len(got) > 0 {
			t.Errorf("taken back: %v, %v", got, err)
		}
		named("taken back")
		if got, err := h.publish(e.Owner, PublishedPort{Proto: "tcp", HostPort: 8080, Port: 80}); err != nil || len(got) != 1 {
			t.Errorf("published again: %v, %v", got, err)
		}
		h.whole("published again")
	})
}
