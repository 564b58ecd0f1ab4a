// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/sirupsen/logrus"
)

// answer is what the engine sees of a call.
type answer struct {
	Status int
	Body   string
}

// plugin is a server on a socket of its own, and its log.
type plugin struct {
	*server
	client *http.Client
	log    *logBuffer
	stop   chan struct{}
	done   chan error
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// start serves the methods as the plugin does, with times to suit a test.
func start(t *testing.T, g *gate, all map[string]method) *plugin {
	t.Helper()
	l, err := listen(filepath.Join(t.TempDir(), "plugins", "azure-vnet.sock"))
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	p := &plugin{log: &logBuffer{}, stop: make(chan struct{}), done: make(chan error, 1)}
	log.SetOutput(p.log)
	p.server = &server{log: log, gate: g, serving: limits{2 * time.Second, 100 * time.Millisecond}, takeAway: limits{20 * time.Millisecond, 10 * time.Millisecond}}
	p.client = &http.Client{Transport: &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", l.Addr().String()) },
	}}
	go func() { p.done <- p.serve(l, all, p.stop, time.Second) }()
	t.Cleanup(func() {
		p.client.CloseIdleConnections()
		select {
		case <-p.stop:
		default:
			close(p.stop)
		}
		<-p.done
	})
	return p
}

func (p *plugin) call(t *testing.T, method, body string) answer {
	t.Helper()
	r, err := p.client.Post("http://plugin/"+method, "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatalf("%s: %v", method, err)
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatalf("%s: %v", method, err)
	}
	return answer{r.StatusCode, strings.TrimSpace(string(text))}
}

func openGate() *gate {
	g := newGate("")
	g.open()
	return g
}

type ping struct{ Text string }

func echo(_ context.Context, p *ping) (*ping, error) { return p, nil }

func TestCallsAreAnsweredAsTheProtocolSays(t *testing.T) {
	p := start(t, openGate(), map[string]method{
		"T.Echo":  answered(echo),
		"T.Does":  unanswered(func(context.Context, *ping) error { return nil }),
		"T.Says":  withoutRequest(func(context.Context) (*ping, error) { return &ping{"caps"}, nil }),
		"T.Fails": unanswered(func(context.Context, *ping) error { return errors.New(`no "address" left`) }),
		"T.Panic": unanswered(func(context.Context, *ping) error { panic("oh") }),
		"T.Hangs": unanswered(func(context.Context, *ping) error { select {} }),
		"T.Ends":  takingAway(func(context.Context, *ping) error { select {} }),
		"T.Waits": unanswered(func(ctx context.Context, _ *ping) error { <-ctx.Done(); return fmt.Errorf("waited: %w", ctx.Err()) }),
	})
	for _, c := range []struct {
		name, method, body string
		want               answer
	}{
		{"an answer", "T.Echo", `{"Text":"hi"}`, answer{200, `{"Text":"hi"}`}},
		{"unknown fields of a newer engine", "T.Echo", `{"Text":"hi","New":[1]}`, answer{200, `{"Text":"hi"}`}},
		{"no answer", "T.Does", `{}`, answer{200, `{}`}},
		{"no body where none belongs", "T.Says", ``, answer{200, `{"Text":"caps"}`}},
		{"an error", "T.Fails", `{}`, answer{500, `{"Err":"no \"address\" left"}`}},
		{"an empty body", "T.Echo", ``, answer{500, `{"Err":"the request is empty: the call was lost when the plugin restarted; repeat the command"}`}},
		{"no JSON", "T.Echo", `<xml/>`, answer{500, `{"Err":"the request is not what the plugin protocol says: invalid character '\u003c' looking for beginning of value"}`}},
		{"too large a body", "T.Echo", `{"Text":"` + strings.Repeat("x", maxBody) + `"}`, answer{500, `{"Err":"read the request: http: request body too large"}`}},
		{"a panic", "T.Panic", `{}`, answer{500, `{"Err":"T.Panic: internal error: oh"}`}},
		{"a call that heeds its deadline", "T.Waits", `{}`, answer{500, `{"Err":"waited: context deadline exceeded"}`}},
		{"a call that hangs", "T.Hangs", `{}`, answer{500, `{"Err":"T.Hangs: no answer within 2.1s: something on this host hangs; azure-vnet-plugin status may tell"}`}},
		{"a call that only takes away, and hangs", "T.Ends", `{}`, answer{500, `{"Err":"T.Ends: no answer within 30ms: something on this host hangs; azure-vnet-plugin status may tell"}`}},
		{"the plugin is alive after all that", "T.Echo", `{}`, answer{200, `{"Text":""}`}},
		{"what it implements", "Plugin.Activate", ``, answer{200, `{"Implements": ["NetworkDriver", "IpamDriver"]}`}},
		{"an unknown method", "T.Unknown", `{}`, answer{404, `404 page not found`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, p.call(t, c.method, c.body)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestEveryCallIsOneLineOfTheLog(t *testing.T) {
	p := start(t, openGate(), map[string]method{"T.Echo": answered(echo)})
	p.call(t, "T.Echo", `{"NetworkID":"0123456789abcdef","Interface":{"Address":"10.240.0.7/16"}}`)
	p.call(t, "T.Echo", ``)
	lines := strings.Split(strings.TrimSpace(p.log.String()), "\n")
	if len(lines) != 2 {
		t.Fatalf("2 calls, %d lines:\n%s", len(lines), p.log)
	}
	for _, want := range []string{"level=info", "method=T.Echo", "ms=", "network=0123456789ab", "address=10.240.0.7/16"} {
		if !strings.Contains(strings.ReplaceAll(lines[0], `"`, ""), want) {
			t.Errorf("no %s in %s", want, lines[0])
		}
	}
	if !strings.Contains(lines[1], "level=error") {
		t.Errorf("a failed call is no error in the log: %s", lines[1])
	}
}

func TestParallelCallsDoNotWaitForEachOther(t *testing.T) {
	together := make(chan struct{})
	var once sync.Once
	var inside sync.WaitGroup
	inside.Add(50)
	p := start(t, openGate(), map[string]method{"T.Meet": unanswered(func(ctx context.Context, _ *ping) error {
		inside.Done()
		once.Do(func() { go func() { inside.Wait(); close(together) }() })
		select {
		case <-together:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})})
	p.serving.deadline = 10 * time.Second
	var calls sync.WaitGroup
	for range 50 {
		calls.Go(func() {
			if got := p.call(t, "T.Meet", `{}`); got.Status != 200 {
				t.Error(got)
			}
		})
	}
	calls.Wait()
}

func TestCallsWaitForTheGate(t *testing.T) {
	g := newGate("restoring azure0")
	p := start(t, g, map[string]method{
		"T.Echo": answered(echo),
		"T.Says": withoutRequest(func(context.Context) (*ping, error) { return &ping{"caps"}, nil }),
		"T.Ends": takingAway(func(context.Context, *ping) error { return nil }),
	})
	p.takeAway.deadline = 10 * time.Second
	if got, want := p.call(t, "T.Ends", `{}`), (answer{200, `{}`}); got != want {
		t.Errorf("a call that only takes away before the gate opens: %v", got)
	}
	if got, want := p.call(t, "T.Says", ""), (answer{200, `{"Text":"caps"}`}); got != want {
		t.Errorf("capabilities before the gate opens: %v", got)
	}
	if got, want := p.call(t, "T.Echo", `{}`), (answer{500, `{"Err":"azure-vnet is not ready yet: restoring azure0; try again"}`}); got != want {
		t.Errorf("a call that waited too long: %v", got)
	}
	p.serving.deadline = 10 * time.Second
	result := make(chan answer, 1)
	go func() { result <- p.call(t, "T.Echo", `{}`) }()
	g.open()
	if got := <-result; got.Status != 200 {
		t.Errorf("a call that waited: %v", got)
	}
}

func TestStoppingLetsCallsFinish(t *testing.T) {
	inside, leave := make(chan struct{}), make(chan struct{})
	p := start(t, openGate(), map[string]method{
		"T.Slow": unanswered(func(context.Context, *ping) error { close(inside); <-leave; return nil }),
		"T.Echo": answered(echo),
	})
	p.serving.deadline = 10 * time.Second
	p.call(t, "T.Echo", `{}`) // leaves a connection that is kept alive
	result := make(chan answer, 1)
	go func() { result <- p.call(t, "T.Slow", `{}`) }()
	<-inside
	close(p.stop)
	refused := func() bool {
		r, err := p.client.Post("http://plugin/T.Echo", "application/json", strings.NewReader(`{}`))
		if err != nil {
			return true
		}
		defer r.Body.Close()
		return r.StatusCode != 200
	}
	for end := time.Now().Add(5 * time.Second); !refused(); {
		if time.Now().After(end) {
			t.Fatal("a stopping plugin takes new calls")
		}
	}
	close(leave)
	if got := <-result; got.Status != 200 {
		t.Errorf("the call in flight: %v", got)
	}
	if err := <-p.done; err != nil {
		t.Errorf("serve: %v", err)
	}
	p.done <- nil // for the cleanup
}

func TestTheSocketOfAKilledPluginIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "azure-vnet.sock")
	first, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	first.(*net.UnixListener).SetUnlinkOnClose(false)
	first.Close()
	second, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}
