// Copyright (c) The azure-vnet authors. MIT licence.

//go:build !linux

package pool

import (
	"fmt"
	"runtime"
	"time"
)

// On systems other than Linux the package compiles, and its tests of parsing and choosing run. A pool cannot be used
// there: every call needs the boot id first, which they lack, and what it reads of the host, which gets this error.
var errNotLinux = fmt.Errorf("addresses cannot be lent on %s: azure-vnet knows only how Linux tells its boot, addresses and routes", runtime.GOOS)

func bootTime() time.Duration { return 0 }

func readOccupied() (occupied, error) { return occupied{}, errNotLinux }

func readHostLinks() (hostLinks, error) { return hostLinks{}, errNotLinux }
