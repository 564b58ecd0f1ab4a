// Copyright (c) The azure-vnet authors. MIT licence.

package repository

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"azurevnet/test"
)

// usersScripts are the scripts that users run, by themselves or by make. The others are for who develops.
var usersScripts = []string{"docker-run.sh", "scripts/docker-del.sh", "scripts/install-cni-plugin.sh", "scripts/plugin.sh", "scripts/rootfs.sh", "scripts/dist.sh"}

// progress are texts that a script tells beside its errors.
var progress = []string{"pulling …"}

var (
	// die has an exit status in some scripts. docker-run.sh tells by say, on stderr, what a failure leaves.
	tells    = regexp.MustCompile(`\b(die(?: \d)?|warn|say|echo) "`)
	ownName  = regexp.MustCompile(`^[a-z-]+\.sh: (warning: )?`)
	variable = regexp.MustCompile(`^\$(\w+|[*#@])`)
)

// scriptTexts are the texts of a script's errors, with an ellipsis for each value that is put in.
func scriptTexts(t *testing.T, script string) (texts []string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(test.Top, script))
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range tells.FindAllSubmatchIndex(text, -1) {
		line, _, _ := strings.Cut(string(text[at[0]:]), "\n")
		switch how := string(text[at[2]:at[3]]); {
		case how == "say" && script != "docker-run.sh", how == "echo" && !strings.Contains(line, ">&2"):
			continue
		}
		said := ownName.ReplaceAllString(quoted(string(text[at[1]:])), "")
		if regexp.MustCompile(`\pL`).MatchString(said) && !slices.Contains(progress, said) {
			texts = append(texts, strings.NewReplacer("|", `\|`, "`", "'").Replace(said))
		}
	}
	return texts
}

// quoted is the text in double quotes that s begins with, without its first quote.
func quoted(s string) string {
	var out strings.Builder
	for s != "" && s[0] != '"' {
		value := variable.FindString(s)
		switch {
		case s[0] == '\\':
			out.WriteByte(s[1])
			s = s[2:]
			continue
		case strings.HasPrefix(s, "$("):
			value = s[:matching(s, '(', ')')]
		case strings.HasPrefix(s, "${"):
			value = s[:matching(s, '{', '}')]
		case value == "":
			out.WriteByte(s[0])
			s = s[1:]
			continue
		}
		out.WriteString("…")
		s = s[len(value):]
	}
	return out.String()
}

// matching is the length of s up to the bracket that closes its first one.
func matching(s string, open, end rune) int {
	depth := 0
	for i, c := range s {
		switch c {
		case open:
			depth++
		case end:
			if depth--; depth == 0 {
				return i + 1
			}
		}
	}
	return len(s)
}
