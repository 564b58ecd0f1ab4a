// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// host is what this VM's interfaces tell where a source flags no primary.
type host struct {
	MACs    []string                // of all interfaces; none: not known
	Addrs   map[string][]netip.Addr // by MAC; the NIC, its virtual function and its bridge share one
	Default string                  // MAC of the interface that the default route leaves by
}

// mayHave reports whether one of these NICs may be this VM's.
func (h host) mayHave(nics []NIC) bool {
	return len(h.MACs) == 0 || slices.ContainsFunc(nics, func(n NIC) bool { return slices.Contains(h.MACs, n.MAC) })
}

const (
	mostAddrs = 65536 // in a whole VNet; blocks could make more of one document
	mostNotes = 10
)

// reading turns a document into NICs, and notes what it had to leave out. What
// it cannot read costs that item only: the rest may be what containers live on.
type reading struct {
	host  host
	notes []string
	count int // addresses
}

func (r *reading) addNote(format string, args ...any) {
	if len(r.notes) < mostNotes {
		r.notes = append(r.notes, fmt.Sprintf(format, args...))
	}
}

// interpretDocument is an error if nothing of d can be used, which includes an empty
// list and one of another VM's NICs: every VM has a NIC, so that is no answer.
func interpretDocument(d document, h host) ([]NIC, []string, error) {
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

// readNIC reads one NIC. IPv6 is left out silently: Azure gives a NIC one IPv6
// address at most, so there is nothing to lend.
func (r *reading) readNIC(told docNIC) (NIC, bool) {
	mac, err := parseMAC(told.MAC)
	if err != nil {
		r.addNote("a NIC was left out: %v", err)
		return NIC{}, false
	}
	nic := NIC{MAC: mac, Primary: told.Primary.isTrue()}
	var flagged, all []netip.Addr
	for _, s := range told.Subnets {
		prefix, err := parseSubnet(s.Prefix)
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

// dropReserved takes out what Azure gives to no NIC, and nothing would reach.
func (r *reading) dropReserved(mac string, s *Subnet) {
	s.Secondary = slices.DeleteFunc(s.Secondary, func(a netip.Addr) bool {
		if s.reserves(a) {
			r.addNote("address %s of NIC %s was left out: Azure reserves it, as the first four and the last of subnet %s", a, mac, s.Prefix)
			return true
		}
		return false
	})
}

// listMACs names the NICs in a sentence.
func listMACs(nics []NIC) string {
	var all []string
	for _, n := range nics {
		all = append(all, n.MAC)
	}
	return strings.Join(all, ", ")
}

// readAddrs reads one entry of an address list, which may be a block.
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

// guessPrimary chooses a NIC's own address where the source flags none: the first,
// unless the host holds others of the list and not that one. DHCP gives the
// host the guessPrimary; under cloud-init it holds them all.
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

// splitPrimary takes the NIC's own addresses out of the lendable ones.
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

// choosePrimary leaves exactly one NIC primary: the one flagged; where the
// source flags none, the one that the default route leaves by, else the first.
func (r *reading) choosePrimary(nics []NIC) {
	chosen := slices.IndexFunc(nics, func(n NIC) bool { return n.Primary })
	if chosen < 0 {
		chosen = slices.IndexFunc(nics, func(n NIC) bool { return n.MAC == r.host.Default })
	}
	for i := range nics {
		nics[i].Primary = i == max(chosen, 0)
	}
}

// dropDuplicates leaves every address with one NIC: a NIC's own address is nobody
// else's to lend, and of two NICs that list one, the first has it.
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
