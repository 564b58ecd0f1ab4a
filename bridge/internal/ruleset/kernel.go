// Copyright (c) The azure-vnet authors. MIT licence.

package ruleset

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/nfnl"
)

// Sync makes the kernel's tables what c asks for, and returns the names of those that it changed. Each table
// changes in one transaction, so no packet sees half of a change. If the chains and rules of a table are right,
// only elements that differ are changed.
func (c Config) Sync() (changed []string, err error) {
	wanted := c.tables()
	for _, t := range wanted {
		did, err := t.writeTable()
		if did {
			changed = append(changed, "the nft table "+tableTitle(t.nft))
		}
		if err != nil {
			return changed, fmt.Errorf("write the nft table %s: %w", tableTitle(t.nft), err)
		}
	}
	for _, is := range allTables() {
		if slices.ContainsFunc(wanted, func(t *table) bool { return t.nft == is }) {
			continue
		}
		did, err := deleteTable(is)
		if did {
			changed = append(changed, "the nft table "+tableTitle(is))
		}
		if err != nil {
			return changed, err
		}
	}
	return changed, nil
}

// Differences returns a sentence for each table that is not what c asks for. It changes nothing.
func (c Config) Differences() ([]string, error) {
	var out []string
	wanted := c.tables()
	for _, want := range wanted {
		have, err := readTable(want.nft)
		switch {
		case err != nil:
			return out, err
		case len(have.chains) == 0:
			out = append(out, fmt.Sprintf("the nft table %s is gone", tableTitle(want.nft)))
		case !have.sameAs(want):
			out = append(out, fmt.Sprintf("the nft table %s is not as it should be", tableTitle(want.nft)))
		}
	}
	for _, is := range allTables() {
		if slices.ContainsFunc(wanted, func(t *table) bool { return t.nft == is }) {
			continue
		}
		all, err := listTables(is.Family)
		if err != nil {
			return out, err
		}
		if slices.Contains(all, is.Name) {
			out = append(out, fmt.Sprintf("the nft table %s is not needed", tableTitle(is)))
		}
	}
	return out, nil
}

// DeleteTables deletes all three tables. If there are none, that is success.
func DeleteTables() error {
	var errs []error
	for _, t := range slices.Backward(allTables()) {
		_, err := deleteTable(t)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func deleteTable(is *nftables.Table) (did bool, err error) {
	all, err := listTables(is.Family)
	if err != nil || !slices.Contains(all, is.Name) {
		return false, err
	}
	c, err := openConn()
	if err != nil {
		return false, err
	}
	c.DelTable(is)
	if err := c.Flush(); err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, fmt.Errorf("delete the nft table %s: %w", tableTitle(is), err)
	}
	return true, nil
}

// listTables returns the names of the tables of a family. A kernel that does not know the family has none.
func listTables(family nftables.TableFamily) ([]string, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, explainMissingModule(err)
	}
	all, err := c.ListTablesOfFamily(family)
	if err != nil {
		return nil, explainMissingModule(err)
	}
	var names []string
	for _, t := range all {
		names = append(names, t.Name)
	}
	return names, nil
}

// OptionalTable is a table beside the ip table that only some endpoints need.
type OptionalTable int

const (
	ForBridges     OptionalTable = iota // the table of family bridge
	ForTransparent                      // the table of family arp, and a chain of the ip table
)

// TablesExist reports whether the kernel has the ip table with the chain of that policy, and the other tables
// asked for. Then an endpoint of the policy can be added by its elements alone. It does not check the rules.
func TablesExist(n Policy, parts ...OptionalTable) (bool, error) {
	first := "postrouting"
	if n.SNAT {
		first = snatChain(n.ID)
	}
	ok, err := nfnl.ChainExists(byte(ipTable.Family), Name, first)
	for _, part := range parts {
		if !ok || err != nil {
			break
		}
		if part == ForBridges {
			ok, err = nfnl.ChainExists(byte(bridgeTable.Family), Name, "prerouting")
		} else {
			ok, err = nfnl.ChainExists(byte(ipTable.Family), Name, "prerouting") // this chain is written after the arp table, so that table exists too
		}
	}
	return ok, err
}

func tableTitle(t *nftables.Table) string {
	return map[nftables.TableFamily]string{
		nftables.TableFamilyBridge: "bridge ", nftables.TableFamilyARP: "arp ", nftables.TableFamilyIPv4: "ip ",
	}[t.Family] + t.Name
}

// elemsPerMessage keeps the list of elements in a message below 64 KiB, the most that the length of a netlink
// attribute can say. An element takes at most about 150 bytes.
const elemsPerMessage = 250

// openConn opens a connection for one transaction of any size. A whole table is sent as one datagram, and the
// kernel acknowledges each message in it; both need large buffers.
func openConn() (*nftables.Conn, error) {
	return nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error {
		_ = c.SetWriteBuffer(4 << 20)
		_ = c.SetReadBuffer(4 << 20)
		return nil
	}))
}

// writeTable makes the kernel's table t, and reports whether it changed anything.
func (t *table) writeTable() (changed bool, err error) {
	have, err := readTable(t.nft)
	if err != nil {
		return false, err
	}
	if !have.hasRulesOf(t) {
		return true, t.replaceTable()
	}
	c, err := openConn()
	if err != nil {
		return false, err
	}
	for name, s := range t.sets {
		if maps.Equal(s.elems, have.sets[name].elems) {
			continue
		}
		changed = true
		if err := s.bufferChange(c, have.sets[name].elems); err != nil {
			return false, err
		}
	}
	if !changed {
		return false, nil
	}
	if c.Flush() != nil {
		// Another release may have made a set with the same name and another type.
		return true, t.replaceTable()
	}
	return true, nil
}

// replaceTable replaces the kernel's table by t, whether there is one or not.
func (t *table) replaceTable() error {
	c, err := openConn()
	if err != nil {
		return explainMissingModule(err)
	}
	c.AddTable(t.nft) // to delete a table that does not exist would be an error
	c.DelTable(t.nft)
	c.AddTable(t.nft)
	for _, ch := range t.chains {
		c.AddChain(ch.nftChain(t.nft))
	}
	for i, name := range slices.Sorted(maps.Keys(t.sets)) {
		set := t.sets[name].nftSet()
		set.ID = uint32(i + 1) // without an id, the library counts in a global variable without a lock
		if err := c.AddSet(set, nil); err != nil {
			return err
		}
	}
	for _, ch := range t.chains {
		for _, r := range ch.rules {
			c.AddRule(&nftables.Rule{Table: t.nft, Chain: ch.nftChain(t.nft), Exprs: r})
		}
	}
	for _, s := range t.sets {
		if err := s.bufferChange(c, nil); err != nil {
			return err
		}
	}
	return explainMissingModule(c.Flush())
}

// explainMissingModule adds the remedy to the errors of a kernel that lacks a part which the tables need.
func explainMissingModule(err error) error {
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("%w: the kernel lacks nf_tables or one of its parts: load the modules nf_tables, nft_nat, nft_masq, nft_fib_ipv4 and nft_meta_bridge, or install the kernel package that has them", err)
	}
	return err
}

// bufferChange puts into c's buffer what turns the elements have into those of s.
func (s *set) bufferChange(c *nftables.Conn, have map[elemKey]string) error {
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
	if s.interval && len(have) > 0 { // while intervals change one by one, two may overlap; so all are replaced
		c.FlushSet(s.nftSet())
		del = nil
	}
	for part := range slices.Chunk(del, elemsPerMessage) {
		if err := c.SetDeleteElements(s.nftSet(), part); err != nil {
			return err
		}
	}
	// The elements are sorted. The end of an interval comes before the start of an interval that follows at
	// once. In the other order, the kernel would see the two overlap.
	slices.SortFunc(add, func(a, b nftables.SetElement) int {
		order := slices.Compare(a.Key, b.Key)
		if order == 0 && a.IntervalEnd {
			order = -1
		}
		return order
	})
	for part := range slices.Chunk(add, elemsPerMessage) {
		if err := c.SetAddElements(s.nftSet(), part); err != nil {
			return err
		}
	}
	return nil
}

func (s *set) nftSet() *nftables.Set {
	set := &nftables.Set{Table: s.table, Name: s.name, KeyType: s.key, DataType: s.data,
		IsMap: s.data.Name != "", Interval: s.interval}
	if s.key.Name == nftables.TypeIFName.Name || s.key.Name == nftables.TypeDevGroup.Name {
		set.KeyByteOrder = binaryutil.NativeEndian // without it, nft prints another name or number
	}
	return set
}

func (c *chain) nftChain(t *nftables.Table) *nftables.Chain {
	ch := &nftables.Chain{Table: t, Name: c.name}
	if c.hook != nil {
		ch.Type, ch.Hooknum, ch.Priority = c.kind, c.hook, c.prio
	}
	return ch
}
