// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"fmt"
	"net/netip"
	"os/exec"
	"testing"

	"azurevnet/bridge/internal/ruleset"
)

// benchHost is a host in the calling thread's namespace with n endpoints, and without a fabric. wish is
// of an endpoint that is not among them.
func benchHost(b *testing.B, mode Mode, n int) (h *Host, wish Endpoint) {
	b.Helper()
	const mac = "00:0d:3a:00:00:01"
	line := "ip link set lo up; ip link add eth0 address " + mac + " type veth peer name fabric; ip link set fabric up; " +
		"ip addr add 10.240.0.4/16 dev eth0; ip link set eth0 up; ip route add default via 10.240.0.1 dev eth0"
	if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	h = New(Config{Run: b.TempDir()})
	br, err := h.Ensure(b.Context(), Spec{MAC: mac, NICs: []string{mac}, Primary: true, Mode: mode})
	if err != nil {
		b.Fatal(err)
	}
	endpoint := func(i int) Endpoint {
		return Endpoint{
			Owner: fmt.Sprintf("docker/%d", i), NIC: mac, Bridge: br.Name, Policy: Policy{SNAT: true},
			Addr: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 240, byte(i >> 8), byte(i)}), 16),
		}
	}
	for i := range max(1, n) { // the first makes the policy's chain
		if _, err := h.Attach(b.Context(), endpoint(i+8)); err != nil {
			b.Fatal(err)
		}
	}
	if n == 0 {
		if err := h.Detach(b.Context(), endpoint(8).Owner); err != nil {
			b.Fatal(err)
		}
	}
	return h, endpoint(4096)
}

func BenchmarkAttachDetach(b *testing.B) {
	for _, mode := range Modes {
		for _, others := range []int{0, 250} {
			for _, ports := range [][]PublishedPort{nil, {{Proto: "tcp", HostPort: 8080, Port: 80}}} {
				b.Run(fmt.Sprintf("%s/beside=%d/ports=%d", mode, others, len(ports)), func(b *testing.B) {
					inNamespace(b, func() {
						h, e := benchHost(b, mode, others)
						e.Ports = ports
						for b.Loop() {
							if _, err := h.Attach(b.Context(), e); err != nil {
								b.Error(err)
								return
							}
							if err := h.Detach(b.Context(), e.Owner); err != nil {
								b.Error(err)
								return
							}
						}
					})
				})
			}
		}
	}
}

// BenchmarkQuietReconcile is a round that finds nothing to mend.
func BenchmarkQuietReconcile(b *testing.B) {
	for _, mode := range Modes {
		for _, n := range []int{0, 250} {
			b.Run(fmt.Sprintf("%s/endpoints=%d", mode, n), func(b *testing.B) {
				inNamespace(b, func() {
					h, _ := benchHost(b, mode, n)
					if _, err := h.Reconcile(b.Context()); err != nil {
						b.Error(err)
						return
					}
					for b.Loop() {
						if mended, err := h.Reconcile(b.Context()); err != nil || len(mended) > 0 {
							b.Error(mended, err)
							return
						}
					}
				})
			})
		}
	}
}

// BenchmarkSyncTables250 is the tables of 250 endpoints: as they stand, and made anew.
func BenchmarkSyncTables250(b *testing.B) {
	for _, mode := range Modes {
		for _, flush := range []bool{false, true} {
			b.Run(fmt.Sprintf("%s/flushed=%v", mode, flush), func(b *testing.B) {
				inNamespace(b, func() {
					h, _ := benchHost(b, mode, 250)
					v, err := h.readView()
					if err != nil {
						b.Error(err)
						return
					}
					c := v.rulesetConfig()
					for b.Loop() {
						if flush {
							if err := ruleset.DeleteTables(); err != nil {
								b.Error(err)
							}
						}
						if changed, err := c.Sync(); err != nil || len(changed) > 0 != flush {
							b.Error(changed, err)
							return
						}
					}
				})
			})
		}
	}
}
