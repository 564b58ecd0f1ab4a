// Copyright (c) The azure-vnet authors. MIT licence.

package repository

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"azurevnet/test"
)

// testFiles are the declarations of a package's files of tests.
type testFiles struct {
	files []*ast.File
	named map[string][]ast.Node // by name, methods too
}

func readTests(t *testing.T, p goPackage) (all testFiles) {
	t.Helper()
	all.named = map[string][]ast.Node{}
	for _, name := range slices.Concat(p.TestGoFiles, p.XTestGoFiles) {
		f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, name), nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		all.files = append(all.files, f)
		for _, d := range f.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				all.named[d.Name.Name] = append(all.named[d.Name.Name], d)
			case *ast.GenDecl:
				for _, s := range d.Specs {
					if v, ok := s.(*ast.ValueSpec); ok {
						for _, id := range v.Names {
							all.named[id.Name] = append(all.named[id.Name], v)
						}
					}
				}
			}
		}
	}
	return all
}

// runs says when a test runs: test, part or soak, as docs/reliability.md explains these words.
func (all testFiles) runs(name string) string {
	for _, d := range all.named[name] {
		for _, s := range d.(*ast.FuncDecl).Body.List {
			if s, ok := s.(*ast.IfStmt); ok && all.asksForSoak(s.Cond, nil) && calls(s.Body, "Skip") {
				return "soak"
			}
		}
		if all.asksForSoak(d, map[string]bool{name: true}) {
			return "part"
		}
	}
	return "test"
}

// asksForSoak reports whether the code, or what it uses of its package's tests, asks whether make soak runs it.
func (all testFiles) asksForSoak(code ast.Node, seen map[string]bool) (asks bool) {
	if seen == nil {
		seen = map[string]bool{}
	}
	ast.Inspect(code, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.BasicLit:
			asks = asks || n.Value == `"SOAK"`
		case *ast.SelectorExpr:
			x, _ := n.X.(*ast.Ident)
			asks = asks || x != nil && x.Name == "random" && n.Sel.Name == "Check" // which asks for SOAK
		case *ast.Ident:
			asks = asks || n.Name == "Soaking" || n.Name == "SoakTime"
			if !seen[n.Name] {
				seen[n.Name] = true
				for _, d := range all.named[n.Name] {
					asks = asks || all.asksForSoak(d, seen)
				}
			}
		}
		return !asks
	})
	return asks
}

// calls reports whether the code calls a function or method of that name.
func calls(code ast.Node, name string) (found bool) {
	ast.Inspect(code, func(n ast.Node) bool {
		if c, ok := n.(*ast.CallExpr); ok && nameOf(c.Fun) == name {
			found = true
		}
		return !found
	})
	return found
}

// TestReliabilityTable: each row of docs/reliability.md names tests that exist, and says when they run. So the table
// does not promise what nobody tests any more.
func TestReliabilityTable(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(test.Top, "docs", "reliability.md"))
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]testFiles{}
	for _, p := range packages(t) {
		tests[strings.TrimPrefix(p.ImportPath, module+"/")] = readTests(t, p)
	}
	rows, named := 0, regexp.MustCompile("`([a-z/-]+)\\.((?:Test|Fuzz)\\w+)`")
	for _, cells := range regexp.MustCompile(`(?m)^\| (\d+) \| (.+) \| (.+) \| (.+) \|$`).FindAllStringSubmatch(string(text), -1) {
		rows++
		if cells[1] != strconv.Itoa(rows) {
			t.Errorf("row %d has the number %s", rows, cells[1])
		}
		if words := len(strings.Fields(cells[2])); words > 12 {
			t.Errorf("row %d says the failure in %d words", rows, words)
		}
		var when []string
		for _, m := range named.FindAllStringSubmatch(cells[3], -1) {
			if len(tests[m[1]].named[m[2]]) == 0 {
				t.Errorf("row %d: there is no test %s.%s", rows, m[1], m[2])
				continue
			}
			when = append(when, tests[m[1]].runs(m[2]))
		}
		slices.Sort(when)
		if want := strings.Join(slices.Compact(when), ", "); want == "" || cells[4] != want {
			t.Errorf("row %d: its tests run %q, and it says %q", rows, want, cells[4])
		}
	}
	if rows < 60 {
		t.Errorf("%d rows were found: this test is blind", rows)
	}
}

// TestEverySkipHasAReason: a test that is skipped says why.
func TestEverySkipHasAReason(t *testing.T) {
	found := 0
	for _, p := range packages(t) {
		for _, f := range readTests(t, p).files {
			ast.Inspect(f, func(n ast.Node) bool {
				c, ok := n.(*ast.CallExpr)
				if !ok || !slices.Contains([]string{"Skip", "Skipf", "SkipNow"}, nameOf(c.Fun)) {
					return true
				}
				found++
				if len(c.Args) == 0 && !isFuzz(f, c) {
					t.Errorf("%s: a test is skipped, and nobody says why", p.ImportPath)
				}
				return true
			})
		}
	}
	if found < 10 {
		t.Errorf("%d skips were found: this test is blind", found)
	}
}

// isFuzz reports whether a call is in a fuzz target, which skips inputs and not tests.
func isFuzz(f *ast.File, c *ast.CallExpr) bool {
	return slices.ContainsFunc(f.Decls, func(d ast.Decl) bool {
		fn, ok := d.(*ast.FuncDecl)
		return ok && strings.HasPrefix(fn.Name.Name, "Fuzz") && fn.Pos() <= c.Pos() && c.Pos() <= fn.End()
	})
}

// TestFiguresHaveOneForm: make soak adds up the numbers that tests log, which it finds by their form.
func TestFiguresHaveOneForm(t *testing.T) {
	form, found := regexp.MustCompile(`^FIGURE [a-z][a-z ]*: %d [a-z][a-z -]*(, %d [a-z][a-z -]*)*$`), 0
	for _, p := range packages(t) {
		for _, f := range readTests(t, p).files {
			ast.Inspect(f, func(n ast.Node) bool {
				if s, ok := n.(*ast.BasicLit); ok && strings.HasPrefix(s.Value, `"FIGURE `) && p.ImportPath != module+"/test/repository" {
					found++
					if text, err := strconv.Unquote(s.Value); err != nil || !form.MatchString(text) {
						t.Errorf("%s: %s has not the form of CONTRIBUTING.md", p.ImportPath, s.Value)
					}
				}
				return true
			})
		}
	}
	if found < 4 {
		t.Errorf("%d figures were found: this test is blind", found)
	}
}

// TestSoakSummary: the table has the sums of what tests logged, and names what failed. A run that did not end has no
// good summary.
func TestSoakSummary(t *testing.T) {
	const log = `soak.sh: ABOUT command: make soak SOAK=1h FUZZ=2m
soak.sh: ABOUT CPUs: 2
soak.sh: tests of the packages
    a_test.go:3: FIGURE kill matrix: 3 kills, 40 steps
--- PASS: TestA (0.10s)
    --- PASS: TestA/one (0.10s)
        a_test.go:3: FIGURE kill matrix: 4 kills, 50 steps
--- SKIP: TestB (0.00s)
--- FAIL: TestC (0.10s)
    c_test.go:9: FIGURE storms: 12 kills, 0 failures
soak.sh: FAILED: tests of the packages
soak.sh: fuzz target FuzzA in pool
fuzz: elapsed: 3s, execs: 10 (3/sec), new interesting: 1 (total: 2)
fuzz: elapsed: 6s, execs: 3000000000 (3/sec), new interesting: 1 (total: 2)
soak.sh: fuzz target FuzzA in driver
fuzz: elapsed: 3s, execs: 5 (3/sec), new interesting: 1 (total: 2)
soak.sh: FAILED: fuzz target FuzzA in driver
`
	const table = `| what | figure |
|---|---|
| command | make soak SOAK=1h FUZZ=2m |
| CPUs | 2 |
| minutes | 90 |
| tests | 1 passed, 1 failed, 1 skipped |
| kill matrix | 7 kills, 90 steps |
| storms | 12 kills, 0 failures |
| fuzzing | 2 targets, 3000000005 executions |
| failed | tests of the packages; fuzz target FuzzA in driver |
`
	const end = "soak.sh: ABOUT minutes: 90\n"
	failed := regexp.MustCompile(`(?m)^soak.sh: FAILED: .*\n`)
	for _, c := range []struct {
		name, log, want string
		status          int
	}{
		{"with failures", log + end, table, 1},
		{"without", failed.ReplaceAllString(log, "") + end, strings.Replace(table, "tests of the packages; fuzz target FuzzA in driver", "nothing", 1), 0},
		{"broken off", failed.ReplaceAllString(log, ""), strings.NewReplacer("| minutes | 90 |\n", "", "tests of the packages; fuzz target FuzzA in driver", "the run did not end").Replace(table), 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "soak.log")
			if err := os.WriteFile(file, []byte(c.log), 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(filepath.Join(test.Top, "scripts", "soak.sh"), "summary", file)
			out, err := cmd.Output()
			if diff := cmp.Diff(c.want, string(out)); diff != "" || cmd.ProcessState.ExitCode() != c.status {
				t.Errorf("exit %d, %v (-want +got):\n%s", cmd.ProcessState.ExitCode(), err, diff)
			}
		})
	}
}
