// Copyright (c) The azure-vnet authors. MIT licence.

package nfnl

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/nftables/userdata"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"azurevnet/internal/dump"
)

// Chain is a base chain on the forward hook.
type Chain struct {
	Family byte // unix.NFPROTO_IPV4 or unix.NFPROTO_INET
	Table  string
	Name   string
	Drops  bool // its policy is to drop what no rule decides on
}

// Rule is what a rule does to a packet that meets its conditions. Conditions themselves are not decoded.
type Rule struct {
	Handle  uint64
	Always  bool // the rule has no condition
	Verdict Verdict
	Target  string // the chain that a jump or a goto leads to
	Comment string
}

// Verdict is what a rule decides on a packet.
type Verdict int

// The verdicts.
const (
	Continue Verdict = iota // the next rule decides
	Accept
	Drop // a reject counts as one
	Return
	Jump
	Goto
)

var verdicts = map[int32]Verdict{nfDrop: Drop, nfAccept: Accept, nftJump: Jump, nftGoto: Goto, nftReturn: Return}

// ReadForwardChains lists the base chains that forwarded IPv4 packets pass. The kernel lists all chains for
// this, at about a microsecond each, but no rules.
func ReadForwardChains() (all []Chain, err error) {
	for _, family := range []byte{unix.NFPROTO_IPV4, unix.NFPROTO_INET} {
		messages, err := listObjects(unix.NFT_MSG_GETCHAIN, family)
		if err != nil {
			return nil, fmt.Errorf("list the nft chains: %w", err)
		}
		for _, m := range messages {
			c, hook := Chain{Family: family}, -1
			for kind, v := range attributesOf(m) {
				switch kind {
				case unix.NFTA_CHAIN_TABLE:
					c.Table = unix.ByteSliceToString(v)
				case unix.NFTA_CHAIN_NAME:
					c.Name = unix.ByteSliceToString(v)
				case unix.NFTA_CHAIN_POLICY:
					c.Drops = uint32Of(v) == nfDrop
				case unix.NFTA_CHAIN_HOOK:
					for kind, v := range nested(v) {
						if kind == unix.NFTA_HOOK_HOOKNUM {
							hook = int(uint32Of(v))
						}
					}
				}
			}
			if hook == nfInetForward {
				all = append(all, c)
			}
		}
	}
	return all, nil
}

// ReadRules lists the rules of one chain. If the chain does not exist, there are none.
func ReadRules(family byte, table, chain string) (all []Rule, err error) {
	messages, err := listObjects(unix.NFT_MSG_GETRULE, family, nl.NewRtAttr(unix.NFTA_RULE_TABLE, nl.ZeroTerminated(table)), nl.NewRtAttr(unix.NFTA_RULE_CHAIN, nl.ZeroTerminated(chain)))
	if err != nil {
		return nil, fmt.Errorf("list the rules of the nft chain %s of %s: %w", chain, table, err)
	}
	for _, m := range messages {
		all = append(all, parseRule(m))
	}
	return all, nil
}

func parseRule(m []byte) Rule {
	r := Rule{Always: true}
	for kind, v := range attributesOf(m) {
		switch kind {
		case unix.NFTA_RULE_HANDLE:
			if len(v) == 8 {
				r.Handle = binary.BigEndian.Uint64(v)
			}
		case unix.NFTA_RULE_USERDATA:
			r.Comment = commentOf(v)
		case unix.NFTA_RULE_EXPRESSIONS:
			for _, elem := range nested(v) {
				r.addExpression(elem)
			}
		}
	}
	return r
}

// commentOf returns the comment that nft keeps in a rule's user data, as type, length and text. Other programs
// keep what they like there, and the library panics on it.
func commentOf(data []byte) string {
	for len(data) >= 2 {
		size := 2 + int(data[1])
		if size > len(data) {
			break
		}
		if userdata.Type(data[0]) == userdata.TypeComment {
			return unix.ByteSliceToString(data[2:size])
		}
		data = data[size:]
	}
	return ""
}

// addExpression notes what one expression of the rule does. An expression that it does not know counts as a
// condition.
func (r *Rule) addExpression(elem []byte) {
	name, data := "", []byte(nil)
	for kind, v := range nested(elem) {
		switch kind {
		case unix.NFTA_EXPR_NAME:
			name = unix.ByteSliceToString(v)
		case unix.NFTA_EXPR_DATA:
			data = v
		}
	}
	switch name {
	case "counter", "log":
	case "reject":
		r.Verdict = Drop
	case "immediate": // it loads a verdict, or a value for a later expression
		for kind, v := range nested(data) {
			if kind != unix.NFTA_IMMEDIATE_DATA {
				continue
			}
			for kind, v := range nested(v) {
				if kind == unix.NFTA_DATA_VERDICT {
					r.addVerdict(v)
				}
			}
		}
	default:
		r.Always = false
	}
}

func (r *Rule) addVerdict(data []byte) {
	for kind, v := range nested(data) {
		switch kind {
		case unix.NFTA_VERDICT_CODE:
			r.Verdict = verdicts[int32(uint32Of(v))]
		case unix.NFTA_VERDICT_CHAIN:
			r.Target = unix.ByteSliceToString(v)
		}
	}
}

// listObjects lists objects of nf_tables. The attributes restrict the list. A kernel without nf_tables, and a
// chain that does not exist, have none.
func listObjects(kind int, family byte, which ...nl.NetlinkRequestData) ([][]byte, error) {
	all, err := dump.Whole(func() ([][]byte, error) {
		r := newRequest(kind, unix.NLM_F_DUMP, family)
		for _, w := range which {
			r.AddData(w)
		}
		return r.Execute(unix.NETLINK_NETFILTER, 0)
	})
	for _, none := range noneErrors {
		if errors.Is(err, none) {
			return nil, nil
		}
	}
	return all, err
}
