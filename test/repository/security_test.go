// Copyright (c) The azure-vnet authors. MIT licence.

package repository

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"azurevnet/test"
)

// TestSecurityDocNamesEveryRight: docs/security.md has a row for each right that config.json asks for, and no other.
// Each row names code that needs the right.
func TestSecurityDocNamesEveryRight(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(test.Top, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	var config struct {
		Network         struct{ Type string }
		Linux           struct{ Capabilities []string }
		PropagatedMount string
		Mounts          []struct{ Source, Destination string }
		Env             []struct {
			Name     string
			Settable []string
		}
	}
	if err := json.Unmarshal(text, &config); err != nil {
		t.Fatal(err)
	}
	rights := []string{"network `" + config.Network.Type + "`", "propagated mount `" + config.PropagatedMount + "`"}
	for _, c := range config.Linux.Capabilities {
		rights = append(rights, "`"+c+"`")
	}
	for _, m := range config.Mounts {
		rights = append(rights, "mount `"+m.Source+"` at `"+m.Destination+"`")
	}
	var settable, fixed []string
	for _, e := range config.Env {
		if len(e.Settable) > 0 {
			settable = append(settable, "`"+e.Name+"`")
		} else {
			fixed = append(fixed, "`"+e.Name+"`")
		}
	}
	rights = append(rights, strings.Join(settable, ", "), strings.Join(fixed, ", "))
	var told []string
	for _, row := range rowsUnder(t, "docs/security.md", "## What the plugin may do") {
		if len(row) != 3 {
			t.Errorf("a row has not three cells: %q", row)
			continue
		}
		told = append(told, row[0])
		for _, code := range regexp.MustCompile("`([a-z/.]+)`").FindAllStringSubmatch(row[2], -1) {
			if _, err := os.Stat(filepath.Join(test.Top, code[1])); err != nil {
				t.Errorf("%s: %v", row[0], err)
			}
		}
	}
	slices.Sort(rights)
	slices.Sort(told)
	if diff := cmp.Diff(rights, told); diff != "" {
		t.Errorf("docs/security.md tells other rights than config.json asks for (- config.json, + told):\n%s", diff)
	}
}

// rowsUnder are the rows of the tables under a heading, as cells, without the rows of titles.
func rowsUnder(t *testing.T, doc, heading string) (rows [][]string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(test.Top, doc))
	if err != nil {
		t.Fatal(err)
	}
	_, part, ok := strings.Cut(string(text), "\n"+heading+"\n")
	if !ok {
		t.Fatalf("%s has no heading %s", doc, heading)
	}
	part, _, _ = strings.Cut(part, "\n## ")
	titles := true // of the next table
	for line := range strings.Lines(part) {
		switch line = strings.TrimSpace(line); {
		case !strings.HasPrefix(line, "|"):
			titles = true
		case strings.HasPrefix(line, "|-"):
			titles = false
		case !titles:
			rows = append(rows, strings.Split(strings.TrimSuffix(strings.TrimPrefix(line, "| "), " |"), " | "))
		}
	}
	return rows
}

// TestEveryShellBlockHasARemark: the remark before a block of shell in a document says which test runs the block, or
// why none does.
func TestEveryShellBlockHasARemark(t *testing.T) {
	docs, err := filepath.Glob(filepath.Join(test.Top, "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	blocks := 0
	for _, doc := range append(docs, filepath.Join(test.Top, "README.md"), filepath.Join(test.Top, "CONTRIBUTING.md")) {
		name, err := filepath.Rel(test.Top, doc)
		if err != nil {
			t.Fatal(err)
		}
		blocks += len(test.Blocks(t, name))
	}
	if blocks < 10 {
		t.Errorf("%d kinds of blocks were found: this test is blind", blocks)
	}
}
