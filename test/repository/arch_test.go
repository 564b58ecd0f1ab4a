// Copyright (c) The azure-vnet authors. MIT licence.

package repository

import (
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"azurevnet/test"
)

const module = "azurevnet"

// arrows are the design: what each package of the product may import of the
// product. A package that is not listed may not exist.
var arrows = map[string][]string{
	"azurevnet":                 {"internal/plugin"},
	"azurevnet/internal/plugin": {"bridge", "driver", "internal/failure", "internal/statefile", "internal/upkeep", "ipamdriver", "pool"},
	"azurevnet/internal/upkeep": {"bridge", "internal/statefile", "pool"},
	"azurevnet/driver":          {"bridge", "pool", "internal/statefile"},
	"azurevnet/ipamdriver":      {"pool"},
	"azurevnet/bridge": {"bridge/internal/conntrack", "bridge/internal/ebtables", "bridge/internal/firewalld", "bridge/internal/forward",
		"bridge/internal/listen", "bridge/internal/rtnl", "bridge/internal/ruleset", "internal/dump", "internal/statefile"},
	"azurevnet/bridge/internal/conntrack": {"internal/dump"},
	"azurevnet/bridge/internal/ebtables":  {"bridge/internal/nfnl"},
	"azurevnet/bridge/internal/firewalld": {"bridge/internal/nfnl"},
	"azurevnet/bridge/internal/forward":   {"bridge/internal/nfnl"},
	"azurevnet/bridge/internal/listen":    {"bridge/internal/rtnl", "internal/dump"},
	"azurevnet/bridge/internal/nfnl":      {"bridge/internal/rtnl", "internal/dump"},
	"azurevnet/bridge/internal/rtnl":      {"internal/dump"},
	"azurevnet/bridge/internal/ruleset":   {"bridge/internal/nfnl"},
	"azurevnet/pool":                      {"internal/dump", "internal/statefile"},
	"azurevnet/cmd/azure-vnet":            {"bridge", "internal/cni", "internal/dump", "internal/lender", "internal/upkeep", "pool"},
	"azurevnet/cmd/azure-vnet-ipam":       {"internal/cni", "internal/lender", "pool"},
	"azurevnet/cmd/azure-vnetctl":         {"internal/plan"},
	"azurevnet/internal/cni":              {"internal/failure", "internal/statefile"},
	"azurevnet/internal/lender":           {"bridge", "internal/cni", "internal/upkeep", "pool"},
	"azurevnet/internal/failure":          {},
	"azurevnet/internal/dump":             {},
	"azurevnet/internal/plan":             {},
	"azurevnet/internal/statefile":        {},
	"azurevnet/internal/vnetsim":          {},
	"azurevnet/internal/vnetsim/vnetsim":  {"internal/vnetsim"},
	"azurevnet/bench":                     {"internal/vnetsim"},
	"azurevnet/test":                      {"internal/dump", "internal/statefile", "internal/vnetsim"},
	"azurevnet/test/docker":               {},
	"azurevnet/test/cni":                  {},
	"azurevnet/test/host":                 {},
	"azurevnet/test/kill":                 {},
	"azurevnet/test/repository":           {},
	"azurevnet/test/random":               {},
	"azurevnet/test/demo":                 {"internal/vnetsim"},
}

// foreign are arrows to the outside that the design forbids.
var foreign = map[string][]string{
	"azurevnet/bridge":             {"github.com/docker/", "github.com/containernetworking/", "github.com/sirupsen/", "net/http"},
	"azurevnet/pool":               {"github.com/docker/", "github.com/containernetworking/", "github.com/sirupsen/", "os/exec"},
	"azurevnet/internal/statefile": {"github.com/docker/", "github.com/sirupsen/", "net", "os/exec"},
	"azurevnet/internal/plan":      {"github.com/spf13/", "net", "os", "os/exec"},
}

type goPackage struct {
	ImportPath                string
	Dir                       string
	Name                      string
	Doc                       string
	GoFiles                   []string
	TestGoFiles, XTestGoFiles []string
	Imports                   []string
}

func packages(t *testing.T) []goPackage {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Dir,Name,Doc,GoFiles,TestGoFiles,XTestGoFiles,Imports", module+"/...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []goPackage
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		switch err := dec.Decode(&p); {
		case errors.Is(err, io.EOF):
			return all
		case err != nil:
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func TestPackagesImportOnlyWhatTheDesignDraws(t *testing.T) {
	for _, p := range packages(t) {
		allowed, listed := arrows[p.ImportPath]
		if !listed {
			t.Errorf("%s has no place in the design: draw its arrows here and in docs/design.md", p.ImportPath)
			continue
		}
		for _, arrow := range allowed {
			if !slices.Contains(p.Imports, module+"/"+arrow) {
				t.Errorf("%s does not import %s, which the design draws", p.ImportPath, arrow)
			}
		}
		for _, imp := range p.Imports {
			if own, ok := strings.CutPrefix(imp, module+"/"); ok && !slices.Contains(allowed, own) {
				t.Errorf("%s imports %s, which the design does not draw", p.ImportPath, own)
			}
			for _, bad := range foreign[p.ImportPath] {
				if imp == bad || strings.HasSuffix(bad, "/") && strings.HasPrefix(imp, bad) {
					t.Errorf("%s imports %s: that belongs to another layer", p.ImportPath, imp)
				}
			}
		}
	}
}

// TestTheDrawingHasTheSameArrows: the drawing in docs/design.md is what people read.
func TestTheDrawingHasTheSameArrows(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(test.Top, "docs", "design.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, drawing, _ := strings.Cut(string(text), "## The packages\n")
	_, drawing, _ = strings.Cut(drawing, "```\n")
	drawing, _, _ = strings.Cut(drawing, "```\n")
	drawn, here, column := map[string][]string{}, "", 0
	for line := range strings.Lines(drawing) {
		row := []rune(strings.TrimRight(line, "\n"))
		if row[0] != ' ' {
			here = strings.TrimSuffix(module+"/"+strings.Fields(line)[0], "/.")
			drawn[here] = []string{}
		}
		if i := slices.Index(row, '→'); i >= 0 {
			column = i
		}
		if len(row) <= column {
			continue
		}
		for _, arrow := range strings.Fields(strings.Trim(string(row[column:]), "→ ")) {
			arrow = strings.Replace(strings.Trim(arrow, ","), "…/", "bridge/internal/", 1)
			if arrow != "nothing" {
				drawn[here] = append(drawn[here], arrow)
			}
		}
	}
	sorted := cmpopts.SortSlices(strings.Compare)
	if diff := cmp.Diff(arrows, drawn, sorted, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("docs/design.md draws other arrows (- here, + there):\n%s", diff)
	}
}

// lists matches the functions of the netlink library that list kernel state, and the
// flag of a message that asks for a list.
var lists = regexp.MustCompile(`^[A-Z].*List(Filtered|FilteredIter|Execute)?$|^LinkByAlias$|^ConntrackDelete|^SocketDiag|^NLM_F_DUMP$`)

// TestListsOfTheKernelAreComplete: the kernel may interrupt a listing, which then lacks
// entries. Every listing is in a function that is given to dump.Whole, which repeats it. Tests too: what they make and
// delete interrupts their own listings.
func TestListsOfTheKernelAreComplete(t *testing.T) {
	found := 0
	for _, p := range packages(t) {
		for _, name := range slices.Concat(p.GoFiles, p.TestGoFiles, p.XTestGoFiles) {
			files := token.NewFileSet()
			f, err := parser.ParseFile(files, filepath.Join(p.Dir, name), nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			if !slices.ContainsFunc(f.Imports, func(i *ast.ImportSpec) bool { return strings.Contains(i.Path.Value, "vishvananda/netlink") }) {
				continue
			}
			repeated := map[ast.Node]bool{}
			ast.Inspect(f, func(n ast.Node) bool {
				if call, ok := n.(*ast.CallExpr); ok && nameOf(call.Fun) == "Whole" {
					ast.Inspect(call, func(n ast.Node) bool { repeated[n] = true; return true })
				}
				if s, ok := n.(*ast.SelectorExpr); ok && lists.MatchString(s.Sel.Name) {
					found++
					if !repeated[n] {
						t.Errorf("%s: %s is not given to dump.Whole, which repeats it", files.Position(n.Pos()), s.Sel.Name)
					}
				}
				return true
			})
		}
	}
	if found < 10 {
		t.Errorf("only %d listings were found: this test is blind", found)
	}
}

// nameOf is the last word of what is called.
func nameOf(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name
	case *ast.SelectorExpr:
		return e.Sel.Name
	}
	return ""
}

func TestEveryPackageSaysWhatItIs(t *testing.T) {
	nouns := []string{"util", "utils", "common", "types", "manager", "config", "helpers", "platform", "wrapper"}
	for _, p := range packages(t) {
		if p.ImportPath != module+"/test" && p.Doc == "" {
			t.Errorf("%s has no package comment", p.ImportPath)
		}
		if slices.Contains(nouns, path.Base(p.ImportPath)) {
			t.Errorf("%s: a package is one noun of the field, and %s is none", p.ImportPath, path.Base(p.ImportPath))
		}
	}
}

// long are the functions of more than 60 lines and the files of more than 400, each with the reason.
var long = map[string]string{}

// TestWhatIsReadInOneSitting: a function fits a screen, and a file one sitting.
func TestWhatIsReadInOneSitting(t *testing.T) {
	found := map[string]bool{}
	check := func(what string, lines, most int) {
		if lines <= most {
			return
		}
		found[what] = true
		if long[what] == "" {
			t.Errorf("%s has %d lines, and %d are one sitting: cut it, or give the reason here", what, lines, most)
		}
	}
	for _, p := range packages(t) {
		for _, name := range p.GoFiles {
			files := token.NewFileSet()
			f, err := parser.ParseFile(files, filepath.Join(p.Dir, name), nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			file := strings.TrimPrefix(p.ImportPath, module+"/") + "/" + name
			check(file, files.Position(f.End()).Line, 400)
			for _, d := range f.Decls {
				if fn, ok := d.(*ast.FuncDecl); ok {
					check(file+": "+fn.Name.Name, files.Position(fn.End()).Line-files.Position(fn.Pos()).Line+1, 60)
				}
			}
		}
	}
	for what := range long {
		if !found[what] {
			t.Errorf("%s is not long any more", what)
		}
	}
	if len(long) > 10 {
		t.Errorf("%d exceptions are no exceptions", len(long))
	}
}

// TestEveryExportedNameIsExplained, where another package can use it.
func TestEveryExportedNameIsExplained(t *testing.T) {
	found := 0
	for _, p := range packages(t) {
		if p.Name == "main" {
			continue
		}
		for _, name := range p.GoFiles {
			files := token.NewFileSet()
			f, err := parser.ParseFile(files, filepath.Join(p.Dir, name), nil, parser.SkipObjectResolution|parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			unexplained := func(id *ast.Ident, docs ...*ast.CommentGroup) {
				if !id.IsExported() {
					return
				}
				found++
				if !slices.ContainsFunc(docs, func(d *ast.CommentGroup) bool { return d.Text() != "" }) {
					t.Errorf("%s: %s has no comment", files.Position(id.Pos()), id.Name)
				}
			}
			for _, d := range f.Decls {
				switch d := d.(type) {
				case *ast.FuncDecl:
					if d.Recv == nil || ast.IsExported(nameOf(bare(d.Recv.List[0].Type))) {
						unexplained(d.Name, d.Doc)
					}
				case *ast.GenDecl:
					for _, s := range d.Specs {
						switch s := s.(type) {
						case *ast.TypeSpec:
							unexplained(s.Name, d.Doc, s.Doc, s.Comment)
						case *ast.ValueSpec:
							for _, id := range s.Names {
								unexplained(id, d.Doc, s.Doc, s.Comment)
							}
						}
					}
				}
			}
		}
	}
	if found < 100 {
		t.Errorf("only %d exported names were found: this test is blind", found)
	}
}

// bare is a receiver's type without its star.
func bare(e ast.Expr) ast.Expr {
	if s, ok := e.(*ast.StarExpr); ok {
		return s.X
	}
	return e
}
