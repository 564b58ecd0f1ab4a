// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"errors"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// TestEveryIpconfigIsCountedOnce, in status and in the error of who finds none: what is counted adds up to all.
func TestEveryIpconfigIsCountedOnce(t *testing.T) {
	f := azure(nic(mac1, "10.0.0.0/24", 8))
	p := newPool(t, f)
	f.occupied.onHost = map[netip.Addr]string{addr("10.0.0.10"): "eth0"}
	f.occupied.routed = map[netip.Addr]int{addr("10.0.0.11"): 17}
	f.occupied.nameOf = func(int) string { return "azv17" }
	counted := func(want string) {
		t.Helper()
		st, err := p.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		counts, err := p.CountIPConfigs(t.Context())
		if err != nil || len(counts) != 1 {
			t.Fatalf("counts are %+v: %v", counts, err)
		}
		for _, c := range []Census{st.NICs[0].Subnets[0].Census, counts[0].Subnets[0].Census} {
			if c.String() != want {
				t.Errorf("got  %s\nwant %s", c, want)
			}
			if sum := c.Own + c.Free + c.Held + c.Kept + c.Cooling + c.OnHost + c.Routed; sum != c.Configs {
				t.Errorf("%+v adds up to %d", c, sum)
			}
		}
	}
	p.must(t, Request{Owner: "cni/azure/c1/eth0"})
	counted("8 ipconfigs: 1 the NIC's own, 1 held, 1 on the host, 1 of other containers, 4 free")
	p.must(t, Request{Owner: "docker/pool", Linkless: true})
	ended := p.must(t, Request{Owner: "cni/azure/c2/eth0"})
	if _, err := p.Return(t.Context(), ended); err != nil {
		t.Fatal(err)
	}
	const kept = "1 kept for networks (auxiliary addresses) or another main plugin's containers, "
	counted("8 ipconfigs: 1 the NIC's own, 1 held, " + kept + "1 cooling, 1 on the host, 1 of other containers, 2 free")
	for range 3 {
		p.must(t, Request{Owner: "cni/azure/c3/eth0"})
	}
	const all = "8 ipconfigs: 1 the NIC's own, 4 held, " + kept + "1 on the host, 1 of other containers"
	counted(all)
	if _, err := p.Lease(t.Context(), Request{Owner: "cni/azure/c4/eth0"}); !errors.Is(err, ErrExhausted) || !strings.Contains(err.Error(), all) {
		t.Errorf("the error does not count so: %v", err)
	}
	f.list(nic(mac1, "10.0.0.0/24", 2)) // Azure took the others away
	f.pass(time.Minute)
	counted("2 ipconfigs: 1 the NIC's own, 1 held; and 4 held that Azure lists no more")
	f.fail(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "oops", http.StatusForbidden) })
	f.pass(time.Minute)
	counted("2 ipconfigs: 1 the NIC's own, 1 held; and 4 held that Azure lists no more")
}

// TestAnEmptyPoolCountsNothing, and asks nobody.
func TestAnEmptyPoolCountsNothing(t *testing.T) {
	p := newPool(t, azure(nic(mac1, "10.0.0.0/24", 8)))
	if counts, err := p.CountIPConfigs(t.Context()); err != nil || len(counts) > 0 {
		t.Errorf("counts are %+v: %v", counts, err)
	}
}
