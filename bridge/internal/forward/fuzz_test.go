// Copyright (c) The azure-vnet authors. MIT licence.

package forward

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/coreos/go-iptables/iptables"
)

// listed is a program that lists the chains in the file beside it as iptables does, and notes each of its runs there.
const listed = `#!/bin/sh
[ "$1" = --version ] && { echo 'iptables v1.8.9 (legacy)'; exit 0; }
echo >>"$0.runs"
none=1
while IFS= read -r line; do
	case $line in "-P $4 "*|"-N $4"|"-A $4 "*) printf '%s\n' "$line"; none=0 ;; esac
done <"$0.rules"
exit $none
`

// FuzzRules has iptables list any rules. FORWARD and our chain are read as they are. The end of FORWARD is the first
// rule that ends it. Where the rules are what we want, no difference is found. The program is started for no chain
// more often than there are rules that lead to it.
func FuzzRules(f *testing.F) {
	for _, name := range []string{"docker-27", "hardened-image", "tailscale"} { // the short ones: each look is a process
		body, err := os.ReadFile("../../testdata/foreign/" + name + ".iptables-save.txt")
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(body))
	}
	f.Add("-P FORWARD DROP\n" + theJump + "\n-A FORWARD -j REJECT\n-N AZURE-VNET\n" + twoLinksAccepts)
	f.Add("-P FORWARD ACCEPT\n-A FORWARD -m comment --comment \"a \\\" -j DROP\" -j X\n-N X\n-A X -j LOG\n-A X -j ACCEPT\n-A X -j DROP\n")
	f.Add("-P FORWARD ACCEPT\n-A FORWARD -j LOG\n-A FORWARD -j LOG\n-N LOG\n" + strings.Repeat("-A LOG -j LOG\n", 6)) // nft makes such a chain
	f.Add("-P FORWARD ACCEPT\n-A FORWARD -g X\n-A FORWARD -j AZURE-VNET\n-N X\n-A X -g Y\n-N Y\n-A Y -j X\n")
	program := filepath.Join(f.TempDir(), "iptables")
	if err := os.WriteFile(program, []byte(listed), 0o755); err != nil {
		f.Fatal(err)
	}
	run, err := iptables.New(iptables.Path(program), iptables.Timeout(2))
	if err != nil {
		f.Fatal(err)
	}
	b := &backend{name: "legacy", iptables: run}
	f.Fuzz(func(t *testing.T, saved string) {
		rules := clean(saved)
		if len(rules) > 60 {
			t.Skip("it would take long: each look is a process")
		}
		runs := list(t, program, rules)
		s, err := b.readState()
		if err != nil {
			if !slices.ContainsFunc(rules, func(r string) bool { return strings.HasPrefix(r, "-P FORWARD ") || strings.HasPrefix(r, "-A FORWARD ") }) && strings.Contains(err.Error(), "read the chain FORWARD") {
				return // it is not there
			}
			t.Fatal(err)
		}
		for chain, got := range map[string][]string{forwardChain: s.forward, ourChain: s.accepts} {
			if want := of(rules, chain); !slices.Equal(want, got) {
				t.Errorf("%s is %q and is read as %q", chain, want, got)
			}
		}
		if n := runs(); n > 3+maxDepth*len(rules) {
			t.Errorf("%d rules cost %d looks", len(rules), n)
		}
		bare := func(r string) bool { return r == "-A FORWARD -j DROP" || r == "-A FORWARD -j REJECT" }
		if first := slices.IndexFunc(s.forward, bare); s.finalRule < 0 || s.finalRule > len(s.forward) || first >= 0 && s.finalRule > first {
			t.Errorf("%q ends at %d", s.forward, s.finalRule)
		}
		checkWanted(t, b, program, rules, s)
	})
}

// clean drops what iptables does not print: it lists one rule of one chain in a line.
func clean(saved string) (rules []string) {
	for line := range strings.Lines(saved) {
		line = strings.TrimRight(strings.Map(func(r rune) rune {
			if r < ' ' || r > '~' {
				return -1
			}
			return r
		}, line), " ")
		if word := strings.Fields(line); len(word) > 1 && slices.Contains([]string{"-P", "-N", "-A"}, word[0]) && strings.HasPrefix(line, word[0]+" "+word[1]) {
			rules = append(rules, line)
		}
	}
	return rules
}

func of(rules []string, chain string) (all []string) {
	for _, r := range rules {
		if strings.HasPrefix(r, "-A "+chain+" ") {
			all = append(all, r)
		}
	}
	return all
}

// list has the program list the rules; runs tells how often it has been started since.
func list(t *testing.T, program string, rules []string) (runs func() int) {
	t.Helper()
	for path, body := range map[string]string{program + ".rules": strings.Join(append(rules, ""), "\n"), program + ".runs": ""} {
		if err := os.WriteFile(path, []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return func() int {
		noted, err := os.ReadFile(program + ".runs")
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Count(noted, []byte("\n"))
	}
}

// checkWanted lists the rules of others as they were read, with ours where they belong.
func checkWanted(t *testing.T, b *backend, program string, rules []string, s iptablesState) {
	t.Helper()
	at := s.finalRule
	for _, i := range s.jumpIndexes() {
		if i < s.finalRule {
			at--
		}
	}
	forward := slices.DeleteFunc(slices.Clone(s.forward), func(r string) bool { return r == theJump })
	wanted := append([]string{"-P FORWARD DROP", "-N AZURE-VNET"}, slices.Insert(forward, at, theJump)...)
	for _, r := range twoLinks.accepts() {
		wanted = append(wanted, ruleText(ourChain, r))
	}
	for _, r := range rules {
		if !strings.HasPrefix(r, "-A FORWARD ") && !strings.HasPrefix(r, "-A AZURE-VNET ") {
			wanted = append(wanted, r)
		}
	}
	list(t, program, wanted)
	is, err := b.readState()
	if err != nil {
		t.Fatal(err)
	}
	if wrong := is.differences(twoLinks); len(wrong) > 0 {
		t.Errorf("of %q it is said: %q", wanted, wrong)
	}
}
