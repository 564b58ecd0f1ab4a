// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"bytes"
	"context"
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
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/docker/go-plugins-helpers/network"
	"github.com/google/go-cmp/cmp"

	"azurevnet/bridge"
	"azurevnet/driver"
	"azurevnet/pool"
)

const (
	netID   = "6e65740000000000000000000000000000000000000000000000000000000001"
	otherID = "6e65740000000000000000000000000000000000000000000000000000000002"
)

// engine plays dockerd against a whole plugin on its socket.
type engine struct {
	t      *testing.T
	places places
	client *http.Client
	stop   context.CancelFunc
	done   chan error
	log    *logBuffer
}

// startPlugin runs the plugin in this process, on the VM's /run, with its
// networks in data.
func startPlugin(t *testing.T, data string) *engine {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	e := &engine{
		t: t, stop: cancel, done: make(chan error, 1), log: &logBuffer{},
		places: places{run: "/run", sysctl: "/proc/sys/net", data: data, socket: "/run/docker/plugins/azure-vnet.sock"},
	}
	e.client = &http.Client{Transport: &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", e.places.socket) },
	}}
	os.Remove(e.places.socket)
	go func() { e.done <- serve(ctx, e.places, e.log) }()
	t.Cleanup(func() {
		e.end()
		if t.Failed() {
			t.Logf("the plugin's log:\n%s", e.log)
		}
	})
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(e.places.socket); err == nil {
			return e
		}
		if time.Now().After(end) {
			t.Fatalf("the plugin does not listen:\n%s", e.log)
		}
	}
}

// end stops the plugin; a second call does nothing.
func (e *engine) end() {
	e.stop()
	e.client.CloseIdleConnections()
	if err, ok := <-e.done; ok {
		close(e.done)
		if err != nil {
			e.t.Errorf("the plugin ended with: %v", err)
		}
	}
}

// call posts a request and reads the answer into one of type A.
func call[A any](e *engine, method string, request any) (A, error) {
	var answer A
	body, err := json.Marshal(request)
	if err != nil {
		return answer, err
	}
	r, err := e.client.Post("http://plugin/"+method, "application/json", bytes.NewReader(body))
	if err != nil {
		return answer, err
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err != nil {
		return answer, err
	}
	if r.StatusCode != http.StatusOK {
		var refused struct{ Err string }
		if err := json.Unmarshal(text, &refused); err != nil {
			return answer, fmt.Errorf("status %d: %s", r.StatusCode, text)
		}
		return answer, fmt.Errorf("%s", refused.Err)
	}
	return answer, json.Unmarshal(text, &answer)
}

type nothing struct{}

// must is a call that has to succeed.
func must[A any](e *engine, method string, request any) A {
	e.t.Helper()
	answer, err := call[A](e, method, request)
	if err != nil {
		e.t.Fatalf("%s: %v", method, err)
	}
	return answer
}

// createNetwork does what docker network create does, and returns the PoolID.
func (e *engine) createNetwork(id string, options map[string]any) string {
	e.t.Helper()
	p := must[ipam.RequestPoolResponse](e, "IpamDriver.RequestPool", ipam.RequestPoolRequest{AddressSpace: "azure-vnet", Pool: "10.240.0.0/16"})
	must[nothing](e, "NetworkDriver.CreateNetwork", networkRequest(id, options))
	return p.PoolID
}

func networkRequest(id string, options map[string]any) network.CreateNetworkRequest {
	return network.CreateNetworkRequest{
		NetworkID: id,
		Options:   map[string]any{"com.docker.network.enable_ipv6": false, "com.docker.network.generic": options},
		IPv4Data:  []*network.IPAMData{{AddressSpace: "azure-vnet", Pool: "10.240.0.0/16", Gateway: "10.240.0.1/16"}},
	}
}

// run does what docker run does as far as Join, and returns address and link.
func (e *engine) run(pool, endpoint string) (addr, link string, err error) {
	a, err := call[ipam.RequestAddressResponse](e, "IpamDriver.RequestAddress", ipam.RequestAddressRequest{PoolID: pool})
	if err != nil {
		return "", "", err
	}
	_, err = call[network.CreateEndpointResponse](e, "NetworkDriver.CreateEndpoint", endpointRequest(endpoint, a.Address))
	if err != nil {
		return "", "", err
	}
	j, err := call[network.JoinResponse](e, "NetworkDriver.Join", network.JoinRequest{NetworkID: netID, EndpointID: endpoint})
	return a.Address, j.InterfaceName.SrcName, err
}

func endpointRequest(id, addr string) network.CreateEndpointRequest {
	return network.CreateEndpointRequest{NetworkID: netID, EndpointID: id, Interface: &network.EndpointInterface{Address: addr}}
}

// remove does what docker rm -f does.
func (e *engine) remove(pool, endpoint, addr string) {
	e.t.Helper()
	must[nothing](e, "NetworkDriver.RevokeExternalConnectivity", network.RevokeExternalConnectivityRequest{NetworkID: netID, EndpointID: endpoint})
	must[nothing](e, "NetworkDriver.Leave", network.LeaveRequest{NetworkID: netID, EndpointID: endpoint})
	must[nothing](e, "NetworkDriver.DeleteEndpoint", network.DeleteEndpointRequest{NetworkID: netID, EndpointID: endpoint})
	plain, _, _ := strings.Cut(addr, "/")
	must[nothing](e, "IpamDriver.ReleaseAddress", ipam.ReleaseAddressRequest{PoolID: pool, Address: plain})
}

// lent lists the addresses that are lent, as status tells them.
func (e *engine) lent() []string {
	e.t.Helper()
	r := readReport(e.t.Context(), e.places)
	if len(r.Errors) > 0 {
		e.t.Fatalf("status: %v", r.Errors)
	}
	all := []string{}
	for addr := range r.Pool.Leases {
		all = append(all, addr.String())
	}
	slices.Sort(all)
	return all
}

func expect[T any](t *testing.T, what string, want, got T) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (- want, + got):\n%s", what, diff)
	}
}

func endpointID(i int) string { return fmt.Sprintf("e0%062x", i) }

func TestALifeOfANetworkAndAContainer(t *testing.T) {
	newVM(t, 3)
	e := startPlugin(t, t.TempDir())
	pool := e.createNetwork(netID, map[string]any{"snat": "off"})
	must[nothing](e, "NetworkDriver.CreateNetwork", networkRequest(netID, map[string]any{"snat": "off"})) // a repeat

	a := must[ipam.RequestAddressResponse](e, "IpamDriver.RequestAddress", ipam.RequestAddressRequest{PoolID: pool})
	expect(t, "address", "10.240.0.5/16", a.Address)
	ep := must[network.CreateEndpointResponse](e, "NetworkDriver.CreateEndpoint", endpointRequest(endpointID(1), a.Address))
	expect(t, "endpoint", network.CreateEndpointResponse{Interface: &network.EndpointInterface{MacAddress: "02:42:0a:f0:00:05"}}, ep)
	join := must[network.JoinResponse](e, "NetworkDriver.Join", network.JoinRequest{NetworkID: netID, EndpointID: endpointID(1)})
	if !strings.HasPrefix(join.InterfaceName.SrcName, "azc") {
		t.Errorf("the link to move is %q", join.InterfaceName.SrcName)
	}
	expect(t, "join", network.JoinResponse{
		InterfaceName: network.InterfaceName{SrcName: join.InterfaceName.SrcName, DstPrefix: "eth"}, Gateway: "10.240.0.1", StaticRoutes: byGateway,
	}, join)
	info := must[network.InfoResponse](e, "NetworkDriver.EndpointOperInfo", network.InfoRequest{NetworkID: netID, EndpointID: endpointID(1)})
	expect(t, "info", network.InfoResponse{Value: map[string]string{}}, info)

	end := moveToContainer(t, join.InterfaceName.SrcName)
	if _, err := call[nothing](e, "IpamDriver.ReleaseAddress", ipam.ReleaseAddressRequest{PoolID: pool, Address: "10.240.0.5"}); err == nil {
		t.Error("the address of a running container was released")
	}
	if _, err := call[network.CreateEndpointResponse](e, "NetworkDriver.CreateEndpoint", endpointRequest(endpointID(1), a.Address)); err == nil {
		t.Error("the endpoint of a running container was created again")
	}
	expect(t, "links after that", 1, len(endpoints(t)))
	end()
	for range 2 { // lost answers make engines repeat themselves
		e.remove(pool, endpointID(1), a.Address)
	}
	must[nothing](e, "IpamDriver.ReleasePool", ipam.ReleasePoolRequest{PoolID: pool})
	for range 2 {
		must[nothing](e, "NetworkDriver.DeleteNetwork", network.DeleteNetworkRequest{NetworkID: netID})
	}
	expect(t, "links", []string{}, endpoints(t))
	expect(t, "leases", []string{}, e.lent())
}

// byGateway are the routes of every container of the subnet.
var byGateway = []*network.StaticRoute{
	{Destination: "10.240.0.1/32", RouteType: 1},
	{Destination: "10.240.0.0/17", NextHop: "10.240.0.1"},
	{Destination: "10.240.128.0/17", NextHop: "10.240.0.1"},
}

func TestAContainerOfEachKindOfNetwork(t *testing.T) {
	for _, c := range []struct {
		name     string
		options  map[string]any
		internal bool
		bridge   string // of the attachment
		mtu      int
	}{
		{"bridge", map[string]any{"mode": "bridge"}, false, "azure0", 1500},
		{"bridge, and an MTU", map[string]any{"mtu": "1400"}, false, "azure0", 1400},
		{"bridge, internal", nil, true, "azure0", 1500},
		{"transparent", map[string]any{"mode": "transparent", "metadata": "off"}, false, "", 1500},
		{"transparent, and an MTU", map[string]any{"com.microsoft.azure.network.mode": "transparent", "mtu": "1400"}, false, "", 1400},
		{"transparent, internal", map[string]any{"mode": "transparent"}, true, "", 1500},
	} {
		t.Run(c.name, func(t *testing.T) {
			newVM(t, 2)
			data := t.TempDir()
			e := startPlugin(t, data)
			p := must[ipam.RequestPoolResponse](e, "IpamDriver.RequestPool", ipam.RequestPoolRequest{AddressSpace: "azure-vnet", Pool: "10.240.0.0/16"})
			r := networkRequest(netID, c.options)
			r.Options["com.docker.network.internal"] = c.internal
			for range 2 { // a repeat is success
				must[nothing](e, "NetworkDriver.CreateNetwork", r)
			}
			e.end()
			e = startPlugin(t, data) // networks.json has all of it
			must[nothing](e, "NetworkDriver.CreateNetwork", r)
			addr, link, err := e.run(p.PoolID, endpointID(1))
			if err != nil {
				t.Fatal(err)
			}
			join := must[network.JoinResponse](e, "NetworkDriver.Join", network.JoinRequest{NetworkID: netID, EndpointID: endpointID(1)})
			want := network.JoinResponse{InterfaceName: network.InterfaceName{SrcName: link, DstPrefix: "eth"}, StaticRoutes: byGateway, DisableGatewayService: c.internal}
			if !c.internal {
				want.Gateway = "10.240.0.1"
			}
			expect(t, "join", want, join)
			report := readReport(t.Context(), e.places)
			if len(report.Attachments) != 1 || report.Attachments[0].Bridge != c.bridge || report.Attachments[0].MTU != c.mtu {
				t.Errorf("attached: %+v", report.Attachments)
			}
			expect(t, "bridges", map[bool]int{true: 1}[c.bridge != ""], len(report.Bridges))
			var out strings.Builder
			if err := report.printTables(&out); err != nil {
				t.Fatal(err)
			}
			mode, in := "bridge", "azure0"
			if c.bridge == "" {
				mode, in = "transparent", "transparent"
			}
			for _, words := range [][]string{{"10.240.0.0/16", nicMAC, mode}, {"10.240.0.5", report.Attachments[0].Link, in}} {
				if !slices.ContainsFunc(strings.Split(out.String(), "\n"), func(line string) bool {
					fields := strings.Fields(line)
					return !slices.ContainsFunc(words, func(w string) bool { return !slices.Contains(fields, w) })
				}) {
					t.Errorf("no line of status has %v:\n%s", words, &out)
				}
			}
			e.remove(p.PoolID, endpointID(1), addr)
			expect(t, "links", []string{}, endpoints(t))
		})
	}
}

// Networks of one NIC differ in what they like.
func TestNetworksOfOneNICDiffer(t *testing.T) {
	newVM(t, 2)
	e := startPlugin(t, t.TempDir())
	e.createNetwork(netID, map[string]any{"mtu": "1400"})
	e.createNetwork(otherID, map[string]any{"mtu": "1300"})
	e.createNetwork(strings.Repeat("7", 64), map[string]any{"mode": "transparent"})
	expect(t, "bridges", 1, len(readReport(t.Context(), e.places).Bridges))
}

// A container that Azure's own azure-vnet runs keeps its address: Docker's containers get others, and status tells of
// it without calling the host broken.
func TestAnAddressOfAnotherPluginIsNotLent(t *testing.T) {
	newVM(t, 2)
	for _, args := range [][]string{{"netns", "add", "old"}, {"link", "add", "azv0a60ad12f1d", "type", "veth", "peer", "name", "eth0", "netns", "old"},
		{"link", "set", "azv0a60ad12f1d", "up"}, {"route", "add", "10.240.0.5", "dev", "azv0a60ad12f1d", "proto", "static"}} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %v: %v: %s", args, err, out)
		}
	}
	e := startPlugin(t, t.TempDir())
	p := e.createNetwork(netID, nil)
	if addr, _, err := e.run(p, endpointID(1)); err != nil || addr != "10.240.0.6/16" {
		t.Errorf("the first container has %s: %v", addr, err)
	}
	const says = "10.240.0.5 is led to azv0a60ad12f1d by a route, and no lease tells of it: it is a container's of another plugin"
	if addr, _, err := e.run(p, endpointID(2)); err == nil || !strings.Contains(err.Error(), says) {
		t.Errorf("the second container has %s: %v", addr, err)
	}
	if _, err := call[ipam.RequestAddressResponse](e, "IpamDriver.RequestAddress", ipam.RequestAddressRequest{PoolID: p, Address: "10.240.0.5"}); err == nil || !strings.Contains(err.Error(), says) {
		t.Errorf("--ip 10.240.0.5: %v", err)
	}
	var out strings.Builder
	if err := printStatus(t.Context(), e.places, false, &out); err != nil || !strings.Contains(out.String(), "warning: "+says) {
		t.Errorf("status: %v\n%s", err, &out)
	}
	e.remove(p, endpointID(1), "10.240.0.6")
	if out, err := exec.Command("ip", "netns", "del", "old").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// A NIC that somebody's bridge has: the plugin listens, and every call that needs the NIC
// says why it cannot be had.
func TestANICInABridgeIsLeftAlone(t *testing.T) {
	const upstream, former = "eth0 is in azure0, a bridge that is not ours", "eth0 is in azure0, where an earlier build of azure-vnet put it"
	for says, alias := range map[string]string{upstream: "", former: "azv1 bridge " + nicMAC} {
		newVM(t, 2)
		data := t.TempDir()
		e := startPlugin(t, data)
		pool := e.createNetwork(netID, nil)
		e.end()
		clearNamespace(t)
		newVM(t, 2) // booted, with what has the NIC
		for _, args := range [][]string{{"link", "add", "azure0", "type", "bridge"}, {"link", "set", "azure0", "alias", alias}, {"link", "set", "eth0", "master", "azure0"}} {
			if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
				t.Fatalf("ip %v: %v: %s", args, err, out)
			}
		}
		e = startPlugin(t, data)
		for what, err := range map[string]error{
			"CreateNetwork": func() error {
				_, err := call[nothing](e, "NetworkDriver.CreateNetwork", networkRequest(otherID, nil))
				return err
			}(),
			"CreateEndpoint": func() error { _, _, err := e.run(pool, endpointID(1)); return err }(),
		} {
			if err == nil || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), "Drain this VM") {
				t.Errorf("%s: %v\nwant an error with %q", what, err, says)
			}
		}
		logged := func() bool {
			return slices.ContainsFunc(strings.Split(e.log.String(), "\n"), func(line string) bool {
				return strings.Contains(line, "level=error") && strings.Contains(line, says) && strings.Contains(line, checkNIC)
			})
		}
		for end := time.Now().Add(10 * time.Second); !logged(); time.Sleep(50 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("the log does not say %q", says)
			}
		}
		var out strings.Builder
		if err := printStatus(t.Context(), e.places, false, &out); err == nil || !strings.Contains(out.String(), "broken: ") || !strings.Contains(out.String(), says) {
			t.Errorf("status: %v\n%s", err, &out)
		}
		expect(t, "links", []string{}, endpoints(t))
		e.collectedNothing(alias != "")
		e.end()
		if err := uninstall(t.Context(), e.places, io.Discard); (err != nil) != (alias != "") {
			t.Errorf("uninstall: %v", err)
		}
		if master, err := os.Readlink("/sys/class/net/eth0/master"); err == nil && filepath.Base(master) != "azure0" {
			t.Errorf("eth0 is in %s", master)
		}
		clearNamespace(t)
	}
}

// collectedNothing wants old leases to stand where links cannot tell who has which.
func (e *engine) collectedNothing(want bool) {
	e.t.Helper()
	before := e.lent()
	if len(before) == 0 {
		e.t.Fatal("nothing is lent")
	}
	e.age()
	host, addresses := e.open()
	err := e.collect(host, addresses)
	if !want {
		return
	}
	if !errors.Is(err, bridge.ErrTaken) {
		e.t.Errorf("collect: %v", err)
	}
	expect(e.t, "leases", before, e.lent())
}

func TestANetworkIsRefusedRatherThanHalfServed(t *testing.T) {
	newVM(t, 2)
	data := t.TempDir()
	e := startPlugin(t, data)
	change := func(f func(*network.CreateNetworkRequest)) network.CreateNetworkRequest {
		r := networkRequest(netID, nil)
		f(&r)
		return r
	}
	for _, c := range []struct {
		name    string
		request network.CreateNetworkRequest
		err     string
	}{
		{"an unknown option", networkRequest(netID, map[string]any{"color": "red"}), `unknown option "color"`},
		{"another IPAM", change(func(r *network.CreateNetworkRequest) { r.IPv4Data[0].AddressSpace = "LocalDefault" }), "create it with --ipam-driver azure-vnet:latest"},
		{"a swarm network without --config-from", change(func(r *network.CreateNetworkRequest) {
			r.NetworkID, r.IPv4Data[0].AddressSpace, r.IPv4Data[0].Pool = "q0w1e2r3t4y5u6i7o8p9a0s1d", "LocalDefault", "172.18.0.0/16"
		}), "--scope swarm -d azure-vnet:latest --config-from CONFIG"},
		{"a subnet of no NIC", change(func(r *network.CreateNetworkRequest) { r.IPv4Data[0].Pool = "172.18.0.0/16" }), "10.240.0.0/16"},
		{"another gateway", change(func(r *network.CreateNetworkRequest) { r.IPv4Data[0].Gateway = "10.240.0.9/16" }), "leave out --gateway"},
		{"two subnets", change(func(r *network.CreateNetworkRequest) { r.IPv4Data = append(r.IPv4Data, r.IPv4Data[0]) }), "exactly one subnet"},
		{"no subnet", change(func(r *network.CreateNetworkRequest) { r.IPv4Data = nil }), "exactly one subnet"},
		{"IPv6", change(func(r *network.CreateNetworkRequest) { r.IPv6Data = []*network.IPAMData{{}} }), "IPv6 is not served yet"},
		{"an unknown master", networkRequest(netID, map[string]any{"master": "eth7"}), "-o master=eth7"},
		{"a master of another subnet", networkRequest(netID, map[string]any{"master": "fabric"}), "10.240.0.0/16"},
		{"an auxiliary address that is not held", change(func(r *network.CreateNetworkRequest) {
			r.IPv4Data[0].AuxAddresses = map[string]any{"router": "10.240.0.5/16"}
		}), "--aux-address router: 10.240.0.5 is not held for this network"},
		{"no id", networkRequest("", nil), "is not an id"},
		{"a path for an id", networkRequest("../../etc", nil), "is not an id"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := call[nothing](e, "NetworkDriver.CreateNetwork", c.request)
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("error %v\nwant one with %q", err, c.err)
			}
		})
	}
	if _, err := os.Stat(filepath.Join(data, "networks.json")); err == nil {
		t.Error("a refused network was written down")
	}
	e.createNetwork(netID, map[string]any{"mtu": "1400"})
	if _, err := call[nothing](e, "NetworkDriver.CreateNetwork", networkRequest(netID, nil)); err == nil {
		t.Error("the same id with other options")
	}
	for _, mode := range []string{"bridge", "transparent"} {
		_, err := call[nothing](e, "NetworkDriver.CreateNetwork", networkRequest(otherID, map[string]any{"mtu": "1501", "mode": mode}))
		if err == nil || !strings.Contains(err.Error(), "-o mtu=1501: the NIC eth0 has an MTU of 1500 bytes, and larger packets would vanish") {
			t.Errorf("an MTU that is not the NIC's: %v", err)
		}
	}
	kept, err := driver.ReadNetworks(data)
	if err != nil || len(kept.Networks) != 1 {
		t.Errorf("networks.json has %v, %v", kept.Networks, err)
	}
}

func TestAnEndpointThatFailsLeavesNothing(t *testing.T) {
	newVM(t, 3)
	e := startPlugin(t, t.TempDir())
	pool := e.createNetwork(netID, nil)
	a := must[ipam.RequestAddressResponse](e, "IpamDriver.RequestAddress", ipam.RequestAddressRequest{PoolID: pool})
	change := func(f func(*network.CreateEndpointRequest)) network.CreateEndpointRequest {
		r := endpointRequest(endpointID(1), a.Address)
		f(&r)
		return r
	}
	for _, c := range []struct {
		name    string
		request network.CreateEndpointRequest
		err     string
	}{
		{"-p", change(func(r *network.CreateEndpointRequest) {
			r.Options = map[string]any{"com.docker.network.portmap": []any{map[string]any{"Proto": 132, "Port": 80}}}
		}), "SCTP is not served"},
		{"--driver-opt", change(func(r *network.CreateEndpointRequest) { r.Options = map[string]any{"qos": "1"} }), `unknown --driver-opt "qos"`},
		{"an unknown network", change(func(r *network.CreateEndpointRequest) { r.NetworkID = otherID }), "is not known here"},
		{"no interface", change(func(r *network.CreateEndpointRequest) { r.Interface = nil }), "no address"},
		{"no address", change(func(r *network.CreateEndpointRequest) { r.Interface.Address = "" }), "no address"},
		{"another mask", change(func(r *network.CreateEndpointRequest) { r.Interface.Address = "10.240.0.5/24" }), "not of the network's subnet 10.240.0.0/16"},
		{"IPv6", change(func(r *network.CreateEndpointRequest) { r.Interface.AddressIPv6 = "fd00::5/64" }), "IPv6 is not served yet"},
		{"an address that nobody lent", change(func(r *network.CreateEndpointRequest) { r.Interface.Address = "10.240.0.6/16" }), "10.240.0.6 is not leased"},
		{"a multicast MAC", change(func(r *network.CreateEndpointRequest) { r.Interface.MacAddress = "01:00:5e:00:00:01" }), "multicast"},
		{"no MAC", change(func(r *network.CreateEndpointRequest) { r.Interface.MacAddress = "x" }), "is not a MAC address"},
		{"a path for an id", change(func(r *network.CreateEndpointRequest) { r.EndpointID = "../x" }), "is not an id"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := call[nothing](e, "NetworkDriver.CreateEndpoint", c.request)
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("error %v\nwant one with %q", err, c.err)
			}
			expect(t, "links", []string{}, endpoints(t))
		})
	}
	if _, err := call[nothing](e, "NetworkDriver.Join", network.JoinRequest{NetworkID: netID, EndpointID: endpointID(1)}); err == nil {
		t.Error("an endpoint that is not there was joined")
	}
	asked := change(func(r *network.CreateEndpointRequest) { r.Interface.MacAddress = "02:11:22:33:44:55" })
	ep := must[network.CreateEndpointResponse](e, "NetworkDriver.CreateEndpoint", asked)
	expect(t, "the answer to a MAC that was asked for", network.CreateEndpointResponse{Interface: &network.EndpointInterface{}}, ep)
}

func TestARestartOfThePluginIsNotNoticed(t *testing.T) {
	newVM(t, 3)
	data := t.TempDir()
	e := startPlugin(t, data)
	pool := e.createNetwork(netID, nil)
	a := must[ipam.RequestAddressResponse](e, "IpamDriver.RequestAddress", ipam.RequestAddressRequest{PoolID: pool})
	must[network.CreateEndpointResponse](e, "NetworkDriver.CreateEndpoint", endpointRequest(endpointID(1), a.Address))
	e.end()

	e = startPlugin(t, data)
	join := must[network.JoinResponse](e, "NetworkDriver.Join", network.JoinRequest{NetworkID: netID, EndpointID: endpointID(1)})
	defer moveToContainer(t, join.InterfaceName.SrcName)()
	e.end()
	if err := os.Remove("/run/azure-vnet/leases.json"); err != nil {
		t.Fatal(err)
	}

	e = startPlugin(t, data) // the leases are lost: the link proves one
	addr, _, err := e.run(pool, endpointID(2))
	if err != nil || addr == a.Address {
		t.Errorf("%s, %v: it was lent twice", addr, err)
	}
	e.remove(pool, endpointID(1), a.Address)
	e.remove(pool, endpointID(2), addr)
	expect(t, "links", []string{}, endpoints(t))
	expect(t, "leases", []string{}, e.lent())
}

func TestNetworksOutliveAReboot(t *testing.T) {
	newVM(t, 3)
	data := t.TempDir()
	e := startPlugin(t, data)
	pool := e.auxNetwork("10.240.0.5")
	e.end()
	clearNamespace(t)
	newVM(t, 3) // the same VM: booted

	e = startPlugin(t, data)
	addr, _, err := e.run(pool, endpointID(1))
	if err != nil {
		t.Fatal(err)
	}
	expect(t, "leases: the auxiliary address and the container's", []string{"10.240.0.5", "10.240.0.6"}, e.lent())
	expect(t, "bridges", 1, len(readReport(t.Context(), e.places).Bridges))
	e.remove(pool, endpointID(1), addr)
	must[nothing](e, "IpamDriver.ReleaseAddress", ipam.ReleaseAddressRequest{PoolID: pool, Address: "10.240.0.5"})
	expect(t, "leases", []string{}, e.lent())
}

// A source that is silent as the VM boots, and answers later.
func TestAuxiliaryAddressesAreNotLentAfterASilentBoot(t *testing.T) {
	newVM(t, 3)
	data := t.TempDir()
	e := startPlugin(t, data)
	pool := e.auxNetwork("10.240.0.5")
	e.end()
	clearNamespace(t)
	newVM(t, 3) // the same VM: booted
	const source = "/run/interfaces.json"
	if err := os.Rename(source, source+".later"); err != nil {
		t.Fatal(err)
	}
	e = startPlugin(t, data)
	if _, err := call[ipam.RequestAddressResponse](e, "IpamDriver.RequestAddress", ipam.RequestAddressRequest{PoolID: pool}); err == nil {
		t.Fatal("an address of nobody knows what")
	}
	if err := os.Rename(source+".later", source); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		_, err := call[ipam.RequestAddressResponse](e, "IpamDriver.RequestAddress", ipam.RequestAddressRequest{PoolID: pool, Address: "10.240.0.5"})
		if err == nil {
			t.Fatal("the auxiliary address is lent to whoever asks for it by name")
		}
		got, err := call[ipam.RequestAddressResponse](e, "IpamDriver.RequestAddress", ipam.RequestAddressRequest{PoolID: pool})
		if err == nil {
			expect(t, "the first address after the boot", "10.240.0.6/16", got.Address)
			break
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	expect(t, "leases", []string{"10.240.0.5", "10.240.0.6"}, e.lent())
}

// auxNetwork makes a network with an auxiliary address, and returns the PoolID.
func (e *engine) auxNetwork(addr string) string {
	e.t.Helper()
	p := must[ipam.RequestPoolResponse](e, "IpamDriver.RequestPool", ipam.RequestPoolRequest{AddressSpace: "azure-vnet", Pool: "10.240.0.0/16"})
	must[ipam.RequestAddressResponse](e, "IpamDriver.RequestAddress", ipam.RequestAddressRequest{PoolID: p.PoolID, Address: addr})
	r := networkRequest(netID, nil)
	r.IPv4Data[0].AuxAddresses = map[string]any{"router": addr + "/16"}
	must[nothing](e, "NetworkDriver.CreateNetwork", r)
	return p.PoolID
}

func TestARunningContainersLeaseThatWasLostIsHeldAgain(t *testing.T) {
	newVM(t, 2)
	e := startPlugin(t, t.TempDir())
	id := e.createNetwork(netID, nil)
	addr, link, err := e.run(id, endpointID(1))
	if err != nil {
		t.Fatal(err)
	}
	defer moveToContainer(t, link)()
	host, addresses := e.open()
	lost := netip.MustParsePrefix(addr).Addr()
	before, _, err := addresses.FindLease(t.Context(), lost)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := addresses.Return(t.Context(), before); err != nil {
		t.Fatal(err)
	}
	if err := e.collect(host, addresses); err != nil {
		t.Fatal(err)
	}
	after, _, err := addresses.FindLease(t.Context(), lost)
	before.Since, after.Since = 0, 0
	if err != nil || after != before {
		t.Errorf("was %+v, is %+v: %v", before, after, err)
	}
}

// Docker's own internal networks ignore -p too; the log says so.
func TestPortsOfAnInternalNetworkAreNotPublished(t *testing.T) {
	newVM(t, 1)
	e := startPlugin(t, t.TempDir())
	p := must[ipam.RequestPoolResponse](e, "IpamDriver.RequestPool", ipam.RequestPoolRequest{AddressSpace: "azure-vnet", Pool: "10.240.0.0/16"})
	r := networkRequest(netID, nil)
	r.Options["com.docker.network.internal"] = true
	must[nothing](e, "NetworkDriver.CreateNetwork", r)
	a := must[ipam.RequestAddressResponse](e, "IpamDriver.RequestAddress", ipam.RequestAddressRequest{PoolID: p.PoolID})
	in := endpointRequest(endpointID(1), a.Address)
	in.Options = map[string]any{"com.docker.network.portmap": []any{map[string]any{"Proto": 6, "Port": 80, "HostPort": 8080}}}
	must[network.CreateEndpointResponse](e, "NetworkDriver.CreateEndpoint", in)
	if log := e.log.String(); strings.Count(log, "level=warning") != 1 || !strings.Contains(log, "8080->80/tcp: not published") {
		t.Errorf("the log does not say in one line that -p was ignored:\n%s", log)
	}
	if published(t) {
		t.Error("it is published")
	}
}

// Of two networks on one NIC either may name the bridge, and either be restored first.
func TestANamedBridgeOutlivesAReboot(t *testing.T) {
	for _, order := range [][]string{{netID, otherID}, {otherID, netID}} {
		newVM(t, 2)
		data := t.TempDir()
		e := startPlugin(t, data)
		named, unnamed := order[0], order[1]
		e.createNetwork(named, map[string]any{"bridge": "foo"})
		e.createNetwork(unnamed, nil)
		must[nothing](e, "NetworkDriver.CreateNetwork", networkRequest(unnamed, nil)) // a repeat
		_, err := call[nothing](e, "NetworkDriver.CreateNetwork", networkRequest(strings.Repeat("7", 64), map[string]any{"bridge": "bar"}))
		if err == nil || !strings.Contains(err.Error(), "has foo, this one asks for bar") {
			t.Errorf("a second name of one bridge: %v", err)
		}
		e.end()
		clearNamespace(t)
		newVM(t, 2) // the same VM: booted

		e = startPlugin(t, data)
		for _, id := range order {
			must[nothing](e, "NetworkDriver.CreateNetwork", networkRequest(id, map[string]any{"bridge": "foo"}))
		}
		bridges := readReport(t.Context(), e.places).Bridges
		if len(bridges) != 1 || bridges[0].Name != "foo" {
			t.Errorf("named by %.2s…%s, the bridges are %+v", named, named[62:], bridges)
		}
		must[nothing](e, "NetworkDriver.DeleteNetwork", network.DeleteNetworkRequest{NetworkID: named})
		e.createNetwork(strings.Repeat("7", 64), nil)
		e.end()
		clearNamespace(t)
	}
}

// What is done with networks.json unreadable: what needs it is refused, and says what
// to do; the rest goes on, and so does all when the file is back.
func TestUnreadableNetworksAreNotLost(t *testing.T) {
	for name, spoil := range map[string]func(whole []byte) []byte{
		"empty":             func([]byte) []byte { return nil },
		"truncated":         func(whole []byte) []byte { return whole[:len(whole)/2] },
		"full of NULs":      func(whole []byte) []byte { return make([]byte, len(whole)) },
		"null":              func([]byte) []byte { return []byte("null") },
		"of version 9":      func([]byte) []byte { return []byte(`{"version":9,"networks":{}}`) },
		"of no version":     func([]byte) []byte { return []byte(`{"networks":{}}`) },
		"of something else": func([]byte) []byte { return []byte(`["networks"]`) },
	} {
		t.Run(name, func(t *testing.T) {
			newVM(t, 3)
			data := t.TempDir()
			file := driver.NetworksFile(data)
			e := startPlugin(t, data)
			pool := e.createNetwork(netID, nil)
			addr, _, err := e.run(pool, endpointID(1))
			if err != nil {
				t.Fatal(err)
			}
			e.end()
			whole, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			spoilt := spoil(whole)
			if err := os.WriteFile(file, spoilt, 0o600); err != nil {
				t.Fatal(err)
			}

			e = startPlugin(t, data)
			refused := func(what string, err error) {
				t.Helper()
				for _, want := range []string{"on the host it is " + file, "put a copy in its place"} {
					if err == nil || !strings.Contains(err.Error(), want) {
						t.Errorf("%s: %v\nwant an error with %q", what, err, want)
					}
				}
			}
			_, err = call[nothing](e, "NetworkDriver.CreateNetwork", networkRequest(otherID, nil))
			refused("another network", err)
			_, _, err = e.run(pool, endpointID(2))
			refused("another container", err)
			e.remove(pool, endpointID(1), addr)
			expect(t, "links", []string{}, endpoints(t))
			if out, err := exec.Command("nft", "delete", "table", "bridge", "azure_vnet").CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			for end := time.Now().Add(10 * time.Second); exec.Command("nft", "list", "table", "bridge", "azure_vnet").Run() != nil; time.Sleep(50 * time.Millisecond) {
				if time.Now().After(end) {
					t.Fatal("nobody mends the table")
				}
			}
			if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, spoilt) {
				t.Errorf("the file is now %q, %v", got, err)
			}

			if err := os.WriteFile(file, whole, 0o600); err != nil {
				t.Fatal(err)
			}
			if addr, _, err = e.run(pool, endpointID(3)); err != nil {
				t.Fatalf("with the file in its place again: %v", err)
			}
			e.remove(pool, endpointID(3), addr)
			e.end()
			clearNamespace(t)
		})
	}
}

// An engine disables for good a plugin that does not come up when it starts.
func TestAFullRunFailsCallsAndNotThePlugin(t *testing.T) {
	newVM(t, 1)
	const state, filler = "/run/azure-vnet", "/run/azure-vnet/filler"
	if err := errors.Join(os.Mkdir(state, 0o755), syscall.Mount("tmpfs", state, "tmpfs", 0, "size=64k"),
		os.WriteFile(filler, make([]byte, 64<<10), 0o600)); err != nil {
		t.Fatal(err)
	}
	e := startPlugin(t, t.TempDir())
	ask := func() error {
		_, err := call[ipam.RequestPoolResponse](e, "IpamDriver.RequestPool", ipam.RequestPoolRequest{Pool: "10.240.0.0/16"})
		return err
	}
	if err := ask(); err == nil || !strings.Contains(err.Error(), "no space left on device") {
		t.Errorf("a call with /run full: %v", err)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if err := ask(); err != nil {
		t.Errorf("a call with room again: %v", err)
	}
	e.createNetwork(netID, nil)
}

func TestThirtyContainersAtOnce(t *testing.T) {
	newVM(t, 30)
	e := startPlugin(t, t.TempDir())
	pool := e.createNetwork(netID, nil)
	var mu sync.Mutex
	held := map[string]string{} // endpoint by address
	var runs sync.WaitGroup
	for i := range 30 {
		runs.Go(func() {
			addr, _, err := e.run(pool, endpointID(i))
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if other := held[addr]; other != "" {
				t.Errorf("%s is held twice", addr)
			}
			held[addr] = endpointID(i)
		})
	}
	runs.Wait()
	expect(t, "leases", 30, len(e.lent()))
	for addr, id := range held {
		runs.Go(func() { e.remove(pool, id, addr) })
	}
	runs.Wait()
	expect(t, "links", []string{}, endpoints(t))
	expect(t, "leases", []string{}, e.lent())
}

func TestUninstallLeavesNothing(t *testing.T) {
	newVM(t, 1)
	data := t.TempDir()
	e := startPlugin(t, data)
	e.createNetwork(netID, nil)
	if err := uninstall(t.Context(), e.places, io.Discard); err == nil || !strings.Contains(err.Error(), "docker plugin disable -f azure-vnet:latest first") {
		t.Errorf("beside a plugin that runs: %v", err)
	}
	expect(t, "bridges", 1, len(readReport(t.Context(), e.places).Bridges))
	e.end()
	for _, want := range []string{"azure0 is removed\n", ""} { // a repeat is success
		var out strings.Builder
		if err := uninstall(t.Context(), e.places, &out); err != nil {
			t.Fatal(err)
		}
		expect(t, "uninstall", want, out.String())
	}
	left, err := os.ReadDir(data)
	if err != nil {
		t.Fatal(err)
	}
	expect(t, "files", 0, len(left))
	if _, err := os.Stat("/run/azure-vnet"); err == nil {
		t.Error("/run/azure-vnet is still there")
	}
	addrs, err := net.InterfaceByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	list, err := addrs.Addrs()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(list, func(a net.Addr) bool { return a.String() == "10.240.0.4/16" }) {
		t.Errorf("eth0 has %v", list)
	}
	expect(t, "bridges", 0, len(readReport(t.Context(), e.places).Bridges))
}

// An uninstall that is refused removes nothing, a link that waits for its container included.
func TestAnUninstallThatIsRefusedRemovesNothing(t *testing.T) {
	newVM(t, 2)
	e := startPlugin(t, t.TempDir())
	id := e.createNetwork(netID, nil)
	if _, _, err := e.run(id, endpointID(1)); err != nil {
		t.Fatal(err)
	}
	e.end()
	before := readReport(t.Context(), e.places)
	if len(before.Attachments) != 1 || before.Attachments[0].InContainer {
		t.Fatalf("attached are %v", before.Attachments)
	}
	left, err := readLastSettings(e.places.run)
	if err != nil {
		t.Fatal(err)
	}
	addresses, err := openPool(e.places, left, bridge.New(bridge.Config{}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := addresses.Lease(t.Context(), pool.Request{Owner: "cni/other/c/eth0", Linkless: true, Known: true}); err != nil {
		t.Fatal(err)
	}
	if err := uninstall(t.Context(), e.places, io.Discard); err == nil || !strings.Contains(err.Error(), "cni/other/c/eth0") {
		t.Errorf("with an address of another main plugin's container: %v", err)
	}
	after := readReport(t.Context(), e.places)
	expect(t, "attachments", fmt.Sprint(before.Attachments), fmt.Sprint(after.Attachments))
}
