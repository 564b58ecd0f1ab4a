// Copyright (c) The azure-vnet authors. MIT licence.

package statefile

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

type shelf struct {
	Version int             `json:"version"`
	Count   int             `json:"count,omitempty"`
	Books   map[string]book `json:"books,omitempty"`
	Order   []book          `json:"order,omitempty"`
}

type book struct {
	Title string `json:"title"`
	Lent  bool   `json:"lent,omitempty"`
}

func (s *shelf) Check() error {
	if s.Version > 1 {
		return fmt.Errorf("version %d is not known", s.Version)
	}
	return nil
}

// at is a file with this content in a fresh directory.
func at(t testing.TB, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "shelf.json")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func fileText(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func TestAMissingFileIsTheZeroValueAndIsMade(t *testing.T) {
	path := filepath.Join(t.TempDir(), "not", "yet", "shelf.json")
	if s, err := Read[shelf](path); err != nil || !cmp.Equal(s, shelf{}) {
		t.Fatalf("read %+v, %v", s, err)
	}
	for _, update := range []func(context.Context, string, string, func(*shelf) error) error{Update[shelf], UpdateDurably[shelf]} {
		if err := update(t.Context(), path, "test", func(s *shelf) error { s.Count++; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := fileText(t, path), `{"version":0,"count":2}`; got != want {
		t.Errorf("file is %s, not %s", got, want)
	}
}

func TestNothingIsWrittenForAnErrorOrNoChange(t *testing.T) {
	path := at(t, `{"version":1,"count":3}`+"\n")
	before, _ := os.Stat(path)
	boom := errors.New("boom")
	for name, change := range map[string]func(*shelf) error{
		"error":     func(s *shelf) error { s.Count = 4; return boom },
		"unchanged": func(s *shelf) error { s.Count = 5; return ErrUnchanged },
		"the same":  func(s *shelf) error { return nil },
	} {
		err := Update(t.Context(), path, name, change)
		if name == "error" != (err == boom) {
			t.Errorf("%s: %v", name, err)
		}
	}
	after, _ := os.Stat(path)
	if !os.SameFile(before, after) {
		t.Error("the file was replaced")
	}
}

// What another version wrote survives, and what was deleted stays deleted.
func TestUnknownFieldsSurvive(t *testing.T) {
	lend := func(s *shelf) error {
		b := s.Books["a"]
		b.Lent = true
		s.Books["a"] = b
		return nil
	}
	for _, test := range []struct {
		name, before string
		change       func(*shelf) error
		want         string
	}{
		{"at the top", `{"version":1,"colour":"red"}`,
			func(s *shelf) error { s.Count = 1; return nil }, `{"version":1,"count":1,"colour":"red"}`},
		{"deep, with all digits", `{"version":1,"books":{"a":{"title":"A","isbn":12345678901234567890,"x":{"y":[1,null]}}}}`,
			lend, `{"version":1,"books":{"a":{"title":"A","lent":true,"isbn":12345678901234567890,"x":{"y":[1,null]}}}}`},
		{"beside what is deleted", `{"version":1,"books":{"a":{"title":"A","x":1},"b":{"title":"B","x":2}}}`,
			func(s *shelf) error { delete(s.Books, "a"); return nil }, `{"version":1,"books":{"b":{"title":"B","x":2}}}`},
		{"not in what is added", `{"version":1,"books":{"a":{"title":"A","x":1}}}`,
			func(s *shelf) error { s.Books["b"] = book{Title: "B"}; return nil },
			`{"version":1,"books":{"a":{"title":"A","x":1},"b":{"title":"B"}}}`},
		{"a known field that became empty is gone", `{"version":1,"count":7,"x":1}`,
			func(s *shelf) error { s.Count = 0; return nil }, `{"version":1,"x":1}`},
		{"a key that differs by its case is another", `{"version":1,"COUNT":7,"x":1}`,
			func(s *shelf) error { s.Count++; return nil }, `{"version":1,"count":1,"COUNT":7,"x":1}`},
		{"in a list, with the element", `{"version":1,"order":[{"title":"A","x":1},{"title":"B","x":2},{"title":"C","x":3}]}`,
			func(s *shelf) error { s.Order = []book{s.Order[2], s.Order[0]}; return nil },
			`{"version":1,"order":[{"title":"C","x":3},{"title":"A","x":1}]}`},
		{"in a list, with an element that changes", `{"version":1,"order":[{"title":"A","x":1},{"title":"B","x":2}]}`,
			func(s *shelf) error { s.Order[1].Lent = true; return nil },
			`{"version":1,"order":[{"title":"A","x":1},{"title":"B","lent":true,"x":2}]}`},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := at(t, test.before)
			if err := Update(t.Context(), path, "test", test.change); err != nil {
				t.Fatal(err)
			}
			var got, want any
			json.Unmarshal([]byte(fileText(t, path)), &got)
			json.Unmarshal([]byte(test.want), &want)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("file (-want +got):\n%s", diff)
			}
			if strings.Contains(test.want, "12345678901234567890") && !strings.Contains(fileText(t, path), "12345678901234567890") {
				t.Error("a number lost digits")
			}
		})
	}
}

var unreadable = map[string]string{
	"empty": "", "space": " \n", "NULs": strings.Repeat("\x00", 100), "truncated": `{"version":1,"books":{"a"`,
	"of an unknown version": `{"version":2}`, "null": "null", "a list": "[]", "followed by NULs": "{}\x00\x00", "two": "{}{}", "of a wrong type": `{"version":"1"}`,
}

func TestAnUnreadableFileIsAnErrorAndStays(t *testing.T) {
	for name, body := range unreadable {
		path := at(t, body)
		if _, err := Read[shelf](path); !errors.Is(err, ErrUnreadable) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: read: %v", name, err)
		}
		err := Update(t.Context(), path, "test", func(*shelf) error { t.Errorf("%s: change is called", name); return nil })
		if !errors.Is(err, ErrUnreadable) {
			t.Errorf("%s: update: %v", name, err)
		}
		if got, _ := os.ReadFile(path); string(got) != body {
			t.Errorf("%s: the file is now %q", name, got)
		}
	}
}

func TestSetAsideKeepsTheNewestUnreadableFile(t *testing.T) {
	path := at(t, "first")
	for _, body := range []string{"first", "second"} {
		os.WriteFile(path, []byte(body), 0o600)
		for range 2 { // the second finds nothing to do
			if err := SetAside[shelf](t.Context(), path, "test"); err != nil {
				t.Fatal(err)
			}
		}
	}
	bad := ListAside(path)
	if len(bad) != 1 || fileText(t, bad[0]) != "second" {
		t.Errorf("set aside: %v", bad)
	}
	if err := Update(t.Context(), path, "test", func(s *shelf) error { s.Count = 1; return nil }); err != nil {
		t.Fatal(err)
	}
	if err := SetAside[shelf](t.Context(), path, "test"); err != nil {
		t.Fatal(err)
	}
	if got, want := fileText(t, path), `{"version":0,"count":1}`; got != want {
		t.Errorf("a good file was set aside: %s", got)
	}
}

func TestTheWaitForALockEndsAndNamesTheHolder(t *testing.T) {
	path := at(t, "{}")
	unlock, err := Lock(t.Context(), path+".lock", "azure-vnet: lease for web")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	err = Update(ctx, path, "test", func(*shelf) error { return nil })
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "lease for web") {
		t.Errorf("error is %v", err)
	}
	unlock()
	if err := Update(t.Context(), path, "test", func(*shelf) error { return nil }); err != nil {
		t.Errorf("after the unlock: %v", err)
	}
}

// /run/azure-vnet may be wiped at any time: two must not lock two files.
func TestCallersThatGiveUpLeaveNoThreads(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := Lock(t.Context(), path, "one that is stopped")
	if err != nil {
		t.Fatal(err)
	}
	threads := func() int {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		return len(tasks)
	}
	before := threads()
	for range 4 {
		var all sync.WaitGroup
		for range 25 {
			all.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
				defer cancel()
				if _, err := Lock(ctx, path, "impatient"); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "one that is stopped") {
					t.Error(err)
				}
			})
		}
		all.Wait()
	}
	if after := threads(); after > before+25 {
		t.Errorf("100 callers gave up, and of %d threads there are %d", before, after)
	}
	unlock()
	// The one that waits in the kernel yet gives the lock, and its turn, to the next.
	if unlock, err = Lock(t.Context(), path, "patient"); err != nil {
		t.Fatal(err)
	}
	unlock()
}

func TestALockOnADeletedFileDoesNotCount(t *testing.T) {
	path := at(t, "{}") + ".lock"
	unlock, err := Lock(t.Context(), path, "first")
	if err != nil {
		t.Fatal(err)
	}
	waiting := make(chan error)
	go func() {
		unlock, err := Lock(t.Context(), path, "second")
		if err == nil {
			defer unlock()
			var there []byte
			if there, err = os.ReadFile(path); err == nil && string(there) != "second" {
				err = fmt.Errorf("the lock at its path is of %q", there)
			}
		}
		waiting <- err
	}()
	os.Remove(path)
	unlock()
	if err := <-waiting; err != nil {
		t.Error(err)
	}
}

func TestNoUpdateIsLostBetweenGoroutines(t *testing.T) {
	path := filepath.Join(t.TempDir(), "shelf.json")
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			for range 10 {
				if err := increment(path); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if s, err := Read[shelf](path); err != nil || s.Count != 200 {
		t.Errorf("count is %d, %v", s.Count, err)
	}
}

func increment(path string) error {
	return Update(context.Background(), path, "increment", func(s *shelf) error {
		s.Count++
		s.Books = map[string]book{"pad": {Title: strings.Repeat("x", 20000)}}
		return nil
	})
}

// TestMain is also the child of the tests below.
func TestMain(m *testing.M) {
	path, ok := os.LookupEnv("STATEFILE_TEST_INCREMENT")
	if !ok {
		os.Exit(m.Run())
	}
	for {
		if err := increment(path); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("done")
	}
}

// Processes that are killed at any moment lose no update that they were told
// is done, and leave the next one nothing to wait for.
func TestKilledProcessesLoseNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "shelf.json")
	var mu sync.Mutex
	done, kills := 0, 0
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 8 {
				n, err := killedChild(path)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				done += n
				kills++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	start := time.Now()
	if err := increment(path); err != nil || time.Since(start) > time.Second {
		t.Fatalf("the next update took %v: %v", time.Since(start), err)
	}
	// A child may be killed between its rename and its word.
	if s, err := Read[shelf](path); err != nil || s.Count < done+1 || s.Count > done+1+kills || done == 0 {
		t.Errorf("count is %d after %d acknowledged: %v", s.Count, done, err)
	}
}

func killedChild(path string) (acknowledged int, err error) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "STATEFILE_TEST_INCREMENT="+path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	kill := func() {
		time.AfterFunc(time.Duration(rand.IntN(100))*time.Millisecond, func() { cmd.Process.Kill() })
	}
	early := rand.IntN(2) == 0 // else a busy machine might kill all before they did anything
	if early {
		kill()
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if lines.Text() != "done" {
			return 0, errors.New(lines.Text())
		}
		if acknowledged++; acknowledged == 1 && !early {
			kill()
		}
	}
	cmd.Wait()
	return acknowledged, nil
}

// Whatever is in the file, reading it ends in a value or ErrUnreadable, and a
// change to one field leaves what another reader sees of the rest.
func FuzzUpdate(f *testing.F) {
	for _, body := range unreadable {
		f.Add(body) // what crashes leave
	}
	f.Add(`{"version":1,"books":{"a":{"title":"A","x":1}},"order":[{"title":"A","x":[{}]}]}`)
	f.Add(`{"VERSION":1,"version":0,"Books":{"a":null},"books":{"A":{}}}`) // names that json takes for the same
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, body string) {
		path := filepath.Join(dir, "shelf.json")
		os.WriteFile(path, []byte(body), 0o600)
		before, err := Read[shelf](path)
		if err != nil {
			if !errors.Is(err, ErrUnreadable) {
				t.Fatal(err)
			}
			return
		}
		if err := Update(t.Context(), path, "fuzz", func(s *shelf) error { s.Count++; return nil }); err != nil {
			t.Fatal(err)
		}
		after, err := Read[shelf](path)
		before.Count++
		if diff := cmp.Diff(normal(before), normal(after)); err != nil || diff != "" {
			t.Fatalf("%v\n%s", err, diff)
		}
	})
}

// normal drops the difference between an empty list or map and none.
func normal(s shelf) shelf {
	if len(s.Books) == 0 {
		s.Books = nil
	}
	if len(s.Order) == 0 {
		s.Order = nil
	}
	return s
}

func TestNoneIsNotEmpty(t *testing.T) {
	type lists struct{ None, Empty []string }
	want := lists{Empty: []string{}}
	path := filepath.Join(t.TempDir(), "state.json")
	if err := Update(t.Context(), path, "test", func(l *lists) error { *l = want; return nil }); err != nil {
		t.Fatal(err)
	}
	if got, err := Read[lists](path); err != nil || !cmp.Equal(want, got) {
		t.Errorf("%#v came back as %#v: %v", want, got, err)
	}
}

func TestReplaceMakesTheDirectoryAndLeavesNoOtherFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "azure-vnet", "plugin.json")
	for _, body := range []string{"first", "then"} {
		if err := Replace(path, []byte(body), 0o600); err != nil || fileText(t, path) != body {
			t.Errorf("%v; the file is %q", err, fileText(t, path))
		}
	}
	if all, err := os.ReadDir(filepath.Dir(path)); err != nil || len(all) != 1 {
		t.Errorf("%v, %v", all, err)
	}
}

// Replace takes no lock. Each writer of several renames a whole file of its own.
func TestReplaceOfSeveralWritersIsWhole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "plugin.json")
	var writers sync.WaitGroup
	for i := range 8 {
		body := bytes.Repeat([]byte{byte('a' + i)}, (i+1)<<14)
		writers.Go(func() {
			for range 20 {
				if err := Replace(path, body, 0o644); err != nil {
					t.Error(err)
				}
				got := fileText(t, path)
				if n := int(got[0]-'a') + 1; got != strings.Repeat(got[:1], n<<14) {
					t.Errorf("the file is torn: it has %d bytes", len(got))
				}
			}
		})
	}
	writers.Wait()
	all, err := os.ReadDir(filepath.Dir(path))
	if info, bad := os.Stat(path); err != nil || len(all) != 1 || bad != nil || info.Mode() != 0o644 {
		t.Errorf("%v, %v; %v, %v", all, err, info, bad)
	}
}
