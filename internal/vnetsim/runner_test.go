// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"context"
	"strings"
	"testing"
	"time"
)

// TestRunIsTheSameForManyCommands: the first commands of a VM, which nsenter starts, and the later ones, which a runner
// starts, give the same output, errors and ends. They see the same namespaces and the same boot clock.
func TestRunIsTheSameForManyCommands(t *testing.T) {
	_, vms := newVNet(t, VMConfig{})
	vm := vms[0]
	look := func(when string) (seen []string) {
		for _, c := range []string{
			`echo "$PATH"; echo ignored >&2`,
			`echo out; echo why >&2; exit 3`,
			`kill -TERM $$`,
			`pwd; for f in net mnt uts ipc pid cgroup time; do readlink /proc/self/ns/$f; done; test $(cut -d. -f1 /proc/uptime) -lt 600 && echo young`,
		} {
			out, err := vm.Run(t.Context(), "sh", "-c", c)
			text := ""
			if err != nil {
				text = err.Error()
			}
			seen = append(seen, out+text)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		start := time.Now()
		if _, err := vm.Run(ctx, "sh", "-c", "busybox sleep 987 & busybox sleep 987"); err == nil || !strings.Contains(err.Error(), "signal: killed") || time.Since(start) > 5*time.Second {
			t.Errorf("%s: after %v: %v", when, time.Since(start), err)
		}
		if out, err := vm.Run(t.Context(), "sh", "-c", "busybox pgrep -f 'sleep 98[7]' || true"); out != "" || err != nil {
			t.Errorf("%s: what was killed runs: %q %v", when, out, err)
		}
		return seen
	}
	first := look("before the runner")
	for range runnerAfter {
		vm.Run(t.Context(), "true")
	}
	if vm.runner() == nil {
		t.Fatal("there is no runner")
	}
	later := look("with the runner")
	for i := range first {
		if first[i] != later[i] {
			t.Errorf("nsenter gives\n%s\nand the runner gives\n%s", first[i], later[i])
		}
	}
	if _, err := vm.Run(t.Context(), "no-such-command"); err == nil || !strings.Contains(err.Error(), "no-such-command") {
		t.Errorf("no such command: %v", err)
	}
	if err := vm.PowerCut(); err != nil {
		t.Fatal(err)
	}
	if err := vm.Boot(); err != nil {
		t.Fatal(err)
	}
	if out, err := vm.Run(t.Context(), "echo", "again"); out != "again\n" || err != nil {
		t.Errorf("after a boot: %q %v", out, err)
	}
}
