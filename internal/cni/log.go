// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"log/syslog"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	logFile = "/var/log/azure-vnet.log"
	logMost = 4 << 20 // bytes; then it becomes logFile.1, in the place of the one before
)

var levels = map[string]slog.Level{
	"": slog.LevelInfo, "debug": slog.LevelDebug, "info": slog.LevelInfo, "warning": slog.LevelWarn, "error": slog.LevelError,
}

// logs checks what the configuration says of the log.
func (f *file) logs() error {
	if _, ok := levels[strings.ToLower(f.LogLevel)]; !ok {
		return fmt.Errorf("logLevel %.40q is none of error, warning, info, debug", f.LogLevel)
	}
	switch f.LogTarget {
	case "", "logfile", "syslog", "stderr":
		return nil
	}
	return fmt.Errorf("logTarget %.40q is none of logfile, syslog, stderr", f.LogTarget)
}

// log writes the call's line. A log that cannot be written fails no call.
func (c *Call) log(p Plugin, start time.Time, err error) {
	var f struct{ LogLevel, LogTarget string }
	_ = json.Unmarshal(c.Stdin, &f) // what cannot be read is logged as by default
	level, attrs := slog.LevelInfo, []any{"verb", c.Verb}
	say := func(key, value string) {
		if value != "" {
			attrs = append(attrs, key, value)
		}
	}
	say("network", c.Conf.Network)
	say("container", c.ContainerID)
	say("ifname", c.IfName)
	say("netns", c.Netns)
	say("pod", c.Pod)
	attrs = append(attrs, c.notes...)
	attrs = append(attrs, "took", time.Since(start).Round(10*time.Microsecond).String())
	switch {
	case err != nil:
		e := c.toError(err)
		level, attrs = slog.LevelError, append(attrs, "code", e.Code, "error", e.Error())
	case c.warned():
		level = slog.LevelWarn
	case c.Verb == "STATUS" || c.Verb == "VERSION": // each 5 s, for ever
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
	slog.New(slog.NewTextHandler(&line, &slog.HandlerOptions{Level: slog.LevelDebug})).Log(context.Background(), level, p.Name, attrs...)
	switch f.LogTarget {
	case "stderr":
		_, _ = os.Stderr.Write(line.Bytes())
	case "syslog":
		if w, err := syslog.New(syslog.LOG_DAEMON|severity(level), p.Name); err == nil {
			_, _ = w.Write(line.Bytes())
			_ = w.Close()
		}
	default:
		appendLog(logFile, line.Bytes())
	}
}

// Warn has the call's line say text, as a warning.
func (c *Call) Warn(text string) { c.Note("warning", text) }

func (c *Call) warned() bool {
	for i := 0; i < len(c.notes); i += 2 {
		if c.notes[i] == "warning" {
			return true
		}
	}
	return false
}

func severity(l slog.Level) syslog.Priority {
	switch {
	case l >= slog.LevelError:
		return syslog.LOG_ERR
	case l >= slog.LevelWarn:
		return syslog.LOG_WARNING
	}
	return syslog.LOG_INFO
}

// appendLog adds a line to a file that many processes write: one write each, which
// the kernel puts at the end. Who finds the file full has it moved aside.
func appendLog(path string, line []byte) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o640)
	if err != nil {
		return
	}
	defer f.Close()
	if _, err := f.Write(line); err != nil {
		return
	}
	if mine, err := f.Stat(); err == nil && mine.Size() >= logMost {
		moveAside(path, f, mine)
	}
}

// moveAside renames the full log once, whoever else tries: the lock is on the file
// itself, and who comes after finds another file in its place. The rest wait until
// it is moved, else they would fill it further meanwhile; 100 ms at most, since a
// log holds no call up.
func moveAside(path string, f *os.File, mine os.FileInfo) {
	for range 100 {
		locked := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
		if there, err := os.Stat(path); err != nil || !os.SameFile(mine, there) {
			return
		}
		if locked {
			_ = os.Rename(path, path+".1")
			return
		}
		time.Sleep(time.Millisecond)
	}
}
