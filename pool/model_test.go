// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// How long an address cools, how long a lease without a link is left alone, and how old an answer of the source may grow.
const modelCoolDown, modelGrace, modelInterval = 30 * time.Second, 5 * time.Minute, 10 * time.Second

// model is leases.json as it should be, and what Azure and the kernel of the VM have. Its methods are the rules by which
// addresses are lent. history_test.go has the histories that it is compared with.
type model struct {
	boot   time.Time             // when the VM booted
	lists  []netip.Addr          // Azure's list of the NIC's secondary addresses
	fails  string                // how the source fails; empty: it answers
	onHost map[netip.Addr]string // addresses that links of the host have
	others map[netip.Addr]int    // addresses that routes lead to, to containers of another plugin
	links  map[netip.Addr]Lease  // host ends that stand, with the lease that each proves
	calls  []*call               // containers that a runtime of this VM knows

	adopts bool         // the file is new, so the leases that links prove are to be taken in
	asked  time.Time    // when the last question to the source ended; zero: it was not asked since the file is new
	knows  bool         // the source has answered since the file is new
	known  []netip.Addr // the addresses of its last answer that may be lent, ascending
	leases map[netip.Addr]Lease
	proved map[netip.Addr]time.Duration // the leases that were confirmed late, and when
	freed  map[netip.Addr]rest
}

// call is a container from its lease on. Its runtime may die after each step, or be frozen for as long as it takes.
type call struct {
	lease  Lease
	linked bool // its link was made
	runs   bool // the lease was confirmed, so the container was started
}

func (m *model) now() time.Duration { return time.Since(m.boot) }

// loseFile is what becomes of the model when leases.json is lost.
func (m *model) loseFile() {
	m.adopts, m.asked, m.knows, m.known = true, time.Time{}, false, nil
	m.leases, m.proved, m.freed = map[netip.Addr]Lease{}, map[netip.Addr]time.Duration{}, map[netip.Addr]rest{}
}

// reboot is what becomes of the model when the VM boots.
func (m *model) reboot() {
	m.loseFile()
	m.boot = time.Now().Add(-time.Second)
	m.onHost, m.others, m.links, m.calls = map[netip.Addr]string{}, map[netip.Addr]int{}, map[netip.Addr]Lease{}, nil
}

// isRouted reports whether a route leads to the address, so that a container has it, with a lease or without.
func (m *model) isRouted(a netip.Addr) bool {
	_, linked := m.links[a]
	_, other := m.others[a]
	return linked || other
}

// pick returns the lease that r is to get now, or the error. Fresh addresses go first, then rested ones, then cooling
// ones. Of rested and of cooling ones, the one that was freed longest ago goes first.
func (m *model) pick(r Request) (Lease, error) {
	l := Lease{Addr: r.Addr, Owner: r.Owner, MAC: mac1, Prefix: modelSubnet, Since: m.now(), Pod: r.Pod, Linkless: r.Linkless}
	held := func(a netip.Addr) bool { _, ok := m.leases[a]; return ok }
	switch named := r.Addr.IsValid(); {
	case !m.knows:
		return l, ErrSource
	case named && held(r.Addr):
		return l, ErrInUse
	case named && (!slices.Contains(m.known, r.Addr) || m.onHost[r.Addr] != ""):
		return l, ErrNotOurs
	case named && m.isRouted(r.Addr):
		return l, ErrInUse
	case named:
		return l, nil
	}
	free := slices.DeleteFunc(slices.Clone(m.known), func(a netip.Addr) bool {
		return held(a) || m.isRouted(a) || m.onHost[a] != "" || r.Range.IsValid() && !r.Range.Contains(a)
	})
	if len(free) == 0 {
		return l, ErrExhausted
	}
	const fresh, rested, cooling = 0, 1, 2
	kind := func(a netip.Addr) int {
		r, lentBefore := m.freed[a]
		switch {
		case !lentBefore:
			return fresh
		case m.now() < r.Until:
			return cooling
		}
		return rested
	}
	l.Addr = slices.MinFunc(free, func(a, b netip.Addr) int {
		return cmp.Or(cmp.Compare(kind(a), kind(b)), cmp.Compare(m.freed[a].At, m.freed[b].At), a.Compare(b))
	})
	l.Early = kind(l.Addr) == cooling
	return l, nil
}

// take notes that l is lent.
func (m *model) take(l Lease) {
	m.leases[l.Addr] = l
	delete(m.freed, l.Addr)
}

// free notes that the lease of a has ended.
func (m *model) free(a netip.Addr) {
	delete(m.leases, a)
	delete(m.proved, a)
	m.freed[a] = rest{At: m.now(), Until: m.now() + modelCoolDown}
}

// has reports whether l is held as it was given.
func (m *model) has(l Lease) bool {
	is, held := m.leases[l.Addr]
	return held && is.Owner == l.Owner && is.Since == l.Since
}

// adopt takes in the leases that these links prove, and returns those that nobody held, by address.
func (m *model) adopt(links map[netip.Addr]Lease, now time.Duration) (lost []Lease) {
	m.adopts = false
	for _, a := range slices.SortedFunc(maps.Keys(links), netip.Addr.Compare) {
		if _, held := m.leases[a]; held {
			continue
		}
		l := links[a]
		lost = append(lost, Lease{Addr: a, Owner: l.Owner, MAC: l.MAC, Prefix: l.Prefix, Since: now, Pod: l.Pod})
		m.take(lost[len(lost)-1])
	}
	return lost
}

// suspect is a lease that is collected unless its address is attached.
type suspect struct {
	lease  Lease
	proved time.Duration
}

// suspects returns the leases that are older than the grace, and those that somebody moved into the future.
func (m *model) suspects() map[netip.Addr]suspect {
	all := map[netip.Addr]suspect{}
	for a, l := range m.leases {
		seen := l.Since
		if at, late := m.proved[a]; late {
			seen = max(seen, at)
		}
		if age := m.now() - seen; !l.Linkless && (age >= modelGrace || age < 0) {
			all[a] = suspect{l, m.proved[a]}
		}
	}
	return all
}

// collect ends those suspects that are not attached and have not changed since, and returns them, by the text of the
// address.
func (m *model) collect(suspects map[netip.Addr]suspect, attached map[netip.Addr]bool) (gone []Lease) {
	for a, was := range suspects {
		if is, held := m.leases[a]; held && !attached[a] && is == was.lease && m.proved[a] == was.proved {
			gone = append(gone, is)
			m.free(a)
		}
	}
	slices.SortFunc(gone, func(a, b Lease) int { return strings.Compare(a.Addr.String(), b.Addr.String()) })
	return gone
}

// lendable returns the addresses of Azure's list that may be lent, ascending. Azure keeps the others for itself.
func lendable(lists []netip.Addr) []netip.Addr {
	kept := func(a netip.Addr) bool { last := a.As4()[3]; return last < 4 || last == 255 }
	return slices.SortedFunc(slices.Values(slices.DeleteFunc(slices.Clone(lists), kept)), netip.Addr.Compare)
}
