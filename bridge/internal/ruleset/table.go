// Copyright (c) The azure-vnet authors. MIT licence.

package ruleset

import (
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// table is a table as it should be, or as the kernel has it.
type table struct {
	nft    *nftables.Table
	chains []*chain
	sets   map[string]*set
}

type chain struct {
	name  string
	kind  nftables.ChainType      // of a base chain
	hook  *nftables.ChainHook     // nil: no base chain; rules lead to it by goto or jump
	prio  *nftables.ChainPriority // of a base chain
	rules [][]expr.Any
}

type set struct {
	table    *nftables.Table
	name     string
	key      nftables.SetDatatype
	data     nftables.SetDatatype // type of the values; zero: a set, and no map
	interval bool
	elems    map[elemKey]string // the value is bytes, or a verdict as nft writes it, such as "goto snat_1b2c3d4e"
}

func (t *table) addBaseChain(name string, kind nftables.ChainType, hook *nftables.ChainHook, prio nftables.ChainPriority, rules ...[]expr.Any) {
	t.chains = append(t.chains, &chain{name, kind, hook, &prio, rules})
}

func (t *table) addChain(name string, rules ...[]expr.Any) {
	t.chains = append(t.chains, &chain{name: name, rules: rules})
}

func (t *table) addSet(name string, of nftables.SetDatatype) *set {
	return t.addMap(name, of, nftables.SetDatatype{})
}

func (t *table) addMap(name string, from, to nftables.SetDatatype) *set {
	if t.sets == nil {
		t.sets = map[string]*set{}
	}
	s := &set{table: t.nft, name: name, key: from, data: to, elems: map[elemKey]string{}}
	t.sets[name] = s
	return s
}

// addRanges adds the ranges to a set of intervals. A range that ends with the last IPv4 address has no end
// element.
func (s *set) addRanges(list []addrRange) {
	for _, sp := range list {
		s.elems[elemKey{bytes: numberKey(sp.first)}] = ""
		if sp.last < 1<<32-1 {
			s.elems[elemKey{bytes: numberKey(sp.last + 1), end: true}] = ""
		}
	}
}
