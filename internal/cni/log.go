// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"time"
)

// levels are the values of the key logLevel. A line below the level is not written.
var levels = map[string]slog.Level{
	"": slog.LevelInfo, "debug": slog.LevelDebug, "info": slog.LevelInfo, "warning": slog.LevelWarn, "error": slog.LevelError,
}

// checkLogKeys checks the keys logLevel and logTarget.
func (f *file) checkLogKeys() error {
	if _, ok := levels[strings.ToLower(f.LogLevel)]; !ok {
		return fmt.Errorf("logLevel %.40q is none of error, warning, info, debug", f.LogLevel)
	}
	switch f.LogTarget {
	case "", "logfile", "syslog", "stderr":
		return nil
	}
	return fmt.Errorf("logTarget %.40q is none of logfile, syslog, stderr", f.LogTarget)
}

// log writes the call's line. If the log cannot be written, the call does not fail.
func (c *Call) log(start time.Time, err error) {
	var f struct{ LogLevel, LogTarget string }
	_ = json.Unmarshal(c.Stdin, &f) // a key that cannot be read has its default
	level, attrs := slog.LevelInfo, []any{"verb", c.Verb}
	for _, about := range [][2]string{{"network", c.Conf.Network}, {"container", c.ContainerID}, {"ifname", c.IfName}, {"netns", c.Netns}, {"pod", c.Pod}} {
		if about[1] != "" {
			attrs = append(attrs, about[0], about[1])
		}
	}
	attrs = append(attrs, c.notes...)
	attrs = append(attrs, "took", time.Since(start).Round(10*time.Microsecond).String())
	switch {
	case err != nil:
		e := c.toError(err)
		level, attrs = slog.LevelError, append(attrs, "code", e.Code, "error", e.Error())
	case c.warned():
		level = slog.LevelWarn
	case c.Verb == "STATUS" || c.Verb == "VERSION": // runtimes call these every 5 s
		level = slog.LevelDebug
	}
	least, ok := levels[strings.ToLower(f.LogLevel)]
	if !ok {
		least = slog.LevelInfo
	}
	if level < least {
		return
	}
	if least == slog.LevelDebug {
		attrs = append(attrs, "configuration", string(c.Stdin))
	}
	var line bytes.Buffer
	slog.New(slog.NewTextHandler(&line, &slog.HandlerOptions{Level: slog.LevelDebug})).Log(context.Background(), level, c.plugin.Name, attrs...)
	// A DEL that found nothing may repeat an earlier line, as a failure may: kubelet sends one after each failed ADD.
	mayRepeat := err != nil || c.Verb == "DEL" && len(c.notes) == 0
	writeLine(f.LogTarget, level, c.plugin.Name, line.String(), mayRepeat)
}

// Warn adds text to the call's line in the log, and raises the line's level to warning.
func (c *Call) Warn(text string) { c.Note("warning", text) }

// warned reports whether Warn was called.
func (c *Call) warned() bool {
	for i := 0; i < len(c.notes); i += 2 {
		if c.notes[i] == "warning" {
			return true
		}
	}
	return false
}
