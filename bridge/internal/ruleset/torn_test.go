// Copyright (c) The azure-vnet authors. MIT licence.

package ruleset

import (
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"testing"

	"github.com/google/nftables"
	"github.com/vishvananda/netns"
)

// othersCommit has another table of the calling thread's namespace change all the while.
func othersCommit(t *testing.T) (stop func()) {
	here, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	ended, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if err := netns.Set(here); err != nil {
			t.Error(err)
			return
		}
		others := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: "others"}
		for i := 0; ; i++ {
			select {
			case <-ended:
				return
			default:
			}
			for _, change := range []func(*nftables.Conn, *nftables.Chain){(*nftables.Conn).DelChain, func(c *nftables.Conn, ch *nftables.Chain) { c.AddChain(ch) }} {
				c, err := nftables.New()
				if err != nil {
					t.Error(err)
					return
				}
				for j := range 20 {
					change(c, &nftables.Chain{Table: others, Name: fmt.Sprintf("c%d", (20*i+j)%2000)})
				}
				if err := c.Flush(); err != nil {
					t.Error(err)
					return
				}
			}
		}
	}()
	return func() { close(ended); <-done; here.Close() }
}

// TestATableIsReadWholeWhileOthersCommit: kube-proxy and iptables commit to tables of their own in the same namespace.
// While they do, each reading of ours has all that is there.
func TestATableIsReadWholeWhileOthersCommit(t *testing.T) {
	inNamespace(t, func() {
		c := example(Policy{ID: "0a1b2c3d", SNAT: true}, 1, nil)
		one := c.Endpoints[0]
		c.Endpoints = nil
		for i := range 250 {
			one.Addr = netip.AddrFrom4([4]byte{10, 240, 1, byte(i)})
			c.Endpoints = append(c.Endpoints, one)
		}
		// A list of chains is one of all tables, and theirs come first.
		shell(t, "{ echo table ip others '{'; for i in $(seq 0 1999); do echo \"chain c$i { }\"; done; echo '}'; } | nft -f -")
		if _, err := c.Sync(); err != nil {
			t.Fatal(err)
		}
		stop := othersCommit(t)
		defer stop()
		readings := 25
		if os.Getenv("SOAK") != "" {
			readings = 500
		}
		for range readings {
			if is, err := c.Differences(); err != nil || len(is) > 0 {
				t.Fatalf("the tables stand, and are read as if not: %q %v", is, err)
			}
		}
	})
}
