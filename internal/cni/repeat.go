// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"azurevnet/internal/upkeep"
)

// A runtime repeats calls that fail. kubelet repeats an ADD every 12 s, each time with a new
// container id and with a DEL after it. A runtime may repeat STATUS ten times a second. Each call
// is a process of its own, so the log itself keeps the count. The line of the first failure ends in
// "last=" and "times=". They have a constant length, and a repeat overwrites them. If a process dies,
// all lines are whole all the same. A program that follows the log keeps its place in it.

const (
	rowGap   = 10 * time.Minute      // a failure that comes later begins a new row: it is news again
	lookBack = 256 << 10             // bytes at the end of the log, where the row's line must be: some 400 pods that fail at once
	lastTime = "2006-01-02T15:04:05" // local, as the line's time is
)

// countEnd ends the line of a failure that may be repeated.
func countEnd(last time.Time, times int) string {
	return fmt.Sprintf(" last=%s times=%-7d\n", last.Format(lastTime), min(times, 9999999))
}

// countRepeat finds the line of the failure that line repeats, and counts up in it. It returns
// how often the failure came in this row: 0 if line repeats none. The caller holds the log's lock.
func countRepeat(f *os.File, line string, now time.Time) int {
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return 0
	}
	end := make([]byte, min(info.Size(), lookBack))
	begin := info.Size() - int64(len(end))
	if _, err := f.ReadAt(end, begin); err != nil {
		return 0
	}
	mine := outcomeOf(line)
	for rest := end; len(rest) > 0; {
		at := bytes.LastIndexByte(rest[:len(rest)-1], '\n') + 1
		before := string(rest[at:])
		rest = rest[:at]
		if !strings.Contains(before, mine.of) { // cheaper than to parse the line
			continue
		}
		if earlier := outcomeOf(before); earlier.call != mine.call || earlier.of != mine.of {
			continue
		} else if earlier != mine {
			return 0 // the same call has ended in another way since
		}
		said := fieldsOf(before)
		last, err := time.ParseInLocation(lastTime, said["last"], time.Local)
		times, bad := strconv.Atoi(said["times"])
		written := countEnd(last, times)
		if err != nil || bad != nil || now.Sub(last) > rowGap || !strings.HasSuffix(before, written) {
			return 0
		}
		times++
		if !writeOver(f, countEnd(now, times), begin+int64(at+len(before)-len(written))) {
			return 0
		}
		return times
	}
	return 0
}

// writeOver writes in the middle of a file that is open for appending. The kernel ignores the
// offset of a write to such a file. So writeOver takes O_APPEND away while it writes.
func writeOver(f *os.File, text string, offset int64) bool {
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFL, 0); err != nil {
		return false
	}
	if info, err := f.Stat(); err != nil || info.Size() < offset+int64(len(text)) {
		return false // somebody emptied it meanwhile, and a write beyond its end would fill it with zeros
	}
	n, err := unix.Pwrite(int(f.Fd()), []byte(text), offset)
	_, back := unix.FcntlInt(f.Fd(), unix.F_SETFL, unix.O_APPEND)
	return err == nil && back == nil && n == len(text)
}

// outcome is what a line of the log has in common with those of the call's repeats.
type outcome struct {
	call string // plugin, verb, network and interface
	of   string // pod, whose container has a new id each time; else container
	what string // level, code and error, without what varies
}

func outcomeOf(line string) outcome {
	said := fieldsOf(line)
	failure := said["error"]
	if id := said["container"]; id != "" {
		failure = strings.ReplaceAll(failure, id, "#")
	}
	return outcome{
		call: strings.Join([]string{said["msg"], said["verb"], said["network"], said["ifname"]}, " "),
		of:   cmp.Or(said["pod"], said["container"]),
		what: strings.Join([]string{said["level"], said["code"], upkeep.Reason(failure)}, " "),
	}
}

// fieldsOf reads a line as slog writes it.
func fieldsOf(line string) map[string]string {
	said := map[string]string{}
	for rest := strings.TrimSpace(line); rest != ""; rest = strings.TrimLeft(rest, " ") {
		key, value, _ := strings.Cut(rest, "=")
		if quoted, err := strconv.QuotedPrefix(value); err == nil {
			rest = value[len(quoted):]
			value, _ = strconv.Unquote(quoted) // which QuotedPrefix has looked at
		} else {
			value, rest, _ = strings.Cut(value, " ")
		}
		said[key] = value
	}
	return said
}
