// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/sirupsen/logrus"
)

func TestSettings(t *testing.T) {
	plain := settings{level: logrus.InfoLevel, source: "auto", coolDown: 30 * time.Second}
	with := func(change func(*settings)) settings {
		s := plain
		change(&s)
		return s
	}
	for _, c := range []struct {
		name string
		env  map[string]string
		want settings
		err  string
	}{
		{"nothing set", nil, plain, ""},
		{"all set", map[string]string{"LOG_LEVEL": "debug", "SOURCE": "imds", "QUERY_URL": "http://10.0.0.1/x", "COOL_DOWN": "1m", "RECLAIM": "on"},
			settings{logrus.DebugLevel, "imds", "http://10.0.0.1/x", time.Minute, true}, ""},
		{"any case", map[string]string{"LOG_LEVEL": "WARNING", "SOURCE": "WireServer", "RECLAIM": "OFF"},
			with(func(s *settings) { s.level, s.source = logrus.WarnLevel, "wireserver" }), ""},
		{"a file of the host", map[string]string{"SOURCE": "/run/azure-vnet/../interfaces.json"},
			with(func(s *settings) { s.source = "/host/run/interfaces.json" }), ""},
		{"no cool-down", map[string]string{"COOL_DOWN": "0"}, with(func(s *settings) { s.coolDown = -1 }), ""},

		{"an unknown level", map[string]string{"LOG_LEVEL": "loud"}, plain, "LOG_LEVEL=loud (allowed: error, warning, info or debug)"},
		{"an unknown source", map[string]string{"SOURCE": "azure"}, plain, "SOURCE=azure (allowed: auto, wireserver, imds, or a file under /run, which is all that the plugin sees of the host)"},
		{"a file that is not seen", map[string]string{"SOURCE": "/run/../etc/shadow"}, plain, "SOURCE=/run/../etc/shadow (allowed: auto, wireserver, imds, or a file under /run"},
		{"a path that is none", map[string]string{"SOURCE": "run/interfaces.json"}, plain, "SOURCE=run/interfaces.json (allowed: auto"},
		{"no URL", map[string]string{"QUERY_URL": "168.63.129.16"}, plain, "QUERY_URL=168.63.129.16 (allowed: a URL that begins with http://)"},
		{"a URL beside a file", map[string]string{"SOURCE": "/run/x.json", "QUERY_URL": "http://10.0.0.1/"},
			with(func(s *settings) { s.source = "/host/run/x.json" }), "QUERY_URL=http://10.0.0.1/ (allowed: nothing beside a SOURCE that is a file, which has no query URL)"},
		{"no time", map[string]string{"COOL_DOWN": "30"}, plain, "COOL_DOWN=30 (allowed: a time such as 30s, from 0s to 1h)"},
		{"a negative time", map[string]string{"COOL_DOWN": "-1s"}, plain, "COOL_DOWN=-1s (allowed: a time such as 30s, from 0s to 1h)"},
		{"neither on nor off", map[string]string{"RECLAIM": "yes"}, plain, "RECLAIM=yes (allowed: on or off)"},
		{"several, and one that is right", map[string]string{"LOG_LEVEL": "loud", "SOURCE": "imds", "QUERY_URL": "x", "RECLAIM": "yes"},
			with(func(s *settings) { s.source = "imds" }), "LOG_LEVEL=loud (allowed: error, warning, info or debug), QUERY_URL=x (allowed: a URL that begins with http://), RECLAIM=yes (allowed: on or off). " +
				"Until they are right, no network is made and no container starts: docker plugin disable -f azure-vnet:latest && " +
				"docker plugin set azure-vnet:latest LOG_LEVEL=info QUERY_URL= RECLAIM=off && docker plugin enable azure-vnet:latest"},
	} {
		t.Run(c.name, func(t *testing.T) {
			env := maps.Clone(c.env)
			got, err := readSettings(func(key string) string { return env[key] }, "/host/run")
			if text := errorText(err); !strings.Contains(text, c.err) || (text == "") != (c.err == "") {
				t.Errorf("error %q, want %q", text, c.err)
			}
			if diff := cmp.Diff(c.want, got, cmp.AllowUnexported(settings{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// A plugin with a wrong setting listens. It refuses every call that begins a network or an endpoint, and
// says why. It serves all calls for networks and endpoints that were begun before.
func TestAWrongSettingIsTheAnswerToWhatBegins(t *testing.T) {
	newVM(t, 2)
	data := t.TempDir()
	e := startPlugin(t, data)
	pool := e.createNetwork(netID, nil)
	addr, _, err := e.run(pool, endpointID(1))
	if err != nil {
		t.Fatal(err)
	}
	e.end()
	t.Setenv("COOL_DOWN", "soon")
	e = startPlugin(t, data)
	newClients(t) // an engine takes the drivers
	const why = "wrong settings of the plugin: COOL_DOWN=soon (allowed: a time such as 30s"
	begin := []string{"IpamDriver.RequestPool", "IpamDriver.RequestAddress", "NetworkDriver.AllocateNetwork", "NetworkDriver.CreateNetwork", "NetworkDriver.CreateEndpoint"}
	for name := range methods(nil, nil) {
		if _, answer := e.post(name, ""); strings.Contains(answer, why) != slices.Contains(begin, name) {
			t.Errorf("%s: %s", name, answer)
		}
	}
	if _, _, err := e.run(pool, endpointID(2)); err == nil || !strings.Contains(err.Error(), why) {
		t.Errorf("a container starts: %v", err)
	}
	if !strings.Contains(e.log.String(), why) {
		t.Error("the log does not say it")
	}
	if r := readReport(t.Context(), e.places); len(r.Pool.Leases) != 1 || !strings.Contains(strings.Join(r.Errors, " "), why) {
		t.Errorf("status: %+v, %v", r.Pool.Leases, r.Errors)
	}
	e.remove(pool, endpointID(1), addr)
	expect(t, "links", []string{}, endpoints(t))
	if r := readReport(t.Context(), e.places); len(r.Pool.Leases) != 0 {
		t.Errorf("leases: %+v", r.Pool.Leases)
	}
}
