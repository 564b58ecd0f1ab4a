// Copyright (c) The azure-vnet authors. MIT licence.

package kill

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// trace counts the steps of a program and of all that it starts, over all their threads. It kills them after one of the
// steps.
type trace struct {
	program string // counting begins when a process executes it; empty: with begin
	killAt  int    // the step, from 1, that the processes end after; 0: none

	mu      sync.Mutex // guards what follows
	threads map[int]*thread
	begun   bool
	killed  bool
	steps   []string // what was done, in order

	synced map[string]bool // files that were written out to the disk
	torn   []string        // files that got their name before that: a power cut would leave them empty
}

// thread is a traced thread.
type thread struct {
	tgid int
	step string // the change of the system call in progress; empty: none
}

const traceOptions = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACESECCOMP | unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK |
	unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACEEXEC | unix.PTRACE_O_EXITKILL

// done is what was done up to now.
func (tr *trace) done() []string {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return slices.Clone(tr.steps)
}

// begin counts from now on.
func (tr *trace) begin() {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.begun = true
}

// ended says that the processes were killed.
func (tr *trace) ended() bool {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return tr.killed
}

// run starts a command and waits for the end of all its processes. code is its exit code, -1 if it was killed.
func (tr *trace) run(cmd *exec.Cmd) (code int, err error) {
	done := make(chan struct{})
	go func() { // on a thread of its own: only the thread that traces may wait
		defer close(done)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		filtered(cmd)
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
		tr.mu.Lock()
		tr.threads, tr.synced = map[int]*thread{first: {tgid: first}}, map[string]bool{}
		tr.mu.Unlock()
		_ = unix.PtraceCont(first, 0)
		code, err = tr.follow(first)
		_ = cmd.Wait() // for its output; the process is waited for
	}()
	<-done
	return code, err
}

// follow leads the threads from stop to stop until all have ended. The traced processes are one process group, so the wait
// leaves other children of this thread alone.
func (tr *trace) follow(first int) (code int, err error) {
	code = -1
	for {
		var status unix.WaitStatus
		tid, err := unix.Wait4(-first, &status, unix.WALL|unix.WNOTHREAD, nil)
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
			tr.mu.Lock()
			delete(tr.threads, tid)
			tr.mu.Unlock()
		case status.Stopped():
			tr.stopped(tid, status)
		}
	}
}

// stopped looks at why a thread stopped, and lets it go on. One that is killed meanwhile cannot, which is no error.
func (tr *trace) stopped(tid int, status unix.WaitStatus) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	t := tr.threads[tid]
	fresh := t == nil
	if fresh {
		t = &thread{tgid: processOf(tid)}
		tr.threads[tid] = t
		if tr.killed {
			_ = unix.Kill(t.tgid, unix.SIGKILL)
		}
	}
	sig, pass := status.StopSignal(), 0
	switch event := int(status) >> 16; {
	case event == unix.PTRACE_EVENT_SECCOMP:
		if tr.atEntry(tid, t); t.step != "" {
			_ = unix.PtraceSyscall(tid, 0) // up to its exit
			return
		}
	case event == unix.PTRACE_EVENT_EXEC:
		exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", tid))
		tr.begun = tr.begun || exe == tr.program
		*t = thread{tgid: tid}
	case sig == unix.SIGTRAP|0x80:
		tr.atExit(tid, t)
	case event == 0 && !(fresh && sig == unix.SIGSTOP):
		pass = int(sig)
	}
	_ = unix.PtraceCont(tid, pass)
}

// syscallInfo is struct ptrace_syscall_info of the kernel. Its data are at entry the number and arguments, at exit the
// result and whether that is an error.
type syscallInfo struct {
	op   uint8
	_    [3]uint8
	_    uint32
	_, _ uint64
	data [8]uint64
}

func infoOf(tid int) (info syscallInfo, ok bool) {
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_INFO, uintptr(tid), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0)
	return info, errno == 0
}

// atEntry notes what a thread is about to change.
func (tr *trace) atEntry(tid int, t *thread) {
	t.step = ""
	info, ok := infoOf(tid)
	if !ok || !tr.begun || tr.killed {
		return
	}
	c := call{info.data[0], [6]uint64(info.data[1:7])}
	t.step = step(t.tgid, tid, c)
	if file := synced(tid, c); file != "" {
		tr.synced[file] = true
	} else if file := renamed(tid, c); file != "" && !tr.synced[file] {
		tr.torn = append(tr.torn, file)
	}
}

// atExit counts the step if the call succeeded. After the step killAt it kills.
func (tr *trace) atExit(tid int, t *thread) {
	info, ok := infoOf(tid)
	failed := uint8(info.data[1]) != 0
	if ok && t.step != "" && !failed && !tr.killed {
		tr.steps = append(tr.steps, t.step)
		if len(tr.steps) == tr.killAt {
			tr.kill()
		}
	}
	t.step = ""
}

// end kills the processes, if they run.
func (tr *trace) end() {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.kill()
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
