// Copyright (c) The azure-vnet authors. MIT licence.

package lender

import (
	"context"
	"errors"

	"github.com/containernetworking/cni/pkg/types"

	"azurevnet/bridge"
	"azurevnet/internal/cni"
	"azurevnet/pool"
)

// codes are the codes of the errors of bridge and pool. An error may join several of them: the first row that matches
// counts.
var codes = []struct {
	is   error
	code uint
}{
	{bridge.ErrAttached, cni.CodeAttached},
	{bridge.ErrTaken, types.ErrPluginNotAvailable},
	{bridge.ErrNameTaken, types.ErrPluginNotAvailable},
	{bridge.ErrNotPermitted, types.ErrPluginNotAvailable},
	{pool.ErrInUse, cni.CodeInUse},
	{pool.ErrExhausted, types.ErrTryAgainLater},
	{pool.ErrSource, types.ErrTryAgainLater},
	{pool.ErrGone, types.ErrTryAgainLater},
	{pool.ErrNotOurs, types.ErrInvalidNetworkConfig},
	{context.DeadlineExceeded, types.ErrTryAgainLater},
}

// Code returns the CNI error code of an error of bridge or pool, for cni.Plugin. It is 0 for any other error.
func Code(err error) uint {
	for _, known := range codes {
		if errors.Is(err, known.is) {
			return known.code
		}
	}
	var held *bridge.InUseError
	if errors.As(err, &held) {
		return cni.CodeInUse
	}
	return 0
}
