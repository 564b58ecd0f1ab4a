// Copyright (c) The azure-vnet authors. MIT licence.

package plan

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// FuzzRead gives any file as a definition. Each finding has a place in it. Both forms of the plan can be shown, whatever
// the file has, and neither shows a secret.
func FuzzRead(f *testing.F) {
	files, err := filepath.Glob("testdata/clusters/*")
	if err != nil || len(files) == 0 {
		f.Fatal(err, files)
	}
	for _, name := range files {
		body, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		if filepath.Ext(name) == ".want" {
			continue
		}
		f.Add(body)
		f.Add(body[:len(body)/2])
	}
	f.Add([]byte(sound))
	f.Fuzz(func(t *testing.T, body []byte) {
		p := Read(body)
		checkFindings(t, p, body)
		if s := p.Sizes; s != nil && p.OK && (s.Left < 0 || s.Needed > mostInVNet || s.Needed+s.Left != s.Available || s.MoreAtOnce > s.MoreNodes) {
			t.Errorf("it fits with %+v", *s)
		}
		for line := range strings.Lines(p.Text()) {
			if line = strings.TrimSuffix(line, "\n"); len(line) > columns || strings.ContainsFunc(line, func(r rune) bool { return r < ' ' || r > '~' }) {
				t.Errorf("a line of %d: %q", len(line), line)
			}
		}
		form, err := p.JSON()
		var again Plan
		if err == nil {
			err = json.Unmarshal(form, &again)
		}
		if diff := cmp.Diff(p, again, cmpopts.IgnoreUnexported(Plan{}, Sizes{}, Nodes{}, Finding{}), cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); err != nil || diff != "" {
			t.Errorf("%v\n%s", err, diff)
		}
		// The secret of the documentation's example, unless it stands in another value too.
		const secret = "azure123"
		if n := bytes.Count(body, []byte(secret)); n > 0 && n == bytes.Count(body, []byte(`"secret": "`+secret)) && !bytes.Contains(body, []byte(`\`)) {
			neverShows(t, p, secret)
		}
	})
}

func checkFindings(t *testing.T, p Plan, body []byte) {
	t.Helper()
	lines := strings.Split(string(body), "\n")
	sorted := slices.IsSortedFunc(p.Findings, func(a, b Finding) int { return (a.Line-b.Line)*1_000_000 + a.Column - b.Column })
	faults := slices.ContainsFunc(p.Findings, func(f Finding) bool { return !f.Warning })
	if !sorted || p.OK == faults || p.OK && p.Sizes == nil || p.Answer == "" {
		t.Errorf("%+v", p)
	}
	for _, f := range p.Findings {
		if f.Line < 1 || f.Line > len(lines) || f.Column < 1 || f.Column > utf8.RuneCountInString(lines[f.Line-1])+1 || f.Problem == "" || f.Remedy == "" {
			t.Errorf("%+v", f)
		}
	}
	if clean, _, _ := withoutExtras(body); len(clean) != len(body) || bytes.Count(clean, []byte("\n")) != bytes.Count(body, []byte("\n")) {
		t.Errorf("the places of %q moved", body)
	}
}
