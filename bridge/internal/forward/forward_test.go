// Copyright (c) The azure-vnet authors. MIT licence.

package forward

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"azurevnet/internal/vnetsim"
)

// inNamespace runs f on a thread of its own in a new network namespace, which ends with it.
func inNamespace(t *testing.T, f func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make network namespaces")
	}
	if err := vnetsim.InNewNamespace(f); err != nil {
		t.Error(err)
	}
}

// run runs a line of the shell in the calling thread's namespace.
func run(t *testing.T, line string) string {
	t.Helper()
	cmd := exec.Command("sh", "-c", line)
	out, err := cmd.Output()
	if err != nil {
		t.Errorf("%s: %v", line, err)
	}
	return string(out)
}

// load makes a kind of iptables hold the rules, in iptables-save's format.
func load(t *testing.T, kind, rules string) {
	t.Helper()
	cmd := exec.Command("iptables-" + kind + "-restore")
	cmd.Stdin = strings.NewReader(rules)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("iptables-%s-restore: %v\n%s", kind, err, out)
	}
}

// save is all that a kind of iptables holds, without times and counters.
func save(t *testing.T, kind string) string {
	t.Helper()
	return regexp.MustCompile(`(?m)^#.*\n| \[[0-9:]+\]`).ReplaceAllString(run(t, "iptables-"+kind+"-save"), "")
}

// others is what save says of rules that are not ours.
func others(saved string) string {
	return regexp.MustCompile(`(?m)^.*AZURE-VNET.*\n`).ReplaceAllString(saved, "")
}

const theJump = "-A FORWARD -m comment --comment azure-vnet -j AZURE-VNET"

// both are the kinds of iptables that a host may use, also at once.
var both = []string{"nft", "legacy"}

// twoLinks is a host with bridged and transparent containers, a NIC and a VPN.
var twoLinks = Config{Links: []string{"azure0", "azv+"}, Out: []string{"eth0", "wg0"}}

const twoLinksAccepts = `-A AZURE-VNET -o azure0 -j ACCEPT
-A AZURE-VNET -o azv+ -j ACCEPT
-A AZURE-VNET -i azure0 -o eth0 -j ACCEPT
-A AZURE-VNET -i azure0 -o wg0 -j ACCEPT
-A AZURE-VNET -i azv+ -o eth0 -j ACCEPT
-A AZURE-VNET -i azv+ -o wg0 -j ACCEPT
`

// stands is one state of a host's FORWARD that Sync is to come to.
type stands struct {
	others string // all rules of others, as save prints them
	before string // the rule of FORWARD that the jump stands before; empty: it is the last one
	config Config
	chain  string // the rules of our chain
}

// check fails the test unless the kind of iptables holds that state and Sync would change nothing.
func (s stands) check(t *testing.T, when, kind string) {
	t.Helper()
	saved := save(t, kind)
	if diff := cmp.Diff(s.others, others(saved)); diff != "" {
		t.Errorf("%s, iptables-%s: rules of others (-want +got):\n%s", when, kind, diff)
	}
	var forward, chain []string
	for line := range strings.Lines(saved) {
		switch {
		case strings.HasPrefix(line, "-A FORWARD "):
			forward = append(forward, strings.TrimSpace(line))
		case strings.HasPrefix(line, "-A AZURE-VNET "):
			chain = append(chain, line)
		}
	}
	want := slices.DeleteFunc(slices.Clone(forward), func(r string) bool { return r == theJump })
	at := len(want)
	if s.before != "" {
		at = slices.Index(want, s.before)
	}
	if diff := cmp.Diff(slices.Insert(want, at, theJump), forward); diff != "" {
		t.Errorf("%s, iptables-%s: FORWARD (-want +got):\n%s", when, kind, diff)
	}
	slices.Sort(chain)
	wantChain := slices.Sorted(strings.Lines(s.chain))
	if diff := cmp.Diff(wantChain, chain); diff != "" {
		t.Errorf("%s, iptables-%s: AZURE-VNET (-want +got):\n%s", when, kind, diff)
	}
	if mended, err := s.config.Sync(); err != nil || len(mended) > 0 {
		t.Errorf("%s: written again: %q, %v", when, mended, err)
	}
}

// mustSync demands that Sync finds something to do, and that Differences says the same without doing it.
func mustSync(t *testing.T, when string, c Config) {
	t.Helper()
	wrong, err := c.Differences()
	if err != nil || len(wrong) == 0 {
		t.Errorf("%s: differences: %q, %v, want some", when, wrong, err)
	}
	mended, err := c.Sync()
	if err != nil {
		t.Errorf("%s: %v", when, err)
	}
	if diff := cmp.Diff(wrong, mended); diff != "" {
		t.Errorf("%s: what Sync mends differs from what Differences says (-differences +mended):\n%s", when, diff)
	}
}

// foreign is a file of other programs' rules.
func foreign(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("../../testdata/foreign", name+".iptables-save.txt"))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// filterTable is a filter table with the policy, chains and rules.
func filterTable(policy string, lines ...string) string {
	return "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD " + policy + " [0:0]\n:OUTPUT ACCEPT [0:0]\n" + strings.Join(lines, "\n") + "\nCOMMIT\n"
}

// The jump stands behind every rule of others that may spare or stop a packet, and before a rule that stops
// all of them. Rules of others stay as they are, byte for byte. Drop leaves what was there before.
func TestPlace(t *testing.T) {
	const reject = "-j REJECT --reject-with icmp-host-prohibited"
	for name, test := range map[string]struct{ rules, before string }{
		"empty":         {filterTable("ACCEPT"), ""},
		"policy drop":   {filterTable("DROP"), ""},
		"saved drop":    {filterTable("DROP", "-A FORWARD -s 10.240.0.20/32 -j DROP"), ""},
		"final drop":    {filterTable("ACCEPT", "-A FORWARD -s 10.240.0.20/32 -j DROP", "-A FORWARD -j DROP"), "-A FORWARD -j DROP"},
		"commented":     {filterTable("ACCEPT", `-A FORWARD -m comment --comment "the \"rest\" -j ACCEPT" -j DROP`), `-A FORWARD -m comment --comment "the \"rest\" -j ACCEPT" -j DROP`},
		"one word":      {filterTable("ACCEPT", "-A FORWARD -m comment --comment rest -j DROP"), "-A FORWARD -m comment --comment rest -j DROP"},
		"behind final":  {filterTable("ACCEPT", "-A FORWARD "+reject, "-A FORWARD -s 10.240.0.20/32 -j DROP"), "-A FORWARD " + reject},
		"two finals":    {filterTable("ACCEPT", "-A FORWARD "+reject, "-A FORWARD -j DROP"), "-A FORWARD " + reject},
		"conditional":   {filterTable("ACCEPT", "-A FORWARD ! -i eth0 -j DROP"), ""},
		"log and drop":  {filterTable("ACCEPT", ":LOGGING - [0:0]", "-A FORWARD -j LOGGING", "-A LOGGING -m limit --limit 2/min -j LOG", "-A LOGGING -j DROP"), "-A FORWARD -j LOGGING"},
		"goto":          {filterTable("ACCEPT", ":END - [0:0]", "-A FORWARD -g END", "-A END "+reject), "-A FORWARD -g END"},
		"nested":        {filterTable("ACCEPT", ":END - [0:0]", ":DENY - [0:0]", "-A FORWARD -j END", "-A END -j DENY", "-A DENY -j DROP"), "-A FORWARD -j END"},
		"accepts":       {filterTable("ACCEPT", ":RH-Firewall-1-INPUT - [0:0]", "-A FORWARD -j RH-Firewall-1-INPUT", "-A RH-Firewall-1-INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", "-A RH-Firewall-1-INPUT "+reject), "-A FORWARD -j RH-Firewall-1-INPUT"},
		"inner drop":    {filterTable("ACCEPT", ":POLICY - [0:0]", "-A FORWARD -j POLICY", "-A POLICY -s 10.240.0.20/32 -j DROP", "-A POLICY -j DROP"), ""},
		"inner return":  {filterTable("ACCEPT", ":POLICY - [0:0]", "-A FORWARD -j POLICY", "-A POLICY -s 10.240.0.20/32 -j RETURN", "-A POLICY -j DROP"), ""},
		"calico":        {foreign(t, "calico-policy-only"), ""},
		"docker":        {foreign(t, "docker-27"), ""},
		"hardened":      {foreign(t, "hardened-image"), "-A FORWARD " + reject},
		"kube-router":   {foreign(t, "kube-router"), ""},
		"tailscale":     {foreign(t, "tailscale"), ""},
		"ufw":           {foreign(t, "ufw"), ""},
		"ufw, reject":   {strings.Replace(foreign(t, "ufw"), "-A ufw-track-output", "-A ufw-reject-forward -j REJECT --reject-with icmp-port-unreachable\n-A ufw-track-output", 1), "-A FORWARD -j ufw-reject-forward"},
		"firewalld 0.5": {filterTable("ACCEPT", ":FORWARD_direct - [0:0]", "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", "-A FORWARD -j FORWARD_direct", "-A FORWARD -m conntrack --ctstate INVALID -j DROP", "-A FORWARD "+reject), "-A FORWARD " + reject},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inNamespace(t, func() { checkPlace(t, both, test.rules, test.before) })
		})
	}
}

func checkPlace(t *testing.T, used []string, rules, before string) {
	saved := map[string]string{}
	for _, kind := range used {
		load(t, kind, rules)
		saved[kind] = save(t, kind)
	}
	mustSync(t, "at first", twoLinks)
	for _, kind := range used {
		stands{saved[kind], before, twoLinks, twoLinksAccepts}.check(t, "at first", kind)
	}
	if err := RemoveAll(); err != nil {
		t.Errorf("drop: %v", err)
	}
	for _, kind := range used {
		if diff := cmp.Diff(saved[kind], save(t, kind)); diff != "" {
			t.Errorf("iptables-%s after Drop (-want +got):\n%s", kind, diff)
		}
	}
}

// A host that uses one kind of iptables does not come to use the other.
func TestOneKind(t *testing.T) {
	for kind, theOther := range map[string]string{"nft": "cat /proc/thread-self/net/ip_tables_names", "legacy": "nft list ruleset"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			inNamespace(t, func() {
				checkPlace(t, []string{kind}, foreign(t, "docker-27"), "")
				if left := run(t, theOther); left != "" {
					t.Errorf("the other kind has tables now:\n%s", left)
				}
			})
		})
	}
}

// The rules follow the links. Drop can be repeated.
func TestOtherLinks(t *testing.T) {
	inNamespace(t, func() {
		load(t, "nft", filterTable("DROP"))
		saved := save(t, "nft")
		one := Config{Links: []string{"azure0"}, Out: []string{"eth0"}}
		const oneAccepts = "-A AZURE-VNET -o azure0 -j ACCEPT\n-A AZURE-VNET -i azure0 -o eth0 -j ACCEPT\n"
		for _, next := range []stands{{saved, "", one, oneAccepts}, {saved, "", twoLinks, twoLinksAccepts}, {saved, "", one, oneAccepts}, {saved, "", Config{Links: []string{"azv+"}}, "-A AZURE-VNET -o azv+ -j ACCEPT\n"}} {
			mustSync(t, "other links", next.config)
			next.check(t, "other links", "nft")
		}
		for range 2 {
			if err := RemoveAll(); err != nil {
				t.Errorf("drop: %v", err)
			}
		}
		if diff := cmp.Diff(saved, save(t, "nft")); diff != "" {
			t.Errorf("after Drop (-want +got):\n%s", diff)
		}
	})
}

// Whoever changes the order, the next Sync puts the jump back, alone and behind what came.
func TestReorder(t *testing.T) {
	const final = "-A FORWARD -j REJECT --reject-with icmp-port-unreachable"
	for name, test := range map[string]struct {
		lines  string // of iptables
		before string
		quiet  bool // nothing is to mend
	}{
		"inserted first":         {"-I FORWARD 1 -s 10.240.0.20 -j DROP", "", true},
		"appended behind":        {"-A FORWARD -d 10.240.0.21 -j DROP", "", false},
		"final appended":         {"-A FORWARD -j REJECT", final, true},
		"final and one more":     {"-A FORWARD -d 10.240.0.21 -j DROP; -A FORWARD -j REJECT", final, false},
		"final inserted first":   {"-I FORWARD 1 -j REJECT", final, false},
		"moved to the top":       {"-D FORWARD -m comment --comment azure-vnet -j AZURE-VNET; -I FORWARD 1 -m comment --comment azure-vnet -j AZURE-VNET; -A FORWARD -s 10.240.0.20 -j DROP", "", false},
		"twice at the end":       {"-A FORWARD -m comment --comment azure-vnet -j AZURE-VNET", "", false},
		"at the top too":         {"-I FORWARD 1 -m comment --comment azure-vnet -j AZURE-VNET", "", false},
		"five times":             {"-I FORWARD 1 -m comment --comment azure-vnet -j AZURE-VNET; -I FORWARD 1 -m comment --comment azure-vnet -j AZURE-VNET; -A FORWARD -m comment --comment azure-vnet -j AZURE-VNET; -A FORWARD -m comment --comment azure-vnet -j AZURE-VNET; -A FORWARD -j REJECT", final, false},
		"jump deleted":           {"-D FORWARD -m comment --comment azure-vnet -j AZURE-VNET", "", false},
		"forward flushed":        {"-F FORWARD", "", false},
		"table flushed":          {"-F", "", false},
		"table flushed, deleted": {"-F; -X", "", false},
		"chain flushed":          {"-F AZURE-VNET", "", false},
		"chain cut":              {"-D AZURE-VNET 1", "", false},
		"chain has more":         {"-I AZURE-VNET 1 -s 10.240.0.20 -j DROP; -A AZURE-VNET -j ACCEPT", "", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inNamespace(t, func() {
				for _, kind := range both {
					load(t, kind, foreign(t, "docker-27"))
				}
				if _, err := twoLinks.Sync(); err != nil {
					t.Error(err)
				}
				saved := map[string]string{}
				for _, kind := range both {
					for _, line := range strings.Split(test.lines, "; ") {
						run(t, "iptables-"+kind+" "+line)
					}
					saved[kind] = others(save(t, kind))
				}
				if !test.quiet {
					mustSync(t, "after that", twoLinks)
				}
				for _, kind := range both {
					stands{saved[kind], test.before, twoLinks, twoLinksAccepts}.check(t, "after that", kind)
				}
			})
		})
	}
}

// A host whose iptables has no FORWARD chain gets none, of neither kind.
func TestNothingWithoutForward(t *testing.T) {
	inNamespace(t, func() {
		run(t, "nft 'table inet filter { chain forward { type filter hook forward priority 0; policy drop; }; }'")
		run(t, "iptables-legacy -t nat -A POSTROUTING -s 10.8.0.0/24 -j MASQUERADE")
		tables := func() string {
			return run(t, "nft list ruleset; cat /proc/thread-self/net/ip_tables_names; iptables-legacy-save -t nat | grep ^-A")
		}
		before := tables()
		mended, err := twoLinks.Sync()
		wrong, errWrong := twoLinks.Differences()
		if len(mended)+len(wrong) > 0 || err != nil || errWrong != nil || RemoveAll() != nil {
			t.Errorf("without FORWARD: mended %q, %v; differences %q, %v", mended, err, wrong, errWrong)
		}
		if diff := cmp.Diff(before, tables()); diff != "" {
			t.Errorf("without FORWARD (-before +after):\n%s", diff)
		}
	})
}

// Drop clears away what a crash between two steps left.
func TestDropAfterCrash(t *testing.T) {
	for name, left := range map[string]string{
		"chain without jump": "-N AZURE-VNET; -A AZURE-VNET -o azure0 -j ACCEPT",
		"many jumps":         "-N AZURE-VNET; -A FORWARD -m comment --comment azure-vnet -j AZURE-VNET; -I FORWARD 1 -m comment --comment azure-vnet -j AZURE-VNET",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inNamespace(t, func() {
				saved := map[string]string{}
				for _, kind := range both {
					load(t, kind, foreign(t, "docker-27"))
					saved[kind] = save(t, kind)
					for _, line := range strings.Split(left, "; ") {
						run(t, "iptables-"+kind+" "+line)
					}
				}
				if err := RemoveAll(); err != nil {
					t.Errorf("drop: %v", err)
				}
				for _, kind := range both {
					if diff := cmp.Diff(saved[kind], save(t, kind)); diff != "" {
						t.Errorf("iptables-%s after Drop (-want +got):\n%s", kind, diff)
					}
				}
			})
		})
	}
}

// The commands for an nft chain of others go behind its own rules, and before a drop that ends them.
func TestForeignChains(t *testing.T) {
	inNamespace(t, func() {
		run(t, "nft 'table inet fw { chain end { drop; }; chain forward { type filter hook forward priority 0; policy accept; ip daddr 192.0.2.1 accept; goto end; }; }'")
		run(t, "nft 'table ip fw { chain forward { type filter hook forward priority 0; policy drop; ip daddr 192.0.2.1 accept; }; }'")
		run(t, "nft 'table inet open { chain forward { type filter hook forward priority 0; policy accept; ip daddr 192.0.2.1 drop; }; }'")
		got, err := Config{Links: []string{"azv+"}, Out: []string{"eth0"}}.DroppingChains()
		if err != nil {
			t.Error(err)
		}
		const why = " drops what none of its rules accepts, so containers' packets pass only where it accepts them. Accept them yourself, there and in the file that it is loaded from: "
		want := []string{
			"the nft chain ip fw forward" + why + `nft add rule ip fw forward oifname "azv*" accept comment "azure-vnet"; nft add rule ip fw forward iifname "azv*" oifname "eth0" accept comment "azure-vnet"`,
			"the nft chain inet fw forward" + why + `nft insert rule inet fw forward handle 5 oifname "azv*" accept comment "azure-vnet"; nft insert rule inet fw forward handle 5 iifname "azv*" oifname "eth0" accept comment "azure-vnet"`,
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}
