// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/conntrack"
	"azurevnet/bridge/internal/ebtables"
	"azurevnet/bridge/internal/rtnl"
	"azurevnet/bridge/internal/ruleset"
	"azurevnet/internal/dump"
)

// upstreamRules returns a sentence about rules in ebtables that name one of these NICs or an address of its
// subnet. Azure's own azure-vnet leaves such rules behind. They are not ours to delete, so the sentence has the
// commands.
func upstreamRules(nics []netlink.Link) []string {
	var names []string
	var subnets []netip.Prefix
	for _, nic := range nics {
		names = append(names, nic.Attrs().Name)
		addrs, err := dump.Whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nic, netlink.FAMILY_V4) })
		if err != nil {
			return []string{err.Error()}
		}
		for _, a := range addrs {
			subnets = append(subnets, prefixOf(a.IPNet).Masked())
		}
	}
	commands, err := ebtables.DeleteCommands(func(rule []string) bool {
		return slices.ContainsFunc(rule, func(word string) bool {
			addr, _ := netip.ParseAddr(word)
			return slices.Contains(names, word) || slices.ContainsFunc(subnets, func(p netip.Prefix) bool { return p.Contains(addr) })
		})
	})
	var out []string
	if len(commands) > 0 {
		out = append(out, fmt.Sprintf("ebtables has rules of others for %s and its subnet, such as an older azure-vnet leaves. They answer ARP for its containers, which may be gone, and lead frames to these. When no container of theirs runs any more: %s",
			strings.Join(names, ", "), strings.Join(commands, "; ")))
	}
	if err != nil {
		out = append(out, err.Error())
	}
	return out
}

// UpstreamContainer is what the runtime tells of a container's interface. Azure's own azure-vnet derived the
// name of its host end from it.
type UpstreamContainer struct {
	Network      string // name of the network
	ContainerID  string // as the runtime gives it
	IfName       string // name of the interface in the container
	PodNamespace string // empty: not told
	PodName      string // empty: not told
	Netns        string // path of the container's network namespace; empty: not told
}

// hostEnds returns the two names that the host end may have. byID is of this container alone (bridge mode).
// byPod is of every container that a pod of this name has had (transparent mode): a StatefulSet's pod comes
// again under its name, maybe before its old container is gone. byPod is empty if no pod is told.
func (c UpstreamContainer) hostEnds() (byID, byPod string) {
	name := func(of string) string {
		sum := sha1.Sum([]byte(of))
		return hostPrefix + hex.EncodeToString(sum[:])[:11]
	}
	if c.PodName != "" {
		byPod = name(c.PodNamespace + "." + c.PodName)
	}
	return name(c.Network + c.ContainerID + c.IfName), byPod
}

// RemoveUpstreamLink removes the host end that Azure's own azure-vnet gave to this very container, and returns
// its name, or "" if there is none. The kernel deletes the routes over the link and the container's interface
// with it; nothing else is removed. A runtime needs this for containers that it started before azure-vnet was
// installed.
//
// The proof is in the container's namespace: the interface IfName there is the link's other end. Without a
// namespace, only the link whose name derives from the container's id is removed. The link whose name derives
// from the pod stays: the kernel deletes a link together with the namespace of its other end, so a link that
// still exists belongs to another container.
func (h *Host) RemoveUpstreamLink(ctx context.Context, c UpstreamContainer) (link string, err error) {
	byID, byPod := c.hostEnds()
	for _, name := range []string{byID, byPod} {
		removed, err := h.removeUpstreamLink(ctx, c, name, name == byID)
		if err != nil {
			return "", fmt.Errorf("remove %s, which Azure's own azure-vnet made: %w", name, err)
		}
		if removed {
			return name, nil
		}
	}
	return "", nil
}

func (h *Host) removeUpstreamLink(ctx context.Context, c UpstreamContainer, name string, byID bool) (removed bool, err error) {
	if name == "" {
		return false, nil
	}
	if l, err := netlink.LinkByName(name); rtnl.IsNotExist(err) || err == nil && !mayBeUpstreams(l) {
		return false, nil // nearly every DEL ends here, without the lock
	}
	unlock, err := h.lockHost(ctx, "remove "+name)
	if err != nil {
		return false, err
	}
	defer unlock()
	l, err := netlink.LinkByName(name)
	if err != nil || !mayBeUpstreams(l) {
		return false, ignoreMissing(err)
	}
	if has, hadNamespace := c.hasOtherEnd(l); !has && (hadNamespace || !byID) {
		return false, nil
	}
	routes, err := dump.Whole(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{LinkIndex: l.Attrs().Index}, netlink.RT_FILTER_OIF)
	})
	if err != nil {
		return false, err
	}
	if err := h.beforeStep("upstream link"); err != nil {
		return false, err
	}
	if err := deleteLink(l); err != nil {
		return false, err
	}
	var flows conntrack.Conn
	defer flows.Close()
	for _, r := range routes { // their flows would mislead the next container that has the address
		if p := prefixOf(r.Dst); p.Bits() == 32 {
			err = deleteFlows(&flows, p.Addr())
		}
	}
	return true, err
}

// mayBeUpstreams reports whether a link may be a host end of Azure's own azure-vnet: a veth without any mark of
// ours.
func mayBeUpstreams(l netlink.Link) bool {
	a := l.Attrs()
	return l.Type() == "veth" && a.Alias == "" && a.Group != ruleset.GroupBridge && a.Group != ruleset.GroupTransparent
}

// hasOtherEnd reports whether the interface IfName of the container is the link's other end. hadNamespace is
// false if there is no namespace to look into.
func (c UpstreamContainer) hasOtherEnd(l netlink.Link) (has, hadNamespace bool) {
	if c.Netns == "" {
		return false, false
	}
	ns, err := OpenNetns(c.Netns)
	if err != nil {
		return false, !errors.Is(err, os.ErrNotExist)
	}
	defer ns.Close()
	// The index of the other end is unique in its namespace only, so the namespace is compared too.
	id, err := netlink.GetNetNsIdByFd(int(ns))
	if err != nil || id < 0 || id != l.Attrs().NetNsID {
		return false, true
	}
	in, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return false, true
	}
	defer in.Close()
	other, err := in.LinkByIndex(l.Attrs().ParentIndex)
	return err == nil && other.Attrs().Name == c.IfName, true
}
