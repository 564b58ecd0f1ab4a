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

// Conn changes single endpoints in tables that stand. Its zero value is ready for
// use.
//
// Close waits until all that transactions of this namespace deleted is destroyed,
// 8 to 17 ms after a deletion (nft_rcv_nl_event in Linux), and keeps other
// transactions waiting meanwhile. So close it last, without any lock: of 30 calls
// that delete at once, one then waits for all.
type Conn struct {
	nft *nftables.Conn
}

// Close gives the socket back.
func (c *Conn) Close() {
	if c.nft != nil {
		_ = c.nft.CloseLasting()
		c.nft = nil
	}
}

// Add adds the elements of an endpoint of cfg in one transaction. The tables must
// stand: see Stands.
func (c *Conn) Add(cfg Config, e Endpoint) error {
	return c.addSets(e, cfg.elements(e))
}

// AddPorts adds no more than what leads the endpoint's ports of the host to it.
func (c *Conn) AddPorts(e Endpoint) error { return c.addSets(e, e.portElements()) }

func (c *Conn) addSets(e Endpoint, all []*set) error {
	err := c.commit(func(nft *nftables.Conn) error {
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

// Remove takes the elements of an endpoint of cfg out of the tables. None is
// success.
func (c *Conn) Remove(cfg Config, e Endpoint) error { return c.removeEndpoint(e, cfg.elements(e)) }

// RemovePorts takes out no more than what leads the endpoint's ports of the host to it. None is success.
func (c *Conn) RemovePorts(e Endpoint) error { return c.removeEndpoint(e, e.portElements()) }

func (c *Conn) removeEndpoint(e Endpoint, all []*set) error {
	if c.removeSets(all...) == nil {
		return nil
	}
	for _, s := range all { // one that is missing undoes the transaction: so one by one
		if err := c.removeSets(s); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("take %s out of the set %s of the nft table %s: %w", e.Addr, s.name, tableTitle(s.table), err)
		}
	}
	return nil
}

func (c *Conn) removeSets(all ...*set) error {
	return c.commit(func(nft *nftables.Conn) error {
		for _, s := range all {
			none := &set{table: s.table, name: s.name, data: s.data}
			if err := none.bufferChange(nft, s.elems); err != nil {
				return err
			}
		}
		return nil
	})
}

// commit sends what fill buffers as one transaction.
func (c *Conn) commit(fill func(*nftables.Conn) error) (err error) {
	if c.nft == nil {
		if c.nft, err = nftables.New(nftables.AsLasting()); err != nil {
			return err
		}
	}
	if err = fill(c.nft); err == nil {
		err = c.nft.Flush()
	}
	if err != nil { // more answers to what failed may be on their way
		c.Close()
	}
	return err
}

// Missing names the sets that lack an element of an endpoint of cfg.
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

// ReadPublished reads from the ip table which ports it leads to containers, by the
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
