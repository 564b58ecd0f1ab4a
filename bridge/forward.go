// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"net"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"

	"azurevnet/bridge/internal/forward"
)

var errForward = errors.New("iptables may drop what containers send and receive: see to it that iptables can read and change the chain FORWARD")

// forwardFaults are those of our rules in iptables' FORWARD chain. Where FORWARD cannot be read or changed, all other
// faults are still mended. New containers are refused then only if FORWARD's policy is DROP.
func forwardFaults(v *view) (all []fault) {
	c := v.forwardConfig()
	different, err := c.Differences()
	for _, what := range different {
		all = append(all, fault{what: what, mend: func() error { _, err := c.Sync(); return err }})
	}
	switch {
	case err == nil:
	case errors.Is(err, forward.ErrUnreadable):
		all = append(all, fault{what: err.Error()})
	default:
		all = append(all, fault{what: err.Error(), mend: func() error { return errForward }, bearable: !forward.PolicyDrops()})
	}
	return all
}

// droppingChainFaults are the nft chains of others that drop what containers send or receive. Only a person can change
// them.
func droppingChainFaults(v *view) (all []fault) {
	chains, err := v.forwardConfig().DroppingChains()
	for _, what := range chains {
		all = append(all, fault{what: what})
	}
	if err != nil {
		all = append(all, fault{what: err.Error()})
	}
	return all
}

// forwardConfig returns what our rules in iptables' FORWARD are to accept.
func (v *view) forwardConfig() forward.Config {
	c := forward.Config{}
	transparent := false
	for _, mac := range v.macs() {
		n := v.state.NICs[mac]
		if n.Bridge != "" {
			c.Links = append(c.Links, n.Bridge)
		}
		transparent = transparent || n.Transparent
	}
	if transparent {
		c.Links = append(c.Links, hostPrefix+"+")
	}
	if len(c.Links) == 0 {
		return c
	}
	for _, l := range v.links {
		if a := l.Attrs(); v.isNIC(a.Index) || mayLeadOut(l) {
			c.Out = append(c.Out, a.Name)
		}
	}
	slices.Sort(c.Out)
	return c
}

func (v *view) isNIC(index int) bool {
	for _, nic := range v.nics {
		if nic.Attrs().Index == index {
			return true
		}
	}
	return false
}

// mayLeadOut reports whether a link may lead to another network, as a VPN's link does. Bridges and veths do not
// count: they lead to containers of somebody.
func mayLeadOut(l netlink.Link) bool {
	a := l.Attrs()
	return a.Flags&net.FlagUp != 0 && a.Flags&net.FlagLoopback == 0 && a.MasterIndex == 0 &&
		l.Type() != "bridge" && l.Type() != "veth" && !strings.HasPrefix(a.Name, hostPrefix)
}
