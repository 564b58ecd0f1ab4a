// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
)

// lookWait bounds how long Broken waits for those who are changing the host.
const lookWait = 3 * time.Second

// Broken names what is not as it should be, in sentences, and changes nothing: it
// is what Reconcile would mend. It holds the bridge alone meanwhile, since what is
// half made is not broken; the error names who keeps it waiting.
func (h *Host) Broken(ctx context.Context) ([]string, error) {
	if s, err := h.known(); err != nil || len(s.Bridges) == 0 {
		return nil, err // nor is a lock made on a host that has nothing of ours
	}
	ctx, cancel := context.WithTimeout(ctx, lookWait)
	defer cancel()
	unlock, err := h.lockExclusive(ctx, "look for what is broken")
	if err != nil {
		return nil, err
	}
	defer unlock()
	s, err := h.known()
	if err != nil {
		return nil, err
	}
	var wrong []string
	var standing []Bridge
	for _, name := range s.names() {
		m, err := h.newMove(name, s.Bridges[name])
		if err != nil {
			return wrong, err
		}
		b, err := m.asBridge()
		if err != nil {
			return wrong, err
		}
		standing = append(standing, b)
		texts, err := m.broken(b)
		wrong = append(wrong, texts...)
		if err != nil {
			return wrong, err
		}
	}
	if len(standing) == 0 {
		return wrong, nil
	}
	more, err := h.brokenRules(standing)
	return append(wrong, more...), err
}

// broken names what is wrong with one bridge, its NIC and its endpoints.
func (m *move) broken(want Bridge) (wrong []string, err error) {
	say := func(is bool, format string, args ...any) {
		if is {
			wrong = append(wrong, fmt.Sprintf(format, args...))
		}
	}
	if m.bridge.index == 0 {
		return []string{m.name + " is gone"}, nil
	}
	br, err := netlink.LinkByIndex(m.bridge.index)
	if err != nil {
		return nil, err
	}
	nic, err := netlink.LinkByIndex(m.nic.index)
	if err != nil {
		return nil, err
	}
	a, n := br.Attrs(), nic.Attrs()
	say(m.st.Phase == moving, "the making of %s is not finished", m.name)
	say(m.st.Phase == leaving, "the removal of %s is not finished", m.name)
	say(n.MasterIndex != a.Index, "%s is not in %s", m.nic.name, m.name)
	say(a.HardwareAddr.String() != want.MAC.String(), "%s has the MAC %s and not its NIC's", m.name, a.HardwareAddr)
	say(a.MTU != want.MTU, "%s has an MTU of %d bytes and not of %d", m.name, a.MTU, want.MTU)
	say(a.Flags&net.FlagUp == 0, "%s is down", m.name)
	say(n.Flags&net.FlagUp == 0, "%s is down", m.nic.name)
	lacks, _, err := m.lacks()
	if err != nil {
		return wrong, err
	}
	for _, text := range lacks.texts() {
		say(true, "%s lacks its %s", m.name, text)
	}
	for _, text := range m.held.texts() {
		say(true, "%s holds %s beside %s", m.nic.name, text, m.name)
	}
	if pinned, err := fabricPinned(m.nic, m.bridge); err != nil {
		return wrong, err
	} else if !pinned {
		say(true, "the forwarding entry of the fabric on %s is gone", m.nic.name)
	}
	for _, s := range sysctlsOf(m.name) {
		is, err := os.ReadFile(filepath.Join(m.h.cfg.Sysctl, s.name))
		say(err == nil && strings.TrimSpace(string(is)) != s.value, "%s is not %s", s.name, s.value)
	}
	if _, bad := m.h.lookAtPorts(want, true); bad != nil {
		wrong = append(wrong, strings.Split(bad.Error(), "\n")...)
	}
	return wrong, nil
}

// brokenRules names what is wrong with the nft tables and iptables.
func (h *Host) brokenRules(standing []Bridge) (wrong []string, err error) {
	last := standing[len(standing)-1]
	in, err := h.tableInput(last)
	if err != nil {
		return nil, err
	}
	in.bridges = append(in.bridges, last)
	wants := []*tableState{in.table()}
	if len(in.ports) > 0 {
		wants = append(wants, in.published())
	}
	for _, want := range wants {
		have, err := readTable(want.table)
		if err != nil {
			return wrong, err
		}
		if len(have.chains) == 0 {
			wrong = append(wrong, fmt.Sprintf("the nft table %s is gone", want.table.Name))
		} else if !have.same(want) {
			wrong = append(wrong, fmt.Sprintf("the nft table %s is not as it should be", want.table.Name))
		}
	}
	all, err := h.backends(standing)
	if err != nil {
		return wrong, err
	}
	for _, b := range all {
		add, del, err := b.wrong()
		if err != nil {
			return wrong, err
		}
		for _, r := range add {
			wrong = append(wrong, fmt.Sprintf("iptables-%s lacks the rule %s", b.name, r.comment))
		}
		for _, r := range del {
			wrong = append(wrong, fmt.Sprintf("iptables-%s has the rule %s that is nobody's", b.name, r.comment))
		}
	}
	return wrong, nil
}
