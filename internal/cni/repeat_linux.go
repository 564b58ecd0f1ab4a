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

	"azurevnet/internal/failure"
)

// A runtime repeats calls that fail. kubelet repeats an ADD every 12 s, each time with a new container id and with a DEL
// after it. A runtime may repeat STATUS ten times a second. So that the log does not fill with the same failure, a
// repeat changes the first line of its row instead of adding one. A row is the lines of one failure that would stand in
// the log one after the other.
//
// The first line ends in "last=" and "times=". Both have a constant length, and a repeat overwrites them in place. So
// the log needs no other file for the count, every line is whole if a process dies, and a program that follows the log
// keeps its place in it.

const (
	rowGap   = 10 * time.Minute      // a failure that comes this long after the last repeat begins a new row
	lookBack = 256 << 10             // bytes at the end of the log in which the first line of a row is sought: enough for some 400 pods that fail at once
	lastTime = "2006-01-02T15:04:05" // in local time, as the time of the line is
)

// countEnd returns the end of a line that may be repeated.
func countEnd(last time.Time, times int) string {
	return fmt.Sprintf(" last=%s times=%-7d\n", last.Format(lastTime), min(times, 9999999))
}

// countRepeat finds the first line of the row that line belongs to, and counts up in it. It returns how often the failure
// came in this row, and 0 if line repeats no line. The caller holds the log's lock.
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
		start := bytes.LastIndexByte(rest[:len(rest)-1], '\n') + 1
		before := string(rest[start:])
		rest = rest[:start]
		if !strings.Contains(before, mine.of) { // cheaper than to parse the line
			continue
		}
		if earlier := outcomeOf(before); earlier.call != mine.call || earlier.of != mine.of {
			continue
		} else if earlier != mine {
			return 0 // the same call has ended in another way since then
		}
		said := parseLine(before)
		last, err := time.ParseInLocation(lastTime, said["last"], time.Local)
		times, bad := strconv.Atoi(said["times"])
		written := countEnd(last, times)
		if err != nil || bad != nil || now.Sub(last) > rowGap || !strings.HasSuffix(before, written) {
			return 0
		}
		times++
		if !writeOver(f, countEnd(now, times), begin+int64(start+len(before)-len(written))) {
			return 0
		}
		return times
	}
	return 0
}

// writeOver writes in the middle of a file that is open for appending. The kernel ignores the offset of a write to such
// a file, so writeOver takes O_APPEND away while it writes.
func writeOver(f *os.File, text string, offset int64) bool {
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFL, 0); err != nil {
		return false
	}
	if info, err := f.Stat(); err != nil || info.Size() < offset+int64(len(text)) {
		return false // somebody emptied the file meanwhile, and a write beyond its end would fill the gap with zeros
	}
	n, err := unix.Pwrite(int(f.Fd()), []byte(text), offset)
	_, back := unix.FcntlInt(f.Fd(), unix.F_SETFL, unix.O_APPEND)
	return err == nil && back == nil && n == len(text)
}

// outcome is what the lines of one row have in common.
type outcome struct {
	call string // plugin, verb, network and interface
	of   string // the pod, whose container has a new id at each try; without a pod the container
	what string // level, code and the Reason of the error
}

// outcomeOf reads a line's outcome.
func outcomeOf(line string) outcome {
	said := parseLine(line)
	text := said["error"]
	if id := said["container"]; id != "" {
		text = strings.ReplaceAll(text, id, "#") // an id may have no digit
	}
	return outcome{
		call: strings.Join([]string{said["msg"], said["verb"], said["network"], said["ifname"]}, " "),
		of:   cmp.Or(said["pod"], said["container"]),
		what: strings.Join([]string{said["level"], said["code"], failure.Reason(text)}, " "),
	}
}

// parseLine reads the keys and values of a line that slog wrote.
func parseLine(line string) map[string]string {
	said := map[string]string{}
	for rest := strings.TrimSpace(line); rest != ""; rest = strings.TrimLeft(rest, " ") {
		key, value, _ := strings.Cut(rest, "=")
		if quoted, err := strconv.QuotedPrefix(value); err == nil {
			rest = value[len(quoted):]
			value, _ = strconv.Unquote(quoted) // QuotedPrefix has checked it
		} else {
			value, rest, _ = strings.Cut(value, " ")
		}
		said[key] = value
	}
	return said
}
