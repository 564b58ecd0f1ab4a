// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// asProgram in the environment turns the test's program into azure-vnetctl.
const asProgram = "AZURE_VNETCTL_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
	}
	os.Exit(m.Run())
}

const example = "../../internal/plan/testdata/clusters/documented-example.txt"

// TestExitStatus: 0 if the cluster fits, 1 if something is wrong, 2 if the command is not usable. The plan goes to
// stdout, whatever it says, and an unusable command says on stderr what to do.
func TestExitStatus(t *testing.T) {
	large := filepath.Join(t.TempDir(), "large")
	if err := os.WriteFile(large, bytes.Repeat([]byte(" "), mostBytes+1), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args   string
		in     string
		status int
		begins string // of stdout or, if the status is 2, of stderr
	}{
		{"plan " + example, "", 0, "fits: 93 of 4,091 addresses used; 128 more nodes fit\n"},
		{"plan -o json " + example, "", 0, "{\n  \"version\": 1,\n  \"ok\": true,"},
		{"plan -", "{}", 1, "no plan: line 1: it has no object \"properties\""},
		{"plan -", "", 1, "wrong: line 1: this is no JSON: the file ends too early"},
		{"plan ../../internal/plan/testdata/clusters/dcosvnet.json", "", 1, "no plan: line 5, orchestratorProfile.orchestratorType: \"DCOS\" is not Kubernetes;\n"},
		{"plan --subnet 10.0.0.0/20 --nodes 3 --max-pods 30", "", 0, "fits: 93 of 4,091 addresses used; 128 more nodes fit\n"},
		{"plan --subnet 10.0.0.0/20 --nodes 2 --masters 1", "", 0, "fits: 93 of 4,091 addresses used; 128 more nodes fit\n"},
		{"plan --subnet 10.0.0.0/24 --nodes 9", "", 1, "does not fit: 279 addresses are needed"},
		{"plan --subnet 10.0.0.0/24 --nodes 9 -o json", "", 1, "{\n  \"version\": 1,\n  \"ok\": false,"},

		{"plan", "", 2, "azure-vnetctl: give a FILE with the definition of a cluster, or --subnet"},
		{"plan nothing.json", "", 2, "azure-vnetctl: the definition cannot be read: open nothing.json"},
		{"plan .", "", 2, "azure-vnetctl: the definition cannot be read: "},
		{"plan " + large, "", 2, "azure-vnetctl: " + large + " is larger than 1 MiB"},
		{"plan a b", "", 2, "azure-vnetctl: accepts at most 1 arg(s)"},
		{"plan --subnet 10.0.0.0/20 --nodes 3 cluster.json", "", 2, "azure-vnetctl: --subnet and a FILE were given"},
		{"plan --subnet 10.0.0.0/20", "", 2, "azure-vnetctl: --nodes 0 cannot be"},
		{"plan --subnet 10.0.0.0/20 --nodes three", "", 2, "azure-vnetctl: invalid argument \"three\""},
		{"plan --subnet 10.0.0.0/20 --nodes 3 --max-pods 251", "", 2, "azure-vnetctl: --max-pods 251 cannot be"},
		{"plan --subnet 10.0.0.0/20 --nodes 3 --masters 2", "", 2, "azure-vnetctl: --masters 2 cannot be"},
		{"plan --subnet 10.0.0.0 --nodes 3", "", 2, "azure-vnetctl: --subnet \"10.0.0.0\" is no range of IPv4"},
		{"plan --subnet fd00::/64 --nodes 3", "", 2, "azure-vnetctl: --subnet \"fd00::/64\" is no range of IPv4"},
		{"plan --subnet 10.0.0.7/20 --nodes 3", "", 2, "azure-vnetctl: --subnet 10.0.0.7/20 has host bits: write 10.0.0.0/20"},
		{"plan --subnet 10.0.0.0/30 --nodes 3", "", 2, "azure-vnetctl: --subnet 10.0.0.0/30 cannot be a subnet of Azure"},
		{"plan -o yaml " + example, "", 2, "azure-vnetctl: unknown output \"yaml\": write -o text or -o json"},
		{"plan --no-such-flag", "", 2, "azure-vnetctl: unknown flag: --no-such-flag"},
		{"plann", "", 2, "azure-vnetctl: unknown command \"plann\""},
		{"", "", 0, "azure-vnetctl is for whoever runs azure-vnet"},
		{"--version", "", 0, "azure-vnetctl version devel"},
	} {
		t.Run(tt.args, func(t *testing.T) {
			var out, errOut bytes.Buffer
			status := run(strings.Fields(tt.args), strings.NewReader(tt.in), &out, &errOut)
			told, silent := &out, &errOut
			if tt.status == statusUsage {
				told, silent = &errOut, &out
			}
			if status != tt.status || !strings.HasPrefix(told.String(), tt.begins) || silent.Len() > 0 {
				t.Errorf("exit status %d\n%s%s", status, &out, &errOut)
			}
		})
	}
}

// TestHelpSaysTheExitStatuses: of the command, and of each of its words but those of cobra. No line is too long.
func TestHelpSaysTheExitStatuses(t *testing.T) {
	for _, args := range [][]string{{"--help"}, {"plan", "--help"}, {"help", "plan"}} {
		var out, errOut bytes.Buffer
		status := run(args, nil, &out, &errOut)
		if status != 0 || errOut.Len() > 0 || strings.Count(out.String(), "\n  0  ") != 1 || strings.Count(out.String(), "\n  2  ") != 1 {
			t.Errorf("%v: exit status %d\n%s%s", args, status, &out, &errOut)
		}
		for line := range strings.Lines(out.String()) {
			if len(strings.TrimSuffix(line, "\n")) > 80 {
				t.Errorf("%v: %d columns: %s", args, len(line), line)
			}
		}
	}
}

// TestShellsCompleteTheWords: cobra makes the scripts, and the words and values are ours.
func TestShellsCompleteTheWords(t *testing.T) {
	for _, tt := range []struct{ args, want string }{
		{"__complete pl", "plan\t"},
		{"__complete plan -o ", "text\njson\n"},
		{"__complete plan --max", "--max-pods\t"},
		{"completion bash", "# bash completion V2 for azure-vnetctl"},
	} {
		var out, errOut bytes.Buffer
		if status := run(strings.Split(tt.args, " "), nil, &out, &errOut); status != 0 || !strings.HasPrefix(out.String(), tt.want) {
			t.Errorf("%s: exit status %d\n%.300s\n%s", tt.args, status, &out, &errOut)
		}
	}
}

// TestPlanningDoc runs the commands of docs/planning.md one after the other, and compares what they print with the block
// behind each. cluster.json is the documentation's example.
func TestPlanningDoc(t *testing.T) {
	const doc = "../../docs/planning.md"
	text, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	dir := inShell(t)
	pairs := regexp.MustCompile("(?s)<!-- run: plan -->\n```sh\n(.*?)```\n\n<!-- prints -->\n```\n(.*?)```").FindAllStringSubmatch(string(text), -1)
	if n := strings.Count(string(text), "```sh\n"); len(pairs) != n || n == 0 {
		t.Errorf("%d of %d blocks show what they print", len(pairs), n)
	}
	for _, pair := range pairs {
		cmd := exec.Command("sh", "-euc", pair[1])
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
		out, err := cmd.CombinedOutput()
		if diff := cmp.Diff(pair[2], string(out)); err != nil || diff != "" {
			t.Errorf("%s%v (- %s, + printed)\n%s", pair[1], err, doc, diff)
		}
	}
}

// TestExamplesOfHelpRun: each of them, as it stands in the help.
func TestExamplesOfHelpRun(t *testing.T) {
	dir := inShell(t)
	for line := range strings.Lines(newPlan(new(int)).Example) {
		cmd := exec.Command("sh", "-euc", line)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
		out, err := cmd.CombinedOutput()
		if err != nil || len(out) == 0 || strings.Contains(line, "json -") && !json.Valid(out) {
			t.Errorf("%s%v\n%s", line, err, out)
		}
	}
}

// inShell makes a directory with cluster.json and with azure-vnetctl, which is this test's program.
func inShell(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(example)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "cluster.json"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\n" + asProgram + "=1 exec '" + self + "' \"$@\"\n"
	if err := os.WriteFile(filepath.Join(dir, "azure-vnetctl"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}
