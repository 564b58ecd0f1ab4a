// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"log/slog"
	"log/syslog"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// boundedLog is a file that many processes append lines to.
type boundedLog struct {
	path string
	most int64 // bytes; a file of this size is renamed to path.1, and replaces the file that had this name
}

var (
	logFile = boundedLog{"/var/log/azure-vnet.log", 4 << 20}
	toldLog = boundedLog{StateDir + "/told.log", 256 << 10} // counts the repeats of failures that went to syslog, where a line cannot be changed
)

// writeLine writes a line to the target that the configuration names. If the line may repeat an earlier one, the repeats
// are counted: see countRepeat. Of lines that repeat each other, syslog gets the first, the second, the fourth, the
// eighth and so on, with the count. On stderr nothing is counted, because the runtime takes what a call writes there,
// and no later call sees it.
func writeLine(target string, level slog.Level, plugin, line string, mayRepeat bool) {
	switch target {
	case "stderr":
		_, _ = os.Stderr.WriteString(line)
	case "syslog":
		if mayRepeat {
			now := time.Now()
			times := max(toldLog.appendLine(line, now, true), 1)
			if times&(times-1) != 0 {
				return
			}
			line = strings.TrimSuffix(line, "\n") + countEnd(now, times)
		}
		if w, err := syslog.New(syslog.LOG_DAEMON|severity(level), plugin); err == nil {
			_, _ = w.Write([]byte(line))
			_ = w.Close()
		}
	default:
		logFile.appendLine(line, time.Now(), mayRepeat)
	}
}

// severity returns the level as syslog has it.
func severity(l slog.Level) syslog.Priority {
	switch {
	case l >= slog.LevelError:
		return syslog.LOG_ERR
	case l >= slog.LevelWarn:
		return syslog.LOG_WARNING
	}
	return syslog.LOG_INFO
}

// appendLine appends a line with a single write, so that lines of several processes do not mix. If the line repeats an
// earlier one, appendLine appends nothing, and the count in the earlier line grows. If a new line fills the file,
// appendLine moves the file aside.
//
// times is how often such a line came in a row, 1 for the first. If the file's lock cannot be had within 100 ms, the line
// begins a row of its own, and times is 1 too. times is 0 if mayRepeat is false, or if the line could not be written.
func (l boundedLog) appendLine(line string, now time.Time, mayRepeat bool) (times int) {
	mode := os.O_WRONLY
	if mayRepeat {
		mode = os.O_RDWR
	}
	f, err := os.OpenFile(l.path, mode|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o640)
	if err != nil {
		return 0
	}
	defer f.Close()
	if mayRepeat {
		if lockLog(f) { // without the lock, two processes could each begin the same row
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

// lockLog takes the lock on the file. It waits 100 ms at most, because a call must not wait long for its log.
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
