// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// hostLinks is what the links of this VM tell. It matters for a source that flags no primary address.
type hostLinks struct {
	MACs    []string                // of all links; empty: not known
	Addrs   map[string][]netip.Addr // by MAC, which a NIC, its virtual function and its bridge have in common
	Default string                  // MAC of the link that the default route leaves by
}

// mayHave reports whether one of the NICs may be this VM's.
func (h hostLinks) mayHave(nics []NIC) bool {
	return len(h.MACs) == 0 || slices.ContainsFunc(nics, func(n NIC) bool { return slices.Contains(h.MACs, n.MAC) })
}

const (
	mostAddrs = 65536 // of a VNet; a document with blocks could have more
	mostNotes = 10
)

// reading turns a document into NICs. If it cannot read an item, it leaves the item out and notes it: containers may
// need the others.
type reading struct {
	host  hostLinks
	notes []string
	count int // of addresses so far
}

// addNote notes what was odd, 10 times at most.
func (r *reading) addNote(format string, args ...any) {
	if len(r.notes) < mostNotes {
		r.notes = append(r.notes, fmt.Sprintf(format, args...))
	}
}

// interpretDocument returns the NICs in a document, the primary first, and notes what was odd. It is an error if
// nothing in the document can be used. An empty list and a list of another VM are such errors, because every VM has a
// NIC.
func interpretDocument(d document, h hostLinks) ([]NIC, []string, error) {
	r := &reading{host: h}
	var nics []NIC
	for _, told := range d.NICs {
		nic, ok := r.readNIC(told)
		if !ok {
			continue
		}
		if slices.ContainsFunc(nics, func(n NIC) bool { return n.MAC == nic.MAC }) {
			r.addNote("NIC %s is listed twice: the first counts", nic.MAC)
			continue
		}
		nics = append(nics, nic)
	}
	if r.count > mostAddrs {
		return nil, nil, fmt.Errorf("it lists more than %d addresses", mostAddrs)
	}
	if len(nics) == 0 && len(r.notes) > 0 {
		return nil, nil, fmt.Errorf("it lists no NIC that can be used: %s", strings.Join(r.notes, "; "))
	}
	if len(nics) == 0 {
		return nil, nil, errors.New("it lists no NIC")
	}
	if !h.mayHave(nics) {
		return nil, nil, fmt.Errorf("it lists no NIC of this VM, but %s: it is another VM's list, or an old one", listMACs(nics))
	}
	r.choosePrimary(nics)
	sortPrimaryFirst(nics)
	r.dropDuplicates(nics)
	return nics, r.notes, nil
}

// readNIC reads one NIC. It leaves out IPv6 without a note: Azure gives a NIC one IPv6 address at most, so there is
// none to lend.
func (r *reading) readNIC(told docNIC) (NIC, bool) {
	mac, err := parseMAC(told.MAC)
	if err != nil {
		r.addNote("a NIC was left out: %v", err)
		return NIC{}, false
	}
	nic := NIC{MAC: mac, Primary: told.Primary.isTrue()}
	var flagged, all []netip.Addr
	for _, s := range told.Subnets {
		prefix, err := parseSubnetMasked(s.Prefix)
		if err != nil {
			r.addNote("subnet %q of NIC %s was left out: %v", s.Prefix, mac, err)
			continue
		}
		if !prefix.Addr().Is4() {
			continue
		}
		i := slices.IndexFunc(nic.Subnets, func(s Subnet) bool { return s.Prefix == prefix })
		if i < 0 {
			i, nic.Subnets = len(nic.Subnets), append(nic.Subnets, Subnet{Prefix: prefix})
		}
		for _, a := range s.Addrs {
			addrs := r.readAddrs(mac, prefix, a.Address)
			all = append(all, addrs...)
			if a.Primary.isTrue() {
				flagged = append(flagged, addrs...)
			}
			nic.Subnets[i].Secondary = append(nic.Subnets[i].Secondary, addrs...)
		}
	}
	if len(nic.Subnets) == 0 {
		r.addNote("NIC %s was left out: it has no IPv4 subnet", mac)
		return NIC{}, false
	}
	if len(flagged) == 0 && len(all) > 0 {
		flagged = []netip.Addr{r.guessPrimary(mac, all)}
	}
	for i := range nic.Subnets {
		splitPrimary(&nic.Subnets[i], flagged)
		r.dropReserved(mac, &nic.Subnets[i])
	}
	return nic, true
}

// dropReserved leaves out the addresses that Azure keeps for itself. Nothing would reach a container with such an
// address.
func (r *reading) dropReserved(mac string, s *Subnet) {
	s.Secondary = slices.DeleteFunc(s.Secondary, func(a netip.Addr) bool {
		if s.reserves(a) {
			r.addNote("address %s of NIC %s was left out: Azure reserves it, as the first four and the last of subnet %s", a, mac, s.Prefix)
			return true
		}
		return false
	})
}

// listMACs lists the MACs of NICs for a sentence.
func listMACs(nics []NIC) string {
	var all []string
	for _, n := range nics {
		all = append(all, n.MAC)
	}
	return strings.Join(all, ", ")
}

// readAddrs reads one entry of a list of addresses, which may be a block.
func (r *reading) readAddrs(mac string, within netip.Prefix, text string) []netip.Addr {
	block, err := parseBlock(text)
	if err != nil || !within.Contains(block.Addr()) || block.Bits() < within.Bits() {
		r.addNote("address %q of NIC %s was left out: it is none of %s", text, mac, within)
		return nil
	}
	var addrs []netip.Addr
	for a := block.Masked().Addr(); block.Contains(a) && r.count <= mostAddrs; a = a.Next() {
		addrs = append(addrs, a)
		r.count++
	}
	return addrs
}

// guessPrimary guesses the own address of a NIC, if the source flags none. It is the first in the list, unless the host
// has other addresses of the list and not the first. By DHCP the host has the primary address only; under cloud-init it
// has all.
func (r *reading) guessPrimary(mac string, addrs []netip.Addr) netip.Addr {
	on := r.host.Addrs[mac]
	for _, a := range addrs {
		if !slices.Contains(on, a) {
			continue
		}
		if a != addrs[0] {
			r.addNote("NIC %s lists %s first, but the host holds %s: that is taken for the NIC's own", mac, addrs[0], a)
		}
		return a
	}
	return addrs[0]
}

// splitPrimary takes the NIC's own addresses out of the lendable ones, which it sorts.
func splitPrimary(s *Subnet, own []netip.Addr) {
	s.Secondary = slices.DeleteFunc(s.Secondary, func(a netip.Addr) bool {
		if !slices.Contains(own, a) {
			return false
		}
		if !s.Primary.IsValid() {
			s.Primary = a
		}
		return true
	})
	slices.SortFunc(s.Secondary, netip.Addr.Compare)
	s.Secondary = slices.Compact(s.Secondary)
}

// choosePrimary leaves exactly one NIC primary: the one that the source flags, or else the one that the default route
// leaves by, or else the first.
func (r *reading) choosePrimary(nics []NIC) {
	chosen := slices.IndexFunc(nics, func(n NIC) bool { return n.Primary })
	if chosen < 0 {
		chosen = slices.IndexFunc(nics, func(n NIC) bool { return n.MAC == r.host.Default })
	}
	for i := range nics {
		nics[i].Primary = i == max(chosen, 0)
	}
}

// dropDuplicates leaves each address with one NIC. The own address of a NIC is not lent by another. If two NICs list an
// address, the first has it.
func (r *reading) dropDuplicates(nics []NIC) {
	has := map[netip.Addr]string{}
	for _, n := range nics {
		for _, s := range n.Subnets {
			if s.Primary.IsValid() {
				has[s.Primary] = n.MAC
			}
		}
	}
	for _, n := range nics {
		for i := range n.Subnets {
			s := &n.Subnets[i]
			s.Secondary = slices.DeleteFunc(s.Secondary, func(a netip.Addr) bool {
				other, taken := has[a]
				if taken {
					r.addNote("address %s of NIC %s is left out: NIC %s lists it too", a, n.MAC, other)
				}
				has[a] = n.MAC
				return taken
			})
		}
	}
}
