// Copyright (c) The azure-vnet authors. MIT licence.

package lender

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"azurevnet/bridge"
	"azurevnet/internal/cni"
	"azurevnet/pool"
)

func TestErrorsOfBridgeAndPoolHaveCodes(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want uint
	}{
		{pool.ErrExhausted, 11},
		{pool.ErrSource, 11},
		{pool.ErrNotOurs, 7},
		{pool.ErrInUse, cni.CodeInUse},
		{bridge.ErrAttached, cni.CodeAttached},
		{bridge.ErrTaken, 50},
		{&bridge.InUseError{}, cni.CodeInUse},
		{errors.Join(&bridge.InUseError{}, context.DeadlineExceeded), 11}, // undoing it took too long: a repeat may succeed
		{errors.New("any other"), 0},
	} {
		if got := Code(fmt.Errorf("during a call: %w", tt.err)); got != tt.want {
			t.Errorf("%v has the code %d, not %d", tt.err, got, tt.want)
		}
	}
}
