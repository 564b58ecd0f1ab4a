// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"

	"github.com/google/go-cmp/cmp"
)

// host is a VM of a simulated VNet, with its bridge package.
type host struct {
	*vnetsim.VM
	*Host
	t *testing.T
}

// newHosts starts a VNet with a VM for each config.
func newHosts(t *testing.T, cfgs ...vnetsim.VMConfig) (*vnetsim.VNet, []*host) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make network namespaces")
	}
	v, err := vnetsim.New(vnetsim.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := v.Close(); err != nil {
			t.Error(err)
		}
	})
	var hosts []*host
	for _, cfg := range cfgs {
		vm, err := v.AddVM(cfg)
		if err != nil {
			t.Fatal(err)
		}
		hosts = append(hosts, &host{VM: vm, Host: New(Config{Run: t.TempDir()}), t: t})
	}
	return v, hosts
}

// inBothModes runs a subtest for each mode.
func inBothModes(t *testing.T, test func(t *testing.T, mode Mode)) {
	t.Helper()
	inModes(t, Modes, test)
}

// inOneMode is for tests in which the modes hardly differ. make test runs half of these tests in each mode, and make soak
// all in both.
func inOneMode(t *testing.T, test func(t *testing.T, mode Mode)) {
	t.Helper()
	modes := Modes
	if !soaking {
		at := crc32.ChecksumIEEE([]byte(t.Name())) % 2
		modes = Modes[at : at+1]
	}
	inModes(t, modes, test)
}

func inModes(t *testing.T, modes []Mode, test func(t *testing.T, mode Mode)) {
	t.Helper()
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) {
			t.Parallel()
			test(t, mode)
		})
	}
}

// soaking says that make soak runs the tests: all cases of many that are alike.
var soaking = os.Getenv("SOAK") != ""

// callIptables lists the values of bridge-nf-call-iptables that a test of a mode tries. Packets of transparent links pass no
// bridge, so make test tries one value with them, and make soak both.
func callIptables(mode Mode) []string {
	if mode == ModeTransparent && !soaking {
		return []string{"1"}
	}
	return []string{"0", "1"}
}

// inShare reports whether a test runs the i-th of many cases that are alike: make test runs every eighth one in each
// mode, not the same ones, and make soak runs all.
func inShare(i int, mode Mode) bool {
	first := 0
	if mode == ModeTransparent {
		first = 1
	}
	return soaking || i%8 == first
}

func (h *host) spec(mode Mode) Spec {
	s := Spec{MAC: h.MAC, Primary: true, Mode: mode}
	for _, nic := range h.NICs() {
		s.NICs = append(s.NICs, nic.MAC)
	}
	return s
}

// specOf is for the n-th NIC.
func (h *host) specOf(n int, mode Mode) Spec {
	s := h.spec(mode)
	s.MAC, s.Primary = h.NICs()[n].MAC, n == 0
	return s
}

// ensure is the package's, on the VM.
func (h *host) ensure(spec Spec) (b Bridge, err error) {
	err = h.Do(func() (err error) { b, err = h.Ensure(h.t.Context(), spec); return err })
	return b, err
}

func (h *host) mustEnsure(spec Spec) Bridge {
	h.t.Helper()
	b, err := h.ensure(spec)
	if err != nil {
		h.t.Fatal(err)
	}
	return b
}

func (h *host) remove(name string) error {
	return h.Do(func() error { return h.RemoveBridge(h.t.Context(), name) })
}

func (h *host) removeAll() error {
	return h.Do(func() error {
		_, err := h.RemoveAll(h.t.Context(), func() error { return os.RemoveAll(h.path()) })
		return err
	})
}

func (h *host) reconcile() []string {
	h.t.Helper()
	var mended []string
	if err := h.Do(func() (err error) { mended, err = h.Reconcile(h.t.Context()); return err }); err != nil {
		h.t.Fatalf("reconcile: %v", err)
	}
	return mended
}

func (h *host) broken() []string {
	h.t.Helper()
	var wrong []string
	if err := h.Do(func() (err error) { wrong, err = h.Broken(h.t.Context()); return err }); err != nil {
		h.t.Fatalf("broken: %v", err)
	}
	return wrong
}

// whole fails the test if anything of ours is not as it should be.
func (h *host) whole(when string) {
	h.t.Helper()
	if wrong := h.broken(); len(wrong) > 0 {
		h.t.Errorf("%s: broken: %q", when, wrong)
	}
}

// ip runs lines of the ip tool, up to the first that fails.
func (h *host) ip(lines ...string) {
	h.t.Helper()
	h.sh("set -e\nip " + strings.Join(lines, "\nip "))
}

func (h *host) run(name string, arg ...string) string {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	out, err := h.Run(ctx, name, arg...)
	if err != nil {
		h.t.Fatal(err)
	}
	return out
}

// sh runs a line of the shell on the VM.
func (h *host) sh(line string) string {
	h.t.Helper()
	return h.run("sh", "-c", line)
}

// forgetFlows empties the VM's connection tracking.
func (h *host) forgetFlows() { h.sh("conntrack -F 2>/dev/null") }

// try reports whether a line of the shell succeeds on the VM.
func (h *host) try(line string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	_, err := h.Run(ctx, "sh", "-c", line)
	return err == nil
}

// container is a network namespace on a VM, with an address of one of its NICs.
type container struct {
	*host
	name string
	nic  vnetsim.NIC
	addr netip.Addr
}

// container makes the namespace of the n-th secondary address of eth0.
func (h *host) container(n int) *container { return h.containerOn(0, n) }

// containerOn makes the namespace of the n-th secondary address of a NIC.
func (h *host) containerOn(nic, n int) *container {
	h.t.Helper()
	is := h.NICs()[nic]
	c := &container{h, fmt.Sprintf("c%d-%d", nic, n), is, is.Secondaries[n]}
	h.netns(c.name)
	return c
}

// netns makes a network namespace on the VM.
func (h *host) netns(name string) {
	h.t.Helper()
	if err := h.AddNetns(name); err != nil {
		h.t.Fatal(err)
	}
}

// endpoint is the wish for c's interface.
func (c *container) endpoint(mode Mode, p Policy) Endpoint {
	e := Endpoint{
		Owner: "cni/net/" + c.name + "/eth0", NIC: c.nic.MAC, Addr: netip.PrefixFrom(c.addr, c.nic.Prefix.Bits()), Gateway: c.nic.Gateway,
		Policy: p, Netns: fmt.Sprintf("/proc/%d/root/run/netns/%s", c.PidOne(), c.name), IfName: "eth0",
	}
	if mode == ModeBridge {
		e.Bridge = c.bridgeName(c.nic.MAC)
	}
	return e
}

// bridgeName is that of a NIC's bridge as it stands.
func (h *host) bridgeName(mac string) (name string) {
	h.t.Helper()
	if err := h.Do(func() error {
		all, err := h.Bridges(h.t.Context())
		for _, b := range all {
			if b.NICMAC == mac {
				name = b.Name
			}
		}
		return err
	}); err != nil {
		h.t.Fatal(err)
	}
	return name
}

func (h *host) attach(e Endpoint) (a Attachment, err error) {
	err = h.Do(func() (err error) { a, err = h.Attach(h.t.Context(), e); return err })
	return a, err
}

func (h *host) mustAttach(e Endpoint) Attachment {
	h.t.Helper()
	a, err := h.attach(e)
	if err != nil {
		h.t.Fatal(err)
	}
	return a
}

func (h *host) detach(owner string) error {
	return h.Do(func() error { return h.Detach(h.t.Context(), owner) })
}

func (h *host) mustDetach(owner string) {
	h.t.Helper()
	if err := h.detach(owner); err != nil {
		h.t.Fatal(err)
	}
}

// run makes the n-th container of eth0 and attaches it.
func (h *host) running(n int, mode Mode, p Policy, ports ...PublishedPort) *container {
	h.t.Helper()
	c := h.container(n)
	e := c.endpoint(mode, p)
	e.Ports = ports
	h.mustAttach(e)
	return c
}

// in is a line of the shell that runs another in the container.
func (c *container) in(line string) string {
	return "ip netns exec " + c.name + " sh -c '" + strings.ReplaceAll(line, "'", `'\''`) + "'"
}

func (c *container) sh(line string) string {
	c.t.Helper()
	return c.host.sh(c.in(line))
}

func (c *container) try(line string) bool { return c.host.try(c.in(line)) }

// pings reports whether an address answers the container.
func (c *container) pings(to netip.Addr) bool { return c.PingsFrom(c.name, to) }

// checks runs what is to succeed and what is to fail at once: what fails takes its time.
type checks struct {
	t    *testing.T
	wait sync.WaitGroup
}

func (c *checks) expect(want bool, what string, try func() bool) {
	c.wait.Go(func() {
		if got := try(); got != want {
			c.t.Errorf("%s: %v, want %v", what, got, want)
		}
	})
}

func (c *checks) pings(want bool, from *container, to ...netip.Addr) {
	for _, a := range to {
		c.expect(want, fmt.Sprintf("%s on %s pings %s", from.name, from.Name, a), func() bool { return from.pings(a) })
	}
}

func (c *checks) hostPings(want bool, from *host, to ...netip.Addr) {
	for _, a := range to {
		c.expect(want, fmt.Sprintf("%s pings %s", from.Name, a), func() bool { return from.Pings(a) })
	}
}

// kernelState is what of ours lies in the kernel and under /run, with all nftables rules, as text. Link indexes and
// what counts or changes by itself are left out. It starts few processes, since tests call it often.
func (h *host) kernelState() string {
	h.t.Helper()
	var out strings.Builder
	part := func(title string, lines []string, keep func(string) bool) {
		slices.Sort(lines)
		lines = slices.DeleteFunc(lines, func(l string) bool { return !keep(l) })
		fmt.Fprintf(&out, "%s\n%s\n", title, strings.Join(lines, "\n"))
	}
	all := func(string) bool { return true }
	with := func(words ...string) func(string) bool {
		return func(l string) bool {
			return slices.ContainsFunc(words, func(w string) bool { return strings.Contains(l, w) })
		}
	}
	ours := with("proto 168")
	if err := h.Do(func() error {
		attachments, err := h.Attachments(context.Background())
		if err != nil {
			return err
		}
		var attached, settings []string
		for _, a := range attachments {
			attached = append(attached, fmt.Sprintf("%+v", a))
			settings = append(settings, settingsOf(a.Link)...)
		}
		part("ATTACHED", attached, all)
		tables := strings.SplitAfter(sortElements(command("nft", "-s", "list", "ruleset")), "\n}\n")
		part("NFT", tables, with("\t"))
		for _, c := range []struct {
			title, args string
			keep        func(string) bool
		}{
			{"FORWARDING", "bridge fdb show", func(l string) bool { return strings.Contains(l, " azv") && strings.Contains(l, "static") }},
			{"NEIGHBOURS", "ip neigh show nud permanent", ours},
			{"ROUTES", "ip route show table all", ours},
			{"RULES", "ip rule show", ours},
			{"LINKS", "ip -o -d link show", func(l string) bool { return strings.HasPrefix(l, "azv") || strings.HasPrefix(l, "azure") }},
			{"ADDRESSES", "ip -o addr show", with(" azv", " azure")},
		} {
			args := strings.Fields(c.args)
			part(c.title, strings.Split(passing.ReplaceAllString(command(args[0], args[1:]...), ""), "\n"), c.keep)
		}
		bridges, err := h.Bridges(context.Background())
		for _, b := range bridges {
			settings = append(settings, settingsOf(b.Name)...)
		}
		part("SETTINGS", settings, all)
		return err
	}); err != nil {
		h.t.Fatal(err)
	}
	for _, name := range []string{networkdDropIn, networkManagerDropIn} {
		text, _ := os.ReadFile(filepath.Join(h.cfg.Run, name))
		fmt.Fprintf(&out, "FILE %s\n%s", name, text)
	}
	return out.String()
}

// passing matches what of a listing differs between two hosts that are alike: indexes of links, the names of
// the namespaces of their peers, what counts, and what the kernel does some time after a link is up.
var passing = regexp.MustCompile(`(?m)^\d+: |@[\w-]+|link-netns\w* \S+| *\w*timer +[\d.]+|(port_no|port_id|designated_port|state|qdisc|tso_max_size) \S+|NO-CARRIER,|,LOWER_UP|(dead |linkdown )`)

// command is what a program prints in the calling thread's namespace. One that fails prints its error.
func command(name string, arg ...string) string {
	out, err := exec.Command(name, arg...).CombinedOutput()
	if err != nil {
		return fmt.Sprintf("%s: %v: %s", name, err, out)
	}
	return string(out)
}

// settingsOf are the sysctls that we set of a link of ours.
func settingsOf(link string) (out []string) {
	for _, s := range linkSysctls(link) {
		is, _ := os.ReadFile(filepath.Join("/proc/sys/net", s.name))
		out = append(out, s.name+": "+strings.TrimSpace(string(is)))
	}
	return out
}

// checkSame compares pictures of a host.
func checkSame(t *testing.T, what, want, got string) {
	t.Helper()
	if want == got {
		return
	}
	if diff := cmp.Diff(strings.Split(want, "\n"), strings.Split(got, "\n")); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// checkFabric fails the test for any frame that the fabric refused, and for an address of which it
// accepted none.
func checkFabric(t *testing.T, v *vnetsim.VNet, used ...netip.Addr) {
	t.Helper()
	if err := v.Proved(used...); err != nil {
		t.Error(err)
	}
}

// meets runs f, in which the named step meets what, and reports whether f got to it.
func (h *host) meets(step string, what func() error, f func()) (met bool) {
	h.testHook = func(name string) error {
		if name != step {
			return nil
		}
		met = true
		return what()
	}
	defer func() { h.testHook = nil }()
	f()
	return met
}

// crash runs f, which dies at the step without tidying up.
func (h *host) crash(step string, f func()) bool {
	type died struct{}
	return h.meets(step, func() error { panic(died{}) }, func() {
		defer func() {
			if r := recover(); r != nil && r != (died{}) {
				panic(r)
			}
		}()
		f()
	})
}

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

// shell runs a command in the calling thread's namespace.
func shell(t testing.TB, line string) string {
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

var errOnPurpose = errors.New("broken on purpose")
