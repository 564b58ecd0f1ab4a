// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	current "github.com/containernetworking/cni/pkg/types/100"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// subject is a main plugin with its IPAM, as the specification looks at it: a
// program that is given an environment and a configuration.
type subject struct {
	name     string
	conf     string            // of the network, without name and version
	deviates map[string]string // musts that it is known not to meet, and why
	dir      string            // of its program; empty: with ours
	soak     bool              // much like another one, so that make soak alone has it
	n        test.Node
	t        testing.TB
}

// judge hears what is wrong with a subject. Of a must that it is known not to
// meet, that is what is wanted.
type judge struct {
	*testing.T
	known bool
	heard []string
}

func (j *judge) Errorf(format string, args ...any) {
	j.Helper()
	if !j.known {
		j.T.Errorf(format, args...)
	}
	j.heard = append(j.heard, fmt.Sprintf(format, args...))
}

func (j *judge) Error(args ...any) { j.Helper(); j.Errorf("%s", fmt.Sprint(args...)) }

func (j *judge) Fatalf(format string, args ...any) {
	j.Helper()
	j.Errorf(format, args...)
	runtime.Goexit()
}

func (j *judge) Fatal(args ...any) { j.Helper(); j.Fatalf("%s", fmt.Sprint(args...)) }

// try tests a subject to the end, whatever it does: others follow.
func (j *judge) try(test func(testing.TB, subject), s subject) {
	var all sync.WaitGroup
	all.Go(func() { test(j, s) }) // Fatalf ends this, and no more
	all.Wait()
}

// answer is what a call came to.
type answer struct {
	code   int
	stdout []byte
	failed struct { // error document
		CNIVersion string
		Code       uint
		Msg        string
	}
}

// call runs the plugin. more are keys of the configuration, env replaces variables.
func (s subject) call(verb, id, version string, more map[string]any, env ...string) answer {
	s.t.Helper()
	return s.raw(verb, id, test.Stdin(version, "conform", s.conf, more), env...)
}

func (s subject) raw(verb, id string, conf []byte, env ...string) (a answer) {
	s.t.Helper()
	var plugin struct{ Type string }
	if err := json.Unmarshal([]byte(s.conf), &plugin); err != nil {
		s.t.Fatal(err)
	}
	netns := "/run/netns/" + id
	if verb == "VERSION" || verb == "GC" || verb == "STATUS" {
		id, netns = "", ""
	}
	dir := cmp.Or(s.dir, s.n.Dir)
	env = append([]string{"CNI_PATH=" + dir + ":" + s.n.Dir}, env...)
	a.stdout, a.code, _ = s.n.Plugin(s.t.Context(), filepath.Join(dir, plugin.Type), conf, s.n.Environ(verb, id, netns, env...))
	if a.code != 0 {
		_ = json.Unmarshal(a.stdout, &a.failed) // what is no document has no code
	}
	return a
}

// documents counts the JSON documents in what a plugin wrote.
func documents(t testing.TB, out []byte) (count int) {
	t.Helper()
	for dec := json.NewDecoder(bytes.NewReader(out)); ; count++ {
		var doc map[string]any
		if err := dec.Decode(&doc); err == io.EOF {
			return count
		} else if err != nil {
			t.Errorf("no JSON: %v in %s", err, out)
			return count
		}
	}
}

// added is an ADD that succeeded: its result, and the same as the runtime hands it on.
func (s subject) added(id, version string) (*current.Result, map[string]any) {
	s.t.Helper()
	a := s.call("ADD", id, version, nil)
	if a.code != 0 {
		s.t.Fatalf("ADD: %s", a.stdout)
	}
	var r current.Result
	var prev map[string]any
	if err := json.Unmarshal(a.stdout, &r); err != nil {
		s.t.Fatal(err)
	}
	if err := json.Unmarshal(a.stdout, &prev); err != nil {
		s.t.Fatal(err)
	}
	return &r, map[string]any{"prevResult": prev}
}

// addresses in a container, with their masks.
func (s subject) addresses(id string) string {
	out, _ := s.n.Try("ip", "-n", id, "-4", "-br", "addr", "show", "eth0")
	return out
}

// lent are the addresses that azure-vnet-ipam or host-local hold for anyone.
func (s subject) lent() []string {
	s.t.Helper()
	local := s.n.Must("sh", "-c", "ls /run/cni-nets/conform 2>/dev/null | grep '^[0-9]' || true")
	return append(s.n.Holds().Leases, strings.Fields(local)...)
}

// musts are what the specification 1.1.0 demands of a main plugin.
var musts = []struct {
	name string
	test func(t testing.TB, s subject)
}{
	{"VERSION tells the versions, without a configuration", func(t testing.TB, s subject) {
		var v struct {
			CNIVersion        string
			SupportedVersions []string
		}
		a := s.raw("VERSION", "", nil)
		if err := json.Unmarshal(a.stdout, &v); err != nil || a.code != 0 || v.CNIVersion == "" || !slices.Contains(v.SupportedVersions, "1.1.0") {
			t.Errorf("%d %s", a.code, a.stdout)
		}
	}},
	{"ADD makes what its result says", func(t testing.TB, s subject) {
		r, _ := s.added("c1", "1.1.0")
		i := slices.IndexFunc(r.Interfaces, func(i *current.Interface) bool { return i.Name == "eth0" && i.Sandbox == "/run/netns/c1" })
		if i < 0 || len(r.IPs) == 0 || r.IPs[0].Interface == nil || *r.IPs[0].Interface != i || r.CNIVersion != "1.1.0" {
			t.Fatalf("%+v", r)
		}
		if link := s.n.Must("ip", "-n", "c1", "link", "show", "eth0"); !strings.Contains(link, r.Interfaces[i].Mac) || !strings.Contains(link, "UP") {
			t.Errorf("the MAC %s is not there, or the link is down: %s", r.Interfaces[i].Mac, link)
		}
		if has := s.addresses("c1"); !strings.Contains(has, r.IPs[0].Address.String()) {
			t.Errorf("the address %s is not there: %s", r.IPs[0].Address.String(), has)
		}
		routes := s.n.Must("ip", "-n", "c1", "route")
		for _, route := range r.Routes {
			if ones, _ := route.Dst.Mask.Size(); ones == 0 && !strings.Contains(routes, "default via") {
				t.Errorf("the default route is not there: %s", routes)
			}
		}
	}},
	{"ADD answers in the configuration's version", func(t testing.TB, s subject) {
		for _, v := range []string{"0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
			a := s.call("ADD", "c1", v, nil)
			var r struct{ CNIVersion string }
			if err := json.Unmarshal(a.stdout, &r); err != nil || a.code != 0 || r.CNIVersion != v {
				t.Errorf("%s: %s", v, a.stdout)
			}
			if a := s.call("DEL", "c1", v, nil); a.code != 0 {
				t.Errorf("%s: DEL: %s", v, a.stdout)
			}
		}
	}},
	{"ADD of an interface that is there is an error, and hurts nothing", func(t testing.TB, s subject) {
		s.added("c1", "1.1.0")
		before := s.addresses("c1")
		if a := s.call("ADD", "c1", "1.1.0", nil); a.code == 0 {
			t.Errorf("it succeeds: %s", a.stdout)
		}
		if after := s.addresses("c1"); after != before {
			t.Errorf("%q became %q", before, after)
		}
	}},
	{"ADD into a namespace that is not there is an error", func(t testing.TB, s subject) {
		if a := s.call("ADD", "c1", "1.1.0", nil, "CNI_NETNS=/run/netns/none"); a.code == 0 || a.failed.Code == 0 {
			t.Errorf("%d %s", a.code, a.stdout)
		}
	}},
	{"ADD that fails leaves nothing", func(t testing.TB, s subject) {
		s.added("c1", "1.1.0") // what the first ADD makes for all that follow
		s.call("DEL", "c1", "1.1.0", nil)
		s.n.Must("ip", "-n", "c1", "link", "add", "eth0", "type", "veth", "peer", "name", "eth9")
		links := func() string {
			return s.n.Must("sh", "-c", "ip -br link | cut -d' ' -f1 | sort; ip -n c1 -br addr | sort")
		}
		before := links()
		if a := s.call("ADD", "c1", "1.1.0", nil); a.code == 0 {
			t.Errorf("it succeeds: %s", a.stdout)
		}
		if after := links(); after != before {
			t.Errorf("links were\n%s\nand are\n%s", before, after)
		}
		if held := s.lent(); len(held) > 0 {
			t.Errorf("%s is held", held)
		}
	}},
	{"a container has as many interfaces as it is given", func(t testing.TB, s subject) {
		s.added("c1", "1.1.0")
		first := s.addresses("c1")
		a := s.call("ADD", "c1", "1.1.0", nil, "CNI_IFNAME=net1")
		if a.code != 0 || s.addresses("c1") != first || !strings.Contains(s.n.Must("ip", "-n", "c1", "-4", "-br", "addr", "show", "net1"), "10.") {
			t.Errorf("the second: %s", a.stdout)
		}
		if held := s.lent(); len(held) != 2 {
			t.Errorf("%s is held", held)
		}
		var prev map[string]any
		_ = json.Unmarshal(a.stdout, &prev)
		if a := s.call("CHECK", "c1", "1.1.0", map[string]any{"prevResult": prev}, "CNI_IFNAME=net1"); a.code != 0 {
			t.Errorf("CHECK of the second: %s", a.stdout)
		}
		if a := s.call("DEL", "c1", "1.1.0", nil, "CNI_IFNAME=net1"); a.code != 0 || s.addresses("c1") != first {
			t.Errorf("DEL of the second: %s, and the first has %q", a.stdout, s.addresses("c1"))
		}
		if held := s.lent(); len(held) != 1 {
			t.Errorf("after DEL %s is held", held)
		}
		s.call("DEL", "c1", "1.1.0", nil)
	}},
	{"DEL takes away what ADD made, and repeats", func(t testing.TB, s subject) {
		_, prev := s.added("c1", "1.1.0")
		for range 2 {
			if a := s.call("DEL", "c1", "1.1.0", prev); a.code != 0 {
				t.Errorf("%s", a.stdout)
			}
			if has := s.addresses("c1"); has != "" {
				t.Errorf("left: %s", has)
			}
		}
		s.added("c1", "1.1.0") // it is free for another
	}},
	{"DEL does without a namespace and without prevResult", func(t testing.TB, s subject) {
		s.added("c1", "1.1.0")
		s.n.Must("ip", "netns", "del", "c1")
		for _, netns := range []string{"", "/run/netns/c1"} {
			if a := s.call("DEL", "c1", "1.1.0", nil, "CNI_NETNS="+netns); a.code != 0 {
				t.Errorf("CNI_NETNS=%s: %s", netns, a.stdout)
			}
		}
	}},
	{"DEL of what was never added succeeds", func(t testing.TB, s subject) {
		if a := s.call("DEL", "never", "1.1.0", nil); a.code != 0 {
			t.Errorf("%s", a.stdout)
		}
	}},
	{"CHECK succeeds after ADD, and changes nothing", func(t testing.TB, s subject) {
		_, prev := s.added("c1", "1.1.0")
		before := s.addresses("c1")
		if a := s.call("CHECK", "c1", "1.1.0", prev); a.code != 0 || s.addresses("c1") != before {
			t.Errorf("%s", a.stdout)
		}
	}},
	{"CHECK fails without prevResult", func(t testing.TB, s subject) {
		s.added("c1", "1.1.0")
		if a := s.call("CHECK", "c1", "1.1.0", nil); a.code == 0 {
			t.Error("it succeeds")
		}
	}},
	{"CHECK fails when the interface is gone", func(t testing.TB, s subject) {
		_, prev := s.added("c1", "1.1.0")
		s.n.Must("ip", "-n", "c1", "link", "del", "eth0")
		if a := s.call("CHECK", "c1", "1.1.0", prev); a.code == 0 {
			t.Error("it succeeds")
		}
	}},
	{"CHECK fails when the address is gone, and does not mend it", func(t testing.TB, s subject) {
		_, prev := s.added("c1", "1.1.0")
		s.n.Must("ip", "-n", "c1", "addr", "flush", "dev", "eth0")
		if a := s.call("CHECK", "c1", "1.1.0", prev); a.code == 0 || strings.Contains(s.addresses("c1"), "10.") {
			t.Errorf("%d, and now %q", a.code, s.addresses("c1"))
		}
	}},
	{"CHECK fails when a route is gone, and does not mend it", func(t testing.TB, s subject) {
		_, prev := s.added("c1", "1.1.0")
		s.n.Must("ip", "-n", "c1", "route", "del", "default")
		if a := s.call("CHECK", "c1", "1.1.0", prev); a.code == 0 || strings.Contains(s.n.Must("ip", "-n", "c1", "route"), "default") {
			t.Errorf("%d, and now %q", a.code, s.n.Must("ip", "-n", "c1", "route"))
		}
	}},
	{"CHECK fails when the address is another", func(t testing.TB, s subject) {
		_, prev := s.added("c1", "1.1.0")
		s.n.Must("sh", "-c", "ip -n c1 addr flush dev eth0 && ip -n c1 addr add 10.240.200.200/16 dev eth0 && ip -n c1 route add default via 10.240.0.1")
		if a := s.call("CHECK", "c1", "1.1.0", prev); a.code == 0 {
			t.Error("it succeeds")
		}
	}},
	{"CHECK, GC and STATUS are refused in versions that have none", func(t testing.TB, s subject) {
		for verb, v := range map[string]string{"CHECK": "0.3.1", "GC": "1.0.0", "STATUS": "1.0.0"} {
			if a := s.call(verb, "c1", v, nil); a.code == 0 || a.failed.Code != 1 {
				t.Errorf("%s in %s: %d %s", verb, v, a.code, a.stdout)
			}
		}
	}},
	{"GC keeps what is listed and frees the rest", func(t testing.TB, s subject) {
		s.added("c1", "1.1.0")
		r2, _ := s.added("c2", "1.1.0")
		s.n.Must("ip", "netns", "del", "c2") // c2 is gone, and nobody told
		if a := s.call("GC", "", "1.1.0", map[string]any{"cni.dev/valid-attachments": []any{map[string]string{"containerID": "c1", "ifname": "eth0"}}}); a.code != 0 {
			t.Fatalf("%s", a.stdout)
		}
		if !strings.Contains(s.addresses("c1"), "10.") {
			t.Error("c1 lost its address")
		}
		if held := s.lent(); slices.Contains(held, r2.IPs[0].Address.IP.String()) {
			t.Errorf("the address of c2 is still held: %s", held)
		}
	}},
	{"STATUS succeeds when ADD would", func(t testing.TB, s subject) {
		if a := s.call("STATUS", "", "1.1.0", nil); a.code != 0 {
			t.Errorf("%s", a.stdout)
		}
	}},
	{"an error is one document with a code, and the exit status tells", func(t testing.TB, s subject) {
		good := test.Stdin("1.1.0", "conform", s.conf, nil)
		for _, bad := range []struct {
			name, verb string
			conf       []byte
			env        string
			code       uint // 0: any
		}{
			{"an unknown verb", "SING", good, "", 4},
			{"no container id", "ADD", good, "CNI_CONTAINERID=", 4},
			{"a container id that is a path", "ADD", good, "CNI_CONTAINERID=../../etc/passwd", 4},
			{"no interface name", "ADD", good, "CNI_IFNAME=", 4},
			{"an interface name that is a path", "ADD", good, "CNI_IFNAME=../x", 4},
			{"an interface name of 40 letters", "ADD", good, "CNI_IFNAME=" + strings.Repeat("x", 40), 4},
			{"no namespace", "ADD", good, "CNI_NETNS=", 4},
			{"no path", "ADD", good, "CNI_PATH=", 4},
			{"an empty configuration", "ADD", nil, "", 6},
			{"a configuration that is no JSON", "ADD", []byte("{nope"), "", 6},
			{"a configuration that is null", "ADD", []byte("null"), "", 7},
			{"no name", "ADD", test.Stdin("1.1.0", "", s.conf, nil), "", 7},
			{"a name that is a path", "ADD", test.Stdin("1.1.0", "../../x", s.conf, nil), "", 7},
			{"a version to come", "ADD", test.Stdin("7.0.0", "conform", s.conf, nil), "", 1},
			{"a version that is none", "ADD", test.Stdin("new", "conform", s.conf, nil), "", 0},
		} {
			env := []string{}
			if bad.env != "" {
				env = append(env, bad.env)
			}
			a := s.raw(bad.verb, "c1", bad.conf, env...)
			if a.code == 0 || documents(t, a.stdout) != 1 || a.failed.Msg == "" || a.failed.Code == 0 || bad.code != 0 && a.failed.Code != bad.code {
				t.Errorf("%s: exit %d, %s; code %d is wanted", bad.name, a.code, a.stdout, bad.code)
			}
		}
	}},
	{"a call without a verb is an error", func(t testing.TB, s subject) {
		if a := s.call("", "c1", "1.1.0", nil); a.code == 0 || a.failed.Code != 4 {
			t.Errorf("%d %s", a.code, a.stdout)
		}
	}},
	{"an error says its version", func(t testing.TB, s subject) {
		for _, v := range []string{"0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
			for _, bad := range [][2]string{{"SING", ""}, {"ADD", "CNI_NETNS=/run/netns/none"}, {"ADD", "CNI_CONTAINERID=a/b"}, {"DEL", "CNI_IFNAME="}} {
				if a := s.call(bad[0], "c1", v, nil, bad[1]); a.failed.CNIVersion != v {
					t.Errorf("%s in %s with %s: %s", bad[0], v, bad[1], a.stdout)
				}
			}
		}
	}},
}

// TestConformance runs the table on ours and, as controls, on the reference
// plugins: a must that they fail too would be a mistake of the table.
//
// It takes any other main plugin too: CNI_CONFORMANCE is its configuration without
// name and version, CNI_PATH where its program lies, and its addresses come from
// azure-vnet-ipam, or from host-local with the dataDir /run/cni-nets:
//
//	CNI_PATH=/opt/cni/bin CNI_CONFORMANCE='{"type":"macvlan","master":"eth0","ipam":{"type":"azure-vnet-ipam"}}' go test -run TestConformance ./test/cni
func TestConformance(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 30})
	n := test.OnNode(vms[0])
	// Beyond what the pool lends first.
	local := fmt.Sprintf(`"ipam":{"type":"host-local","dataDir":"/run/cni-nets","ranges":[[{"subnet":"10.240.0.0/16","rangeStart":%q,"rangeEnd":%q}]],"routes":[{"dst":"0.0.0.0/0"},{"dst":"10.99.0.0/16"}]}`,
		n.Secondaries()[20], n.Secondaries()[29])
	azureIPAM := `"ipam":{"type":"azure-vnet-ipam"}`
	const gc, verb, version, second = "GC keeps what is listed and frees the rest", "a call without a verb is an error", "an error says its version", "a container has as many interfaces as it is given"
	overLocal := map[string]string{gc: "host-local has no GC"}
	reference := map[string]string{
		gc: "it has no GC", verb: "skel prints what the plugin is, and succeeds", version: "skel's errors have no cniVersion",
	}
	ptp := maps.Clone(reference)
	ptp[second] = "its route to the gateway is there already, where both are in one subnet"
	subjects := []subject{
		{name: "azure-vnet", conf: `{"type":"azure-vnet",` + azureIPAM + `}`},
		{name: "azure-vnet without a bridge", conf: `{"type":"azure-vnet","mode":"transparent",` + azureIPAM + `}`},
		{name: "azure-vnet over host-local", soak: true, conf: `{"type":"azure-vnet",` + local + `}`, deviates: overLocal},
		{name: "bridge over azure-vnet-ipam", conf: `{"type":"bridge","bridge":"cni0",` + azureIPAM + `}`, deviates: reference},
		{name: "ptp over azure-vnet-ipam", soak: true, conf: `{"type":"ptp",` + azureIPAM + `}`, deviates: ptp},
		{name: "bridge", soak: true, conf: `{"type":"bridge","bridge":"cni1",` + local + `}`, deviates: reference},
		{name: "ptp", soak: true, conf: `{"type":"ptp",` + local + `}`, deviates: ptp},
	}
	if conf := os.Getenv("CNI_CONFORMANCE"); conf != "" {
		subjects = []subject{{name: "CNI_CONFORMANCE", conf: conf, dir: os.Getenv("CNI_PATH")}}
	}
	for _, s := range subjects {
		t.Run(s.name, func(t *testing.T) {
			if s.soak && !test.Soaking {
				t.Skip("one much like it runs: make soak")
			}
			for _, must := range musts {
				t.Run(must.name, func(t *testing.T) {
					s, j := s, &judge{T: t}
					s.t, s.n = j, n.In(t)
					s.n.Netns("c1", "c2")
					why, known := s.deviates[must.name]
					j.known = known
					j.try(must.test, s)
					if known && len(j.heard) == 0 {
						t.Errorf("it is met after all, though %s", why)
					}
					s.n.Must("sh", "-c", "for c in c1 c2; do ip netns del $c 2>/dev/null; done; true")
					for _, id := range []string{"c1", "c2", "never"} {
						s.call("DEL", id, "1.1.0", nil, "CNI_NETNS=")
					}
					if strings.Contains(s.conf, "azure-vnet") && strings.Contains(s.conf, azureIPAM) {
						if held := s.n.Holds(); len(held.Leases) > 0 {
							t.Errorf("%+v is left", held)
						}
					}
				})
			}
		})
	}
	test.NothingDropped(t, vnet)
}
