// Copyright (c) The azure-vnet authors. MIT licence.

package kill

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// engine is a VM whose plugin is called as an engine does, and another VM that watches it.
type engine struct {
	test.Host
	binary string // the plugin's program
	probes *probes
	client *http.Client
	pool   string        // its PoolID
	plugin chan struct{} // closed when the plugin that runs has ended
	stop   func()        // kills it
}

const network = "6b696c6c"

// newEngine starts the plugin, and makes a network.
func newEngine(t *testing.T) *engine {
	t.Helper()
	if older == nil {
		t.Skip("the tracer knows amd64 and arm64 only")
	}
	if _, err := test.BuildPlugin(); err != nil {
		t.Fatal(err)
	}
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	e := &engine{Host: vms[0], binary: test.PluginBinary}
	e.probes = startProbes(t, vms[1], e.Primary)
	e.client = &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", fmt.Sprintf("/proc/%d/root/run/docker/plugins/azure-vnet.sock", e.PidOne()))
		},
	}}
	if err := e.AddNetns("pod"); err != nil {
		t.Fatal(err)
	}
	e.start(&trace{})
	t.Cleanup(func() { e.stop() })
	e.pool = e.calls("IpamDriver.RequestPool", map[string]any{"AddressSpace": "azure-vnet", "Pool": e.Prefix.String()})["PoolID"].(string)
	e.calls("NetworkDriver.CreateNetwork", e.networked(network))
	return e
}

// in is the engine, failing a subtest instead.
func (e *engine) in(t *testing.T) *engine {
	e.Host = e.Host.In(t)
	return e
}

// start starts the plugin under the tracer, and waits until it answers.
func (e *engine) start(tr *trace) {
	e.T.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := e.Command(ctx, e.binary, "-data", "/var/lib/azure-vnet")
	cmd.Env = os.Environ()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = tr.run(cmd)
	}()
	e.plugin = ended
	e.stop = func() {
		tr.end()
		<-ended
		cancel()
	}
	eventually(e.T, "the plugin answers", func() bool {
		_, err := e.post("Plugin.Activate", nil)
		return err == nil
	})
}

// restart has another plugin run, which has looked the host over.
func (e *engine) restart(tr *trace) {
	e.T.Helper()
	e.stop()
	began := time.Now().Add(-10 * time.Millisecond) // files have a coarser clock
	e.start(tr)
	eventually(e.T, "the plugin looks the host over", func() bool {
		round, err := os.Stat(fmt.Sprintf("/proc/%d/root/run/azure-vnet/reconciled", e.PidOne()))
		return err == nil && round.ModTime().After(began)
	})
}

// eventually polls as test.Eventually does, and more often.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

// post sends a call.
func (e *engine) post(method string, request map[string]any) (answer map[string]any, err error) {
	body, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	resp, err := e.client.Post("http://plugin/"+method, "application/vnd.docker.plugins.v1.2+json", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s", text)
	}
	if err == nil {
		err = json.Unmarshal(text, &answer)
	}
	return answer, err
}

// calls makes a call that succeeds.
func (e *engine) calls(method string, request map[string]any) map[string]any {
	e.T.Helper()
	answer, err := e.post(method, request)
	if err != nil {
		e.T.Fatalf("%s: %v", method, err)
	}
	return answer
}

// traced makes a call of which every step is counted, and kills the plugin at the end at the latest. Another one starts.
func (e *engine) traced(tr *trace, method string, request map[string]any) {
	e.T.Helper()
	e.restart(tr)
	tr.begin()
	if _, err := e.post(method, request); err != nil && !tr.ended() {
		e.T.Fatalf("%s under the tracer: %v", method, err)
	}
	e.stop()
	e.start(&trace{})
}

// heal is a restart past the grace. A plugin that starts does a round.
func (e *engine) heal() {
	e.T.Helper()
	e.LeasesAged()
	e.restart(&trace{})
}

// These are an engine's calls for one container with published ports.
var publishing = map[string]any{"com.docker.network.portmap": []any{
	map[string]any{"Proto": 6, "Port": 80, "HostPort": 8080, "HostPortEnd": 8080}, map[string]any{"Proto": 17, "Port": 53, "HostPort": 5353, "HostPortEnd": 5353}}}

const endpointID = "656e64706f696e74"

func (e *engine) addr() string { return e.Secondaries()[1].String() }
func (e *engine) networked(id string) map[string]any {
	return map[string]any{"NetworkID": id, "Options": map[string]any{"com.docker.network.generic": map[string]any{}},
		"IPv4Data": []any{map[string]any{"AddressSpace": "azure-vnet", "Gateway": e.Gateway.String() + "/16", "Pool": e.Prefix.String()}}}
}
func (e *engine) requested() map[string]any {
	return map[string]any{"PoolID": e.pool, "Address": e.addr(), "Options": map[string]any{}}
}
func (e *engine) released() map[string]any {
	return map[string]any{"PoolID": e.pool, "Address": e.addr()}
}
func (e *engine) endpoint(more map[string]any) map[string]any {
	all := map[string]any{"NetworkID": network, "EndpointID": endpointID}
	for key, value := range more {
		all[key] = value
	}
	return all
}
func (e *engine) created() map[string]any {
	return e.endpoint(map[string]any{"Interface": map[string]any{"Address": e.addr() + "/16"}, "Options": publishing})
}
func (e *engine) programmed() map[string]any {
	return e.endpoint(map[string]any{"Options": publishing})
}

// join has the container take its end of the link, if it has not.
func (e *engine) join() {
	e.T.Helper()
	answer := e.calls("NetworkDriver.Join", e.endpoint(map[string]any{"SandboxKey": "/run/netns/pod", "Options": publishing}))
	name := answer["InterfaceName"].(map[string]any)["SrcName"].(string)
	pod, err := os.Open(fmt.Sprintf("/proc/%d/root/run/netns/pod", e.PidOne()))
	if err != nil {
		e.T.Fatal(err)
	}
	defer pod.Close()
	if err := e.Do(func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return netlink.LinkSetNsFd(link, int(pod.Fd()))
	}); err != nil {
		e.T.Fatalf("move %s into the container: %v", name, err)
	}
}

// run runs a container, as far as the plugin is asked.
func (e *engine) run() {
	e.T.Helper()
	e.calls("IpamDriver.RequestAddress", e.requested())
	e.calls("NetworkDriver.CreateEndpoint", e.created())
	e.join()
}

// rm removes it.
func (e *engine) rm() {
	e.T.Helper()
	e.calls("NetworkDriver.Leave", e.endpoint(nil))
	e.calls("NetworkDriver.DeleteEndpoint", e.endpoint(nil))
	e.calls("IpamDriver.ReleaseAddress", e.released())
}

// createAgain is what an engine does after a CreateEndpoint that was killed: one takes all back and begins anew, one repeats
// the call, and one comes back long after.
func (e *engine) createAgain(way int, heal func()) {
	e.T.Helper()
	if way == 2 {
		heal()
	}
	if _, err := e.post("NetworkDriver.CreateEndpoint", e.created()); way != 1 || err != nil {
		e.calls("NetworkDriver.DeleteEndpoint", e.endpoint(nil))
		e.calls("IpamDriver.ReleaseAddress", e.released())
		e.calls("IpamDriver.RequestAddress", e.requested())
		e.calls("NetworkDriver.CreateEndpoint", e.created())
	}
	e.join()
}

// networking kills the making of another network.
func (e *engine) networking() history {
	const other = "6f74686572"
	return history{
		call: func(tr *trace) { e.traced(tr, "NetworkDriver.CreateNetwork", e.networked(other)) },
		next: func(way int, heal func()) {
			switch way {
			case 1: // an engine that failed forgets the network
				_, _ = e.post("NetworkDriver.DeleteNetwork", map[string]any{"NetworkID": other})
			case 2:
				heal()
			}
			e.calls("NetworkDriver.CreateNetwork", e.networked(other))
		},
		end: func() { e.calls("NetworkDriver.DeleteNetwork", map[string]any{"NetworkID": other}) },
	}
}

func TestKilledPlugin(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	none := func() {}
	for i, c := range []struct {
		method  string
		history history
	}{
		{"NetworkDriver.CreateNetwork", e.networking()},
		{"IpamDriver.RequestAddress", history{
			call: func(tr *trace) { e.traced(tr, "IpamDriver.RequestAddress", e.requested()) },
			next: func(way int, heal func()) {
				if way == 0 { // another container is lent an address at once
					other := e.calls("IpamDriver.RequestAddress", map[string]any{"PoolID": e.pool})["Address"].(string)
					other, _, _ = strings.Cut(other, "/")
					e.calls("IpamDriver.ReleaseAddress", map[string]any{"PoolID": e.pool, "Address": other})
				}
				heal() // until then it is held, for nobody knows that no container has it
				eventually(e.T, "the address can be lent again", func() bool {
					_, err := e.post("IpamDriver.RequestAddress", e.requested())
					return err == nil
				})
				e.calls("NetworkDriver.CreateEndpoint", e.created())
				e.join()
			},
			end: func() { e.rm() },
		}},
		{"NetworkDriver.CreateEndpoint", history{
			begin: func() { e.calls("IpamDriver.RequestAddress", e.requested()) },
			call:  func(tr *trace) { e.traced(tr, "NetworkDriver.CreateEndpoint", e.created()) },
			next:  e.createAgain,
			end:   func() { e.rm() },
		}},
		{"NetworkDriver.ProgramExternalConnectivity", history{
			begin: func() { e.run() },
			call:  func(tr *trace) { e.traced(tr, "NetworkDriver.ProgramExternalConnectivity", e.programmed()) },
			next: func(way int, heal func()) {
				switch way {
				case 1:
					e.calls("NetworkDriver.RevokeExternalConnectivity", e.endpoint(nil))
				case 2:
					heal()
				}
				e.calls("NetworkDriver.ProgramExternalConnectivity", e.programmed())
			},
			end: func() {
				e.calls("NetworkDriver.RevokeExternalConnectivity", e.endpoint(nil))
				e.rm()
			},
		}},
		{"NetworkDriver.DeleteEndpoint", history{
			begin: func() { e.run(); e.calls("NetworkDriver.Leave", e.endpoint(nil)) },
			call:  func(tr *trace) { e.traced(tr, "NetworkDriver.DeleteEndpoint", e.endpoint(nil)) },
			next: func(way int, heal func()) {
				if way == 2 {
					heal()
				}
				e.calls("NetworkDriver.DeleteEndpoint", e.endpoint(nil))
				e.calls("IpamDriver.ReleaseAddress", e.released())
			},
			end: none,
		}},
		{"IpamDriver.ReleaseAddress", history{
			begin: func() { e.calls("IpamDriver.RequestAddress", e.requested()) },
			call:  func(tr *trace) { e.traced(tr, "IpamDriver.ReleaseAddress", e.released()) },
			next: func(way int, heal func()) {
				if way == 2 {
					heal()
				}
				if way != 1 { // an engine ignores its failure, and does not come back
					e.calls("IpamDriver.ReleaseAddress", e.released())
				}
			},
			end: none,
		}},
	} {
		t.Run(c.method, func(t *testing.T) {
			e.in(t)
			c.history.heal, c.history.pods = e.heal, []string{"pod"}
			c.history.patience = 10 * time.Second
			c.history.try(t, e.Host, e.probes, i)
		})
	}
}
