// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
)

// server answers HTTP on port 80 with the client's address.
const server = `mkdir -p /www/cgi-bin
printf '#!/bin/sh\necho; echo $REMOTE_ADDR\n' >/www/cgi-bin/who
chmod +x /www/cgi-bin/who
exec httpd -f -p 0.0.0.0:80 -h /www`

// noise is what no fabric carries: multicast, broadcast, IPv6, ARP for strangers. It ends
// with how many multicast packets of IPv6 were sent.
const noise = `for to in 224.0.0.251 239.1.2.3 255.255.255.255; do
	ping -c 2 -W 1 $to & timeout 2 nslookup noise.test $to &
done
ping6 -c 2 -W 1 -I eth0 ff02::1 & arping -c 2 -w 2 -I eth0 10.240.88.88 & wait
awk '/^Ip6OutMcastPkts/{print $2}' /proc/net/snmp6`

// place is somewhere that pings and fetches can be sent from.
type place struct {
	name string
	addr netip.Addr
	in   []string // begins a command that runs there
	on   host
}

func (p place) try(arg ...string) (string, error) {
	all := append(append([]string{}, p.in...), arg...)
	return p.on.try(all[0], all[1:]...)
}

func onHost(h host) place { return place{h.Name, h.Primary, []string{"busybox"}, h} }
func inContainer(h host, name string, addr netip.Addr) place {
	return place{name, addr, []string{client, "exec", name}, h}
}

// fetch bounds wget from outside: with -T Debian's static one crashes.
func fetch(url string) []string {
	return []string{"timeout", "5", "busybox", "wget", "-q", "-O", "-", url}
}

func TestContainersAreFirstClassCitizens(t *testing.T) {
	vnet, vms := newVNet(t,
		vnetsim.VMConfig{Secondaries: 6, MTU: 9000}, vnetsim.VMConfig{Secondaries: 4, MTU: 9000}, vnetsim.VMConfig{})
	vm1, vm2, plain := vms[0], vms[1], vms[2]
	vm1.withPlugin()
	vm2.withPlugin()
	vm1.network("azure")
	vm1.network("bare", "snat=off")
	vm1.network("alone", "mode=transparent")
	vm2.network("azure")
	servers := []place{
		inContainer(vm1, "a1", vm1.container("azure", "a1", server)),
		inContainer(vm1, "a2", vm1.container("azure", "a2", server)),
		inContainer(vm1, "b1", vm1.container("bare", "b1", server)),
		inContainer(vm2, "a3", vm2.container("azure", "a3", server)),
		inContainer(vm1, "t1", vm1.container("alone", "t1", server)),
	}
	everywhere := append([]place{onHost(vm1), onHost(vm2), onHost(plain)}, servers...)
	a1, b1, t1 := servers[0], servers[2], servers[4]
	var used []netip.Addr
	for _, s := range servers {
		used = append(used, s.addr)
	}

	t.Run("everyone reaches every container, and is seen with their own address", func(t *testing.T) {
		for _, from := range everywhere {
			for _, to := range servers {
				got, err := from.try("sh", "-c", fmt.Sprintf("ping -q -c 1 -W 3 %[1]s >/dev/null || echo no ping; timeout 5 busybox wget -q -O - http://%[1]s/cgi-bin/who", to.addr))
				if err != nil || got != from.addr.String() {
					t.Errorf("%s pings %s, fetches from it and is seen as %q, want %s: %v", from.name, to.name, got, from.addr, err)
				}
			}
		}
	})
	t.Run("a probe is answered, with SNAT and without", func(t *testing.T) {
		for _, to := range servers {
			probed(t, vnet, to.addr)
		}
	})
	t.Run("jumbo frames pass whole, and udev has no MAC to change", func(t *testing.T) {
		const fragments = "awk '/^Ip: [0-9]/{print $20}' /proc/net/snmp" // FragCreates
		for _, from := range []place{a1, t1} {
			if out, err := from.try("sh", "-c", "cat /sys/class/net/eth0/mtu; "+fragments+"; ping -c 1 -W 3 -s 8972 "+servers[3].addr.String()+" >/dev/null && "+fragments); err != nil || out != "9000\n0\n0" {
				t.Errorf("%s: MTU, fragments before and after a large packet:\n%s %v", from.name, out, err)
			}
		}
		// NET_ADDR_SET: given, and neither random nor stolen.
		kinds := []string{a1.on.must("sh", "-c", "cat /sys/class/net/azv*/addr_assign_type")}
		for _, c := range []string{"a1", "t1"} {
			kinds = append(kinds, a1.on.docker("exec", c, "cat", "/sys/class/net/eth0/addr_assign_type"))
		}
		for _, kind := range strings.Fields(strings.Join(kinds, " ")) {
			if kind != "3" {
				t.Errorf("the MACs of veths are of kinds %q, want 3 alone", kinds)
			}
		}
	})
	t.Run("containers reach every host", func(t *testing.T) {
		for _, from := range servers {
			for _, to := range []host{vm1, vm2, plain} {
				if _, err := from.try("ping", "-c", "1", "-W", "3", to.Primary.String()); err != nil {
					t.Errorf("%s does not ping %s: %v", from.name, to.Name, err)
				}
			}
		}
	})
	t.Run("the internet is reached with snat=on and not with snat=off", func(t *testing.T) {
		url := "http://" + vnetsim.InternetAddr.String() + "/"
		for _, from := range []place{a1, t1} {
			if got, err := from.try(fetch(url)...); err != nil || got != vm1.Public.String() {
				t.Errorf("with snat=on the internet sees %s as %q, want %s: %v", from.name, got, vm1.Public, err)
			}
		}
		if got, err := b1.try(fetch(url)...); err == nil {
			t.Errorf("with snat=off the internet answers %q", got)
		}
	})
	t.Run("the host agent is for the host", func(t *testing.T) {
		url := "http://" + vnetsim.HostAgentAddr.String() + "/machine/plugins?comp=nmagent&type=getinterfaceinfov1"
		if got, err := vm1.try("busybox", fetch(url)...); err != nil || !strings.Contains(got, "<Interfaces>") {
			t.Errorf("the host gets %q: %v", got, err)
		}
		for _, from := range []place{a1, b1, t1} {
			if got, err := from.try(fetch(url)...); err == nil {
				t.Errorf("%s gets %.80q", from.name, got)
			}
		}
		for _, from := range []place{a1, t1} {
			if _, err := from.try("nslookup", "internet.test", vnetsim.HostAgentAddr.String()); err != nil {
				t.Errorf("%s asks the host agent's DNS: %v", from.name, err)
			}
		}
	})
	t.Run("IMDS answers with snat=on, unless the host forbids it", func(t *testing.T) {
		h := vm1.in(t)
		url := []string{"timeout", "5", "busybox", "wget", "-q", "-O", "-", "--header", "Metadata: true", "http://169.254.169.254/metadata/instance/network?api-version=2021-02-01"}
		for _, from := range []place{a1, t1} {
			if got, err := from.try(url...); err != nil || !strings.Contains(got, "interface") {
				t.Errorf("%s gets %q: %v", from.name, got, err)
			}
		}
		if got, err := b1.try(url...); err == nil {
			t.Errorf("b1, without SNAT, gets %q", got)
		}
		forbid := "FORWARD -i azure0 -d 169.254.169.254 -j DROP"
		h.must("sh", "-c", "iptables -I "+forbid)
		if got, err := a1.try(url...); err == nil {
			t.Errorf("a1 gets %q though it is forbidden", got)
		}
		h.must("sh", "-c", "iptables -D "+forbid)
	})
	t.Run("containers find each other by name", func(t *testing.T) {
		// Docker's names are those of one network.
		if got, err := a1.try(fetch("http://a2/cgi-bin/who")...); err != nil || got != a1.addr.String() {
			t.Errorf("a2 sees %q, want %s: %v", got, a1.addr, err)
		}
	})
	t.Run("an address and a MAC are had as asked for", func(t *testing.T) {
		want := vm2.Secondaries()[3]
		h := vm2.in(t)
		if got := h.container("azure", "fixed", "sleep 1000", "--ip", want.String(), "--mac-address", "02:aa:bb:cc:dd:ee"); got != want {
			t.Errorf("--ip %s gives %s", want, got)
		}
		if link := h.docker("exec", "fixed", "ip", "link", "show", "eth0"); !strings.Contains(link, "02:aa:bb:cc:dd:ee") {
			t.Errorf("--mac-address is not had: %s", link)
		}
		if _, err := onHost(plain).try("ping", "-c", "1", "-W", "3", want.String()); err != nil {
			t.Errorf("not reached from the plain VM: %v", err)
		}
	})
	t.Run("noise never reaches the fabric", func(t *testing.T) {
		var all sync.WaitGroup
		for _, from := range servers {
			all.Go(func() {
				// Docker turns IPv6 off in a container that has no address of it.
				pid := from.on.docker("inspect", "-f", "{{.State.Pid}}", from.name)
				from.on.must("nsenter", "-n", "-t", pid, "sysctl", "-q", "-w", "net.ipv6.conf.eth0.addr_gen_mode=0", "net.ipv6.conf.eth0.disable_ipv6=0")
				time.Sleep(3 * time.Second) // until its link-local address may be used
				out, err := from.try("sh", "-c", noise)
				sent, bad := strconv.Atoi(out[strings.LastIndex(out, "\n")+1:])
				if err != nil || bad != nil || sent < 3 {
					t.Errorf("%s sent %d multicasts of IPv6: %s %v %v", from.name, sent, out, err, bad)
				}
			})
		}
		all.Wait()
		clean(t, vnet, used...)
	})
	t.Run("what is sent to a container that was just removed stays on the VM", func(t *testing.T) {
		h := vm1.in(t)
		gone := h.container("azure", "gone", server)
		if _, err := a1.try(fetch(fmt.Sprintf("http://%s/cgi-bin/who", gone))...); err != nil {
			t.Fatal(err)
		}
		mac := h.docker("exec", "gone", "cat", "/sys/class/net/eth0/address")
		h.docker("rm", "-f", "gone")
		// The neighbour that a1 had resolved, as it is used until the kernel doubts it.
		h.docker("run", "--rm", "--cap-add", "NET_ADMIN", "--network", "container:a1", "busybox", "sh", "-c",
			fmt.Sprintf("arp -i eth0 -s %s %s && ping -c 3 -W 1 %[1]s; arp -i eth0 -d %[1]s", gone, mac))
		clean(t, vnet)
	})
	t.Run("nobody takes another's address or MAC", func(t *testing.T) {
		h := vm1.in(t)
		for _, network := range []string{"azure", "alone"} {
			name := "thief-" + network
			steal := inContainer(h, name, h.container(network, name, "sleep 1000", "--cap-add", "NET_ADMIN"))
			if _, err := steal.try("ping", "-c", "1", "-W", "3", plain.Primary.String()); err != nil {
				t.Errorf("%s, while it is honest, reaches nobody: %v", name, err)
			}
			for _, theft := range []string{
				"ip addr add " + servers[1].addr.String() + "/32 dev eth0; ping -c 2 -W 1 -I " + servers[1].addr.String() + " " + plain.Primary.String(),
				"ip addr add 10.240.99.99/32 dev eth0; ping -c 2 -W 1 -I 10.240.99.99 " + plain.Primary.String(),
				"ip link set eth0 address 02:de:ad:be:ef:00 && ping -c 2 -W 1 " + plain.Primary.String(),
			} {
				if out, err := steal.try("sh", "-c", theft); err == nil {
					t.Errorf("%s: %s: it is answered: %s", name, theft, out)
				}
			}
			if got, err := onHost(plain).try(fetch(fmt.Sprintf("http://%s/cgi-bin/who", servers[1].addr))...); err != nil || got != plain.Primary.String() {
				t.Errorf("after %s the victim is not reached any more: %q %v", name, got, err)
			}
			h.docker("rm", "-f", name)
		}
	})
	clean(t, vnet, used...)
}

func TestAContainersLife(t *testing.T) {
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 31}, vnetsim.VMConfig{})
	h, plain := vms[0], onHost(vms[1])
	h.withPlugin()
	h.network("azure")
	h.network("alone", "mode=transparent")
	var used []netip.Addr
	reached := func(t *testing.T, name string) {
		t.Helper()
		addr := h.in(t).address(name)
		used = append(used, addr)
		if _, err := plain.try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
			t.Errorf("%s is not reached: %v", name, err)
		}
	}
	for _, network := range []string{"azure", "alone"} {
		t.Run("run, restart, stop, start, rm: "+network, func(t *testing.T) {
			h := h.in(t)
			h.container(network, "one", "sleep 1000")
			reached(t, "one")
			h.docker("restart", "-t", "0", "one")
			reached(t, "one")
			h.docker("stop", "-t", "0", "one")
			h.empty()
			h.docker("start", "one")
			reached(t, "one")
			h.docker("rm", "-f", "one")
			h.empty()
		})
	}
	t.Run("connect and disconnect", func(t *testing.T) {
		h := h.in(t)
		h.docker("run", "-d", "--init", "--name", "two", "busybox", "sleep", "1000")
		h.docker("network", "connect", "azure", "two")
		if s := h.state(); len(s.Leases) != 1 || len(s.Attachments) != 1 {
			t.Errorf("connected, and the state is %+v", s)
		}
		h.docker("network", "disconnect", "azure", "two")
		h.empty()
		h.docker("rm", "-f", "two")
	})
	t.Run("thirty at once have thirty addresses, and leave none", func(t *testing.T) {
		h := h.in(t)
		const count = 30
		names := make([]string, count)
		failed := make(chan error, count)
		for i := range names {
			names[i] = fmt.Sprintf("c%d", i)
			go func() {
				_, err := h.try(client, "run", "-d", "--init", "--network", []string{"azure", "alone"}[i%2], "--name", names[i], "busybox", "sleep", "1000")
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
			addr := h.address(name)
			if other, taken := holder[addr]; taken {
				t.Errorf("%s and %s both have %s", name, other, addr)
			}
			holder[addr] = name
			reached(t, name)
		}
		h.docker(append([]string{"rm", "-f"}, names...)...)
		h.empty()
	})
	t.Run("the last network gone, the host has everything back", func(t *testing.T) {
		h := h.in(t)
		h.docker("network", "rm", "azure", "alone")
		h.docker("plugin", "disable", plugin)
		start := time.Now()
		h.must(top+"/build/azure-vnet-plugin", "uninstall")
		t.Logf("uninstall took %v", time.Since(start).Round(time.Millisecond))
		if out := h.must("ip", "-br", "link"); strings.Contains(out, "azure0") {
			t.Errorf("azure0 still stands:\n%s", out)
		}
		if _, err := plain.try("ping", "-c", "1", "-W", "3", h.Primary.String()); err != nil {
			t.Errorf("the host is not reached: %v", err)
		}
	})
	clean(t, vnet, used...)
}
