// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"azurevnet/internal/statefile"
	"azurevnet/internal/vnetsim"

	"github.com/google/go-cmp/cmp"
)

// silence is the longest that a host may be unreachable in a test: a busy
// machine schedules late, while a host cut off is silent for good.
const silence = 400 * time.Millisecond

// A process started with these is no test but one that ensures or removes a
// bridge and kills itself before the step named.
const (
	killAt  = "BRIDGE_TEST_KILL_AT"
	killDo  = "BRIDGE_TEST_DO"
	killRun = "BRIDGE_TEST_RUN"
	killMAC = "BRIDGE_TEST_MAC"
)

func init() {
	if os.Getenv(killDo) == "" {
		return
	}
	h := New(Config{Run: os.Getenv(killRun)})
	h.step = func(name string) error {
		if name == os.Getenv(killAt) {
			return syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}
		return nil
	}
	var err error
	if os.Getenv(killDo) == "remove" {
		err = h.Remove(context.Background(), "azure0")
	} else {
		_, err = h.Ensure(context.Background(), Spec{MAC: os.Getenv(killMAC), Primary: true})
	}
	fmt.Fprintln(os.Stderr, "not killed:", err)
	os.Exit(1)
}

// die runs what in a process that is killed before step.
func (h *host) die(what, step string) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), 20*time.Second)
	defer cancel()
	exe, err := os.Executable()
	if err != nil {
		h.t.Fatal(err)
	}
	cmd := h.Command(ctx, exe)
	cmd.Env = append(os.Environ(), killDo+"="+what, killAt+"="+step, killRun+"="+h.cfg.Run, killMAC+"="+h.MAC)
	out, err := cmd.CombinedOutput()
	if err == nil || strings.Contains(string(out), "not killed") {
		h.t.Fatalf("%s was to die before %q: %v: %s", what, step, err, out)
	}
}

// names are the steps of a walk.
func names(steps []step) []string {
	var out []string
	for _, s := range steps {
		out = append(out, s.name)
	}
	return out
}

// checkSame compares pictures of a host.
func checkSame(t *testing.T, what string, want, got []string) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// Whatever step of a move fails, the host is where it was, and has been
// reachable all the time; the next try succeeds.
func TestFailedStepLeavesTheHostReachable(t *testing.T) {
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1}, vnetsim.VMConfig{})
	h := hosts[0]
	h.rich()
	home := h.picture("eth0")
	p := startProbe(t, h, hosts[1], h.Primary)

	broken := errors.New("broken by the test")
	failAt := func(step string) {
		failed := false
		h.step = func(name string) error {
			if name == step && !failed {
				failed = true
				return broken
			}
			return nil
		}
	}
	for _, step := range names((&move{}).up()) {
		failAt(step)
		if _, err := h.ensure(h.spec()); !errors.Is(err, broken) {
			t.Fatalf("ensure, broken at %s: %v", step, err)
		}
		p.passes(5)
		checkSame(t, "eth0 after ensure failed at "+step, home, h.picture("eth0"))
		if s, err := h.state(); err != nil || len(s.Bridges) != 0 {
			t.Errorf("ensure failed at %s and left %v, %v", step, s.Bridges, err)
		}
		h.step = nil
		if _, err := h.ensure(h.spec()); err != nil {
			t.Fatalf("ensure after it failed at %s: %v", step, err)
		}
		p.passes(5)
		checkSame(t, "azure0 after ensure failed at "+step, home, h.picture("azure0"))
		if err := h.remove("azure0"); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range names((&move{}).down()) {
		if _, err := h.ensure(h.spec()); err != nil {
			t.Fatal(err)
		}
		failAt(step)
		if err := h.remove("azure0"); !errors.Is(err, broken) {
			t.Fatalf("remove, broken at %s: %v", step, err)
		}
		p.passes(5)
		h.step = nil
		if err := h.remove("azure0"); err != nil {
			t.Fatalf("remove after it failed at %s: %v", step, err)
		}
		p.passes(5)
		checkSame(t, "eth0 after remove failed at "+step, home, h.picture("eth0"))
	}
	if worst := p.end(); worst > silence {
		t.Errorf("the host was silent for %v", worst)
	}
}

// Killed before any step of a move, the process leaves a host that is
// reachable, and a journal that whoever comes next finishes. Strict filtering
// lets in only what comes by the link that the routes lead to.
func TestKilledMoveIsFinished(t *testing.T) {
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1}, vnetsim.VMConfig{})
	h := hosts[0]
	h.rich()
	h.run("sh", "-c", "echo 1 >/proc/sys/net/ipv4/conf/all/rp_filter")
	home := h.picture("eth0")
	p := startProbe(t, h, hosts[1], h.Primary)

	for i, step := range names((&move{}).up())[1:] {
		h.die("ensure", step)
		p.passes(5)
		if i%2 == 0 {
			if mended := h.reconcile(); len(mended) == 0 {
				t.Errorf("reconcile mended nothing after ensure was killed at %s", step)
			}
		}
		if _, err := h.ensure(h.spec()); err != nil {
			t.Fatalf("ensure after it was killed at %s: %v", step, err)
		}
		p.passes(5)
		checkSame(t, "azure0 after ensure was killed at "+step, home, h.picture("azure0"))
		if err := h.remove("azure0"); err != nil {
			t.Fatal(err)
		}
		checkSame(t, "eth0 after ensure was killed at "+step, home, h.picture("eth0"))
	}
	for i, step := range names((&move{}).down())[1:] {
		if _, err := h.ensure(h.spec()); err != nil {
			t.Fatal(err)
		}
		h.die("remove", step)
		p.passes(5)
		if i%2 == 0 {
			if mended := h.reconcile(); len(mended) == 0 {
				t.Errorf("reconcile mended nothing after remove was killed at %s", step)
			}
		} else {
			if _, err := h.ensure(h.spec()); err != nil {
				t.Fatalf("ensure after remove was killed at %s: %v", step, err)
			}
			checkSame(t, "azure0 after remove was killed at "+step, home, h.picture("azure0"))
			if err := h.remove("azure0"); err != nil {
				t.Fatal(err)
			}
		}
		p.passes(5)
		checkSame(t, "eth0 after remove was killed at "+step, home, h.picture("eth0"))
	}
	if worst := p.end(); worst > silence {
		t.Errorf("the host was silent for %v", worst)
	}
}

// The way home from a failed move depends on no file: a full disk, or a lock that
// is not given back, keeps no host off its NIC.
func TestTheWayHomeNeedsNoJournal(t *testing.T) {
	_, hosts := newHosts(t, vnetsim.VMConfig{}, vnetsim.VMConfig{})
	h := hosts[0]
	home := h.picture("eth0")
	broken := errors.New("broken by the test")
	unlock := func() {}
	h.step = func(name string) (err error) {
		if name != "verify" {
			return nil
		}
		h.step = nil
		if unlock, err = statefile.Lock(t.Context(), h.path("host.json.lock"), "a sleeper"); err != nil {
			return err
		}
		return broken
	}
	start := time.Now()
	if _, err := h.ensure(h.spec()); !errors.Is(err, broken) {
		t.Fatal(err)
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("the way home took %v", took)
	}
	checkSame(t, "eth0", home, h.picture("eth0"))
	unlock()
	if _, err := h.ensure(h.spec()); err != nil {
		t.Error(err)
	}
}

// Killed before any step of a move, and then uninstalled: nothing is left, not
// even where no bridge stands that would tell.
func TestKilledMoveIsRemoved(t *testing.T) {
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
	h := hosts[0]
	home := h.picture("eth0")
	left := func() []string {
		return []string{
			h.run("nft", "list", "tables", "bridge"),
			h.run("sh", "-c", "iptables-nft -w -t nat -S POSTROUTING; iptables-nft -w -S FORWARD"),
			h.run("ip", "-o", "link", "show", "type", "bridge"),
			h.run("ls", h.cfg.Run+"/systemd/network"),
		}
	}
	if _, err := h.ensure(h.spec()); err != nil {
		t.Fatal(err)
	}
	if err := h.remove("azure0"); err != nil {
		t.Fatal(err)
	}
	nothing := left()
	if _, err := h.ensure(h.spec()); err != nil {
		t.Fatal(err)
	}
	h.ip("link add azv0123456789a type veth peer azc0123456789a") // an attach died
	if err := h.remove("azure0"); err != nil {
		t.Fatal(err)
	}
	if links := h.run("ip", "-o", "link"); strings.Contains(links, "azv0123456789a") {
		t.Errorf("left:\n%s", links)
	}
	for _, what := range []string{"ensure", "remove"} {
		steps := map[string][]step{"ensure": (&move{}).up(), "remove": (&move{}).down()}[what]
		for _, step := range names(steps)[1:] {
			if what == "remove" {
				if _, err := h.ensure(h.spec()); err != nil {
					t.Fatal(err)
				}
			}
			h.die(what, step)
			if err := h.Do(func() error { _, err := h.RemoveAll(t.Context(), func() error { return nil }); return err }); err != nil {
				t.Fatalf("remove all after %s was killed at %s: %v", what, step, err)
			}
			checkSame(t, "left after "+what+" was killed at "+step, nothing, left())
			checkSame(t, "eth0 after "+what+" was killed at "+step, home, h.picture("eth0"))
		}
	}
}
