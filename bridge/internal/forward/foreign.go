// Copyright (c) The azure-vnet authors. MIT licence.

package forward

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/nfnl"
)

// DroppingChains returns a sentence for each nft chain of others on the forward hook that drops what its own
// rules do not accept. No accept in another chain undoes such a drop. The sentence has the nft commands with
// which a person accepts there what Sync accepts in iptables. A chain is left out when it has as many rules
// with our comment as there are commands.
func (c Config) DroppingChains() (all []string, err error) {
	if len(c.Links) == 0 {
		return nil, nil
	}
	chains, err := nfnl.ReadForwardChains()
	if err != nil {
		return nil, err
	}
	for _, chain := range chains {
		if chain.Table == table && chain.Name == forwardChain && chain.Family == unix.NFPROTO_IPV4 || chain.Table == "firewalld" {
			continue // Sync handles iptables' chain, and the package firewalld handles firewalld's
		}
		rules, err := nfnl.ReadRules(chain.Family, chain.Table, chain.Name)
		if err != nil {
			return nil, err
		}
		title := map[byte]string{unix.NFPROTO_IPV4: "ip ", unix.NFPROTO_INET: "inet "}[chain.Family] + chain.Table + " " + chain.Name
		place := "add rule " + title // at the end, behind all that the chain's owner decides
		last, fate, err := fateOf(chain, rules, maxDepth)
		switch {
		case err != nil:
			return nil, err
		case fate == nfnl.Drop:
			place = fmt.Sprintf("insert rule %s handle %d", title, last.Handle)
		case fate == nfnl.Accept || !chain.Drops:
			continue
		}
		commands := c.nftCommands(place)
		if countOurComments(rules) < len(commands) {
			all = append(all, fmt.Sprintf("the nft chain %s drops what none of its rules accepts, so containers' packets pass only where it accepts them. Accept them yourself, there and in the file that it is loaded from: %s", title, strings.Join(commands, "; ")))
		}
	}
	return all, nil
}

// fateOf finds the first rule that leaves no packet to the rules behind it, and returns what becomes of the
// packets: Accept, Drop, or Return if no rule decides.
func fateOf(chain nfnl.Chain, rules []nfnl.Rule, depth int) (last nfnl.Rule, fate nfnl.Verdict, err error) {
	for _, r := range rules {
		if !r.Always || r.Verdict == nfnl.Continue {
			continue
		}
		if r.Verdict != nfnl.Jump && r.Verdict != nfnl.Goto {
			return r, r.Verdict, nil
		}
		fate = nfnl.Return
		if depth > 0 {
			inside, err := nfnl.ReadRules(chain.Family, chain.Table, r.Target)
			if err != nil {
				return r, fate, err
			}
			if _, fate, err = fateOf(chain, inside, depth-1); err != nil {
				return r, fate, err
			}
		}
		if fate != nfnl.Return || r.Verdict == nfnl.Goto {
			return r, fate, nil
		}
	}
	return last, nfnl.Return, nil
}
