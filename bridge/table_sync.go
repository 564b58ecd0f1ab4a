// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"maps"
	"reflect"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// elemsPerMessage keeps a message's list of elements, of at most ~130 bytes
// each, under the 64 KiB that a netlink attribute's length can say.
const elemsPerMessage = 250

// dialTable speaks to nf_tables of the calling thread's namespace. Each use is
// one short connection: a lasting one would keep the namespace it was opened in.
func dialTable() (*nftables.Conn, error) {
	return nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error {
		// A whole table is one datagram, and each message of it is acknowledged.
		_ = c.SetWriteBuffer(4 << 20)
		_ = c.SetReadBuffer(4 << 20)
		return nil
	}))
}

// writeTable makes the kernel's table want, in one transaction, and reports
// whether it was something else. Only elements that differ are touched where
// chains and rules stand; else the table is replaced whole, which no packet sees
// half done.
func writeTable(want *tableState) (changed bool, err error) {
	have, err := readTable(want.table)
	if err != nil {
		return false, err
	}
	if !have.sameRules(want) {
		return true, replaceTable(want)
	}
	c, err := dialTable()
	if err != nil {
		return false, err
	}
	for i, s := range want.sets {
		if maps.Equal(s.elems, have.sets[i].elems) {
			continue
		}
		changed = true
		if err := s.change(c, have.sets[i].elems); err != nil {
			return false, err
		}
	}
	if !changed {
		return false, nil
	}
	if c.Flush() != nil {
		// A set of another release has our name and another type.
		return true, replaceTable(want)
	}
	return true, nil
}

// replaceTable puts want in the place of whatever table there is.
func replaceTable(want *tableState) error {
	c, err := dialTable()
	if err != nil {
		return err
	}
	c.AddTable(want.table) // to delete none is an error
	c.DelTable(want.table)
	c.AddTable(want.table)
	for _, ch := range want.chains {
		c.AddChain(ch.nft())
	}
	for i, s := range want.sets {
		set := s.nft()
		set.ID = uint32(i + 1) // else the library counts in a global, unguarded
		if err := c.AddSet(set, nil); err != nil {
			return err
		}
	}
	for _, ch := range want.chains {
		for _, r := range ch.rules {
			c.AddRule(&nftables.Rule{Table: want.table, Chain: ch.nft(), Exprs: r})
		}
	}
	for _, s := range want.sets {
		if err := s.change(c, nil); err != nil {
			return err
		}
	}
	return c.Flush()
}

// change buffers what turns the elements have into s's.
func (s *tableSet) change(c *nftables.Conn, have map[elemKey]string) error {
	var add, del []nftables.SetElement
	for k, v := range s.elems {
		if was, ok := have[k]; !ok || was != v || s.interval {
			add = append(add, s.element(k, v))
		}
	}
	for k, was := range have {
		if v, ok := s.elems[k]; !ok || was != v {
			del = append(del, s.element(k, was))
		}
	}
	if s.interval && len(have) > 0 { // intervals that change may overlap meanwhile
		c.FlushSet(s.nft())
		del = nil
	}
	for part := range slices.Chunk(del, elemsPerMessage) {
		if err := c.SetDeleteElements(s.nft(), part); err != nil {
			return err
		}
	}
	// In order, and an interval's end before the start of one that follows at
	// once: else the kernel sees them overlap.
	slices.SortFunc(add, func(a, b nftables.SetElement) int {
		order := slices.Compare(a.Key, b.Key)
		if order == 0 && a.IntervalEnd {
			order = -1
		}
		return order
	})
	for part := range slices.Chunk(add, elemsPerMessage) {
		if err := c.SetAddElements(s.nft(), part); err != nil {
			return err
		}
	}
	return nil
}

func (s *tableSet) element(k elemKey, v string) nftables.SetElement {
	e := nftables.SetElement{Key: []byte(k.bytes), IntervalEnd: k.end}
	switch {
	case k.end || s.data.Name == "":
	case s.data.Name != nftables.TypeVerdict.Name:
		e.Val = []byte(v)
	case v == "accept":
		e.VerdictData = &expr.Verdict{Kind: expr.VerdictAccept}
	default:
		e.VerdictData = &expr.Verdict{Kind: expr.VerdictGoto, Chain: v[len("goto "):]}
	}
	return e
}

func (s *tableSet) nft() *nftables.Set {
	set := &nftables.Set{Table: s.table, Name: s.name, KeyType: s.key, DataType: s.data,
		IsMap: s.data.Name != "", Interval: s.interval}
	if s.key.Name == nftables.TypeIFName.Name {
		set.KeyByteOrder = binaryutil.NativeEndian // or nft lists the name as empty
	}
	return set
}

func (c *tableChain) nft() *nftables.Chain {
	ch := &nftables.Chain{Table: c.table, Name: c.name}
	if c.hook != nil {
		ch.Type, ch.Hooknum, ch.Priority = c.kind, c.hook, c.prio
	}
	return ch
}

// readTable is the table as the kernel holds it; none is an empty one.
func readTable(table *nftables.Table) (*tableState, error) {
	c, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.CloseLasting() }()
	t := &tableState{table: table}
	chains, err := c.ListChainsOfTableFamily(table.Family)
	if err != nil {
		return nil, err
	}
	for _, ch := range chains {
		if ch.Table.Name != table.Name {
			continue
		}
		rules, err := c.GetRules(table, ch)
		if err != nil {
			return nil, err
		}
		tc := &tableChain{table: table, name: ch.Name, kind: ch.Type, hook: ch.Hooknum, prio: ch.Priority}
		for _, r := range rules {
			tc.rules = append(tc.rules, r.Exprs)
		}
		t.chains = append(t.chains, tc)
	}
	if len(t.chains) == 0 {
		return t, nil
	}
	sets, err := c.GetSets(table)
	if err != nil {
		return nil, err
	}
	for _, s := range sets {
		s.Table = table
		elems, err := c.GetSetElements(s)
		if err != nil {
			return nil, err
		}
		ts := &tableSet{table: table, name: s.Name, interval: s.Interval, elems: map[elemKey]string{}}
		for _, e := range elems {
			ts.elems[elemKey{string(e.Key), e.IntervalEnd}] = valueOf(s, e)
		}
		t.sets = append(t.sets, ts)
	}
	return t, nil
}

// valueOf spells an element's value as tableSet does. The kernel tells a verdict
// as nested attributes, which the library leaves as they are.
func valueOf(s *nftables.Set, e nftables.SetElement) string {
	if len(e.Val) == 0 || s.DataType.Name != "" { // which it leaves empty for verdicts
		return string(e.Val)
	}
	attrs, err := netlink.UnmarshalAttributes(e.Val)
	if err != nil {
		return ""
	}
	verdict := "accept"
	for _, a := range attrs {
		if a.Type == unix.NFTA_VERDICT_CHAIN {
			verdict = "goto " + string(a.Data[:len(a.Data)-1])
		}
	}
	return verdict
}

// same tells whether both tables are, down to the elements.
func (t *tableState) same(want *tableState) bool {
	if !t.sameRules(want) {
		return false
	}
	for i, s := range want.sets {
		if !maps.Equal(s.elems, t.sets[i].elems) {
			return false
		}
	}
	return true
}

// sameRules tells whether both tables have the same chains, rules and sets, and
// then puts t's in want's order.
func (t *tableState) sameRules(want *tableState) bool {
	if len(t.chains) != len(want.chains) || len(t.sets) != len(want.sets) {
		return false
	}
	for _, w := range want.chains {
		i := slices.IndexFunc(t.chains, func(c *tableChain) bool { return c.name == w.name })
		if i < 0 || !reflect.DeepEqual(t.chains[i], w) {
			return false
		}
	}
	ordered := make([]*tableSet, len(want.sets))
	for n, w := range want.sets {
		i := slices.IndexFunc(t.sets, func(s *tableSet) bool { return s.name == w.name && s.interval == w.interval })
		if i < 0 {
			return false
		}
		ordered[n] = t.sets[i]
	}
	t.sets = ordered
	return true
}

// elementsOf are an endpoint's elements, each in a set of its own.
func elementsOf(host string, a alias) []*tableSet {
	k := keysOf(host, a)
	of := func(name string, data nftables.SetDatatype, key elemKey, value string) *tableSet {
		return &tableSet{table: bridgeTable, name: name, data: data, elems: map[elemKey]string{key: value}}
	}
	last := of("src_ip6", nftables.SetDatatype{}, k.ip6, "")
	if a.internal() {
		last = of("inner_"+a.bridge, nftables.SetDatatype{}, elemKey{bytes: ipKey(a.addr.Addr())}, "")
	}
	return []*tableSet{
		of("ep4_"+a.bridge, nftables.TypeEtherAddr, elemKey{bytes: ipKey(a.addr.Addr())}, string(a.mac)),
		of("src_ip", nftables.TypeVerdict, k.src, "goto "+netChain(a.bridge, a.policy)),
		of("src_arp", nftables.TypeVerdict, k.arp, "goto "+arpChain(a)),
		last,
	}
}

// without is the set as it is when it has none of s's elements.
func (s *tableSet) without() *tableSet {
	return &tableSet{table: s.table, name: s.name, data: s.data}
}
