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
