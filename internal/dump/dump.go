// Copyright (c) The azure-vnet authors. MIT licence.

// Package dump repeats a listing of the kernel's (a dump of netlink) that a change of
// what is listed interrupted. It lists nothing itself.
package dump

import (
	"errors"
	"time"

	"github.com/vishvananda/netlink/nl"
)

// patience bounds how long a listing is repeated. On a small VM where other programs
// make 200 veth pairs a second, one of 300 pairs was whole at the 20th try.
var patience = 2 * time.Second

// Whole calls list until nothing interrupted it (NLM_F_DUMP_INTR). An interrupted
// listing may lack entries. After 2 s the error is the last listing's.
func Whole[T any](list func() ([]T, error)) (all []T, err error) {
	for start := time.Now(); ; {
		all, err = list()
		if !errors.Is(err, nl.ErrDumpInterrupted) || time.Since(start) > patience {
			return all, err
		}
	}
}
