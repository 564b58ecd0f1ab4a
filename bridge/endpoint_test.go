// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"

	"github.com/google/go-cmp/cmp"
)

// container is a namespace on a VM.
type container struct {
	*host
	name string
	addr netip.Addr
}

// container makes the namespace of the VM's n-th secondary address.
func (h *host) container(n int) *container {
	h.t.Helper()
	c := &container{h, fmt.Sprintf("c%d", n), h.Secondaries()[n]}
	h.run("sh", "-c", "ip netns add "+c.name+" && ip netns exec "+c.name+" ip link set lo up")
	return c
}

// endpoint is the wish for c's interface.
func (c *container) endpoint(p Policy) Endpoint {
	return Endpoint{
		Owner: "cni/net/" + c.name + "/eth0", Bridge: "azure0", Addr: netip.PrefixFrom(c.addr, c.Prefix.Bits()), Gateway: c.Gateway,
		Policy: p, Netns: fmt.Sprintf("/proc/%d/root/run/netns/%s", c.PidOne(), c.name), IfName: "eth0",
	}
}

func (h *host) attach(e Endpoint) (a Attachment, err error) {
	return a, errors.Join(h.Do(func() error { a, err = h.Attach(h.t.Context(), e); return nil }), err)
}

func (h *host) mustAttach(e Endpoint) Attachment {
	h.t.Helper()
	var a Attachment
	if err := h.Do(func() (err error) { a, err = h.Attach(h.t.Context(), e); return err }); err != nil {
		h.t.Fatal(err)
	}
	return a
}

func (h *host) detach(owner string) error {
	return h.Do(func() error { return h.Detach(h.t.Context(), owner) })
}

func (h *host) mustEnsure() {
	h.t.Helper()
	if err := h.Do(func() error { _, err := h.Ensure(h.t.Context(), h.spec()); return err }); err != nil {
		h.t.Fatal(err)
	}
}

// sh runs a shell's line in the container, and try tells whether it succeeds.
func (c *container) sh(line string) string {
	c.t.Helper()
	return c.run("ip", "netns", "exec", c.name, "sh", "-c", line)
}

func (c *container) try(line string) bool {
	return attempt(c.host.VM, "ip", "netns", "exec", c.name, "sh", "-c", line)
}

func attempt(vm *vnetsim.VM, name string, arg ...string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_, err := vm.Run(ctx, name, arg...)
	return err == nil
}

func ping(to netip.Addr) string { return fmt.Sprintf("busybox ping -q -c 1 -W 1 %s", to) }

// kernelState is what of attachments lies in the kernel, as text.
func (h *host) kernelState() string {
	h.t.Helper()
	var out strings.Builder
	if err := h.Do(func() error {
		all, err := h.Attachments(context.Background())
		for _, a := range all {
			fmt.Fprintf(&out, "%+v\n", a)
		}
		return err
	}); err != nil {
		h.t.Fatal(err)
	}
	out.WriteString(sortElements(h.run("nft", "list", "table", "bridge", "azure_vnet")))
	for _, cmd := range []string{"bridge fdb show br azure0 | grep static | grep azv", "bridge -d link show | grep -A1 azv | sed 's/^[0-9]*: //;s/@[^:]*//'", "ip neigh show nud permanent | grep ' 02:42:'"} {
		lines := strings.Split(h.run("sh", "-c", cmd+" || true"), "\n")
		slices.Sort(lines)
		out.WriteString(cmd + strings.Join(lines, "\n") + "\n")
	}
	return out.String()
}

// checkViolations fails the test for any frame that the fabric refused.
func checkViolations(t *testing.T, v *vnetsim.VNet) {
	t.Helper()
	got, err := v.Violations()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]uint64{}, got); diff != "" {
		t.Errorf("violations of the fabric's rules (-want +got):\n%s", diff)
	}
}

// Containers reach all that a VM reaches and are reached, under any FORWARD
// policy and with or without bridge-nf-call-iptables; the internet with SNAT
// only; the host agent's HTTP never. Whatever a container sends, the fabric
// sees nothing that it has to refuse.
func TestContainersOnTheVNet(t *testing.T) {
	t.Parallel()
	v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 3}, vnetsim.VMConfig{Secondaries: 1})
	h1, h2 := hosts[0], hosts[1]
	for _, h := range hosts {
		h.mustEnsure()
	}
	on, off, plain, far := h1.container(0), h1.container(1), h1.container(2), h2.container(0)
	h1.mustAttach(on.endpoint(Policy{SNAT: true}))
	h1.mustAttach(off.endpoint(Policy{}))
	h1.mustAttach(plain.endpoint(Policy{SNAT: true, Direct: prefixes("10.240.0.0/16")}))
	h2.mustAttach(far.endpoint(Policy{SNAT: true}))
	for _, call := range []string{"0", "1"} {
		for _, policy := range []string{"ACCEPT", "DROP"} {
			t.Run(fmt.Sprintf("forward %s call-iptables %s", policy, call), func(t *testing.T) {
				for _, h := range hosts {
					h.run("iptables-nft", "-P", "FORWARD", policy)
					if err := h.Do(func() error { _, err := h.setSysctl("bridge/bridge-nf-call-iptables", call); return err }); err != nil {
						t.Fatal(err)
					}
				}
				checkPaths(t, on, off, plain, far)
			})
		}
	}
	var wait sync.WaitGroup
	for _, c := range []*container{on, off, far} {
		wait.Go(c.noise)
		wait.Go(func() {
			if c.try(fmt.Sprintf("ip route add 168.63.129.16 via %s; curl -s -m 1 http://168.63.129.16:32526/", c.Primary)) {
				t.Errorf("%s on %s fetches from the host agent by its host", c.name, c.Name)
			}
		})
	}
	wait.Wait()
	checkViolations(t, v)
}

func checkPaths(t *testing.T, on, off, plain, far *container) {
	// All at once: what is to fail takes its second to.
	var wait sync.WaitGroup
	defer wait.Wait()
	expect := func(want bool, what string, try func() bool) {
		wait.Go(func() {
			if got := try(); got != want {
				t.Errorf("%s: %v, want %v", what, got, want)
			}
		})
	}
	pings := func(want bool, from *container, to ...netip.Addr) {
		for _, a := range to {
			expect(want, fmt.Sprintf("%s on %s pings %s", from.name, from.Name, a), func() bool { return from.try(ping(a)) })
		}
	}
	for _, c := range []*container{on, off, plain} {
		pings(true, c, on.addr, off.addr, plain.addr, far.addr, on.Primary, far.Primary, vnetsim.HostAgentAddr)
		pings(true, far, c.addr)
		expect(true, "its host pings "+c.name, func() bool { return attempt(c.VM, "sh", "-c", ping(c.addr)) })
		expect(true, "the other host pings "+c.name, func() bool { return attempt(far.VM, "sh", "-c", ping(c.addr)) })
		expect(false, c.name+" fetches from the host agent", func() bool { return c.try("curl -s -m 1 http://168.63.129.16/") })
		expect(true, c.name+" asks the host agent's DNS", func() bool { return c.try("busybox nslookup internet.test 168.63.129.16") })
	}
	for _, c := range []*container{on, plain} {
		expect(true, c.name+" is its VM to the internet", func() bool { return c.try("curl -s -m 5 http://203.0.113.10/ | grep -qx " + c.Public.String()) })
		expect(true, c.name+" asks IMDS", func() bool {
			return c.try("curl -s -m 5 -H Metadata:true 'http://169.254.169.254/metadata/instance/network?api-version=2021-02-01'")
		})
	}
	// Un-SNATed it leaves as it is, which Azure drops without calling it foul.
	pings(false, off, vnetsim.InternetAddr, vnetsim.IMDSAddr)
}

// noise sends what a VNet does not carry and what is not c's to send.
func (c *container) noise() {
	c.t.Helper()
	other := c.Secondaries()[0].Next().Next().Next().Next()
	c.try("busybox ping -q -c 1 -W 1 224.0.0.251")
	c.try("busybox ping -q -c 1 -W 1 -I eth0 255.255.255.255")
	c.try("sysctl -qw net.ipv6.conf.eth0.disable_ipv6=0 net.ipv6.conf.eth0.accept_dad=0; ip -6 addr add fe80::7/64 dev eth0; busybox ping -6 -q -c 1 -W 1 ff02::1%eth0; busybox ping -6 -q -c 1 -W 1 fe80::1234:5678:9abc%eth0")
	c.try(fmt.Sprintf("busybox arping -q -c 1 -w 1 -I eth0 -s %s %s", other, c.Gateway))
	c.try(fmt.Sprintf("busybox arping -q -D -c 1 -w 1 -I eth0 %s", other))
	foul := func(what, line string) {
		c.t.Helper()
		if c.try(line) {
			c.t.Errorf("%s on %s gets through with %s", c.name, c.Name, what)
		}
	}
	foul("another's address", fmt.Sprintf("ip addr add %s/32 dev eth0; busybox ping -q -c 1 -W 1 -I %[1]s %s; x=$?; ip addr del %[1]s/32 dev eth0; exit $x", other, c.Primary))
	mac := MACFor(c.addr)
	foul("another MAC", fmt.Sprintf("ip link set eth0 address 02:42:00:00:00:99; ip neigh flush dev eth0; busybox ping -q -c 1 -W 1 %s; x=$?; ip link set eth0 address %s; ip neigh flush dev eth0; exit $x", c.Primary, mac))
	foul("a VLAN tag", fmt.Sprintf("ip link add link eth0 name v0 type vlan id 0 && ip addr add %s/32 dev v0 && ip link set v0 up && ip route add %s dev v0 src %[1]s && ip neigh add %[2]s lladdr %[3]s dev v0; busybox ping -q -c 1 -W 1 -I v0 %[2]s; x=$?; ip link del v0; exit $x", other, c.Primary, c.MAC))
	if !c.try(fmt.Sprintf("ip route replace default via %s; %s", c.Gateway, ping(c.Primary))) {
		c.t.Errorf("%s on %s is cut off after it misbehaved", c.name, c.Name)
	}
}

// steps of an attach and of a detach, in order.
var (
	attachSteps = []string{"neighbour", "elements", "link", "port", "fdb", "namespace", "alias"}
	detachSteps = []string{"detach elements", "detach neighbour", "detach flows", "detach link"}
)

// at makes f meet what at the step, and reports whether it got there.
func (h *host) meets(step string, what func() error, f func()) (met bool) {
	h.Host.step = func(name string) error {
		if name != step {
			return nil
		}
		met = true
		return what()
	}
	defer func() { h.Host.step = nil }()
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

// An attach that fails leaves nothing, one that dies is finished by a repeat or
// cleared away by a detach, wherever it was; and so is a detach that dies.
func TestHalfDoneIsFinished(t *testing.T) {
	t.Parallel()
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
	h := hosts[0]
	h.mustEnsure()
	c := h.container(0)
	in := c.endpoint(Policy{SNAT: true})
	here := in
	here.Netns, here.IfName = "", ""
	for name, e := range map[string]Endpoint{"in its namespace": in, "left here": here} {
		h.mustAttach(e)
		whole := h.kernelState()
		if err := h.detach(e.Owner); err != nil {
			t.Fatal(err)
		}
		none := h.settled()
		check := func(what, want, got string) {
			t.Helper()
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s, %s (-want +got):\n%s", name, what, diff)
			}
		}
		for _, step := range attachSteps {
			if step == "namespace" && e.Netns == "" {
				continue
			}
			fail := errors.New("broken on purpose")
			if !h.meets(step, func() error { return fail }, func() {
				if _, err := h.attach(e); !errors.Is(err, fail) {
					t.Errorf("%s, broken at %q: %v", name, step, err)
				}
			}) {
				t.Errorf("%s: there is no step %q", name, step)
			}
			check("after a failure at "+step, none, h.settled())

			h.crash(step, func() { _, _ = h.attach(e) })
			h.mustAttach(e)
			check("repeated after a crash at "+step, whole, h.kernelState())
			if err := h.detach(e.Owner); err != nil {
				t.Error(err)
			}

			h.crash(step, func() { _, _ = h.attach(e) })
			if err := h.detach(e.Owner); err != nil {
				t.Error(err)
			}
			check("detached after a crash at "+step, none, h.settled())
		}
		for _, step := range detachSteps {
			h.mustAttach(e)
			if !h.crash(step, func() { _ = h.detach(e.Owner) }) {
				t.Errorf("there is no step %q", step)
			}
			if err := h.detach(e.Owner); err != nil {
				t.Error(err)
			}
			check("detached again after a crash at "+step, none, h.settled())
			if e.Netns == "" {
				h.mustAttach(e)
				h.crash(step, func() { _ = h.detach(e.Owner) })
				h.mustAttach(e)
				check("attached after a crash at "+step, whole, h.kernelState())
				if err := h.detach(e.Owner); err != nil {
					t.Error(err)
				}
			}
		}
	}
}

// settled is the kernel's state after a reconcile, which sweeps what no link
// tells of any more.
func (h *host) settled() string {
	h.t.Helper()
	h.reconcile()
	return h.kernelState()
}

// A process killed in the middle of an attach holds nobody up.
func TestKilledAttachIsFinished(t *testing.T) {
	t.Parallel()
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
	h := hosts[0]
	h.mustEnsure()
	c := h.container(0)
	e := c.endpoint(Policy{SNAT: true})
	h.mustAttach(e)
	whole := h.kernelState()
	if err := h.detach(e.Owner); err != nil {
		t.Fatal(err)
	}
	for _, step := range attachSteps {
		h.dieAttaching(e, step)
		h.mustAttach(e)
		if diff := cmp.Diff(whole, h.kernelState()); diff != "" {
			t.Errorf("repeated after a kill at %q (-want +got):\n%s", step, diff)
		}
		if err := h.detach(e.Owner); err != nil {
			t.Error(err)
		}
	}
}

const (
	attachDie   = "BRIDGE_TEST_ATTACH_DIE"
	attachAddr  = "BRIDGE_TEST_ATTACH_ADDR"
	attachRun   = "BRIDGE_TEST_ATTACH_RUN"
	attachOwner = "BRIDGE_TEST_ATTACH_OWNER"
	attachNetns = "BRIDGE_TEST_ATTACH_NETNS"
)

func init() {
	step := os.Getenv(attachDie)
	if step == "" {
		return
	}
	h := New(Config{Run: os.Getenv(attachRun)})
	h.step = func(name string) error {
		if name == step {
			return syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}
		return nil
	}
	addr := netip.MustParsePrefix(os.Getenv(attachAddr))
	_, err := h.Attach(context.Background(), Endpoint{
		Owner: os.Getenv(attachOwner), Bridge: "azure0", Addr: addr, Gateway: addr.Masked().Addr().Next(),
		Policy: Policy{SNAT: true}, Netns: os.Getenv(attachNetns), IfName: "eth0",
	})
	fmt.Fprintln(os.Stderr, "not killed:", err)
	os.Exit(0)
}

// dieAttaching attaches e in a process that kills itself at step.
func (h *host) dieAttaching(e Endpoint, step string) {
	h.t.Helper()
	exe, err := os.Executable()
	if err != nil {
		h.t.Fatal(err)
	}
	cmd := h.Command(h.t.Context(), exe)
	netns := e.Netns[strings.Index(e.Netns, "/root/")+len("/root"):] // the process is inside
	cmd.Env = append(os.Environ(), attachDie+"="+step, attachAddr+"="+e.Addr.String(), attachRun+"="+h.cfg.Run, attachOwner+"="+e.Owner, attachNetns+"="+netns)
	if out, err := cmd.CombinedOutput(); err == nil {
		h.t.Fatalf("the attach was to die at %q: %s", step, out)
	}
}

// Attaches at once do not disturb each other, and of two owners that want one
// address exactly one has it.
func TestAttachAtOnce(t *testing.T) {
	t.Parallel()
	_, hosts := newHosts(t, vnetsim.VMConfig{})
	h := hosts[0]
	h.mustEnsure()
	for _, p := range []Policy{{SNAT: true}, {}} { // whose chains stay when their endpoints are gone
		if err := h.Do(func() error { return h.Learn(t.Context(), p) }); err != nil {
			t.Fatal(err)
		}
	}
	none := h.kernelState()
	const n = 40
	wish := func(i, owner int) Endpoint {
		return Endpoint{Owner: fmt.Sprintf("docker/%d/%d", i, owner), Bridge: "azure0", Policy: Policy{SNAT: i%2 == 0},
			Addr: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 240, 1, byte(i)}), 16)}
	}
	var wait sync.WaitGroup
	var won [n]atomic.Int32
	for i := range n {
		for owner := range 2 {
			wait.Go(func() {
				if _, err := h.attach(wish(i, owner)); err == nil {
					won[i].Add(1)
				} else if !strings.Contains(err.Error(), "has the address") {
					t.Error(err)
				}
			})
		}
	}
	wait.Wait()
	for i := range won {
		if got := won[i].Load(); got != 1 {
			t.Errorf("%d owners got address %d", got, i)
		}
	}
	whole := h.kernelState()
	if mended := h.reconcile(); len(mended) > 0 {
		t.Errorf("not whole after attaches at once: %q", mended)
	}
	if diff := cmp.Diff(whole, h.kernelState()); diff != "" {
		t.Errorf("a reconcile changed what attaches made (-want +got):\n%s", diff)
	}
	for i := range n {
		for owner := range 2 {
			wait.Go(func() {
				if err := h.detach(wish(i, owner).Owner); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wait.Wait()
	if diff := cmp.Diff(none, h.settled()); diff != "" {
		t.Errorf("left after all are detached (-want +got):\n%s", diff)
	}
}
