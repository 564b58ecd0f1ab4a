// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "write the golden files instead of comparing with them")

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
	for _, mode := range Modes {
		t.Run(string(mode), func(t *testing.T) {
			t.Parallel()
			test(t, mode)
		})
	}
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
	return h.Do(func() error { return h.Remove(h.t.Context(), name) })
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

// ip runs lines of the ip tool.
func (h *host) ip(lines ...string) {
	h.t.Helper()
	for _, line := range lines {
		h.run("ip", strings.Fields(line)...)
	}
}

func (h *host) run(name string, arg ...string) string {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
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

// try reports whether a line of the shell succeeds on the VM.
func (h *host) try(line string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
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
	h.sh("ip netns add " + c.name + " && ip netns exec " + c.name + " ip link set lo up")
	return c
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
func (h *host) running(n int, mode Mode, p Policy, ports ...Port) *container {
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

func ping(to netip.Addr) string { return fmt.Sprintf("busybox ping -q -c 1 -W 1 %s", to) }

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
		c.expect(want, fmt.Sprintf("%s on %s pings %s", from.name, from.Name, a), func() bool { return from.try(ping(a)) })
	}
}

func (c *checks) hostPings(want bool, from *host, to ...netip.Addr) {
	for _, a := range to {
		c.expect(want, fmt.Sprintf("%s pings %s", from.Name, a), func() bool { return from.try(ping(a)) })
	}
}

// kernelState is what of ours lies in the kernel, as text.
func (h *host) kernelState() string {
	h.t.Helper()
	var out strings.Builder
	if err := h.Do(func() error {
		all, err := h.Attachments(context.Background())
		slices.SortFunc(all, func(a, b Attachment) int { return strings.Compare(a.Link, b.Link) })
		for _, a := range all {
			fmt.Fprintf(&out, "%+v\n", a)
		}
		return err
	}); err != nil {
		h.t.Fatal(err)
	}
	for _, family := range []string{"bridge", "arp", "ip"} {
		out.WriteString(sortElements(h.sh("nft list table " + family + " azure_vnet 2>/dev/null || true")))
	}
	for _, cmd := range []string{
		"bridge fdb show | grep static | grep azv", "bridge -d link show | grep -A1 azv | sed 's/^[0-9]*: //;s/@[^:]*//'",
		"ip neigh show nud permanent proto 168", "ip route show table all proto 168", "ip rule show | grep -v from.all.lookup",
		"ip -o -d link show type bridge | sed 's/^[0-9]*: //;s/ *[a-z_]*timer *[0-9.]*//g;s/gc_timer.*//'",
	} {
		lines := strings.Split(h.sh(cmd+" || true"), "\n")
		slices.Sort(lines)
		out.WriteString(cmd + strings.Join(lines, "\n") + "\n")
	}
	return out.String()
}

// checkSame compares pictures of a host.
func checkSame(t *testing.T, what, want, got string) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// checkFabric fails the test for any frame that the fabric refused, and for an address of which it
// accepted none.
func checkFabric(t *testing.T, v *vnetsim.VNet, used ...netip.Addr) {
	t.Helper()
	got, err := v.Violations()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]uint64{}, got); diff != "" {
		t.Errorf("violations of the fabric's rules (-want +got):\n%s", diff)
	}
	accepted, err := v.Accepted()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range used {
		if accepted[a] == 0 {
			t.Errorf("the fabric accepted no frame from %s: nothing was shown of it", a)
		}
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
