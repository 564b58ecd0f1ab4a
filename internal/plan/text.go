// Copyright (c) The azure-vnet authors. MIT licence.

package plan

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
)

// columns is the width of the text for people.
const columns = 80

// JSON returns the plan for programs. docs/planning.md has its schema.
func (p Plan) JSON() ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false) // no browser reads it, and people read -->
	err := e.Encode(p)
	return b.Bytes(), err
}

// Text returns the plan for people, in lines of at most 80 columns. The answer is the first.
func (p Plan) Text() string {
	var b strings.Builder
	wrap(&b, "", p.Answer)
	if p.Sizes != nil {
		b.WriteString("\n")
		p.Sizes.write(&b)
	}
	for _, f := range p.Findings {
		b.WriteString("\n")
		f.write(&b)
	}
	return b.String()
}

// write writes a finding: where, what and what to do.
func (f Finding) write(b *strings.Builder) {
	head := f.kind
	if f.Warning {
		head = "warning"
	}
	if f.Line > 0 {
		head = fmt.Sprintf("%d:%d %s", f.Line, f.Column, head)
	}
	wrap(b, "", strings.TrimSpace(head+" "+f.Key))
	wrap(b, "    ", f.Problem)
	wrap(b, "    ", "remedy: "+f.Remedy)
}

// answer says in one sentence that the cluster fits.
func (s *Sizes) answer() string {
	more := "more nodes fit"
	if s.MoreNodes == 1 {
		more = "more node fits"
	}
	if !s.isUniform() {
		more = fmt.Sprintf("%s, of %d addresses each", more, s.largest.PerNode)
	}
	return fmt.Sprintf("fits: %s of %s addresses used; %s %s", thousands(s.Needed), thousands(s.Available), thousands(s.MoreNodes), more)
}

// isUniform is true if each node has the same number of addresses.
func (s *Sizes) isUniform() bool {
	for _, n := range s.Nodes {
		if n.PerNode != s.largest.PerNode {
			return false
		}
	}
	return true
}

// write writes the table of the sizes, and what the static addresses mean for them.
func (s *Sizes) write(b *strings.Builder) {
	row := func(name, nodes, perNode, addresses string) {
		line := fmt.Sprintf("%-32s %6s  %8s  %12s", name, nodes, perNode, addresses)
		b.WriteString(strings.TrimRight(line, " ") + "\n")
	}
	row("", "nodes", "per node", "addresses")
	for _, n := range s.Nodes {
		name := printable(n.Name)
		if len(name) > 32 {
			name = name[:29] + "..."
		}
		row(name, thousands(n.Count), thousands(n.PerNode), thousands(n.Count*n.PerNode))
	}
	if s.LoadBalancer+s.Spare > 0 {
		row("load balancer of the masters", "", "", thousands(s.LoadBalancer))
		row("spare, behind the masters", "", "", thousands(s.Spare))
	}
	row("needed", "", "", thousands(s.Needed))
	subnet := s.Subnet.String()
	if s.Default {
		subnet += " (default)"
	}
	row("in "+subnet, "", "", thousands(s.Available))
	row("left", "", "", thousands(s.Left))
	row("more nodes that fit", thousands(s.MoreNodes), "", "")
	row("for an upgrade, one node more", "1", thousands(s.Upgrade), thousands(s.Upgrade))
	if s.MoreNodes > 0 && s.Left > mostInVNet-s.Needed {
		b.WriteString("\n")
		wrap(b, "", fmt.Sprintf("A VNet has at most %s addresses, so not all that are left can be used.", thousands(mostInVNet)))
	}
	if s.FirstStatic.IsValid() && s.LastDynamic.Less(s.FirstStatic) {
		b.WriteString("\n")
		wrap(b, "", s.static())
	}
}

// static says which addresses are the masters', and how many nodes fit before them.
func (s *Sizes) static() string {
	run := fmt.Sprintf("The master has the static address %s. ", s.FirstStatic)
	if s.FirstStatic != s.LastStatic {
		run = fmt.Sprintf("The masters have the static addresses %s to %s. ", s.FirstStatic, s.LastStatic)
	}
	run += fmt.Sprintf("Azure gives out the others from %s on, up to %s now. They must end before the static ones while the masters are made, ",
		addressAt(s.Subnet.Addr(), firstFree), s.LastDynamic)
	return run + fmt.Sprintf("so at most %s more nodes can be in this deployment.", thousands(s.MoreAtOnce))
}

// wrap writes a text in lines, each with the indent. It cuts words that are longer than a line, before a slash if it can.
func wrap(b *strings.Builder, indent, text string) {
	line := indent
	for _, word := range strings.Fields(text) {
		for line != indent && len(line)+1+len(word) > columns {
			b.WriteString(line + "\n")
			line = indent
		}
		if line != indent {
			line += " "
		}
		for len(line)+len(word) > columns {
			cut := columns - len(line)
			if slash := strings.LastIndexByte(word[:cut], '/'); slash > 0 {
				cut = slash
			}
			b.WriteString(line + word[:cut] + "\n")
			line, word = indent, word[cut:]
		}
		line += word
	}
	b.WriteString(line + "\n")
}

// thousands writes a number with a comma between each three digits.
func thousands(n int) string {
	text := fmt.Sprint(n)
	from := 1
	if n < 0 {
		from = 2
	}
	for i := len(text) - 3; i >= from; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
