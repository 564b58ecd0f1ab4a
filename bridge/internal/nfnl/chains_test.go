// Copyright (c) The azure-vnet authors. MIT licence.

package nfnl

import (
	"os"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"azurevnet/internal/vnetsim"
)

// The kernel keeps with a rule whatever its maker likes. Only nft's comment is one.
func TestUserDataOfOthers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make network namespaces")
	}
	err := vnetsim.InNewNamespace(func() {
		c, err := nftables.New()
		if err != nil {
			t.Error(err)
			return
		}
		table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "others"})
		chain := c.AddChain(&nftables.Chain{Table: table, Name: "forward", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter})
		want := []string{"", "", "", "azure-vnet"}
		for _, data := range [][]byte{[]byte("a-rule-of-ours"), {0}, {0, 200, 'x'}, userdata.AppendString([]byte{9, 1, 'x'}, userdata.TypeComment, "azure-vnet")} {
			c.AddRule(&nftables.Rule{Table: table, Chain: chain, UserData: data, Exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}})
		}
		if err := c.Flush(); err != nil {
			t.Error(err)
			return
		}
		rules, err := ReadRules(unix.NFPROTO_INET, "others", "forward")
		if err != nil || len(rules) != len(want) {
			t.Errorf("%d rules: %v", len(rules), err)
			return
		}
		for i, r := range rules {
			if r.Comment != want[i] || r.Verdict != Accept || !r.Always {
				t.Errorf("rule %d is %+v", i, r)
			}
		}
	})
	if err != nil {
		t.Error(err)
	}
}
