// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// TestThePluginIsKilledInMidCall: containers and networks come and go all the time,
// and commands may fail; but no address has two holders, and nothing is left of it.
func TestThePluginIsKilledInMidCall(t *testing.T) {
	t.Parallel()
	const workers = 4
	kills := 1
	if test.Soaking {
		kills = 20
	}
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2 * workers}, vnetsim.VMConfig{})
	h, plain := vms[0], test.OnHost(vms[1])
	h.WithPlugin("COOL_DOWN=0s")
	h.Network("azure")
	h.Network("alone", "mode=transparent")
	networks := []string{"azure", "alone"}

	over := make(chan struct{})
	running := test.NewHolders(t)
	var all sync.WaitGroup
	storm := func(each func(i int)) {
		all.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-over:
					return
				default:
					each(i)
				}
			}
		})
	}
	for worker := range workers {
		storm(func(i int) {
			name := fmt.Sprintf("w%d-%d", worker, i)
			h.Try(test.Client, "run", "-d", "--init", "--network", networks[worker%2], "--name", name, "busybox", "sleep", "1000")
			out, _ := h.Try(test.Client, "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", name)
			if addr, err := netip.ParseAddr(out); err == nil {
				running.Take(addr, name)
				time.Sleep(rand.N(500 * time.Millisecond))
				running.Give(addr) // another may have it as soon as the engine is told
			}
			h.Try(test.Client, "rm", "-f", name)
		})
	}
	storm(func(i int) {
		name := fmt.Sprintf("net%d", i)
		h.Try(test.Client, "network", "create", "-d", test.Plugin, "--ipam-driver", test.Plugin, "--subnet", h.Prefix.String(), name)
		h.Try(test.Client, "network", "rm", name)
	})
	for range kills {
		// See TestSoak for the three seconds.
		kill := fmt.Sprintf("pid=$(busybox pidof azure-vnet-plugin) && [ $(ps -o etimes= -p $pid) -gt 3 ] && sleep 0.%03d && kill -9 $pid", rand.N(1000))
		test.Eventually(t, "the plugin runs, the engine is content, and it is killed", time.Minute, func() bool {
			_, err := h.Try("sh", "-c", kill)
			return err == nil
		})
	}
	close(over)
	all.Wait()
	t.Logf("FIGURE storms: %d kills", kills)

	for _, id := range strings.Fields(h.Docker("ps", "-aq")) {
		h.Docker("rm", "-f", id)
	}
	for _, id := range strings.Fields(h.Docker("network", "ls", "-q", "--filter", "name=^net")) {
		h.Docker("network", "rm", id)
	}
	h.LeasesAged()
	test.Eventually(t, "no lease and no link is left", 40*time.Second, func() bool { return counts(h) == 0 })
	h.Empty()
	listed := strings.Fields(h.Docker("network", "ls", "-q", "--no-trunc", "--filter", "driver="+test.Plugin))
	slices.Sort(listed)
	test.Eventually(t, "plugin and engine know the same networks", 2*time.Minute, func() bool {
		return cmp.Equal(listed, slices.Sorted(slices.Values(networkIDs(h))))
	})
	var used []netip.Addr
	for worker := range workers {
		name := fmt.Sprint("after", worker)
		addr := h.Container(networks[worker%2], name, "sleep 1000")
		used = append(used, addr)
		if _, err := plain.Try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
			t.Errorf("%s is not reached: %v", name, err)
		}
	}
	test.NothingDropped(t, vnet, used...)
}
