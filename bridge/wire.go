// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// createBridge makes the bridge with its MAC, since one that the kernel chose
// changes when a port joins, and without spanning tree or its delay.
func createBridge(b Bridge) error {
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(b.Name)))
	req.AddData(nl.NewRtAttr(unix.IFLA_ADDRESS, b.MAC))
	req.AddData(nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(b.MTU))))
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("bridge"))
	data := info.AddRtAttr(nl.IFLA_INFO_DATA, nil)
	data.AddRtAttr(nl.IFLA_BR_STP_STATE, nl.Uint32Attr(0))
	data.AddRtAttr(nl.IFLA_BR_FORWARD_DELAY, nl.Uint32Attr(0))
	// A bridge that snoops joins 224.0.0.106 and ff02::6a, and says so to the fabric.
	data.AddRtAttr(nl.IFLA_BR_MCAST_SNOOPING, nl.Uint8Attr(0))
	req.AddData(info)
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("make the bridge %s: %w", b.Name, err)
	}
	return nil
}

// ensureFabric pins the fabric's MAC to the NIC in the bridge's forwarding
// table. A dynamic entry may stand in the way, so it is replaced.
func ensureFabric(nic, bridge link) (changed bool, err error) {
	if pinned, err := fabricPinned(nic, bridge); pinned || err != nil {
		return false, err
	}
	err = netlink.NeighSet(&netlink.Neigh{
		Family: unix.AF_BRIDGE, LinkIndex: nic.index, HardwareAddr: fabricMAC,
		State: netlink.NUD_NOARP, Flags: netlink.NTF_MASTER,
	})
	if err != nil {
		return false, fmt.Errorf("pin the fabric's MAC to %s: %w", nic.name, err)
	}
	return true, nil
}

// cross makes nic a port of the bridge with that index, 0 for none, and leads the
// host's routes over to, at one stroke: in between, answers would come in by one
// link and the host look for them on the other. A route that to has is put anew,
// before its equals of the other link. One that cannot be put is left to the step
// that puts all of them and tells, and so is what would not fit a socket. A NIC
// that cannot be moved takes its routes back.
func cross(nic link, master int, over []message, to link) error {
	port := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(nic.index)
	port.AddData(msg)
	port.AddData(nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(master))))
	all := []*nl.NetlinkRequest{port}
	over = first(over, crossMost)
	for _, m := range over {
		all = append(all, onRoute(routes.del, 0, m, to), onRoute(routes.add, unix.NLM_F_CREATE, m, to))
	}
	errs, err := together(all...)
	if err != nil || errs[0] == nil {
		return err
	}
	var back []*nl.NetlinkRequest
	for i, m := range over {
		if errs[2*i+2] == nil {
			back = append(back, onRoute(routes.del, 0, m, to))
		}
	}
	if len(back) > 0 {
		_, err = together(back...)
	}
	return errors.Join(errs[0], err)
}

// crossMost is how many routes go over with the NIC: the answers to so many, two of
// some 800 bytes for each, fit the 4 MiB that together asks for. The rest follow.
const crossMost = 1000

// first is the n routes that the host needs most: to its neighbours, then those of
// all that it knows no other for.
func first(all []message, n int) []message {
	rank := func(m message) int { return 2*depth(m) + min(int(m[1]), 1) }
	all = slices.SortedStableFunc(slices.Values(all), func(a, b message) int { return rank(a) - rank(b) })
	return all[:min(n, len(all))]
}

func onRoute(proto, flags int, m message, l link) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(proto, flags|unix.NLM_F_ACK)
	req.RawData = routeOn(m, l)
	return req
}

func fabricPinned(nic, bridge link) (bool, error) {
	all, err := neighbours.dump(unix.AF_BRIDGE)
	if err != nil {
		return false, fmt.Errorf("read the forwarding entries of %s: %w", bridge.name, err)
	}
	return slices.ContainsFunc(all, func(m message) bool {
		return native.Uint32(m[4:]) == uint32(nic.index) && native.Uint16(m[8:])&unix.NUD_NOARP != 0 && wordOf(neighbours.attr(m, unix.NDA_MASTER)) == bridge.index &&
			bytes.Equal(neighbours.attr(m, unix.NDA_LLADDR), fabricMAC) && neighbours.attr(m, unix.NDA_VLAN) == nil
	}), nil
}

const neighbourLives = unix.NUD_REACHABLE | unix.NUD_STALE | unix.NUD_DELAY | unix.NUD_PROBE

// seed tells to the neighbours that from has resolved, so that nothing waits
// for ARP. The kernel checks a stale one while it uses it.
func seed(from, to link) error {
	all, err := neighbours.dump(unix.AF_UNSPEC)
	if err != nil {
		return fmt.Errorf("read the neighbours of %s: %w", from.name, err)
	}
	for _, m := range all {
		if !isIP(m[0]) || native.Uint32(m[4:]) != uint32(from.index) || native.Uint16(m[8:])&neighbourLives == 0 ||
			neighbours.attr(m, unix.NDA_LLADDR) == nil {
			continue
		}
		m = neighbourOn(bareNeighbour(m), to)
		native.PutUint16(m[8:], unix.NUD_STALE)
		if err := neighbours.put(m, unix.NLM_F_EXCL); err != nil {
			return fmt.Errorf("tell %s its %w", to.name, err)
		}
	}
	return nil
}

// verifyWait bounds how long a gateway may take to answer ARP over its new
// link: the kernel asks three times, a second apart.
const verifyWait = 5 * time.Second

// verifyGateways asks each IPv4 gateway of the default routes that l knows a
// MAC of whether it is there: by ARP, for a VNet's gateway answers no ping. One
// that was not resolved before the move says nothing about the move.
func (id identity) verifyGateways(ctx context.Context, l link) error {
	ctx, cancel := context.WithTimeout(ctx, verifyWait)
	defer cancel()
	for _, r := range id.Routes {
		via := routes.attr(r, unix.RTA_GATEWAY)
		if r[0] != unix.AF_INET || r[1] != 0 || via == nil {
			continue
		}
		m, err := neighbour(l, via)
		if err != nil || m == nil || native.Uint16(m[8:])&neighbourLives == 0 {
			if err != nil {
				return err
			}
			continue
		}
		probe := neighbourOn(bareNeighbour(m), l)
		native.PutUint16(probe[8:], unix.NUD_PROBE)
		if err := neighbours.put(probe, unix.NLM_F_REPLACE); err != nil {
			return fmt.Errorf("ask for the gateway's %w", err)
		}
		if err := awaitNeighbour(ctx, l, via); err != nil {
			return err
		}
	}
	return nil
}

func awaitNeighbour(ctx context.Context, l link, ip []byte) error {
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		m, err := neighbour(l, ip)
		if err != nil {
			return err
		}
		if m != nil && native.Uint16(m[8:])&(unix.NUD_REACHABLE|unix.NUD_PERMANENT) != 0 {
			return nil
		}
		if m == nil || native.Uint16(m[8:])&unix.NUD_FAILED != 0 {
			return fmt.Errorf("the gateway %s answers no ARP over %s", ipText(ip), l.name)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return fmt.Errorf("the gateway %s answers no ARP over %s: %w", ipText(ip), l.name, ctx.Err())
		}
	}
}

// neighbour is what l knows of ip, or nil.
func neighbour(l link, ip []byte) (message, error) {
	all, err := neighbours.dump(unix.AF_INET)
	if err != nil {
		return nil, fmt.Errorf("read the neighbours of %s: %w", l.name, err)
	}
	for _, m := range all {
		if native.Uint32(m[4:]) == uint32(l.index) && bytes.Equal(neighbours.attr(m, unix.NDA_DST), ip) {
			return m, nil
		}
	}
	return nil, nil
}

func isNotExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }

func isNoLink(err error) bool {
	var gone netlink.LinkNotFoundError
	return errors.As(err, &gone) || errors.Is(err, unix.ENODEV)
}

func equalJSON(a, b any) bool {
	x, _ := json.Marshal(a)
	y, _ := json.Marshal(b)
	return bytes.Equal(x, y)
}
