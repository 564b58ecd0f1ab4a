// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// rpFilter sets the source validation of a VM: 0 is off, 1 strict, 2 loose. The
// kernel takes the larger one of "all" and the link's own.
func rpFilter(t *testing.T, vm *VM, mode int) {
	t.Helper()
	mustRun(t, vm.Namespace, "sh", "-c", fmt.Sprintf("for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo %d >$f; done", mode))
}

// wantTold fails the test if the VM's NICs, or what the host agent or IMDS tells
// the VM, are not just these addresses.
func wantTold(t *testing.T, vm *VM, want ...netip.Addr) {
	t.Helper()
	var got []netip.Addr
	for _, n := range vm.NICs() {
		got = append(got, n.addresses()...)
	}
	if !slices.Equal(want, got) {
		t.Errorf("NICs have %v, want %v", got, want)
	}
	for url, mark := range map[string]string{hostAgentURL: ` Address="`, imdsURL: `"privateIpAddress":"`} {
		var told []netip.Addr
		r := get(t, vm, url, "Metadata: true")
		for i, part := range strings.Split(r.Body, mark) {
			if i > 0 {
				told = append(told, netip.MustParseAddr(part[:strings.Index(part, `"`)]))
			}
		}
		if !slices.Equal(want, told) {
			t.Errorf("%s tells %v, want %v: %+v", url, told, want, r)
		}
	}
}

func TestNICsChangeAtRunTime(t *testing.T) {
	v, vms := newVNet(t, VMConfig{Secondaries: 1}, VMConfig{})
	a, b := vms[0], vms[1]
	own := append([]netip.Addr{a.Primary}, a.Secondaries()...)
	first, err := a.AddNIC(NICConfig{Subnet: netip.MustParsePrefix("10.1.2.0/24"), Secondaries: 1, MTU: 1400})
	if err != nil {
		t.Fatal(err)
	}
	second, err := a.AddNIC(NICConfig{Subnet: netip.MustParsePrefix("10.1.3.0/24")})
	if err != nil {
		t.Fatal(err)
	}
	if first.Name != "eth1" || second.Name != "eth2" || first.Gateway != netip.MustParseAddr("10.1.2.1") {
		t.Errorf("added %+v and %+v", first, second)
	}
	if got := mustRun(t, a.Namespace, "cat", "/sys/class/net/eth1/address", "/sys/class/net/eth1/mtu"); got != first.MAC+"\n1400\n" {
		t.Errorf("eth1 has %s, want %s and 1400", got, first.MAC)
	}
	wantTold(t, a, slices.Concat(own, first.addresses(), second.addresses())...)
	wantPing(t, "to an added NIC", true, b.Namespace, first.Primary, 84)
	wantPing(t, "to the second added NIC", true, b.Namespace, second.Primary, 84)
	wantViolations(t, v, map[string]uint64{})
	accepted, err := a.Accepted()
	if err != nil || accepted[first.Primary] == 0 || accepted[second.Primary] == 0 {
		t.Errorf("accepted %v, %v; want %s and %s", accepted, err, first.Primary, second.Primary)
	}

	send(t, a, "eth1", ethernet(FabricMAC, first.MAC, 0x0800, ipv4(b.Primary, a.Primary, 17, 9)))
	wantViolations(t, v, map[string]uint64{"source_ip": 1})
	if err := a.RemoveNIC("eth1"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"eth0", "eth1", "eth9"} {
		if err := a.RemoveNIC(name); err == nil {
			t.Errorf("removed %s", name)
		}
	}
	wantTold(t, a, slices.Concat(own, second.addresses())...)
	if links := mustRun(t, a.Namespace, "ip", "-br", "link"); strings.Contains(links, "eth1") {
		t.Errorf("eth1 stays: %s", links)
	}
	if rules := mustRun(t, a.Namespace, "ip", "rule"); strings.Contains(rules, first.Primary.String()) || !strings.Contains(rules, second.Primary.String()) {
		t.Errorf("after eth1 has gone the rules are %s", rules)
	}
	out, err := v.fabric.Run(t.Context(), "sh", "-c", "ip route; ip neighbor; nft list table ip fabric")
	if err != nil || strings.Contains(out, "10.1.2.4") || strings.Contains(out, "10.1.2.5") {
		t.Errorf("the fabric knows eth1: %v: %s", err, out)
	}
	wantPing(t, "to a removed NIC", false, b.Namespace, first.Primary, 84)
	wantPing(t, "to the NIC that stays", true, b.Namespace, second.Primary, 84)
	if got, err := a.Violations(); err != nil || got["source_ip"] != 1 {
		t.Errorf("%v, %v: the removed NIC's counter is gone", got, err)
	}
	if err := v.ResetViolations(); err != nil {
		t.Fatal(err)
	}

	third, err := a.AddNIC(NICConfig{Subnet: first.Prefix})
	if err != nil {
		t.Fatal(err)
	}
	if third.Name != "eth1" || third.MAC == first.MAC || slices.Contains(first.addresses(), third.Primary) {
		t.Errorf("added %+v after %+v", third, first)
	}
	for round := range 2 {
		if round == 1 {
			if err := a.PowerCut(); err != nil {
				t.Fatal(err)
			}
			if err := a.RemoveNIC("eth2"); err != nil {
				t.Fatal(err)
			}
			if second, err = a.AddNIC(NICConfig{Subnet: second.Prefix}); err != nil {
				t.Fatal(err)
			}
			if err := a.Boot(); err != nil {
				t.Fatal(err)
			}
		}
		wantPing(t, "to the third NIC", true, b.Namespace, third.Primary, 84)
		wantPing(t, "to the second NIC", true, b.Namespace, second.Primary, 84)
	}
	// In the order in which Azure got them.
	wantTold(t, a, slices.Concat(own, third.addresses(), second.addresses())...)
	wantViolations(t, v, map[string]uint64{})
}

func TestNICThatCannotStartIsTakenBack(t *testing.T) {
	v, vms := newVNet(t, VMConfig{}, VMConfig{})
	a, b := vms[0], vms[1]
	mustRun(t, a.Namespace, "ip", "link", "add", "eth1", "type", "bridge")
	if n, err := a.AddNIC(NICConfig{}); err == nil {
		t.Errorf("added %+v beside a link of that name", n)
	}
	wantTold(t, a, a.Primary)
	if elements, err := v.fabric.Run(t.Context(), "nft", "list", "set", "ip", "fabric", "primaries"); err != nil || strings.Contains(elements, "10.240.0.6") {
		t.Errorf("the fabric knows it: %v: %s", err, elements)
	}
	mustRun(t, a.Namespace, "ip", "link", "del", "eth1")
	n, err := a.AddNIC(NICConfig{})
	if err != nil {
		t.Fatal(err)
	}
	wantPing(t, "to the NIC", true, b.Namespace, n.Primary, 84)
	if err := v.ResetViolations(); err != nil {
		t.Error(err)
	}
}

func TestSecondNICInTheSubnetOfEth0(t *testing.T) {
	v, vms := newVNet(t, VMConfig{Secondaries: 2, NICs: []NICConfig{{Secondaries: 1}}}, VMConfig{})
	a, b := vms[0], vms[1]
	if _, err := a.AddNIC(NICConfig{Subnet: v.Subnet}); err != nil {
		t.Fatal(err)
	}
	nics := a.NICs()
	all := []netip.Addr{b.Primary}
	for _, n := range nics {
		all = append(all, n.addresses()...)
		if n.Prefix != v.Subnet {
			t.Errorf("%+v is not in the VNet's subnet", n)
		}
	}
	for i, addr := range all {
		if slices.Contains(all[:i], addr) {
			t.Errorf("%s is given out twice: %v", addr, all)
		}
	}
	for _, mode := range []int{2, 1, 0} {
		if err := v.ResetViolations(); err != nil {
			t.Fatal(err)
		}
		rpFilter(t, a, mode)
		for _, n := range nics {
			what := fmt.Sprintf("%s with rp_filter %d", n.Name, mode)
			wantPing(t, what, true, b.Namespace, n.Primary, 84)
			if _, err := a.Run(t.Context(), "busybox", "ping", "-I", n.Primary.String(), "-c", "1", "-W", "2", b.Primary.String()); err != nil {
				t.Errorf("%s does not reach another VM: %v", what, err)
			}
		}
		wantViolations(t, v, map[string]uint64{})
		// Each NIC uses its own port, or the port counts a violation.
		accepted, err := a.Accepted()
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range nics {
			if accepted[n.Primary] < 2 {
				t.Errorf("rp_filter %d: accepted %v, want 2 of %s", mode, accepted, n.Primary)
			}
		}
	}
}

func TestSubnetsOfTheVNet(t *testing.T) {
	v, vms := newVNet(t, VMConfig{})
	if err := v.AddSubnet(netip.MustParsePrefix("10.9.0.0/24")); err != nil {
		t.Fatal(err)
	}
	for prefix, ok := range map[string]bool{
		"10.9.0.7/24":   true, // the same
		"10.9.0.0/25":   false,
		"10.240.3.0/24": false,
		"10.0.0.0/8":    false,
		"10.9.1.0/30":   false,
		"fd00::/64":     false,
	} {
		if err := v.AddSubnet(netip.MustParsePrefix(prefix)); (err == nil) != ok {
			t.Errorf("%s: %v, want it to be added: %t", prefix, err, ok)
		}
	}
	vm, err := v.AddVM(VMConfig{Subnet: netip.MustParsePrefix("10.9.0.0/24"), Secondaries: 1, NICs: []NICConfig{{Subnet: netip.MustParsePrefix("10.8.0.0/24")}}})
	if err != nil {
		t.Fatal(err)
	}
	routes := mustRun(t, vm.Namespace, "ip", "route")
	want := "default via 10.9.0.1 dev eth0 proto dhcp src 10.9.0.4 metric 100 \n" +
		"10.8.0.0/24 dev eth1 proto kernel scope link src 10.8.0.4 metric 200 \n" +
		"10.9.0.0/24 dev eth0 proto kernel scope link src 10.9.0.4 metric 100 \n" +
		"168.63.129.16 via 10.9.0.1 dev eth0 proto dhcp src 10.9.0.4 metric 100 \n" +
		"169.254.169.254 via 10.9.0.1 dev eth0 proto dhcp src 10.9.0.4 metric 100 \n"
	if diff := cmp.Diff(want, routes); diff != "" {
		t.Errorf("routes (-want +got):\n%s", diff)
	}
	wantTold(t, vm, vm.Primary, vm.Secondaries()[0], vm.NICs()[1].Primary)
	wantPing(t, "to another subnet's VM", true, vms[0].Namespace, vm.Primary, 84)
	wantPing(t, "to its second NIC", true, vms[0].Namespace, vm.NICs()[1].Primary, 84)
	wantPing(t, "to the internet", true, vm.Namespace, InternetAddr, 84)
	wantPing(t, "a probe", true, v.Internet, vm.Primary, 84)
	wantViolations(t, v, map[string]uint64{})
}

func TestPrimaryChanges(t *testing.T) {
	v, vms := newVNet(t, VMConfig{Secondaries: 2, HoldSecondaries: true}, VMConfig{})
	a, b := vms[0], vms[1]
	boot, secondaries := a.Primary, a.Secondaries()
	for _, addr := range []string{b.Primary.String(), "10.240.0.1", "10.240.255.255", "10.9.0.4"} {
		if err := a.SetPrimary(netip.MustParseAddr(addr)); err == nil {
			t.Errorf("took %s", addr)
		}
	}
	// check looks at everything that follows the primary.
	check := func(old netip.Addr, want ...netip.Addr) {
		t.Helper()
		primary := want[0]
		if a.Primary != primary {
			t.Errorf("the primary is %s, want %s", a.Primary, primary)
		}
		wantTold(t, a, want...)
		routes := mustRun(t, a.Namespace, "ip", "route")
		wantRoutes := strings.ReplaceAll("default via 10.240.0.1 dev eth0 proto dhcp src P metric 100 \n"+
			"10.240.0.0/16 dev eth0 proto kernel scope link src P metric 100 \n"+
			"168.63.129.16 via 10.240.0.1 dev eth0 proto dhcp src P metric 100 \n"+
			"169.254.169.254 via 10.240.0.1 dev eth0 proto dhcp src P metric 100 \n", "P", primary.String())
		if diff := cmp.Diff(wantRoutes, routes); diff != "" {
			t.Errorf("routes (-want +got):\n%s", diff)
		}
		for _, addr := range want {
			wantPing(t, "to "+addr.String(), true, b.Namespace, addr, 84)
		}
		if !slices.Contains(want, old) {
			wantPing(t, "to the old primary", false, b.Namespace, old, 84)
		}
		wantPing(t, "from the new primary", true, a.Namespace, b.Primary, 84)
		wantPing(t, "a probe", true, v.Internet, primary, 84)
		if got := get(t, a, "http://203.0.113.10/").Body; got != a.Public.String()+"\n" {
			t.Errorf("the internet saw %q, want %s", got, a.Public)
		}
		wantPing(t, "from the internet", true, v.Internet, a.Public, 84)
		for target, answered := range map[netip.Addr]bool{primary: false, old: true} {
			out, _ := a.Run(t.Context(), "busybox", "arping", "-c", "1", "-w", "1", "-I", "eth0", target.String())
			if got := strings.Contains(out, FabricMAC); got != answered {
				t.Errorf("ARP for %s is answered: %t, want %t", target, got, answered)
			}
		}
		wantViolations(t, v, map[string]uint64{})
		accepted, err := v.Accepted()
		if err != nil || accepted[primary] == 0 || !slices.Contains(want, old) && accepted[old] > 0 {
			t.Errorf("accepted %v, %v; want %s and not %s", accepted, err, primary, old)
		}
	}
	set := func(to netip.Addr) {
		t.Helper()
		if err := v.ResetViolations(); err != nil {
			t.Fatal(err)
		}
		if err := a.SetPrimary(to); err != nil {
			t.Fatal(err)
		}
	}
	first, second := netip.MustParseAddr("10.240.7.7"), netip.MustParseAddr("10.240.7.8")
	set(first)
	check(boot, first, secondaries[0], secondaries[1])
	send(t, a, "eth0", ethernet(FabricMAC, a.MAC, 0x0800, ipv4(boot, b.Primary, 17, 9)))
	wantViolations(t, v, map[string]uint64{"source_ip": 1})
	set(secondaries[0]) // the two change places
	check(first, secondaries[0], first, secondaries[1])
	if err := a.PowerCut(); err != nil {
		t.Fatal(err)
	}
	set(second)
	if err := a.Boot(); err != nil {
		t.Fatal(err)
	}
	check(secondaries[0], second, first, secondaries[1])

	// Faults follow the VM.
	if err := a.SetFault(HostAgent, Refused); err != nil {
		t.Fatal(err)
	}
	set(boot)
	if got := get(t, a, hostAgentURL); got.Err != "refused" {
		t.Errorf("the fault is lost: %+v", got)
	}
	if err := a.SetFault(HostAgent, Healthy); err != nil {
		t.Fatal(err)
	}
	check(second, boot, first, secondaries[1])
}

// TestPrimaryChangesUnderABridge: a DHCP client works on its NIC, wherever the
// old address went.
func TestPrimaryChangesUnderABridge(t *testing.T) {
	_, vms := newVNet(t, VMConfig{})
	a := vms[0]
	old, now := a.Primary, netip.MustParseAddr("10.240.7.7")
	mustRun(t, a.Namespace, "sh", "-ec", fmt.Sprintf(`
		ip link add br0 address %s type bridge
		ip link set eth0 master br0
		ip address flush dev eth0
		ip link set br0 up
		ip address add %s/16 dev br0
		ip route add default via 10.240.0.1 dev br0 proto dhcp src %[2]s metric 100`, a.MAC, old))
	if err := a.SetPrimary(now); err != nil {
		t.Fatal(err)
	}
	got := mustRun(t, a.Namespace, "sh", "-c", "ip -4 -br address; ip route show default")
	for _, want := range []string{"br0", old.String() + "/16", now.String() + "/16 metric 100",
		"default via 10.240.0.1 dev br0 proto dhcp src " + old.String(), "default via 10.240.0.1 dev eth0 proto dhcp src " + now.String()} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in\n%s", want, got)
		}
	}
}
