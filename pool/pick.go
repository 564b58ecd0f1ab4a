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

// snapshot is what the choice of an address rests on: the state, and what was read about the world before the lock was
// taken.
type snapshot struct {
	*state
	answer answer
	occupied
	now time.Duration
}

// occupied has the addresses that the host or one of its containers has.
type occupied struct {
	onHost map[netip.Addr]string // on a link of the host: the link's name
	routed map[netip.Addr]int    // a route leads to this address alone: the index of the route's link. Our own containers have such routes too
	nameOf func(link int) string // returns the name of a link
}

// lendability says whether an address can be lent now, or why not. Those up to isCooling can be lent, in this order. The
// others cannot.
type lendability int

const (
	isFresh   lendability = iota // it was never lent
	isRested                     // it was released longer ago than it cools
	isCooling                    // it was released lately
	isLeased                     // it is leased
	isOnHost                     // a link of the host has it
	isRouted                     // it is not leased, and a route leads to it: a container has it without a lease
)

// canBeLent reports whether an address of the lendability can be lent.
func (l lendability) canBeLent() bool { return l <= isCooling }

// lendabilityOf returns the lendability of an address.
func (v *snapshot) lendabilityOf(a netip.Addr) lendability {
	if _, ok := v.Leases[a]; ok {
		return isLeased
	}
	if _, ok := v.onHost[a]; ok {
		return isOnHost
	}
	if _, ok := v.routed[a]; ok {
		return isRouted
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

// pickAddress chooses the address for r. A fresh address comes first, then the one that was released longest ago. A
// cooling address is the last resort.
func (p *Pool) pickAddress(v *snapshot, r Request) (Lease, error) {
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
	best := isCooling + 1 // nothing that can be lent
	for _, a := range sub.Secondary {
		if r.Range.IsValid() && !r.Range.Contains(a) {
			continue
		}
		if is := v.lendabilityOf(a); is < best || is == best && is != isFresh && v.Freed[a].At < v.Freed[l.Addr].At {
			best, l.Addr = is, a
		}
	}
	if !best.canBeLent() {
		return l, p.explainExhausted(v, nic, sub, r.Range)
	}
	l.Early = best == isCooling
	return l, nil
}

// checkLendable is an error if an address that was asked for cannot be lent. A cooling address can be: who asks for it
// by name probably had it before.
func (p *Pool) checkLendable(v *snapshot, nic NIC, sub Subnet, a netip.Addr) error {
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
		switch v.lendabilityOf(a) {
		case isOnHost:
			return fmt.Errorf("address %s: %w: %s", a, ErrNotOurs, p.describeOnHost([]string{a.String()}, v.onHost[a]))
		case isRouted:
			return fmt.Errorf("%w: %s", ErrInUse, v.describeRouted(a))
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

// ownAddress is the error about the own address of a NIC.
func ownAddress(a netip.Addr, nic NIC) error {
	return fmt.Errorf("address %s: %w: it is the own address of NIC %s, which the host has", a, ErrNotOurs, nic.MAC)
}

// addCommand is the command in errors that adds an ipconfig.
const addCommand = "az network nic ip-config create -g GROUP --nic-name NIC -n NAME"

// explainExhausted returns the error if no address can be lent. It says why, and what to do: each reason has another
// remedy.
func (p *Pool) explainExhausted(v *snapshot, nic NIC, sub Subnet, within netip.Prefix) error {
	c := v.countSubnet(nic.MAC, sub)
	where := fmt.Sprintf("NIC %s in subnet %s", nic.MAC, sub.Prefix)
	if len(sub.Secondary) == 0 {
		return fmt.Errorf("%w: %s has %s and no secondary one%s; add some: %s",
			ErrExhausted, where, plural(c.Configs, "ipconfig"), p.describeAge(v), addCommand)
	}
	counts := fmt.Sprintf("%s has %s", where, c)
	if i := slices.IndexFunc(sub.Secondary, func(a netip.Addr) bool { return v.lendabilityOf(a) == isRouted }); i >= 0 {
		counts += " (" + v.describeRouted(sub.Secondary[i]) + ")"
	}
	var on []string
	var link string
	for _, a := range sub.Secondary {
		if v.lendabilityOf(a) == isOnHost {
			on, link = append(on, a.String()), v.onHost[a]
		}
	}
	switch {
	case c.Free+c.Cooling > 0:
		return fmt.Errorf("%w in range %s: %s%s; widen the range, or add an ipconfig in it: %s --private-ip-address ADDRESS",
			ErrExhausted, within, counts, p.describeAge(v), addCommand)
	case len(on) > 0:
		return fmt.Errorf("%w: %s; %s", ErrExhausted, counts, p.describeOnHost(on, link))
	}
	return fmt.Errorf("%w: %s%s; remove containers, or add ipconfigs: %s", ErrExhausted, counts, p.describeAge(v), addCommand)
}

// describeRouted says that a container has the address without a lease.
func (v *snapshot) describeRouted(a netip.Addr) string {
	return fmt.Sprintf("%s is led to %s by a route, and no lease tells of it: it is a container's of another plugin, such as Azure's own azure-vnet, or one whose lease was lost and is restored within a minute", a, v.nameOf(v.routed[a]))
}

// describeOnHost says that a link of the host has the addresses, and what to do. link is its name.
func (p *Pool) describeOnHost(addrs []string, link string) string {
	text := strings.Join(addrs[:min(len(addrs), 3)], ", ")
	if more := len(addrs) - 3; more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	text = fmt.Sprintf("the host itself holds %s (interface %s), as cloud-init has it", text, link)
	remedy := p.cfg.Remedy
	if p.cfg.Reclaim {
		return text + ": " + cmp.Or(remedy, "reclaim=on takes them back: the plugin within 30 s, CNI at the next ADD that finds no other")
	}
	return text + ": " + cmp.Or(remedy, "set reclaim=on") + `, and for the next boot put "datasource: {Azure: {apply_network_config_for_secondary_ips: false}}" into /etc/cloud/cloud.cfg.d/90-azure-vnet.cfg`
}

// describeAge says that the known addresses are old, and why. It is "" if they are fresh. An error appends it.
func (p *Pool) describeAge(v *snapshot) string {
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

// plural returns a number with its noun, such as "2 addresses".
func plural(n int, noun string) string {
	switch {
	case n == 1:
		return "1 " + noun
	case strings.HasSuffix(noun, "s"):
		noun += "e"
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
