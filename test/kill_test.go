// Copyright (c) The azure-vnet authors. MIT licence.

package test

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
)

// TestThePluginIsKilledInMidCall: containers and networks come and go all the time,
// and commands may fail; but no address has two holders, and nothing is left of it.
func TestThePluginIsKilledInMidCall(t *testing.T) {
	t.Parallel()
	const workers = 4
	kills := 2
	if soaking {
		kills = 20
	}
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 2 * workers}, vnetsim.VMConfig{})
	h, plain := vms[0], onHost(vms[1])
	h.withPlugin("COOL_DOWN=0s")
	h.network("azure")
	h.network("alone", "mode=transparent")
	networks := []string{"azure", "alone"}

	over := make(chan struct{})
	running := newHolders(t)
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
			h.try(client, "run", "-d", "--init", "--network", networks[worker%2], "--name", name, "busybox", "sleep", "1000")
			out, _ := h.try(client, "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", name)
			if addr, err := netip.ParseAddr(out); err == nil {
				running.take(addr, name)
				time.Sleep(rand.N(500 * time.Millisecond))
				running.give(addr) // another may have it as soon as the engine is told
			}
			h.try(client, "rm", "-f", name)
		})
	}
	storm(func(i int) {
		name := fmt.Sprintf("net%d", i)
		h.try(client, "network", "create", "-d", plugin, "--ipam-driver", plugin, "--subnet", h.Prefix.String(), name)
		h.try(client, "network", "rm", name)
	})
	for range kills {
		// See TestSoak for the three seconds.
		kill := fmt.Sprintf("pid=$(busybox pidof azure-vnet-plugin) && [ $(ps -o etimes= -p $pid) -gt 3 ] && sleep 0.%03d && kill -9 $pid", rand.N(1000))
		eventually(t, "the plugin runs, the engine is content, and it is killed", time.Minute, func() bool {
			_, err := h.try("sh", "-c", kill)
			return err == nil
		})
	}
	close(over)
	all.Wait()

	for _, id := range strings.Fields(h.docker("ps", "-aq")) {
		h.docker("rm", "-f", id)
	}
	for _, id := range strings.Fields(h.docker("network", "ls", "-q", "--filter", "name=^net")) {
		h.docker("network", "rm", id)
	}
	h.leasesAged()
	eventually(t, "no lease and no link is left", 40*time.Second, func() bool { return h.counts() == 0 })
	h.empty()
	listed := strings.Fields(h.docker("network", "ls", "-q", "--no-trunc", "--filter", "driver="+plugin))
	slices.Sort(listed)
	eventually(t, "plugin and engine know the same networks", 2*time.Minute, func() bool {
		return cmp.Equal(listed, slices.Sorted(slices.Values(h.networks())))
	})
	var used []netip.Addr
	for worker := range workers {
		name := fmt.Sprint("after", worker)
		addr := h.container(networks[worker%2], name, "sleep 1000")
		used = append(used, addr)
		if _, err := plain.try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
			t.Errorf("%s is not reached: %v", name, err)
		}
	}
	clean(t, vnet, used...)
}
