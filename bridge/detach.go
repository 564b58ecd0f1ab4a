// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Detach takes owner's interface away. None is success. The link goes last, so
// that half a detach is found again and finished.
func (h *Host) Detach(ctx context.Context, owner string) error {
	var nf netfilter
	defer nf.close()
	unlock, err := h.lockShared(ctx, "detach "+owner)
	if err != nil {
		return fmt.Errorf("detach %s: %w", owner, err)
	}
	defer unlock()
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("detach %s: %w", owner, err)
	}
	defer nl.Close()
	host, _ := linkNames(owner)
	l, err := nl.LinkByName(host)
	if absent(err) {
		return nil
	}
	if err == nil {
		if a, whole := parseAlias(l.Attrs().Alias); whole {
			err = h.detachLink(ctx, nl, &nf, l, a)
		} else {
			err = delLink(nl, l)
		}
	}
	if err != nil {
		return fmt.Errorf("detach %s: %w", owner, err)
	}
	return nil
}

// detachLink takes away all that was attached with l, and then l.
func (h *Host) detachLink(ctx context.Context, nl *netlink.Handle, nf *netfilter, l netlink.Link, a alias) error {
	sets, err := h.publishedBy(l.Attrs().Name, a)
	if err != nil {
		return err
	}
	if err := h.at("detach elements"); err != nil {
		return err
	}
	// In one transaction: the kernel waits for all readers at the end of each.
	if err := nf.deleteElements(append(sets, elementsOf(l.Attrs().Name, a)...)); err != nil {
		return err
	}
	if err := h.at("detach neighbour"); err != nil {
		return err
	}
	b, err := nl.LinkByName(a.bridge)
	if err != nil && !absent(err) {
		return err
	}
	if err == nil {
		if err := neighbours.remove(neighbourFor(b.Attrs().Index, a)); err != nil {
			return err
		}
	}
	if err := h.at("detach flows"); err != nil {
		return err
	}
	if off := (Policy{}); a.policy != off.id() {
		if err := nf.forgetFlows(flowsFrom(a.addr.Addr())); err != nil {
			return err
		}
	}
	if a.ports > 0 {
		if err := nf.forgetFlows(repliesOf(a.addr.Addr())); err != nil {
			return err
		}
	}
	if err := h.at("detach link"); err != nil {
		return err
	}
	if err := delLink(nl, l); err != nil || a.ports == 0 {
		return err
	}
	return h.disclaimPorts(ctx, l.Attrs().Name)
}

// absent tells an error that says that a link is not there.
func absent(err error) bool {
	var not netlink.LinkNotFoundError
	return errors.As(err, &not) || errors.Is(err, unix.ENODEV) || errors.Is(err, os.ErrNotExist)
}
