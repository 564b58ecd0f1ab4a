// Copyright (c) The azure-vnet authors. MIT licence.

package kill

import (
	"bytes"
	"errors"
	"path/filepath"
	"testing"

	"github.com/containernetworking/cni/pkg/types"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// node is a VM with CNI plugins, and another one that watches it.
type node struct {
	test.Node
	probes *probes
}

func newNode(t *testing.T, vm vnetsim.VMConfig) node {
	t.Helper()
	if older == nil {
		t.Skip("the tracer knows amd64 and arm64 only")
	}
	_, vms := test.NewVNet(t, vm, vnetsim.VMConfig{})
	n := node{Node: test.OnNode(vms[0])}
	n.probes = startProbes(t, vms[1], n.Primary)
	return n
}

// in is the node, failing a subtest instead.
func (n node) in(t *testing.T) node { return node{n.Node.In(t), n.probes} }

// conf is a configuration in which a pod is given its address, so that histories with and without a kill end alike.
func (n node) conf(pod int, more ...string) []byte {
	return test.Stdin("1.1.0", "azure", test.Azure(more...), map[string]any{
		"ipam": map[string]any{"type": "azure-vnet-ipam", "ipAddress": n.Secondaries()[pod].String()}})
}

// traced runs azure-vnet under the tracer. If it was not killed, it succeeds.
func (n node) traced(tr *trace, verb, id string, conf []byte, more ...string) {
	n.T.Helper()
	tr.program = filepath.Join(n.Dir, "azure-vnet")
	cmd := n.Command(n.T.Context(), tr.program)
	var out bytes.Buffer
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = n.Environ(verb, id, "/run/netns/"+id, more...), bytes.NewReader(conf), &out, &out
	code, err := tr.run(cmd)
	if err != nil || code != 0 && !tr.killed {
		n.T.Fatalf("%s of %s under the tracer: code %d, %v: %s", verb, id, code, err, &out)
	}
}

// calls makes a call that succeeds.
func (n node) calls(verb, id string, conf []byte) {
	n.T.Helper()
	if out, err := n.Call(verb, id, "/run/netns/"+id, conf); err != nil {
		n.T.Errorf("%s of %s: %s %v", verb, id, out, err)
	}
}

// heal is a round past the grace.
func (n node) heal() {
	n.T.Helper()
	n.LeasesAged()
	n.Must(n.Dir+"/azure-vnet", "reconcile")
}

// addAgain is what runtimes do after an ADD that was killed: one ends the container and makes it anew, one tries again, and
// one comes back long after. Each pod runs in the end.
func (n node) addAgain(id string, conf []byte) func(killed bool, way int, heal func()) {
	return func(killed bool, way int, heal func()) {
		n.T.Helper()
		switch way {
		case 0:
			n.calls("DEL", id, conf)
		case 2:
			heal()
			n.calls("DEL", id, conf)
		}
		out, err := n.Call("ADD", id, "/run/netns/"+id, conf)
		var told *types.Error
		if errors.As(err, &told) && told.Code == 100 && way == 1 {
			err = nil // it was killed with all done, or not at all
		}
		if err != nil {
			n.T.Errorf("the ADD that follows: %s %v", out, err)
		}
	}
}

// TestKilledCalls kills ADD and DEL of a node that has a pod already.
func TestKilledCalls(t *testing.T) {
	t.Parallel()
	n := newNode(t, vnetsim.VMConfig{Secondaries: 4})
	n.Netns("keeper", "pod")
	n.calls("ADD", "keeper", n.conf(0))
	conf := n.conf(1)
	t.Run("ADD", func(t *testing.T) {
		n := n.in(t)
		history{
			call: func(tr *trace) { n.traced(tr, "ADD", "pod", conf) },
			next: n.addAgain("pod", conf),
			heal: n.heal,
			pods: []string{"keeper", "pod"},
			end:  func() { n.calls("DEL", "pod", conf) },
		}.try(t, n.Host, n.probes, 1)
	})
	t.Run("DEL", func(t *testing.T) {
		n := n.in(t)
		history{
			begin: func() { n.calls("ADD", "pod", conf) },
			call:  func(tr *trace) { n.traced(tr, "DEL", "pod", conf) },
			next: func(_ bool, way int, heal func()) {
				if way == 2 {
					heal()
				}
				n.calls("DEL", "pod", conf)
			},
			heal: n.heal,
			pods: []string{"keeper", "pod"},
			end:  func() {},
		}.try(t, n.Host, n.probes, 2)
	})
}
