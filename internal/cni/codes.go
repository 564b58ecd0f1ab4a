// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"context"
	"errors"
	"io/fs"
	"regexp"
	"strings"

	"github.com/containernetworking/cni/pkg/types"

	"azurevnet/bridge"
	"azurevnet/pool"
)

// Codes of our own, from 100 as the specification has it.
const (
	CodeAttached uint = 100 // ADD: the container has the interface already, and was left as it is
	CodeInUse    uint = 101 // ADD: another container has the address, the MAC or the host port that was asked for
	CodeChanged  uint = 102 // CHECK: something is not as ADD left it
)

// codes are tried in order.
var codes = []struct {
	is   error
	code uint
}{
	{bridge.ErrAttached, CodeAttached},
	{bridge.ErrTaken, types.ErrPluginNotAvailable},
	{bridge.ErrNameTaken, types.ErrPluginNotAvailable},
	{bridge.ErrNotPermitted, types.ErrPluginNotAvailable},
	{pool.ErrInUse, CodeInUse},
	{pool.ErrExhausted, types.ErrTryAgainLater},
	{pool.ErrSource, types.ErrTryAgainLater},
	{pool.ErrGone, types.ErrTryAgainLater},
	{pool.ErrNotOurs, types.ErrInvalidNetworkConfig},
	{context.DeadlineExceeded, types.ErrTryAgainLater},
}

// toError gives an error its code, and words it for who reads it: a runtime
// copies it into the pod's events as it is.
func (c *Call) toError(err error) *types.Error {
	var e *types.Error
	if errors.As(err, &e) {
		copied := *e
		e = &copied
		if text := err.Error(); text != e.Error() {
			e.Msg, e.Details = text, ""
		}
	} else {
		e = types.NewError(types.ErrInternal, err.Error(), "")
		var path *fs.PathError
		if errors.As(err, &path) {
			e.Code = types.ErrIOFailure
		}
		var held *bridge.InUseError
		if errors.As(err, &held) {
			e.Code = CodeInUse
		}
		for _, known := range codes {
			if errors.Is(err, known.is) {
				e.Code = known.code
				break
			}
		}
	}
	e.Msg, e.Details = c.plain(e.Msg), c.plain(e.Details)
	return e
}

var notFound = regexp.MustCompile(`(?i)not found`)

// plain is text in one line. A DEL that says "not found" counts as done with
// kubelet, and what it was to release would leak.
func (c *Call) plain(text string) string {
	text = strings.ReplaceAll(strings.TrimSpace(text), "\n", "; ")
	if c.Verb == "DEL" {
		text = notFound.ReplaceAllString(text, "missing")
	}
	return text
}
