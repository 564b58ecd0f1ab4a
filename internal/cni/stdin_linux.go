// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// awaitInput waits until something can be read from f, which may be its end, and reports whether it can. The kernel looks
// once more when the time is over, so a process that gets no CPU time until then still finds what is there.
func awaitInput(f *os.File, end time.Time) bool {
	for {
		fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(max(time.Until(end), 0).Milliseconds()))
		if !errors.Is(err, unix.EINTR) { // as from a signal of the Go runtime
			return n > 0 || err != nil // the read tells the error
		}
	}
}
