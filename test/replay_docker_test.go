// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/base32"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"azurevnet/internal/vnetsim"
)

// engineCall is one recorded call of an engine: see testdata/calls/README.md.
type engineCall struct {
	Situation, Step, Method string
	Request                 map[string]any // nil: an empty body
	Answer                  map[string]any
	Error                   string // empty: the call succeeded
}

// recordedOf reads all calls of an engine, by situation.
func recordedOf(t *testing.T, engine string) map[string][]engineCall {
	t.Helper()
	file, err := os.Open(filepath.Join("testdata", "calls", "engine-"+engine+".jsonl.gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	text, err := gzip.NewReader(file)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string][]engineCall{}
	for d := json.NewDecoder(text); ; {
		var c engineCall
		if err := d.Decode(&c); err == io.EOF {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all[c.Situation] = append(all[c.Situation], c)
	}
}

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
			clean(t, r.vnet)
		})
	}
}

// endpoint is what the engine knows of one.
type endpoint struct {
	id, step   string
	addr       netip.Addr
	mac        string
	ports      []publishedPort // that came with CreateEndpoint
	internal   bool            // of an internal network
	link       string          // the container's end, as Join named it
	hostEnd    string          // the end that stays on the host
	gateway    netip.Addr      // invalid: none
	in         *container      // nil: not in a container
	name       string          // of the link in the sandbox
	programmed bool            // the container's default route is by this endpoint
	gone       bool            // the engine removed it
}

// publishedPort is one of com.docker.network.portmap.
type publishedPort struct {
	Proto                       uint8
	Port, HostPort, HostPortEnd uint16
	HostIP                      string
}

// engineReplay is an engine on a VM, which the recordings drive.
type engineReplay struct {
	host
	vnet           *vnetsim.VNet
	other          host
	engine         string
	vm, beyond     netns.NsHandle // network namespaces of the VM and of the other one
	plugin         *exec.Cmd
	pluginEnded    chan struct{}
	log            *syncBuffer
	client         *http.Client
	network, pool  string          // ids of the network azure
	internal       map[string]bool // networks that are so, by id
	create         []engineCall    // of the network azure
	run, rm        []engineCall    // of a container, for the witness
	witness        *endpoint       // runs all the time, and must not be hurt; nil: not started
	witnessScope   string
	witnessCounter int
	made           []*container // all, to close those that a failed situation leaves

	// Of the situation at hand.
	scope     string
	names     map[string]string     // ours, by the recorded name or address
	sandboxes map[string]*container // by the recorded key
	endpoints map[string]*endpoint  // by our id
	leaks     bool                  // a lease may be left, which heals in five minutes
}

// syncBuffer is a log that is read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// pluginBinary builds the plugin once for all tests of this run.
var pluginBinary = sync.OnceValues(func() (string, error) {
	path := filepath.Join(cniTemp, "azure-vnet-plugin")
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", path, "azurevnet")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the plugin: %w\n%s", err, out)
	}
	return path, nil
})

// newEngineReplay makes a VM like the one of the recordings, and another one, and
// starts the plugin. create makes the network azure. container runs a container and
// removes it.
func newEngineReplay(t *testing.T, engine string, create, container []engineCall) *engineReplay {
	vnet, vms := newVNetOf(t, vnetsim.Config{Subnet: netip.MustParsePrefix("10.0.0.0/16")}, vnetsim.VMConfig{}, vnetsim.VMConfig{})
	var secondaries []netip.Addr
	for addr := netip.MustParseAddr("10.0.1.5"); addr != netip.MustParseAddr("10.0.1.160"); addr = addr.Next() {
		secondaries = append(secondaries, addr)
	}
	if err := vms[0].SetSecondaries(secondaries); err != nil {
		t.Fatal(err)
	}
	r := &engineReplay{
		host: vms[0], vnet: vnet, other: vms[1], engine: engine, create: create, log: &syncBuffer{},
		vm: openNamespace(t, vms[0].Namespace), beyond: openNamespace(t, vms[1].Namespace), internal: map[string]bool{},
	}
	r.client = &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true, // as if each call were the first since the plugin started
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", fmt.Sprintf("/proc/%d/root/run/docker/plugins/azure-vnet.sock", r.PidOne()))
		},
	}}
	for _, c := range container {
		if strings.HasPrefix(c.Step, "1:") {
			r.run = append(r.run, c)
		} else {
			r.rm = append(r.rm, c)
		}
	}
	t.Cleanup(func() {
		for _, c := range r.made {
			c.close()
		}
		r.vm.Close()
		r.beyond.Close()
		if t.Failed() {
			t.Logf("the plugin's log:\n%s", r.log)
		}
	})
	r.startPlugin()
	return r
}

// in has a subtest fail instead.
func (r *engineReplay) in(t *testing.T) *engineReplay {
	r.host = r.host.in(t)
	return r
}

// startPlugin starts the plugin as its config.json does, but for the rootfs.
func (r *engineReplay) startPlugin() {
	r.t.Helper()
	binary, err := pluginBinary()
	if err != nil {
		r.t.Fatal(err)
	}
	r.plugin = r.Command(context.Background(), "sh", "-c", `echo $$ >/run/plugin.pid; exec "$0"`, binary)
	r.plugin.Env = append(os.Environ(), "LOG_LEVEL=info")
	r.plugin.Stdout, r.plugin.Stderr = r.log, r.log
	if err := r.plugin.Start(); err != nil {
		r.t.Fatal(err)
	}
	r.pluginEnded = make(chan struct{})
	go func(p *exec.Cmd, ended chan struct{}) {
		_ = p.Wait() // a plugin that is killed ends with an error
		close(ended)
	}(r.plugin, r.pluginEnded)
	eventually(r.t, "the plugin listens", 9*time.Second, func() bool {
		_, _, err := r.post("Plugin.Activate", nil)
		return err == nil
	})
}

// stopPlugin sends the plugin a signal, and waits for its end.
func (r *engineReplay) stopPlugin(signal string) {
	r.t.Helper()
	r.must("sh", "-c", "kill -"+signal+" $(cat /run/plugin.pid)")
	select {
	case <-r.pluginEnded:
	case <-time.After(10 * time.Second): // then an engine kills it
		r.t.Fatalf("the plugin does not end on %s", signal)
	}
}

// post sends a call. The refusal is what the plugin says in Err.
func (r *engineReplay) post(method string, request map[string]any) (answer map[string]any, refusal string, err error) {
	var body []byte
	if request != nil {
		if body, err = json.Marshal(request); err != nil {
			return nil, "", err
		}
	}
	resp, err := r.client.Post("http://plugin/"+method, "application/vnd.docker.plugins.v1.2+json", bytes.NewReader(body))
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(bufio.NewReader(resp.Body)).Decode(&answer); err != nil {
		return nil, "", fmt.Errorf("status %d, and the answer is no JSON: %w", resp.StatusCode, err)
	}
	if resp.StatusCode == http.StatusOK {
		return answer, "", nil
	}
	refusal, _ = answer["Err"].(string)
	if resp.StatusCode != http.StatusInternalServerError || refusal == "" {
		return nil, "", fmt.Errorf("status %d: %v", resp.StatusCode, answer)
	}
	return nil, refusal, nil
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
	r.t.Helper()
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
	r.names, r.sandboxes, r.endpoints = map[string]string{}, map[string]*container{}, map[string]*endpoint{}
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
	r.names, r.sandboxes, r.endpoints = map[string]string{}, map[string]*container{}, map[string]*endpoint{}
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
	r.t.Helper()
	if r.leaks {
		r.leasesAged()
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
		if got = (state{r.lent(), r.containerLinks(), r.traces(slices.Clone(gone)...)}); cmp.Equal(want, got) {
			break
		}
		if time.Now().After(end) {
			r.t.Errorf("after the situation (- want, + got):\n%s", cmp.Diff(want, got))
			break
		}
	}
	for _, ep := range r.lives() {
		r.reached(ep)
	}
}

// reached says that an endpoint and everybody it may speak with reach each other.
func (r *engineReplay) reached(ep *endpoint) {
	r.t.Helper()
	if ep.in == nil {
		return
	}
	near := []netip.Addr{r.Primary}
	if r.witness != nil && r.witness != ep {
		near = append(near, r.witness.addr)
	}
	far := []netip.Addr{r.other.Primary}
	if ep.internal {
		ep.in.reaches(r.t, ep.id, near...)
		if silent, err := ping(ep.in.ns, silenceTime, far...); err != nil || len(silent) != len(far) {
			r.t.Errorf("of an internal network %s reaches others than %v: %v", ep.addr, silent, err)
		}
		return
	}
	if ep.programmed {
		far = append(far, vnetsim.InternetAddr)
	}
	ep.in.reaches(r.t, ep.id, append(near, far...)...)
	if silent, err := ping(r.beyond, pingTime, ep.addr); err != nil || len(silent) > 0 {
		r.t.Errorf("%s does not reach %s: %v", r.other.Name, ep.addr, err)
	}
	if ep.programmed {
		r.portsReached(ep)
	}
}

// toldPort is one of the TCP ports that EndpointOperInfo tells, on every address.
var toldPort = regexp.MustCompile(`0\.0\.0\.0:(\d+)->(\d+)/tcp`)

// toldPortsReached says that the ports that the plugin tells lead to the endpoint: so
// those that it chose itself do too.
func (r *engineReplay) toldPortsReached(ep *endpoint, text string) {
	r.t.Helper()
	for _, told := range toldPort.FindAllStringSubmatch(text, -1) {
		outer, errOuter := strconv.ParseUint(told[1], 10, 16)
		inner, errInner := strconv.ParseUint(told[2], 10, 16)
		if err := errors.Join(errOuter, errInner); err != nil {
			r.t.Fatal(err)
		}
		r.portReached(ep, r.beyond, netip.AddrPortFrom(r.Primary, uint16(outer)), uint16(inner))
	}
}

// portReached says that a port of the host leads to one of the endpoint.
func (r *engineReplay) portReached(ep *endpoint, from netns.NsHandle, outer netip.AddrPort, inner uint16) {
	r.t.Helper()
	if err := ep.in.listen(inner); err != nil {
		r.t.Fatal(err)
	}
	if said, err := greeting(from, outer); err != nil {
		r.t.Errorf("%s, which leads to port %d of %s: %q, %v", outer, inner, ep.addr, said, err)
	}
}

// portsReached says that the ports that came with CreateEndpoint lead to the endpoint.
// It leaves out UDP, and the ports of the host that the plugin chooses.
func (r *engineReplay) portsReached(ep *endpoint) {
	r.t.Helper()
	for _, p := range ep.ports {
		if p.Proto != 6 || p.HostPort == 0 || p.HostPortEnd > p.HostPort {
			continue
		}
		if p.HostIP != "" {
			r.portReached(ep, r.vm, netip.AddrPortFrom(netip.MustParseAddr(p.HostIP), p.HostPort), p.Port)
		} else {
			r.portReached(ep, r.beyond, netip.AddrPortFrom(r.Primary, p.HostPort), p.Port)
		}
	}
}

// newID is ours for a recorded name: of the form that engines give.
func (r *engineReplay) newID(recorded string) string {
	sum := sha256.Sum256([]byte(r.engine + "/" + r.scope + "/" + recorded))
	switch {
	case strings.HasPrefix(recorded, "swarmnetwork"):
		return strings.ToLower(base32.StdEncoding.EncodeToString(sum[:]))[:25]
	case strings.HasPrefix(recorded, "/"):
		return filepath.Join(filepath.Dir(recorded), hex.EncodeToString(sum[:6]))
	}
	return hex.EncodeToString(sum[:])
}

// named is ours for a recorded name. A network and a pool that the situation did not
// make are those of the network azure.
func (r *engineReplay) named(key, recorded string) string {
	if name, ok := r.names[recorded]; ok {
		return name
	}
	switch {
	case key == "NetworkID" && r.network != "":
		return r.network
	case key == "PoolID":
		return r.pool
	}
	r.names[recorded] = r.newID(recorded)
	return r.names[recorded]
}

// translate puts our names and addresses into a recorded request.
func (r *engineReplay) translate(c engineCall) map[string]any {
	if c.Request == nil {
		return nil
	}
	var request map[string]any
	text, err := json.Marshal(c.Request)
	if err == nil {
		err = json.Unmarshal(text, &request) // a copy: the recording is replayed again
	}
	if err != nil {
		r.t.Fatal(err)
	}
	if recorded, ok := request["NetworkID"].(string); ok && c.Method == "NetworkDriver.CreateNetwork" {
		r.names[recorded] = r.newID(recorded)
	}
	for _, key := range []string{"NetworkID", "EndpointID", "SandboxKey", "PoolID"} {
		if recorded, ok := request[key].(string); ok {
			request[key] = r.named(key, recorded)
		}
	}
	if addr, ok := request["Address"].(string); ok && r.names[addr] != "" && c.Method == "IpamDriver.ReleaseAddress" {
		request["Address"] = r.names[addr]
	}
	if in, ok := request["Interface"].(map[string]any); ok {
		addr, bits, _ := strings.Cut(in["Address"].(string), "/")
		in["Address"] = r.names[addr] + "/" + bits
	}
	if node, ok := request["DiscoveryData"].(map[string]any); ok {
		node["Address"], node["BindAddress"] = r.Primary.String(), r.Primary.String()
	}
	return request
}

// play sends one recorded call, compares the answer with the recorded one, and does
// in the kernel what the engine does next.
func (r *engineReplay) play(c engineCall) {
	r.t.Helper()
	request := r.translate(c)
	what := fmt.Sprintf("%.40s: %s", c.Step, c.Method)
	if c.Method == "NetworkDriver.RevokeExternalConnectivity" {
		r.revoke(r.endpoints[request["EndpointID"].(string)])
	}
	answer, refusal, err := r.post(c.Method, request)
	number, _, _ := strings.Cut(c.Step, ":")
	switch reason := differences[strings.Join([]string{r.engine, r.scope, number, c.Method}, "/")]; {
	case err != nil:
		r.t.Fatalf("%s: %v", what, err)
	case (refusal == "") != (c.Error == "") && reason == "":
		r.t.Fatalf("%s: the error is %q and was %q; request %v", what, refusal, c.Error, request)
	case refusal != "":
		return
	case c.Error != "":
		// The recording goes on as if it had failed.
		if c.Method == "NetworkDriver.CreateEndpoint" {
			_, _, _ = r.post("NetworkDriver.DeleteEndpoint", map[string]any{"NetworkID": request["NetworkID"], "EndpointID": request["EndpointID"]})
		}
		return
	}
	r.compare(what, c, request, answer)
	id, _ := request["EndpointID"].(string)
	switch method := strings.TrimPrefix(c.Method, "NetworkDriver."); method {
	case "CreateNetwork":
		options := request["Options"].(map[string]any)
		internal, _ := options["com.docker.network.internal"].(bool)
		r.internal[request["NetworkID"].(string)] = internal
	case "CreateEndpoint":
		r.created(c, request, answer)
	case "Join":
		r.joined(r.endpoints[id], request["SandboxKey"].(string), answer)
	case "ProgramExternalConnectivity":
		r.programmed(r.endpoints[id])
	case "Leave":
		r.left(r.endpoints[id])
	case "DeleteEndpoint":
		r.endpoints[id].gone = true
	}
}

// hostPort is that of "0.0.0.0:8080->80/tcp": of a range the plugin takes any, as of
// all ports for -P.
var hostPort = regexp.MustCompile(`:\d+->`)

// compare says that an answer is the recorded one, but for what differs from one run
// to the next: those parts are looked at one by one.
func (r *engineReplay) compare(what string, c engineCall, request, answer map[string]any) {
	r.t.Helper()
	recorded := withoutZeros(c.Answer).(map[string]any)
	given, _ := withoutZeros(answer).(map[string]any)
	same := func(m map[string]any, key string) { // from here on
		m[key] = "as it has to be"
	}
	fail := func(why string) { r.t.Errorf("%s: %s: the answer is %v and was %v", what, why, answer, c.Answer) }
	switch c.Method {
	case "IpamDriver.RequestPool":
		id, _ := given["PoolID"].(string)
		if id == "" {
			fail("no PoolID")
		}
		r.names[recorded["PoolID"].(string)] = id
		same(recorded, "PoolID")
		same(given, "PoolID")
	case "IpamDriver.RequestAddress":
		text, _ := given["Address"].(string)
		addr, err := netip.ParsePrefix(text)
		if asked, _ := request["Address"].(string); err != nil || addr.Bits() != r.Prefix.Bits() || asked != "" && addr.Addr().String() != asked {
			fail("it is another address than was asked for")
		} else if asked == "" && !slices.Contains(r.Secondaries(), addr.Addr()) {
			fail("Azure gave this VM no such address")
		}
		for _, ep := range r.lives() {
			if ep.addr == addr.Addr() {
				fail("it is that of another container")
			}
		}
		was, _, _ := strings.Cut(recorded["Address"].(string), "/")
		r.names[was] = addr.Addr().String()
		same(recorded, "Address")
		same(given, "Address")
	case "NetworkDriver.CreateEndpoint":
		was, _ := recorded["Interface"].(map[string]any)
		is, _ := given["Interface"].(map[string]any)
		if text, _ := is["MacAddress"].(string); text != "" {
			if mac, err := net.ParseMAC(text); err != nil || len(mac) != 6 || mac[0]&1 != 0 {
				fail("no MAC of an interface")
			}
			if was != nil {
				same(was, "MacAddress")
				same(is, "MacAddress")
			}
		}
	case "NetworkDriver.Join":
		// Routes may be given or not: the container has to reach others in both cases.
		delete(recorded, "StaticRoutes")
		delete(given, "StaticRoutes")
		name, _ := given["InterfaceName"].(map[string]any)
		if src, _ := name["SrcName"].(string); src == "" {
			fail("no link")
			return
		}
		same(recorded["InterfaceName"].(map[string]any), "SrcName")
		same(name, "SrcName")
	case "NetworkDriver.EndpointOperInfo":
		// Which ports are published while the container's gateway is another network,
		// and of those that come with ProgramExternalConnectivity alone, is not told here.
		if ep := r.endpoints[request["EndpointID"].(string)]; ep == nil || !ep.programmed || len(ep.ports) == 0 {
			return
		}
		value, _ := given["Value"].(map[string]any)
		text, _ := value["ports"].(string)
		r.toldPortsReached(r.endpoints[request["EndpointID"].(string)], text)
		for _, m := range []map[string]any{recorded, given} {
			value, _ := m["Value"].(map[string]any)
			text, _ := value["ports"].(string)
			all := strings.Split(hostPort.ReplaceAllString(text, ":*->"), ", ")
			slices.Sort(all)
			m["Value"] = all
		}
	}
	if diff := cmp.Diff(recorded, given); diff != "" {
		r.t.Errorf("%s: the answer (- recorded, + given):\n%s", what, diff)
	}
}

// withoutZeros drops what says no more than that it is absent.
func withoutZeros(v any) any {
	m, ok := v.(map[string]any)
	if !ok {
		return v
	}
	kept := map[string]any{}
	for key, value := range m {
		value = withoutZeros(value)
		switch x := value.(type) {
		case nil:
			continue
		case bool:
			if !x {
				continue
			}
		case string:
			if x == "" {
				continue
			}
		case map[string]any:
			if len(x) == 0 {
				continue
			}
		case []any:
			if len(x) == 0 {
				continue
			}
		}
		kept[key] = value
	}
	return kept
}

// created notes an endpoint.
func (r *engineReplay) created(c engineCall, request, answer map[string]any) {
	r.t.Helper()
	in := request["Interface"].(map[string]any)
	ep := &endpoint{id: request["EndpointID"].(string), step: c.Step, internal: r.internal[request["NetworkID"].(string)]}
	ep.addr = netip.MustParsePrefix(in["Address"].(string)).Addr()
	if ep.mac = in["MacAddress"].(string); ep.mac == "" {
		ep.mac = answer["Interface"].(map[string]any)["MacAddress"].(string)
	}
	options, _ := request["Options"].(map[string]any)
	text, err := json.Marshal(options["com.docker.network.portmap"])
	if err == nil {
		err = json.Unmarshal(text, &ep.ports)
	}
	if err != nil {
		r.t.Fatal(err)
	}
	r.endpoints[ep.id] = ep
}

// joined does what an engine does with Join's answer: it moves the link into the
// container's namespace, and gives it its address and the routes.
func (r *engineReplay) joined(ep *endpoint, key string, answer map[string]any) {
	r.t.Helper()
	must := func(err error) {
		r.t.Helper()
		if err != nil {
			r.t.Fatalf("move the link of %v into a container: %v", answer, err)
		}
	}
	var join struct {
		InterfaceName struct{ SrcName, DstPrefix string }
		Gateway       string
		StaticRoutes  []struct {
			Destination, NextHop string
			RouteType            int // 0: NextHop leads there; 1: the link does
		}
	}
	text, err := json.Marshal(answer)
	must(err)
	must(json.Unmarshal(text, &join))
	if box := r.sandboxes[key]; box == nil || !box.ns.IsOpen() {
		box, err = newContainer()
		must(err)
		r.sandboxes[key] = box
		r.made = append(r.made, box)
	}
	ep.in, ep.link = r.sandboxes[key], join.InterfaceName.SrcName
	ep.gateway, _ = netip.ParseAddr(join.Gateway)

	outside, err := netlink.NewHandleAt(r.vm)
	must(err)
	defer outside.Close()
	link, err := outside.LinkByName(ep.link)
	must(err)
	hostEnd, err := outside.LinkByIndex(link.Attrs().ParentIndex)
	must(err)
	ep.hostEnd = hostEnd.Attrs().Name
	must(outside.LinkSetNsFd(link, int(ep.in.ns)))

	inside, err := netlink.NewHandleAt(ep.in.ns)
	must(err)
	defer inside.Close()
	link, err = inside.LinkByName(ep.link)
	must(err)
	if mac := link.Attrs().HardwareAddr.String(); mac != ep.mac {
		r.t.Errorf("the link of %s has the MAC %s", ep.mac, mac)
	}
	for n := 0; ; n++ {
		ep.name = fmt.Sprint(join.InterfaceName.DstPrefix, n)
		if _, err := inside.LinkByName(ep.name); err != nil {
			break
		}
	}
	must(inside.LinkSetName(link, ep.name))
	addr, err := netlink.ParseAddr(netip.PrefixFrom(ep.addr, r.Prefix.Bits()).String())
	must(err)
	must(inside.AddrAdd(link, addr))
	must(inside.LinkSetUp(link))
	for _, s := range join.StaticRoutes {
		_, dst, err := net.ParseCIDR(s.Destination)
		must(err)
		route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst, Scope: netlink.SCOPE_LINK}
		if s.RouteType == 0 {
			route.Gw, route.Scope = net.ParseIP(s.NextHop), netlink.SCOPE_UNIVERSE
		}
		must(inside.RouteAdd(route))
	}
	// A frame that is sent before the bridge knows that the port has a carrier is lost,
	// and ARP asks again after a second. Engines from 28 wait too.
	eventually(r.t, "the link of "+ep.addr.String()+" is up at both ends", 5*time.Second, func() bool {
		in, errIn := inside.LinkByName(ep.name)
		out, errOut := outside.LinkByName(ep.hostEnd)
		return errIn == nil && errOut == nil && in.Attrs().OperState == netlink.OperUp && out.Attrs().OperState == netlink.OperUp
	})
	r.reached(ep)
}

// defaultRoute adds or removes the container's route by an endpoint's gateway.
func (r *engineReplay) defaultRoute(ep *endpoint, change func(*netlink.Handle, *netlink.Route) error) {
	r.t.Helper()
	inside, err := netlink.NewHandleAt(ep.in.ns)
	if err != nil {
		r.t.Fatal(err)
	}
	defer inside.Close()
	link, err := inside.LinkByName(ep.name)
	if err == nil {
		err = change(inside, &netlink.Route{LinkIndex: link.Attrs().Index, Gw: ep.gateway.AsSlice()})
	}
	if err != nil {
		r.t.Errorf("the default route of %s: %v", ep.addr, err)
	}
}

// programmed gives the container its default route: an engine tells
// ProgramExternalConnectivity of exactly the endpoint whose network is the gateway.
func (r *engineReplay) programmed(ep *endpoint) {
	r.t.Helper()
	if ep == nil || ep.in == nil || ep.programmed || ep.gone {
		return
	}
	if !ep.gateway.IsValid() {
		r.t.Errorf("an engine programs %s, and Join gave no gateway", ep.addr)
		return
	}
	r.defaultRoute(ep, (*netlink.Handle).RouteAdd)
	ep.programmed = true
	r.reached(ep)
}

// revoke takes the default route away, before the plugin is told.
func (r *engineReplay) revoke(ep *endpoint) {
	r.t.Helper()
	if ep == nil || !ep.programmed {
		return
	}
	if ep.in != nil {
		r.defaultRoute(ep, (*netlink.Handle).RouteDel)
	}
	ep.programmed = false
}

// left brings the link back to the host, as an engine does after Leave. A link that
// died with its namespace does not come back.
func (r *engineReplay) left(ep *endpoint) {
	r.t.Helper()
	if ep == nil || ep.in == nil {
		return
	}
	inside, err := netlink.NewHandleAt(ep.in.ns)
	if err != nil {
		r.t.Fatal(err)
	}
	defer inside.Close()
	link, err := inside.LinkByName(ep.name)
	if err == nil {
		err = inside.LinkSetDown(link)
	}
	if err == nil {
		err = inside.LinkSetName(link, ep.link)
	}
	if err == nil {
		err = inside.LinkSetNsFd(link, int(r.vm))
	}
	if err != nil {
		r.t.Errorf("bring %s back from the container: %v", ep.link, err)
	}
	box := ep.in
	ep.in, ep.programmed = nil, false
	if !slices.ContainsFunc(r.lives(), func(e *endpoint) bool { return e.in == box }) {
		box.close()
	}
}

// kill ends the containers of the situation that are of a step (empty: of any): their
// namespaces go, and the links with them.
func (r *engineReplay) kill(step string) {
	for _, ep := range r.endpoints {
		if ep.in != nil && strings.HasPrefix(ep.step, step) && ep != r.witness {
			ep.in.close()
			ep.in, ep.programmed = nil, false
		}
	}
}

// killPlugin is a SIGKILL, after which an engine starts the plugin again.
func (r *engineReplay) killPlugin([]engineCall) {
	r.t.Helper()
	r.stopPlugin("KILL")
	r.startPlugin()
}

// restartPlugin is a docker plugin disable and enable, or an engine that stops and starts.
func (r *engineReplay) restartPlugin([]engineCall) {
	r.t.Helper()
	r.stopPlugin("TERM")
	r.startPlugin()
}

// killPluginInCall kills the plugin while it is asked for an address. The recording
// has no line of that call, which the engine repeats.
func (r *engineReplay) killPluginInCall(next []engineCall) {
	r.t.Helper()
	for _, c := range next {
		if c.Method == "IpamDriver.RequestAddress" {
			request := r.translate(c)
			lost := make(chan struct{})
			go func() {
				defer close(lost)
				_, _, _ = r.post(c.Method, request) // nobody hears the answer
			}()
			r.stopPlugin("KILL")
			<-lost
			break
		}
	}
	r.leaks = true
	r.startPlugin()
}

// killContainersRestartPlugin is a SIGKILL of the engine, which ends its containers
// when it starts, and the plugin.
func (r *engineReplay) killContainersRestartPlugin([]engineCall) {
	r.t.Helper()
	r.kill("")
	r.restartPlugin(nil)
}

// removeUnseen is a docker rm -f of the container of step 2 while the plugin is
// disabled: nobody tells the plugin, ever.
func (r *engineReplay) removeUnseen([]engineCall) {
	r.t.Helper()
	r.stopPlugin("TERM")
	for _, ep := range r.endpoints {
		ep.gone = ep.gone || strings.HasPrefix(ep.step, "2:")
	}
	r.kill("2:")
	r.leaks = true
	r.startPlugin()
}

// cutPower ends everything in the VM at once, and boots it. The engine ends the
// witness and starts it again, as it does its own containers.
func (r *engineReplay) cutPower([]engineCall) {
	r.t.Helper()
	r.kill("")
	if r.witness != nil && r.witness.in != nil {
		r.witness.in.close()
		r.witness.in, r.witness.programmed = nil, false
	}
	r.vm.Close()
	if err := r.PowerCut(); err != nil {
		r.t.Fatal(err)
	}
	<-r.pluginEnded
	if err := r.Boot(); err != nil {
		r.t.Fatal(err)
	}
	r.vm = openNamespace(r.t, r.Namespace)
	r.startPlugin()
	if r.witness != nil {
		r.endWitness()
		r.startWitness()
	}
}
