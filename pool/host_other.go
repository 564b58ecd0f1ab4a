// Copyright (c) The azure-vnet authors. MIT licence.

//go:build !linux

package pool

import (
	"fmt"
	"runtime"
	"time"
)

// On systems other than Linux the package compiles, and its tests of parsing and choosing run. A pool cannot be used
// there: it needs a boot id, which these systems lack, and addresses and routes of the host. Reading those gives this
// error.
var errNotLinux = fmt.Errorf("addresses cannot be lent on %s: azure-vnet knows only how Linux tells its boot, addresses and routes", runtime.GOOS)

func bootTime() time.Duration { return 0 }

func readOccupied() (occupied, error) { return occupied{}, errNotLinux }

func readHostLinks() (hostLinks, error) { return hostLinks{}, errNotLinux }
