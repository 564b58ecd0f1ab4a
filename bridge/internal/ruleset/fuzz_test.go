// Copyright (c) The azure-vnet authors. MIT licence.

package ruleset

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/google/nftables"
)

// numbers are a fuzzer's bytes, and zeros after their end.
type numbers []byte

func (n *numbers) next() byte {
	if len(*n) == 0 {
		return 0
	}
	b := (*n)[0]
	*n = (*n)[1:]
	return b
}

func (n *numbers) addr() netip.Addr {
	return netip.AddrFrom4([4]byte{n.next(), n.next(), n.next(), n.next()})
}

func (n *numbers) prefixes(most byte) []netip.Prefix {
	all := []netip.Prefix{}
	for range n.next() % (most + 1) {
		all = append(all, netip.PrefixFrom(n.addr(), int(n.next()%33)).Masked())
	}
	return all
}

// config is a host with what the bridge may ask for: links, addresses and ports of the host are of one endpoint each.
func (n *numbers) config() Config {
	flags := n.next()
	c := Config{Bridges: flags&1 != 0, Transparent: flags&2 != 0, NICs: []string{"eth0", "enP1s1"}[:1+flags>>2&1], Subnets: n.prefixes(3)}
	for i := range 1 + n.next()%3 {
		network := Policy{ID: fmt.Sprintf("0000000%d", i), SNAT: n.next()&1 != 0}
		if n.next()&1 != 0 {
			network.Direct = n.prefixes(6)
		}
		c.Policies = append(c.Policies, network)
	}
	for i := range n.next() % 6 {
		flags := n.next()
		e := Endpoint{Link: fmt.Sprintf("azv%011x", i), MAC: net.HardwareAddr{2, 0x42, n.next(), n.next(), n.next(), i}, Addr: n.addr(), NIC: c.NICs[int(flags)%len(c.NICs)],
			PolicyID: c.Policies[int(n.next())%len(c.Policies)].ID, Internal: flags&2 != 0, NoMetadata: flags&4 != 0}
		e.Addr = netip.AddrFrom4([4]byte(append(e.Addr.AsSlice()[:3], i))) // two endpoints never have one address
		if flags&8 != 0 && c.Bridges {
			e.BridgeMAC = net.HardwareAddr{6, 0x0d, 0x3a, 4, 0, n.next()}
		}
		if flags&16 != 0 {
			e.NIC = ""
		}
		for j := range n.next() % 4 {
			p := Port{UDP: j&1 != 0, HostPort: 1 + uint16(i)<<8 + uint16(j), Port: 1 + uint16(n.next())<<7}
			if n.next()&1 != 0 {
				p.HostAddr = n.addr()
			}
			e.Ports = append(e.Ports, p)
		}
		c.Endpoints = append(c.Endpoints, e)
	}
	return c
}

// FuzzReadBack writes the tables of one host and then of another over them, and reads each back: what the kernel tells
// is what was asked for. A difference would be mended by every round, for ever.
func FuzzReadBack(f *testing.F) {
	if os.Geteuid() != 0 {
		f.Skip("needs root, to make network namespaces")
	}
	f.Add([]byte{}, []byte{})
	f.Add([]byte{1, 1, 10, 240, 0, 0, 16, 0, 1, 0, 2, 8, 1, 2, 3, 10, 240, 0, 5, 0, 9, 1, 80, 0, 0, 1, 2, 3, 10, 240, 0, 6, 0, 3, 8, 1, 127, 0, 0, 1, 53, 0, 80, 0}, []byte{1})
	// Prefixes that touch, that lie in one another, and that end with the last address.
	f.Add([]byte{7, 3, 255, 255, 255, 255, 32, 0, 0, 0, 0, 0, 128, 0, 0, 0, 1, 0, 1, 1, 6, 10, 0, 0, 0, 9, 10, 128, 0, 0, 9, 10, 0, 0, 0, 8, 255, 255, 255, 254, 32, 255, 255, 255, 255, 32, 0, 0, 0, 0, 32}, []byte{2, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, first, second []byte) {
		inNamespace(t, func() {
			for _, n := range []numbers{first, second} {
				c := n.config()
				if _, err := c.Sync(); err != nil {
					t.Errorf("write %+v: %v", c, err)
					return
				}
				if wrong, err := c.Differences(); err != nil || len(wrong) > 0 {
					t.Errorf("%+v is read back with the differences %q, %v", c, wrong, err)
				}
				if changed, err := c.Sync(); err != nil || len(changed) > 0 {
					t.Errorf("writing %+v again changes %q, %v", c, changed, err)
				}
			}
		})
	})
}

// FuzzVerdict reads any value of a map of verdicts. For other bytes, the reading equals no verdict of an endpoint.
func FuzzVerdict(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{8, 0, 1, 0, 0xff, 0xff, 0xff, 0xfd, 7, 0, 2, 0, 'a', 'b', 0, 0}) // jump ab
	f.Add([]byte{5, 0, 1, 0, 0xff, 0, 0, 0})                                      // a code of one byte
	f.Add([]byte{4, 0, 2, 0})                                                     // a chain without a name
	f.Add([]byte{7, 0, 2, 0, 'a', 'b', 'c', 0})                                   // a name without an end
	f.Fuzz(func(t *testing.T, value []byte) {
		s := &nftables.Set{Name: "verdicts", IsMap: true}
		if word := valueOf(s, nftables.SetElement{Val: value}); len(word) > len(value)+len("goto ") {
			t.Errorf("%x is read as %q", value, word)
		}
	})
}
