// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// This file says, for each noun, which messages are of a link, what of them is
// configuration (the normal form), and how they read on another link.

// Flags and attributes that golang.org/x/sys/unix does not name.
const (
	ifaProto       = 11
	rtaExpires     = 23
	rtaNhID        = 30
	ndaProtocol    = 12
	ruleInvert     = 0x2
	ifaKeptFlags   = unix.IFA_F_NOPREFIXROUTE | unix.IFA_F_HOMEADDRESS | unix.IFA_F_MCAUTOJOIN | unix.IFA_F_STABLE_PRIVACY
	routeKeptFlags = unix.RTNH_F_ONLINK | unix.RTNH_F_PERVASIVE
)

// ourProtocol marks the rules, routes and neighbours that we made: they are no
// part of the host's identity.
const ourProtocol = 168

// normalAddress: struct ifaddrmsg is family, prefix length, flags, scope, index.
// Without IFA_CACHEINFO an address is for ever: a lease's lifetime must not end
// on a link where no DHCP client renews it.
func normalAddress(m message, of link) []message {
	if len(m) < addresses.header || native.Uint32(m[4:]) != uint32(of.index) || !isIP(m[0]) {
		return nil
	}
	flags := uint32(m[2])
	if v := addresses.attr(m, unix.IFA_FLAGS); len(v) == 4 {
		flags = native.Uint32(v)
	}
	if m[0] == unix.AF_INET6 && flags&unix.IFA_F_DADFAILED != 0 {
		return nil // someone else's
	}
	out := addresses.rewrite(m, func(h []byte) { h[2] = 0; native.PutUint32(h[4:], 0) }, func(attr uint16, v []byte) []byte {
		switch attr {
		case unix.IFA_ADDRESS, unix.IFA_LOCAL, unix.IFA_BROADCAST, unix.IFA_RT_PRIORITY, ifaProto:
			return v
		case unix.IFA_LABEL:
			return moveName(v, of.name, "")
		}
		return nil
	})
	return []message{appendAttr(out, unix.IFA_FLAGS, native.AppendUint32(nil, flags&ifaKeptFlags))}
}

func addressOn(m message, l link, bare bool) message {
	return addresses.rewrite(m, func(h []byte) { native.PutUint32(h[4:], uint32(l.index)) }, func(attr uint16, v []byte) []byte {
		switch attr {
		case unix.IFA_LABEL:
			return moveName(v, "", l.name)
		case unix.IFA_FLAGS:
			flags := native.Uint32(v)
			if bare {
				flags |= unix.IFA_F_NOPREFIXROUTE
			}
			if m[0] == unix.AF_INET6 {
				flags |= unix.IFA_F_NODAD // it is in use already: by this host
			}
			return native.AppendUint32(nil, flags)
		}
		return v
	})
}

// sameAddress tells whether a and b are one address, whatever their flags.
func (a message) sameAddress(b message) bool { return addressOf(a) == addressOf(b) }

func addressOf(m message) netip.Prefix {
	ip := addresses.attr(m, unix.IFA_LOCAL)
	if ip == nil {
		ip = addresses.attr(m, unix.IFA_ADDRESS)
	}
	return netip.PrefixFrom(ipOf(ip), int(m[1]))
}

// normalRoute: struct rtmsg is family, destination length, source length, tos,
// table, protocol, scope, type, flags. While both links have a route of IPv6 to
// one destination the kernel tells them as one of two hops; each hop is a route
// and is taken as such.
func normalRoute(m message, of link) []message {
	if len(m) < routes.header || !isIP(m[0]) || m[7] != unix.RTN_UNICAST || m[5] == ourProtocol ||
		native.Uint32(m[8:])&unix.RTM_F_CLONED != 0 || tableOf(m) == unix.RT_TABLE_LOCAL {
		return nil
	}
	if v := routes.attr(m, unix.RTA_MULTIPATH); m[0] == unix.AF_INET6 && v != nil {
		var out []message
		for hop := range eachHop(v) {
			out = append(out, normalRoute(routeOfHop(m, hop), of)...)
		}
		return out
	}
	mine := false
	out := routes.rewrite(m, func(h []byte) { native.PutUint32(h[8:], native.Uint32(h[8:])&routeKeptFlags) }, func(attr uint16, v []byte) []byte {
		switch attr {
		case unix.RTA_CACHEINFO, rtaExpires, rtaNhID: // a nexthop object's content is told beside its id
			return nil
		case unix.RTA_OIF:
			mine = mine || wordOf(v) == of.index
			return moveIndex(v, of.index, 0)
		case unix.RTA_MULTIPATH:
			for hop := range eachHop(v) {
				mine = mine || wordOf(hop[4:8]) == of.index
			}
			return hops(v, of.index, 0)
		}
		return v
	})
	if !mine {
		return nil
	}
	return []message{out}
}

// routeOfHop is the route m with one of its hops for all.
func routeOfHop(m message, hop []byte) message {
	out := slices.Clone(m[:routes.header])
	native.PutUint32(out[8:], uint32(hop[2]))
	for a, v := range routes.attrs(m) {
		if a != unix.RTA_MULTIPATH {
			out = appendAttr(out, a, v)
			continue
		}
		out = append(out, hop[unix.SizeofRtNexthop:]...)
		out = appendAttr(out, unix.RTA_OIF, hop[4:8])
	}
	return out
}

func routeOn(m message, l link) message {
	return routes.rewrite(m, func([]byte) {}, func(attr uint16, v []byte) []byte {
		switch attr {
		case unix.RTA_OIF:
			return moveIndex(v, 0, l.index)
		case unix.RTA_MULTIPATH:
			return hops(v, 0, l.index)
		}
		return v
	})
}

func tableOf(route message) int {
	if v := routes.attr(route, unix.RTA_TABLE); len(v) == 4 {
		return wordOf(v)
	}
	return int(route[4])
}

// normalRule: struct fib_rule_hdr is as long as struct rtmsg and ends in flags.
func normalRule(m message, of link) []message {
	if len(m) < rules.header || !isIP(m[0]) || isEgress(m) {
		return nil
	}
	mine := false
	out := rules.rewrite(m, func(h []byte) { native.PutUint32(h[8:], native.Uint32(h[8:])&ruleInvert) }, func(attr uint16, v []byte) []byte {
		if attr == unix.FRA_IIFNAME || attr == unix.FRA_OIFNAME {
			mine = mine || unix.ByteSliceToString(v) == of.name
			return moveName(v, of.name, "")
		}
		return v
	})
	if !mine {
		return nil
	}
	return []message{out}
}

func ruleOn(m message, l link) message {
	return rules.rewrite(m, func([]byte) {}, func(attr uint16, v []byte) []byte {
		if attr == unix.FRA_IIFNAME || attr == unix.FRA_OIFNAME {
			return moveName(v, "", l.name)
		}
		return v
	})
}

// normalNeighbour: struct ndmsg is family, three bytes of padding, index,
// state, flags, type.
func normalNeighbour(m message, of link) []message {
	if len(m) < neighbours.header || !isIP(m[0]) || native.Uint32(m[4:]) != uint32(of.index) ||
		native.Uint16(m[8:]) != unix.NUD_PERMANENT || m[10]&unix.NTF_PROXY != 0 {
		return nil
	}
	return []message{bareNeighbour(m)}
}

// bareNeighbour is m with nothing but who it is and what is to be known of him.
func bareNeighbour(m message) message {
	return neighbours.rewrite(m, func(h []byte) { native.PutUint32(h[4:], 0) }, func(attr uint16, v []byte) []byte {
		switch attr {
		case unix.NDA_DST, unix.NDA_LLADDR, ndaProtocol:
			return v
		}
		return nil
	})
}

func neighbourOn(m message, l link) message {
	return neighbours.rewrite(m, func(h []byte) { native.PutUint32(h[4:], uint32(l.index)) }, func(_ uint16, v []byte) []byte { return v })
}

func isIP(family byte) bool { return family == unix.AF_INET || family == unix.AF_INET6 }

func ipOf(value []byte) netip.Addr {
	a, _ := netip.AddrFromSlice(value)
	return a
}

func ipText(value []byte) string { return ipOf(value).String() }

func addressText(m message) string { return addressOf(m).String() }

func routeText(m message) string {
	to := "default"
	if dst := routes.attr(m, unix.RTA_DST); dst != nil {
		to = netip.PrefixFrom(ipOf(dst), int(m[1])).String()
	} else if m[0] == unix.AF_INET6 {
		to = "default of IPv6"
	}
	if via := routes.attr(m, unix.RTA_GATEWAY); via != nil {
		to += " via " + ipText(via)
	}
	if metric := wordOf(routes.attr(m, unix.RTA_PRIORITY)); metric != 0 {
		to += fmt.Sprintf(" metric %d", metric)
	}
	if table := tableOf(m); table != unix.RT_TABLE_MAIN {
		to += fmt.Sprintf(" table %d", table)
	}
	return to
}
