// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"encoding/xml"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	mac1 = "00:0d:3a:04:75:98"
	mac2 = "00:0d:3a:03:c5:ab"
)

func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }
func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// nic is a NIC with n ipconfigs in one subnet, of which .4 is its own.
func nic(mac, subnet string, n int) docNIC {
	d := docNIC{MAC: strings.ToUpper(strings.ReplaceAll(mac, ":", "")), Primary: "true"}
	s := docSubnet{Prefix: subnet}
	a := prefix(subnet).Addr().Next().Next().Next().Next()
	for i := range n {
		s.Addrs = append(s.Addrs, docAddr{Address: a.String(), Primary: loose(fmt.Sprint(i == 0))})
		a = a.Next()
	}
	d.Subnets = []docSubnet{s}
	return d
}

// fabric is Azure as one VM sees it: an HTTP server that tells what it is told to.
type fabric struct {
	mu       sync.Mutex
	body     string
	answer   http.HandlerFunc // instead of body
	asked    int
	now      time.Duration // since boot, of the pools that face it
	occupied occupied
	macs     []string // of the VM's interfaces; none: not known
	url      string
	reclaim  bool
	remedy   string
}

// azure is a fabric whose host agent lists these NICs. Its clock begins at this
// machine's time since boot, which make test sets to a second.
func azure(nics ...docNIC) *fabric {
	f := &fabric{now: bootTime()}
	f.list(nics...)
	return f
}

func (f *fabric) list(nics ...docNIC) {
	body, err := xml.Marshal(document{NICs: nics})
	if err != nil {
		panic(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.body, f.answer = string(body), nil
}

func (f *fabric) fail(h http.HandlerFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answer = h
}

// slow answers rightly, late.
func (f *fabric) slow(late time.Duration) {
	f.mu.Lock()
	body := f.body
	f.mu.Unlock()
	f.fail(func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(late)
		fmt.Fprint(w, body)
	})
}

func (f *fabric) pass(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now += d
}

func (f *fabric) questions() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.asked
}

func (f *fabric) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	f.asked++
	body, answer := f.body, f.answer
	f.mu.Unlock()
	if answer != nil {
		answer(w, r)
		return
	}
	fmt.Fprint(w, body)
}

// newPool is a pool of a fresh VM on f, whose clock stands until f lets it pass
// and whose host holds no address but what f says.
func newPool(t testing.TB, f *fabric) *Pool {
	t.Helper()
	return poolIn(t, f, t.TempDir())
}

func poolIn(t testing.TB, f *fabric, dir string) *Pool {
	t.Helper()
	if f.url == "" {
		srv := httptest.NewServer(f)
		t.Cleanup(srv.Close)
		f.url = srv.URL
	}
	p, err := New(Config{Dir: dir, Source: "wireserver", QueryURL: f.url + "/", Reclaim: f.reclaim, Remedy: f.remedy})
	if err != nil {
		t.Fatal(err)
	}
	p.clock = func() time.Duration {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.now
	}
	p.occupied = func() (occupied, error) {
		has := f.occupied
		has.nameOf = func(link int) string { return fmt.Sprintf("azv%d", link) }
		return has, nil
	}
	p.host = func() (hostLinks, error) { return hostLinks{MACs: f.macs}, nil }
	return p
}

func (p *Pool) must(t testing.TB, r Request) Lease {
	t.Helper()
	l, err := p.Lease(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// wants fails unless err is want and says every one of words.
func wants(t testing.TB, err, want error, words ...string) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error is %v, not %v", err, want)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error does not say %q: %v", w, err)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	dir := t.TempDir()
	for name, c := range map[string]Config{
		"relative directory":  {Dir: "run"},
		"unknown source":      {Dir: dir, Source: "azure"},
		"negative interval":   {Dir: dir, QueryInterval: -1},
		"a URL without host":  {Dir: dir, QueryURL: "168.63.129.16"},
		"a URL for a file":    {Dir: dir, Source: filepath.Join(dir, "f"), QueryURL: "http://a/"},
		"a URL that is local": {Dir: dir, QueryURL: "file:///etc/passwd"},
	} {
		if p, err := New(c); err == nil {
			t.Errorf("%s: taken: %+v", name, p.cfg)
		}
	}
}

// What is known is told without a question, and what is not is no question either.
func TestKnownAsksNobody(t *testing.T) {
	f := azure(nic(mac1, "10.0.0.0/24", 3), nic(mac2, "10.1.0.0/24", 2))
	p := newPool(t, f)
	if _, err := p.KnownNICs(t.Context()); !errors.Is(err, ErrSource) || f.questions() != 0 {
		t.Errorf("of a new VM: %v after %d questions", err, f.questions())
	}
	p.must(t, Request{Owner: "o"})
	f.pass(time.Hour)
	nics, err := p.KnownNICs(t.Context())
	if err != nil || len(nics) != 2 || nics[0].MAC != mac1 || nics[1].MAC != mac2 || f.questions() != 1 {
		t.Errorf("known are %+v after %d questions: %v", nics, f.questions(), err)
	}
}
