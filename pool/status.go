// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"azurevnet/internal/statefile"
)

// Status is the pool as an operator sees it. Durations are in ns.
type Status struct {
	Sources  []SourceStatus               `json:"sources"`           // in the order in which they are asked
	NICs     []NICStatus                  `json:"nics"`              // the primary first; empty: none is known
	Leases   map[netip.Addr]Lease         `json:"leases"`            // by address
	Cooling  map[netip.Addr]time.Duration `json:"cooling,omitempty"` // by address: how long it cools yet
	Now      time.Duration                `json:"now"`               // CLOCK_BOOTTIME; the age of a lease is Now − Since
	Warnings []string                     `json:"warnings,omitempty"`
}

// SourceStatus says what came of asking one source.
type SourceStatus struct {
	Name       string        `json:"name"`
	Used       bool          `json:"used,omitempty"`       // its answer is the newest, which counts
	Answered   bool          `json:"answered"`             // it has answered before
	Age        time.Duration `json:"age,omitempty"`        // of the answer; if the answer is from before the boot, the time since the boot
	BeforeBoot bool          `json:"beforeBoot,omitempty"` // the answer is from before the boot, and so is older than Age
	Failure    string        `json:"failure,omitempty"`    // of the last try; empty: it answered, or was not asked
	FailureAge time.Duration `json:"failureAge,omitempty"` // how long ago that try was
}

// NICStatus is one NIC with the counts of its ipconfigs.
type NICStatus struct {
	MAC     string         `json:"mac"`
	Primary bool           `json:"primary"`
	Subnets []SubnetStatus `json:"subnets"`
}

// SubnetStatus is one subnet of a NIC.
type SubnetStatus struct {
	Prefix   netip.Prefix          `json:"prefix"`
	Primary  netip.Addr            `json:"primary,omitzero"` // the NIC's own address; zero: it lies in another subnet
	Hosted   map[netip.Addr]string `json:"hosted,omitempty"` // secondary addresses that a link of the host has: the link's name
	RoutedBy map[netip.Addr]string `json:"ledTo,omitempty"`  // secondary addresses that containers have without a lease: the name of the link that a route leads by
	Census
}

// Status returns the status of the pool. It asks the sources, and waits a short time, if their answer is older than the
// interval. If they fail, the status says so, and that is no error.
func (p *Pool) Status(ctx context.Context) (Status, error) {
	st, err := p.readStatus(ctx)
	if err != nil {
		return Status{}, fmt.Errorf("pool status: %w", err)
	}
	return st, nil
}

func (p *Pool) readStatus(ctx context.Context) (Status, error) {
	s, err := p.readState(ctx, "status")
	if q := p.quickQuestion(); err == nil && p.isDue(&s, q) {
		if err = p.askSources(ctx, q); err == nil {
			s, err = p.readState(ctx, "status")
		}
	}
	if err != nil {
		return Status{}, err
	}
	has, err := p.occupied()
	if err != nil {
		return Status{}, err
	}
	current, from, _ := p.newestAnswer(&s)
	v := &snapshot{state: &s, answer: current, occupied: has, now: p.clock()}
	st := Status{Leases: map[netip.Addr]Lease{}, Cooling: map[netip.Addr]time.Duration{}, Now: v.now}
	for addr := range s.Leases {
		st.Leases[addr], _ = s.leaseOf(addr)
	}
	for addr, r := range s.Freed {
		if r.Until > v.now {
			st.Cooling[addr] = r.Until - v.now
		}
	}
	for _, src := range p.sources {
		st.Sources = append(st.Sources, s.sourceStatus(src.name, src.name == from, v.now))
	}
	for _, n := range current.NICs {
		st.NICs = append(st.NICs, v.nicStatus(n))
	}
	st.Warnings = p.listWarnings(v, st)
	return st, nil
}

// Unleased returns the addresses that containers have without a lease, and for each the name of the link that a route
// leads by. It looks at the addresses of every source, even of one that this pool does not ask. It asks none.
func (p *Pool) Unleased(ctx context.Context) (map[netip.Addr]string, error) {
	s, err := p.readState(ctx, "look for containers without a lease")
	var has occupied
	if err == nil {
		has, err = p.occupied()
	}
	if err != nil {
		return nil, fmt.Errorf("look for containers without a lease: %w", err)
	}
	v, found := snapshot{state: &s, occupied: has}, map[netip.Addr]string{}
	for _, a := range s.Answers {
		for addr := range secondarySet(a.NICs) {
			if v.lendabilityOf(addr) == isRouted {
				found[addr] = has.nameOf(has.routed[addr])
			}
		}
	}
	return found, nil
}

// sourceStatus returns the status of one source. used says that its answer counts.
func (s *state) sourceStatus(name string, used bool, now time.Duration) SourceStatus {
	a := s.Answers[name]
	st := SourceStatus{Name: name, Used: used, Answered: len(a.NICs) > 0, Failure: a.Failure}
	if st.Answered {
		st.Age, st.BeforeBoot = now-a.At, a.At == 0
	}
	if a.Failure != "" {
		st.FailureAge = now - a.FailedAt
	}
	return st
}

// nicStatus returns the status of one NIC.
func (v *snapshot) nicStatus(n NIC) NICStatus {
	st := NICStatus{MAC: n.MAC, Primary: n.Primary}
	for _, sub := range n.Subnets {
		one := SubnetStatus{Prefix: sub.Prefix, Primary: sub.Primary, Hosted: map[netip.Addr]string{}, RoutedBy: map[netip.Addr]string{}, Census: v.countSubnet(n.MAC, sub)}
		for _, a := range sub.Secondary {
			switch v.lendabilityOf(a) {
			case isOnHost:
				one.Hosted[a] = v.onHost[a]
			case isRouted:
				one.RoutedBy[a] = v.nameOf(v.routed[a])
			}
		}
		st.Subnets = append(st.Subnets, one)
	}
	return st
}

// listWarnings lists what an operator should know though nothing failed.
func (p *Pool) listWarnings(v *snapshot, st Status) []string {
	w := slices.Clone(v.answer.Notes)
	for _, src := range st.Sources {
		if src.Failure != "" {
			w = append(w, fmt.Sprintf("%s failed %v ago: %s", src.Name, src.FailureAge.Round(time.Second), src.Failure))
		}
	}
	w = append(w, p.listDisagreements(v)...)
	for _, n := range st.NICs {
		for _, s := range n.Subnets {
			if s.OnHost > 0 {
				addr := slices.SortedFunc(maps.Keys(s.Hosted), netip.Addr.Compare)[0]
				w = append(w, fmt.Sprintf("NIC %s in subnet %s: %s cannot be lent: %s", n.MAC, s.Prefix,
					plural(s.OnHost, "address"), p.describeOnHost(s.listHosted(), s.Hosted[addr])))
			}
			for _, addr := range slices.SortedFunc(maps.Keys(s.RoutedBy), netip.Addr.Compare) {
				w = append(w, v.describeRouted(addr))
			}
		}
	}
	listed := secondarySet(v.answer.NICs)
	for _, addr := range slices.SortedFunc(maps.Keys(v.Leases), netip.Addr.Compare) {
		l := v.Leases[addr]
		if !listed[addr] && len(v.answer.NICs) > 0 {
			w = append(w, fmt.Sprintf("%s is held by %s though Azure lists it no more: nothing reaches it", addr, l.Holder()))
		}
		if l.Early {
			w = append(w, fmt.Sprintf("%s was lent to %s while it cooled: nothing else was free", addr, l.Holder()))
		}
	}
	for _, bad := range statefile.ListAside(p.path) {
		w = append(w, "an unreadable leases file was set aside: "+bad)
	}
	return w
}

// listHosted lists the addresses that a link of the host has, ascending.
func (s SubnetStatus) listHosted() []string {
	var all []string
	for _, a := range slices.SortedFunc(maps.Keys(s.Hosted), netip.Addr.Compare) {
		all = append(all, a.String())
	}
	return all
}

// listDisagreements compares the answer that counts with the answers of other sources from about the same time. With
// the source auto there are two answers if one source answered just before it failed.
func (p *Pool) listDisagreements(v *snapshot) []string {
	const sameTime = 5 * time.Minute
	_, from, _ := p.newestAnswer(v.state)
	mine := secondarySet(v.answer.NICs)
	var w []string
	for name, a := range v.Answers {
		if name == from || len(a.NICs) == 0 || a.At == 0 || v.answer.At-a.At > sameTime {
			continue
		}
		theirs := secondarySet(a.NICs)
		var diff []netip.Addr
		for addr := range mine {
			if !theirs[addr] {
				diff = append(diff, addr)
			}
		}
		for addr := range theirs {
			if !mine[addr] {
				diff = append(diff, addr)
			}
		}
		if len(diff) > 0 {
			slices.SortFunc(diff, netip.Addr.Compare)
			w = append(w, fmt.Sprintf("%s and %s disagree about %v: %s, which answered last, counts", from, name, diff, from))
		}
	}
	slices.Sort(w)
	return w
}

// secondarySet returns the set of all secondary addresses of the NICs.
func secondarySet(nics []NIC) map[netip.Addr]bool {
	set := map[netip.Addr]bool{}
	for _, n := range nics {
		for _, s := range n.Subnets {
			for _, a := range s.Secondary {
				set[a] = true
			}
		}
	}
	return set
}
