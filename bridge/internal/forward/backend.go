// Copyright (c) The azure-vnet authors. MIT licence.

package forward

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/coreos/go-iptables/iptables"
	"github.com/mattn/go-shellwords"
)

// backend is one kind of iptables: nft or legacy.
type backend struct {
	name     string
	iptables *iptables.IPTables
}

// iptablesState is what we need to know of the filter table.
type iptablesState struct {
	forward     []string // rules of FORWARD, as iptables -S prints them
	finalRule   int      // index of the first rule of FORWARD that ends the chain for every packet; len(forward) if none does
	hasOurChain bool     // our chain exists
	accepts     []string // rules of our chain
}

func (b *backend) readState() (s iptablesState, err error) {
	if s.forward, err = b.listRules(forwardChain); err != nil {
		return s, err
	}
	if s.hasOurChain, err = b.iptables.ChainExists(table, ourChain); err != nil {
		return s, fmt.Errorf("look for the chain %s: %w", ourChain, err)
	}
	if s.hasOurChain {
		if s.accepts, err = b.listRules(ourChain); err != nil {
			return s, err
		}
	}
	for s.finalRule = range s.forward {
		ends, err := b.endsChain(s.forward[s.finalRule])
		if err != nil {
			return s, err
		}
		if ends {
			return s, nil
		}
	}
	s.finalRule = len(s.forward)
	return s, nil
}

// listRules lists the rules of a chain. It leaves out the lines that make the chain and set its policy.
func (b *backend) listRules(chain string) ([]string, error) {
	all, err := b.iptables.List(table, chain)
	if err != nil {
		return nil, fmt.Errorf("read the chain %s: %w", chain, err)
	}
	return slices.DeleteFunc(all, func(r string) bool { return !strings.HasPrefix(r, "-A ") }), nil
}

// unconditionalRule matches a rule without any condition, and captures its target. ruleTarget captures the
// target of any rule. They are compiled at their first use, since each CNI call is a process and few calls read rules.
var (
	unconditionalRule = sync.OnceValue(func() *regexp.Regexp {
		return regexp.MustCompile(`^-A \S+(?: -m comment --comment (?:"(?:[^"\\]|\\.)*"|\S+))? -[jg] (\S+)`)
	})
	ruleTarget = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^-A .* -[jg] ([A-Z]+)(?: |$)`) })
)

// losslessTargets are the targets that lose no packet. No chain of such a name is read: nft can make one, and
// iptables would be started once for each path through such chains.
var losslessTargets = []string{"ACCEPT", "LOG", "NFLOG", "ULOG"}

// endsChain reports whether a rule stops every packet that no earlier rule has accepted: it drops or rejects
// all, or leads all to a chain that does.
func (b *backend) endsChain(rule string) (bool, error) {
	m := unconditionalRule().FindStringSubmatch(rule)
	if m == nil || m[1] == ourChain {
		return false, nil
	}
	return b.stopsAll(m[1], maxDepth)
}

// maxDepth bounds how many chains a jump is followed through.
const maxDepth = 8

// stopsAll reports whether a target drops or rejects every packet. A chain does if one of its rules does so
// without condition, and the rules before only accept or log packets. Such rules lose nothing if our accepts
// come first. A chain that drops or returns some packets earlier is somebody's policy, and our accepts stay
// behind it.
func (b *backend) stopsAll(target string, depth int) (bool, error) {
	switch target {
	case "DROP", "REJECT":
		return true, nil
	case "RETURN":
		return false, nil
	}
	if depth == 0 || slices.Contains(losslessTargets, target) {
		return false, nil
	}
	inside, err := b.listRules(target)
	var failed *iptables.Error
	if errors.As(err, &failed) && failed.ExitStatus() == 1 {
		return false, nil // the target is no chain but an extension such as MARK
	}
	if err != nil {
		return false, err
	}
	for _, rule := range inside {
		if m := unconditionalRule().FindStringSubmatch(rule); m != nil {
			if stops, err := b.stopsAll(m[1], depth-1); err != nil || stops {
				return stops, err
			}
		}
		m := ruleTarget().FindStringSubmatch(rule + " ")
		if m == nil || !slices.Contains(losslessTargets, m[1]) {
			return false, nil
		}
	}
	return false, nil
}

func ruleText(chain string, rule []string) string {
	return "-A " + chain + " " + strings.Join(rule, " ")
}

// jumpIndexes returns the indexes of our jump in FORWARD, counted from 0.
func (s iptablesState) jumpIndexes() (indexes []int) {
	for i, r := range s.forward {
		if r == ruleText(forwardChain, jump) {
			indexes = append(indexes, i)
		}
	}
	return indexes
}

// jumpIsInPlace reports whether FORWARD has our jump once, directly before the final rule. Then no rule of
// others that has an effect is behind it.
func (s iptablesState) jumpIsInPlace() bool {
	indexes := s.jumpIndexes()
	return len(indexes) == 1 && indexes[0] == s.finalRule-1
}

func (s iptablesState) differences(c Config) (out []string) {
	if !s.jumpIsInPlace() {
		out = append(out, fmt.Sprintf("the jump to %s is not the last rule of %s before a final drop or reject", ourChain, forwardChain))
	}
	want := map[string]bool{}
	for _, r := range c.accepts() {
		want[ruleText(ourChain, r)] = true
	}
	for _, r := range s.accepts {
		if !want[r] {
			out = append(out, fmt.Sprintf("the rule %q is not needed", r))
		}
		delete(want, r)
	}
	for r := range want {
		out = append(out, fmt.Sprintf("the rule %q is missing", r))
	}
	slices.Sort(out)
	return out
}

// syncRules adds rules before it deletes others, so that packets always find a rule that accepts them.
func (b *backend) syncRules(c Config) (mended []string, err error) {
	have, err := b.readState()
	if err != nil {
		return nil, c.checkUnreadable(err)
	}
	mended = have.differences(c)
	if len(mended) == 0 {
		return nil, nil
	}
	if !have.hasOurChain {
		if err := b.iptables.NewChain(table, ourChain); err != nil {
			return nil, fmt.Errorf("make the chain %s: %w", ourChain, err)
		}
	}
	want := c.accepts()
	for _, r := range want {
		if err := b.iptables.AppendUnique(table, ourChain, r...); err != nil {
			return nil, fmt.Errorf("add %q: %w", ruleText(ourChain, r), err)
		}
	}
	for _, r := range have.accepts {
		if slices.ContainsFunc(want, func(w []string) bool { return ruleText(ourChain, w) == r }) {
			continue
		}
		words, err := shellwords.Parse(r) // iptables -S quotes words as a shell does
		if err == nil {
			err = b.iptables.DeleteIfExists(table, ourChain, words[2:]...)
		}
		if err != nil {
			return nil, fmt.Errorf("delete %q: %w", r, err)
		}
	}
	if have.jumpIsInPlace() {
		return mended, nil
	}
	return mended, b.placeJump(have)
}

// placeJump puts the jump into its place, and deletes the jumps that are elsewhere.
//
// It deletes by the rule's words and never by its number: others insert rules meanwhile, and then the number
// would be that of a rule of theirs. Of equal rules, iptables deletes the first. So an old jump before the new
// place is deleted after the new one was added, and packets always find a jump. An old jump behind the new
// place has no effect. It is deleted before the new one is added, since the new one would be the first of the
// two and be deleted instead.
func (b *backend) placeJump(have iptablesState) (err error) {
	drop := func(n int) error {
		for range n {
			if err := b.iptables.DeleteIfExists(table, forwardChain, jump...); err != nil {
				return fmt.Errorf("delete the jump to %s that is out of place: %w", ourChain, err)
			}
		}
		return nil
	}
	old := have.jumpIndexes()
	if len(old) > 0 && old[len(old)-1] >= have.finalRule {
		if err := drop(len(old)); err != nil {
			return err
		}
		if have, err = b.readState(); err != nil {
			return err
		}
		old = have.jumpIndexes()
	}
	if err := b.iptables.Insert(table, forwardChain, have.finalRule+1, jump...); err != nil {
		return fmt.Errorf("add the jump to %s: %w", ourChain, err)
	}
	return drop(len(old))
}

func (b *backend) removeAll() error {
	if ok, err := b.iptables.ChainExists(table, ourChain); err != nil || !ok {
		return err
	}
	for {
		there, err := b.iptables.Exists(table, forwardChain, jump...)
		if err == nil && !there {
			break
		}
		if err == nil {
			err = b.iptables.Delete(table, forwardChain, jump...)
		}
		if err != nil {
			return fmt.Errorf("delete the jump to %s: %w", ourChain, err)
		}
	}
	if err := b.iptables.ClearAndDeleteChain(table, ourChain); err != nil {
		return fmt.Errorf("delete the chain %s: %w", ourChain, err)
	}
	return nil
}
