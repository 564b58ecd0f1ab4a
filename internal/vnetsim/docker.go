// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// engine is a dockerd that runs in a VM.
type engine struct {
	enter  *os.Process // nsenter, its parent
	exited chan struct{}
}

// StartDocker starts dockerd in the VM with the arguments besides its usual
// ones, and returns when its API answers. Its log goes to the VM's disk.
func (m *VM) StartDocker(ctx context.Context, args ...string) error {
	e, err := m.startEngine(args)
	if err != nil {
		return fmt.Errorf("start dockerd on %s: %w", m.Name, err)
	}
	socket := fmt.Sprintf("/proc/%d/root/run/docker.sock", m.PidOne())
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker/_ping", nil)
		if err != nil {
			return err
		}
		if resp, err := client.Do(req); err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-e.exited:
			log := m.DockerLog()
			if !strings.HasSuffix(strings.TrimSpace(log), "timeout waiting for containerd to start") {
				return fmt.Errorf("start dockerd on %s: it ended:\n%s", m.Name, log)
			}
			// dockerd gives its containerd ten seconds, which a machine with many tests may need. systemd would start
			// it again, too.
			if e, err = m.startEngine(args); err != nil {
				return fmt.Errorf("start dockerd on %s again: %w", m.Name, err)
			}
		case <-ctx.Done():
			return fmt.Errorf("start dockerd on %s: %w:\n%s", m.Name, ctx.Err(), m.DockerLog())
		}
	}
}

func (m *VM) startEngine(args []string) (*engine, error) {
	m.power.Lock()
	defer m.power.Unlock()
	if m.engine != nil {
		select {
		case <-m.engine.exited:
		default:
			return nil, errors.New("it runs already")
		}
	}
	log, err := os.OpenFile(m.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	enter := m.Command(context.Background(), "dockerd", append([]string{"--host", "unix:///run/docker.sock"}, args...)...)
	if enter.Err != nil {
		return nil, enter.Err
	}
	// Into the VM's cgroups first: from within, they are the root.
	script := ""
	for _, file := range procsFiles(m.cgroups) {
		script += "echo 0 >" + file + "\n"
	}
	cmd := exec.Command("sh", append([]string{"-c", script + `exec "$@"`, "sh"}, enter.Args...)...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	e := &engine{enter: cmd.Process, exited: make(chan struct{})}
	m.engine = e
	go func() {
		cmd.Wait()
		close(e.exited)
	}()
	return e, nil
}

// StopDocker sends dockerd a signal, SIGTERM or SIGKILL, and waits for its end.
func (m *VM) StopDocker(ctx context.Context, sig syscall.Signal) error {
	m.power.Lock()
	e := m.engine
	m.power.Unlock()
	if e == nil {
		return fmt.Errorf("stop dockerd on %s: it does not run", m.Name)
	}
	select {
	case <-e.exited: // on its own
	default:
		if _, err := m.Run(ctx, "sh", "-c", fmt.Sprintf("kill -%d $(cat /run/docker.pid)", sig)); err != nil {
			return fmt.Errorf("stop dockerd: %w", err)
		}
	}
	select {
	case <-e.exited:
	case <-ctx.Done():
		return fmt.Errorf("stop dockerd on %s: %w:\n%s", m.Name, ctx.Err(), m.DockerLog())
	}
	m.power.Lock()
	defer m.power.Unlock()
	if m.engine == e {
		m.engine = nil
	}
	return nil
}

// HangDocker stops dockerd in its tracks: its sockets accept, and nobody answers.
// It returns what lets it go on.
func (m *VM) HangDocker(ctx context.Context) (resume func() error, err error) {
	m.power.Lock()
	defer m.power.Unlock()
	if m.engine == nil {
		return nil, fmt.Errorf("hang dockerd on %s: it does not run", m.Name)
	}
	if _, err := m.Run(ctx, "sh", "-c", "kill -STOP $(cat /run/docker.pid)"); err != nil {
		return nil, fmt.Errorf("hang dockerd: %w", err)
	}
	// nsenter stops when its child does, and goes on with it.
	enter := m.engine.enter
	return func() error { return enter.Signal(syscall.SIGCONT) }, nil
}

// Docker runs the docker command in the VM.
func (m *VM) Docker(ctx context.Context, arg ...string) (string, error) {
	return m.Run(ctx, "docker", append([]string{"--host", "unix:///run/docker.sock"}, arg...)...)
}

func (m *VM) logFile() string { return filepath.Join(m.disk, "dockerd.log") }

// DockerLog is the end of what dockerd and its plugins wrote, over all its
// starts, without containerd's tale of its own parts: at most 32 KiB.
func (m *VM) DockerLog() string {
	b, err := os.ReadFile(m.logFile())
	if err != nil {
		return err.Error()
	}
	var kept strings.Builder
	for line := range strings.Lines(string(b)) {
		if !strings.Contains(line, "module=grpc") && !strings.Contains(line, "loading plugin") {
			kept.WriteString(line)
		}
	}
	log := kept.String()
	return log[max(0, len(log)-32<<10):]
}

// ImportBusybox makes the image busybox:latest in the VM's engine out of this
// machine's static busybox.
func (m *VM) ImportBusybox(ctx context.Context) error {
	image, err := busyboxTar()
	if err != nil {
		return fmt.Errorf("make an image of busybox: %w", err)
	}
	cmd := m.Command(ctx, "docker", "--host", "unix:///run/docker.sock", "import",
		"--change", "ENV PATH=/bin", "--change", `CMD ["sh"]`, "-", "busybox:latest")
	cmd.Stdin = bytes.NewReader(image)
	if _, err := run(cmd); err != nil {
		return fmt.Errorf("on %s: docker import: %w", m.Name, err)
	}
	return nil
}

// busyboxTar is a root file system of busybox and links to it.
func busyboxTar() ([]byte, error) {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return nil, fmt.Errorf("%w; on Debian it is in busybox-static", err)
	}
	program, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	applets, err := run(exec.Command(path, "--list"))
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h tar.Header, content string) {
		h.Size = int64(len(content))
		// A buffer cannot fail; an error stays in w until Close.
		w.WriteHeader(&h)
		w.Write([]byte(content))
	}
	for _, dir := range []string{"bin/", "etc/", "root/", "var/", "www/"} {
		add(tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755}, "")
	}
	add(tar.Header{Typeflag: tar.TypeDir, Name: "tmp/", Mode: 0o1777}, "")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/passwd", Mode: 0o644}, "root:x:0:0:root:/root:/bin/sh\n")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/group", Mode: 0o644}, "root:x:0:\n")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/busybox", Mode: 0o755}, string(program))
	for _, name := range strings.Fields(applets) {
		if name != "busybox" {
			add(tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + name, Linkname: "busybox"}, "")
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
