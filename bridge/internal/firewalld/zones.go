// Copyright (c) The azure-vnet authors. MIT licence.

// Package firewalld puts links into the zone of a NIC, in a firewalld that runs on the host. It speaks to
// firewalld over the system bus. It changes zones at run time only: it writes no permanent configuration, and
// causes no reload. It never starts firewalld.
package firewalld

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Zones is one reading of firewalld's zones. MoveLink keeps it up to date.
type Zones struct {
	bus         string            // path of the system bus's socket
	defaultZone string            // the zone of every link that is in no zone by name
	zoneOfLink  map[string]string // zones by link
	zones       map[string]zone   // the active zones and the default one, by name
}

// zone is what a zone's settings mean for containers.
type zone struct {
	accepts     bool // its target is ACCEPT: every port of the host is open to its links
	forwards    bool // packets pass between its links
	old         bool // this firewalld is older than 0.9, which cannot forward within a zone
	masquerades bool // packets that leave by its links get the links' addresses
}

// isTooOld reports whether this firewalld is older than 0.9, which cannot forward within a zone.
func (z *Zones) isTooOld() bool { return z.zones[z.defaultZone].old }

// Act is what a step does.
type Act int

// The acts. Each can be repeated.
const (
	Join       Act = iota // put Link, which is in no zone, into Zone
	Leave                 // take Link out of Zone, which we put it into
	ForgetZone            // Link is no longer in the zone that we put it into; only our note of it goes
	Report                // only a person can do something
)

// Step is one thing to do, or to report, about one link.
type Step struct {
	What string // a sentence: what is not as it should be
	Act  Act
	Link string
	Zone string
}

// Steps returns the moves that put each link into its NICs' zone. All NICs of the link must be in that zone by name.
// links are our links as firewalld writes them (azure0, or azv+ for every link azv…), each with the names of its NICs.
// joined are the zones that we put links into. A link that somebody else put into a zone stays in it.
func (z *Zones) Steps(links map[string][]string, joined map[string]string) (all []Step) {
	names := slices.Collect(maps.Keys(links))
	for link := range joined {
		if _, ours := links[link]; !ours {
			names = append(names, link)
		}
	}
	slices.Sort(names)
	for _, link := range names {
		step := func(act Act, zone, what string, args ...any) {
			all = append(all, Step{fmt.Sprintf(what, args...), act, link, zone})
		}
		is, was := z.namedZone(link), joined[link]
		nics, ours := links[link]
		switch {
		case is != "" && is != was: // somebody else chose this zone
			if was != "" {
				step(ForgetZone, was, "host.json says that %s was put into the firewalld zone %s, and somebody put it into %s", link, was, is)
			}
			continue
		case ours && len(nics) == 0: // the NIC is gone, and may come back
			continue
		}
		want, told := "", ""
		if ours {
			want, told = z.zoneFor(link, nics)
		}
		switch {
		case want != "" && is != "" && want != is: // the next round has the link join. A crash in between leaves it in no zone
			step(Leave, is, "%s is in the firewalld zone %s, and %s in %s", link, is, nics[0], want)
		case want != "" && want != is:
			step(Join, want, "%s is not in the firewalld zone %s of %s", link, want, nics[0])
		case want == "" && is != "":
			step(Leave, is, "%s is in the firewalld zone %s, where it cannot be served any more", link, is)
		case want == "" && was != "":
			step(ForgetZone, was, "host.json says that %s was put into the firewalld zone %s, and it is in none", link, was)
		}
		if told != "" {
			step(Report, want, "%s", told)
		}
	}
	return all
}

// zoneFor chooses the zone that a link is to join: one that serves containers and opens nothing else. If there
// is none, want is empty, and told says why and what to do.
func (z *Zones) zoneFor(link string, nics []string) (want, told string) {
	nic := nics[0]
	name, named := z.effectiveZone(nic)
	for _, other := range nics[1:] {
		if its, _ := z.effectiveZone(other); its != name {
			return "", fmt.Sprintf("%s is in the firewalld zone %s and %s in %s, and %s cannot be in both, so firewalld drops what its containers send and receive. Put both NICs into one zone, or use mode bridge", nic, name, other, its, link)
		}
	}
	if z.zones[name].accepts && z.zones[z.defaultZone].accepts {
		return "", "" // a link in no zone counts as in the default one
	}
	cut := fmt.Sprintf(", so firewalld drops what the containers of %s send or receive. ", link)
	switch is := z.zones[name]; {
	case is.accepts || name == "trusted":
		return "", fmt.Sprintf("%s is in the firewalld zone %s, which accepts everything, and %s is in none%sIn that zone every port of the host would be open to them. If they may have that: %s", nic, name, link, cut, firewallCommands(name, "--add-interface="+link))
	case !named:
		return "", fmt.Sprintf("%s is in the firewalld zone %s by default only%sPut it there by name: %s", nic, name, cut, firewallCommands(name, "--add-interface="+nic))
	case is.old:
		return "", fmt.Sprintf("this firewalld forwards nothing within a zone%sUpdate it to 0.9 or later", cut)
	case !is.forwards:
		return "", fmt.Sprintf("the firewalld zone %s of %s forwards nothing within itself%sLet it: %s", name, nic, cut, firewallCommands(name, "--add-forward"))
	case is.masquerades:
		told = fmt.Sprintf("the firewalld zone %s of %s masquerades, so the VNet sees containers with the host's address, and they see their clients with it. To end that: %s", name, nic, firewallCommands(name, "--remove-masquerade"))
	}
	return name, told
}

// effectiveZone returns a link's zone. named is false if the link is in the default zone only because it is in
// no other.
func (z *Zones) effectiveZone(link string) (name string, named bool) {
	if name = z.namedZone(link); name != "" {
		return name, true
	}
	return z.defaultZone, false
}

// namedZone returns the zone that a link is in by its name, or by the beginning of its name, as with eth+. It
// is empty if there is none. Of several beginnings, the longest counts: so each reading gives the same zone, and
// no round undoes what the round before did.
func (z *Zones) namedZone(link string) (zone string) {
	if name, ok := z.zoneOfLink[link]; ok {
		return name
	}
	longest := 0
	for of, name := range z.zoneOfLink {
		if begin, wild := strings.CutSuffix(of, "+"); wild && name != "" && strings.HasPrefix(link, begin) && len(of) > longest {
			longest, zone = len(of), name
		}
	}
	return zone
}

// firewallCommands returns the commands for an administrator: one for now, and one for good.
func firewallCommands(zone, option string) string {
	var all []string
	for _, permanent := range []string{"", "--permanent "} {
		all = append(all, strings.Join([]string{"firewall-cmd", permanent + "--zone=" + zone, option}, " "))
	}
	return strings.Join(all, "; ")
}
