// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"compress/gzip"
	"crypto/sha256"
	"encoding/base32"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// engineCall is one recorded call of an engine: see testdata/README.md.
type engineCall struct {
	Situation, Step, Method string
	Request                 map[string]any // nil: an empty body
	Answer                  map[string]any
	Error                   string // empty: the call succeeded
}

// recordedOf reads all calls of an engine, by situation.
func recordedOf(t *testing.T, engine string) map[string][]engineCall {
	t.Helper()
	file, err := os.Open(filepath.Join("testdata", "engine-"+engine+".jsonl.gz"))
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
		r.T.Fatal(err)
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
	r.T.Helper()
	request := r.translate(c)
	what := fmt.Sprintf("%.40s: %s", c.Step, c.Method)
	if c.Method == "NetworkDriver.RevokeExternalConnectivity" {
		r.revoke(r.endpoints[request["EndpointID"].(string)])
	}
	answer, refusal, err := r.post(c.Method, request)
	number, _, _ := strings.Cut(c.Step, ":")
	switch reason := differences[strings.Join([]string{r.engine, r.scope, number, c.Method}, "/")]; {
	case err != nil:
		r.T.Fatalf("%s: %v", what, err)
	case (refusal == "") != (c.Error == "") && reason == "":
		r.T.Fatalf("%s: the error is %q and was %q; request %v", what, refusal, c.Error, request)
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
		r.programmed(r.endpoints[id], request)
	case "Leave":
		r.left(r.endpoints[id])
	case "DeleteEndpoint":
		r.endpoints[id].gone = true
	}
}

// compare says that an answer is the recorded one, but for what differs from one run
// to the next: those parts are looked at one by one.
func (r *engineReplay) compare(what string, c engineCall, request, answer map[string]any) {
	r.T.Helper()
	recorded := withoutZeros(c.Answer).(map[string]any)
	given, _ := withoutZeros(answer).(map[string]any)
	same := func(m map[string]any, key string) { // from here on
		m[key] = "as it has to be"
	}
	fail := func(why string) { r.T.Errorf("%s: %s: the answer is %v and was %v", what, why, answer, c.Answer) }
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
		// The recorded plugin published what came with CreateEndpoint, whatever the container's gateway was.
		ep := r.endpoints[request["EndpointID"].(string)]
		value, _ := given["Value"].(map[string]any)
		text, _ := value["ports"].(string)
		switch {
		case ep == nil:
		case ep.programmed && len(ep.ports) > 0:
			if n := strings.Count(text, "->"); n != len(ep.ports) {
				fail(fmt.Sprintf("%d ports are told of %d", n, len(ep.ports)))
			}
			r.toldPortsReached(ep, text)
		case text != "":
			fail("ports are told, and the container's gateway is another network")
		}
		delete(recorded, "Value")
		delete(given, "Value")
	}
	if diff := cmp.Diff(recorded, given); diff != "" {
		r.T.Errorf("%s: the answer (- recorded, + given):\n%s", what, diff)
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
	r.T.Helper()
	in := request["Interface"].(map[string]any)
	ep := &endpoint{id: request["EndpointID"].(string), step: c.Step, internal: r.internal[request["NetworkID"].(string)]}
	ep.addr = netip.MustParsePrefix(in["Address"].(string)).Addr()
	if ep.mac = in["MacAddress"].(string); ep.mac == "" {
		ep.mac = answer["Interface"].(map[string]any)["MacAddress"].(string)
	}
	ep.ports = r.portMap(request)
	r.endpoints[ep.id] = ep
}

// portMap is what a call tells of published ports.
func (r *engineReplay) portMap(request map[string]any) (ports []publishedPort) {
	r.T.Helper()
	options, _ := request["Options"].(map[string]any)
	text, err := json.Marshal(options["com.docker.network.portmap"])
	if err == nil {
		err = json.Unmarshal(text, &ports)
	}
	if err != nil {
		r.T.Fatal(err)
	}
	return ports
}
