// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"fmt"
	"strings"

	"github.com/vishvananda/netlink"

	"azurevnet/bridge/internal/rtnl"
)

// fault is one thing that is not as it should be.
type fault struct {
	what     string       // in the words of a sentence, such as "azure0 is down"
	mend     func() error // nil: only a person can mend it
	bearable bool         // containers can be attached in spite of it
}

// needsPerson reports whether azure-vnet cannot mend the fault. Its text then says what to do.
func (f fault) needsPerson() bool { return f.mend == nil }

// listFaults says what is wrong with the host. Only the functions that it calls say what the host should be like.
// Ensure, Reconcile and Broken use all of them. Check uses those for its endpoint. Mending one fault may bring others
// to light, such as the ports of a bridge that was gone. So a round reads the host again after it mended something.
//
// The order of the calls is the order of mending: what restricts containers comes before what opens a way to
// them. The functions named Faults decide on the view. They read only what it lacks: sysctls, nft tables,
// FORWARD, drop-ins.
func (h *Host) listFaults(v *view) (all []fault, err error) {
	add := func(faults []fault) { all = append(all, faults...) }
	add(halfMadeFaults(v))
	if !v.state.isAsked() {
		return all, nil
	}
	for _, mac := range v.macs() {
		add(h.nicFaults(v, mac))
	}
	add(h.sysctlFault(ipForward))
	tables, err := tableFaults(v)
	if err != nil {
		return all, err
	}
	add(tables)
	for _, mac := range v.macs() {
		add(h.bridgeFaults(v, mac))
	}
	add(routingFaults(v))
	for _, e := range v.endpoints {
		add(bearable(h.endpointFaults(v, e)))
	}
	add(bearable(strayFaults(v)))
	add(bearable(h.stateFaults(v)))
	add(bearable(h.publishedPortFaults(v)))
	add(forwardFaults(v))
	add(bearable(h.zoneFaults(v)))
	add(bearable(droppingChainFaults(v)))
	add(bearable(h.dropInFaults(v)))
	return all, nil
}

// bearable marks faults in spite of which containers can be attached.
func bearable(faults []fault) []fault {
	for i := range faults {
		faults[i].bearable = true
	}
	return faults
}

// halfMadeFaults are the links of ours that a call which died has left without an alias.
func halfMadeFaults(v *view) (all []fault) {
	for _, l := range v.links {
		if halfMade(l) {
			all = append(all, fault{what: fmt.Sprintf("%s is half made and nobody's", l.Attrs().Name), mend: func() error { return deleteLink(l) }})
		}
	}
	return all
}

// nicFaults are the faults of a NIC that containers are asked for on. If nothing is asked of the NIC, it has no
// faults.
func (h *Host) nicFaults(v *view, mac string) []fault {
	if n := v.state.NICs[mac]; n.Bridge == "" && !n.Transparent {
		return nil
	}
	nic := v.nics[mac]
	if nic == nil {
		return []fault{{what: fmt.Sprintf("the NIC with the MAC %s is gone: its containers reach nobody until it is attached again", mac)}}
	}
	if err := refuseTaken(v.links, nic); err != nil {
		return []fault{{what: err.Error()}}
	}
	return h.sysctlFault(sysctl{"ipv4/conf/" + nic.Attrs().Name + "/forwarding", "1"})
}

var ipForward = sysctl{"ipv4/ip_forward", "1"}

// sysctlFault is the fault of a setting with another value than s wants. A setting that the kernel does not
// have is no fault.
func (h *Host) sysctlFault(s sysctl) []fault {
	if is := h.readSysctl(s.name); is == "" || is == s.value {
		return nil
	}
	return []fault{{what: fmt.Sprintf("net.%s is not %s", strings.ReplaceAll(s.name, "/", "."), s.value), mend: func() error { return h.setSysctl(s) }}}
}

// linkSysctls are the settings of a bridge of ours, or of a transparent host end. With proxy_arp the link
// answers ARP for Azure's gateway, and with proxy_delay 0 at once. With rp_filter it takes from a container
// only packets with the container's address. IPv6 is off, because it is not served yet. With route_localnet the
// host reaches published ports at 127.0.0.1, ours and those of a chained portmap plugin; the nft rules keep
// containers away from 127.0.0.1.
// With accept_source_route 0 the link takes no packet that names routers on its way: the host would change the
// destination of such a packet after the nft rules have seen it.
func linkSysctls(link string) []sysctl {
	conf := "ipv4/conf/" + link
	return []sysctl{
		noIPv6(link),
		{conf + "/rp_filter", "1"},
		{conf + "/forwarding", "1"},
		{conf + "/proxy_arp", "1"},
		{conf + "/proxy_arp_pvlan", "1"},
		{"ipv4/neigh/" + link + "/proxy_delay", "0"}, // the kernel's default is 0.8 s
		{conf + "/send_redirects", "0"},
		{conf + "/accept_source_route", "0"}, // the kernel's default is 1. It counts only if conf/all has 1 too
		{conf + "/route_localnet", "1"},
	}
}

// noIPv6 keeps the host from sending IPv6 by the link, and from believing IPv6 that comes by it.
func noIPv6(link string) sysctl { return sysctl{"ipv6/conf/" + link + "/disable_ipv6", "1"} }

// deleteLink deletes a link. If the link does not exist, that is success.
func deleteLink(l netlink.Link) error {
	if err := netlink.LinkDel(l); err != nil && !rtnl.IsNotExist(err) {
		return fmt.Errorf("delete %s: %w", l.Attrs().Name, err)
	}
	return nil
}
