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

// boundedLog is a file that many processes add lines to.
type boundedLog struct {
	path string
	most int64 // bytes; then it becomes path.1, in the place of the one before
}

var (
	logFile = boundedLog{"/var/log/azure-vnet.log", 4 << 20}
	toldLog = boundedLog{stateDir + "/told.log", 256 << 10} // failures that went to syslog: their repeats are counted here, since a line in syslog cannot be changed
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
	// A DEL that found nothing is counted like a failure: one follows each failed ADD.
	repeats := err != nil || c.Verb == "DEL" && len(c.notes) == 0
	c.write(f.LogTarget, level, p.Name, line.String(), repeats)
}

// write writes the line. If the line may repeat an earlier one, the repeats are counted: see countRepeat. Syslog gets
// the first line of a row, the second, the fourth, the eighth and so on, with the count. On stderr nothing is counted,
// because the runtime takes what a call writes there, and no later call sees it.
func (c *Call) write(target string, level slog.Level, name, line string, repeats bool) {
	switch target {
	case "stderr":
		_, _ = os.Stderr.WriteString(line)
	case "syslog":
		if repeats {
			now := time.Now()
			times := max(toldLog.add(line, now, true), 1)
			if times&(times-1) != 0 {
				return
			}
			line = strings.TrimSuffix(line, "\n") + countEnd(now, times)
		}
		if w, err := syslog.New(syslog.LOG_DAEMON|severity(level), name); err == nil {
			_, _ = w.Write([]byte(line))
			_ = w.Close()
		}
	default:
		logFile.add(line, time.Now(), repeats)
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

// add adds a line with one write, which the kernel puts at the end of the file. A line that repeats an earlier one is
// not added: the count in the earlier line grows. If a new line fills the file, add moves the file aside.
//
// times is how often such a line came in a row. It is 1 for the first line. It is 1 too if add does not get the lock
// within 100 ms: the line then begins a row of its own. It is 0 if the line cannot repeat another, or could not be
// written. Failures can repeat, and DELs that find nothing.
func (l boundedLog) add(line string, now time.Time, repeats bool) (times int) {
	mode := os.O_WRONLY
	if repeats {
		mode = os.O_RDWR
	}
	f, err := os.OpenFile(l.path, mode|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o640)
	if err != nil {
		return 0
	}
	defer f.Close()
	if repeats {
		if lockLog(f) { // else two processes may begin one row
			if times := countRepeat(f, line, now); times > 0 {
				return times
			}
		}
		line, times = strings.TrimSuffix(line, "\n")+countEnd(now, 1), 1
	}
	if _, err := f.WriteString(line); err != nil {
		return 0
	}
	if mine, err := f.Stat(); err == nil && mine.Size() >= l.most {
		l.moveAside(f, mine)
	}
	return times
}

// lockLog waits for the lock on the file, 100 ms at most: a call must not wait long for its log.
func lockLog(f *os.File) bool {
	for range 100 {
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			return true
		}
		time.Sleep(time.Millisecond)
	}
	return false
}

// moveAside renames the full log. Only one process renames it, even if several try: the lock is on the file itself, and
// a process that gets the lock later finds another file in its place. The others wait until the file is moved, 100 ms at
// most, because they would fill the old file further meanwhile.
func (l boundedLog) moveAside(f *os.File, mine os.FileInfo) {
	for range 100 {
		locked := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
		if there, err := os.Stat(l.path); err != nil || !os.SameFile(mine, there) {
			return
		}
		if locked {
			_ = os.Rename(l.path, l.path+".1")
			return
		}
		time.Sleep(time.Millisecond)
	}
}
