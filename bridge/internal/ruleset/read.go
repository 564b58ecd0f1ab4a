// Copyright (c) The azure-vnet authors. MIT licence.

package ruleset

import (
	"maps"
	"reflect"
	"slices"
	"time"

	"github.com/google/nftables"

	"azurevnet/bridge/internal/nfnl"
)

// readTable reads a table from the kernel. A table that does not exist has no chains.
func readTable(is *nftables.Table) (*table, error) {
	c, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return nil, explainMissingModule(err)
	}
	defer func() { _ = c.CloseLasting() }()
	t := &table{nft: is, sets: map[string]*set{}}
	tables, err := c.ListTablesOfFamily(is.Family)
	if err != nil {
		return nil, explainMissingModule(err)
	}
	i := slices.IndexFunc(tables, func(t *nftables.Table) bool { return t.Name == is.Name })
	if i < 0 {
		return t, nil
	}
	sets, err := c.GetSets(is)
	if err != nil {
		return nil, err
	}
	// The kernel counts objects and flowtables too (NFTA_TABLE_USE, nf_tables_api.c). The tables of azure-vnet have none.
	chains, err := readChains(c, is, int(tables[i].Use)-len(sets))
	if err != nil {
		return nil, err
	}
	for _, ch := range chains {
		rules, err := c.GetRules(is, ch)
		if err != nil {
			return nil, err
		}
		tc := &chain{name: ch.Name, kind: ch.Type, hook: ch.Hooknum, prio: ch.Priority}
		for _, r := range rules {
			tc.rules = append(tc.rules, r.Exprs)
		}
		t.chains = append(t.chains, tc)
	}
	for _, s := range sets {
		s.Table = is
		elems, err := c.GetSetElements(s)
		if err != nil {
			return nil, err
		}
		ts := &set{table: is, name: s.Name, interval: s.Interval, elems: map[elemKey]string{}}
		for _, e := range elems {
			ts.elems[elemKey{string(e.Key), e.IntervalEnd}] = valueOf(s, e)
		}
		t.sets[s.Name] = ts
	}
	return t, nil
}

// chainsTime bounds how long readChains repeats the list of chains.
const chainsTime = 2 * time.Second

// readChains lists the chains of the table, of which the kernel counts n.
//
// The kernel lists the chains of all tables of a family in one list, which it sends in parts. If somebody commits a
// transaction to another table between two parts, the list may lack chains of ours. The kernel marks such a list, but the
// library hides the mark. So readChains repeats the list until it has n chains, or nobody committed a transaction
// meanwhile. The lists of rules, sets and elements are of our table alone, which nobody changes without the bridge's lock.
func readChains(c *nftables.Conn, is *nftables.Table, n int) (own []*nftables.Chain, err error) {
	var commits nfnl.Commits
	defer commits.Close()
	for start := time.Now(); ; {
		before := commits.Count()
		all, err := c.ListChainsOfTableFamily(is.Family)
		own = slices.DeleteFunc(all, func(ch *nftables.Chain) bool { return ch.Table.Name != is.Name })
		if err == nil && len(own) == n || commits.Count() == before || time.Since(start) > chainsTime {
			return own, err
		}
	}
}

// sameAs reports whether both tables are the same, down to the elements.
func (t *table) sameAs(want *table) bool {
	if !t.hasRulesOf(want) {
		return false
	}
	for name, s := range want.sets {
		if !maps.Equal(s.elems, t.sets[name].elems) {
			return false
		}
	}
	return true
}

// hasRulesOf reports whether both tables have the same chains, rules and sets, whatever the elements are.
func (t *table) hasRulesOf(want *table) bool {
	if len(t.chains) != len(want.chains) || len(t.sets) != len(want.sets) {
		return false
	}
	for _, w := range want.chains {
		i := slices.IndexFunc(t.chains, func(c *chain) bool { return c.name == w.name })
		if i < 0 || !reflect.DeepEqual(t.chains[i], w) {
			return false
		}
	}
	for name, w := range want.sets {
		if s := t.sets[name]; s == nil || s.interval != w.interval {
			return false
		}
	}
	return true
}
