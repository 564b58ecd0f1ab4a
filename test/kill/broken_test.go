// Copyright (c) The azure-vnet authors. MIT licence.

package kill

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// mistake is a change that breaks the product, with the proof that notices it.
type mistake struct {
	what     string
	file     string
	old, new string // text that stands once in the file, and what stands there instead
	noticed  proof
	always   bool // make test shows it too
}

// proof runs the product with an overlay of its source (see go help build). It returns what it notices; empty: nothing.
type proof func(t *testing.T, overlay string) string

var mistakes = []mistake{
	{what: "state is written in place", file: "internal/statefile/statefile.go",
		old:     "\t_, err := f.Write(body)\n",
		new:     "\tf, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)\n\tif err == nil { _, err = f.Write(body[:len(body)/2]) }\n\tif err == nil { _, err = f.Write(body[len(body)/2:]) }\n",
		noticed: onNode(func(n node) history { return n.adding(n.conf(0, 1, nil)) })},
	{what: "DEL releases the address before its link is gone", file: "cmd/azure-vnet/del.go",
		old:     "\tleased := map[string][]netip.Addr{}",
		new:     "\t_ = l.EndLeases(ctx, owners...); leased := map[string][]netip.Addr{}",
		noticed: onNode(func(n node) history { return n.deleting(n.conf(0, 1, nil)) }), always: true},
	{what: "a file gets its name before it is on the disk", file: "internal/statefile/statefile.go",
		old: "\t\terr = f.Sync()", new: "",
		noticed: onEngine(func(e *engine) history { return e.networking() })},
	{what: "a bridge lets all frames of containers pass", file: "bridge/internal/ruleset/tables.go",
		old:     "inSet(\"own_arp\"), acceptVerdict()),\n\t\trule(fromGroup(GroupBridge), dropVerdict()))",
		new:     "inSet(\"own_arp\"), acceptVerdict()))",
		noticed: byTest("./bridge", "TestAContainerHurtsNobody", "hears")},
	{what: "a port hands frames for reserved groups to the host", file: "bridge/endpointfaults.go",
		old: "\t{Kind: nl.IFLA_BRPORT_GROUP_FWD_MASK, Name: \"group_fwd_mask\", Value: 0xfffd},\n", new: "",
		noticed: byTest("./bridge", "TestAContainerHurtsNobody", "hears")},
	{what: "fragments are put together before they are looked at", file: "bridge/internal/ruleset/tables.go",
		old: "beforeDefrag      = -460", new: "beforeDefrag      = -310",
		noticed: byTest("./bridge", "TestFragmentsAreTheirSendersOwn", "the other VM gets")},
	{what: "a lease may be collected at once", file: "pool/links.go",
		old: "const grace = 5 * time.Minute", new: "const grace = 0 * time.Minute",
		noticed: byTest("./pool", "TestAnyOrderOfCalls", "[rapid] failed")},
	{what: "a lease is collected that was confirmed meanwhile", file: "pool/links.go",
		old: "if links[addr] || s.Leases[addr] != r {", new: "if links[addr] || r.Owner == \"\" {",
		noticed: byTest("./pool", "TestAnyOrderOfCalls", "[rapid] failed")},
	{what: "the address that was released last is lent first", file: "pool/pick.go",
		old: "v.Freed[a].At < v.Freed[l.Addr].At", new: "v.Freed[a].At > v.Freed[l.Addr].At",
		noticed: byTest("./pool", "TestAnyOrderOfCalls", "[rapid] failed")},
	{what: "a detach leaves the endpoint's elements of the nft tables", file: "bridge/detach.go",
		old: "{\"detach elements\", func() error { return d.removeElements(state) }},", new: "",
		noticed: byTest("./bridge", "TestAnyOrderOfCalls", "after a round")},
	{what: "the host follows a container's source route", file: "bridge/faults.go",
		old: "\t\t{conf + \"/accept_source_route\", \"0\"},", new: "",
		noticed: byTest("./bridge", "TestAContainerHurtsNobody", "hears")},
}

// onNode is the kill matrix of a call of azure-vnet.
func onNode(what func(n node) history) proof {
	return func(t *testing.T, overlay string) string {
		n := newNode(t, vnetsim.VMConfig{Secondaries: 4})
		n.Netns("keeper", "pod")
		n.calls("ADD", "keeper", n.conf(0, 0, nil))
		dir := t.TempDir()
		build(t, overlay, dir+"/", "azurevnet/cmd/azure-vnet")
		n.Dir = dir
		h := what(n)
		h.heal, h.pods = n.heal, []string{"pod"}
		return strings.Join(h.faults(t, n.Host, n.probes, 1, 1), "\n") // up to the step that the mistake is at
	}
}

// onEngine is the kill matrix of a call of the plugin.
func onEngine(what func(e *engine) history) proof {
	return func(t *testing.T, overlay string) string {
		e := newEngine(t)
		e.binary = filepath.Join(t.TempDir(), "azure-vnet-plugin")
		build(t, overlay, e.binary, "azurevnet")
		h := what(e)
		h.heal, h.pods, h.patience = e.heal, []string{"pod"}, 0
		return strings.Join(h.faults(t, e.Host, e.probes, 1, 1), "\n")
	}
}

// byTest is a test of a package. says is a part of what it prints when it notices the mistake, and not another fault.
func byTest(pkg, name, says string) proof {
	return func(t *testing.T, overlay string) string {
		program := filepath.Join(t.TempDir(), "broken.test")
		goTool(t, "test", "-trimpath", "-overlay", overlay, "-c", "-o", program, pkg)
		run := exec.CommandContext(t.Context(), program, "-test.run", "^"+name+"$", "-test.timeout", "10m", "-test.parallel", "4")
		run.Dir, run.Env = filepath.Join(test.Top, pkg), append(os.Environ(), "SOAK=") // the short case must notice it
		out, err := run.CombinedOutput()
		if err == nil {
			return ""
		}
		if !strings.Contains(string(out), "--- FAIL: "+name) || !strings.Contains(string(out), says) {
			t.Fatalf("%s fails for another reason: %v\n%s", name, err, out)
		}
		return string(out)
	}
}

// build builds a program with an overlay of its source.
func build(t *testing.T, overlay, output, pkg string) {
	t.Helper()
	goTool(t, "build", "-trimpath", "-ldflags", "-s -w", "-overlay", overlay, "-o", output, pkg)
}

func goTool(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.Command("go", args...)
	cmd.Dir, cmd.Env = test.Top, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", cmd, err, out)
	}
}

// overlay makes the mistake, and returns the file that tells it to the go command.
func (m mistake) overlay(t *testing.T) string {
	t.Helper()
	source, dir := filepath.Join(test.Top, m.file), t.TempDir()
	text, err := os.ReadFile(source)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Count(string(text), m.old) != 1 {
		t.Fatalf("%s does not have %q once: give the mistake another place", m.file, m.old)
	}
	broken, path := filepath.Join(dir, "broken.go"), filepath.Join(dir, "overlay.json")
	list, err := json.Marshal(map[string]any{"Replace": map[string]string{source: broken}})
	if err == nil {
		err = os.WriteFile(broken, []byte(strings.Replace(string(text), m.old, m.new, 1)), 0o644)
	}
	if err == nil {
		err = os.WriteFile(path, list, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// TestMistakesAreFound: the proof that is named beside each mistake fails for it. make test makes the mistakes that are
// marked always.
func TestMistakesAreFound(t *testing.T) {
	for _, m := range mistakes {
		t.Run(m.what, func(t *testing.T) {
			if !m.always && !test.Soaking {
				t.Skip("takes long: make soak")
			}
			t.Parallel()
			told := m.noticed(t, m.overlay(t))
			if told == "" {
				t.Fatal("the proof notices nothing")
			}
			t.Logf("FIGURE mutations: %d made, %d noticed", 1, 1)
			t.Log(told)
		})
	}
}
