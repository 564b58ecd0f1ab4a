// Copyright (c) The azure-vnet authors. MIT licence.

package ruleset

import (
	"flag"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"azurevnet/internal/vnetsim"
)

var update = flag.Bool("update", false, "write the golden files instead of comparing with them")

// inNamespace runs f on a thread of its own in a new network namespace, which ends with it.
func inNamespace(t testing.TB, f func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make network namespaces")
	}
	if err := vnetsim.InNewNamespace(f); err != nil {
		t.Error(err)
	}
}

func shell(t testing.TB, line string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", line).CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v\n%s", line, err, out)
	}
	return string(out)
}

func prefixes(list ...string) []netip.Prefix {
	out := []netip.Prefix{}
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// example is a host with two NICs, and an endpoint of each kind in the network.
func example(n Policy, endpoints int, change func(*Endpoint)) Config {
	c := Config{Bridges: true, NICs: []string{"eth0", "eth1"}, Subnets: prefixes("10.240.0.0/16", "203.0.112.0/24"), Policies: []Policy{n}}
	for i := range endpoints {
		e := Endpoint{Link: "azv0000000000" + string('1'+rune(i)), MAC: net.HardwareAddr{2, 0x42, 10, 240, 0, byte(5 + i)}, Addr: netip.AddrFrom4([4]byte{10, 240, 0, byte(5 + i)}),
			BridgeMAC: net.HardwareAddr{6, 0x0d, 0x3a, 4, 0, 1}, NIC: "eth0", PolicyID: n.ID}
		if i%2 == 1 {
			e.BridgeMAC = nil
		}
		if change != nil {
			change(&e)
		}
		c.Endpoints = append(c.Endpoints, e)
	}
	return c
}

// The tables are, as nft lists them, what their golden file says. Writing them again changes nothing, and they
// are mended wherever anybody cut. nft can load what it lists.
func TestTables(t *testing.T) {
	on := Policy{ID: "0a1b2c3d", SNAT: true}
	for name, c := range map[string]Config{
		"no-endpoint":    example(on, 0, nil),
		"bridge":         example(on, 1, nil),
		"both-modes":     example(on, 2, nil),
		"no-bridge":      {NICs: []string{"eth0"}, Policies: []Policy{on}},
		"snat-off":       example(Policy{ID: "0a1b2c3d"}, 2, nil),
		"direct":         example(Policy{ID: "0a1b2c3d", SNAT: true, Direct: prefixes("10.240.0.0/16", "172.16.0.0/12", "168.63.128.0/20", "169.254.0.0/16")}, 1, nil),
		"direct-all":     example(Policy{ID: "0a1b2c3d", SNAT: true, Direct: prefixes("0.0.0.0/0")}, 1, nil),
		"direct-nothing": example(Policy{ID: "0a1b2c3d", SNAT: true, Direct: prefixes()}, 1, nil),
		"internal":       example(Policy{ID: "0a1b2c3d"}, 2, func(e *Endpoint) { e.Internal = true }),
		"no-metadata":    example(on, 1, func(e *Endpoint) { e.NoMetadata = true }),
		"published": example(on, 2, func(e *Endpoint) {
			last := uint16(e.Addr.As4()[3])
			e.Ports = []Port{{HostPort: 8080 + last, Port: 80}, {UDP: true, HostAddr: netip.MustParseAddr("127.0.0.1"), HostPort: 5300 + last, Port: 53}}
		}),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inNamespace(t, func() { checkTables(t, name, c) })
		})
	}
}

func checkTables(t *testing.T, name string, c Config) {
	sync := func() []string {
		changed, err := c.Sync()
		if err != nil {
			t.Errorf("write the tables: %v", err)
		}
		return changed
	}
	list := func() string { return printTables(t) }
	if len(sync()) == 0 {
		t.Error("the first write changes nothing")
	}
	want := list()
	if again := sync(); len(again) > 0 {
		t.Errorf("writing the same again changes %q", again)
	}
	if wrong, err := c.Differences(); err != nil || len(wrong) > 0 {
		t.Errorf("differences of what stands: %q, %v", wrong, err)
	}
	golden(t, filepath.Join("testdata", name+".nft"), want)
	shell(t, "nft list ruleset | nft -c -f -")

	cuts := []string{
		"nft flush ruleset",
		"nft flush table ip azure_vnet",
		"nft delete element ip azure_vnet nics { eth0 }",
		"nft add element ip azure_vnet nics { eth9 }",
		"nft add chain ip azure_vnet another",
		"nft insert rule ip azure_vnet forward accept",
		"nft replace rule ip azure_vnet metadata handle $(nft -a list chain ip azure_vnet metadata | awk '/drop/{print $NF; exit}') accept",
		"nft add set ip azure_vnet another '{ type ipv4_addr; }'",
	}
	if c.Bridges {
		cuts = append(cuts, "nft flush chain bridge azure_vnet prerouting", "nft delete table bridge azure_vnet")
	}
	for _, cut := range cuts {
		shell(t, cut)
		if wrong, err := c.Differences(); err != nil || len(wrong) == 0 {
			t.Errorf("%s: not noticed: %v", cut, err)
		}
		if len(sync()) == 0 {
			t.Errorf("%s: nothing is mended", cut)
		}
		if diff := cmp.Diff(want, list()); diff != "" {
			t.Errorf("%s: not mended (-want +got):\n%s", cut, diff)
		}
	}
	for range 2 {
		if err := DeleteTables(); err != nil {
			t.Errorf("drop the tables: %v", err)
		}
	}
	if left := shell(t, "nft list ruleset"); left != "" {
		t.Errorf("left after the tables were dropped:\n%s", left)
	}
}

// One endpoint more or less is the same whether it is added to tables that stand, or they are written with it.
func TestOneEndpoint(t *testing.T) {
	all := example(Policy{ID: "0a1b2c3d", SNAT: true}, 4, func(e *Endpoint) {
		e.NoMetadata = e.Addr.As4()[3] == 7
		e.Ports = []Port{{HostPort: 8080 + uint16(e.Addr.As4()[3]), Port: 80}}
	})
	before := all
	before.Endpoints = all.Endpoints[:2]
	inNamespace(t, func() {
		list := func() string { return printTables(t) }
		if _, err := all.Sync(); err != nil {
			t.Error(err)
		}
		with := list()
		if _, err := before.Sync(); err != nil {
			t.Error(err)
		}
		without := list()
		var conn Conn
		defer conn.Close()
		for _, e := range all.Endpoints[2:] {
			if err := conn.RemoveEndpoint(all, e); err != nil {
				t.Errorf("remove what is not there: %v", err)
			}
			if missing, err := all.Missing(e); err != nil || len(missing) == 0 {
				t.Errorf("missing before: %q, %v", missing, err)
			}
			if err := conn.AddEndpoint(all, e); err != nil {
				t.Error(err)
			}
			if missing, err := all.Missing(e); err != nil || len(missing) > 0 {
				t.Errorf("missing after: %q, %v", missing, err)
			}
		}
		if diff := cmp.Diff(with, list()); diff != "" {
			t.Errorf("added (-want +got):\n%s", diff)
		}
		published, err := ReadPublished()
		if err != nil {
			t.Error(err)
		}
		for _, e := range all.Endpoints {
			if diff := cmp.Diff(e.Ports, published[e.Addr], cmpopts.EquateComparable(netip.Addr{})); diff != "" {
				t.Errorf("published of %s (-want +got):\n%s", e.Addr, diff)
			}
		}
		for _, e := range all.Endpoints[2:] {
			if err := conn.RemoveEndpoint(all, e); err != nil {
				t.Error(err)
			}
		}
		if diff := cmp.Diff(without, list()); diff != "" {
			t.Errorf("removed (-want +got):\n%s", diff)
		}
	})
}

// TablesExist is false until the tables have the chain of the network.
func TestStands(t *testing.T) {
	on, other := Policy{ID: "0a1b2c3d", SNAT: true}, Policy{ID: "ffffffff", SNAT: true}
	inNamespace(t, func() {
		for _, tt := range []struct {
			what  string
			sync  Config
			n     Policy
			parts []OptionalTable
			want  bool
		}{
			{"nothing", Config{}, on, nil, false},
			{"a bridge", example(on, 0, nil), on, []OptionalTable{ForBridges}, true},
			{"another network", example(on, 0, nil), other, []OptionalTable{ForBridges}, false},
			{"a network that needs no chain", example(on, 0, nil), Policy{ID: "eeeeeeee"}, []OptionalTable{ForBridges}, true},
			{"no transparent endpoint yet", example(on, 1, nil), on, []OptionalTable{ForTransparent}, false},
			{"transparent ones", example(on, 2, nil), on, []OptionalTable{ForTransparent}, true},
		} {
			if tt.sync.NICs != nil {
				if _, err := tt.sync.Sync(); err != nil {
					t.Error(err)
				}
			}
			if got, err := TablesExist(tt.n, tt.parts...); got != tt.want || err != nil {
				t.Errorf("%s: %v, %v, want %v", tt.what, got, err, tt.want)
			}
		}
	})
}

// printTables prints the tables in one order.
func printTables(t testing.TB) string {
	t.Helper()
	return sortElements(shell(t, "for family in bridge arp ip; do nft -nn list table $family azure_vnet 2>/dev/null; done; true"))
}

func TestSpans(t *testing.T) {
	for _, tt := range []struct {
		a, b []netip.Prefix
		want []addrRange
	}{
		{nil, nil, nil},
		{prefixes("10.0.0.0/8"), nil, []addrRange{{10 << 24, 11<<24 - 1}}},
		{prefixes("10.0.0.0/9", "10.128.0.0/9", "fd00::/8"), nil, []addrRange{{10 << 24, 11<<24 - 1}}},
		{prefixes("0.0.0.0/0"), prefixes("0.0.0.0/1"), []addrRange{{1 << 31, 1<<32 - 1}}},
		{prefixes("0.0.0.0/0"), prefixes("255.255.255.255/32"), []addrRange{{0, 1<<32 - 2}}},
		{prefixes("10.0.0.0/30"), prefixes("10.0.0.1/32", "10.0.0.3/32"), []addrRange{{10 << 24, 10 << 24}, {10<<24 + 2, 10<<24 + 2}}},
		{prefixes("10.0.0.1/32"), prefixes("10.0.0.0/8"), nil},
	} {
		if got := subtractRanges(rangesOf(tt.a...), rangesOf(tt.b...)); !slices.Equal(got, tt.want) {
			t.Errorf("%v without %v: %v, want %v", tt.a, tt.b, got, tt.want)
		}
	}
}

// sortElements puts a listing's elements, which a hash gives in any order, one on a line and in order.
func sortElements(listing string) string {
	var out strings.Builder
	for {
		before, rest, ok := strings.Cut(listing, "elements = {")
		out.WriteString(before)
		if !ok {
			return out.String()
		}
		elements, after, _ := strings.Cut(rest, "}")
		var list []string
		for e := range strings.SplitSeq(elements, ",") {
			list = append(list, strings.Join(strings.Fields(e), " "))
		}
		slices.Sort(list)
		out.WriteString("elements = {\n\t\t\t" + strings.Join(list, ",\n\t\t\t") + " }")
		listing = after
	}
}

// golden compares got with a file, or with -update writes it.
func golden(t testing.TB, file, got string) {
	t.Helper()
	if *update {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Error(err)
		}
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Error(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Errorf("golden file: %v (make it with -update)", err)
		return
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}
