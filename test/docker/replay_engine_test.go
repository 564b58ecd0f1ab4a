// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netns"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// engineReplay is an engine on a VM, which the recordings drive.
type engineReplay struct {
	test.Host
	vnet           *vnetsim.VNet
	other          test.Host
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
	made           []*test.Container // all, to close those that a failed situation leaves

	// Of the situation at hand.
	scope     string
	names     map[string]string          // ours, by the recorded name or address
	sandboxes map[string]*test.Container // by the recorded key
	endpoints map[string]*endpoint       // by our id
	leaks     bool                       // a lease may be left, which heals in five minutes
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

// newEngineReplay makes a VM like the one of the recordings, and another one, and
// starts the plugin. create makes the network azure. container runs a container and
// removes it.
func newEngineReplay(t *testing.T, engine string, create, container []engineCall) *engineReplay {
	vnet, vms := test.NewVNetOf(t, vnetsim.Config{Subnet: netip.MustParsePrefix("10.0.0.0/16")}, vnetsim.VMConfig{}, vnetsim.VMConfig{})
	var secondaries []netip.Addr
	for addr := netip.MustParseAddr("10.0.1.5"); addr != netip.MustParseAddr("10.0.1.160"); addr = addr.Next() {
		secondaries = append(secondaries, addr)
	}
	if err := vms[0].SetSecondaries(secondaries); err != nil {
		t.Fatal(err)
	}
	r := &engineReplay{
		Host: vms[0], vnet: vnet, other: vms[1], engine: engine, create: create, log: &syncBuffer{},
		vm: test.OpenNamespace(t, vms[0].Namespace), beyond: test.OpenNamespace(t, vms[1].Namespace), internal: map[string]bool{},
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
			c.Close()
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
	r.Host = r.Host.In(t)
	return r
}

// startPlugin starts the plugin as its config.json does, but for the rootfs.
func (r *engineReplay) startPlugin() {
	r.T.Helper()
	if _, err := test.BuildPlugin(); err != nil {
		r.T.Fatal(err)
	}
	r.plugin = r.Command(context.Background(), "sh", "-c", `echo $$ >/run/plugin.pid; exec "$0"`, test.PluginBinary)
	r.plugin.Env = append(os.Environ(), "LOG_LEVEL=info")
	r.plugin.Stdout, r.plugin.Stderr = r.log, r.log
	if err := r.plugin.Start(); err != nil {
		r.T.Fatal(err)
	}
	r.pluginEnded = make(chan struct{})
	go func(p *exec.Cmd, ended chan struct{}) {
		_ = p.Wait() // a plugin that is killed ends with an error
		close(ended)
	}(r.plugin, r.pluginEnded)
	test.Eventually(r.T, "the plugin listens", 9*time.Second, func() bool {
		_, _, err := r.post("Plugin.Activate", nil)
		return err == nil
	})
}

// stopPlugin sends the plugin a signal, and waits for its end.
func (r *engineReplay) stopPlugin(signal string) {
	r.T.Helper()
	r.Must("sh", "-c", "kill -"+signal+" $(cat /run/plugin.pid)")
	select {
	case <-r.pluginEnded:
	case <-time.After(10 * time.Second): // then an engine kills it
		r.T.Fatalf("the plugin does not end on %s", signal)
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

// kill ends the containers of the situation that are of a step (empty: of any): their
// namespaces go, and the links with them.
func (r *engineReplay) kill(step string) {
	for _, ep := range r.endpoints {
		if ep.in != nil && strings.HasPrefix(ep.step, step) && ep != r.witness {
			ep.in.Close()
			ep.in, ep.programmed = nil, false
		}
	}
}

// killPlugin is a SIGKILL, after which an engine starts the plugin again.
func (r *engineReplay) killPlugin([]engineCall) {
	r.T.Helper()
	r.stopPlugin("KILL")
	r.startPlugin()
}

// restartPlugin is a docker plugin disable and enable, or an engine that stops and starts.
func (r *engineReplay) restartPlugin([]engineCall) {
	r.T.Helper()
	r.stopPlugin("TERM")
	r.startPlugin()
}

// killPluginInCall kills the plugin while it is asked for an address. The recording
// has no line of that call, which the engine repeats.
func (r *engineReplay) killPluginInCall(next []engineCall) {
	r.T.Helper()
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
	r.T.Helper()
	r.kill("")
	r.restartPlugin(nil)
}

// removeUnseen is a docker rm -f of the container of step 2 while the plugin is
// disabled: nobody tells the plugin, ever.
func (r *engineReplay) removeUnseen([]engineCall) {
	r.T.Helper()
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
	r.T.Helper()
	r.kill("")
	if r.witness != nil && r.witness.in != nil {
		r.witness.in.Close()
		r.witness.in, r.witness.programmed = nil, false
	}
	r.vm.Close()
	if err := r.PowerCut(); err != nil {
		r.T.Fatal(err)
	}
	<-r.pluginEnded
	if err := r.Boot(); err != nil {
		r.T.Fatal(err)
	}
	r.vm = test.OpenNamespace(r.T, r.Namespace)
	r.startPlugin()
	if r.witness != nil {
		r.endWitness()
		r.startWitness()
	}
}
