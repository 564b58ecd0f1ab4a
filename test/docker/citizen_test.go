// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// noise is what no fabric carries: multicast, broadcast, IPv6, ARP for strangers. It ends
// with how many multicast packets of IPv6 were sent.
const noise = `for to in 224.0.0.251 239.1.2.3 255.255.255.255; do
	ping -c 2 -W 1 $to & timeout 2 nslookup noise.test $to &
done
ping6 -c 2 -W 1 -I eth0 ff02::1 & arping -c 2 -w 2 -I eth0 10.240.88.88 & wait
awk '/^Ip6OutMcastPkts/{print $2}' /proc/net/snmp6`

func TestContainersAreFirstClassCitizens(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t,
		vnetsim.VMConfig{Secondaries: 6, MTU: 9000}, vnetsim.VMConfig{Secondaries: 4, MTU: 9000}, vnetsim.VMConfig{})
	vm1, vm2, plain := vms[0], vms[1], vms[2]
	vm1.WithPlugin()
	vm2.WithPlugin()
	vm1.Network("azure")
	vm1.Network("bare", "snat=off")
	vm1.Network("alone", "mode=transparent")
	vm2.Network("azure")
	servers := []test.Place{
		test.InContainer(vm1, "a1", vm1.Container("azure", "a1", test.Server)),
		test.InContainer(vm1, "a2", vm1.Container("azure", "a2", test.Server)),
		test.InContainer(vm1, "b1", vm1.Container("bare", "b1", test.Server)),
		test.InContainer(vm2, "a3", vm2.Container("azure", "a3", test.Server)),
		test.InContainer(vm1, "t1", vm1.Container("alone", "t1", test.Server)),
	}
	everywhere := append([]test.Place{test.OnHost(vm1), test.OnHost(vm2), test.OnHost(plain)}, servers...)
	a1, b1, t1 := servers[0], servers[2], servers[4]
	var used []netip.Addr
	for _, s := range servers {
		used = append(used, s.Addr)
	}

	t.Run("everyone reaches every container, and is seen with their own address", func(t *testing.T) {
		for _, from := range everywhere {
			for _, to := range servers {
				got, err := from.Try("sh", "-c", fmt.Sprintf("ping -q -c 1 -W 3 %[1]s >/dev/null || echo no ping; timeout 5 busybox wget -q -O - http://%[1]s/cgi-bin/who", to.Addr))
				if err != nil || got != from.Addr.String() {
					t.Errorf("%s pings %s, fetches from it and is seen as %q, want %s: %v", from.Name, to.Name, got, from.Addr, err)
				}
			}
		}
	})
	t.Run("a probe is answered, with SNAT and without", func(t *testing.T) {
		for _, to := range servers {
			test.Probed(t, vnet, to.Addr)
		}
	})
	t.Run("jumbo frames pass whole, and udev has no MAC to change", func(t *testing.T) {
		const fragments = "awk '/^Ip: [0-9]/{print $20}' /proc/net/snmp" // FragCreates
		for _, from := range []test.Place{a1, t1} {
			if out, err := from.Try("sh", "-c", "cat /sys/class/net/eth0/mtu; "+fragments+"; ping -c 1 -W 3 -s 8972 "+servers[3].Addr.String()+" >/dev/null && "+fragments); err != nil || out != "9000\n0\n0" {
				t.Errorf("%s: MTU, fragments before and after a large packet:\n%s %v", from.Name, out, err)
			}
		}
		// NET_ADDR_SET: given, and neither random nor stolen.
		kinds := []string{a1.Host.Must("sh", "-c", "cat /sys/class/net/azv*/addr_assign_type")}
		for _, c := range []string{"a1", "t1"} {
			kinds = append(kinds, a1.Host.Docker("exec", c, "cat", "/sys/class/net/eth0/addr_assign_type"))
		}
		for _, kind := range strings.Fields(strings.Join(kinds, " ")) {
			if kind != "3" {
				t.Errorf("the MACs of veths are of kinds %q, want 3 alone", kinds)
			}
		}
	})
	t.Run("containers reach every host", func(t *testing.T) {
		for _, from := range servers {
			for _, to := range []test.Host{vm1, vm2, plain} {
				if _, err := from.Try("ping", "-c", "1", "-W", "3", to.Primary.String()); err != nil {
					t.Errorf("%s does not ping %s: %v", from.Name, to.Name, err)
				}
			}
		}
	})
	t.Run("the internet is reached with snat=on and not with snat=off", func(t *testing.T) {
		url := "http://" + vnetsim.InternetAddr.String() + "/"
		for _, from := range []test.Place{a1, t1} {
			if got, err := from.Try(test.Fetch(url)...); err != nil || got != vm1.Public.String() {
				t.Errorf("with snat=on the internet sees %s as %q, want %s: %v", from.Name, got, vm1.Public, err)
			}
		}
		if got, err := b1.Try(test.Fetch(url)...); err == nil {
			t.Errorf("with snat=off the internet answers %q", got)
		}
	})
	t.Run("the host agent is for the host", func(t *testing.T) {
		url := "http://" + vnetsim.HostAgentAddr.String() + "/machine/plugins?comp=nmagent&type=getinterfaceinfov1"
		if got, err := vm1.Try("busybox", test.Fetch(url)...); err != nil || !strings.Contains(got, "<Interfaces>") {
			t.Errorf("the host gets %q: %v", got, err)
		}
		for _, from := range []test.Place{a1, b1, t1} {
			if got, err := from.Try(test.Fetch(url)...); err == nil {
				t.Errorf("%s gets %.80q", from.Name, got)
			}
		}
		for _, from := range []test.Place{a1, t1} {
			if _, err := from.Try("nslookup", "internet.test", vnetsim.HostAgentAddr.String()); err != nil {
				t.Errorf("%s asks the host agent's DNS: %v", from.Name, err)
			}
		}
	})
	t.Run("IMDS answers with snat=on, unless the host forbids it", func(t *testing.T) {
		h := vm1.In(t)
		url := []string{"timeout", "5", "busybox", "wget", "-q", "-O", "-", "--header", "Metadata: true", "http://169.254.169.254/metadata/instance/network?api-version=2021-02-01"}
		for _, from := range []test.Place{a1, t1} {
			if got, err := from.Try(url...); err != nil || !strings.Contains(got, "interface") {
				t.Errorf("%s gets %q: %v", from.Name, got, err)
			}
		}
		if got, err := b1.Try(url...); err == nil {
			t.Errorf("b1, without SNAT, gets %q", got)
		}
		forbid := "FORWARD -i azure0 -d 169.254.169.254 -j DROP"
		h.Must("sh", "-c", "iptables -I "+forbid)
		if got, err := a1.Try(url...); err == nil {
			t.Errorf("a1 gets %q though it is forbidden", got)
		}
		h.Must("sh", "-c", "iptables -D "+forbid)
	})
	t.Run("containers find each other by name", func(t *testing.T) {
		// Docker's names are those of one network.
		if got, err := a1.Try(test.Fetch("http://a2/cgi-bin/who")...); err != nil || got != a1.Addr.String() {
			t.Errorf("a2 sees %q, want %s: %v", got, a1.Addr, err)
		}
	})
	t.Run("an address and a MAC are had as asked for", func(t *testing.T) {
		want := vm2.Secondaries()[3]
		h := vm2.In(t)
		if got := h.Container("azure", "fixed", "sleep 1000", "--ip", want.String(), "--mac-address", "02:aa:bb:cc:dd:ee"); got != want {
			t.Errorf("--ip %s gives %s", want, got)
		}
		if link := h.Docker("exec", "fixed", "ip", "link", "show", "eth0"); !strings.Contains(link, "02:aa:bb:cc:dd:ee") {
			t.Errorf("--mac-address is not had: %s", link)
		}
		if _, err := test.OnHost(plain).Try("ping", "-c", "1", "-W", "3", want.String()); err != nil {
			t.Errorf("not reached from the plain VM: %v", err)
		}
	})
	t.Run("noise never reaches the fabric", func(t *testing.T) {
		var all sync.WaitGroup
		for _, from := range servers {
			all.Go(func() {
				// Docker turns IPv6 off in a container that has no address of it.
				pid := from.Host.Docker("inspect", "-f", "{{.State.Pid}}", from.Name)
				from.Host.Must("nsenter", "-n", "-t", pid, "sysctl", "-q", "-w", "net.ipv6.conf.eth0.addr_gen_mode=0", "net.ipv6.conf.eth0.disable_ipv6=0")
				time.Sleep(3 * time.Second) // until its link-local address may be used
				out, err := from.Try("sh", "-c", noise)
				sent, bad := strconv.Atoi(out[strings.LastIndex(out, "\n")+1:])
				if err != nil || bad != nil || sent < 3 {
					t.Errorf("%s sent %d multicasts of IPv6: %s %v %v", from.Name, sent, out, err, bad)
				}
			})
		}
		all.Wait()
		test.NothingDropped(t, vnet, used...)
	})
	t.Run("what is sent to a container that was just removed stays on the VM", func(t *testing.T) {
		h := vm1.In(t)
		gone := h.Container("azure", "gone", test.Server)
		if _, err := a1.Try(test.Fetch(fmt.Sprintf("http://%s/cgi-bin/who", gone))...); err != nil {
			t.Fatal(err)
		}
		mac := h.Docker("exec", "gone", "cat", "/sys/class/net/eth0/address")
		h.Docker("rm", "-f", "gone")
		// The neighbour that a1 had resolved, as it is used until the kernel doubts it.
		h.Docker("run", "--rm", "--cap-add", "NET_ADMIN", "--network", "container:a1", "busybox", "sh", "-c",
			fmt.Sprintf("arp -i eth0 -s %s %s && ping -c 3 -W 1 %[1]s; arp -i eth0 -d %[1]s", gone, mac))
		test.NothingDropped(t, vnet)
	})
	t.Run("nobody takes another's address or MAC", func(t *testing.T) {
		h := vm1.In(t)
		for _, network := range []string{"azure", "alone"} {
			name := "thief-" + network
			steal := test.InContainer(h, name, h.Container(network, name, "sleep 1000", "--cap-add", "NET_ADMIN"))
			if _, err := steal.Try("ping", "-c", "1", "-W", "3", plain.Primary.String()); err != nil {
				t.Errorf("%s, while it is honest, reaches nobody: %v", name, err)
			}
			for _, theft := range []string{
				"ip addr add " + servers[1].Addr.String() + "/32 dev eth0; ping -c 2 -W 1 -I " + servers[1].Addr.String() + " " + plain.Primary.String(),
				"ip addr add 10.240.99.99/32 dev eth0; ping -c 2 -W 1 -I 10.240.99.99 " + plain.Primary.String(),
				"ip link set eth0 address 02:de:ad:be:ef:00 && ping -c 2 -W 1 " + plain.Primary.String(),
			} {
				if out, err := steal.Try("sh", "-c", theft); err == nil {
					t.Errorf("%s: %s: it is answered: %s", name, theft, out)
				}
			}
			if got, err := test.OnHost(plain).Try(test.Fetch(fmt.Sprintf("http://%s/cgi-bin/who", servers[1].Addr))...); err != nil || got != plain.Primary.String() {
				t.Errorf("after %s the victim is not reached any more: %q %v", name, got, err)
			}
			h.Docker("rm", "-f", name)
		}
	})
	test.NothingDropped(t, vnet, used...)
}

func TestAContainersLife(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 31}, vnetsim.VMConfig{})
	h, plain := vms[0], test.OnHost(vms[1])
	h.WithPlugin()
	h.Network("azure")
	h.Network("alone", "mode=transparent")
	var used []netip.Addr
	reached := func(t *testing.T, name string) {
		t.Helper()
		addr := h.In(t).Address(name)
		used = append(used, addr)
		if _, err := plain.Try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
			t.Errorf("%s is not reached: %v", name, err)
		}
	}
	for _, network := range []string{"azure", "alone"} {
		t.Run("run, restart, stop, start, rm: "+network, func(t *testing.T) {
			h := h.In(t)
			h.Container(network, "one", "sleep 1000")
			reached(t, "one")
			h.Docker("restart", "-t", "0", "one")
			reached(t, "one")
			h.Docker("stop", "-t", "0", "one")
			h.Empty()
			h.Docker("start", "one")
			reached(t, "one")
			h.Docker("rm", "-f", "one")
			h.Empty()
		})
	}
	t.Run("connect and disconnect", func(t *testing.T) {
		h := h.In(t)
		h.Docker("run", "-d", "--init", "--name", "two", "busybox", "sleep", "1000")
		h.Docker("network", "connect", "azure", "two")
		if s := h.State(); len(s.Leases) != 1 || len(s.Attachments) != 1 {
			t.Errorf("connected, and the state is %+v", s)
		}
		h.Docker("network", "disconnect", "azure", "two")
		h.Empty()
		h.Docker("rm", "-f", "two")
	})
	t.Run("many at once have as many addresses, and leave none", func(t *testing.T) {
		h := h.In(t)
		count := 8
		if test.Soaking {
			count = 30
		}
		names := make([]string, count)
		failed := make(chan error, count)
		for i := range names {
			names[i] = fmt.Sprintf("c%d", i)
			go func() {
				_, err := h.Try(test.Client, "run", "-d", "--init", "--network", []string{"azure", "alone"}[i%2], "--name", names[i], "busybox", "sleep", "1000")
				failed <- err
			}()
		}
		for range names {
			if err := <-failed; err != nil {
				t.Error(err)
			}
		}
		holder := map[netip.Addr]string{}
		for _, name := range names {
			addr := h.Address(name)
			if other, taken := holder[addr]; taken {
				t.Errorf("%s and %s both have %s", name, other, addr)
			}
			holder[addr] = name
			reached(t, name)
		}
		h.Docker(append([]string{"rm", "-f"}, names...)...)
		h.Empty()
	})
	t.Run("the last network gone, the host has everything back", func(t *testing.T) {
		h := h.In(t)
		for _, name := range []string{"azure", "alone"} {
			// An engine that has just removed thirty containers counts some of them for a moment more.
			test.Eventually(t, "docker network rm "+name, 20*time.Second, func() bool {
				_, err := h.Try(test.Client, "network", "rm", name)
				return err == nil
			})
		}
		h.Docker("plugin", "disable", test.Plugin)
		start := time.Now()
		h.Must(test.PluginBinary, "uninstall")
		t.Logf("uninstall took %v", time.Since(start).Round(time.Millisecond))
		if out := h.Must("ip", "-br", "link"); strings.Contains(out, "azure0") {
			t.Errorf("azure0 still stands:\n%s", out)
		}
		if _, err := plain.Try("ping", "-c", "1", "-W", "3", h.Primary.String()); err != nil {
			t.Errorf("the host is not reached: %v", err)
		}
	})
	test.NothingDropped(t, vnet, used...)
}
