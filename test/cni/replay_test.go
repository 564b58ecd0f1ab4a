// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netns"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// runtimeCall is one recorded call of a container runtime: see testdata/README.md.
type runtimeCall struct {
	Name, Step, Plugin string
	Env                map[string]string
	Stdin              map[string]json.RawMessage
	Failed             *struct{ Code uint } // nil: the call succeeded
}

func (c runtimeCall) verb() string { return c.Env["CNI_COMMAND"] }
func (c runtimeCall) id() string   { return c.Env["CNI_CONTAINERID"] }

// of is the call for another container.
func (c runtimeCall) of(id string) runtimeCall {
	env := map[string]string{}
	for key, value := range c.Env {
		env[key] = strings.ReplaceAll(value, c.id(), id)
	}
	c.Env = env
	return c
}

// recordedOfRuntimes reads all calls, by RUNTIME-CONF-STEP, in their order.
func recordedOfRuntimes(t *testing.T) map[string][]runtimeCall {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", "runtimes.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	all := map[string][]runtimeCall{}
	for d := json.NewDecoder(bytes.NewReader(text)); ; {
		var c runtimeCall
		if err := d.Decode(&c); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		// The number of a call is after the step, which may have hyphens itself.
		before, _, _ := strings.Cut(c.Name, "-"+c.Step+"-")
		all[before+"-"+c.Step] = append(all[before+"-"+c.Step], c)
	}
	for _, calls := range all {
		slices.SortFunc(calls, func(a, b runtimeCall) int { return strings.Compare(a.Name, b.Name) })
	}
	return all
}

// series are the recordings in the order in which a runtime made the calls. What has
// to be there before a step, and no call tells, is done by the function of that name.
var series = []struct {
	of     string // RUNTIME-CONF
	steps  []string
	before map[string]func(*runtimeReplay)
}{
	{"containerd-0.3.1", []string{"run", "stop", "remove"}, nil},
	{"containerd-0.4.0", []string{"run", "stop", "remove"}, nil},
	{"containerd-1.0.0", []string{"run", "stop", "remove"}, nil},
	{"containerd-1.1.0", []string{"status", "run", "stop", "remove"}, nil},
	{"containerd-1.1.0", []string{"add-fails"}, map[string]func(*runtimeReplay){"add-fails": (*runtimeReplay).lendAll}},
	{"containerd-1.1.0", []string{"later-plugin-fails"}, nil},
	{"containerd-1.1.0", []string{"reboot-stop", "reboot-remove"}, map[string]func(*runtimeReplay){"reboot-stop": (*runtimeReplay).cutPower}},
	{"containerd-cniVersions", []string{"status", "run", "stop", "remove"}, nil},
	{"containerd-caps", []string{"run", "stop", "remove"}, nil},
	{"crio-1.1.0", []string{"start-no-pods"}, map[string]func(*runtimeReplay){"start-no-pods": (*runtimeReplay).leaveStale}},
	{"crio-1.1.0", []string{"run", "start-with-pod", "stop"}, map[string]func(*runtimeReplay){"start-with-pod": (*runtimeReplay).leaveStale}},
	{"crio-1.0.0", []string{"run", "stop"}, nil},
	{"crio-caps", []string{"run", "stop"}, nil},
}

// notRun are calls that are not sent, with the reason.
var notRun = map[string]string{
	"containerd-1.1.0-later-plugin-fails-02-portmap-ADD": "the stand-in of the recording failed here, and the real portmap would not",
}

// TestRecordedRuntimes sends the CNI plugin what real runtimes sent, with the
// environment and the configuration that they gave, and plays their part: it makes the
// namespaces, and hands on the results.
func TestRecordedRuntimes(t *testing.T) {
	t.Parallel()
	recorded := recordedOfRuntimes(t)
	const lends = 4 // few, so that an address that is given back is soon lent again
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: lends}, vnetsim.VMConfig{})
	r := &runtimeReplay{Node: test.OnNode(vms[0]), other: vms[1], recorded: recorded, beyond: test.OpenNamespace(t, vms[1].Namespace)}
	defer r.beyond.Close()
	r.addWitness()
	unplayed := maps.Clone(recorded)
	for _, s := range series {
		for _, step := range s.steps {
			delete(unplayed, s.of+"-"+step)
		}
		t.Run(s.of+"/"+strings.Join(s.steps, ","), func(t *testing.T) {
			r.pods = map[string]*pod{}
			for _, step := range s.steps {
				name := s.of + "-" + step
				if f := s.before[step]; f != nil {
					f(r.in(t))
				}
				for _, c := range recorded[name] {
					t.Run(c.Name, func(t *testing.T) {
						if why := notRun[c.Name]; why != "" {
							t.Skip(why)
						}
						r.in(t).play(c)
					})
				}
				r.in(t).endStopped()
				r.alive()
			}
			r.settle()
		})
	}
	for name := range unplayed {
		t.Errorf("%s was recorded and is not replayed: the table lacks it", name)
	}
	test.NothingDropped(t, vnet)
}

// pod is what the runtime knows of one.
type pod struct {
	netns  string          // name in /run/netns
	result json.RawMessage // of the last plugin's ADD, as libcni keeps it
	addr   netip.Addr      // invalid: it never had one
	mac    string
	in     *test.Container // nil: it has no namespace
	gone   bool            // the runtime deleted it
}

// runtimeReplay is a runtime on a node, which the recordings drive.
type runtimeReplay struct {
	test.Node
	other    test.Host
	beyond   netns.NsHandle // the network namespace of the other VM
	recorded map[string][]runtimeCall
	witness  netip.Addr // of a pod of another network, which nothing may hurt
	pods     map[string]*pod
}

// in has a subtest fail instead.
func (r *runtimeReplay) in(t *testing.T) *runtimeReplay {
	r.Node = r.Node.In(t)
	return r
}

// addWitness makes a pod of another network of the same plugin.
func (r *runtimeReplay) addWitness() {
	r.T.Helper()
	r.witness, _ = r.Add(r.List("1.1.0", "witness", test.Azure()), r.Pod("witness"))
}

// netnsOf opens a namespace that has a name in the VM.
func (r *runtimeReplay) netnsOf(name string) *test.Container {
	r.T.Helper()
	ns, err := netns.GetFromPath(fmt.Sprintf("/proc/%d/root/run/netns/%s", r.PidOne(), name))
	if err != nil {
		r.T.Fatal(err)
	}
	return &test.Container{Ns: ns, Listeners: map[uint16]net.Listener{}}
}

// play sends one recorded call, and what it answers has to be what the specification
// says. A DEL is sent twice.
func (r *runtimeReplay) play(c runtimeCall) {
	r.T.Helper()
	p := r.pods[c.id()]
	if c.verb() == "ADD" && p == nil {
		p = &pod{netns: filepath.Base(c.Env["CNI_NETNS"])}
		r.pods[c.id()] = p
		r.Must("ip", "netns", "add", p.netns)
		p.in = r.netnsOf(p.netns)
	}
	before := r.state()
	out, err := r.send(c)
	if c.Failed != nil {
		r.refused(c, out, err)
		if diff := cmp.Diff(before, r.state()); diff != "" {
			r.T.Errorf("a call that failed left something:\n%s", diff)
		}
		return
	}
	if err != nil {
		r.T.Fatalf("%s %s: %v", c.Plugin, c.verb(), err)
	}
	documents := r.documents(out)
	switch c.verb() {
	case "ADD":
		r.added(c, p, documents)
		return
	case "VERSION":
		var told struct{ SupportedVersions []string }
		if len(documents) != 1 || json.Unmarshal(documents[0], &told) != nil || !slices.Contains(told.SupportedVersions, "1.1.0") {
			r.T.Errorf("VERSION answers %s", out)
		}
		return
	case "CHECK", "STATUS":
		if diff := cmp.Diff(before, r.state()); diff != "" {
			r.T.Errorf("%s changed something:\n%s", c.verb(), diff)
		}
	case "DEL":
		if _, err := r.send(c); err != nil {
			r.T.Errorf("a second DEL: %v", err)
		}
		if p != nil && c.Plugin == "azure-vnet" {
			p.gone = true
		}
	case "GC":
		r.collected(c)
	}
	if len(documents) > 0 {
		r.T.Errorf("%s prints %s, and success has no result", c.verb(), out)
	}
}

// send runs the plugin with the recorded environment and configuration. CNI_PATH is
// where the plugins are here, and prevResult is what our own ADD answered.
func (r *runtimeReplay) send(c runtimeCall) ([]byte, error) {
	conf := maps.Clone(c.Stdin)
	if conf["prevResult"] != nil {
		p := r.pods[c.id()]
		if p == nil || p.result == nil {
			r.T.Fatalf("%s: the recording has a prevResult, and %s has no result", c.Name, c.id())
		}
		conf["prevResult"] = p.result
	}
	stdin, err := json.Marshal(conf)
	if err != nil {
		r.T.Fatal(err)
	}
	environ := []string{"PATH=" + os.Getenv("PATH")}
	for key, value := range c.Env {
		if strings.HasPrefix(value, "/opt/cni/bin") {
			value = r.Dir
		}
		environ = append(environ, key+"="+value)
	}
	ctx, cancel := context.WithTimeout(r.T.Context(), time.Minute) // CRI-O kills a plugin then
	defer cancel()
	out, code, err := r.Node.Plugin(ctx, filepath.Join(r.Dir, c.Plugin), stdin, environ)
	if (code == 0) != (err == nil) {
		r.T.Errorf("%s: the exit code is %d and the error %v", c.Name, code, err)
	}
	return out, err
}

// documents splits what a plugin printed, which is JSON and nothing else.
func (r *runtimeReplay) documents(out []byte) (all []json.RawMessage) {
	r.T.Helper()
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var one json.RawMessage
		if err := d.Decode(&one); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			r.T.Errorf("the plugin prints %q: %v", out, err)
			return all
		}
		all = append(all, one)
	}
}

// refused says that a call failed as the specification says, where it was recorded so.
func (r *runtimeReplay) refused(c runtimeCall, out []byte, err error) {
	r.T.Helper()
	if err == nil {
		r.T.Fatalf("%s succeeds with %s, and was to fail", c.verb(), out)
	}
	var told struct {
		CNIVersion string
		Code       uint
		Msg        string
	}
	if documents := r.documents(out); len(documents) != 1 {
		r.T.Errorf("the error is %d documents: %s", len(documents), out)
	} else if err := json.Unmarshal(documents[0], &told); err != nil || told.Code != c.Failed.Code || told.Msg == "" || `"`+told.CNIVersion+`"` != string(c.Stdin["cniVersion"]) {
		r.T.Errorf("the error is %s, %v", out, err)
	}
}

// added looks at a result, and at what the pod can do with it.
func (r *runtimeReplay) added(c runtimeCall, p *pod, documents []json.RawMessage) {
	r.T.Helper()
	if len(documents) != 1 {
		r.T.Fatalf("ADD prints %d documents: %s", len(documents), documents)
	}
	var result struct {
		CNIVersion string
		Interfaces []struct{ Name, Mac, Sandbox string }
		IPs        []struct {
			Address, Gateway string
			Interface        int
		}
		DNS struct{ Nameservers []string }
	}
	if err := json.Unmarshal(documents[0], &result); err != nil {
		r.T.Fatal(err)
	}
	if `"`+result.CNIVersion+`"` != string(c.Stdin["cniVersion"]) {
		r.T.Errorf("asked for %s, the result is of %s", c.Stdin["cniVersion"], result.CNIVersion)
	}
	if c.Plugin == "loopback" {
		return // it is no part of the list
	}
	p.result = documents[0]
	var runtimeConfig struct {
		PortMappings []struct{ HostPort, ContainerPort uint16 } // in the case of letters that the runtime chose
		DNS          struct{ Servers []string }
	}
	if text := c.Stdin["runtimeConfig"]; text != nil {
		if err := json.Unmarshal(text, &runtimeConfig); err != nil {
			r.T.Fatal(err)
		}
	}
	if c.Plugin == "azure-vnet" {
		if len(result.IPs) != 1 {
			r.T.Fatalf("the result has not one address: %s", documents[0])
		}
		ip := result.IPs[0]
		prefix, err := netip.ParsePrefix(ip.Address)
		if err != nil || prefix.Bits() != r.Prefix.Bits() || !slices.Contains(r.Secondaries(), prefix.Addr()) || ip.Gateway != r.Gateway.String() {
			r.T.Fatalf("the address is %+v, %v", ip, err)
		}
		if ip.Interface < 0 || ip.Interface >= len(result.Interfaces) || result.Interfaces[ip.Interface].Name != c.Env["CNI_IFNAME"] || result.Interfaces[ip.Interface].Sandbox != c.Env["CNI_NETNS"] {
			r.T.Fatalf("the address is not that of %s: %s", c.Env["CNI_IFNAME"], documents[0])
		}
		for id, other := range r.pods {
			if other != p && !other.gone && other.addr == prefix.Addr() {
				r.T.Errorf("%s has the address of %s", c.id(), id)
			}
		}
		if !slices.Equal(result.DNS.Nameservers, runtimeConfig.DNS.Servers) {
			r.T.Errorf("asked for the name servers %v, the result has %v", runtimeConfig.DNS.Servers, result.DNS.Nameservers)
		}
		p.addr, p.mac = prefix.Addr(), result.Interfaces[ip.Interface].Mac
	}
	r.reached(c.id(), p)
	for _, m := range runtimeConfig.PortMappings {
		if err := p.in.Listen(m.ContainerPort); err != nil {
			r.T.Fatal(err)
		}
		if said, err := test.Greeting(r.beyond, netip.AddrPortFrom(r.Primary, m.HostPort)); err != nil {
			r.T.Errorf("port %d of the host, which leads to %s: %q, %v", m.HostPort, p.addr, said, err)
		}
	}
}

// reached says that a pod and all others reach each other.
func (r *runtimeReplay) reached(id string, p *pod) {
	r.T.Helper()
	p.in.Reaches(r.T, id, r.Primary, r.witness, r.other.Primary, vnetsim.InternetAddr)
	if silent, err := test.Ping(r.beyond, test.PingTime, p.addr); err != nil || len(silent) > 0 {
		r.T.Errorf("%s does not reach %s of %s: %v", r.other.Name, p.addr, id, err)
	}
}

// collected says that GC left what its list has, and nothing else of this network.
func (r *runtimeReplay) collected(c runtimeCall) {
	r.T.Helper()
	var valid []struct{ ContainerID, IfName string }
	if err := json.Unmarshal(c.Stdin["cni.dev/valid-attachments"], &valid); err != nil {
		r.T.Fatal(err)
	}
	for id, p := range r.pods {
		listed := false
		for _, v := range valid {
			listed = listed || v.ContainerID == id
		}
		p.gone = p.gone || !listed
	}
	r.alive()
}

// nodeState is what a node holds for pods.
type nodeState struct{ Leases, Links []string }

func (r *runtimeReplay) state() nodeState { return nodeState{r.Lent(), r.ContainerLinks()} }

// alive says that the node holds what the runtime's pods have, and nothing else, and
// that all of them are reached.
func (r *runtimeReplay) alive() {
	r.T.Helper()
	leases, words := []string{r.witness.String()}, map[string]bool{}
	for _, p := range r.pods {
		if !p.addr.IsValid() {
			continue
		}
		if p.gone {
			words[p.addr.String()], words[p.mac] = true, true
		} else {
			leases = append(leases, p.addr.String())
		}
	}
	for id, p := range r.pods {
		if !p.gone && p.addr.IsValid() {
			delete(words, p.addr.String())
			delete(words, p.mac)
			r.reached(id, p)
		}
	}
	slices.Sort(leases)
	var got nodeState
	var left []string
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(50 * time.Millisecond) { // a namespace that is deleted ends later
		got, left = r.state(), r.Traces(slices.Collect(maps.Keys(words))...)
		if slices.Equal(got.Leases, leases) && len(got.Links) == len(leases) && len(left) == 0 {
			break
		}
		if time.Now().After(end) {
			r.T.Errorf("the node holds %+v and not one link for each of %v; of pods that are gone it has\n%s", got, leases, strings.Join(left, "\n"))
			break
		}
	}
	if silent, err := test.Ping(r.beyond, test.PingTime, r.witness); err != nil || len(silent) > 0 {
		r.T.Errorf("the witness is not reached any more: %v", err)
	}
}

// endStopped ends the namespaces of the pods that were stopped, as a runtime does.
func (r *runtimeReplay) endStopped() {
	r.T.Helper()
	for _, p := range r.pods {
		if p.gone && p.in != nil {
			p.in.Close()
			p.in = nil
			r.Must("ip", "netns", "del", p.netns)
		}
	}
}

// settle deletes the pods that the recordings do not delete, and says that nothing is
// left.
func (r *runtimeReplay) settle() {
	r.T.Helper()
	for id, p := range r.pods {
		if p.gone {
			continue
		}
		if p.addr.IsValid() && !strings.HasPrefix(id, "extra") {
			r.T.Errorf("%s runs at the end of the recordings", id)
		}
		if _, err := r.send(r.call("containerd-1.1.0-remove-03-azure-vnet-DEL").of(id)); err != nil {
			r.T.Errorf("DEL of %s: %v", id, err)
		}
		p.gone = true
	}
	r.endStopped()
	r.alive()
}

// call is the recorded call of a name.
func (r *runtimeReplay) call(name string) runtimeCall {
	for _, calls := range r.recorded {
		for _, c := range calls {
			if c.Name == name {
				return c
			}
		}
	}
	r.T.Fatalf("%s was not recorded", name)
	return runtimeCall{}
}

// extra adds a pod that no recording has, by the recorded ADD of another.
func (r *runtimeReplay) extra(id string) *pod {
	r.T.Helper()
	r.play(r.call("crio-1.1.0-run-01-azure-vnet-ADD").of(id))
	return r.pods[id]
}

// lendAll leaves no address for the pod of the recording.
func (r *runtimeReplay) lendAll() {
	for i := len(r.Lent()); i < len(r.Secondaries()); i++ {
		r.extra(fmt.Sprint("extra", i))
	}
}

// leaveStale adds pods that the runtime does not list when it starts: one whose
// namespace is gone, and one whose namespace stands.
func (r *runtimeReplay) leaveStale() {
	r.T.Helper()
	r.extra("extra1")
	p := r.extra("extra2")
	links := len(r.ContainerLinks())
	p.in.Close()
	p.in = nil
	r.Must("ip", "netns", "del", p.netns)
	for end := time.Now().Add(10 * time.Second); len(r.ContainerLinks()) == links; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			r.T.Fatalf("%s was deleted, and its link stays", p.netns)
		}
	}
}

// cutPower runs the pod of the recording, whose ADD was not recorded, and cuts the
// power. New pods have all addresses when the runtime deletes the old pod.
func (r *runtimeReplay) cutPower() {
	r.T.Helper()
	old := r.call("containerd-1.1.0-reboot-stop-01-azure-vnet-DEL").id()
	r.play(r.call("containerd-1.1.0-run-02-azure-vnet-ADD").of(old))
	had := r.pods[old].addr
	r.pods[old].in.Close()
	r.pods[old].in = nil
	if err := errors.Join(r.PowerCut(), r.Boot()); err != nil {
		r.T.Fatal(err)
	}
	r.Must("mount", "-t", "tmpfs", "log", "/var/log")
	r.pods[old].addr, r.pods[old].gone = netip.Addr{}, true // until a DEL comes, which is late
	r.addWitness()
	r.lendAll()
	for _, p := range r.pods {
		if p.addr == had {
			return
		}
	}
	if r.witness != had {
		r.T.Errorf("nobody has %s, the address of %s before the reboot: then the late DEL proves nothing", had, old)
	}
}
