// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
)

// childEnv makes a process of this test program make one call and kill itself before a step of it, instead of
// running tests.
const childEnv = "BRIDGE_TEST_CHILD"

// childCall is what such a process does.
type childCall struct {
	Do       string // ensure, attach, detach or remove all
	Step     string // that it dies at; empty: none
	Run      string // of its Config
	Spec     Spec
	Endpoint Endpoint
}

func init() {
	if os.Getenv(childEnv) == "" {
		return
	}
	var c childCall
	err := json.Unmarshal([]byte(os.Getenv(childEnv)), &c)
	if err == nil {
		err = c.make()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func (c childCall) make() (err error) {
	h := New(Config{Run: c.Run})
	h.testHook = func(step string) error {
		if step == c.Step {
			return syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}
		return nil
	}
	ctx := context.Background()
	switch c.Do {
	case "ensure":
		_, err = h.Ensure(ctx, c.Spec)
	case "attach":
		_, err = h.Attach(ctx, c.Endpoint)
	case "detach":
		err = h.Detach(ctx, c.Endpoint.Owner)
	case "remove all":
		_, err = h.RemoveAll(ctx, func() error { return os.RemoveAll(h.path()) })
	}
	return err
}

// child makes the call in a process of its own on the VM.
func (h *host) child(c childCall) (output string, err error) {
	ctx, cancel := context.WithTimeout(h.t.Context(), 30*time.Second)
	defer cancel()
	exe, err := os.Executable()
	if err != nil {
		return "", err
	}
	c.Run = h.cfg.Run
	if i := strings.Index(c.Endpoint.Netns, "/root/"); i >= 0 {
		c.Endpoint.Netns = c.Endpoint.Netns[i+len("/root"):] // the process is inside
	}
	spec, err := json.Marshal(c)
	if err != nil {
		return "", err
	}
	cmd := h.Command(ctx, exe)
	cmd.Env = append(os.Environ(), childEnv+"="+string(spec))
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// kill makes the call in a process that is killed before the step.
func (h *host) kill(c childCall) {
	h.t.Helper()
	out, err := h.child(c)
	if err == nil || out != "" {
		h.t.Fatalf("%s was to be killed before %q: %v: %s", c.Do, c.Step, err, out)
	}
}

// steps lists the steps that f passes.
func (h *host) steps(f func()) (all []string) {
	h.testHook = func(step string) error { all = append(all, step); return nil }
	defer func() { h.testHook = nil }()
	f()
	return all
}

// mustPass fails the test unless all has each of the wanted steps.
func mustPass(t *testing.T, all []string, wanted ...string) {
	t.Helper()
	for _, step := range wanted {
		if !slices.Contains(all, step) {
			t.Errorf("there is no step %q in %q", step, all)
		}
	}
}

// settled is the kernel's state after a reconcile, which sweeps what no link tells of any more.
func (h *host) settled() string {
	h.t.Helper()
	h.reconcile()
	return h.kernelState()
}

// An attach that fails leaves nothing. One that dies is finished by a repeat, or cleared away by a detach or a
// reconcile, wherever it was. So is a detach that dies.
func TestHalfDoneIsFinished(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		h.running(1, mode, Policy{SNAT: true}) // a bystander
		in := h.container(0).endpoint(mode, Policy{SNAT: true})
		here := in
		here.Netns, here.IfName = "", ""
		here.Ports = []PublishedPort{{Proto: "udp", HostPort: 5353, Port: 53}, {Proto: "tcp", Port: 80}}
		for i, e := range []Endpoint{in, here} {
			if inShare(i, mode) {
				t.Run([]string{"in its namespace", "left here, with ports"}[i], func(t *testing.T) { checkHalfDone(t, h, e) })
			}
		}
	})
}

func checkHalfDone(t *testing.T, h *host, e Endpoint) {
	none := h.settled()
	attachSteps := h.steps(func() { h.mustAttach(e) })
	mustPass(t, attachSteps, "elements", "link", "port", "route", "namespace", "flows", "alias")
	whole := h.kernelState()
	checkSame(t, "reconciled when it was whole", whole, h.settled())
	detachSteps := h.steps(func() { h.mustDetach(e.Owner) })
	mustPass(t, detachSteps, "detach elements", "detach routes", "detach flows", "detach ports", "detach alias", "detach link")
	checkSame(t, "detached", none, h.kernelState())

	attach := func() { _, _ = h.attach(e) }
	detach := func() { _ = h.detach(e.Owner) }
	for _, step := range attachSteps {
		h.meets(step, func() error { return errOnPurpose }, func() {
			if _, err := h.attach(e); !errors.Is(err, errOnPurpose) {
				t.Errorf("broken at %q: %v", step, err)
			}
		})
		checkSame(t, "after a failure at "+step, none, h.kernelState())

		h.crash(step, attach)
		h.mustAttach(e)
		checkSame(t, "repeated after a crash at "+step, whole, h.kernelState())
		h.mustDetach(e.Owner)

		h.crash(step, attach)
		h.mustDetach(e.Owner)
		checkSame(t, "detached after a crash at "+step, none, h.settled())

		h.crash(step, attach)
		checkSame(t, "reconciled after a crash at "+step, none, h.settled())
		if mended := h.reconcile(); len(mended) > 0 {
			t.Errorf("reconciled again after a crash at %s: %q", step, mended)
		}
	}
	for _, step := range detachSteps {
		h.mustAttach(e)
		h.crash(step, detach)
		h.mustDetach(e.Owner)
		checkSame(t, "detached again after a crash at "+step, none, h.settled())

		h.mustAttach(e)
		h.crash(step, detach)
		if is := h.settled(); step == "detach link" {
			checkSame(t, "reconciled after a crash at "+step, none, is)
		} else if e.Ports == nil || step != "detach alias" { // from there the ports are forgotten, which status tells
			checkSame(t, "reconciled after a crash at "+step, whole, is)
		}
		if e.Netns == "" {
			h.mustAttach(e)
			checkSame(t, "attached after a crash at "+step, whole, h.kernelState())
		}
		h.mustDetach(e.Owner)
		checkSame(t, "detached after a crash at "+step+" and a reconcile", none, h.kernelState())
	}
}

// A link that a dead detach has left is known as ours, also if somebody took it out of its group before.
func TestADeadDetachLeavesItsMark(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		none := h.kernelState()
		e := h.container(0).endpoint(mode, Policy{})
		link := h.mustAttach(e).Link
		h.ip("link set " + link + " group 0")
		if !h.crash("detach link", func() { _ = h.detach(e.Owner) }) {
			t.Fatal("the detach did not come to its last step")
		}
		checkSame(t, "after a round", none, h.settled())
	})
}

// A process that is killed in the middle of a call holds nobody up: not by a lock, and not by what it left.
func TestKilledCallIsFinished(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
		h := hosts[0]
		nothing := h.kernelState()
		ensureSteps := h.steps(func() { h.mustEnsure(h.spec(mode)) })
		prepared := h.kernelState()
		e := h.container(0).endpoint(mode, Policy{SNAT: true})
		e.Ports = []PublishedPort{{Proto: "tcp", HostPort: 8080, Port: 80}}
		attachSteps := h.steps(func() { h.mustAttach(e) })
		whole := h.kernelState()
		detachSteps := h.steps(func() { h.mustDetach(e.Owner) })
		none := h.kernelState() // with the policy's chain

		for _, step := range attachSteps {
			h.kill(childCall{Do: "attach", Step: step, Endpoint: e})
			h.mustAttach(e)
			checkSame(t, "attached after a kill at "+step, whole, h.kernelState())
			h.mustDetach(e.Owner)
		}
		for _, step := range detachSteps {
			h.mustAttach(e)
			h.kill(childCall{Do: "detach", Step: step, Endpoint: e})
			h.mustDetach(e.Owner)
			checkSame(t, "detached after a kill at "+step, none, h.settled())
		}
		if err := h.removeAll(); err != nil {
			t.Fatal(err)
		}
		for i, step := range ensureSteps {
			if !inShare(i, mode) {
				continue
			}
			h.sh("echo 0 >/proc/sys/net/ipv4/ip_forward") // so that each step is met
			h.kill(childCall{Do: "ensure", Step: step, Spec: h.spec(mode)})
			h.mustEnsure(h.spec(mode))
			checkSame(t, "ensured after a kill at "+step, prepared, h.kernelState())
			if err := h.removeAll(); err != nil {
				t.Fatal(err)
			}
			checkSame(t, "removed after a kill at "+step, nothing, h.kernelState())
		}
	})
}

// An Ensure that fails leaves nothing of what it was to make. One that dies is finished by a repeat or by a
// reconcile, or taken away by RemoveAll, wherever it was. So is a RemoveAll that dies.
func TestHalfPreparedIsFinished(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{})
		h := hosts[0]
		if mode == ModeBridge { // iptables is slow
			h.run("iptables-nft", "-P", "FORWARD", "DROP")
		}
		nothing := h.kernelState()
		ensureSteps := h.steps(func() { h.mustEnsure(h.spec(mode)) })
		mustPass(t, ensureSteps, "ask", "mend: net.ipv4.ip_forward is not 1", "mend: the nft table ip azure_vnet is gone")
		if mode == ModeBridge {
			mustPass(t, ensureSteps, "mend: azure0 is gone", "bridge", "bridge alias", "bridge MTU", "bridge sysctls", "bridge up")
		}
		whole := h.kernelState()
		if mended := h.reconcile(); len(mended) > 0 {
			t.Errorf("just made, it lacked %q", mended)
		}
		ensure := func() { _, _ = h.ensure(h.spec(mode)) }
		removeAll := func() { _ = h.removeAll() }
		mustRemove := func() {
			t.Helper()
			if err := h.removeAll(); err != nil {
				t.Fatal(err)
			}
		}
		removeSteps := h.steps(mustRemove)
		mustPass(t, removeSteps, "remove rules", "forget")
		checkSame(t, "removed", nothing, h.kernelState())

		for i, step := range ensureSteps {
			if !inShare(i, mode) {
				continue
			}
			h.sh("echo 0 >/proc/sys/net/ipv4/ip_forward") // so that each step is met
			if !h.meets(step, func() error { return errOnPurpose }, func() {
				if _, err := h.ensure(h.spec(mode)); !errors.Is(err, errOnPurpose) {
					t.Errorf("ensure, broken at %q: %v", step, err)
				}
			}) {
				t.Errorf("ensure did not come to %q", step)
			}
			checkSame(t, "after a failure at "+step, nothing, h.kernelState())

			h.crash(step, ensure)
			h.mustEnsure(h.spec(mode))
			checkSame(t, "repeated after a crash at "+step, whole, h.kernelState())
			mustRemove()

			h.crash(step, ensure)
			h.reconcile()
			if step == "ask" {
				checkSame(t, "reconciled after a crash at "+step, nothing, h.kernelState())
			} else {
				checkSame(t, "reconciled after a crash at "+step, whole, h.kernelState())
			}
			mustRemove()

			h.crash(step, ensure)
			if strings.HasPrefix(step, "bridge") { // nobody knows any more what was asked
				if err := os.Remove(h.path("host.json")); err != nil {
					t.Error(err)
				}
			}
			mustRemove()
			checkSame(t, "removed after a crash at "+step, nothing, h.kernelState())
		}
		for _, step := range removeSteps {
			h.mustEnsure(h.spec(mode))
			h.crash(step, removeAll)
			mustRemove()
			checkSame(t, "removed again after a crash at "+step, nothing, h.kernelState())

			h.mustEnsure(h.spec(mode))
			h.crash(step, removeAll)
			h.mustEnsure(h.spec(mode))
			checkSame(t, "ensured after a crash at "+step, whole, h.kernelState())
			mustRemove()
		}
	})
}
