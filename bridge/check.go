// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Check tells what of owner's attachment is not as Attach left it, in the host's
// namespace, and changes nothing: link, port, forwarding entry, neighbour and
// table. It returns nil if all stands.
func (h *Host) Check(ctx context.Context, owner string) error {
	host, _ := linkNames(owner)
	at, ok, err := h.Attachment(ctx, owner)
	switch {
	case err != nil:
		return fmt.Errorf("check %s: %w", owner, err)
	case !ok:
		return fmt.Errorf("check %s: its link %s is gone", owner, host)
	}
	links, err := readLinks()
	if err != nil {
		return fmt.Errorf("check %s: %w", owner, err)
	}
	l, br := links.named(host), links.named(at.Bridge)
	if l == nil || br == nil {
		return fmt.Errorf("check %s: its link %s or its bridge %s is gone", owner, host, at.Bridge)
	}
	a, _ := endpointOf(l)
	s := &portSync{h: h, b: Bridge{Name: at.Bridge, MTU: br.Attrs().MTU}, index: br.Attrs().Index, held: map[netip.Addr]bool{}, dry: true}
	if s.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("check %s: %w", owner, err)
	}
	defer s.nl.Close()
	if err := s.read(); err != nil {
		return fmt.Errorf("check %s: %w", owner, err)
	}
	if err := errors.Join(s.mend(l, a), h.checkElements(host, a)); err != nil {
		return fmt.Errorf("check %s: %w", owner, err)
	}
	return nil
}

// checkElements tells which of an endpoint's elements the tables lack.
func (h *Host) checkElements(host string, a alias) error {
	sets := elementsOf(host, a)
	if a.ports > 0 {
		s, err := h.state()
		if err != nil {
			return err
		}
		if len(s.Ports[host]) == 0 {
			return errors.New("its published ports are not written down any more")
		}
		sets = append(sets, publishedElements(a, s.Ports[host])...)
	}
	have := map[*nftables.Table]*tableState{}
	var errs []error
	for _, want := range sets {
		if have[want.table] == nil {
			t, err := readTable(want.table)
			if err != nil {
				return err
			}
			have[want.table] = t
		}
		for key, value := range want.elems {
			if !have[want.table].has(want.name, key, value) {
				errs = append(errs, fmt.Errorf("the nft set %s of table %s lacks its element", want.name, want.table.Name))
			}
		}
	}
	return errors.Join(errs...)
}

func (t *tableState) has(set string, key elemKey, value string) bool {
	for _, s := range t.sets {
		if is, ok := s.elems[key]; s.name == set && ok {
			return is == value
		}
	}
	return false
}
