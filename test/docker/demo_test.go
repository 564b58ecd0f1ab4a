// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"bufio"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"azurevnet/test"
)

// TestTheDemoLeavesNothing: broken off by Ctrl-C, wherever it is.
func TestTheDemoLeavesNothing(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make namespaces: sudo make test")
	}
	t.Parallel()
	if _, err := test.BuildPlugin(); err != nil {
		t.Fatal(err)
	}
	demo := filepath.Join(t.TempDir(), "demo")
	if out, err := exec.Command("go", "build", "-o", demo, "azurevnet/test/demo").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	for _, at := range []string{"vm1: 10.240.0.4", "vm1: docker network create"} {
		t.Run(at, func(t *testing.T) {
			dir := t.TempDir()
			cmd := exec.Command(demo, filepath.Join(test.Top, "build", "plugin"))
			cmd.Env = append(os.Environ(), "TMPDIR="+dir)
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C goes to the whole group
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewScanner(out)
			for lines.Scan() && !strings.Contains(lines.Text(), at) {
			}
			if len(startedWith(t, "TMPDIR="+dir)) < 2 {
				t.Error("there is nothing that could be left")
			}
			if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGINT); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			io.Copy(io.Discard, out)
			exit := new(exec.ExitError)
			if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 130 {
				t.Errorf("it ends with %v, and Ctrl-C is 130", err)
			}
			if took := time.Since(start); took > 30*time.Second {
				t.Errorf("it took %v to end", took)
			}
			if left, err := filepath.Glob(dir + "/*"); err != nil || len(left) > 0 {
				t.Errorf("files are left: %v %v", left, err)
			}
			test.Eventually(t, "all its processes are gone", 10*time.Second, func() bool { return len(startedWith(t, "TMPDIR="+dir)) == 0 })
		})
	}
}

// startedWith are the processes that have a variable in their environment.
func startedWith(t *testing.T, variable string) (found []string) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range all {
		environ, _ := os.ReadFile(path) // it may just have ended
		if strings.Contains("\x00"+string(environ), "\x00"+variable+"\x00") {
			found = append(found, path)
		}
	}
	return found
}
