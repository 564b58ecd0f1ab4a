// Copyright (c) The azure-vnet authors. MIT licence.

package main

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

var settingKeys = []string{"LOG_LEVEL", "SOURCE", "QUERY_URL", "COOL_DOWN", "RECLAIM"}

// hostRun is where the host's files that the plugin may read lie, on the host.
const hostRun = "/run"

// readSettings reads the environment. run is the host's /run as this process sees it.
func readSettings(getenv func(string) string, run string) (settings, error) {
	s := settings{level: logrus.InfoLevel, source: "auto", coolDown: 30 * time.Second}
	for _, key := range settingKeys {
		value := strings.TrimSpace(getenv(key))
		if value == "" {
			continue
		}
		if err := s.set(key, value, run); err != nil {
			return s, fmt.Errorf("%s=%.200s: %w", key, value, err)
		}
	}
	return s, nil
}

func (s *settings) set(key, value, run string) (err error) {
	switch key {
	case "LOG_LEVEL":
		switch lower := strings.ToLower(value); lower {
		case "error", "warning", "info", "debug":
			s.level, err = logrus.ParseLevel(lower)
		default:
			err = fmt.Errorf("error, warning, info or debug")
		}
	case "SOURCE":
		s.source, err = source(value, run)
	case "QUERY_URL":
		if u, bad := url.Parse(value); bad != nil || u.Scheme != "http" || u.Host == "" {
			return fmt.Errorf("a URL that begins with http://")
		}
		s.queryURL = value
	case "COOL_DOWN":
		if s.coolDown, err = time.ParseDuration(value); err != nil || s.coolDown < 0 || s.coolDown > time.Hour {
			return fmt.Errorf("a time such as 30s, from 0s to 1h")
		}
		if s.coolDown == 0 {
			s.coolDown = -1
		}
	case "RECLAIM":
		switch strings.ToLower(value) {
		case "on":
			s.reclaim = true
		case "off":
			s.reclaim = false
		default:
			err = fmt.Errorf("on or off")
		}
	}
	return err
}

// source takes a name, or the host's path of a file under /run: that is what the
// plugin sees of the host.
func source(value, run string) (string, error) {
	switch lower := strings.ToLower(value); lower {
	case "auto", "wireserver", "imds":
		return lower, nil
	}
	if !filepath.IsAbs(value) {
		return "", fmt.Errorf("auto, wireserver, imds, or a file under %s", hostRun)
	}
	clean := filepath.Clean(value)
	if run == hostRun {
		return clean, nil // not in a container: any file is seen
	}
	below, ok := strings.CutPrefix(clean, hostRun+"/")
	if !ok {
		return "", fmt.Errorf("a source file must lie under %s, which is all that the plugin sees of the host", hostRun)
	}
	return filepath.Join(run, below), nil
}

// settingsFile is where a running plugin leaves its settings for status, which
// may be another process in another container, and must ask the same source.
func settingsFile(run string) string { return filepath.Join(run, "azure-vnet", "plugin.json") }

// leaveSettings writes the settings as they came.
func leaveSettings(getenv func(string) string, run string) error {
	env := map[string]string{}
	for _, key := range settingKeys {
		env[key] = getenv(key)
	}
	text, err := json.Marshal(env)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(settingsFile(run)), 0o755)
	}
	if err == nil {
		err = os.WriteFile(settingsFile(run)+".tmp", text, 0o600)
	}
	if err == nil {
		err = os.Rename(settingsFile(run)+".tmp", settingsFile(run))
	}
	if err != nil {
		return fmt.Errorf("leave the settings for status: %w", err)
	}
	return nil
}

// leftSettings reads them; the defaults if no plugin has run since the boot.
func leftSettings(run string) (settings, error) {
	env := map[string]string{}
	if text, err := os.ReadFile(settingsFile(run)); err == nil {
		_ = json.Unmarshal(text, &env) // torn only by hand: the defaults then
	}
	return readSettings(func(key string) string { return env[key] }, run)
}
