// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path"
	"slices"
	"strings"
	"testing"
)

const module = "azurevnet"

// arrows are the design: what each package of the product may import of the
// product. A package that is not listed may not exist.
var arrows = map[string][]string{
	"azurevnet":                          {"bridge", "driver", "internal/statefile", "ipamdriver", "pool"},
	"azurevnet/driver":                   {"bridge", "pool", "internal/statefile"},
	"azurevnet/ipamdriver":               {"pool"},
	"azurevnet/bridge":                   {"internal/statefile"},
	"azurevnet/pool":                     {"internal/statefile"},
	"azurevnet/cmd/azure-vnet":           {"bridge", "internal/cni", "internal/statefile", "pool"},
	"azurevnet/cmd/azure-vnet-ipam":      {"internal/cni", "pool"},
	"azurevnet/internal/cni":             {"bridge", "pool"},
	"azurevnet/internal/statefile":       {},
	"azurevnet/internal/vnetsim":         {},
	"azurevnet/internal/vnetsim/vnetsim": {"internal/vnetsim"},
	"azurevnet/bench":                    {"internal/vnetsim"},
	"azurevnet/test":                     {},
	"azurevnet/test/demo":                {"internal/vnetsim"},
}

// foreign are arrows to the outside that the design forbids.
var foreign = map[string][]string{
	"azurevnet/bridge":             {"github.com/docker/", "github.com/containernetworking/", "github.com/sirupsen/", "net/http"},
	"azurevnet/pool":               {"github.com/docker/", "github.com/containernetworking/", "github.com/sirupsen/", "os/exec"},
	"azurevnet/internal/statefile": {"github.com/docker/", "github.com/sirupsen/", "net", "os/exec"},
}

type goPackage struct {
	ImportPath string
	Name       string
	Doc        string
	Imports    []string
}

func packages(t *testing.T) []goPackage {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Name,Doc,Imports", module+"/...").Output()
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
