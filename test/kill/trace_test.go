// Copyright (c) The azure-vnet authors. MIT licence.

package kill

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// trace counts the steps of a program and of all that it starts, over all their threads. It kills them after one of the
// steps.
type trace struct {
	program string // counting begins when a process executes it; empty: at once
	killAt  int    // the step, from 1, that the processes end after; 0: none

	threads map[int]*thread
	begun   bool
	killed  bool

	mu    sync.Mutex
	steps []string // guarded by mu: what was done, in order
}

// thread is a traced thread.
type thread struct {
	tgid    int
	running call   // that it is in
	step    string // what that will have changed; empty: nothing
}

const traceOptions = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK | unix.PTRACE_O_TRACECLONE |
	unix.PTRACE_O_TRACEEXEC | unix.PTRACE_O_EXITKILL

// done is what was done up to now.
func (tr *trace) done() []string {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return append([]string{}, tr.steps...)
}

// run starts a command and waits for the end of all processes. code is the command's exit code, -1 if it was killed.
func (tr *trace) run(cmd *exec.Cmd) (code int, err error) {
	done := make(chan struct{})
	go func() { // a thread of its own: only the thread that traces may wait
		defer close(done)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		cmd.SysProcAttr.Ptrace = true
		if err = cmd.Start(); err != nil {
			return
		}
		first := cmd.Process.Pid
		var status unix.WaitStatus
		if _, err = unix.Wait4(first, &status, unix.WALL, nil); err != nil {
			return
		}
		if err = unix.PtraceSetOptions(first, traceOptions); err != nil {
			return
		}
		tr.threads = map[int]*thread{first: {tgid: first}}
		tr.resume(first, 0)
		code, err = tr.follow(first)
		_ = cmd.Wait() // for its output; the process is waited for
	}()
	<-done
	return code, err
}

// seize begins to trace a process that runs. ended is closed when it has ended.
func (tr *trace) seize(pid int) (ended chan struct{}, err error) {
	ended = make(chan struct{})
	begun := make(chan error)
	go func() {
		defer close(ended)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := tr.seizeAll(pid); err != nil {
			begun <- err
			return
		}
		close(begun)
		_, _ = tr.follow(pid)
	}()
	return ended, <-begun
}

// seizeAll seizes all threads of a process. One that begins meanwhile is found by another look.
func (tr *trace) seizeAll(pid int) error {
	tr.threads, tr.begun = map[int]*thread{}, true
	for found := true; found; {
		found = false
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return err
		}
		for _, task := range tasks {
			tid, err := strconv.Atoi(task.Name())
			if err != nil || tr.threads[tid] != nil {
				continue
			}
			_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(tid), 0, traceOptions, 0, 0)
			if errno != 0 && errno != unix.ESRCH && errno != unix.EPERM { // gone, or seized by its parent's options
				return fmt.Errorf("trace thread %d: %w", tid, errno)
			}
			tr.threads[tid], found = &thread{tgid: pid}, true
			_ = unix.PtraceInterrupt(tid) // it stops, and goes on from system call to system call
		}
	}
	return nil
}

// follow leads the threads from system call to system call until all have ended.
func (tr *trace) follow(first int) (code int, err error) {
	code = -1
	for {
		var status unix.WaitStatus
		tid, err := unix.Wait4(-1, &status, unix.WALL|unix.WNOTHREAD, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ECHILD):
			return code, nil
		case err != nil:
			return code, err
		case status.Exited() || status.Signaled():
			if tid == first && status.Exited() {
				code = status.ExitStatus()
			}
			delete(tr.threads, tid)
		case status.Stopped():
			tr.stopped(tid, status)
		}
	}
}

// stopped looks at why a thread stopped, and lets it go on.
func (tr *trace) stopped(tid int, status unix.WaitStatus) {
	t := tr.threads[tid]
	fresh := t == nil
	if fresh { // it stops before its parent tells of it
		t = &thread{tgid: processOf(tid)}
		tr.threads[tid] = t
		if tr.killed {
			_ = unix.Kill(t.tgid, unix.SIGKILL)
		}
	}
	event := int(status) >> 16
	switch sig := status.StopSignal(); {
	case sig == unix.SIGTRAP|0x80:
		tr.atCall(tid, t)
		tr.resume(tid, 0)
	case event == unix.PTRACE_EVENT_EXEC:
		exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", tid))
		tr.begun = tr.begun || exe == tr.program
		*t = thread{tgid: tid}
		tr.resume(tid, 0)
	case event != 0 || fresh && sig == unix.SIGSTOP:
		tr.resume(tid, 0)
	default:
		tr.resume(tid, sig)
	}
}

func (tr *trace) resume(tid int, sig unix.Signal) {
	if tr.begun {
		_ = unix.PtraceSyscall(tid, int(sig)) // one that is killed meanwhile cannot
	} else {
		_ = unix.PtraceCont(tid, int(sig))
	}
}

// syscallInfo is struct ptrace_syscall_info of the kernel: at entry the number and arguments, at exit the result and whether
// that is an error.
type syscallInfo struct {
	op   uint8
	_    [3]uint8
	_    uint32
	_, _ uint64
	data [8]uint64
}

// atCall notes what a thread that stopped at a system call is about to change, or that it has changed it.
func (tr *trace) atCall(tid int, t *thread) {
	if tr.killed {
		return
	}
	var info syscallInfo
	if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_INFO, uintptr(tid), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0); errno != 0 {
		return
	}
	switch info.op {
	case unix.PTRACE_SYSCALL_INFO_ENTRY:
		t.running.nr = info.data[0]
		copy(t.running.args[:], info.data[1:7])
		t.step = step(t.tgid, tid, t.running)
	case unix.PTRACE_SYSCALL_INFO_EXIT:
		failed := uint8(info.data[1]) != 0
		if t.step == "" || failed {
			return
		}
		tr.mu.Lock()
		tr.steps = append(tr.steps, t.step)
		due := len(tr.steps) == tr.killAt
		tr.mu.Unlock()
		t.step = ""
		if due {
			tr.kill()
		}
	}
}

// kill ends all processes at once.
func (tr *trace) kill() {
	tr.killed = true
	for _, t := range tr.threads {
		_ = unix.Kill(t.tgid, unix.SIGKILL)
	}
}

// processOf is the process of a thread.
func processOf(tid int) int {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	for line := range strings.Lines(string(text)) {
		if of, ok := strings.CutPrefix(line, "Tgid:"); ok {
			tgid, _ := strconv.Atoi(strings.TrimSpace(of))
			return tgid
		}
	}
	return tid
}
