// Copyright (c) The azure-vnet authors. MIT licence.

package ruleset

import (
	"maps"
	"reflect"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/nfnl"
)

// readTries bounds how often a reading is repeated.
const readTries = 20

// read reads the table from the kernel. A table that does not exist has no chains.
//
// The kernel lists a table in parts. If somebody commits a transaction between two parts, the list may lack something,
// even if the transaction changes another table. The kernel marks such a list, but the library hides the mark. So read
// repeats a reading until nobody committed a transaction during it. If somebody commits all the time, read takes a
// reading that equals the one before it.
func read(is *nftables.Table) (t *table, err error) {
	c, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return nil, noModule(err)
	}
	defer func() { _ = c.CloseLasting() }()
	var commits nfnl.Commits
	defer commits.Close()
	for range readTries {
		before, last := commits.Count(), t
		t, err = readParts(c, is)
		if commits.Count() == before || err == nil && last != nil && t.same(last) && last.same(t) {
			break
		}
	}
	return t, err
}

// readParts reads the table once.
func readParts(c *nftables.Conn, is *nftables.Table) (*table, error) {
	t := &table{is: is, sets: map[string]*set{}}
	chains, err := c.ListChainsOfTableFamily(is.Family)
	if err != nil {
		return nil, noModule(err)
	}
	for _, ch := range chains {
		if ch.Table.Name != is.Name {
			continue
		}
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
	if len(t.chains) == 0 {
		return t, nil
	}
	sets, err := c.GetSets(is)
	if err != nil {
		return nil, err
	}
	for _, s := range sets {
		s.Table = is
		elems, err := c.GetSetElements(s)
		if err != nil {
			return nil, err
		}
		ts := &set{table: is, name: s.Name, interval: s.Interval, elems: map[key]string{}}
		for _, e := range elems {
			ts.elems[key{string(e.Key), e.IntervalEnd}] = valueOf(s, e)
		}
		t.sets[s.Name] = ts
	}
	return t, nil
}

// valueOf spells an element's value as set.elems does. The kernel gives a verdict
// as nested attributes, which the library leaves as they are.
func valueOf(s *nftables.Set, e nftables.SetElement) string {
	if len(e.Val) == 0 || s.DataType.Name != "" { // the library leaves the name empty for verdicts
		return string(e.Val)
	}
	attrs, err := netlink.UnmarshalAttributes(e.Val)
	if err != nil {
		return ""
	}
	word, chain := "goto", ""
	for _, a := range attrs {
		switch a.Type {
		case unix.NFTA_VERDICT_CODE:
			if code := int32(binaryutil.BigEndian.Uint32(a.Data)); code == unix.NFT_JUMP {
				word = "jump"
			}
		case unix.NFTA_VERDICT_CHAIN:
			chain = string(a.Data[:len(a.Data)-1])
		}
	}
	return word + " " + chain
}

// same reports whether both tables are alike, down to the elements.
func (t *table) same(want *table) bool {
	if !t.sameRules(want) {
		return false
	}
	for name, s := range want.sets {
		if !maps.Equal(s.elems, t.sets[name].elems) {
			return false
		}
	}
	return true
}

// sameRules reports whether both tables have the same chains, rules and sets.
func (t *table) sameRules(want *table) bool {
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
