// Copyright (c) The azure-vnet authors. MIT licence.

package nfnl

import (
	"encoding/binary"
	"testing"

	"github.com/google/nftables/userdata"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// message is a rule without conditions, as the kernel tells it.
func message(r Rule) []byte {
	attr := func(kind int, value []byte) []byte { return nl.NewRtAttr(kind, value).Serialize() }
	code := int32(-1) // NFT_CONTINUE
	for number, v := range verdicts {
		if v == r.Verdict {
			code = number
		}
	}
	verdict := append(attr(unix.NFTA_VERDICT_CODE, binary.BigEndian.AppendUint32(nil, uint32(code))), attr(unix.NFTA_VERDICT_CHAIN, nl.ZeroTerminated(r.Target))...)
	data := attr(unix.NLA_F_NESTED|unix.NFTA_IMMEDIATE_DATA, attr(unix.NLA_F_NESTED|unix.NFTA_DATA_VERDICT, verdict))
	expression := append(attr(unix.NFTA_EXPR_NAME, nl.ZeroTerminated("immediate")), attr(unix.NLA_F_NESTED|unix.NFTA_EXPR_DATA, data)...)
	m := append(make([]byte, nl.SizeofNfgenmsg), attr(unix.NFTA_RULE_HANDLE, binary.BigEndian.AppendUint64(nil, r.Handle))...)
	m = append(m, attr(unix.NLA_F_NESTED|unix.NFTA_RULE_EXPRESSIONS, attr(unix.NLA_F_NESTED|unix.NFTA_LIST_ELEM, expression))...)
	return append(m, attr(unix.NFTA_RULE_USERDATA, userdata.AppendString(nil, userdata.TypeComment, r.Comment))...)
}

// FuzzRule reads any rule of others. It has one of the verdicts, it has a condition unless each of its expressions is
// known, and a rule without one is read again as the same. The corpus has rules that a kernel told.
func FuzzRule(f *testing.F) {
	f.Add([]byte{})
	f.Add(make([]byte, nl.SizeofNfgenmsg+2))
	f.Add(message(Rule{Handle: 7, Verdict: Jump, Target: "somewhere", Comment: "azure-vnet"}))
	f.Add(message(Rule{Verdict: Drop})[:60])
	f.Fuzz(func(t *testing.T, m []byte) {
		r := parseRule(m)
		if r.Verdict < Continue || r.Verdict > Goto || len(r.Target)+len(r.Comment) > len(m) {
			t.Errorf("%x is read as %+v", m, r)
		}
		if len(r.Comment) > 250 || len(r.Target) > 60000 {
			return // longer than a message can say
		}
		r.Always = true
		if again := parseRule(message(r)); again != r {
			t.Errorf("%+v is read again as %+v", r, again)
		}
	})
}
