// Copyright (c) The azure-vnet authors. MIT licence.

package ruleset

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/google/nftables"
)

// Conn changes the elements of single endpoints in tables that exist. The zero value is ready for use.
//
// Close waits until the kernel has destroyed all that transactions of this namespace deleted, which takes 8 to
// 17 ms after a deletion (nft_rcv_nl_event in Linux). Meanwhile other transactions wait too. So close it last,
// and hold no lock: of 30 calls that delete at once, one then waits for all.
type Conn struct {
	nft *nftables.Conn
}

// Close closes the socket. It may wait: see Conn.
func (c *Conn) Close() {
	if c.nft != nil {
		_ = c.nft.CloseLasting()
		c.nft = nil
	}
}

// AddEndpoint adds the elements of an endpoint in one transaction. The tables must exist: see TablesExist. cfg needs no
// more than the endpoint's Policy.
func (c *Conn) AddEndpoint(cfg Config, e Endpoint) error {
	return c.addSets(e, cfg.elements(e))
}

// AddPorts adds only those elements that lead ports of the host to the endpoint.
func (c *Conn) AddPorts(e Endpoint) error { return c.addSets(e, e.portElements()) }

func (c *Conn) addSets(e Endpoint, all []*set) error {
	err := c.commitTransaction(func(nft *nftables.Conn) error {
		for _, s := range all {
			if err := s.bufferChange(nft, nil); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("add %s to the nft tables: %w", e.Addr, err)
	}
	return nil
}

// RemoveEndpoint removes the elements of an endpoint. If there are none, that is success.
func (c *Conn) RemoveEndpoint(cfg Config, e Endpoint) error {
	return c.removeElements(e, cfg.elements(e))
}

// RemovePorts removes only those elements that lead ports of the host to the endpoint. If there are none, that
// is success.
func (c *Conn) RemovePorts(e Endpoint) error { return c.removeElements(e, e.portElements()) }

func (c *Conn) removeElements(e Endpoint, all []*set) error {
	if c.removeSets(all...) == nil {
		return nil
	}
	for _, s := range all { // one missing element undoes the transaction, so each set has its own now
		if err := c.removeSets(s); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("take %s out of the set %s of the nft table %s: %w", e.Addr, s.name, tableTitle(s.table), err)
		}
	}
	return nil
}

func (c *Conn) removeSets(all ...*set) error {
	return c.commitTransaction(func(nft *nftables.Conn) error {
		for _, s := range all {
			none := &set{table: s.table, name: s.name, data: s.data}
			if err := none.bufferChange(nft, s.elems); err != nil {
				return err
			}
		}
		return nil
	})
}

// commitTransaction sends as one transaction what fill puts into the buffer.
func (c *Conn) commitTransaction(fill func(*nftables.Conn) error) (err error) {
	if c.nft == nil {
		if c.nft, err = nftables.New(nftables.AsLasting()); err != nil {
			return err
		}
	}
	if err = fill(c.nft); err == nil {
		err = c.nft.Flush()
	}
	if err != nil { // the socket may still have answers to the failed transaction
		c.Close()
	}
	return err
}

// Missing returns a sentence for each set that lacks an element of the endpoint.
func (c Config) Missing(e Endpoint) ([]string, error) {
	have := map[*nftables.Table]*table{}
	var out []string
	for _, want := range c.elements(e) {
		if have[want.table] == nil {
			t, err := readTable(want.table)
			if err != nil {
				return out, err
			}
			have[want.table] = t
		}
		s := have[want.table].sets[want.name]
		for k, v := range want.elems {
			if s == nil || !s.hasElement(k, v) {
				out = append(out, fmt.Sprintf("the set %s of the nft table %s lacks the element of %s", want.name, tableTitle(want.table), e.Addr))
				break
			}
		}
	}
	return out, nil
}

func (s *set) hasElement(k elemKey, value string) bool {
	is, ok := s.elems[k]
	return ok && is == value
}

// ReadPublished reads from the ip table which ports of the host lead to containers. The keys are the
// containers' addresses.
func ReadPublished() (map[netip.Addr][]Port, error) {
	t, err := readTable(ipTable)
	if err != nil {
		return nil, err
	}
	out := map[netip.Addr][]Port{}
	for _, name := range []string{"published_at", "published"} {
		s := t.sets[name]
		if s == nil {
			continue
		}
		for k, v := range s.elems {
			p, container, ok := parsePublished(k.bytes, v, name == "published_at")
			if !ok {
				continue
			}
			out[container] = append(out[container], p)
		}
	}
	for _, ports := range out {
		slices.SortFunc(ports, func(a, b Port) int {
			return slices.Compare([]uint16{a.Port, a.HostPort}, []uint16{b.Port, b.HostPort})
		})
	}
	return out, nil
}
