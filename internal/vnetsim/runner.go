// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A runner is this very program started again in all namespaces of a VM. It starts commands there. The nsenter of a
// command takes three times the CPU time of a small command, and the tests run tens of thousands of them.
type runner struct {
	conn *net.UnixConn // one packet for each command; its end ends the runner
}

// runnerSetting in the environment turns this program into a runner.
const runnerSetting = "VNETSIM_RUNNER=yes"

// runnerAfter is how many commands of a VM nsenter starts before a runner does: to start a runner takes as long as ten
// of them.
const runnerAfter = 8

// maxOrder is the longest order in bytes. A packet of this length fits into the socket's buffer.
const maxOrder = 96 << 10

// order is a command for a runner. Its packet also has four files: the standard input, output and error, and a socket for
// the ending.
type order struct {
	Args, Env []string
}

// ending is how an ordered command ended.
type ending struct {
	Status int
	Signal syscall.Signal `json:",omitempty"`
	Error  string         `json:",omitempty"` // why it did not start
}

func init() {
	if slices.Contains(os.Environ(), runnerSetting) {
		serveOrders()
	}
}

// packets makes a pair of connected sockets that keep the ends of packets.
func packets() (a, b *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "packets"), os.NewFile(uintptr(fds[1]), "packets"), nil
}

// unixConn makes a connection of a socket, and closes the file.
func unixConn(f *os.File) (*net.UnixConn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.UnixConn), nil
}

// startRunner starts a runner by a command of Namespace.Command that runs the file 4: this program.
func startRunner(enter *exec.Cmd) (*runner, error) {
	mine, its, err := packets()
	if err != nil {
		return nil, err
	}
	defer its.Close()
	conn, err := unixConn(mine)
	if err != nil {
		return nil, err
	}
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		conn.Close()
		return nil, err
	}
	defer self.Close()
	enter.ExtraFiles, enter.Env = []*os.File{its, self}, append(os.Environ(), runnerSetting)
	enter.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := enter.Start(); err != nil {
		conn.Close()
		return nil, err
	}
	go enter.Wait()
	return &runner{conn}, nil
}

// run has the command run as Namespace.Exec does. The end of ctx kills the command's process group.
func (r *runner) run(ctx context.Context, env []string, stdin []byte, args []string) (out, said string, err error) {
	if env == nil {
		env = os.Environ()
	}
	stdout, stderr, back, err := r.order(order{args, env}, stdin)
	if err != nil {
		return "", "", err
	}
	defer back.Close()
	defer context.AfterFunc(ctx, func() {
		back.CloseWrite()
		back.SetReadDeadline(time.Now().Add(5 * time.Second))
	})()
	buf := make([]byte, 4096)
	n, err := back.Read(buf)
	var e ending
	if err == nil {
		err = json.Unmarshal(buf[:n], &e)
	}
	switch {
	case ctx.Err() != nil, err != nil: // or the VM has no power any more
		err = &ExitError{-1, "signal: killed"}
	case e.Error != "":
		err = errors.New(e.Error)
	case e.Signal != 0:
		err = &ExitError{-1, fmt.Sprintf("signal: %v", e.Signal)}
	case e.Status != 0:
		err = &ExitError{e.Status, fmt.Sprintf("exit status %d", e.Status)}
	}
	return stdout.text(), stderr.text(), err
}

// order sends an order. It returns the command's output, and the socket on which the ending comes.
func (r *runner) order(o order, stdin []byte) (stdout, stderr *output, back *net.UnixConn, err error) {
	packet, err := json.Marshal(o)
	if err != nil {
		return nil, nil, nil, err
	}
	var theirs []*os.File
	defer func() {
		for _, f := range theirs {
			f.Close()
		}
	}()
	in, feed, err := os.Pipe()
	if err != nil {
		return nil, nil, nil, err
	}
	theirs = append(theirs, in) // a command that reads nothing ends the writer
	go func() {
		feed.Write(stdin)
		feed.Close()
	}()
	for _, to := range []**output{&stdout, &stderr} {
		read, write, err := os.Pipe()
		if err != nil {
			return nil, nil, nil, err
		}
		theirs = append(theirs, write)
		*to = readAll(read)
	}
	mine, its, err := packets()
	if err != nil {
		return nil, nil, nil, err
	}
	theirs = append(theirs, its)
	if back, err = unixConn(mine); err != nil {
		return nil, nil, nil, err
	}
	var fds []int
	for _, f := range theirs {
		fds = append(fds, int(f.Fd()))
	}
	if _, _, err := r.conn.WriteMsgUnix(packet, unix.UnixRights(fds...), nil); err != nil {
		return nil, nil, nil, fmt.Errorf("the VM's runner is gone: %w", err)
	}
	return stdout, stderr, back, nil
}

// output is what a command writes to a pipe. A file would do, were it not for commands that open /dev/stderr again.
type output struct {
	from *os.File
	done chan struct{} // closed when nobody can write any more
	all  strings.Builder
}

// readAll reads a pipe until its end, and closes it.
func readAll(from *os.File) *output {
	o := &output{from: from, done: make(chan struct{})}
	go func() {
		defer close(o.done)
		defer from.Close()
		io.Copy(&o.all, from)
	}()
	return o
}

// text is the output of a command that has ended. A process that it left behind may hold the pipe open.
func (o *output) text() string {
	o.from.SetReadDeadline(time.Now().Add(lateOutput))
	<-o.done
	return o.all.String()
}

// serveOrders is a runner's whole life. It runs in init.
func serveOrders() {
	unix.CloseOnExec(4)
	conn, err := unixConn(os.NewFile(3, "orders"))
	if err != nil {
		os.Exit(1)
	}
	packet, rights := make([]byte, maxOrder), make([]byte, unix.CmsgSpace(4*4))
	for {
		n, control, _, _, err := conn.ReadMsgUnix(packet, rights)
		if n == 0 || err != nil {
			os.Exit(0)
		}
		var o order
		fds := received(rights[:control])
		if err := json.Unmarshal(packet[:n], &o); err != nil || len(fds) != 4 {
			os.Exit(1)
		}
		go o.serve(fds[0], fds[1], fds[2], fds[3])
	}
}

// received are the files of a packet.
func received(control []byte) (files []*os.File) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil
	}
	for _, m := range messages {
		fds, _ := unix.ParseUnixRights(&m)
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files
}

// serve runs a command and answers how it ended. It kills the command's process group when nobody waits any more.
func (o order) serve(stdin, stdout, stderr, to *os.File) {
	defer stdin.Close()
	defer stdout.Close()
	defer stderr.Close()
	back, err := unixConn(to)
	if err != nil {
		return
	}
	defer back.Close()
	cmd := exec.Command(o.Args[0], o.Args[1:]...)
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = o.Env, stdin, stdout, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var e ending
	if err := cmd.Start(); err != nil {
		e.Error = err.Error()
	} else {
		var mu sync.Mutex
		over := false // guarded by mu: the process's number may be another's
		go func() {
			back.Read(make([]byte, 1))
			mu.Lock()
			defer mu.Unlock()
			if !over {
				syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			}
		}()
		var info unix.Siginfo
		for unix.Waitid(unix.P_PID, cmd.Process.Pid, &info, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
		}
		mu.Lock()
		over = true
		mu.Unlock()
		cmd.Wait()
		if status := cmd.ProcessState.Sys().(syscall.WaitStatus); status.Signaled() {
			e.Signal = status.Signal()
		} else {
			e.Status = status.ExitStatus()
		}
	}
	packet, err := json.Marshal(e)
	if err == nil {
		back.Write(packet)
	}
}
