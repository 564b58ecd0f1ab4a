// Copyright (c) The azure-vnet authors. MIT licence.

// Package forward keeps azure-vnet's place in iptables' FORWARD chain: one jump to
// a chain of ours that accepts what containers need. Docker sets the policy of
// FORWARD to DROP, and some images end the chain with a REJECT. The jump stands
// behind every rule of others that has an effect, so that those rules keep their
// meaning. It writes nothing else, and nothing on a host without iptables rules.
package forward

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"

	"github.com/coreos/go-iptables/iptables"
	"github.com/google/nftables"
	"github.com/mattn/go-shellwords"
	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/nfnl"
)

const (
	table   = "filter"
	parent  = "FORWARD"
	ours    = "AZURE-VNET"
	comment = "azure-vnet"
)

// Config says what is to be forwarded.
type Config struct {
	Links []string // whose containers are ours, as iptables spells them: azure0, or azv+ for each azv…
	Out   []string // other links that containers' packets may leave by: NICs, VPNs. No bridge: its ports may be somebody's containers
}

// accepts are the rules of our chain. To our links everything is accepted, for
// containers are reached as VMs are. From our links the way out is accepted by name.
func (c Config) accepts() [][]string {
	var rules [][]string
	for _, in := range c.Links {
		rules = append(rules, []string{"-o", in, "-j", "ACCEPT"})
	}
	for _, in := range c.Links {
		for _, out := range c.Out {
			rules = append(rules, []string{"-i", in, "-o", out, "-j", "ACCEPT"})
		}
	}
	return rules
}

// ErrUnreadable is in the error of Sync and Differences for a FORWARD chain that was written
// with nft and that iptables can neither read nor change. The error's text has the commands
// that accept by hand what Sync would. After them there is no error.
var ErrUnreadable = errors.New("FORWARD has rules that iptables cannot read")

// checkUnreadable turns iptables' error about such a chain into ErrUnreadable, and into nil if
// the chain has as many rules with our comment as we ask for.
func (c Config) checkUnreadable(err error) error {
	if err == nil || !strings.Contains(err.Error(), "is incompatible, use 'nft' tool") {
		return err
	}
	rules, err := nfnl.Rules(unix.NFPROTO_IPV4, table, parent)
	if err != nil {
		return err
	}
	// They go to the top of the chain, for where its policy ends cannot be told.
	commands := c.nftCommands("insert rule ip " + table + " " + parent)
	if acceptedByHand(rules) >= len(commands) {
		return nil
	}
	return fmt.Errorf("%w, so containers' packets pass only where others accept them. Accept them yourself: %s", ErrUnreadable, strings.Join(commands, "; "))
}

// acceptedByHand counts the rules that a person made by our commands.
func acceptedByHand(rules []nfnl.Rule) (n int) {
	for _, r := range rules {
		if r.Comment == comment {
			n++
		}
	}
	return n
}

// nftCommands are the accepts as a person enters them; place says into which chain, and where in it.
func (c Config) nftCommands(place string) (all []string) {
	for _, rule := range c.accepts() {
		command := "nft " + place
		for i := 0; i+1 < len(rule); i += 2 {
			switch name := strings.Replace(rule[i+1], "+", "*", 1); rule[i] {
			case "-i":
				command += fmt.Sprintf(" iifname %q", name)
			case "-o":
				command += fmt.Sprintf(" oifname %q", name)
			}
		}
		all = append(all, command+fmt.Sprintf(" accept comment %q", comment))
	}
	return all
}

// jump is the one rule in FORWARD.
var jump = []string{"-m", "comment", "--comment", comment, "-j", ours}

// Sync makes the rules what c asks for, in each of the two kinds of iptables that
// the host uses, and names what was something else.
func (c Config) Sync() (mended []string, err error) {
	return c.each(func(b *backend) ([]string, error) { return b.sync(c) })
}

// Differences names what Sync would change.
func (c Config) Differences() ([]string, error) {
	return c.each(func(b *backend) ([]string, error) {
		have, err := b.read()
		if err != nil {
			return nil, c.checkUnreadable(err)
		}
		return have.differences(c), nil
	})
}

// PolicyDrops reports whether iptables-nft's FORWARD chain drops what no rule accepts. Where that cannot be read it
// is false.
func PolicyDrops() bool {
	c, err := nftables.New()
	if err != nil {
		return false
	}
	chain, err := c.ListChain(&nftables.Table{Name: table, Family: nftables.TableFamilyIPv4}, parent)
	return err == nil && chain.Policy != nil && *chain.Policy == nftables.ChainPolicyDrop
}

// Drop removes our jump and our chain. None is success.
func Drop() error {
	_, err := Config{}.each(func(b *backend) ([]string, error) { return nil, b.drop() })
	return err
}

// each does the same with both kinds of iptables, as far as they are used. They do
// not see each other's rules: an ACCEPT of one does not lift a DROP of the other.
func (c Config) each(do func(*backend) ([]string, error)) (all []string, err error) {
	var errs []error
	for name, used := range map[string]func() (bool, error){"nft": nftUsed, "legacy": legacyUsed} {
		is, err := used()
		if err == nil && is {
			b := &backend{name: name}
			var did []string
			if b.run, err = command(name); err == nil {
				did, err = do(b)
			}
			for _, d := range did {
				all = append(all, "iptables-"+name+": "+d)
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("iptables-%s: %w", name, err))
		}
	}
	slices.Sort(all)
	return all, errors.Join(errs...)
}

// nftUsed reports whether iptables-nft has a FORWARD chain.
func nftUsed() (bool, error) { return nfnl.ChainExists(unix.NFPROTO_IPV4, table, parent) }

// legacyUsed reports whether legacy iptables has a filter table in this namespace.
// To ask the legacy program would make one.
func legacyUsed() (bool, error) {
	names, err := os.ReadFile("/proc/thread-self/net/ip_tables_names")
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return slices.Contains(strings.Fields(string(names)), table), err
}

// command finds the program of that kind: by its own name, or as iptables.
func command(kind string) (*iptables.IPTables, error) {
	for _, name := range []string{"iptables-" + kind, "iptables"} {
		path, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		run, err := iptables.New(iptables.Path(path), iptables.Timeout(2))
		if err != nil || name != "iptables" {
			return run, err
		}
		// Some distributions have one program, of either kind.
		said, err := exec.Command(path, "--version").Output()
		if is := strings.Contains(string(said), "nf_tables"); err == nil && is == (kind == "nft") {
			return run, nil
		}
	}
	return nil, fmt.Errorf("the host has rules of this kind and no program iptables-%s to add one: install the package iptables", kind)
}

// backend is one kind of iptables.
type backend struct {
	name string
	run  *iptables.IPTables
}

// state is what lies in iptables.
type state struct {
	forward []string // rules of FORWARD, as iptables -S prints them
	final   int      // index of the first of them that ends the chain for every packet; else their number
	chained bool     // our chain exists
	accepts []string // its rules
}

func (b *backend) read() (s state, err error) {
	if s.forward, err = b.rules(parent); err != nil {
		return s, err
	}
	if s.chained, err = b.run.ChainExists(table, ours); err != nil {
		return s, fmt.Errorf("look for the chain %s: %w", ours, err)
	}
	if s.chained {
		if s.accepts, err = b.rules(ours); err != nil {
			return s, err
		}
	}
	for s.final = range s.forward {
		ends, err := b.ends(s.forward[s.final])
		if err != nil {
			return s, err
		}
		if ends {
			return s, nil
		}
	}
	s.final = len(s.forward)
	return s, nil
}

// rules lists a chain's rules without the line of its policy or its making.
func (b *backend) rules(chain string) ([]string, error) {
	all, err := b.run.List(table, chain)
	if err != nil {
		return nil, fmt.Errorf("read the chain %s: %w", chain, err)
	}
	return slices.DeleteFunc(all, func(r string) bool { return !strings.HasPrefix(r, "-A ") }), nil
}

// everything matches a rule without any condition, and onward the target of any rule.
var (
	everything = regexp.MustCompile(`^-A \S+(?: -m comment --comment (?:"(?:[^"\\]|\\.)*"|\S+))? -[jg] (\S+)`)
	onward     = regexp.MustCompile(`^-A .* -[jg] ([A-Z]+)(?: |$)`)
)

// ends reports whether a rule stops every packet that nobody has accepted: it drops or
// rejects all, or leads all to a chain that does.
func (b *backend) ends(rule string) (bool, error) {
	m := everything.FindStringSubmatch(rule)
	if m == nil || m[1] == ours {
		return false, nil
	}
	return b.stopsAll(m[1], maxDepth)
}

// maxDepth bounds how far a rule is followed from chain to chain.
const maxDepth = 8

// stopsAll reports whether a target drops or rejects every packet. A chain does if a rule
// without condition does, and the rules before it do no more than accept or note packets:
// those rules lose nothing when our accepts come first. A chain that drops or returns some
// packets earlier is a policy of somebody, and our accepts stay behind it.
func (b *backend) stopsAll(target string, depth int) (bool, error) {
	switch target {
	case "DROP", "REJECT":
		return true, nil
	case "ACCEPT", "RETURN":
		return false, nil
	}
	if depth == 0 {
		return false, nil
	}
	inside, err := b.rules(target)
	var failed *iptables.Error
	if errors.As(err, &failed) && failed.ExitStatus() == 1 {
		return false, nil // no chain, but an extension such as LOG
	}
	if err != nil {
		return false, err
	}
	for _, rule := range inside {
		if m := everything.FindStringSubmatch(rule); m != nil {
			if stops, err := b.stopsAll(m[1], depth-1); err != nil || stops {
				return stops, err
			}
		}
		m := onward.FindStringSubmatch(rule + " ")
		if m == nil || !slices.Contains([]string{"ACCEPT", "LOG", "NFLOG", "ULOG"}, m[1]) {
			return false, nil
		}
	}
	return false, nil
}

func printed(chain string, rule []string) string {
	return "-A " + chain + " " + strings.Join(rule, " ")
}

// jumps are the places of our jump in FORWARD, counted from 0.
func (s state) jumps() (at []int) {
	for i, r := range s.forward {
		if r == printed(parent, jump) {
			at = append(at, i)
		}
	}
	return at
}

// placed reports whether there is one jump, and no rule of others with an effect
// behind it.
func (s state) placed() bool {
	at := s.jumps()
	return len(at) == 1 && at[0] == s.final-1
}

func (s state) differences(c Config) (out []string) {
	if !s.placed() {
		out = append(out, fmt.Sprintf("the jump to %s is not the last rule of %s before a final drop or reject", ours, parent))
	}
	want := map[string]bool{}
	for _, r := range c.accepts() {
		want[printed(ours, r)] = true
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

// sync adds before it deletes.
func (b *backend) sync(c Config) (mended []string, err error) {
	have, err := b.read()
	if err != nil {
		return nil, c.checkUnreadable(err)
	}
	mended = have.differences(c)
	if len(mended) == 0 {
		return nil, nil
	}
	if !have.chained {
		if err := b.run.NewChain(table, ours); err != nil {
			return nil, fmt.Errorf("make the chain %s: %w", ours, err)
		}
	}
	want := c.accepts()
	for _, r := range want {
		if err := b.run.AppendUnique(table, ours, r...); err != nil {
			return nil, fmt.Errorf("add %q: %w", printed(ours, r), err)
		}
	}
	for _, r := range have.accepts {
		if slices.ContainsFunc(want, func(w []string) bool { return printed(ours, w) == r }) {
			continue
		}
		words, err := shellwords.Parse(r) // iptables -S quotes as a shell does
		if err == nil {
			err = b.run.DeleteIfExists(table, ours, words[2:]...)
		}
		if err != nil {
			return nil, fmt.Errorf("delete %q: %w", r, err)
		}
	}
	if have.placed() {
		return mended, nil
	}
	return mended, b.place(have)
}

// place puts the jump where it belongs, and deletes the ones that stand elsewhere. It deletes by the rule's words and
// never by its number: others insert rules meanwhile, and the number would be that of one of theirs. Of equal rules
// iptables deletes the first. So an old jump before the new place is deleted after the new one is there: packets always meet one. An old jump
// behind the new place has no effect, and is deleted before: else the new one would be taken for it.
func (b *backend) place(have state) (err error) {
	drop := func(n int) error {
		for range n {
			if err := b.run.DeleteIfExists(table, parent, jump...); err != nil {
				return fmt.Errorf("delete the jump to %s that is out of place: %w", ours, err)
			}
		}
		return nil
	}
	old := have.jumps()
	if len(old) > 0 && old[len(old)-1] >= have.final {
		if err := drop(len(old)); err != nil {
			return err
		}
		if have, err = b.read(); err != nil {
			return err
		}
		old = have.jumps()
	}
	if err := b.run.Insert(table, parent, have.final+1, jump...); err != nil {
		return fmt.Errorf("add the jump to %s: %w", ours, err)
	}
	return drop(len(old))
}

func (b *backend) drop() error {
	if ok, err := b.run.ChainExists(table, ours); err != nil || !ok {
		return err
	}
	for {
		there, err := b.run.Exists(table, parent, jump...)
		if err == nil && !there {
			break
		}
		if err == nil {
			err = b.run.Delete(table, parent, jump...)
		}
		if err != nil {
			return fmt.Errorf("delete the jump to %s: %w", ours, err)
		}
	}
	if err := b.run.ClearAndDeleteChain(table, ours); err != nil {
		return fmt.Errorf("delete the chain %s: %w", ours, err)
	}
	return nil
}
