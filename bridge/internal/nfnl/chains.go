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

// Chain is a chain on the forward hook.
type Chain struct {
	Family byte // unix.NFPROTO_IPV4 or unix.NFPROTO_INET
	Table  string
	Name   string
	Drops  bool // its policy
}

// Rule is what a rule does to the packets that meet its conditions.
type Rule struct {
	Handle  uint64
	Always  bool // it has no condition
	Verdict Verdict
	Target  string // chain of a jump or a goto
	Comment string
}

// Verdict is what becomes of a packet.
type Verdict int

// The verdicts.
const (
	Continue Verdict = iota // with the next rule
	Accept
	Drop // or reject
	Return
	Jump
	Goto
)

var verdicts = map[int32]Verdict{nfDrop: Drop, nfAccept: Accept, nftJump: Jump, nftGoto: Goto, nftReturn: Return}

// ReadForwardChains lists the base chains that IPv4 packets pass when they are forwarded. The kernel lists all chains, which
// costs about a microsecond for each, and no rules.
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

// ReadRules lists the rules of one chain.
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
			r.Comment, _ = userdata.GetString(v, userdata.TypeComment)
		case unix.NFTA_RULE_EXPRESSIONS:
			for _, elem := range nested(v) {
				r.addExpression(elem)
			}
		}
	}
	return r
}

// addExpression adds what one expression does. Any that it does not know is a condition.
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
	case "immediate": // of a verdict, or of a value that an expression behind it takes
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

// listObjects lists objects of nf_tables. A kernel without nf_tables, and a chain that is gone, have none.
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
