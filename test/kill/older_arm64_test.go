// Copyright (c) The azure-vnet authors. MIT licence.

package kill

import "golang.org/x/sys/unix"

// older are the system calls of this architecture that newer ones lack.
var older = map[uint64]string{unix.SYS_RENAMEAT: "rename"}

// olderPath is which argument of them names what they change.
var olderPath = map[uint64]int{unix.SYS_RENAMEAT: 3}
