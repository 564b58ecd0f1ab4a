// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// view is what a choice rests on: the state under its lock, and what was read
// of the world before.
type view struct {
	*state
	answer answer
	occupied
	now time.Duration
}

// occupied are addresses that something of the host has.
type occupied struct {
	onHost map[netip.Addr]string // on an interface, with its name
	led    map[netip.Addr]int    // by a route that leads to the address alone, with the link's index; those of our containers are among them
	nameOf func(link int) string
}

// standing is why an address can be lent, or not.
type standing int

const (
	isFresh   standing = iota // never lent
	isRested                  // lent before, long enough ago
	isCooling                 // lent until lately
	isHeld                    // by an owner
	isOnHost                  // by an interface of the host
	isLed                     // by nobody's lease, and a route leads to it: a container has it that no lease tells of
)

func (v *view) standingOf(a netip.Addr) standing {
	if _, ok := v.Leases[a]; ok {
		return isHeld
	}
	if _, ok := v.onHost[a]; ok {
		return isOnHost
	}
	if _, ok := v.led[a]; ok {
		return isLed
	}
	r, ok := v.Freed[a]
	switch {
	case !ok:
		return isFresh
	case v.now >= r.Until:
		return isRested
	}
	return isCooling
}

// pickAddress chooses the address for r: one never lent, else the one released longest
// ago, which among cooling addresses is the last resort.
func (p *Pool) pickAddress(v *view, r Request) (Lease, error) {
	nic, sub, err := findSubnet(v.answer.NICs, r.MAC, r.Prefix)
	if err != nil {
		return Lease{}, err
	}
	l := Lease{Addr: r.Addr, Owner: r.Owner, MAC: nic.MAC, Prefix: sub.Prefix, Since: v.now, Pod: r.Pod, Linkless: r.Linkless}
	if r.Addr.IsValid() {
		return l, p.checkLendable(v, nic, sub, r.Addr)
	}
	if r.Range.IsValid() && (r.Range.Bits() < sub.Prefix.Bits() || !sub.Prefix.Contains(r.Range.Addr())) {
		return l, fmt.Errorf("range %s: %w: it does not lie in subnet %s", r.Range, ErrNotOurs, sub.Prefix)
	}
	best := isHeld
	for _, a := range sub.Secondary {
		if r.Range.IsValid() && !r.Range.Contains(a) {
			continue
		}
		if is := v.standingOf(a); is < best || is == best && is != isFresh && v.Freed[a].At < v.Freed[l.Addr].At {
			best, l.Addr = is, a
		}
	}
	if best >= isHeld {
		return l, p.explainExhausted(v, nic, sub, r.Range)
	}
	l.Early = best == isCooling
	return l, nil
}

// checkLendable says whether the address that was asked for can be given. That it
// cools is no reason: who asks by name had it before, or knows.
func (p *Pool) checkLendable(v *view, nic NIC, sub Subnet, a netip.Addr) error {
	if l, ok := v.Leases[a]; ok {
		return fmt.Errorf("%w: %s is held by %s", ErrInUse, a, l.Holder())
	}
	switch {
	case !sub.Prefix.Contains(a):
		return fmt.Errorf("address %s: %w: it does not lie in subnet %s", a, ErrNotOurs, sub.Prefix)
	case a == sub.Primary:
		return ownAddress(a, nic)
	case a == sub.Prefix.Addr().Next():
		return fmt.Errorf("address %s: %w: it is the gateway of subnet %s", a, ErrNotOurs, sub.Prefix)
	case !sub.Prefix.Contains(a.Next()):
		return fmt.Errorf("address %s: %w: Azure reserves it, as the broadcast address of subnet %s", a, ErrNotOurs, sub.Prefix)
	case sub.reserves(a):
		return fmt.Errorf("address %s: %w: Azure reserves it, as the first four and the last of subnet %s", a, ErrNotOurs, sub.Prefix)
	}
	if slices.Contains(sub.Secondary, a) {
		switch v.standingOf(a) {
		case isOnHost:
			return fmt.Errorf("address %s: %w: %s", a, ErrNotOurs, p.describeOnHost([]string{a.String()}, v.onHost[a]))
		case isLed:
			return fmt.Errorf("%w: %s", ErrInUse, v.describeLed(a))
		}
		return nil
	}
	for _, other := range v.answer.NICs {
		if slices.ContainsFunc(other.Subnets, func(s Subnet) bool { return s.Primary == a }) {
			return ownAddress(a, other)
		}
		if slices.Contains(other.Secondaries(), a) {
			return fmt.Errorf("address %s: %w: it is an ipconfig of NIC %s and not of NIC %s", a, ErrNotOurs, other.MAC, nic.MAC)
		}
	}
	return fmt.Errorf("address %s: %w: NIC %s has no ipconfig with it%s; add one: %s --private-ip-address %s",
		a, ErrNotOurs, nic.MAC, p.describeAge(v), addCommand, a)
}

func ownAddress(a netip.Addr, nic NIC) error {
	return fmt.Errorf("address %s: %w: it is the own address of NIC %s, which the host has", a, ErrNotOurs, nic.MAC)
}

const addCommand = "az network nic ip-config create -g GROUP --nic-name NIC -n NAME"

// explainExhausted says why nothing can be lent, and what helps: each case has another
// remedy.
func (p *Pool) explainExhausted(v *view, nic NIC, sub Subnet, within netip.Prefix) error {
	c := v.countSubnet(nic.MAC, sub)
	where := fmt.Sprintf("NIC %s in subnet %s", nic.MAC, sub.Prefix)
	if len(sub.Secondary) == 0 {
		return fmt.Errorf("%w: %s has %s and no secondary one%s; add some: %s",
			ErrExhausted, where, plural(c.Configs, "ipconfig"), p.describeAge(v), addCommand)
	}
	counts := fmt.Sprintf("%s has %s", where, c)
	if i := slices.IndexFunc(sub.Secondary, func(a netip.Addr) bool { return v.standingOf(a) == isLed }); i >= 0 {
		counts += " (" + v.describeLed(sub.Secondary[i]) + ")"
	}
	var on []string
	var dev string
	for _, a := range sub.Secondary {
		if v.standingOf(a) == isOnHost {
			on, dev = append(on, a.String()), v.onHost[a]
		}
	}
	switch {
	case c.Free+c.Cooling > 0:
		return fmt.Errorf("%w in range %s: %s%s; widen the range, or add an ipconfig in it: %s --private-ip-address ADDRESS",
			ErrExhausted, within, counts, p.describeAge(v), addCommand)
	case len(on) > 0:
		return fmt.Errorf("%w: %s; %s", ErrExhausted, counts, p.describeOnHost(on, dev))
	}
	return fmt.Errorf("%w: %s%s; remove containers, or add ipconfigs: %s", ErrExhausted, counts, p.describeAge(v), addCommand)
}

// describeLed tells of an address that a container has without a lease.
func (v *view) describeLed(a netip.Addr) string {
	return fmt.Sprintf("%s is led to %s by a route, and no lease tells of it: it is a container's of another plugin, such as Azure's own azure-vnet, or one whose lease was lost and is restored within a minute", a, v.nameOf(v.led[a]))
}

// describeOnHost tells of addresses that an interface of the host holds.
func (p *Pool) describeOnHost(addrs []string, dev string) string {
	text := strings.Join(addrs[:min(len(addrs), 3)], ", ")
	if more := len(addrs) - 3; more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	text = fmt.Sprintf("the host itself holds %s (interface %s), as cloud-init has it", text, dev)
	remedy := p.cfg.Remedy
	if p.cfg.Reclaim {
		return text + ": " + cmp.Or(remedy, "reclaim=on takes them back: the plugin within 30 s, CNI at the next ADD that finds no other")
	}
	return text + ": " + cmp.Or(remedy, "set reclaim=on") + `, and for the next boot put "datasource: {Azure: {apply_network_config_for_secondary_ips: false}}" into /etc/cloud/cloud.cfg.d/90-azure-vnet.cfg`
}

// describeAge warns, within an error, that the list may be old.
func (p *Pool) describeAge(v *view) string {
	f := p.describeFailures(v.state)
	age := v.now - v.answer.At
	switch {
	case f == "":
		return ""
	case v.answer.At == 0:
		return fmt.Sprintf(" (as known before the boot, since when: %s)", f)
	case age < p.cfg.QueryInterval:
		return ""
	}
	return fmt.Sprintf(" (as known %v ago, since when: %s)", age.Round(time.Second), f)
}

func plural(n int, noun string) string {
	switch {
	case n == 1:
		return "1 " + noun
	case strings.HasSuffix(noun, "s"):
		noun += "e"
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
