// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/docker/go-plugins-helpers/network"
	"github.com/sirupsen/logrus"

	"azurevnet/bridge"
	"azurevnet/driver"
	"azurevnet/internal/statefile"
	"azurevnet/pool"
)

// post sends a body as it is, and returns the status and what was answered.
func (e *engine) post(method, body string) (int, string) {
	e.t.Helper()
	r, err := e.client.Post("http://plugin/"+method, "application/json", strings.NewReader(body))
	if err != nil {
		e.t.Errorf("%s: %v", method, err)
		return 0, ""
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err != nil {
		e.t.Errorf("%s: %v", method, err)
	}
	return r.StatusCode, string(text)
}

// Whatever an engine sends, of any method, again and again and at once, is
// answered as the protocol says, and leaves nothing.
func TestEveryCallIsAnsweredWhateverItBrings(t *testing.T) {
	newVM(t, 2)
	e := startPlugin(t, t.TempDir())
	pool := e.createNetwork(netID, nil)
	strange := []string{
		``, `{}`, `null`, `[]`, `{"NetworkID":"` + otherID + `","EndpointID":"` + endpointID(9) + `"}`,
		`{"NetworkID":"` + netID + `","EndpointID":"` + endpointID(9) + `","Interface":{"Address":"10.240.0.5/16"}}`,
		`{"NetworkID":"../../etc","EndpointID":"a b"}`, `{"PoolID":"LocalDefault/10.0.0.0/8","Address":"10.240.0.5"}`,
		`{"PoolID":"` + pool + `","Address":"not an address"}`, `{"PoolID":"` + pool + `","Address":"10.240.0.1","Options":{"RequestAddressType":"com.docker.network.gateway"}}`,
		`{"AddressSpace":"LocalDefault","Pool":"10.240.0.0/16"}`, `{"AddressSpace":"azure-vnet","Pool":"2001:db8::/64","V6":true}`,
	}
	var all sync.WaitGroup
	for method, m := range methods(nil, nil) {
		for _, body := range strange {
			for range 2 {
				all.Go(func() {
					status, answer := e.post(method, body)
					var refused struct{ Err string }
					switch err := json.Unmarshal([]byte(answer), &refused); {
					case err != nil:
						t.Errorf("%s %s: %q is no JSON: %v", method, body, answer, err)
					case status == http.StatusInternalServerError && refused.Err == "", status != http.StatusInternalServerError && status != http.StatusOK:
						t.Errorf("%s %s: status %d, %s", method, body, status, answer)
					case body == "" && !m.bodiless && (status != http.StatusInternalServerError || !strings.Contains(refused.Err, "the request is empty")):
						t.Errorf("%s with an empty body: status %d, %s", method, status, answer)
					case strings.Contains(refused.Err, "internal error"):
						t.Errorf("%s %s: it panicked: %s", method, body, answer)
					}
				})
			}
		}
	}
	all.Wait()
	expect(t, "links", []string{}, endpoints(t))
	expect(t, "leases", []string{}, e.lent())
	pool = e.createNetwork(netID, nil) // DeleteNetwork was among them
	addr, link, err := e.run(pool, endpointID(1))
	if err != nil || link == "" {
		t.Fatalf("after all that a container gets %s, %s: %v", addr, link, err)
	}
	e.remove(pool, endpointID(1), addr)
}

// What engines from 27 to 29 do otherwise than 20.10, as recorded of them, call
// by call.
func TestNewerEnginesAreServed(t *testing.T) {
	newVM(t, 3)
	data := t.TempDir()
	e := startPlugin(t, data)

	// 28 asks GwAllocCheck of those that announce it, and 27 chooses no subnet
	// where both address spaces have one name: one RequestPool, and the gateway in its answer.
	_, caps := e.post("NetworkDriver.GetCapabilities", "")
	if strings.Contains(caps, "GwAllocChecker") {
		t.Errorf("GwAllocCheck is announced, and not served: %s", caps)
	}
	chosen := must[ipam.RequestPoolResponse](e, "IpamDriver.RequestPool", ipam.RequestPoolRequest{AddressSpace: "azure-vnet"})
	expect(t, "pool", "10.240.0.0/16", chosen.Pool)
	expect(t, "gateway", "10.240.0.1/16", chosen.Data["com.docker.network.gateway"])
	request := networkRequest(netID, nil)
	request.Options["com.docker.network.enable_ipv4"] = true // sent from 28
	must[nothing](e, "NetworkDriver.CreateNetwork", request)

	// 29 names the endpoint when it asks for an address, and gives port map and
	// exposed ports with every endpoint.
	start := func(i int) (addr, link string) {
		t.Helper()
		a := must[ipam.RequestAddressResponse](e, "IpamDriver.RequestAddress", ipam.RequestAddressRequest{
			PoolID: chosen.PoolID, Options: map[string]string{"com.docker.network.endpoint.name": "web", "com.docker.network.endpoint.macaddress": ""},
		})
		in := endpointRequest(endpointID(i), a.Address)
		portMap := []any{map[string]any{"Proto": 6, "IP": "", "Port": 80, "HostIP": "", "HostPort": 8080, "HostPortEnd": 8080}}
		in.Options = map[string]any{
			"com.docker.network.endpoint.exposedports": []any{map[string]any{"Proto": 6, "Port": 80}}, "com.docker.network.portmap": portMap,
		}
		must[network.CreateEndpointResponse](e, "NetworkDriver.CreateEndpoint", in)
		join := must[network.JoinResponse](e, "NetworkDriver.Join", network.JoinRequest{
			NetworkID: netID, EndpointID: endpointID(i), SandboxKey: "/run/docker/netns/x", Options: map[string]any{"com.docker.network.endpoint.exposedports": []any{}},
		})
		must[nothing](e, "NetworkDriver.ProgramExternalConnectivity", network.ProgramExternalConnectivityRequest{
			NetworkID: netID, EndpointID: endpointID(i), Options: map[string]any{"com.docker.network.portmap": portMap},
		})
		must[network.InfoResponse](e, "NetworkDriver.EndpointOperInfo", network.InfoRequest{NetworkID: netID, EndpointID: endpointID(i)})
		return a.Address, join.InterfaceName.SrcName
	}
	one, link := start(1)
	end := moveToContainer(t, link)
	expect(t, "published", []string{"0.0.0.0:8080->80/tcp"}, e.published())
	if !published(t) {
		t.Error("no table of published ports")
	}

	// Its restart tells the plugin nothing but GetCapabilities, and for endpoints
	// of before no Revoke comes at the end, while Leave may come twice.
	e.end()
	e = startPlugin(t, data)
	e.post("NetworkDriver.GetCapabilities", "")
	end()
	for range 2 {
		must[nothing](e, "NetworkDriver.Leave", network.LeaveRequest{NetworkID: netID, EndpointID: endpointID(1)})
	}
	must[nothing](e, "NetworkDriver.DeleteEndpoint", network.DeleteEndpointRequest{NetworkID: netID, EndpointID: endpointID(1)})
	plain, _, _ := strings.Cut(one, "/")
	must[nothing](e, "IpamDriver.ReleaseAddress", ipam.ReleaseAddressRequest{PoolID: chosen.PoolID, Address: plain})
	expect(t, "links", []string{}, endpoints(t))
	expect(t, "leases", []string{}, e.lent())
	// At once where DeleteEndpoint found the link, by the next round where that had gone with its namespace.
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		host, err := os.ReadFile("/run/azure-vnet/host.json")
		if err != nil {
			t.Fatal(err)
		}
		if !published(t) && !strings.Contains(string(host), "8080") {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the port outlives its endpoint: in the nft table %v; host.json: %s", published(t), host)
		}
	}

	// After a CreateEndpoint that was refused only ReleaseAddress follows.
	a := must[ipam.RequestAddressResponse](e, "IpamDriver.RequestAddress", ipam.RequestAddressRequest{PoolID: chosen.PoolID})
	in := endpointRequest(endpointID(2), a.Address)
	in.Options = map[string]any{"colour": "red"}
	if _, err := call[network.CreateEndpointResponse](e, "NetworkDriver.CreateEndpoint", in); err == nil {
		t.Error("an unknown --driver-opt was taken")
	}
	plain, _, _ = strings.Cut(a.Address, "/")
	must[nothing](e, "IpamDriver.ReleaseAddress", ipam.ReleaseAddressRequest{PoolID: chosen.PoolID, Address: plain})
	expect(t, "leases after a refusal", []string{}, e.lent())
}

// A container's ports may come with ProgramExternalConnectivity alone, when its default route comes to our network. Engines
// from 29 leave a container without a network if that call fails. So a port that another container has by then is left
// out, and the log says whose it is. A repeat changes nothing, and Leave takes the ports back.
func TestAPortThatIsTakenLaterIsLeftOut(t *testing.T) {
	newVM(t, 2)
	e := startPlugin(t, t.TempDir())
	pool := e.createNetwork(netID, nil)
	program := func(i int) {
		t.Helper()
		for range 2 {
			must[nothing](e, "NetworkDriver.ProgramExternalConnectivity", network.ProgramExternalConnectivityRequest{NetworkID: netID, EndpointID: endpointID(i),
				Options: map[string]any{"com.docker.network.portmap": []any{map[string]any{"Proto": 6, "Port": 80, "HostPort": 8080, "HostPortEnd": 8080}}}})
		}
	}
	for i := range 2 {
		if _, _, err := e.run(pool, endpointID(i+1)); err != nil {
			t.Fatal(err)
		}
		program(i + 1)
	}
	expect(t, "published", []string{"0.0.0.0:8080->80/tcp"}, e.published())
	if log := e.log.String(); !strings.Contains(log, "not published for endpoint "+endpointID(2)[:12]) || !strings.Contains(log, "it is published to 10.240.0.5 already") {
		t.Errorf("the log does not say whose the port is:\n%s", log)
	}
	must[nothing](e, "NetworkDriver.Leave", network.LeaveRequest{NetworkID: netID, EndpointID: endpointID(1)})
	program(2) // a port that leads nowhere yields
	if out, err := exec.Command("nft", "list", "map", "ip", "azure_vnet", "published").CombinedOutput(); err != nil || !strings.Contains(string(out), "8080 : 10.240.0.6") {
		t.Errorf("after the first left, port 8080 does not lead to the second: %v\n%s", err, out)
	}
}

// published tells whether the nft table leads port 8080 anywhere.
func published(t *testing.T) bool {
	t.Helper()
	out, _ := exec.Command("nft", "list", "table", "ip", "azure_vnet").CombinedOutput() // no table, no port
	return strings.Contains(string(out), "8080")
}

// published are the ports of all endpoints, as status tells them.
func (e *engine) published() (all []string) {
	e.t.Helper()
	for _, at := range readReport(e.t.Context(), e.places).Attachments {
		for _, p := range at.Ports {
			all = append(all, p.String())
		}
	}
	return all
}

// collected ages what is leased by more than a leak is given, and has it collected.
func (e *engine) collected() {
	e.t.Helper()
	e.age()
	if err := e.collect(e.open()); err != nil {
		e.t.Fatal(err)
	}
}

// age makes all leases old.
func (e *engine) age() {
	e.t.Helper()
	type file struct {
		Leases map[string]*struct {
			Since time.Duration `json:"since"`
		} `json:"leases"`
	}
	err := statefile.Update(e.t.Context(), "/run/azure-vnet/leases.json", "a test", func(f *file) error {
		for _, l := range f.Leases {
			l.Since -= 10 * time.Minute
		}
		return nil
	})
	if err != nil {
		e.t.Fatal(err)
	}
}

func (e *engine) collect(host *bridge.Host, addresses *pool.Pool) error {
	log := logrus.New()
	log.SetOutput(e.log)
	return (&reconciler{log: log, host: host, pool: addresses}).collectLeases(e.t.Context())
}

// open opens the host and the pool beside the plugin.
func (e *engine) open() (*bridge.Host, *pool.Pool) {
	e.t.Helper()
	s, err := readLastSettings(e.places.run)
	if err != nil {
		e.t.Fatal(err)
	}
	host := bridge.New(bridge.Config{Run: e.places.run, Sysctl: e.places.sysctl})
	addresses, err := openPool(e.places, s, host)
	if err != nil {
		e.t.Fatal(err)
	}
	return host, addresses
}

// What engines do after a call that failed, or whose answer never came.
func TestAStartThatFailsLeavesNothing(t *testing.T) {
	newVM(t, 2)
	data := t.TempDir()
	e := startPlugin(t, data)
	id := e.createNetwork(netID, nil)
	ask := func() string {
		t.Helper()
		return must[ipam.RequestAddressResponse](e, "IpamDriver.RequestAddress", ipam.RequestAddressRequest{PoolID: id}).Address
	}
	release := func(addr string) error {
		plain, _, _ := strings.Cut(addr, "/")
		_, err := call[nothing](e, "IpamDriver.ReleaseAddress", ipam.ReleaseAddressRequest{PoolID: id, Address: plain})
		return err
	}
	nothingIsLeft := func(t *testing.T) {
		t.Helper()
		expect(t, "links", []string{}, endpoints(t))
		expect(t, "leases", []string{}, e.lent())
	}
	t.Run("CreateEndpoint ends at its deadline: only ReleaseAddress follows", func(t *testing.T) {
		addr := ask()
		unlock, err := statefile.Lock(t.Context(), "/run/azure-vnet/leases.json.lock", "a sleeper")
		if err != nil {
			t.Fatal(err)
		}
		host, addresses := e.open()
		short, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		in := endpointRequest(endpointID(1), addr)
		_, err = driver.New(driver.Config{Dir: data, Host: host, Pool: addresses}).CreateEndpoint(short, &in)
		unlock()
		if err == nil || !strings.Contains(err.Error(), "a sleeper") {
			t.Errorf("CreateEndpoint: %v", err)
		}
		if err := release(addr); err != nil {
			t.Error(err)
		}
		nothingIsLeft(t)
	})
	t.Run("Join fails: DeleteEndpoint and ReleaseAddress follow", func(t *testing.T) {
		addr := ask()
		must[network.CreateEndpointResponse](e, "NetworkDriver.CreateEndpoint", endpointRequest(endpointID(2), addr))
		_, err := call[network.JoinResponse](e, "NetworkDriver.Join", network.JoinRequest{NetworkID: otherID, EndpointID: endpointID(2)})
		if err == nil || !strings.Contains(err.Error(), "is not known here") {
			t.Errorf("Join: %v", err)
		}
		must[nothing](e, "NetworkDriver.DeleteEndpoint", network.DeleteEndpointRequest{NetworkID: netID, EndpointID: endpointID(2)})
		if err := release(addr); err != nil {
			t.Error(err)
		}
		nothingIsLeft(t)
	})
	t.Run("the plugin is killed before it answers: the same call comes without its body", func(t *testing.T) {
		addr := ask()
		must[network.CreateEndpointResponse](e, "NetworkDriver.CreateEndpoint", endpointRequest(endpointID(3), addr)) // the answer is lost
		e.end()
		e = startPlugin(t, data)
		if status, answer := e.post("NetworkDriver.CreateEndpoint", ""); status != http.StatusInternalServerError || !strings.Contains(answer, "repeat the command") {
			t.Errorf("without a body: %d, %s", status, answer)
		}
		if err := release(addr); err == nil {
			t.Error("the address of a link that stands is released")
		}
		e.collected()
		nothingIsLeft(t)
	})
}
