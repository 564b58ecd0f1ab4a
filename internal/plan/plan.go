// Copyright (c) The azure-vnet authors. MIT licence.

// Package plan says how many addresses of its subnet a Kubernetes cluster needs, whether it fits, and what is wrong in
// its definition for ACS-Engine or AKS-Engine. It reads the text that it is given and nothing else: it opens no file,
// asks nobody, and knows neither this VM nor its pool of addresses.
package plan

import (
	"cmp"
	"fmt"
	"slices"
)

// Version is the version of the JSON form of a Plan. A key that is added does not change it.
const Version = 1

// Plan is what a cluster needs, and what is wrong with it.
type Plan struct {
	Version  int       `json:"version"`
	OK       bool      `json:"ok"`              // the cluster fits, and there is no fault; warnings may be there
	Answer   string    `json:"answer"`          // one sentence: that it fits, or the first fault with its remedy
	Sizes    *Sizes    `json:"sizes,omitempty"` // nil: a fault hides them, or the pods have no addresses of the VNet
	Findings []Finding `json:"findings"`        // in the order of the lines
}

// Finding is one fault, or one warning, with its place.
type Finding struct {
	Line    int    `json:"line,omitempty"`   // from 1; 0: there is no file
	Column  int    `json:"column,omitempty"` // from 1, in characters
	Warning bool   `json:"warning"`          // the cluster can be made as it is
	Key     string `json:"key,omitempty"`    // below "properties", such as masterProfile.count; empty: the whole file
	Problem string `json:"problem"`
	Remedy  string `json:"remedy"`

	kind string // the first word of an answer with this fault
}

// Kinds of faults.
const (
	wrong  = "wrong"        // a value that the engines or Azure refuse, or that cuts nodes or pods off
	noFit  = "does not fit" // the subnet or the VNet is too small
	noPlan = "no plan"      // this is no cluster whose pods get addresses of the VNet
)

// Read checks a definition. It finds all faults, but for those behind a place where the text is no JSON.
func Read(definition []byte) Plan {
	r := &report{text: definition}
	clean, remarks, ellipses := withoutExtras(definition)
	r.noteExtras(remarks, ellipses)
	root, offset, err := parse(clean)
	if err != nil {
		r.fault(&value{offset: offset}, "this is no JSON: "+err.Error(), "correct this place first; nothing else is checked before")
		return r.plan(nil)
	}
	r.checkKeys(root)
	r.checkSecrets(root)
	properties := root.get("properties")
	if properties.kind != '{' {
		r.add(root, Finding{Problem: `it has no object "properties", so this is no definition of a cluster`,
			Remedy: "give the file that acs-engine generate or aks-engine generate reads", kind: noPlan})
		return r.plan(nil)
	}
	if !r.isKubernetes(properties) {
		return r.plan(nil)
	}
	return r.plan(r.checkCluster(properties))
}

// Size plans a cluster that has no definition. Its faults have no place.
func Size(c Cluster) Plan {
	r := &report{}
	s := sizesOf(c)
	r.checkSizes(&value{name: "subnet"}, s)
	return r.plan(s)
}

// report collects what is found in a definition.
type report struct {
	text  []byte // nil: there is no definition
	found []Finding
}

// add completes a finding by its place, and notes it.
func (r *report) add(at *value, f Finding) {
	f.Key = at.path()
	if r.text != nil {
		f.Line, f.Column = place(r.text, at.offset)
	}
	r.found = append(r.found, f)
}

// fault notes that the cluster cannot be made as it is defined, or does not work.
func (r *report) fault(at *value, problem, remedy string) {
	r.add(at, Finding{Problem: problem, Remedy: remedy, kind: wrong})
}

// warn notes what the engines accept, and what may be meant so.
func (r *report) warn(at *value, problem, remedy string) {
	r.add(at, Finding{Problem: problem, Remedy: remedy, Warning: true})
}

// plan returns all that was found. No sizes: they are not known.
func (r *report) plan(s *Sizes) Plan {
	slices.SortStableFunc(r.found, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	p := Plan{Version: Version, Sizes: s, Findings: append([]Finding{}, r.found...)}
	i := slices.IndexFunc(r.found, func(f Finding) bool { return !f.Warning })
	if i >= 0 {
		p.Answer = r.found[i].answer()
		return p
	}
	p.OK = true
	p.Answer = s.answer()
	return p
}

// answer is a fault in one sentence, with its place.
func (f Finding) answer() string {
	said := f.kind + ": "
	switch {
	case f.Line > 0 && f.Key != "":
		said += fmt.Sprintf("line %d, %s: ", f.Line, f.Key)
	case f.Line > 0:
		said += fmt.Sprintf("line %d: ", f.Line)
	}
	return said + f.Problem + "; " + f.Remedy
}
