// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"bytes"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"azurevnet/driver"
)

// FuzzEngine has the engine answer anything about its networks and its containers. A list of networks counts only if it
// is whole, and then all its ids are read: so no network is forgotten because of a list that cannot be read. A name is
// one that the engine told.
func FuzzEngine(f *testing.F) {
	const networks = `[{"Name":"none","Id":"n"},{"Name":"host","Id":"h"},{"Name":"azure","Id":"` + netID + `"}]`
	f.Add([]byte(networks), []byte(listing()["containers/json"]))
	f.Add([]byte(networks), []byte(`[{"Names":["/web","/a/web"],"NetworkSettings":{"Networks":{"azure":{"NetworkID":"`+netID+`","IPAddress":"10.240.0.5","EndpointID":"`+endpointID(1)+`"},"gone":null}}},{"Names":null,"NetworkSettings":null}]`))
	f.Add([]byte(`[{"Name":"azure","Id":"x"}]`), []byte(`[null]`))
	f.Add([]byte(`[{"Name":"none"},{"Name":"host"},{}]`), []byte(`[{"Names":[""],"NetworkSettings":{}}]`))
	f.Add([]byte(`{"message":"starting"}`), []byte(`{"message":"starting"}`))
	f.Add([]byte(`null`), []byte(``))
	f.Add([]byte(networks[:len(networks)-1]), []byte(`[`))

	var told [2]atomic.Pointer[[]byte] // networks, containers
	e := dockerd{socket: filepath.Join(f.TempDir(), "docker.sock"), plugin: strings.Repeat("a", 64)}
	l, err := net.Listen("unix", e.socket)
	if err != nil {
		f.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.41")
		w.Header().Set("Content-Type", "application/json")
		answer := []byte("{}")
		switch dir, name := path.Split(r.URL.Path); {
		case name == "networks":
			answer = *told[0].Load()
		case strings.HasSuffix(dir, "/containers/"):
			answer = *told[1].Load()
		}
		w.Write(answer)
	})}
	go srv.Serve(l)
	f.Cleanup(func() { srv.Close() })
	known := f.TempDir()
	if err := os.WriteFile(driver.NetworksFile(known), []byte(`{"version":1,"networks":{"`+netID+`":{"mac":"`+nicMAC+`"}}}`), 0o600); err != nil {
		f.Fatal(err)
	}

	f.Fuzz(func(t *testing.T, networks, containers []byte) {
		told[0].Store(&networks)
		told[1].Store(&containers)
		r := &reconciler{networks: driver.New(driver.Config{Dir: known})}
		if forgotten, err := r.compareNetworksOnce(t.Context(), e); len(forgotten) > 0 {
			t.Errorf("one list without them forgets %q, %v", forgotten, err)
		}
		ids, err := e.listNetworks(t.Context())
		if (err == nil) != (ids != nil) {
			t.Errorf("%q is the list %v: %v", networks, ids, err)
		}
		var listed []struct{ Name, ID string }
		_ = json.NewDecoder(bytes.NewReader(networks)).Decode(&listed)
		var names []string
		for _, n := range listed {
			if names = append(names, n.Name); err == nil && !ids[n.ID] {
				t.Errorf("network %q of %q is not in the list", n.ID, networks)
			}
		}
		if err == nil && !(slices.Contains(names, "none") && slices.Contains(names, "host")) {
			t.Errorf("%q counts as a whole list", networks)
		}
		var running []struct{ Names []string }
		_ = json.NewDecoder(bytes.NewReader(containers)).Decode(&running)
		first := map[string]bool{}
		for _, c := range running {
			if len(c.Names) > 0 {
				first[strings.TrimPrefix(c.Names[0], "/")] = true
			}
		}
		for addr, name := range e.namesByAddress(t.Context(), []string{netID}) {
			if !addr.IsValid() || !first[name] {
				t.Errorf("%s is called %q by %q", addr, name, containers)
			}
		}
		if name, _, err := e.Container(t.Context(), endpointID(1)); err == nil && !first[name] {
			t.Errorf("the endpoint is of %q by %q", name, containers)
		}
		if name, err := e.Network(t.Context(), netID); err == nil && !slices.Contains(names, name) {
			t.Errorf("the network is %q by %q", name, networks)
		}
	})
}
