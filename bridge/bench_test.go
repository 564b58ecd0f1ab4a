// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
)

// benchHost is a bridge in the calling thread's namespace with n endpoints,
// without a fabric.
func benchHost(b *testing.B, n int) (*Host, func(i int) Endpoint) {
	mac := mustMAC("00:0d:3a:00:00:01")
	h := New(Config{Run: b.TempDir()})
	br := Bridge{Name: "azure0", NIC: "eth0", MAC: mac, MTU: 1500}
	if err := createBridge(br); err != nil {
		b.Fatal(err)
	}
	l, err := netlink.LinkByName("azure0")
	if err != nil {
		b.Fatal(err)
	}
	if err := netlink.LinkSetAlias(l, bridgeAlias+"eth0 "+mac.String()); err != nil {
		b.Fatal(err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		b.Fatal(err)
	}
	wish := func(i int) Endpoint {
		return Endpoint{
			Owner: fmt.Sprintf("docker/%d", i), Bridge: "azure0", Policy: Policy{SNAT: true},
			Addr: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 240, byte(i >> 8), byte(i)}), 16),
		}
	}
	for i := range n {
		if _, err := h.Attach(b.Context(), wish(i+8)); err != nil {
			b.Fatal(err)
		}
	}
	return h, wish
}

func BenchmarkAttachDetach(b *testing.B) {
	for _, others := range []int{0, 250} {
		for _, ports := range [][]Port{nil, {{Proto: "tcp", HostPort: 8080, Port: 80}}} {
			b.Run(fmt.Sprintf("beside %d, %d ports", others, len(ports)), func(b *testing.B) {
				inNamespace(b, func() {
					h, wish := benchHost(b, others)
					if len(ports) > 0 { // else each would make the table
						first := wish(4095)
						first.Ports = []Port{{Proto: "tcp", HostPort: 8079, Port: 80}}
						if _, err := h.Attach(b.Context(), first); err != nil {
							b.Error(err)
							return
						}
					}
					e := wish(4096)
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

// BenchmarkSyncTable250 is a table of 250 endpoints that stands, and one that
// is made anew.
func BenchmarkSyncTable250(b *testing.B) {
	for _, flush := range []bool{false, true} {
		b.Run(fmt.Sprintf("flushed=%v", flush), func(b *testing.B) {
			inNamespace(b, func() {
				h, _ := benchHost(b, 250)
				bridges, err := h.Bridges(b.Context())
				if err != nil {
					b.Error(err)
					return
				}
				for b.Loop() {
					if flush {
						if err := deleteTable(bridgeTable); err != nil {
							b.Error(err)
						}
					}
					if changed, err := h.syncTable(bridges[0]); err != nil || changed != flush {
						b.Error(changed, err)
						return
					}
				}
			})
		})
	}
}

func BenchmarkSyncPorts250(b *testing.B) {
	inNamespace(b, func() {
		h, _ := benchHost(b, 250)
		bridges, _ := h.Bridges(b.Context())
		for b.Loop() {
			if mended, err := h.syncPorts(bridges[0]); err != nil || len(mended) > 0 {
				b.Error(mended, err)
				return
			}
		}
	})
}

func BenchmarkEnsureRulesThatStand(b *testing.B) {
	inNamespace(b, func() {
		h := New(Config{Run: b.TempDir()})
		one := []Bridge{{Name: "azure0"}}
		if _, err := h.ensureRules(one); err != nil {
			b.Error(err)
			return
		}
		for b.Loop() {
			if mended, err := h.ensureRules(one); err != nil || len(mended) > 0 {
				b.Error(mended, err)
			}
		}
	})
}
