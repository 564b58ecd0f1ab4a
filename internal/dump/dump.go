// Copyright (c) The azure-vnet authors. MIT licence.

// Package dump repeats a listing of kernel state (a dump of netlink) if a change of that state interrupted the listing.
// It lists nothing itself.
package dump

import (
	"errors"
	"time"

	"github.com/vishvananda/netlink/nl"
)

// repeatTime bounds how long a listing is repeated. On a small VM, while other programs made 200 veth pairs a second, a
// listing of 300 pairs succeeded at the 20th try.
var repeatTime = 2 * time.Second

// Whole calls list again until no change interrupted it (NLM_F_DUMP_INTR). An interrupted listing may lack entries.
// After 2 s Whole gives up, and returns the entries and the error of the last listing.
func Whole[T any](list func() ([]T, error)) (all []T, err error) {
	for start := time.Now(); ; {
		all, err = list()
		if !errors.Is(err, nl.ErrDumpInterrupted) || time.Since(start) > repeatTime {
			return all, err
		}
	}
}
