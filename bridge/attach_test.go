// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// An attach that cannot be is refused at once, with the reason, and touches nothing.
func TestAttachRefuses(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 3})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		c, d := h.container(0), h.container(1)
		e := c.endpoint(mode, Policy{SNAT: true})
		a := h.mustAttach(e)
		link, _ := linkNames(e.Owner)
		want := Attachment{Owner: e.Owner, Lease: e.Owner, Link: link, Bridge: e.Bridge, NIC: h.MAC, Addr: e.Addr, MAC: MACFor(c.addr), MTU: 1500, InContainer: true}
		if diff := cmp.Diff(want, a, cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
			t.Errorf("the attachment (-want +got):\n%s", diff)
		}
		formers := d.endpoint(mode, Policy{SNAT: true})
		formers.Owner = "docker/former"
		formersLink, _ := linkNames(formers.Owner)
		third := h.Secondaries()[2]
		h.ip("link add "+formersLink+" type veth peer name former0", "link set "+formersLink+" up", "route add "+third.String()+"/32 dev "+formersLink)
		h.sh("mkfifo /run/fifo; touch /run/file")
		root := fmt.Sprintf("/proc/%d/root", h.PidOne())
		whole := h.kernelState()

		change := func(f func(*Endpoint)) Endpoint {
			e := d.endpoint(mode, Policy{SNAT: true})
			f(&e)
			return e
		}
		for want, wish := range map[string]Endpoint{
			"running container has this interface": e,
			"cni/net/c0-0/eth0 has the address":    change(func(e *Endpoint) { e.Addr = netip.PrefixFrom(c.addr, 16) }),
			"eth0 itself has the address":          change(func(e *Endpoint) { e.Addr = netip.PrefixFrom(h.Primary, 16) }),
			"that is not ours: an older azure":     formers,
			"a route to " + third.String():         change(func(e *Endpoint) { e.Addr = netip.PrefixFrom(third, 16) }),
			"1 to 255 bytes and no space":          change(func(e *Endpoint) { e.Owner = "a b" }),
			"must have at most 255":                change(func(e *Endpoint) { e.Lease = strings.Repeat("l", 256) }),
			"not an IPv4 address":                  change(func(e *Endpoint) { e.Addr = netip.MustParsePrefix("fd00::1/64") }),
			"MAC of one interface":                 change(func(e *Endpoint) { e.MAC = mustMAC("01:00:5e:00:00:01") }),
			"not a name for an interface":          change(func(e *Endpoint) { e.IfName = "sixteen-bytes-ab" }),
			"needs an IPv4 gateway":                change(func(e *Endpoint) { e.Gateway = netip.Addr{} }),
			"there is no bridge azure7":            change(func(e *Endpoint) { e.Bridge = "azure7" }),
			"eth0 is not azure-vnet's bridge":      change(func(e *Endpoint) { e.Bridge = "eth0" }),
			"has the MAC 02:00:00:00:00:77":        change(func(e *Endpoint) { e.NIC = "02:00:00:00:00:77" }),
			"no such file":                         change(func(e *Endpoint) { e.Netns = "/nowhere" }),
			"/run/fifo is not a namespace":         change(func(e *Endpoint) { e.Netns = root + "/run/fifo" }),
			"/run/file is not a namespace":         change(func(e *Endpoint) { e.Netns = root + "/run/file" }),
			"ns/uts is a namespace of another":     change(func(e *Endpoint) { e.Netns = fmt.Sprintf("/proc/%d/ns/uts", h.PidOne()) }),
			"is the host's own network namespac":   change(func(e *Endpoint) { e.Netns = fmt.Sprintf("/proc/%d/ns/net", h.PidOne()) }),
			"if lo is in":                          change(func(e *Endpoint) { e.IfName = "lo" }),
		} {
			start := time.Now()
			_, err := h.attach(wish)
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want an error that says %q", err, want)
			}
			if (wish.Owner == e.Owner) != errors.Is(err, ErrAttached) {
				t.Errorf("%v: ErrAttached or not, wrongly", err)
			}
			if took := time.Since(start); took > lockWait/2 {
				t.Errorf("%q took %v", want, took)
			}
		}
		checkSame(t, "after refusals", whole, h.kernelState())
		for _, owner := range []string{formers.Owner, "never/attached", e.Owner, e.Owner} {
			if err := h.detach(owner); err != nil {
				t.Errorf("detach: %v", err)
			}
		}
		h.reconcile()
		if !h.try("ip link show " + formersLink + " && ip route show " + third.String() + " | grep -q " + formersLink) {
			t.Error("the former plugin's link or its route is gone")
		}
	})
}

// A flow that outlives its container would mislead the next one that has the address. A detach deletes the flows
// that the container began or answers, and no other.
func TestDetachForgetsFlows(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		c, other := h.running(0, mode, Policy{SNAT: true}), h.running(1, mode, Policy{SNAT: true})
		for _, from := range []*container{c, other} {
			h.sh(fmt.Sprintf("conntrack -I -p udp -s %s -d 8.8.8.8 --sport 5353 --dport 53 --timeout 100; conntrack -I -p udp -s 192.0.2.7 -d 10.96.0.10 -r %[1]s -q 192.0.2.7 --sport 999 --dport 53 --timeout 100 --reply-port-src 53 --reply-port-dst 999 --src-nat 192.0.2.7 --dst-nat %[1]s || true", from.addr))
		}
		h.mustDetach(c.endpoint(mode, Policy{}).Owner)
		flows := h.sh("conntrack -L -p udp 2>/dev/null")
		if strings.Contains(flows, c.addr.String()+" ") || !strings.Contains(flows, other.addr.String()+" ") {
			t.Errorf("flows of %s are there, or none of %s:\n%s", c.addr, other.addr, flows)
		}
	})
}

// Check names what of one attachment is broken, and of no other.
func TestCheck(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		c, other := h.running(0, mode, Policy{SNAT: true}), h.running(1, mode, Policy{SNAT: true})
		check := func(c *container) error {
			return h.Do(func() error { return h.Check(t.Context(), c.endpoint(mode, Policy{}).Owner) })
		}
		dev := "azure0"
		if mode == ModeTransparent {
			dev, _ = linkNames(c.endpoint(mode, Policy{}).Owner)
		}
		for line, says := range map[string]string{
			"ip neigh del " + c.addr.String() + " dev " + dev:                      "no neighbour entry",
			"ip route del " + c.addr.String() + " table 16863":                     "no route in table 16863",
			"nft delete element ip azure_vnet sources { " + c.addr.String() + " }": "lacks the element of " + c.addr.String(),
		} {
			if err := errors.Join(check(c), check(other)); err != nil {
				t.Errorf("before %q: %v", line, err)
			}
			h.sh(line)
			if err := check(c); err == nil || !strings.Contains(err.Error(), says) {
				t.Errorf("after %q: %v", line, err)
			}
			if err := check(other); err != nil {
				t.Errorf("of another, after %q: %v", line, err)
			}
			h.reconcile()
		}
		h.mustDetach(c.endpoint(mode, Policy{}).Owner)
		if err := check(c); err == nil || !strings.Contains(err.Error(), "is gone") {
			t.Errorf("detached: %v", err)
		}
	})
}
