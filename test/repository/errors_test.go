// Copyright (c) The azure-vnet authors. MIT licence.

package repository

import (
	"flag"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"azurevnet/test"
)

var update = flag.Bool("update", false, "add a row to docs/errors.md for each error that has none")

// TestEveryErrorIsExplained: docs/errors.md has a row for each error that the product and its scripts can give, with
// its text, why it comes and what to do. A new or changed text fails until its row is there. A part of an error that
// only says what was being done, such as "read the links: %w", has no row.
func TestEveryErrorIsExplained(t *testing.T) {
	doc := filepath.Join(test.Top, "docs", "errors.md")
	text, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		cells := regexp.MustCompile(`^\| (.*) \| (.*) \| (.*) \|\n$`).FindStringSubmatch(line)
		if cells == nil || cells[1] == "error" {
			continue
		}
		if rows[cells[1]] {
			t.Errorf("docs/errors.md has two rows of %s", cells[1])
		}
		rows[cells[1]] = true
		if len(cells[2]) < 10 || len(cells[3]) < 4 {
			t.Errorf("docs/errors.md does not say why this comes, or what to do: %s", cells[1])
		}
	}
	given := map[string]string{} // by row: where
	for _, p := range packages(t) {
		if _, product := faces[strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")]; !product {
			continue
		}
		for _, name := range p.GoFiles {
			for _, e := range errorTexts(t, filepath.Join(p.Dir, name)) {
				given[asRow(e)] = p.ImportPath
			}
		}
	}
	if len(given) < 200 {
		t.Errorf("only %d errors were found: this test is blind", len(given))
	}
	ofScripts := 0
	for _, script := range usersScripts {
		for _, text := range scriptTexts(t, script) {
			given["`"+text+"`"] = script
			ofScripts++
		}
	}
	if ofScripts < 60 {
		t.Errorf("only %d errors of scripts were found: this test is blind", ofScripts)
	}
	var missing []string
	for _, row := range slices.Sorted(maps.Keys(given)) {
		if !rows[row] {
			missing = append(missing, row)
			t.Errorf("docs/errors.md has no row for an error of %s: %s", given[row], row)
		}
	}
	for row := range rows {
		if _, is := given[row]; !is {
			t.Errorf("docs/errors.md explains an error that nothing gives: %s", row)
		}
	}
	if *update && len(missing) > 0 {
		for _, row := range missing {
			text = append(text, "| "+row+" |  |  |\n"...)
		}
		if err := os.WriteFile(doc, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// faces are the packages whose errors reach a user, as import paths below the module.
var faces = func() map[string]bool {
	all := map[string]bool{}
	for path := range arrows {
		in := strings.TrimPrefix(strings.TrimPrefix(path, module), "/")
		if !strings.HasPrefix(in, "internal/vnetsim") && !strings.HasPrefix(in, "test") && in != "bench" {
			all[in] = true
		}
	}
	return all
}()

// during matches a text that only says what was being done when another error came.
var during = regexp.MustCompile(`^[^;]*: %w$`)

var verb = regexp.MustCompile(`%(\[\d\])?[-+# 0]*[\d.]*[a-zA-Z]`)

// saysNothing is true of a text that only joins others, such as "%w: %s".
func saysNothing(text string) bool {
	return during.MatchString(text) || !regexp.MustCompile(`\pL`).MatchString(verb.ReplaceAllString(text, ""))
}

// errorTexts are the texts that a file gives errors, as they stand in it.
func errorTexts(t *testing.T, path string) (texts []string) {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	makers := []string{"Errorf", "New", "NewError", "wrong", "refuse", "changed"}
	worded := map[ast.Node]bool{} // calls of Sprintf that word an error of a type of its own
	ast.Inspect(f, func(n ast.Node) bool {
		method, _ := n.(*ast.FuncDecl)
		literal, _ := n.(*ast.CompositeLit)
		if method != nil && method.Recv != nil && method.Name.Name == "Error" || literal != nil && strings.HasSuffix(nameOf(literal.Type), "Error") {
			ast.Inspect(n, func(n ast.Node) bool { worded[n] = true; return true })
		}
		call, ok := n.(*ast.CallExpr)
		if !ok || !slices.Contains(makers, nameOf(call.Fun)) && !(worded[n] && nameOf(call.Fun) == "Sprintf") {
			return true
		}
		for _, arg := range call.Args {
			if in, ok := arg.(*ast.CallExpr); ok && nameOf(in.Fun) == "Sprintf" {
				arg = in.Args[0]
			}
			if text, ok := constant(arg); ok && !saysNothing(text) {
				texts = append(texts, text)
				break
			}
		}
		return true
	})
	return texts
}

// constant is a string in the source, with %s for each part that is none.
func constant(e ast.Expr) (text string, ok bool) {
	switch e := e.(type) {
	case *ast.BasicLit:
		text, err := strconv.Unquote(e.Value)
		return text, e.Kind == token.STRING && err == nil
	case *ast.BinaryExpr:
		a, okA := constant(e.X)
		b, okB := constant(e.Y)
		if !okA {
			a = "%s"
		}
		if !okB {
			b = "%s"
		}
		return a + b, okA || okB
	}
	return "", false
}

// asRow is a text as it stands in the table: an ellipsis stands for each value that is put in.
func asRow(text string) string {
	text = verb.ReplaceAllString(text, "…")
	text = strings.NewReplacer("%%", "%", "\n", " ", "|", `\|`, "`", "'").Replace(text)
	return "`" + strings.TrimSpace(strings.Join(strings.Fields(text), " ")) + "`"
}
