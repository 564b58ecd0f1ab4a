// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"errors"
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// needed are the capabilities that the plugin and the iptables that it starts use. NET_RAW is for legacy iptables,
// NET_BIND_SERVICE for published ports below 1024, and DAC_OVERRIDE for a SOURCE file or a data-root of another user.
const needed = 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW | 1<<unix.CAP_NET_BIND_SERVICE | 1<<unix.CAP_DAC_OVERRIDE

// dropCapabilities gives up all capabilities but the needed ones, on all threads, and so for the programs that the plugin
// starts. Docker gives each plugin more capabilities than the plugin asks for. If one cannot be given up, the others are
// given up all the same. A program with cgo, such as a test with the race detector, cannot do this on all threads: the
// error is then ENOTSUP.
func dropCapabilities() (err error) {
	for c := range uintptr(64) {
		has, e := unix.PrctlRetInt(unix.PR_CAPBSET_READ, c, 0, 0, 0)
		if e != nil { // the kernel has no capability of this number or higher
			break
		}
		if has == 0 || needed>>c&1 == 1 {
			continue
		}
		if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c, 0); errno != 0 {
			err = fmt.Errorf("take capability %d out of the bounding set: %w", c, errno)
		}
	}
	// The bounding set comes first, because a thread changes it by CAP_SETPCAP.
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData // capabilities below 32, and from 32 on
	if e := unix.Capget(&header, &sets[0]); e != nil {
		return errors.Join(err, fmt.Errorf("read the capabilities: %w", e))
	}
	for i := range sets {
		keep := uint32(uint64(needed) >> (32 * i))
		sets[i].Effective &= keep
		sets[i].Permitted &= keep
		sets[i].Inheritable &= keep
	}
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&sets)), 0); errno != 0 {
		err = errors.Join(err, fmt.Errorf("give up capabilities: %w", errno))
	}
	return err
}
