// Copyright (c) The azure-vnet authors. MIT licence.

// Package forward keeps azure-vnet's place in iptables' FORWARD chain: one jump to a chain of ours that accepts
// what containers need. Docker sets the policy of FORWARD to DROP, and some images end the chain with a REJECT.
// The jump is behind every rule of others that has an effect, so these rules keep their meaning. The package
// writes nothing else, and nothing at all on a host without iptables rules.
package forward

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"

	"github.com/coreos/go-iptables/iptables"
	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/nfnl"
)

const (
	table        = "filter"
	forwardChain = "FORWARD"
	ourChain     = "AZURE-VNET"
	ourComment   = "azure-vnet"
)

// Config says what the rules accept.
type Config struct {
	Links []string // our links, as iptables writes them: azure0, or azv+ for every link azv…
	Out   []string // other links that containers' packets may leave by: NICs, VPNs. No bridge, because its ports may be somebody's containers
}

// accepts returns the rules of our chain. To our links everything is accepted, because containers are reached
// as VMs are. From our links, packets are accepted to each link of Out by name.
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

// ErrUnreadable is in the error of Sync and Differences if FORWARD has rules that were written with nft, and
// iptables can neither read nor change them. The error's text has the nft commands with which a person accepts
// what Sync would accept. When these rules exist, there is no error.
var ErrUnreadable = errors.New("FORWARD has rules that iptables cannot read")

// checkUnreadable turns iptables' error for such a chain into ErrUnreadable. It is nil if FORWARD has as many
// rules with our comment as there are commands.
func (c Config) checkUnreadable(err error) error {
	if err == nil || !strings.Contains(err.Error(), "is incompatible, use 'nft' tool") {
		return err
	}
	rules, err := nfnl.ReadRules(unix.NFPROTO_IPV4, table, forwardChain)
	if err != nil {
		return err
	}
	// The commands insert at the top of the chain: which rule is final cannot be told without iptables.
	commands := c.nftCommands("insert rule ip " + table + " " + forwardChain)
	if countOurComments(rules) >= len(commands) {
		return nil
	}
	return fmt.Errorf("%w, so containers' packets pass only where others accept them. Accept them yourself: %s", ErrUnreadable, strings.Join(commands, "; "))
}

// countOurComments counts the rules that a person has made by our commands.
func countOurComments(rules []nfnl.Rule) (n int) {
	for _, r := range rules {
		if r.Comment == ourComment {
			n++
		}
	}
	return n
}

// nftCommands returns the accepts as commands for a person. place is the beginning of each: the chain, and
// where in it.
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
		all = append(all, command+fmt.Sprintf(" accept comment %q", ourComment))
	}
	return all
}

// jump is our one rule in FORWARD.
var jump = []string{"-m", "comment", "--comment", ourComment, "-j", ourChain}

// Sync makes the rules what c asks for, in each of the two kinds of iptables that the host uses. It returns a
// sentence for each rule that it changed.
func (c Config) Sync() (mended []string, err error) {
	return c.forEachBackend(func(b *backend) ([]string, error) { return b.syncRules(c) })
}

// Differences returns a sentence for each rule that Sync would change. It changes nothing.
func (c Config) Differences() ([]string, error) {
	return c.forEachBackend(func(b *backend) ([]string, error) {
		have, err := b.readState()
		if err != nil {
			return nil, c.checkUnreadable(err)
		}
		return have.differences(c), nil
	})
}

// PolicyDrops reports whether iptables-nft's FORWARD chain drops what no rule accepts. If the chain cannot be
// read, it is false.
func PolicyDrops() bool {
	c, err := nftables.New()
	if err != nil {
		return false
	}
	chain, err := c.ListChain(&nftables.Table{Name: table, Family: nftables.TableFamilyIPv4}, forwardChain)
	return err == nil && chain.Policy != nil && *chain.Policy == nftables.ChainPolicyDrop
}

// RemoveAll removes our jump and our chain. If there are none, that is success.
func RemoveAll() error {
	_, err := Config{}.forEachBackend(func(b *backend) ([]string, error) { return nil, b.removeAll() })
	return err
}

// forEachBackend calls do for both kinds of iptables, as far as the host uses them. The two do not see each
// other's rules: an ACCEPT in one does not undo a DROP in the other.
func (c Config) forEachBackend(do func(*backend) ([]string, error)) (all []string, err error) {
	var errs []error
	for name, used := range map[string]func() (bool, error){"nft": nftUsed, "legacy": legacyUsed} {
		is, err := used()
		if err == nil && is {
			b := &backend{name: name}
			var did []string
			if b.iptables, err = findProgram(name); err == nil {
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
func nftUsed() (bool, error) { return nfnl.ChainExists(unix.NFPROTO_IPV4, table, forwardChain) }

// legacyUsed reports whether legacy iptables has a filter table in this namespace. It reads a file of the
// kernel: to run the legacy program would create the table.
func legacyUsed() (bool, error) {
	names, err := os.ReadFile("/proc/thread-self/net/ip_tables_names")
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return slices.Contains(strings.Fields(string(names)), table), err
}

// findProgram finds the iptables program of that kind: by its own name, or as iptables.
func findProgram(kind string) (*iptables.IPTables, error) {
	for _, name := range []string{"iptables-" + kind, "iptables"} {
		path, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		run, err := iptables.New(iptables.Path(path), iptables.Timeout(2))
		if err != nil || name != "iptables" {
			return run, err
		}
		// Some distributions have one program, which is of either kind.
		said, err := exec.Command(path, "--version").Output()
		if is := strings.Contains(string(said), "nf_tables"); err == nil && is == (kind == "nft") {
			return run, nil
		}
	}
	return nil, fmt.Errorf("the host has rules of this kind and no program iptables-%s to add one: install the package iptables", kind)
}

// ConcernsEvent reports whether an event of nf_tables (NFNLGRP_NFTABLES) is about the table that has iptables-nft's
// FORWARD chain. Legacy iptables sends no event.
func ConcernsEvent(m syscall.NetlinkMessage) bool {
	family, name, ok := nfnl.EventTable(m)
	return ok && name == table && family == unix.NFPROTO_IPV4
}
