// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A holder is this very program started again in new namespaces, to keep them.
// It reads a pipe of which only this process has the other end, and ends with
// it. Where the namespaces include one of pids the holder is its pid 1: when it
// ends, the kernel kills everything inside.
type holder struct {
	cmd  *exec.Cmd
	pipe io.Closer     // closing it ends the holder in good order
	done chan struct{} // closed when the holder, and all it held, is gone
	time string        // of nsenter's --time: the file of its time namespace; empty: this process's
	err  error         // of the holder's exit, once done is closed
	stop sync.Once

	started sync.Once // sets inside
	inside  *runner   // of the VM; nil: there is none
}

// runner returns the one runner in the holder's namespaces. The first call starts it. It returns nil if none starts.
func (h *holder) runner(start func() (*runner, error)) *runner {
	h.started.Do(func() { h.inside, _ = start() })
	return h.inside
}

// endRunner has no further command run.
func (h *holder) endRunner() {
	if r := h.runner(func() (*runner, error) { return nil, nil }); r != nil {
		r.conn.Close()
	}
}

// holderSpec tells a holder what to do besides waiting.
type holderSpec struct {
	VM    *machine `json:",omitempty"` // set the mounts of a VM up before reporting
	Clean []string `json:",omitempty"` // directories and cgroups to remove at the end
}

// holderName as argv[0] turns this program into a holder.
const holderName = "vnetsim-holder"

func init() {
	if len(os.Args) == 2 && os.Args[0] == holderName {
		hold(os.Args[1])
	}
}

// hold is a holder's whole life. It runs in init, on the main thread, whose
// namespaces are the ones that others see in /proc/PID/ns.
func hold(arg string) {
	var spec holderSpec
	err := json.Unmarshal([]byte(arg), &spec)
	if err == nil && spec.VM != nil {
		err = spec.VM.setup()
	}
	if err != nil {
		fmt.Fprint(os.Stdout, err)
		os.Exit(1)
	}
	fmt.Fprint(os.Stdout, "ok")
	os.Stdout.Close()
	signal.Ignore(syscall.SIGINT, syscall.SIGHUP, syscall.SIGTERM)
	go reap()
	io.Copy(io.Discard, os.Stdin)
	if err := removeAll(spec.Clean, 30*time.Second); err != nil {
		fmt.Fprint(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// reap collects the orphans that a pid 1 inherits.
func reap() {
	child := make(chan os.Signal, 1)
	signal.Notify(child, syscall.SIGCHLD)
	for range child {
		for {
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 && err != syscall.EINTR {
				break
			}
		}
	}
}

// removeAll removes directory trees, of which some may be cgroups. Processes
// that are just being killed may still use them, so it tries until the timeout.
func removeAll(dirs []string, timeout time.Duration) error {
	deadline := time.Now().Add(timeout)
	for {
		var errs []error
		for _, dir := range dirs {
			if strings.HasPrefix(dir, "/sys/fs/cgroup/") {
				errs = append(errs, removeCgroup(dir))
			} else {
				errs = append(errs, os.RemoveAll(dir))
			}
		}
		err := errors.Join(errs...)
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// startHolder starts a holder in the new namespaces that flags say, and waits
// until it has done its setup. It keeps the time namespace of clock, unless that
// is nil, but is not in it: clone makes none, and a Go program can enter none.
func startHolder(flags uintptr, clock *os.File, spec holderSpec) (*holder, error) {
	arg, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	var stderr strings.Builder
	cmd := &exec.Cmd{
		Path:   "/proc/self/exe",
		Args:   []string{holderName, string(arg)},
		Dir:    "/",
		Stderr: &stderr,
		// A session of its own: Ctrl-C is for this process, which then ends the holders.
		SysProcAttr: &syscall.SysProcAttr{Cloneflags: flags, Setsid: true},
	}
	if clock != nil {
		cmd.ExtraFiles = []*os.File{clock}
	}
	pipe, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start a namespace's holder: %w", err)
	}
	said, _ := io.ReadAll(stdout)
	h := &holder{cmd: cmd, pipe: pipe, done: make(chan struct{})}
	if clock != nil {
		h.time = fmt.Sprintf("/proc/%d/fd/3", cmd.Process.Pid) // the first of ExtraFiles
	}
	go func() {
		defer close(h.done)
		if h.err = cmd.Wait(); h.err != nil && stderr.Len() > 0 {
			h.err = errors.New(stderr.String())
		}
	}()
	if string(said) != "ok" {
		pipe.Close()
		<-h.done
		return nil, fmt.Errorf("set up a namespace: %s%s", said, stderr.String())
	}
	return h, nil
}

// kill ends the holder as a power cut does, and waits until everything that it
// held is dead: not for ever, for where this machine's own pid 1 does not reap,
// the kernel may keep waiting for a command that was orphaned.
func (h *holder) kill() {
	h.stop.Do(func() {
		h.cmd.Process.Kill()
		h.endRunner()
		select {
		case <-h.done:
		case <-time.After(10 * time.Second):
		}
		h.pipe.Close()
	})
}

// close lets the holder end by itself and returns what it could not clean.
func (h *holder) close() error {
	h.stop.Do(func() {
		h.endRunner()
		h.pipe.Close()
		<-h.done
	})
	return h.err
}

// machine is the part of a VM's boot that happens inside its namespaces.
type machine struct {
	Name    string   // host name
	Disk    string   // directory that survives power cuts
	Cgroups []cgroup // of the VM
}

// setup gives the VM its own /proc, /sys, /run and /dev/shm, which are new at
// every boot, and its own /etc, /var/lib and /var/lib/docker, which are on its
// disk. The rest of the file system is the machine's.
func (m *machine) setup() error {
	if err := enterCgroups(m.Cgroups); err != nil {
		return err
	}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	for _, fs := range []struct{ fstype, target, data string }{
		{"proc", "/proc", ""},
		{"sysfs", "/sys", ""},
		{"tmpfs", "/run", "mode=755"},
		{"tmpfs", "/dev/shm", "mode=1777"},
	} {
		syscall.Unmount(fs.target, syscall.MNT_DETACH) // or runc finds the machine's cgroups first
		if err := syscall.Mount(fs.fstype, fs.target, fs.fstype, 0, fs.data); err != nil {
			return fmt.Errorf("mount %s: %w", fs.target, err)
		}
	}
	if err := mountCgroups(m.Cgroups); err != nil {
		return err
	}
	for _, dir := range []string{"/etc", "/var/lib"} {
		if err := m.overlay(dir); err != nil {
			return err
		}
	}
	// An engine's overlay2 cannot lie on an overlay, and the machine's engine
	// does not configure the VM's.
	for _, dir := range []string{"/var/lib/docker", "/etc/docker"} {
		if err := m.bind(dir); err != nil {
			return err
		}
	}
	if err := os.MkdirAll("/run/lock", 0o755); err != nil {
		return err
	}
	os.Remove("/etc/resolv.conf") // it may be a link into the machine's /run
	if err := os.WriteFile("/etc/resolv.conf", []byte("nameserver "+HostAgentAddr.String()+"\n"), 0o644); err != nil {
		return err
	}
	return syscall.Sethostname([]byte(m.Name))
}

// overlay makes the VM's writes to dir go to its disk.
func (m *machine) overlay(dir string) error {
	upper := filepath.Join(m.Disk, dir)
	work := upper + ".work"
	for _, d := range []string{upper, work} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	data := "lowerdir=" + dir + ",upperdir=" + upper + ",workdir=" + work
	if err := syscall.Mount("overlay", dir, "overlay", 0, data); err != nil {
		return fmt.Errorf("mount an overlay on %s: %w; the disk %s must be on a file system that takes one, such as ext4 or tmpfs", dir, err, m.Disk)
	}
	return nil
}

// bind puts a directory of the VM's disk at dir.
func (m *machine) bind(dir string) error {
	src := filepath.Join(m.Disk, strings.ReplaceAll(dir, "/", "_"))
	for _, d := range []string{src, dir} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			return err
		}
	}
	if err := syscall.Mount(src, dir, "", syscall.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s: %w", dir, err)
	}
	return nil
}
