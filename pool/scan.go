// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"strconv"
	"time"
)

// Scan reads leases.json as Marshal writes a state: no space, known fields only,
// in their order. Anything else it leaves to package json, by returning false.
// Every process reads the whole file for every change, and with 256 leases
// package json takes more than a millisecond for that: several times as long.
func (s *state) Scan(body []byte) bool {
	r := &scanner{in: bytes.TrimSuffix(body, []byte("\n"))}
	r.object(func() {
		if r.key("version") {
			s.Version = int(r.number())
		}
		if r.key("boot") {
			s.Boot = r.text()
		}
		if r.key("adopted") {
			s.Adopted = r.boolean()
		}
		if r.key("answers") {
			s.Answers = map[string]answer{}
			r.entries(func(name string) { s.Answers[name] = r.answer() })
		}
		if r.key("leases") {
			s.Leases = make(map[netip.Addr]record, 256)
			r.entries(func(a string) { s.Leases[r.addr(a)] = r.record() })
		}
		if r.key("freed") {
			s.Freed = map[netip.Addr]rest{}
			r.entries(func(a string) { s.Freed[r.addr(a)] = r.rest() })
		}
	})
	return !r.bad && len(r.in) == r.at
}

// scanner reads compact JSON. Once bad, it stays so and moves no further.
type scanner struct {
	in  []byte
	at  int
	bad bool

	// The last of each, in quotes, and what it meant: most leases have the same.
	macText, prefixText string
	lastMAC             string
	lastPrefix          netip.Prefix
}

func (r *scanner) answer() (a answer) {
	r.object(func() {
		if r.key("nics") {
			r.list(func() { a.NICs = append(a.NICs, r.nic()) })
		}
		if r.key("at") {
			a.At = time.Duration(r.number())
		}
		if r.key("notes") {
			r.list(func() { a.Notes = append(a.Notes, r.text()) })
		}
		if r.key("failure") {
			a.Failure = r.text()
		}
		if r.key("failedAt") {
			a.FailedAt = time.Duration(r.number())
		}
	})
	return a
}

func (r *scanner) nic() (n NIC) {
	r.object(func() {
		if r.key("mac") {
			n.MAC = r.text()
		}
		if r.key("primary") {
			n.Primary = r.boolean()
		}
		if r.key("subnets") {
			r.list(func() { n.Subnets = append(n.Subnets, r.subnet()) })
		}
	})
	return n
}

func (r *scanner) subnet() (s Subnet) {
	r.object(func() {
		if r.key("prefix") {
			s.Prefix = r.prefix()
		}
		if r.key("primary") {
			s.Primary = r.addr(r.text())
		}
		if r.key("secondary") {
			r.list(func() { s.Secondary = append(s.Secondary, r.addr(r.text())) })
		}
	})
	return s
}

func (r *scanner) record() (l record) {
	r.object(func() {
		if r.key("owner") {
			l.Owner = r.text()
		}
		if r.key("mac") {
			l.MAC = r.mac()
		}
		if r.key("prefix") {
			l.Prefix = r.prefix()
		}
		if r.key("since") {
			l.Since = time.Duration(r.number())
		}
		if r.key("linkless") {
			l.Linkless = r.boolean()
		}
		if r.key("early") {
			l.Early = r.boolean()
		}
		if r.key("confirmed") {
			l.Confirmed = time.Duration(r.number())
		}
	})
	return l
}

func (r *scanner) rest() (f rest) {
	r.object(func() {
		if r.key("at") {
			f.At = time.Duration(r.number())
		}
		if r.key("until") {
			f.Until = time.Duration(r.number())
		}
	})
	return f
}

// take moves over text if it comes next.
func (r *scanner) take(text string) bool {
	if r.bad || len(r.in)-r.at < len(text) || string(r.in[r.at:r.at+len(text)]) != text {
		return false
	}
	r.at += len(text)
	return true
}

func (r *scanner) want(text string) {
	if !r.take(text) {
		r.bad = true
	}
}

func (r *scanner) object(fields func()) {
	r.want("{")
	fields()
	r.want("}")
}

// key moves over the name of this field, and the comma before it unless it is
// the object's first.
func (r *scanner) key(name string) bool {
	start := r.at
	if start > 0 && r.in[start-1] != '{' && !r.take(",") {
		return false
	}
	if r.take(`"`) && r.take(name) && r.take(`":`) {
		return true
	}
	r.at = start
	return false
}

func (r *scanner) entries(each func(key string)) {
	r.want("{")
	for first := true; !r.bad && !r.take("}"); first = false {
		if !first {
			r.want(",")
		}
		key := r.text()
		r.want(":")
		each(key)
	}
}

func (r *scanner) list(each func()) {
	r.want("[")
	for first := true; !r.bad && !r.take("]"); first = false {
		if !first {
			r.want(",")
		}
		each()
	}
}

// text leaves a string that is not plain ASCII to package json.
func (r *scanner) text() (s string) {
	r.want(`"`)
	if r.bad {
		return ""
	}
	start, plain := r.at, true
	for i := start; i < len(r.in); i++ {
		c := r.in[i]
		if c == '"' {
			r.at = i + 1
			if plain {
				return string(r.in[start:i])
			}
			r.bad = json.Unmarshal(r.in[start-1:r.at], &s) != nil
			return s
		}
		if c == '\\' {
			i++ // what it escapes may be a quote
		}
		plain = plain && c != '\\' && c-' ' <= '~'-' '
	}
	r.bad = true
	return ""
}

func (r *scanner) number() int64 {
	start := r.at
	for r.at < len(r.in) && (r.in[r.at] == '-' || r.in[r.at] >= '0' && r.in[r.at] <= '9') {
		r.at++
	}
	text := string(r.in[start:r.at])
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || strconv.FormatInt(n, 10) != text {
		r.bad = true
	}
	return n
}

func (r *scanner) boolean() bool {
	if r.take("true") {
		return true
	}
	r.want("false")
	return false
}

func (r *scanner) addr(text string) netip.Addr {
	a, err := netip.ParseAddr(text)
	r.bad = r.bad || err != nil
	return a
}

func (r *scanner) mac() string {
	if r.macText == "" || !r.take(r.macText) {
		start := r.at
		r.lastMAC = r.text()
		r.macText = string(r.in[start:r.at])
	}
	return r.lastMAC
}

func (r *scanner) prefix() netip.Prefix {
	if r.prefixText == "" || !r.take(r.prefixText) {
		start := r.at
		p, err := netip.ParsePrefix(r.text())
		r.bad = r.bad || err != nil
		r.lastPrefix, r.prefixText = p, string(r.in[start:r.at])
	}
	return r.lastPrefix
}
