// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// syncPorts makes every endpoint of b what its alias says: master, MTU, port
// flags, forwarding entry and neighbour; and clears away what has no alias. It
// names what it mended. The caller holds the exclusive lock: a link without an
// alias may otherwise be an attach in flight.
func (h *Host) syncPorts(b Bridge) (mended []string, err error) { return h.lookAtPorts(b, false) }

// lookAtPorts is syncPorts or, dry, an error for each thing that it would mend.
func (h *Host) lookAtPorts(b Bridge, dry bool) (mended []string, err error) {
	links, err := readLinks()
	if err != nil {
		return nil, err
	}
	br := links.named(b.Name)
	if br == nil {
		return nil, fmt.Errorf("ports of %s: the bridge does not stand", b.Name)
	}
	s := &portSync{h: h, b: b, index: br.Attrs().Index, held: map[netip.Addr]bool{}, dry: dry}
	if s.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, err
	}
	defer s.nl.Close()
	if err := s.read(); err != nil {
		return nil, fmt.Errorf("ports of %s: %w", b.Name, err)
	}
	var errs []error // one port that cannot be mended must not keep the others
	for _, l := range links {
		a, ok := endpointOf(l)
		if ok && a.bridge == b.Name {
			s.held[a.addr.Addr()] = true
			errs = append(errs, s.mend(l, a))
		}
		if !ok && halfMade(l) {
			errs = append(errs, s.fix(l.Attrs().Name+": half made, deleted", func() error { return delLink(s.nl, l) }))
		}
	}
	errs = append(errs, s.forget())
	return s.mended, errors.Join(errs...)
}

// halfMade tells a link that an attach died over.
func halfMade(l netlink.Link) bool {
	a := l.Attrs()
	digits, ours := strings.CutPrefix(a.Name, hostPrefix)
	return ours && l.Type() == "veth" && a.Alias == "" && len(digits) == 11 && strings.Trim(digits, "0123456789abcdef") == ""
}

type portSync struct {
	h      *Host
	b      Bridge
	index  int // of the bridge
	nl     *netlink.Handle
	flags  map[int]map[uint16]byte // by port
	fdb    map[string]bool         // static entries: see fdbKey
	neigh  map[netip.Addr]message  // permanent ones of the bridge
	held   map[netip.Addr]bool     // attached
	dry    bool                    // what is not as it should be is an error, and stays
	mended []string
}

func (s *portSync) read() error {
	var err error
	if s.flags, err = readPortFlags(); err != nil {
		return fmt.Errorf("read port flags: %w", err)
	}
	fdb, err := whole(func() ([]netlink.Neigh, error) { return s.nl.NeighList(0, unix.AF_BRIDGE) })
	if err != nil {
		return fmt.Errorf("read forwarding entries: %w", err)
	}
	s.fdb = map[string]bool{}
	for _, n := range fdb {
		if n.MasterIndex == s.index && n.State&netlink.NUD_NOARP != 0 && n.Vlan == 0 {
			s.fdb[fdbKey(n.LinkIndex, n.HardwareAddr)] = true
		}
	}
	list, err := neighbours.dump(unix.AF_INET)
	if err != nil {
		return fmt.Errorf("read neighbours: %w", err)
	}
	s.neigh = map[netip.Addr]message{}
	for _, m := range list {
		if native.Uint32(m[4:]) == uint32(s.index) && native.Uint16(m[8:]) == unix.NUD_PERMANENT {
			s.neigh[ipOf(neighbours.attr(m, unix.NDA_DST))] = m
		}
	}
	return nil
}

func fdbKey(port int, mac []byte) string { return fmt.Sprintf("%d %x", port, mac) }

// fix does one thing and notes what it was.
func (s *portSync) fix(what string, do func() error) error {
	if s.dry {
		return errors.New(what + " is not as it should be")
	}
	if err := do(); err != nil {
		return fmt.Errorf("mend %s: %w", what, err)
	}
	s.mended = append(s.mended, what)
	return nil
}

// mend brings one endpoint back to what its alias says. The master comes first:
// flags and forwarding entry go with it.
func (s *portSync) mend(l netlink.Link, a alias) error {
	at := l.Attrs()
	joined := at.MasterIndex == s.index
	var errs []error
	fix := func(right bool, what string, do func() error) {
		if !right {
			errs = append(errs, s.fix(at.Name+": "+what, do))
		}
	}
	fix(joined, "master", func() error { return s.nl.LinkSetMasterByIndex(l, s.index) })
	fix(at.Flags&1 != 0, "down", func() error { return s.nl.LinkSetUp(l) })
	fix(at.MTU == s.b.MTU, fmt.Sprintf("MTU %d", at.MTU), func() error { return s.setMTU(l) })
	for _, f := range portFlags {
		if is, ok := s.flags[at.Index][uint16(f.attr)]; !joined || !ok || is != f.value {
			fix(false, f.name, func() error { return setPort(at.Index) })
			break
		}
	}
	fix(joined && s.fdb[fdbKey(at.Index, a.mac)], "forwarding entry", func() error { return s.nl.NeighSet(forwarding(at.Index, a.mac)) })
	n, known := s.neigh[a.addr.Addr()]
	fix(known && bytes.Equal(neighbours.attr(n, unix.NDA_LLADDR), a.mac), "neighbour", func() error {
		return neighbours.put(neighbourFor(s.index, a), unix.NLM_F_REPLACE)
	})
	return errors.Join(errs...)
}

// setMTU sets both ends' MTU, the container's first: while the host's end still
// differs, a repeat knows that there is something to do.
func (s *portSync) setMTU(l netlink.Link) error {
	at := l.Attrs()
	peer := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: at.ParentIndex}}
	in := s.nl
	if at.NetNsID >= 0 {
		var err error
		if in, err = s.h.enter(at.NetNsID); err != nil {
			return err
		}
		defer in.Close()
	}
	if err := in.LinkSetMTU(peer, s.b.MTU); err != nil {
		return fmt.Errorf("the container's end: %w", err)
	}
	return s.nl.LinkSetMTU(l, s.b.MTU)
}

// enter opens a socket in the container's namespace that this one knows by id.
// The kernel finds an id for a namespace, but no namespace for an id: so those
// are asked that runtimes keep by name. (A message with IFLA_TARGET_NETNSID is
// no way: it moves the link of that index of this namespace there.)
func (h *Host) enter(id int) (*netlink.Handle, error) {
	for _, dir := range []string{"netns", "docker/netns"} {
		names, _ := filepath.Glob(filepath.Join(h.cfg.Run, dir, "*"))
		for _, name := range names {
			ns, err := netns.GetFromPath(name)
			if err != nil {
				continue // gone, or no namespace
			}
			if is, err := netlink.GetNetNsIdByFd(int(ns)); err == nil && is == id {
				in, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
				ns.Close()
				if err != nil { // Docker's managed plugin lacks CAP_SYS_ADMIN
					err = fmt.Errorf("this process may not enter the container's namespace: restart the container: %w", err)
				}
				return in, err
			}
			ns.Close()
		}
	}
	return nil, fmt.Errorf("the container's namespace is not among those kept under %s: restart the container", h.cfg.Run)
}

// forget deletes the neighbours that attaches made and nobody has any more.
func (s *portSync) forget() error {
	var errs []error
	for ip, n := range s.neigh {
		protocol := neighbours.attr(n, ndaProtocol)
		ours := len(protocol) == 1 && protocol[0] == ourProtocol || bytes.Equal(neighbours.attr(n, unix.NDA_LLADDR), MACFor(ip))
		if s.held[ip] || !ours {
			continue
		}
		errs = append(errs, s.fix("neighbour "+ip.String()+": nobody's, deleted", func() error { return neighbours.remove(n) }))
	}
	return errors.Join(errs...)
}

// readPortFlags reads the flags of all ports of all bridges in one dump.
func readPortFlags() (map[int]map[uint16]byte, error) {
	msgs, err := whole(func() ([][]byte, error) {
		req := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)
		req.AddData(nl.NewIfInfomsg(unix.AF_BRIDGE))
		return req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	})
	if err != nil {
		return nil, err
	}
	all := map[int]map[uint16]byte{}
	for _, m := range msgs {
		flags := map[uint16]byte{}
		eachAttr(m[unix.SizeofIfInfomsg:], func(attr uint16, value []byte) bool {
			if attr == unix.IFLA_PROTINFO {
				eachAttr(value, func(attr uint16, value []byte) bool {
					if len(value) == 1 {
						flags[attr] = value[0]
					}
					return true
				})
			}
			return true
		})
		all[int(int32(native.Uint32(m[4:])))] = flags
	}
	return all, nil
}
