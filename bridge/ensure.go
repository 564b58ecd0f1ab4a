// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"azurevnet/internal/statefile"
)

// undoWait bounds the way back from a failed move, which must be walked though
// the deadline of the call that failed has passed.
const undoWait = 15 * time.Second

// Ensure makes the bridge that spec wishes, adopts what stands of it, or
// finishes what a crash left; where it stands it costs a few reads and no lock.
// On a host that nobody reconciles it does so once a minute.
// The host's addresses, routes and all else that made the NIC its own move to
// the bridge, and connections live on. On failure the host is back on its NIC.
func (h *Host) Ensure(ctx context.Context, spec Spec) (Bridge, error) {
	mended := h.lookOver(ctx)
	if b, ok := h.stands(spec); ok {
		b.Mended = mended
		return b, nil
	}
	unlock, err := h.lockExclusive(ctx, "ensure "+spec.title())
	if err != nil {
		return Bridge{}, err
	}
	defer unlock()
	b, err := h.ensure(ctx, spec)
	if err != nil {
		return Bridge{}, fmt.Errorf("ensure a bridge over the NIC %s: %w", spec.MAC, err)
	}
	b.Mended = mended
	return b, nil
}

func (spec Spec) title() string {
	if spec.Name != "" {
		return spec.Name
	}
	return spec.MAC
}

// stands tells whether the bridge of spec stands, from as few reads as can tell.
func (h *Host) stands(spec Spec) (Bridge, bool) {
	s, err := h.state()
	if err != nil {
		return Bridge{}, false
	}
	name, st := s.of(spec.MAC)
	if !s.knows(spec.NICs) {
		return Bridge{}, false
	}
	if st == nil || st.Phase != standing || spec.Name != "" && spec.Name != name || spec.MTU != 0 && spec.MTU != st.MTU {
		return Bridge{}, false
	}
	l, err := netlink.LinkByName(name)
	if err != nil {
		return Bridge{}, false
	}
	nic, err := netlink.LinkByName(st.NIC)
	if err != nil {
		return Bridge{}, false
	}
	a, n := l.Attrs(), nic.Attrs()
	mtu := n.MTU
	if st.MTU != 0 {
		mtu = st.MTU
	}
	if !strings.HasPrefix(a.Alias, bridgeAlias) || a.HardwareAddr.String() != n.HardwareAddr.String() || n.MasterIndex != a.Index ||
		a.Flags&n.Flags&net.FlagUp == 0 || a.MTU != mtu {
		return Bridge{}, false
	}
	if ok, err := st.carried(link{a.Index, name}); !ok || err != nil {
		return Bridge{}, false
	}
	if there, err := tableStands(bridgeTable); !there || err != nil {
		return Bridge{}, false
	}
	return Bridge{Name: name, NIC: st.NIC, MAC: a.HardwareAddr, MTU: a.MTU}, true
}

// carried tells whether l has all that moved of IPv4.
func (st *bridgeState) carried(l link) (bool, error) {
	var has identity
	all, err := addresses.dump(unix.AF_INET)
	if err != nil {
		return false, err
	}
	for _, m := range all {
		has.Addresses = append(has.Addresses, normalAddress(m, l)...)
	}
	if all, err = routes.dump(unix.AF_INET); err != nil {
		return false, err
	}
	for _, m := range all {
		has.Routes = append(has.Routes, normalRoute(m, l)...)
	}
	left := st.Moved.less(has)
	return !slices.ContainsFunc(slices.Concat(left.Addresses, left.Routes), func(m message) bool { return m[0] == unix.AF_INET }), nil
}

// tableStands tells whether an nft table is there at all: a flushed ruleset is
// noticed by whoever attaches next.
func tableStands(table *nftables.Table) (bool, error) {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETTABLE, unix.NLM_F_ACK)
	req.AddRawData(append([]byte{byte(table.Family), unix.NFNETLINK_V0, 0, 0}, appendAttr(nil, unix.NFTA_TABLE_NAME, append([]byte(table.Name), 0))...))
	_, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, err
}

// knows tells whether all those NICs have been told of.
func (s *hostState) knows(nics []string) bool {
	return !slices.ContainsFunc(nics, func(mac string) bool { return !slices.Contains(s.NICs, mac) })
}

// learn remembers the VM's NICs.
func (h *Host) learn(ctx context.Context, nics []string) error {
	return h.updateState(ctx, "learn of NICs", func(s *hostState) error {
		if s.knows(nics) {
			return statefile.ErrUnchanged
		}
		s.NICs = slices.Compact(slices.Sorted(slices.Values(slices.Concat(s.NICs, nics))))
		return nil
	})
}

// of is the bridge over the NIC with that MAC.
func (s *hostState) of(mac string) (string, *bridgeState) {
	for name, st := range s.Bridges {
		if st.MAC == mac {
			return name, st
		}
	}
	return "", nil
}

func (h *Host) ensure(ctx context.Context, spec Spec) (Bridge, error) {
	s, err := h.known()
	if err != nil {
		return Bridge{}, err
	}
	t, err := readLinks()
	if err != nil {
		return Bridge{}, err
	}
	mac, err := parseMAC(spec.MAC)
	if err != nil {
		return Bridge{}, err
	}
	nic, err := t.nic(mac)
	if err != nil {
		return Bridge{}, err
	}
	name, st := s.of(mac.String())
	if name, err = t.choose(spec, nic, name); err != nil {
		return Bridge{}, err
	}
	if st == nil {
		if other := s.Bridges[name]; other != nil {
			return Bridge{}, fmt.Errorf("%s is the bridge of %s already: give this one another name", name, other.NIC)
		}
		if l := t.named(name); l != nil {
			return Bridge{}, fmt.Errorf("%s exists already as a link of type %s that is not ours: give the bridge another name", name, l.Type())
		}
		if err := spec.ready(nic); err != nil {
			return Bridge{}, err
		}
		st = &bridgeState{MAC: mac.String()}
	}
	if err := h.wishMTU(ctx, name, st, spec.MTU); err != nil {
		return Bridge{}, err
	}
	if err := h.learn(ctx, spec.NICs); err != nil {
		return Bridge{}, err
	}
	m, err := h.raise(ctx, name, st)
	if err != nil {
		return Bridge{}, err
	}
	return m.asBridge()
}

// wishMTU takes another wish for the MTU of a bridge that nothing is attached to:
// whose wish the last one was may be gone. 0 is content with what there is.
func (h *Host) wishMTU(ctx context.Context, name string, st *bridgeState, mtu int) error {
	if mtu == 0 || mtu == st.MTU {
		return nil
	}
	if st.MTU != 0 {
		on, err := h.endpointsOn(ctx, name)
		if err != nil {
			return err
		}
		if len(on) > 0 {
			return fmt.Errorf("%s has an MTU of %d bytes, and another of %d is asked for: detach first what is attached to it: %s", name, st.MTU, mtu, strings.Join(on, ", "))
		}
	}
	st.MTU, st.unsaved = mtu, true
	return nil
}

// ready refuses the primary NIC while it has no address: a DHCP client hears no
// answer on the port of a bridge, and the host would never get one.
func (spec Spec) ready(nic netlink.Link) error {
	if !spec.Primary {
		return nil
	}
	has, err := whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nic, unix.AF_INET) })
	if err != nil {
		return fmt.Errorf("read the addresses of %s: %w", nic.Attrs().Name, err)
	}
	if len(has) == 0 {
		return fmt.Errorf("%s has no IPv4 address yet, and would get none in a bridge: try again when DHCP has given it one", nic.Attrs().Name)
	}
	return nil
}

// choose names the bridge of nic: the one it has, or a new one.
func (t linkTable) choose(spec Spec, nic netlink.Link, has string) (string, error) {
	a := nic.Attrs()
	if m := t.at(a.MasterIndex); m != nil && m.Attrs().Name != has {
		return "", fmt.Errorf("%s is a port of %s, a %s that is not ours: take it out first (ip link set %s nomaster)", a.Name, m.Attrs().Name, m.Type(), a.Name)
	}
	name := spec.Name
	switch {
	case has != "" && (name == "" || name == has):
		return has, nil
	case has != "":
		return "", fmt.Errorf("%s is in the bridge %s already and cannot be in %s too: one NIC has one bridge", a.Name, has, name)
	case name == "" && spec.Primary:
		name = "azure0"
	case name == "":
		name = fmt.Sprintf("azure%d", a.Index)
	}
	return name, checkName(name)
}

// known is the state, with every bridge of ours that it does not know adopted:
// the file is lost sooner than the bridge.
func (h *Host) known() (*hostState, error) {
	s, err := h.state()
	if err != nil {
		return nil, err
	}
	t, err := readLinks()
	if err != nil {
		return nil, err
	}
	for _, b := range t.bridges() {
		if s.Bridges[b.Name] != nil {
			continue
		}
		l := t.named(b.Name).Attrs()
		has, err := capture(link{l.Index, l.Name}, false)
		if err != nil {
			return nil, err
		}
		st := &bridgeState{Phase: standing, NIC: b.NIC, MAC: b.MAC.String(), Moved: has, unsaved: true}
		if nic := t.named(b.NIC); nic != nil && nic.Attrs().MTU != b.MTU {
			st.MTU = b.MTU
		}
		s.Bridges[b.Name] = st
	}
	return s, nil
}

// raise walks up. What failed to stand for the first time is undone; what stood
// is left for the next try, unless the host is half on its way: then it goes
// back to its NIC, and the journal keeps the wish.
func (h *Host) raise(ctx context.Context, name string, st *bridgeState) (*move, error) {
	wished, cut := st.Phase != "", st.Phase == moving
	m, err := h.newMove(name, st)
	if err != nil {
		return nil, err
	}
	err = m.walk(ctx, m.up())
	if err == nil {
		if cut {
			m.mend("the making of %s had not been finished", name)
		}
		return m, nil
	}
	if st.Phase != moving {
		return m, err
	}
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoWait)
	defer cancel()
	m.undoing = true
	down := m.undo()
	if !wished {
		down = m.down()
	}
	if bad := m.walk(undo, down); bad != nil {
		err = errors.Join(err, fmt.Errorf("and then undo it: %w", bad))
	}
	return m, err
}
