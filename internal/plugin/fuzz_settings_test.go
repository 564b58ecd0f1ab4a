// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// FuzzSettings reads any settings. Accepted settings are within bounds, and status reads them back unchanged. Of what
// is refused, the error names each setting, and the command in the error makes all of them right.
func FuzzSettings(f *testing.F) {
	f.Add("", "", "", "", "")
	f.Add("debug", "imds", "http://10.0.0.1/x", "1m", "on")
	f.Add("WARNING", "/run/azure-vnet/../interfaces.json", "", "0", "OFF")
	f.Add("loud", "/run/../etc/shadow", "ftp://x", "-1s", "yes")
	f.Add("info", "/run/x", "http://10.0.0.1/", "1h0m1s", "")
	f.Add(" info\n", "/run//a/./b ", "http://", "9223372036854775807ns", "docker plugin set azure-vnet:latest X=1 &&")
	run := f.TempDir()
	if err := os.MkdirAll(filepath.Dir(settingsFile(run)), 0o755); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, level, source, queryURL, coolDown, reclaim string) {
		env := map[string]string{"LOG_LEVEL": level, "SOURCE": source, "QUERY_URL": queryURL, "COOL_DOWN": coolDown, "RECLAIM": reclaim}
		getenv := func(key string) string { return env[key] }
		s, err := readSettings(getenv, run)
		checkSettings(t, s, run)
		if utf8.ValidString(level + source + queryURL + coolDown + reclaim) { // as all is that docker plugin set can say
			if err := writeSettings(getenv, run); err != nil {
				t.Fatal(err)
			}
			left, leftErr := readLastSettings(run)
			if left != s || (err == nil) != (leftErr == nil) {
				t.Errorf("status reads %+v, %v, and the plugin read %+v, %v", left, leftErr, s, err)
			}
		}
		if err == nil {
			return
		}
		text := err.Error()
		command := text[strings.LastIndex(text, "docker plugin set azure-vnet:latest ")+len("docker plugin set azure-vnet:latest "):]
		command, _, _ = strings.Cut(command, " &&")
		for word := range strings.FieldsSeq(command) {
			key, value, _ := strings.Cut(word, "=")
			if !strings.Contains(text, key+"=") {
				t.Errorf("%s is not named in %q", key, text)
			}
			env[key] = value
		}
		if mended, err := readSettings(getenv, run); err != nil || mended != s {
			t.Errorf("after %q: %+v, %v; before %+v", command, mended, err, s)
		}
	})
}

func checkSettings(t *testing.T, s settings, run string) {
	t.Helper()
	switch s.source {
	case "auto", "wireserver", "imds":
	default:
		if below, ok := strings.CutPrefix(s.source, run+"/"); !ok || below == "" || filepath.Clean(s.source) != s.source || s.queryURL != "" {
			t.Errorf("source %q with the query URL %q", s.source, s.queryURL)
		}
	}
	if s.coolDown != -1 && (s.coolDown <= 0 || s.coolDown > time.Hour) {
		t.Errorf("cool-down %v", s.coolDown)
	}
	if u, err := url.Parse(s.queryURL); s.queryURL != "" && (err != nil || u.Scheme != "http" || u.Host == "") {
		t.Errorf("query URL %q", s.queryURL)
	}
}

// FuzzLeftFiles has any plugin.json and any data.json, which somebody edited. status then speaks of settings within
// bounds, and of a directory that a mount shows.
func FuzzLeftFiles(f *testing.F) {
	f.Add([]byte(`{"SOURCE":"imds","COOL_DOWN":"1m"}`), []byte(`{"device":"8:1","dir":"/srv"}`))
	f.Add([]byte(`{"SOURCE":"/run/\u0000","COOL_DOWN":7}`), []byte(`{"device":"","dir":"/../.."}`))
	f.Add([]byte(`{"SOURCE":"imds"`), []byte(`[]`))
	f.Add(make([]byte, 40), []byte("null"))
	run := f.TempDir()
	if err := os.MkdirAll(filepath.Dir(settingsFile(run)), 0o755); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, plugin, data []byte) {
		for path, body := range map[string][]byte{settingsFile(run): plugin, placeFile(run): data} {
			if err := os.WriteFile(path, body, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		s, _ := readLastSettings(run)
		checkSettings(t, s, run)
		if dir, err := findData(places{run: run}); err == nil && !filepath.IsAbs(dir) {
			t.Errorf("networks.json is in %q", dir)
		}
	})
}
