// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
)

// settings are what docker plugin set may change; they come in the environment.
type settings struct {
	level    logrus.Level
	source   string        // auto, wireserver, imds, or a file's path as this process sees it
	queryURL string        // empty: the source's own
	coolDown time.Duration // negative: none
	reclaim  bool
}

// defaultSettings are those of config.json, in the order in which they are told.
var defaultSettings = []struct{ key, value string }{
	{"LOG_LEVEL", "info"}, {"SOURCE", "auto"}, {"QUERY_URL", ""}, {"COOL_DOWN", "30s"}, {"RECLAIM", "off"},
}

// hostRun is where the host's files that the plugin may read lie, on the host.
const hostRun = "/run"

// readSettings reads the environment. run is the host's /run as this process sees it.
// The error names all settings that are wrong. Their defaults are returned in their place.
func readSettings(getenv func(string) string, run string) (settings, error) {
	s := settings{level: logrus.InfoLevel, source: "auto", coolDown: 30 * time.Second}
	var wrong, mended []string
	for _, d := range defaultSettings {
		value := strings.TrimSpace(getenv(d.key))
		if value == "" {
			continue
		}
		if allowed := s.parse(d.key, value, run); allowed != "" {
			wrong = append(wrong, fmt.Sprintf("%s=%.200s (allowed: %s)", d.key, value, allowed))
			mended = append(mended, d.key+"="+d.value)
		}
	}
	if wrong == nil {
		return s, nil
	}
	return s, fmt.Errorf("wrong settings of the plugin: %s. Until they are right, no network is made and no container starts: "+
		"docker plugin disable -f azure-vnet:latest && docker plugin set azure-vnet:latest %s && docker plugin enable azure-vnet:latest",
		strings.Join(wrong, ", "), strings.Join(mended, " "))
}

// parse changes one setting, or says what is allowed in the place of a wrong value.
func (s *settings) parse(key, value, run string) (allowed string) {
	switch key {
	case "LOG_LEVEL":
		level, known := map[string]logrus.Level{
			"error": logrus.ErrorLevel, "warning": logrus.WarnLevel, "info": logrus.InfoLevel, "debug": logrus.DebugLevel,
		}[strings.ToLower(value)]
		if !known {
			return "error, warning, info or debug"
		}
		s.level = level
	case "SOURCE":
		source, allowed := parseSource(value, run)
		if allowed != "" {
			return allowed
		}
		s.source = source
	case "QUERY_URL":
		if filepath.IsAbs(s.source) {
			return "nothing beside a SOURCE that is a file, which has no query URL"
		}
		if u, err := url.Parse(value); err != nil || u.Scheme != "http" || u.Host == "" {
			return "a URL that begins with http://"
		}
		s.queryURL = value
	case "COOL_DOWN":
		rest, err := time.ParseDuration(value)
		if err != nil || rest < 0 || rest > time.Hour {
			return "a time such as 30s, from 0s to 1h"
		}
		if s.coolDown = rest; rest == 0 {
			s.coolDown = -1
		}
	case "RECLAIM":
		on, known := map[string]bool{"on": true, "off": false}[strings.ToLower(value)]
		if !known {
			return "on or off"
		}
		s.reclaim = on
	}
	return ""
}

// parseSource takes a name, or the host's path of a file under /run, which is all that the
// plugin sees of the host. Of another value it says what is allowed.
func parseSource(value, run string) (name, allowed string) {
	switch lower := strings.ToLower(value); lower {
	case "auto", "wireserver", "imds":
		return lower, ""
	}
	below, ok := strings.CutPrefix(filepath.Clean(value), hostRun+"/")
	if !ok {
		return "", "auto, wireserver, imds, or a file under " + hostRun + ", which is all that the plugin sees of the host"
	}
	return filepath.Join(run, below), ""
}

// settingsFile is where a running plugin leaves its settings for status, which
// may be another process in another container, and must ask the same source.
func settingsFile(run string) string { return filepath.Join(run, "azure-vnet", "plugin.json") }

// writeSettings writes the settings as they came.
func writeSettings(getenv func(string) string, run string) error {
	env := map[string]string{}
	for _, d := range defaultSettings {
		env[d.key] = getenv(d.key)
	}
	text, err := json.Marshal(env)
	if err == nil {
		err = leave(settingsFile(run), text)
	}
	if err != nil {
		return fmt.Errorf("leave the settings for status: %w", err)
	}
	return nil
}

// readLastSettings reads them; the defaults if no plugin has run since the boot.
func readLastSettings(run string) (settings, error) {
	env := map[string]string{}
	if text, err := os.ReadFile(settingsFile(run)); err == nil {
		_ = json.Unmarshal(text, &env) // only an edit by hand tears it: then the defaults hold
	}
	return readSettings(func(key string) string { return env[key] }, run)
}
