// Copyright (c) The azure-vnet authors. MIT licence.

package plan

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

// value is a JSON value with its place in the definition. If a key is missing, its value has the place of the object that
// lacks it, so each fault has a place.
type value struct {
	offset   int           // of its first byte
	kind     jsontext.Kind // 0: it is missing
	text     string        // of a string its content, of a number or a literal its spelling
	parent   *value        // nil: this is the whole document
	name     string        // its key or, in an array, its number in brackets
	children []*value      // of an object or an array, in the order of the file
}

// exists is false of a missing value, and of null and an empty string, which the engines do not tell from a missing one.
func (v *value) exists() bool { return v.kind != 0 && v.kind != 'n' && (v.kind != '"' || v.text != "") }

// get returns the value of a key of an object. Keys are case-insensitive, and of two equal keys the last one counts, as
// the engines read them. Without such a key it returns a value that does not exist.
func (v *value) get(key string) *value {
	if v.kind == '{' {
		for i := len(v.children) - 1; i >= 0; i-- {
			if strings.EqualFold(v.children[i].name, key) {
				return v.children[i]
			}
		}
	}
	return &value{offset: v.offset, parent: v, name: key}
}

// path returns the keys that lead to the value, below "properties", which all keys of a definition are in.
func (v *value) path() string {
	if v.parent == nil {
		return ""
	}
	above := v.parent.path()
	switch {
	case above == "" && v.parent.parent == nil && strings.EqualFold(v.name, "properties"):
		return ""
	case above == "" || v.parent.kind == '[':
		return above + printable(v.name)
	}
	return above + "." + printable(v.name)
}

// printable returns a text of the definition as it can be shown: in ASCII, without control characters, and not long.
func printable(text string) string {
	const most = 60
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "..."
	}
	return inASCII(text)
}

// inASCII returns a text with escapes for control characters and for all that is not ASCII.
func inASCII(text string) string {
	quoted := strconv.QuoteToASCII(text)
	return strings.ReplaceAll(quoted[1:len(quoted)-1], `\"`, `"`)
}

// reader makes values of JSON text.
type reader struct{ *jsontext.Decoder }

// maxDepth is more than any definition has. Values that lie deeper are a fault, so that no walk through them is long.
const maxDepth = 64

var errTooDeep = fmt.Errorf("it is in more than %d objects and arrays", maxDepth)

// parse reads a definition, which withoutExtras has left to be JSON. An error comes with the offset of its place.
func parse(text []byte) (root *value, offset int, err error) {
	text = bytes.Clone(text)
	if bytes.HasPrefix(text, []byte("\ufeff")) {
		copy(text, "   ") // a byte order mark is of three bytes, and no other offset changes
	}
	r := reader{jsontext.NewDecoder(bytes.NewReader(text), jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true))}
	if root, err = r.value(nil, ""); err == nil {
		if rest := bytes.TrimLeft(text[r.InputOffset():], " \t\r\n"); len(rest) > 0 {
			return nil, len(text) - len(rest), errors.New("the definition has ended before this")
		}
		return root, 0, nil
	}
	var syntax *jsontext.SyntacticError
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return nil, len(bytes.TrimRight(text, " \t\r\n")), errors.New("the file ends too early")
	case errors.As(err, &syntax):
		return nil, int(syntax.ByteOffset), explainSyntax(syntax.Err)
	}
	return nil, int(r.InputOffset()), err
}

// explainSyntax returns what is wrong without text of the file, which may be a secret, but for one character.
func explainSyntax(err error) error {
	if said := err.Error(); strings.HasPrefix(said, "invalid character ") {
		return errors.New(inASCII(said))
	}
	return errors.New("invalid string or number")
}

// value reads the next value of the text.
func (r reader) value(parent *value, name string) (*value, error) {
	v := &value{parent: parent, name: name}
	if r.StackDepth() > maxDepth {
		return nil, errTooDeep
	}
	v.kind = r.PeekKind()
	if v.kind != '{' && v.kind != '[' {
		raw, err := r.ReadValue()
		if err != nil {
			return nil, err
		}
		v.offset, v.text = int(r.InputOffset())-len(raw), string(raw)
		if v.kind == '"' {
			unquoted, _ := jsontext.AppendUnquote(nil, raw) // of invalid UTF-8, it makes U+FFFD
			v.text = string(unquoted)
		}
		return v, nil
	}
	if _, err := r.ReadToken(); err != nil {
		return nil, err
	}
	v.offset = int(r.InputOffset()) - 1
	for i := 0; ; i++ {
		if next := r.PeekKind(); next == '}' || next == ']' {
			_, err := r.ReadToken()
			return v, err
		}
		key := fmt.Sprintf("[%d]", i)
		if v.kind == '{' {
			token, err := r.ReadToken()
			if err != nil {
				return nil, err
			}
			key = token.String()
		}
		child, err := r.value(v, key)
		if err != nil {
			return nil, err
		}
		v.children = append(v.children, child)
	}
}

// withoutExtras returns the text with blanks in the place of remarks, which go from --> to the end of the line, and of
// ellipses. The documentation's examples have both, and JSON has neither. Each other byte keeps its offset. It returns
// the offsets of what it blanked.
func withoutExtras(text []byte) (clean []byte, remarks, ellipses []int) {
	clean = bytes.Clone(text)
	inString, skipComma := false, false
	last := -1 // the offset of the last byte that is no blank
	for i := 0; i < len(clean); i++ {
		rest := clean[i:]
		switch {
		case inString && rest[0] == '\\':
			i++
		case rest[0] == '"', inString && rest[0] == '\n': // no string of JSON goes over lines
			inString = rest[0] == '"' && !inString
			last, skipComma = i, false
		case inString:
		case bytes.HasPrefix(rest, []byte("-->")):
			remarks = append(remarks, i)
			for ; i < len(clean) && clean[i] != '\n' && clean[i] != '\r'; i++ {
				clean[i] = ' '
			}
		case bytes.HasPrefix(rest, []byte("…")), bytes.HasPrefix(rest, []byte("...")):
			ellipses = append(ellipses, i)
			copy(rest, "   ") // both are of three bytes
			// One of the commas around it goes too: [1, …] and […, 1] are lists of one.
			if last >= 0 && clean[last] == ',' {
				clean[last] = ' '
			} else {
				skipComma = last >= 0 && (clean[last] == '{' || clean[last] == '[')
			}
		case rest[0] == ',' && skipComma:
			rest[0], skipComma = ' ', false
		case !bytes.ContainsRune([]byte(" \t\r\n"), rune(rest[0])):
			last, skipComma = i, false
		}
	}
	return clean, remarks, ellipses
}

// place returns the line and the column of an offset, from 1. A column is a character, and a byte order mark is none.
func place(text []byte, offset int) (line, column int) {
	before := text[:min(offset, len(text))]
	line = 1 + bytes.Count(before, []byte("\n"))
	before = before[bytes.LastIndexByte(before, '\n')+1:]
	return line, 1 + utf8.RuneCount(bytes.TrimPrefix(before, []byte("\ufeff")))
}
