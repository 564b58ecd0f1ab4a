// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"io"
	"maps"
	"os"
	"path/filepath"
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

		{"an unknown level", map[string]string{"LOG_LEVEL": "loud"}, plain, "LOG_LEVEL=loud: error, warning, info or debug"},
		{"an unknown source", map[string]string{"SOURCE": "azure"}, plain, "SOURCE=azure: auto, wireserver, imds, or a file under /run"},
		{"a file that is not seen", map[string]string{"SOURCE": "/run/../etc/shadow"}, plain,
			"SOURCE=/run/../etc/shadow: a source file must lie under /run, which is all that the plugin sees of the host"},
		{"no URL", map[string]string{"QUERY_URL": "168.63.129.16"}, plain, "QUERY_URL=168.63.129.16: a URL that begins with http://"},
		{"no time", map[string]string{"COOL_DOWN": "30"}, plain, "COOL_DOWN=30: a time such as 30s, from 0s to 1h"},
		{"a negative time", map[string]string{"COOL_DOWN": "-1s"}, plain, "COOL_DOWN=-1s: a time such as 30s, from 0s to 1h"},
		{"neither on nor off", map[string]string{"RECLAIM": "yes"}, plain, "RECLAIM=yes: on or off"},
	} {
		t.Run(c.name, func(t *testing.T) {
			env := maps.Clone(c.env)
			got, err := readSettings(func(key string) string { return env[key] }, "/host/run")
			if text := errorText(err); text != c.err {
				t.Errorf("error %q, want %q", text, c.err)
			}
			if diff := cmp.Diff(c.want, got, cmp.AllowUnexported(settings{})); c.err == "" && diff != "" {
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

// Settings that are right one by one and not together end the plugin before it listens.
func TestSettingsThatDoNotGoTogether(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("SOURCE", filepath.Join(dir, "interfaces.json"))
	t.Setenv("QUERY_URL", "http://10.0.0.1/")
	p := places{run: "/run", data: dir, socket: filepath.Join(dir, "azure-vnet.sock")}
	if err := serve(t.Context(), p, io.Discard); err == nil || !strings.Contains(err.Error(), "is a file, which has no query URL") {
		t.Errorf("it ends with: %v", err)
	}
	if _, err := os.Stat(p.socket); err == nil {
		t.Error("it listened")
	}
}
