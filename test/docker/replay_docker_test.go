// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"azurevnet/test"
)

// between are things that happened between two calls, and that no call tells.
// The key is the number of the step before whose first call they happened.
type between map[string]func(r *engineReplay, next []engineCall)

// situations are all that was recorded, in the order of the replay: the network
// azure is there from network-create to network-rm.
var situations = []struct {
	name    string
	between between
}{
	{"plugin-enable", nil},
	{"network-create", nil},
	{"network-create-no-subnet", nil},
	{"network-create-refused", nil},
	{"network-aux-range", nil},
	{"network-internal", nil},
	{"two-azure-networks", nil},
	{"run-rm", nil},
	{"run-ip", nil},
	{"run-mac", nil},
	{"run-alias", nil},
	{"run-fails", nil},
	{"run-P", nil},
	{"run-p-one", nil},
	{"run-p-range", nil},
	{"run-p-udp", nil},
	{"run-p-loopback", nil},
	{"restart", nil},
	{"restart-fixed-ip", nil},
	{"stop-start", nil},
	{"connect-disconnect", nil},
	{"disconnect-connect", nil},
	{"azure-p-then-bridge-aa", nil},
	{"azure-p-then-bridge-zz", nil},
	{"bridge-aa-p-then-azure", nil},
	{"bridge-zz-p-then-azure", nil},
	{"gw-priority", nil},
	{"swarm", nil},
	{"swarm-leave-with-task", nil},
	{"plugin-killed", between{"3": (*engineReplay).killPlugin}},
	{"plugin-killed-mid-call", between{"4": (*engineReplay).killPluginInCall}},
	{"plugin-disable-enable", between{"4": (*engineReplay).restartPlugin}},
	{"plugin-disable-rm-enable", between{"5": (*engineReplay).removeUnseen}},
	{"engine-term", between{"4": (*engineReplay).restartPlugin}},
	{"engine-term-live-restore", nil}, // neither the plugin nor a container ends
	{"engine-kill-live-restore", between{"4": (*engineReplay).restartPlugin}},
	{"engine-kill-restart-policy", between{"4": (*engineReplay).killContainersRestartPlugin}},
	{"plugin-and-engine-killed-live-restore", between{"5": (*engineReplay).killPlugin}},
	{"power-cut", between{"5": (*engineReplay).cutPower}},
	{"network-rm", nil},
}

// differences are calls that may fail where the recorded one succeeded, or succeed where
// it failed. The key is engine/situation/step/method, the value is the reason. There is
// none today.
var differences = map[string]string{}

// TestRecordedEngines sends the plugin what real engines sent, call by call, and
// plays their part in the kernel. The plugin has to answer as it did to them, every
// container has to reach others and be reached, and nothing may be left of the
// containers that are gone.
func TestRecordedEngines(t *testing.T) {
	t.Parallel()
	for _, engine := range []string{"20.10", "28", "29"} {
		t.Run("engine-"+engine, func(t *testing.T) {
			if engine != "29" && !test.Soaking {
				t.Skip("the newest one runs: make soak")
			}
			t.Parallel()
			recorded := recordedOf(t, engine)
			r := newEngineReplay(t, engine, recorded["network-create"], recorded["run-rm"])
			for _, s := range situations {
				calls, ok := recorded[s.name]
				if !ok {
					continue // gw-priority and swarm-leave-with-task are not of every engine
				}
				delete(recorded, s.name)
				if !t.Run(s.name, func(t *testing.T) { r.in(t).situation(s.name, calls, s.between) }) {
					r.in(t).begin("after " + s.name)
					r.cutPower(nil)
				}
			}
			for name := range recorded {
				t.Errorf("%s was recorded and is not replayed: the table lacks it", name)
			}
			r.in(t).endWitness()
			test.NothingDropped(t, r.vnet)
		})
	}
}

// situation replays one recording, and looks at what is left of it.
func (r *engineReplay) situation(name string, calls []engineCall, happens between) {
	if name != "plugin-enable" && name != "network-create" {
		r.createNetwork()
		r.startWitness()
	}
	if name == "network-rm" {
		r.endWitness()
	}
	r.begin(name)
	for i, step := 0, ""; i < len(calls); i++ {
		if calls[i].Step != step {
			step = calls[i].Step
			number, _, _ := strings.Cut(step, ":")
			if f := happens[number]; f != nil {
				f(r, calls[i:])
				for _, ep := range r.lives() {
					r.reached(ep)
				}
			}
		}
		r.play(calls[i])
	}
	if name == "network-create" {
		r.keepNetwork()
	}
	r.settle()
}

// createNetwork makes the network azure if it is not there, which happens only where
// network-create is not among the tests that run.
func (r *engineReplay) createNetwork() {
	r.T.Helper()
	if r.network != "" {
		return
	}
	r.begin("network-create")
	for _, c := range r.create {
		r.play(c)
	}
	r.keepNetwork()
}

// keepNetwork keeps the ids of the network that was made.
func (r *engineReplay) keepNetwork() {
	for _, c := range r.create {
		switch c.Method {
		case "IpamDriver.RequestPool":
			r.pool = r.names[c.Answer["PoolID"].(string)]
		case "NetworkDriver.CreateNetwork":
			r.network = r.names[c.Request["NetworkID"].(string)]
		}
	}
}

// begin forgets the names of the situation before.
func (r *engineReplay) begin(scope string) {
	r.scope, r.leaks = scope, false
	r.names, r.sandboxes, r.endpoints = map[string]string{}, map[string]*test.Container{}, map[string]*endpoint{}
}

// startWitness runs a container that no situation may hurt, if there is none.
func (r *engineReplay) startWitness() {
	if r.witness != nil {
		return
	}
	r.witnessCounter++
	r.asWitness(fmt.Sprint("witness ", r.witnessCounter), func() {
		for _, c := range r.run {
			r.play(c)
		}
		for _, ep := range r.endpoints {
			r.witness = ep
		}
	})
}

// endWitness removes that container.
func (r *engineReplay) endWitness() {
	if r.witness == nil {
		return
	}
	ep := r.witness
	r.asWitness(r.witnessScope, func() {
		r.names["endpoint1"], r.names[addressIn(r.run)] = ep.id, ep.addr.String()
		r.endpoints[ep.id] = ep
		for _, c := range r.rm {
			r.play(c)
		}
	})
	r.witness = nil
}

// asWitness runs f among the witness's names.
func (r *engineReplay) asWitness(scope string, f func()) {
	names, sandboxes, endpoints, old := r.names, r.sandboxes, r.endpoints, r.scope
	r.scope, r.witnessScope = scope, scope
	r.names, r.sandboxes, r.endpoints = map[string]string{}, map[string]*test.Container{}, map[string]*endpoint{}
	f()
	r.names, r.sandboxes, r.endpoints, r.scope = names, sandboxes, endpoints, old
}

// addressIn is the address that RequestAddress gave in the recording.
func addressIn(calls []engineCall) string {
	for _, c := range calls {
		if c.Method == "IpamDriver.RequestAddress" {
			addr, _, _ := strings.Cut(c.Answer["Address"].(string), "/")
			return addr
		}
	}
	return ""
}

// lives are the endpoints that the engine has: of the situation, and the witness.
func (r *engineReplay) lives() []*endpoint {
	var all []*endpoint
	for _, ep := range r.endpoints {
		if !ep.gone {
			all = append(all, ep)
		}
	}
	if r.witness != nil && !slices.Contains(all, r.witness) {
		all = append(all, r.witness)
	}
	return all
}

// settle says that the plugin holds what the engine has, and nothing else: leases,
// links, and whatever names them in the kernel.
func (r *engineReplay) settle() {
	r.T.Helper()
	if r.leaks {
		r.LeasesAged()
		r.restartPlugin(nil)
	}
	leases, links, alive := []string{}, []string{}, map[string]bool{}
	for _, ep := range r.lives() {
		leases, links = append(leases, ep.addr.String()), append(links, ep.hostEnd)
		alive[ep.addr.String()], alive[ep.mac], alive[ep.hostEnd] = true, true, true
	}
	slices.Sort(leases)
	slices.Sort(links)
	var gone []string
	for _, ep := range r.endpoints {
		for _, word := range []string{ep.addr.String(), ep.mac, ep.hostEnd} {
			if ep.gone && word != "" && !alive[word] {
				gone = append(gone, word)
			}
		}
	}
	type state struct{ Leases, Links, Traces []string }
	want, got := state{leases, links, []string{}}, state{}
	// What died with its namespace goes by the next round of reconciling.
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if got = (state{r.Lent(), r.ContainerLinks(), r.Traces(slices.Clone(gone)...)}); cmp.Equal(want, got) {
			break
		}
		if time.Now().After(end) {
			r.T.Errorf("after the situation (- want, + got):\n%s", cmp.Diff(want, got))
			break
		}
	}
	for _, ep := range r.lives() {
		r.reached(ep)
	}
}
