// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"strings"
	"sync"

	"github.com/containernetworking/cni/pkg/types"
)

// Codes of our own. The specification leaves the numbers from 100 to plugins.
const (
	CodeAttached uint = 100 // ADD: the container has the interface already, and was left as it is
	CodeInUse    uint = 101 // ADD: another container has the address, the MAC or the host port that was asked for
	CodeChanged  uint = 102 // CHECK: something is not as ADD left it
)

// Errorf makes an error with its CNI error code.
func Errorf(code uint, format string, args ...any) *types.Error {
	return types.NewError(code, fmt.Sprintf(format, args...), "")
}

// toError returns err as the specification has errors: with a code, and with a text in one line. A runtime copies the
// text into the pod's events. An error that has a code keeps it. Else Plugin.Code tells it.
func (c *Call) toError(err error) *types.Error {
	var e *types.Error
	if errors.As(err, &e) {
		copied := *e
		e = &copied
		if text := err.Error(); text != e.Error() { // the error was wrapped or joined to others
			e.Msg, e.Details = text, ""
		}
	} else {
		e = types.NewError(c.codeOf(err), err.Error(), "")
	}
	e.Msg, e.Details = c.plainText(e.Msg), c.plainText(e.Details)
	return e
}

// codeOf returns the code of an error that does not say one itself.
func (c *Call) codeOf(err error) uint {
	if c.plugin.Code != nil {
		if code := c.plugin.Code(err); code != 0 {
			return code
		}
	}
	var path *fs.PathError
	if errors.As(err, &path) {
		return types.ErrIOFailure
	}
	return types.ErrInternal
}

// notFound is compiled at its first use, since each CNI call is a process and few calls fail.
var notFound = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`(?i)not found`) })

// plainText returns text in one line. In an error of DEL it replaces the words "not found": kubelet takes them for
// success, and would never repeat the DEL that has yet to release something.
func (c *Call) plainText(text string) string {
	text = strings.ReplaceAll(strings.TrimSpace(text), "\n", "; ")
	if c.Verb == "DEL" {
		text = notFound().ReplaceAllString(text, "missing")
	}
	return text
}
