// Copyright (c) The azure-vnet authors. MIT licence.

package kill

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// filterName as argv[0] turns this program into one with a seccomp filter. With it, the kernel stops this program, and
// the programs that it starts, at each system call that may change something. Without the filter a tracer would have
// to stop it at each of its thousands of calls.
const filterName = "kill-filter"

func init() {
	if len(os.Args) < 3 || os.Args[0] != filterName {
		return
	}
	runtime.LockOSThread() // the filter is the thread's
	err := filter()
	if err == nil {
		err = unix.Exec(os.Args[1], os.Args[2:], os.Environ())
	}
	fmt.Fprintln(os.Stderr, "filter system calls:", err)
	os.Exit(1)
}

// filtered has a command begin with the filter. It must be traced: else these calls fail.
func filtered(cmd *exec.Cmd) {
	cmd.Args = append([]string{filterName, cmd.Path}, cmd.Args...)
	cmd.Path = "/proc/self/exe"
}

// filter gives the thread the filter.
func filter() error {
	const number = 0 // of struct seccomp_data
	rules := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: number}}
	for _, calls := range []map[uint64]string{changing, older} {
		for nr := range calls {
			rules = append(rules,
				unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(nr), Jf: 1},
				unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_TRACE})
		}
	}
	rules = append(rules, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	program := unix.SockFprog{Len: uint16(len(rules)), Filter: &rules[0]}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&program))); errno != 0 {
		return errno
	}
	return nil
}
