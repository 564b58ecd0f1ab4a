// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

func docker(t *testing.T, vm *VM, arg ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	out, err := vm.Docker(ctx, arg...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func TestDockerOutlivesPowerCut(t *testing.T) {
	if _, err := exec.LookPath("dockerd"); err != nil {
		t.Skip("needs dockerd: on Debian it is in docker.io")
	}
	if os.Getenv("SOAK") == "" {
		t.Skip("test/docker's TestEveryRestart needs the same: make soak")
	}
	_, vms := newVNet(t, VMConfig{})
	vm := vms[0]
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(vm.DockerLog())
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	step := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		t.Log(what)
	}
	step("start", vm.StartDocker(ctx))
	step("import", vm.ImportBusybox(ctx))
	step("create", func() error {
		_, err := vm.Docker(ctx, "run", "-d", "--stop-signal", "KILL", "--restart", "always", "--name", "web", "busybox", "sleep", "1000000")
		return err
	}())
	if got := docker(t, vm, "run", "--rm", "busybox", "echo", "hello"); got != "hello" {
		t.Errorf("a container said %q, want hello", got)
	}
	if got := docker(t, vm, "run", "--rm", "busybox", "wget", "-qO-", "http://internet.test"); got != vm.Public.String() {
		t.Errorf("the internet saw %q, want %s", got, vm.Public)
	}
	step("kill", vm.StopDocker(ctx, syscall.SIGKILL))
	step("start again", vm.StartDocker(ctx))
	step("stop", vm.StopDocker(ctx, syscall.SIGTERM))
	step("start again", vm.StartDocker(ctx))
	step("cut", vm.PowerCut())
	step("boot", vm.Boot())
	step("start after the power cut", vm.StartDocker(ctx))
	if got := docker(t, vm, "exec", "web", "hostname"); got == "" {
		t.Error("web is not back")
	}
}
