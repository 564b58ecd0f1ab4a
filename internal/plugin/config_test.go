// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"azurevnet/driver"
	"azurevnet/ipamdriver"
	"bytes"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// pluginConfig is what an engine reads of config.json. It says nothing of keys
// that it does not know, so the test does.
type pluginConfig struct {
	Description, Documentation string
	Entrypoint                 []string
	Workdir                    string
	Interface                  struct {
		Types  []string
		Socket string
	}
	Network         struct{ Type string }
	Linux           struct{ Capabilities []string }
	PropagatedMount string
	Mounts          []struct {
		Name, Description, Source, Destination, Type string
		Options, Settable                            []string
	}
	Env []struct {
		Name, Description, Value string
		Settable                 []string
	}
}

func TestConfigJSON(t *testing.T) {
	raw, err := os.ReadFile("../../config.json")
	if err != nil {
		t.Fatal(err)
	}
	var c pluginConfig
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(&c); err != nil {
		t.Fatalf("config.json: %v", err)
	}
	if diff := cmp.Diff([]string{"docker.networkdriver/1.0", "docker.ipamdriver/1.0"}, c.Interface.Types); diff != "" {
		t.Errorf("interface types:\n%s", diff)
	}
	if c.Interface.Socket != "azure-vnet.sock" || c.Network.Type != "host" {
		t.Errorf("socket %q, network %q", c.Interface.Socket, c.Network.Type)
	}
	if diff := cmp.Diff([]string{"CAP_NET_ADMIN"}, c.Linux.Capabilities); diff != "" {
		t.Errorf("capabilities: each more is a reason to be given in docs/design.md:\n%s", diff)
	}
	// What does not exist on every host at boot makes the engine disable the plugin for good.
	always := []string{"/run", "/proc/sys/net"}
	for _, m := range c.Mounts {
		if m.Type != "bind" || !slices.Contains(always, m.Source) || m.Description == "" {
			t.Errorf("mount %s: a bind of one of %v, with a description", m.Name, always)
		}
		if !slices.Contains(c.Entrypoint, m.Destination) {
			t.Errorf("mount %s: the entrypoint does not tell of %s", m.Name, m.Destination)
		}
	}
	if !slices.Contains(c.Entrypoint, c.PropagatedMount) {
		t.Errorf("the entrypoint does not tell of %s", c.PropagatedMount)
	}
	env := map[string]string{}
	for _, e := range c.Env {
		if e.Description == "" {
			t.Errorf("%s has no description", e.Name)
		}
		for _, s := range e.Settable {
			if s != "value" {
				t.Errorf("%s: settable %q", e.Name, s)
			}
		}
		env[e.Name] = e.Value
	}
	if _, err := readSettings(func(key string) string { return env[key] }, "/host/run"); err != nil {
		t.Errorf("the defaults: %v", err)
	}
	for _, d := range defaultSettings {
		expect(t, "the default of "+d.key, d.value, env[d.key])
	}
}

func TestReadmeNamesEverySetting(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range defaultSettings {
		if !strings.Contains(string(readme), "`"+d.key+"`") {
			t.Errorf("README.md does not tell of %s", d.key)
		}
	}
}

// TestBothDriversNameOwnersAlike: the NetworkDriver ends leases that the IpamDriver made, and knows them by their owners.
func TestBothDriversNameOwnersAlike(t *testing.T) {
	if driver.OwnerPrefix != ipamdriver.OwnerPrefix {
		t.Errorf("%q and %q", driver.OwnerPrefix, ipamdriver.OwnerPrefix)
	}
}
