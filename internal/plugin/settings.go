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

	"azurevnet/internal/statefile"
)

// settings are what docker plugin set may change. They come in the environment.
type settings struct {
	level    logrus.Level
	source   string        // auto, wireserver, imds, or a file's path as this process sees it
	queryURL string        // empty: the source's own
	coolDown time.Duration // how long a released address rests; negative: not at all
	reclaim  bool
}

// defaultSettings has the keys and defaults of config.json, in the order in which errors name them.
var defaultSettings = []struct{ key, value string }{
	{"LOG_LEVEL", "info"}, {"SOURCE", "auto"}, {"QUERY_URL", ""}, {"COOL_DOWN", "30s"}, {"RECLAIM", "off"},
}

// hostRun is the directory on the host that has all files of the host that the plugin may read.
const hostRun = "/run"

// readSettings reads the settings from the environment. run is the host's /run as this process sees it. The error names
// all settings that are wrong. Each of them has its default in the result.
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

// parse reads the value of one key. For a wrong value it returns which values are allowed.
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

// parseSource reads the value of SOURCE: a name, or the path of a file under /run on the host. It returns the file's
// path as this process sees it. For a wrong value it returns which values are allowed.
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

// settingsFile is the file to which a plugin that starts writes its settings. status may run in another container,
// without these settings, and must ask the same source.
func settingsFile(run string) string { return filepath.Join(run, "azure-vnet", "plugin.json") }

// writeSettings writes the settings as they came in the environment.
func writeSettings(getenv func(string) string, run string) error {
	env := map[string]string{}
	for _, d := range defaultSettings {
		env[d.key] = getenv(d.key)
	}
	text, err := json.Marshal(env)
	if err == nil {
		err = statefile.Replace(settingsFile(run), text, 0o600)
	}
	if err != nil {
		return fmt.Errorf("leave the settings for status: %w", err)
	}
	return nil
}

// readLastSettings reads the settings of the plugin that started last. They are the defaults if no plugin has run since
// the boot.
func readLastSettings(run string) (settings, error) {
	env := map[string]string{}
	if text, err := os.ReadFile(settingsFile(run)); err == nil {
		_ = json.Unmarshal(text, &env) // if somebody damaged the file, the defaults hold
	}
	return readSettings(func(key string) string { return env[key] }, run)
}
