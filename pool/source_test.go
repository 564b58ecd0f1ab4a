// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// blackHole answers nothing until its asker has gone.
func blackHole(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

// raw answers with exactly these bytes and hangs up.
func raw(answer string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		conn, buf, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(err)
		}
		defer conn.Close()
		buf.WriteString(answer)
		buf.Flush()
	}
}

func body(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, text) }
}

func status(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", code) }
}

// Whatever the source does, what it said before is lent from, and Status tells.
// Where nothing was said before, the error tells.
func TestFaultsOfTheSource(t *testing.T) {
	for _, test := range []struct {
		name   string
		answer http.HandlerFunc
		says   string
	}{
		{"500", status(500), "500 Internal Server Error"},
		{"401", status(401), "Metadata Security Protocol"},
		{"403", status(403), "Metadata Security Protocol"},
		{"a redirect", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://192.0.2.1/", http.StatusFound)
		}, "302 Found"},
		{"HTML", body("<!DOCTYPE html><html><p>login</html>"), `HTML, not XML: "<!DOCTYPE html>`},
		{"JSON", body(`{"interface":[]}`), `not the XML that was expected`},
		{"nothing", body(""), "sent nothing"},
		{"an empty list", body("<Interfaces/>"), "lists no NIC"},
		{"a NIC without subnets", body(`<Interfaces><Interface MacAddress="000D3A047598"/></Interfaces>`), "no IPv4 subnet"},
		{"truncated XML", body(`<Interfaces><Interface MacAddress="000D`), "ends too early"},
		{"a body that breaks off", raw("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n<Interfaces>"), "broke off after 12 bytes"},
		{"chunks that break off", raw("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n<Inte\r\n"), "broke off after 5 bytes"},
		{"10 MB", body(strings.Repeat("<Interfaces>", 10<<20/12)), "longer than 1048576 bytes"},
		{"not HTTP", raw("SSH-2.0-OpenSSH_9.2\r\n"), "malformed HTTP"},
		{"hung up", raw(""), "EOF"},
		{"always 102", raw("HTTP/1.1 102 Processing\r\nContent-Length: 0\r\n\r\n"), "102 Processing (try again)"},
		{"429 for long", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "60")
			w.WriteHeader(429)
		}, "429 Too Many Requests"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			f := azure(nic(mac1, "10.0.0.0/24", 4))
			p := newPool(t, f)
			p.must(t, Request{Owner: "o"})
			f.fail(test.answer)
			f.pass(time.Minute)
			if _, err := p.NICs(t.Context()); err != nil {
				t.Fatal(err)
			}
			p.must(t, Request{Owner: "o"})
			st, err := p.Status(t.Context())
			if err != nil || !strings.Contains(st.Sources[0].Failure, test.says) || st.NICs[0].Subnets[0].Configs != 4 {
				t.Errorf("status %+v, %v", st, err)
			}
			_, err = newPool(t, f).Lease(t.Context(), Request{Owner: "o"})
			wants(t, err, ErrSource, "wireserver", test.says)
		})
	}
}

func TestChunksArePutTogether(t *testing.T) {
	f := azure(nic(mac1, "10.0.0.0/24", 4))
	text := f.body
	f.fail(func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(text); i += 40 {
			fmt.Fprint(w, text[i:min(i+40, len(text))])
			http.NewResponseController(w).Flush()
		}
	})
	newPool(t, f).must(t, Request{Owner: "o"})
}

// 102, 404, 410, 429 and 5xx pass: the question is put again, after the pause
// that the source asks for.
func TestAPassingRefusalIsAskedAgain(t *testing.T) {
	for name, refuse := range map[string]http.HandlerFunc{
		"102": raw("HTTP/1.1 102 Processing\r\n\r\n"), "404": status(404), "410": status(410), "500": status(500),
		"429": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(429)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := azure(nic(mac1, "10.0.0.0/24", 4))
			good := f.body
			f.fail(func(w http.ResponseWriter, r *http.Request) {
				if f.questions() == 1 {
					refuse(w, r)
				} else {
					fmt.Fprint(w, good)
				}
			})
			start := time.Now()
			newPool(t, f).must(t, Request{Owner: "o"})
			if took := time.Since(start); f.questions() != 2 || name == "429" && took < time.Second {
				t.Errorf("%d questions in %v", f.questions(), took)
			}
		})
	}
}

func TestARefusedConnectionFailsAtOnce(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	f := azure()
	f.url = "http://" + l.Addr().String()
	start := time.Now()
	_, err = newPool(t, f).NICs(t.Context())
	wants(t, err, ErrSource, "connection refused", f.url)
	if took := time.Since(start); took > time.Second {
		t.Errorf("it took %v", took)
	}
}

// A source that never answers: bounded where nothing is known, and short where
// something is; what is known is lent, and only one question is out at a time.
func TestABlackHole(t *testing.T) {
	t.Parallel()
	f := azure(nic(mac1, "10.0.0.0/24", 40))
	f.fail(blackHole)
	p := newPool(t, f)
	p.clock = bootTime
	var wg sync.WaitGroup
	start := time.Now()
	for range 20 {
		wg.Go(func() {
			_, err := p.Lease(t.Context(), Request{Owner: "o"})
			wants(t, err, ErrSource, "no answer", "firewall")
		})
	}
	wg.Wait()
	if took := time.Since(start); took > 10*time.Second || f.questions() != 1 {
		t.Errorf("with nothing known it took %v, %d questions", took, f.questions())
	}
	f.list(nic(mac1, "10.0.0.0/24", 40))
	p.clock = newPool(t, f).clock // time stands again
	f.pass(bootTime() + time.Minute)
	p.must(t, Request{Owner: "o"})
	asked := f.questions()
	f.fail(blackHole)
	f.pass(time.Minute)
	for i, most := range []time.Duration{time.Second, 100 * time.Millisecond, 100 * time.Millisecond} {
		start = time.Now()
		p.must(t, Request{Owner: "o"})
		if took := time.Since(start); took > most {
			t.Errorf("lease %d took %v", i, took)
		}
	}
	if f.questions() != asked+1 {
		t.Errorf("%d questions for three leases", f.questions()-asked)
	}
}

// A question that can do without an answer waits shortly, and a slow source does not answer in time. A question
// that needs the answer comes right after it. The slow source is asked again, and has all the time.
func TestASlowSourceIsAskedAgainByThoseWhoNeedIt(t *testing.T) {
	t.Parallel()
	f := azure(nic(mac1, "10.0.0.0/24", 2))
	f.slow(2 * shortWait)
	p := newPool(t, f)
	if s, err := p.Status(t.Context()); err != nil || !strings.Contains(s.Sources[0].Failure, "no answer") {
		t.Fatalf("status of a slow source: %+v, %v", s.Sources, err)
	}
	if _, _, err := p.Subnet(t.Context(), "", netip.Prefix{}); err != nil {
		t.Error(err)
	}
	p.must(t, Request{Owner: "o"})
	if f.questions() != 2 {
		t.Errorf("%d questions", f.questions())
	}
}

// The slow source is asked again although another one fails at once.
func TestASlowSourceBesideADeadOneIsAskedAgain(t *testing.T) {
	t.Parallel()
	f := azure(nic(mac1, "10.0.0.0/24", 2))
	f.slow(2 * shortWait)
	p := newPool(t, f)
	p.sources = append([]source{{"dead", func(context.Context) ([]byte, error) { return nil, errors.New("refused") }, parseXML}}, p.sources...)
	if _, err := p.Status(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, _, err := p.Subnet(t.Context(), "", netip.Prefix{}); err != nil {
		t.Error(err)
	}
	p.must(t, Request{Owner: "o"})
}

func TestTheSourceIsAskedOncePerIntervalOrWhenNothingIsFree(t *testing.T) {
	f := azure(nic(mac1, "10.0.0.0/24", 3))
	p := newPool(t, f)
	lease := func() { p.Lease(t.Context(), Request{Owner: "o"}) }
	for i, step := range []struct {
		pass time.Duration
		want int // questions in all
	}{
		{0, 1}, {0, 1}, // two are lent of one answer
		{0, 1}, {time.Second, 1}, {time.Second, 2}, // then nothing is free: every 2 s
		{time.Second, 2}, {time.Second, 3},
	} {
		f.pass(step.pass)
		if lease(); f.questions() != step.want {
			t.Errorf("step %d: %d questions, not %d", i, f.questions(), step.want)
		}
	}
	f.list(nic(mac1, "10.0.0.0/24", 4))
	f.pass(pressing)
	if l := p.must(t, Request{Owner: "o"}); l.Addr != addr("10.0.0.7") {
		t.Errorf("lent %s", l.Addr)
	}
	for i, age := range []time.Duration{0, defaultInterval - 1, 1} {
		f.pass(age)
		if _, err := p.NICs(t.Context()); err != nil || f.questions() != 4+i/2 {
			t.Errorf("step %d: %d questions, %v", i, f.questions(), err)
		}
	}
}

// A caller that gives up says nothing about the source.
func TestACancelledCallerRecordsNoFailure(t *testing.T) {
	f := azure()
	f.fail(blackHole)
	p := newPool(t, f)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := p.NICs(ctx); err == nil || ctx.Err() == nil {
		t.Fatal(err)
	}
	if s, err := p.readState(t.Context(), "test"); err != nil || len(s.Answers) != 0 {
		t.Errorf("answers are %+v, %v", s.Answers, err)
	}
}

func TestIMDSIsAskedAsItsDocumentationSays(t *testing.T) {
	seed, err := os.ReadFile(filepath.Join("testdata", "imds.json"))
	if err != nil {
		t.Fatal(err)
	}
	var versions []string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v := r.URL.Query().Get("api-version")
		versions = append(versions, v)
		switch {
		case r.Header.Get("Metadata") != "true" || r.Header.Get("X-Forwarded-For") != "":
			w.WriteHeader(403)
		case v != imdsOldAPI: // an older host
			w.WriteHeader(400)
		default:
			w.Write(seed)
		}
	}))
	defer srv.Close()
	t.Setenv("HTTP_PROXY", "http://192.0.2.1:3128") // never asked
	u, _ := url.Parse(imdsURL)
	p, err := New(Config{Dir: t.TempDir(), Source: "imds", QueryURL: srv.URL + u.RequestURI()})
	if err != nil {
		t.Fatal(err)
	}
	p.host = func() (hostLinks, error) { return hostLinks{}, nil }
	nics, err := p.NICs(t.Context())
	if err != nil || text(nics) != mac1+"* 10.0.0.0/24 10.0.0.4: 10.0.0.7" {
		t.Fatalf("NICs are %s, %v", text(nics), err)
	}
	if got := strings.Join(versions, " "); got != "2021-02-01 2019-06-01" {
		t.Errorf("asked %s", got)
	}
}

// auto asks the host agent, and IMDS when that fails; when they disagree, the
// newer counts and Status warns.
func TestAutoFallsBackAndWarnsOfDisagreement(t *testing.T) {
	agent, other := azure(nic(mac1, "10.0.0.0/24", 3)), azure(nic(mac1, "10.0.0.0/24", 4))
	p := newPool(t, agent)
	srv := httptest.NewServer(other)
	defer srv.Close()
	p.sources = append(p.sources, source{"imds", wireServerSource(srv.URL).fetch, parseXML})
	p.must(t, Request{Owner: "o"})
	if other.questions() != 0 {
		t.Error("IMDS was asked while the host agent answered")
	}
	agent.fail(status(401))
	agent.pass(time.Minute)
	nics, err := p.NICs(t.Context())
	if err != nil || len(nics[0].Subnets[0].Secondary) != 3 {
		t.Fatalf("NICs %s, %v", text(nics), err)
	}
	st, err := p.Status(t.Context())
	got := strings.Join(st.Warnings, "\n")
	for _, say := range []string{"imds and wireserver disagree about [10.0.0.7]", "wireserver failed", "Metadata Security Protocol"} {
		if err != nil || !strings.Contains(got, say) {
			t.Errorf("warnings do not say %q: %s", say, got)
		}
	}
	other.fail(status(403))
	fresh := newPool(t, agent)
	fresh.sources = p.sources
	_, err = fresh.NICs(t.Context())
	wants(t, err, ErrSource, "wireserver: it answered 401", "imds: it answered 403")
}

func TestSubnet(t *testing.T) {
	second := nic(mac2, "10.0.1.0/24", 2)
	second.Primary = "false"
	second.Subnets = append(second.Subnets, docSubnet{Prefix: "10.0.0.0/24", Addrs: []docAddr{{Address: "10.0.0.99"}}})
	f := azure(second, nic(mac1, "10.0.0.0/24", 2))
	p := newPool(t, f)
	for _, test := range []struct{ mac, want, got string }{
		{"", "", mac1 + " 10.0.0.0/24"},
		{"", "10.0.0.0/24", mac1 + " 10.0.0.0/24"},
		{"", "10.0.1.0/24", mac2 + " 10.0.1.0/24"},
		{strings.ToUpper(mac2), "10.0.0.0/24", mac2 + " 10.0.0.0/24"},
		{mac2, "", mac2 + " 10.0.1.0/24"},
		{"", "10.0.0.0/16", "error"},
		{mac1, "10.0.1.0/24", "error"},
	} {
		want, _ := netip.ParsePrefix(test.want) // zero for none
		nic, sub, err := p.Subnet(t.Context(), test.mac, want)
		got := fmt.Sprint(nic.MAC, " ", sub.Prefix)
		if err != nil {
			wants(t, err, ErrNotOurs, "10.0.0.0/24", "10.0.1.0/24")
			got = "error"
		}
		if got != test.got {
			t.Errorf("%q %q: %s, not %s", test.mac, test.want, got, test.got)
		}
	}
	// A subnet of a NIC that was added just now is found.
	f.list(nic(mac1, "10.7.0.0/24", 2))
	f.pass(pressing)
	if _, _, err := p.Subnet(t.Context(), "", prefix("10.7.0.0/24")); err != nil {
		t.Error(err)
	}
}
