// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestMain(m *testing.M) {
	if os.Getenv("VNETSIM_VICTIM") != "" {
		victim()
	}
	os.Exit(m.Run())
}

// newVNet starts a VNet that ends with the test, with a VM for each config.
func newVNet(t *testing.T, cfgs ...VMConfig) (*VNet, []*VM) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make namespaces")
	}
	t.Parallel() // most of the time is waiting for no answer
	return startVNet(t, cfgs...)
}

func startVNet(t *testing.T, cfgs ...VMConfig) (*VNet, []*VM) {
	t.Helper()
	v, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := v.Close(); err != nil {
			t.Error(err)
		}
	})
	var vms []*VM
	for _, cfg := range cfgs {
		vm, err := v.AddVM(cfg)
		if err != nil {
			t.Fatal(err)
		}
		vms = append(vms, vm)
	}
	return v, vms
}

// mustRun fails the test if the command fails, and returns its output.
func mustRun(t *testing.T, n *Namespace, name string, arg ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	out, err := n.Run(ctx, name, arg...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// wantPing fails the test if a ping of the size, in bytes of IP packet, is
// answered and should not, or the other way round. Linux forbids routers to
// fragment it. prefix is a command to run ping by.
func wantPing(t *testing.T, what string, want bool, n *Namespace, to netip.Addr, size int, prefix ...string) {
	t.Helper()
	args := append(prefix, "busybox", "ping", "-s", fmt.Sprint(size-28), "-c", "1", "-W", "1", to.String())
	for attempt := 0; ; attempt++ {
		_, err := n.Run(t.Context(), args[0], args[1:]...)
		answered := err == nil
		if answered == want {
			return
		}
		if answered || attempt == 5 { // a machine under load may miss a second
			t.Errorf("%s: a ping to %s is answered: %t, want %t: %v", what, to, answered, want, err)
			return
		}
	}
}

// wantViolations waits for the counters, which a frame on its way may reach
// after its sender has gone on.
func wantViolations(t *testing.T, v *VNet, want map[string]uint64) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		got, err := v.Violations()
		if err != nil {
			t.Fatal(err)
		}
		diff := cmp.Diff(want, got)
		if diff == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("violations (-want +got):\n%s", diff)
			return
		}
	}
}

func TestVMsReachEachOther(t *testing.T) {
	v, vms := newVNet(t, VMConfig{Secondaries: 3, MTU: 9000}, VMConfig{HoldSecondaries: true, Secondaries: 1, MTU: 9000},
		VMConfig{NICs: []NICConfig{{Subnet: netip.MustParsePrefix("10.1.2.0/24")}}})
	a, b, c := vms[0], vms[1], vms[2]
	type path struct {
		from *VM
		to   netip.Addr
		size int
	}
	for name, tt := range map[string]struct {
		path
		want bool
	}{
		"a primary":                  {path{a, b.Primary, 84}, true},
		"a jumbo frame":              {path{a, b.Primary, 9000}, true},
		"a jumbo frame to 1500":      {path{a, c.Primary, 9000}, false},
		"a secondary the host holds": {path{a, b.Secondaries()[0], 84}, true},
		"a secondary nobody holds":   {path{b, a.Secondaries()[0], 84}, false},
		"an address of nobody":       {path{a, netip.MustParseAddr("10.240.9.9"), 84}, false},
		"the gateway":                {path{a, a.Gateway, 84}, false},
		"another subnet's NIC":       {path{a, c.NICs()[1].Primary, 84}, true},
		"the internet":               {path{c, InternetAddr, 84}, true},
	} {
		wantPing(t, name, tt.want, tt.from.Namespace, tt.to, tt.size)
	}
	for _, vm := range vms {
		wantPing(t, "a probe", true, v.Internet, vm.Primary, 84)
	}
	wantViolations(t, v, map[string]uint64{})
}

func TestPathMTUIsLearned(t *testing.T) {
	v, vms := newVNet(t, VMConfig{Secondaries: 1}, VMConfig{})
	a, b := vms[0], vms[1]
	for _, bytes := range []int{-1, 575, 1501} {
		if err := v.SetInternetMTU(bytes); err == nil {
			t.Errorf("set %d bytes", bytes)
		}
	}
	learned := func(vm *VM, to netip.Addr) string {
		t.Helper()
		_, mtu, _ := strings.Cut(mustRun(t, vm.Namespace, "ip", "route", "get", to.String()), " mtu ")
		mtu, _, _ = strings.Cut(strings.TrimSpace(mtu), " ")
		return mtu
	}
	wantPing(t, "before", true, a.Namespace, InternetAddr, 1500)
	if err := v.SetInternetMTU(1400); err != nil {
		t.Fatal(err)
	}
	// TCP, before anything is learned: the far end offers segments for 1500.
	const size = 300_000
	var l net.Listener
	if err := v.Internet.Do(func() (err error) {
		l, err = net.Listen("tcp4", netip.AddrPortFrom(InternetAddr, 9).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	received := make(chan int64, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			received <- -1
			return
		}
		defer conn.Close()
		n, _ := io.Copy(io.Discard, conn)
		received <- n
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	conn, err := a.DialContext(ctx, "tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(make([]byte, size)); err != nil {
		t.Error(err)
	}
	conn.Close()
	select {
	case n := <-received:
		if n != size {
			t.Errorf("the internet received %d bytes, want %d", n, size)
		}
	case <-ctx.Done():
		t.Error("TCP stalls: the path MTU is a black hole")
	}
	if got := learned(a, InternetAddr); got != "1400" {
		t.Errorf("TCP learned %q, want 1400", got)
	}

	// A ping must not be fragmented until the VM knows the path.
	if got := learned(b, InternetAddr); got != "" {
		t.Errorf("before its first packet vm2 knows the path MTU %q", got)
	}
	if out, err := b.Run(t.Context(), "busybox", "ping", "-s", "1472", "-c", "1", "-W", "1", InternetAddr.String()); err == nil {
		t.Errorf("a packet of 1500 bytes passed: %s", out)
	}
	if got := learned(b, InternetAddr); got != "1400" {
		t.Errorf("ping learned %q, want 1400", got)
	}
	wantPing(t, "in fragments", true, b.Namespace, InternetAddr, 1500)

	// A container's learns through its VM's SNAT too.
	c := lend(t, a, a.Secondaries()[0])
	mustRun(t, a.Namespace, "ip", "route", "flush", "cache")
	mustRun(t, a.Namespace, "nft", fmt.Sprintf("add table ip t; add chain ip t c { type nat hook postrouting priority srcnat; }; add rule ip t c ip saddr %s snat to %s",
		a.Secondaries()[0], a.Primary))
	if out, err := a.Run(t.Context(), c[0], append(c[1:], "busybox", "ping", "-s", "1472", "-c", "1", "-W", "1", InternetAddr.String())...); err == nil {
		t.Errorf("a container's packet of 1500 bytes passed: %s", out)
	}
	if got := mustRun(t, a.Namespace, c[0], append(c[1:], "ip", "route", "get", InternetAddr.String())...); !strings.Contains(got, "mtu 1400") {
		t.Errorf("the container learned %q, want 1400", got)
	}

	for _, to := range []netip.Addr{b.Primary, HostAgentAddr} {
		wantPing(t, "elsewhere", true, a.Namespace, to, 1500)
		if got := learned(a, to); got != "" {
			t.Errorf("the path to %s has the MTU %s", to, got)
		}
	}
	if err := v.SetInternetMTU(0); err != nil {
		t.Fatal(err)
	}
	mustRun(t, b.Namespace, "ip", "route", "flush", "cache")
	wantPing(t, "after", true, b.Namespace, InternetAddr, 1500)
	if got := learned(b, InternetAddr); got != "" {
		t.Errorf("the MTU of the path is still %s", got)
	}
	wantViolations(t, v, map[string]uint64{})
}

func TestVMLooksLikeAzure(t *testing.T) {
	_, vms := newVNet(t, VMConfig{Name: "web", Secondaries: 1})
	got := map[string]string{
		"name":   mustRun(t, vms[0].Namespace, "hostname"),
		"mac":    mustRun(t, vms[0].Namespace, "cat", "/sys/class/net/eth0/address"),
		"routes": mustRun(t, vms[0].Namespace, "ip", "route"),
		"dns":    mustRun(t, vms[0].Namespace, "cat", "/etc/resolv.conf"),
		"run":    mustRun(t, vms[0].Namespace, "ls", "/run"),
	}
	want := map[string]string{
		"name": "web\n",
		"mac":  vms[0].MAC + "\n",
		"routes": "default via 10.240.0.1 dev eth0 proto dhcp src 10.240.0.4 metric 100 \n" +
			"10.240.0.0/16 dev eth0 proto kernel scope link src 10.240.0.4 metric 100 \n" +
			"168.63.129.16 via 10.240.0.1 dev eth0 proto dhcp src 10.240.0.4 metric 100 \n" +
			"169.254.169.254 via 10.240.0.1 dev eth0 proto dhcp src 10.240.0.4 metric 100 \n",
		"dns": "nameserver 168.63.129.16\n",
		"run": "lock\n",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// lend gives an address of the VM to a new namespace behind it, which the VM
// routes and proxies, so that its frames have the NIC's MAC.
func lend(t *testing.T, vm *VM, addr netip.Addr) (enter []string) {
	t.Helper()
	name := "c" + strings.ReplaceAll(addr.String(), ".", "-")
	mustRun(t, vm.Namespace, "sh", "-ec", fmt.Sprintf(`
		ip netns add %[1]s
		ip link add v%[3]d type veth peer name eth0 netns %[1]s
		echo 1 >/proc/sys/net/ipv4/ip_forward
		echo 1 >/proc/sys/net/ipv4/conf/v%[3]d/proxy_arp
		ip link set v%[3]d up
		ip route add %[2]s dev v%[3]d
		ip netns exec %[1]s sysctl -qw net.ipv6.conf.all.disable_ipv6=1
		ip -n %[1]s address add %[2]s dev eth0
		ip -n %[1]s link set eth0 up
		ip -n %[1]s route add default dev eth0`, name, addr, addr.As4()[3]))
	return []string{"ip", "netns", "exec", name}
}

func TestLentAddressIsReached(t *testing.T) {
	v, vms := newVNet(t, VMConfig{Secondaries: 2}, VMConfig{})
	a, b := vms[0], vms[1]
	c := lend(t, a, a.Secondaries()[0])
	wantPing(t, "to a lent address", true, b.Namespace, a.Secondaries()[0], 84)
	wantPing(t, "from a lent address", true, a.Namespace, b.Primary, 84, c...)
	wantPing(t, "to the internet without SNAT", false, a.Namespace, InternetAddr, 84, c...)
	wantPing(t, "to the host agent without SNAT", true, a.Namespace, HostAgentAddr, 84, c...)
	wantPing(t, "to IMDS without SNAT", false, a.Namespace, IMDSAddr, 84, c...)
	lookup := mustRun(t, a.Namespace, "ip", append(c[1:], "busybox", "nslookup", InternetName, HostAgentAddr.String())...)
	if !strings.Contains(lookup, InternetAddr.String()) {
		t.Errorf("DNS said %s", lookup)
	}
	wantViolations(t, v, map[string]uint64{})

	connect := append(c[1:], "busybox", "nc", "-w", "1", HostAgentAddr.String(), "80")
	if _, err := a.Run(t.Context(), "ip", connect...); err == nil {
		t.Error("a secondary connects to the host agent")
	}
	if got, err := v.Violations(); err != nil || got["host_agent"] == 0 {
		t.Errorf("violations %v, %v; want host_agent", got, err)
	}
}

func TestSecondariesChangeAtRunTime(t *testing.T) {
	v, vms := newVNet(t, VMConfig{Secondaries: 1}, VMConfig{})
	a, b := vms[0], vms[1]
	added := netip.MustParseAddr("10.240.7.7")
	if err := a.SetSecondaries([]netip.Addr{b.Primary}); err == nil {
		t.Error("took the address of another VM")
	}
	if err := a.SetSecondaries([]netip.Addr{added}); err != nil {
		t.Fatal(err)
	}
	c := lend(t, a, added)
	wantPing(t, "to an added address", true, b.Namespace, added, 84)
	wantPing(t, "from an added address", true, a.Namespace, b.Primary, 84, c...)
	wantViolations(t, v, map[string]uint64{})
	if err := a.SetSecondaries(nil); err != nil {
		t.Fatal(err)
	}
	wantPing(t, "to a withdrawn address", false, b.Namespace, added, 84)
	wantViolations(t, v, map[string]uint64{})
	wantPing(t, "from a withdrawn address", false, a.Namespace, b.Primary, 84, c...)
	wantViolations(t, v, map[string]uint64{"source_ip": 1})
}

func TestPowerCutAndBoot(t *testing.T) {
	_, vms := newVNet(t, VMConfig{Secondaries: 1}, VMConfig{})
	a, b := vms[0], vms[1]
	mustRun(t, a.Namespace, "sh", "-c", "echo kept >/etc/azure; echo kept >/var/lib/azure; echo kept >/var/lib/docker/azure; echo lost >/run/azure")
	sleeper := a.Command(t.Context(), "sleep", "1000")
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	before := a.PidOne()
	for round := range 3 {
		if err := a.PowerCut(); err != nil {
			t.Fatal(err)
		}
		if round == 0 && sleeper.Wait() == nil {
			t.Error("a process survived")
		}
		if err := a.PowerCut(); err == nil {
			t.Error("cut the power twice")
		}
		if _, err := a.Run(t.Context(), "true"); err == nil {
			t.Error("ran a command without power")
		}
		wantPing(t, "without power", false, b.Namespace, a.Primary, 84)
		if err := a.Boot(); err != nil {
			t.Fatal(err)
		}
		wantPing(t, "after the boot", true, b.Namespace, a.Primary, 84)
	}
	if a.PidOne() == before {
		t.Error("the same pid 1")
	}
	got := mustRun(t, a.Namespace, "sh", "-c", "cat /etc/azure /var/lib/azure /var/lib/docker/azure; ls /run; cat /sys/class/net/eth0/address")
	if want := "kept\nkept\nkept\nlock\n" + a.MAC + "\n"; got != want {
		t.Errorf("after the boot %q, want %q", got, want)
	}
	if _, err := os.Stat("/etc/azure"); err == nil {
		t.Error("the VM wrote to this machine's /etc")
	}
}

func TestOrphansAreReaped(t *testing.T) {
	_, vms := newVNet(t, VMConfig{})
	mustRun(t, vms[0].Namespace, "sh", "-c", "for i in 1 2 3 4 5; do (sleep 0.01 &) ; done")
	deadline := time.Now().Add(5 * time.Second)
	for mustRun(t, vms[0].Namespace, "sh", "-c", "grep -l '^State:.Z' /proc/[0-9]*/status | wc -l") != "0\n" {
		if time.Now().After(deadline) {
			t.Fatal("zombies stay")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestVNetsRunSideBySide(t *testing.T) {
	_, one := newVNet(t, VMConfig{}, VMConfig{})
	_, two := startVNet(t, VMConfig{})
	wantPing(t, "within the first", true, one[0].Namespace, one[1].Primary, 84)
	wantPing(t, "from the second to the first", false, two[0].Namespace, one[1].Primary, 84)
}

func TestSubnetIsFull(t *testing.T) {
	v, _ := newVNet(t, VMConfig{NICs: []NICConfig{{Subnet: netip.MustParsePrefix("10.1.0.0/29"), Secondaries: 2}}})
	if _, err := v.AddVM(VMConfig{NICs: []NICConfig{{Subnet: netip.MustParsePrefix("10.1.0.0/29")}}}); err == nil {
		t.Error("gave out a fourth address of a /29")
	}
	if _, err := v.AddVM(VMConfig{}); err != nil {
		t.Error(err)
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	v, _ := newVNet(t, VMConfig{}, VMConfig{})
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	wantNothingOf(t, filepath.Base(v.cgroups[0].Dir), v.dir)
	if _, err := v.AddVM(VMConfig{}); err == nil {
		t.Error("added a VM to a closed VNet")
	}
}

// victim holds a VNet up until it is killed.
func victim() {
	v, err := New(Config{})
	if err != nil {
		panic(err)
	}
	vm, err := v.AddVM(VMConfig{})
	if err != nil {
		panic(err)
	}
	// One that would outlive its parent, and keeps a file on the disk open.
	if err := vm.Command(context.Background(), "sh", "-c", "exec sleep 1000 >/var/lib/docker/open").Start(); err != nil {
		panic(err)
	}
	fmt.Println(filepath.Base(v.cgroups[0].Dir), v.dir)
	select {}
}

func TestKilledProcessLeavesNothing(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make namespaces")
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "VNETSIM_VICTIM=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	cmd.Process.Signal(syscall.SIGKILL)
	cmd.Wait()
	f := strings.Fields(line)
	wantNothingOf(t, f[0], f[1])
}

// wantNothingOf waits for the end of what a VNet made: its directory, cgroups
// of a name, and holders, which have the directory in their arguments.
func wantNothingOf(t *testing.T, cgroupName, dir string) {
	t.Helper()
	var left []string
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		left = nil
		if _, err := os.Stat(dir); err == nil {
			left = append(left, dir)
		}
		filepath.WalkDir("/sys/fs/cgroup", func(path string, d os.DirEntry, err error) error {
			if err == nil && d.Name() == cgroupName {
				left = append(left, path)
			}
			return nil
		})
		args, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, path := range args {
			if b, err := os.ReadFile(path); err == nil && strings.Contains(string(b), dir) {
				left = append(left, path)
			}
		}
		if len(left) == 0 {
			return
		}
	}
	t.Errorf("left behind: %s", left)
}

// A VM's boot clock is seconds old after every boot, whatever this machine's is.
func TestTheBootClockBeginsWithTheBoot(t *testing.T) {
	if _, err := os.Stat("/proc/self/ns/time"); err != nil {
		t.Skipf("this kernel has no time namespaces: %v", err)
	}
	_, vms := newVNet(t, VMConfig{})
	vm := vms[0]
	age := func() (seconds float64) {
		t.Helper()
		out := mustRun(t, vm.Namespace, "cat", "/proc/uptime")
		if _, err := fmt.Sscan(out, &seconds); err != nil {
			t.Fatal(err)
		}
		return seconds
	}
	time.Sleep(5 * time.Second) // longer than a boot takes
	before := age()
	if before < ageAtBoot+5 || before > 60 {
		t.Errorf("after the first boot the machine is %v s old", before)
	}
	for _, err := range []error{vm.PowerCut(), vm.Boot()} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if after := age(); after < ageAtBoot || after >= before {
		t.Errorf("after the second boot the machine is %v s old, before it was %v s", after, before)
	}
}
