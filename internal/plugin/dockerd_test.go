// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"azurevnet/pool"

	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/docker/go-plugins-helpers/network"
)

// serveAPI answers as an engine's API does: paths without their version.
func serveAPI(t *testing.T, answers map[string]string) dockerd {
	t.Helper()
	return serveAPIAt(t, filepath.Join(t.TempDir(), "docker.sock"), answers)
}

func serveAPIAt(t *testing.T, socket string, answers map[string]string) dockerd {
	t.Helper()
	e := dockerd{socket: socket, plugin: strings.Repeat("a", 64)}
	l, err := net.Listen("unix", e.socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	srv := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, path, versioned := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v"), "/")
		if !versioned {
			path = strings.TrimPrefix(r.URL.Path, "/")
		}
		body, ok := answers[path]
		switch {
		case body == "hang":
			<-done
		case path == "_ping":
			w.Header().Set("Api-Version", "1.41")
		case ok:
			w.Header().Set("Content-Type", "application/json")
			w.Write([]byte(body))
		default:
			http.Error(w, `{"message":"no such thing"}`, http.StatusNotFound)
		}
	})}
	go srv.Serve(l)
	t.Cleanup(func() { close(done); srv.Close() })
	return e
}

func TestTheEnginesListOfNetworks(t *testing.T) {
	const whole = `[{"Name":"none","Id":"n"},{"Name":"host","Id":"h"},{"Name":"azure","Id":"x"}]`
	ours := "plugins/" + strings.Repeat("a", 64) + "/json"
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	t.Run("whole", func(t *testing.T) {
		got, err := serveAPI(t, map[string]string{ours: `{}`, "networks": whole}).listNetworks(ctx)
		if err != nil {
			t.Fatal(err)
		}
		expect(t, "networks", map[string]bool{"n": true, "h": true, "x": true}, got)
	})
	for name, answers := range map[string]map[string]string{
		"of another engine, which has no such plugin": {"networks": whole},
		"in part":    {ours: `{}`, "networks": `[{"Name":"azure","Id":"x"}]`},
		"empty":      {ours: `{}`, "networks": `[]`},
		"null":       {ours: `{}`, "networks": `null`},
		"not JSON":   {ours: `{}`, "networks": `<html>`},
		"not at all": {ours: `{}`},
		"an object":  {ours: `{}`, "networks": `{"message":"starting"}`},
	} {
		t.Run(name+", says nothing", func(t *testing.T) {
			if got, err := serveAPI(t, answers).listNetworks(ctx); err == nil {
				t.Errorf("it gives %v", got)
			}
		})
	}
	t.Run("an engine that hangs is waited for no longer than told", func(t *testing.T) {
		for _, path := range []string{"_ping", ours, "networks"} {
			answers := map[string]string{ours: `{}`, "networks": whole}
			answers[path] = "hang"
			short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
			if _, err := serveAPI(t, answers).listNetworks(short); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s hangs: %v", path, err)
			}
			cancel()
		}
	})
	t.Run("an engine elsewhere is not asked", func(t *testing.T) {
		if _, err := (dockerd{socket: filepath.Join(t.TempDir(), "docker.sock")}).listNetworks(ctx); !errors.Is(err, errNoEngine) {
			t.Error(err)
		}
	})
}

// listing is an engine's list of containers: web has endpoint 1 on azure.
func listing() map[string]string {
	return map[string]string{
		"containers/json": `[{"Id":"c","Names":["/db"],"NetworkSettings":{"Networks":{"bridge":{"EndpointID":"x"}}}},{"Id":"d","Names":[]},{"Id":"e","Names":["/f"]},
			{"Id":"w","Names":["/web"],"NetworkSettings":{"Networks":{"bridge":{"EndpointID":"y"},"azure":{"EndpointID":"` + endpointID(1) + `"}}}}]`,
		"networks": `[{"Name":"azure","Id":"` + netID + `"}]`,
	}
}

func TestNamesThatTheEngineTells(t *testing.T) {
	e := serveAPI(t, listing())
	name, in, err := e.Container(t.Context(), endpointID(1))
	if name != "web" || in != "azure" || err != nil {
		t.Errorf("container %q of network %q: %v", name, in, err)
	}
	if _, _, err := e.Container(t.Context(), endpointID(2)); err == nil {
		t.Error("an endpoint that no container has: no error")
	}
	if name, err := e.Network(t.Context(), netID); name != "azure" || err != nil {
		t.Errorf("network %q: %v", name, err)
	}
	if _, err := e.Network(t.Context(), otherID); err == nil {
		t.Error("a network that the engine has not: no error")
	}
}

// An error names the container that holds an address or a port. An engine may not answer while it waits for this very
// call. Then the error comes soon all the same, and tells the EndpointID, which docker network inspect shows.
func TestAHolderIsNamedThoughTheEngineHangs(t *testing.T) {
	for _, c := range []struct {
		name           string
		answers        map[string]string
		container, aux string
	}{
		{"it answers", listing(), "container web of network azure", "auxiliary address router of network azure"},
		{"it hangs", map[string]string{"_ping": "hang", "containers/json": "hang", "networks": "hang"},
			"the container whose EndpointID in docker network inspect is e00000000000…", "auxiliary address router of network 6e6574000000"},
		{"it knows neither", map[string]string{"containers/json": `[]`, "networks": `[]`},
			"the container whose EndpointID in docker network inspect is e00000000000…", "auxiliary address router of network 6e6574000000"},
		{"it is not there", nil,
			"the container whose EndpointID in docker network inspect is e00000000000…", "auxiliary address router of network 6e6574000000"},
	} {
		t.Run(c.name, func(t *testing.T) {
			newVM(t, 3)
			if c.answers != nil {
				serveAPIAt(t, "/run/docker.sock", c.answers)
			}
			e := startPlugin(t, t.TempDir())
			pool := e.auxNetwork("10.240.0.6")
			publish := func(endpoint, addr string) error {
				in := endpointRequest(endpoint, addr)
				in.Options = map[string]any{"com.docker.network.portmap": []any{map[string]any{"Proto": 6, "Port": 80, "HostPort": 8080}}}
				_, err := call[network.CreateEndpointResponse](e, "NetworkDriver.CreateEndpoint", in)
				return err
			}
			lend := func(addr string) error {
				_, err := call[ipam.RequestAddressResponse](e, "IpamDriver.RequestAddress", ipam.RequestAddressRequest{PoolID: pool, Address: addr})
				return err
			}
			if err := errors.Join(lend("10.240.0.5"), publish(endpointID(1), "10.240.0.5/16"), lend("10.240.0.7")); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			expect(t, "the address", "address in use: 10.240.0.5 is held by "+c.container+"; ask for another", fmt.Sprint(lend("10.240.0.5")))
			expect(t, "the auxiliary address", "address in use: 10.240.0.6 is "+c.aux+"; ask for another", fmt.Sprint(lend("10.240.0.6")))
			expect(t, "the auxiliary address, for an endpoint", "10.240.0.6 is "+c.aux+": leave out --ip to get any free address", fmt.Sprint(publish(endpointID(2), "10.240.0.6/16")))
			expect(t, "the address that nothing is attached with", "address in use: 10.240.0.7 is held by a container or a network of Docker that is being made or removed just now; ask for another", fmt.Sprint(lend("10.240.0.7")))
			expect(t, "the port", "attach the endpoint: publish port 8080/tcp of the host: it is published to 10.240.0.5 already ("+c.container+"); publish another, or none: containers are reached at their own addresses",
				fmt.Sprint(publish(endpointID(2), "10.240.0.7/16")))
			if took := time.Since(start); took > 15*time.Second { // each that waits for the engine as long as it may takes 9 s
				t.Errorf("five calls took %v", took)
			}
		})
	}
}

// TestStatusNamesDockersContainersAndPods beside the owners, as far as anybody knows them.
func TestStatusNamesDockersContainersAndPods(t *testing.T) {
	const list = `[{"Names":["/web"],"NetworkSettings":{"Networks":{"azure":{"NetworkID":"x","IPAddress":"10.240.0.5"},"bridge":{"NetworkID":"y","IPAddress":"172.17.0.2"}}}},
		{"Names":["/odd"],"NetworkSettings":{"Networks":{"azure":{"NetworkID":"x","IPAddress":""},"none":null}}}]`
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	addr := netip.MustParseAddr
	got := serveAPI(t, map[string]string{"containers/json": list}).namesByAddress(ctx, []string{"gone", "x"})
	expect(t, "names", map[netip.Addr]string{addr("10.240.0.5"): "web"}, got)
	expect(t, "without an engine", map[netip.Addr]string{}, dockerd{socket: filepath.Join(t.TempDir(), "docker.sock")}.namesByAddress(ctx, []string{"x"}))
	start := time.Now()
	expect(t, "of an engine that hangs", map[netip.Addr]string{}, serveAPI(t, map[string]string{"containers/json": "hang"}).namesByAddress(ctx, []string{"x"}))
	if took := time.Since(start); took > nameTime+2*time.Second {
		t.Errorf("status waits %v for names", took)
	}

	r := report{Containers: got, Pool: pool.Status{Leases: map[netip.Addr]pool.Lease{
		addr("10.240.0.5"): {Owner: "docker/p"}, addr("10.240.0.6"): {Owner: "cni/azure/c/eth0", Pod: "shop/web-0"}, addr("10.240.0.7"): {Owner: "docker/p", Linkless: true},
	}}}
	var out strings.Builder
	r.printAddresses(&out)
	const want = `
ADDRESS	LENT TO	POD OR CONTAINER	LINK	BRIDGE	MAC	STATE	PUBLISHED
10.240.0.5	docker/p	web				not attached	
10.240.0.6	cni/azure/c/eth0	shop/web-0				not attached	
10.240.0.7	docker/p					kept	
`
	expect(t, "the table", want, out.String())
}

func TestThePluginsIDInItsEngine(t *testing.T) {
	id := strings.Repeat("0a", 32)
	line := "60 59 254:1 /var/lib/docker/plugins/" + id + "/propagated-mount /data rw,relatime shared:3 - ext4 /dev/root rw\n"
	for _, c := range []struct{ name, mountinfo, data, want string }{
		{"a managed plugin", "1 0 0:5 / / rw - overlay overlay rw\n" + line, "/data", id},
		{"another directory", line, "/var/lib/azure-vnet", ""},
		{"a directory of its own", "60 59 254:1 /srv/data /data rw - ext4 /dev/root rw\n", "/data", ""},
		{"no mounts", "", "/data", ""},
	} {
		if got := pluginID(parseMounts(c.mountinfo), c.data); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	expect(t, "where the host has its data", "$(docker info -f '{{.DockerRootDir}}')/plugins/"+id+"/propagated-mount", dockerd{plugin: id}.propagatedMount())
	expect(t, "where a plugin that no engine manages has its data", "", dockerd{}.propagatedMount())
}
