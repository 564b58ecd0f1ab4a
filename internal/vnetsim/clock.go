// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// ageAtBoot is what a VM's boot clock shows when the VM boots, in seconds.
const ageAtBoot = 1

// newBootClock makes a time namespace whose CLOCK_BOOTTIME begins at ageAtBoot.
// The namespace lives as long as the file, or a copy of it, is open. The file is
// nil where the kernel has no time namespaces.
func newBootClock() (*os.File, error) {
	offset, err := bootClockOffset()
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("make a boot clock: %w", err)
	}
	// A Go program cannot do this itself: from a thread that has unshared its
	// time namespace some kernels start no further thread. cat says when the
	// namespace is ready and keeps it until it is open here.
	var stderr strings.Builder
	cmd := exec.Command("unshare", "--time", fmt.Sprintf("--boottime=%d", offset), "cat")
	cmd.Stderr = &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // Ctrl-C is for this process
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("make a boot clock: %w", err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("make a boot clock: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("make a boot clock: %w", err)
	}
	var clock *os.File
	if _, err = in.Write([]byte("\n")); err == nil {
		_, err = out.Read(make([]byte, 1))
	}
	if err == nil {
		// The namespace that cat is in since its exec or, on kernels before 6.1, its children would be in.
		clock, err = os.Open(fmt.Sprintf("/proc/%d/ns/time_for_children", cmd.Process.Pid))
	}
	in.Close()
	if ended := cmd.Wait(); ended != nil {
		err = fmt.Errorf("unshare: %w: %s", ended, stderr.String())
	}
	if err != nil {
		clock.Close()
		return nil, fmt.Errorf("make a boot clock: %w", err)
	}
	return clock, nil
}

// bootClockOffset is what a new time namespace has to add to the boot clock of
// the first one, in seconds. The error is fs.ErrNotExist where the kernel has no
// time namespaces.
func bootClockOffset() (int64, error) {
	text, err := os.ReadFile("/proc/self/timens_offsets")
	if err != nil {
		return 0, err
	}
	// This process may be in a time namespace already: its clock has this added.
	var own int64
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "boottime"); ok {
			if _, err := fmt.Sscan(rest, &own); err != nil {
				return 0, fmt.Errorf("read /proc/self/timens_offsets: %w", err)
			}
		}
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return 0, err
	}
	return own + ageAtBoot - int64(now.Sec), nil
}
