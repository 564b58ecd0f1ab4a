// Copyright (c) The azure-vnet authors. MIT licence.

// Package firewalld has links join the zone of a NIC, in a firewalld that runs on the
// host. It speaks to firewalld over the system bus and changes its zones at run time
// only: no permanent configuration, no reload. It never starts firewalld.
package firewalld

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Zones is one reading of firewalld's zones.
type Zones struct {
	bus         string            // the system bus's socket
	defaultZone string            // the default zone: of every link that is in none by name
	zoneOfLink  map[string]string // zones of links, by link
	zones       map[string]zone   // the active ones and the default one
}

// zone is what a zone's settings mean for containers.
type zone struct {
	accepts     bool // its target is ACCEPT: every port of the host is open to what is in it
	forwards    bool // packets pass between its links
	old         bool // this firewalld, older than 0.9, can forward within no zone
	masquerades bool // what leaves by its links gets their addresses
}

// isTooOld reports whether this firewalld can forward within no zone.
func (z *Zones) isTooOld() bool { return z.zones[z.defaultZone].old }

// Act is what a step does.
type Act int

// The acts. Each can be repeated.
const (
	Join       Act = iota // put Link into Zone, from none
	Leave                 // take Link out of Zone, which we put it into
	ForgetZone            // Link is not in the zone any more that we put it into
	Report                // only a person can do something
)

// Step is what is to be done, or told, about one link.
type Step struct {
	What string // what is not as it should be
	Act  Act
	Link string
	Zone string
}

// Steps says what is to be done so that each link is in the zone that all its NICs are in by
// name. links are ours, as firewalld spells them (azure0, or azv+ for each azv…), each with the
// names of its NICs. joined are the zones that we put links into. A link that somebody else put
// into a zone stays there.
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
		case is != "" && is != was: // somebody's choice
			if was != "" {
				step(ForgetZone, was, "host.json says that %s was put into the firewalld zone %s, and somebody put it into %s", link, was, is)
			}
			continue
		case ours && len(nics) == 0: // its NIC is gone, and may come back
			continue
		}
		want, told := "", ""
		if ours {
			want, told = z.zoneFor(link, nics)
		}
		switch {
		case want != "" && is != "" && want != is: // then the next reading has it join: who dies in between leaves it in none
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
// is none, told says why, and what to do.
func (z *Zones) zoneFor(link string, nics []string) (want, told string) {
	nic := nics[0]
	name, named := z.effectiveZone(nic)
	for _, other := range nics[1:] {
		if its, _ := z.effectiveZone(other); its != name {
			return "", fmt.Sprintf("%s is in the firewalld zone %s and %s in %s, and %s cannot be in both, so firewalld drops what its containers send and receive. Put both NICs into one zone, or use mode bridge", nic, name, other, its, link)
		}
	}
	if z.zones[name].accepts && z.zones[z.defaultZone].accepts {
		return "", "" // a link in no zone is in the default one
	}
	cut := fmt.Sprintf(", so firewalld drops what the containers of %s send or receive. ", link)
	switch is := z.zones[name]; {
	case is.accepts || name == "trusted":
		return "", fmt.Sprintf("%s is in the firewalld zone %s, which accepts everything, and %s is in none%sIn that zone every port of the host would be open to them. If they may have that: %s", nic, name, link, cut, commands(name, "--add-interface="+link))
	case !named:
		return "", fmt.Sprintf("%s is in the firewalld zone %s by default only%sPut it there by name: %s", nic, name, cut, commands(name, "--add-interface="+nic))
	case is.old:
		return "", fmt.Sprintf("this firewalld forwards nothing within a zone%sUpdate it to 0.9 or later", cut)
	case !is.forwards:
		return "", fmt.Sprintf("the firewalld zone %s of %s forwards nothing within itself%sLet it: %s", name, nic, cut, commands(name, "--add-forward"))
	case is.masquerades:
		told = fmt.Sprintf("the firewalld zone %s of %s masquerades, so the VNet sees containers with the host's address, and they see their clients with it. To end that: %s", name, nic, commands(name, "--remove-masquerade"))
	}
	return name, told
}

// effectiveZone is a link's zone; it is not named where that is the default one for want of another.
func (z *Zones) effectiveZone(link string) (name string, named bool) {
	if name = z.namedZone(link); name != "" {
		return name, true
	}
	return z.defaultZone, false
}

// namedZone is the zone that a link is in by its name, or by how its name begins, as with eth+; empty: none.
func (z *Zones) namedZone(link string) string {
	if name, ok := z.zoneOfLink[link]; ok {
		return name
	}
	for of, name := range z.zoneOfLink {
		if begin, wild := strings.CutSuffix(of, "+"); wild && name != "" && strings.HasPrefix(link, begin) {
			return name
		}
	}
	return ""
}

// commands are an administrator's, for now and for good.
func commands(zone, option string) string {
	var all []string
	for _, permanent := range []string{"", "--permanent "} {
		all = append(all, strings.Join([]string{"firewall-cmd", permanent + "--zone=" + zone, option}, " "))
	}
	return strings.Join(all, "; ")
}
