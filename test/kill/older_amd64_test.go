// Copyright (c) The azure-vnet authors. MIT licence.

package kill

import "golang.org/x/sys/unix"

// older are the system calls of this architecture that newer ones lack.
var older = map[uint64]string{
	unix.SYS_RENAME:   "rename",
	unix.SYS_RENAMEAT: "rename",
	unix.SYS_UNLINK:   "unlink",
	unix.SYS_RMDIR:    "unlink",
	unix.SYS_MKDIR:    "mkdir",
	unix.SYS_LINK:     "link",
	unix.SYS_SYMLINK:  "link",
}

// olderPath is which argument of them names what they change.
var olderPath = map[uint64]int{unix.SYS_RENAME: 1, unix.SYS_RENAMEAT: 3, unix.SYS_LINK: 1, unix.SYS_SYMLINK: 1}
