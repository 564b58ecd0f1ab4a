// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "write the golden files instead of comparing with them")

// inNamespace runs f on a thread of its own in a new network namespace, which
// ends with it.
func inNamespace(t testing.TB, f func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make network namespaces")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends, and the namespace with it
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Errorf("new network namespace: %v", err)
			return
		}
		f()
	}()
	<-done
}

// sh runs a command in the calling thread's namespace.
func sh(t testing.TB, line string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", line).CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v\n%s", line, err, out)
	}
	return string(out)
}

func mustMAC(s string) net.HardwareAddr {
	mac, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return mac
}

func prefixes(list ...string) []netip.Prefix {
	out := []netip.Prefix{}
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// exampleInput is a host with that many bridges and endpoints on each.
func exampleInput(bridges, endpoints int, p Policy) tableInput {
	in := tableInput{
		endpoints: map[string]alias{},
		policies:  map[string]Policy{p.id(): p},
		held:      []netip.Addr{netip.MustParseAddr("10.240.0.4"), netip.MustParseAddr("172.17.0.1")},
		subnets:   map[string][]netip.Prefix{"azure0": prefixes("10.240.0.0/16")},
		away: awaySpans([]hostRoute{
			{dst: netip.MustParsePrefix("172.17.0.0/16"), away: true},
			{dst: netip.MustParsePrefix("10.240.0.0/16")},
			{dst: netip.MustParsePrefix("0.0.0.0/0"), away: true},
		}),
	}
	for i := range bridges {
		b := Bridge{
			Name: fmt.Sprintf("azure%d", i),
			NIC:  fmt.Sprintf("eth%d", i),
			MAC:  mustMAC(fmt.Sprintf("00:0d:3a:00:00:%02x", i+1)),
			MTU:  1500,
		}
		in.bridges = append(in.bridges, b)
		for n := range endpoints {
			addr := netip.AddrFrom4([4]byte{10, byte(240 + i), byte(n / 256), byte(n%256 + 7)})
			owner := fmt.Sprintf("docker/%s-%d", b.Name, n)
			host, _ := linkNames(owner)
			in.endpoints[host] = alias{netip.PrefixFrom(addr, 16), MACFor(addr), b.Name, p.id(), owner, owner, 0}
		}
	}
	return in
}

// TestTable holds that the table is, as nft lists it, what its golden file says,
// that writing it again changes nothing, and that it is mended where anyone cut.
func TestTable(t *testing.T) {
	policies := []struct {
		name   string
		policy Policy
	}{
		{"off", Policy{}},
		{"on", Policy{SNAT: true}},
		{"on-direct", Policy{SNAT: true, Direct: prefixes("10.240.0.0/16", "172.16.0.0/12", "168.63.128.0/20", "169.254.0.0/16")}},
		{"on-all", Policy{SNAT: true, Direct: prefixes("0.0.0.0/0")}},
		{"on-none", Policy{SNAT: true, Direct: prefixes()}},
	}
	for _, p := range policies {
		for _, bridges := range []int{1, 2} {
			for _, endpoints := range []int{0, 1, 3} {
				if endpoints != 1 && p.name != "on" {
					continue // a policy shows with its first endpoint
				}
				name := fmt.Sprintf("%s-%d-bridges-%d-endpoints", p.name, bridges, endpoints)
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					inNamespace(t, func() { checkTable(t, name, exampleInput(bridges, endpoints, p.policy)) })
				})
			}
		}
	}
}

func checkTable(t *testing.T, name string, in tableInput) {
	write := func() bool {
		changed, err := writeTable(in.table())
		if err != nil {
			t.Errorf("write the table: %v", err)
		}
		return changed
	}
	const list = "nft -nn list table bridge azure_vnet"
	if !write() {
		t.Error("the first write reports no change")
	}
	got := sortElements(sh(t, list))
	if write() {
		t.Error("writing the same table again reports a change")
	}
	sh(t, "nft list table bridge azure_vnet | nft -c -f -") // an administrator may save and load it
	golden(t, filepath.Join("testdata", "table", name+".nft"), got)

	for _, cut := range []string{
		"nft flush ruleset",
		"nft flush table bridge azure_vnet",
		"nft flush chain bridge azure_vnet endpoint",
		"nft flush map bridge azure_vnet ep4_azure0",
		"nft add element bridge azure_vnet ep4_azure0 { 10.9.9.9 : 02:00:00:00:00:01 }",
		"nft add chain bridge azure_vnet another",
		"nft insert rule bridge azure_vnet endpoint accept",
		"nft replace rule bridge azure_vnet agent handle $(nft -a list chain bridge azure_vnet agent | awk '/dport/{print $NF; exit}') accept",
	} {
		sh(t, cut)
		if !write() {
			t.Errorf("%s: not noticed", cut)
		}
		if diff := cmp.Diff(got, sortElements(sh(t, list))); diff != "" {
			t.Errorf("%s: not mended (-want +got):\n%s", cut, diff)
		}
	}
	if err := deleteTable(bridgeTable); err != nil {
		t.Errorf("delete the table: %v", err)
	}
	if err := deleteTable(bridgeTable); err != nil {
		t.Errorf("delete the table that is gone: %v", err)
	}
	if left := sh(t, "nft list ruleset"); left != "" {
		t.Errorf("left after the table is deleted:\n%s", left)
	}
}

// sortElements puts a listing's elements, which a hash gives in any order, one
// on a line and in order.
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
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
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
