// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Namespace is a place of the VNet that code and commands can run in.
type Namespace struct {
	name  string
	enter []string // nsenter's options beyond --net

	mu     sync.Mutex
	holder *holder // guarded by mu; nil: no power
	runs   int     // guarded by mu: how many commands Run was given
}

// PidOne is the process that holds the namespace, a VM's pid 1, by its number
// on this machine; 0 while it has no power. /proc/<PidOne>/root is a VM's file
// system.
func (n *Namespace) PidOne() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.holder == nil {
		return 0
	}
	return n.holder.cmd.Process.Pid
}

// timeFile is the file of the namespace's time namespace, empty if it has none.
func (n *Namespace) timeFile() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.holder == nil {
		return ""
	}
	return n.holder.time
}

// Do runs f on a thread in the network namespace, so that sockets, links,
// started processes and /proc/sys/net are those of the namespace. The mount
// namespace and the boot clock stay the caller's. f must start no goroutine and
// resolve no name.
func (n *Namespace) Do(f func() error) error {
	pid := n.PidOne()
	if pid == 0 {
		return fmt.Errorf("enter %s: it has no power", n.name)
	}
	runtime.LockOSThread()
	back, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter %s: %w", n.name, err)
	}
	defer back.Close()
	there, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err == nil {
		defer there.Close()
		err = unix.Setns(int(there.Fd()), unix.CLONE_NEWNET)
	}
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter %s: %w", n.name, err)
	}
	defer func() {
		// A thread that cannot return stays locked, and ends with its goroutine.
		if unix.Setns(int(back.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return f()
}

// Command is exec.CommandContext for a command that runs in all of the
// namespaces. The end of ctx kills the command's process group.
func (n *Namespace) Command(ctx context.Context, name string, arg ...string) *exec.Cmd {
	pid := n.PidOne()
	args := append([]string{"--target", strconv.Itoa(pid), "--net"}, n.enter...)
	if file := n.timeFile(); file != "" {
		args = append(args, "--time="+file)
	}
	args = append(append(args, "--", name), arg...)
	cmd := exec.CommandContext(ctx, "nsenter", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	if pid == 0 {
		cmd.Err = errors.New("it has no power")
	}
	return cmd
}

// Enter is a shell's command line that gives a person a shell in the namespace.
func (n *Namespace) Enter() string {
	return strings.Join(n.Command(context.Background(), "bash").Args, " ")
}

// DialContext is net.Dialer's, from within the network namespace. The address
// must not need a resolver.
func (n *Namespace) DialContext(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = n.Do(func() (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Run runs a command as Command does and returns its standard output. The
// error holds its standard error.
func (n *Namespace) Run(ctx context.Context, name string, arg ...string) (string, error) {
	out, said, err := n.Exec(ctx, nil, nil, append([]string{name}, arg...)...)
	if err = withText(err, said); err != nil {
		return out, fmt.Errorf("on %s: %s %s: %w", n.name, name, strings.Join(arg, " "), err)
	}
	return out, nil
}

// ExitError is the error of a command that started and failed.
type ExitError struct {
	Status int // -1: a signal ended it
	text   string
}

// Error is the text that exec.ExitError has.
func (e *ExitError) Error() string { return e.text }

// lateOutput bounds the wait for the output of a command that has ended. Of 200 at once on a busy machine, this process
// reads the last answers late.
const lateOutput = 30 * time.Second

// Exec runs a command as Command does, with an environment and a standard input. A nil environment is this process's. Exec
// returns what the command wrote to its standard output and its standard error. The error is an ExitError if the command
// started.
func (n *Namespace) Exec(ctx context.Context, env []string, stdin []byte, args ...string) (out, said string, err error) {
	if r := n.runner(); r != nil {
		return r.run(ctx, env, stdin, args)
	}
	var stdout, stderr strings.Builder
	cmd := n.Command(ctx, args[0], args[1:]...)
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = env, bytes.NewReader(stdin), &stdout, &stderr
	cmd.WaitDelay = lateOutput
	err = cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		err = &ExitError{exit.ExitCode(), exit.Error()}
	}
	return stdout.String(), stderr.String(), err
}

// runner starts the runner of a VM that is given many commands. It returns nil if nsenter is to start the command.
func (n *Namespace) runner() *runner {
	n.mu.Lock()
	h := n.holder
	n.runs++
	many := n.runs > runnerAfter
	n.mu.Unlock()
	if h == nil || len(n.enter) == 0 || !many {
		return nil
	}
	return h.runner(func() (*runner, error) { return startRunner(n.Command(context.Background(), "/proc/self/fd/4")) })
}

// run returns a command's output; the error holds its standard error.
func run(cmd *exec.Cmd) (string, error) {
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	return stdout.String(), withText(err, stderr.String())
}

// withText adds to the error of a command what the command said.
func withText(err error, said string) error {
	if text := strings.TrimSpace(said); err != nil && text != "" {
		return fmt.Errorf("%w: %s", err, text)
	}
	return err
}

// feed runs a program such as "ip -batch -" or "nft -f -" in the network
// namespace with the text as its standard input, and returns its output.
func (n *Namespace) feed(text string, name string, arg ...string) (string, error) {
	var out string
	err := n.Do(func() (err error) {
		cmd := exec.Command(name, arg...)
		cmd.Stdin = strings.NewReader(text)
		out, err = run(cmd)
		return err
	})
	if err != nil {
		return out, fmt.Errorf("%s in %s: %w", name, n.name, err)
	}
	return out, nil
}

// ip runs lines of ip's language in the namespace.
func (n *Namespace) ip(lines string) error {
	_, err := n.feed(lines, "ip", "-batch", "-")
	return err
}

// nft runs one transaction in the namespace.
func (n *Namespace) nft(rules string) error {
	_, err := n.feed(rules, "nft", "-f", "-")
	return err
}

// sysctl writes settings below /proc/sys/net, given as "path=value".
func (n *Namespace) sysctl(settings ...string) error {
	return n.Do(func() error {
		for _, s := range settings {
			path, value, _ := strings.Cut(s, "=")
			if err := os.WriteFile("/proc/sys/net/"+path, []byte(value), 0); err != nil {
				return fmt.Errorf("set %s in %s: %w", path, n.name, err)
			}
		}
		return nil
	})
}

// stopHolder takes the power away.
func (n *Namespace) stopHolder() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.holder != nil {
		n.holder.kill()
		n.holder = nil
	}
}

// close ends the holder in good order.
func (n *Namespace) close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.holder == nil {
		return nil
	}
	err := n.holder.close()
	n.holder = nil
	return err
}

// InNewNamespace runs f on a thread of its own in a new network namespace. The thread ends with f, and the namespace with
// the thread. f starts no goroutine that needs the namespace. An error says that the namespace could not be made: root is
// needed.
func InNewNamespace(f func()) error {
	done := make(chan struct{})
	var err error
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked, so that the thread ends
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			f()
		}
	}()
	<-done
	if err != nil {
		return fmt.Errorf("new network namespace: %w", err)
	}
	return nil
}
