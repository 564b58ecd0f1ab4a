// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// inNewLog has the calls of this test log to a new file, and returns what reads it without times.
func inNewLog(t *testing.T) (read func() []string) {
	t.Helper()
	before := logFile
	t.Cleanup(func() { logFile = before })
	logFile = boundedLog{filepath.Join(t.TempDir(), "azure-vnet.log"), before.most}
	clock := regexp.MustCompile(`(time|last|took)=\S+ ?`)
	return func() (lines []string) {
		text, err := os.ReadFile(logFile.path)
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		for line := range strings.Lines(clock.ReplaceAllString(string(text), "")) {
			lines = append(lines, strings.TrimRight(line, " \n"))
		}
		return lines
	}
}

// ended is a call of network azure for a pod that ended with err.
func ended(verb, pod, id string, err error) {
	c := &Call{plugin: Plugin{Name: "azure-vnet"}, Verb: verb, ContainerID: id, IfName: "eth0", Pod: pod, Conf: Conf{Network: "azure"}}
	c.log(time.Now(), err)
}

// full is how an ADD fails, with what differs from try to try.
func full(id string, cooling int) error {
	return fmt.Errorf("lease for cni/azure/%s/eth0: no free address: NIC 00:0d:3a:04:75:98 has 6 ipconfigs: 1 the NIC's own, %d held, %d cooling", id, 5-cooling, cooling)
}

// TestIdenticalFailuresAreOneLine, with the count, as kubelet repeats them: with new
// container ids, a DEL after each, and other pods in between.
func TestIdenticalFailuresAreOneLine(t *testing.T) {
	read := inNewLog(t)
	for i := range 300 {
		for _, pod := range []string{"shop/web", "shop/db"} {
			id := fmt.Sprintf("%s%060x", pod[5:7], i)
			ended("ADD", pod, id, full(id, i%3))
			ended("DEL", pod, id, nil)
		}
		if i == 1 {
			ended("ADD", "shop/other", "0123", nil)
		}
	}
	first := func(pod string) string { return fmt.Sprintf("%s%060x", pod[5:7], 0) }
	line := func(pod string) (lines []string) {
		return []string{
			fmt.Sprintf("level=ERROR msg=azure-vnet verb=ADD network=azure container=%s ifname=eth0 pod=%s code=999 error=%q times=300", first(pod), pod, full(first(pod), 0)),
			fmt.Sprintf("level=INFO msg=azure-vnet verb=DEL network=azure container=%s ifname=eth0 pod=%s times=300", first(pod), pod),
		}
	}
	want := append(line("shop/web"), line("shop/db")...)
	want = append(want, "level=INFO msg=azure-vnet verb=ADD network=azure container=0123 ifname=eth0 pod=shop/other")
	if diff := cmp.Diff(want, read()); diff != "" {
		t.Error(diff)
	}
}

// TestWhatIsNoRepeatHasALineOfItsOwn, for it is news.
func TestWhatIsNoRepeatHasALineOfItsOwn(t *testing.T) {
	for _, tt := range []struct {
		name string
		then func()
		want int // lines
	}{
		{"the same", func() { ended("ADD", "shop/web", "c2", full("c2", 0)) }, 1},
		{"another error", func() { ended("ADD", "shop/web", "c2", errors.New("the host agent refuses")) }, 2},
		{"another pod", func() { ended("ADD", "shop/db", "c2", full("c2", 0)) }, 2},
		{"another verb", func() { ended("CHECK", "shop/web", "c2", full("c2", 0)) }, 2},
		{"the same after it worked", func() {
			ended("ADD", "shop/web", "c2", nil)
			ended("ADD", "shop/web", "c3", full("c3", 0))
		}, 3},
		{"the same after a while", func() {
			logFile.appendLine("time=x level=ERROR msg=azure-vnet verb=ADD network=azure container=c2 ifname=eth0 pod=shop/web code=999 error=\""+full("c2", 0).Error()+"\"\n",
				time.Now().Add(rowGap+time.Second), true)
		}, 2},
		{"two containers of no pod", func() {
			ended("ADD", "", "c2", full("c2", 0))
			ended("ADD", "", "c3", full("c3", 0))
		}, 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			read := inNewLog(t)
			ended("ADD", "shop/web", "c1", full("c1", 0))
			tt.then()
			if lines := read(); len(lines) != tt.want {
				t.Errorf("%d lines:\n%s", len(lines), strings.Join(lines, "\n"))
			}
		})
	}
}

// TestFailuresThatComeAtOnceAreCounted, by many processes: none is lost, and no line is torn.
func TestFailuresThatComeAtOnceAreCounted(t *testing.T) {
	read := inNewLog(t)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 50 {
				ended("STATUS", "", "", errors.New("no NIC"))
				ended("ADD", "shop/web", "c1", nil)
			}
		})
	}
	all.Wait()
	counted, plain := 0, 0
	for _, line := range read() {
		var times int
		if _, after, ok := strings.Cut(line, "times="); ok {
			fmt.Sscan(after, &times)
			counted += times
		} else if strings.HasSuffix(line, "pod=shop/web") {
			plain++
		} else {
			t.Errorf("a torn line: %q", line)
		}
	}
	if counted != 400 || plain != 400 {
		t.Errorf("%d failures are counted, and %d calls have a line", counted, plain)
	}
}

func TestTheLogIsBoundedAndWhole(t *testing.T) {
	log := boundedLog{filepath.Join(t.TempDir(), "azure-vnet.log"), logFile.most}
	path, line := log.path, []byte(strings.Repeat("x", 1023)+"\n")
	most := int(log.most) + 64*len(line) // 8 writers, each a few lines late
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range int(log.most) / len(line) {
				log.appendLine(string(line), time.Now(), false)
			}
		})
	}
	all.Wait()
	for _, name := range []string{path, path + ".1"} {
		text, err := os.ReadFile(name)
		if err != nil && name == path {
			continue // just moved aside
		}
		if err != nil || len(text) > most || len(text)%len(line) != 0 {
			t.Errorf("%s has %d bytes: %v", name, len(text), err)
		}
		for l := range bytes.Lines(text) {
			if !bytes.Equal(l, line) {
				t.Fatalf("a torn line: %q", l)
			}
		}
	}
}
