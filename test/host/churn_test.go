// Copyright (c) The azure-vnet authors. MIT licence.

package host

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netns"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// churn is a VM with containers of Docker and CNI that come and go all the time, while somebody breaks its network.
type churn struct {
	test.Host
	peer netns.NsHandle // of another VM
	over chan struct{}  // closed when no more containers come

	mu     sync.Mutex
	harms  []harm         // guarded by mu
	calls  map[string]int // guarded by mu: how many were made, by kind
	failed map[string]int // guarded by mu: how many of them failed and were repeated, by kind, harm and error
}

// harm is a time in which calls may fail: what they are about to use is taken from them.
type harm struct {
	what     string
	docker   bool // the calls of Docker only
	from, to time.Time
}

// healTime is how long a breakage may last: a round every 30 s finds what sends no event.
const healTime = 40 * time.Second

// harmIn finds a harm to a call that ran between two times.
func (c *churn) harmIn(docker bool, from, to time.Time) (what string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, h := range c.harms {
		if (docker || !h.docker) && h.from.Before(to) && (h.to.IsZero() || h.to.After(from)) {
			what = h.what
		}
	}
	return what
}

// harming does something during which calls may fail.
func (c *churn) harming(what string, docker bool, do func()) {
	c.mu.Lock()
	i := len(c.harms)
	c.harms = append(c.harms, harm{what: what, docker: docker, from: time.Now()})
	c.mu.Unlock()
	do()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.harms[i].to = time.Now()
}

// varying matches what differs between errors of one kind.
var varying = regexp.MustCompile(`[dn]\d-\d\b|\baz[vc][0-9a-f]{11}\b|\b[0-9a-f]{64}\b|\b10\.\d+\.\d+\.\d+\b|\d+ms`)

// patiently repeats a call that fails because of a harm, as runtimes and people do.
func (c *churn) patiently(kind string, docker bool, call func() error) error {
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(500 * time.Millisecond) {
		start := time.Now()
		err := call()
		what := c.harmIn(docker, start, time.Now())
		c.mu.Lock()
		c.calls[kind]++
		if err != nil && what != "" {
			c.failed[fmt.Sprintf("%s, while %s: %s", kind, what, varying.ReplaceAllString(err.Error(), "…"))]++
		}
		c.mu.Unlock()
		if err == nil || what == "" || time.Now().After(end) {
			return err
		}
	}
}

// patient is the side whose calls are repeated.
func (c *churn) patient(s *side, kind string, docker bool) *side {
	start, end := s.start, s.end
	s.start = func(name string) (addr netip.Addr, err error) {
		err = c.patiently(kind+" starts", docker, func() error { addr, err = start(name); return err })
		return addr, err
	}
	s.end = func(name string) error { return c.patiently(kind+" ends", docker, func() error { return end(name) }) }
	return s
}

// comeAndGo has the containers of a side come and go until it is over. After each of them, all that run are reached, however
// the network was broken meanwhile.
func (c *churn) comeAndGo(s *side) {
	dice := rand.New(rand.NewPCG(rand.Uint64(), 0))
	for over := false; !over; {
		if name, err := s.one(dice); err != nil {
			c.T.Errorf("%s: %v", name, err)
		}
		if silent, err := test.Ping(c.peer, healTime, slices.Collect(maps.Values(s.has))...); err != nil || len(silent) > 0 {
			c.T.Errorf("of %v, the other VM does not reach %v: %v", s.has, silent, err)
		}
		select {
		case <-c.over:
			over = true
		default:
		}
	}
	if err := s.allGo(); err != nil {
		c.T.Error(err)
	}
}

// breakAll breaks the network in one way after the other, in an order that differs each time, until the time is over and
// every way was there. Then no more containers come.
func (c *churn) breakAll(length, pause time.Duration) (breakages map[string]int) {
	defer close(c.over)
	breakages = map[string]int{}
	ways := slices.Sorted(maps.Keys(test.Breakages))
	if test.Soaking {
		ways = append(ways, pluginKilled) // in make test, TestThePluginIsKilledInMidCall does so
	}
	for end := time.Now().Add(length); time.Now().Before(end); {
		rand.Shuffle(len(ways), func(i, j int) { ways[i], ways[j] = ways[j], ways[i] })
		for _, what := range ways {
			time.Sleep(rand.N(pause)) // a moment that is chosen, not waited for
			c.breaks(what)
			breakages[what]++
		}
	}
	return breakages
}

const pluginKilled = "the plugin is killed"

// breaks breaks the network in one way.
func (c *churn) breaks(what string) {
	shell := func() {
		if _, err := c.Try("sh", "-c", test.Breakages[what]); err != nil {
			c.T.Errorf("%s: %v", what, err)
		}
	}
	switch what {
	case pluginKilled:
		c.harming(what, true, func() {
			if _, err := c.Try("sh", "-c", "kill -9 $(busybox pidof azure-vnet-plugin)"); err != nil {
				c.T.Errorf("%s: %v", what, err)
			}
			// See TestSoak for the three seconds.
			test.Eventually(c.T, "the engine restarts the plugin and is content", time.Minute, func() bool {
				_, err := c.Try("sh", "-c", "[ $(ps -o etimes= -p $(busybox pidof azure-vnet-plugin)) -gt 3 ]")
				return err == nil
			})
		})
	case test.DeletesBridge:
		c.harming(what, false, shell)
	default:
		shell()
	}
}

// TestChurnWithBreakages: containers of Docker and CNI come and go at once on one VM, while its network is broken in every
// way every few seconds. No call fails but those from which a breakage takes what they are about to use, and these
// succeed when they are repeated. No address has two holders, each container is reached soon after each breakage, and
// nothing is left. make soak does it for as long as SOAK says.
func TestChurnWithBreakages(t *testing.T) {
	t.Parallel()
	length, pause := max(test.SoakTime, time.Second), time.Second
	if test.Soaking {
		pause = 6 * time.Second
	}
	const dockerSides, cniSides = 2, 3
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 64}, vnetsim.VMConfig{}) // what a killed plugin forgets is held for six minutes
	h := vms[0]
	h.WithPlugin()
	n := test.OnNode(h)
	h.Network("azure")
	lists := []string{test.Azure(), test.Azure(`"mode":"transparent"`)}
	c := &churn{Host: h, peer: test.OpenNamespace(t, vms[1].Namespace), over: make(chan struct{}), calls: map[string]int{}, failed: map[string]int{}}
	defer c.peer.Close()

	who := test.NewHolders(t)
	var all sync.WaitGroup
	for i := range dockerSides {
		all.Go(func() {
			c.comeAndGo(c.patient(dockerSide(h, fmt.Sprintf("d%d", i), who, false), "a container of Docker", true))
		})
	}
	for i := range cniSides {
		l := n.List("1.1.0", "azure", lists[i%2])
		all.Go(func() { c.comeAndGo(c.patient(cniSide(n, l, fmt.Sprintf("n%d", i), who), "a pod", false)) })
	}
	start := time.Now()
	defer all.Wait()
	breakages := c.breakAll(length, pause)
	all.Wait()
	calls, misfortunes := 0, 0
	for _, n := range c.calls {
		calls += n
	}
	for _, n := range breakages {
		misfortunes += n
	}
	t.Logf("FIGURE storms: %d calls, %d misfortunes", calls, misfortunes)
	t.Logf("in %v: %v, %v", time.Since(start).Round(time.Second), c.calls, breakages)
	for what, times := range c.failed {
		t.Logf("failed and repeated, %d times: %s", times, what)
	}

	test.Eventually(t, "all is as it should be", healTime, func() bool {
		_, err := h.Try(test.PluginBinary, "status")
		return err == nil
	})
	h.LeasesAged()
	h.Must(n.Dir+"/azure-vnet", "reconcile")
	test.Eventually(t, "no lease and no link is left", healTime, func() bool {
		s := h.State()
		return len(s.Leases)+len(s.Attachments) == 0
	})
	h.Empty()
	refused, err := vnet.Violations()
	if err != nil {
		t.Fatal(err)
	}
	strangers, err := vnet.Strangers()
	if err != nil {
		t.Fatal(err)
	}
	// While the route to a container is flushed, the host sends the other VM's pings back to the fabric.
	if len(refused) > 0 && refused["source_ip"] == strangers[vms[1].Primary] {
		delete(refused, "source_ip")
	}
	if len(refused) > 0 {
		t.Errorf("the fabric refused frames that break Azure's rules: %v, of these from addresses of others: %v", refused, strangers)
	}
}
