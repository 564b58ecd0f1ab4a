// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netns"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// published asks azure-vnet-plugin status which ports are, as docker ps would
// write them.
func published(h test.Host) []string {
	h.T.Helper()
	var report struct {
		Attachments []struct {
			Ports []struct {
				Proto, HostAddr string
				HostPort, Port  int
			}
		}
	}
	if err := json.Unmarshal([]byte(h.Must(test.PluginBinary, "status", "-json")), &report); err != nil {
		h.T.Fatal(err)
	}
	out := []string{}
	for _, a := range report.Attachments {
		for _, p := range a.Ports {
			out = append(out, fmt.Sprintf("%s:%d->%d/%s", p.HostAddr, p.HostPort, p.Port, p.Proto))
		}
	}
	slices.Sort(out)
	return out
}

func publishes(h test.Host, want ...string) {
	h.T.Helper()
	if diff := cmp.Diff(append([]string{}, want...), published(h)); diff != "" {
		h.T.Errorf("published (-want +got):\n%s", diff)
	}
}

// internetFetches fetches from the internet.
func internetFetches(t *testing.T, vnet *vnetsim.VNet, url string) (string, error) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	out, err := vnet.Internet.Run(ctx, "timeout", test.Fetch(url)[1:]...)
	return strings.TrimSpace(out), err
}

// answerUDP answers in a container's namespace each datagram with its sender's
// address: no program of the image can.
func answerUDP(h test.Host, container string, port int) {
	h.T.Helper()
	sandbox := filepath.Base(h.Docker("inspect", "-f", "{{.NetworkSettings.SandboxKey}}", container))
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	back, err := netns.Get()
	if err != nil {
		h.T.Fatal(err)
	}
	defer back.Close()
	there, err := netns.GetFromPath(fmt.Sprintf("/proc/%d/root/run/docker/netns/%s", h.PidOne(), sandbox))
	if err != nil {
		h.T.Fatal(err)
	}
	defer there.Close()
	if err := netns.Set(there); err != nil {
		h.T.Fatal(err)
	}
	server, err := net.ListenUDP("udp4", &net.UDPAddr{Port: port})
	if bad := netns.Set(back); bad != nil {
		panic(bad) // this thread must not go on elsewhere
	}
	if err != nil {
		h.T.Fatal(err)
	}
	h.T.Cleanup(func() { server.Close() })
	go func() {
		for b := make([]byte, 64); ; {
			_, from, err := server.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			server.WriteToUDPAddrPort([]byte(from.Addr().Unmap().String()), from)
		}
	}()
}

// askUDP sends a datagram from a namespace and returns what is answered.
func askUDP(t *testing.T, from *vnetsim.Namespace, to netip.AddrPort) (string, error) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	c, err := from.DialContext(ctx, "udp4", to.String())
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(3 * time.Second))
	if _, err := c.Write([]byte("who?")); err != nil {
		return "", err
	}
	b := make([]byte, 64)
	n, err := c.Read(b)
	return string(b[:n]), err
}

func TestPublishedPorts(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 6}, vnetsim.VMConfig{})
	vm, plain := vms[0], vms[1]
	vm.WithPlugin()
	vm.Network("azure")
	vm.Network("bare", "snat=off")
	vm.Network("alone", "mode=transparent")
	client1 := test.InContainer(vm, "other", vm.Container("azure", "other", "sleep 1000"))
	vm.Docker("run", "-d", "--init", "--name", "nat", "busybox", "sleep", "1000")
	nat := test.InContainer(vm, "nat", vm.Primary) // its own bridge masquerades it
	who := func(addr netip.Addr, port int) []string {
		return test.Fetch(fmt.Sprintf("http://%s/cgi-bin/who", netip.AddrPortFrom(addr, uint16(port))))
	}
	loopback := netip.MustParseAddr("127.0.0.1")

	t.Run("a port is reached from everywhere", func(t *testing.T) {
		h := vm.In(t)
		web := test.InContainer(h, "web", h.Container("azure", "web", test.Server, "-p", "8080:80"))
		bare := test.InContainer(h, "bare", h.Container("bare", "bare", test.Server, "-p", "8081:80"))
		lone := test.InContainer(h, "lone", h.Container("alone", "lone", test.Server, "-p", "8083:80"))
		publishes(h, ":8080->80/tcp", ":8081->80/tcp", ":8083->80/tcp")
		for _, firewall := range []struct{ call, policy string }{{"0", "ACCEPT"}, {"0", "DROP"}, {"1", "DROP"}} {
			h.Must("sysctl", "-w", "net.bridge.bridge-nf-call-iptables="+firewall.call)
			h.Must("iptables", "-P", "FORWARD", firewall.policy)
			for port, to := range map[int]test.Place{8080: web, 8081: bare, 8083: lone} {
				for _, from := range []test.Place{test.OnHost(plain), test.OnHost(h), web, bare, lone, client1, nat} {
					want := from.Addr
					if from.Name == to.Name {
						want = h.Primary // it reaches itself by the host
					}
					if got, err := from.Try(who(h.Primary, port)...); err != nil || got != want.String() {
						t.Errorf("%v: %s fetches from port %d and is seen as %q, want %s: %v", firewall, from.Name, port, got, want, err)
					}
				}
				if _, err := test.OnHost(h).Try(who(loopback, port)...); err != nil {
					t.Errorf("%v: the host does not fetch from 127.0.0.1:%d: %v", firewall, port, err)
				}
				if got, err := internetFetches(t, vnet, fmt.Sprintf("http://%s:%d/cgi-bin/who", h.Public, port)); err != nil || got != "192.0.2.1" {
					t.Errorf("%v: the internet fetches from port %d and is seen as %q: %v", firewall, port, got, err)
				}
			}
		}
	})
	t.Run("UDP too", func(t *testing.T) {
		h := vm.In(t)
		h.Container("azure", "dns", "sleep 1000", "-p", "5353:53/udp")
		answerUDP(h, "dns", 53)
		for _, from := range []struct {
			name string
			in   *vnetsim.Namespace
			to   netip.Addr
			seen string
		}{
			{"another VM", plain.Namespace, h.Primary, plain.Primary.String()},
			{"its host", h.Namespace, h.Primary, h.Primary.String()},
			{"the internet", vnet.Internet, h.Public, "192.0.2.1"},
		} {
			if got, err := askUDP(t, from.in, netip.AddrPortFrom(from.to, 5353)); err != nil || got != from.seen {
				t.Errorf("%s is seen as %q, want %s: %v", from.name, got, from.seen, err)
			}
		}
		if _, err := askUDP(t, h.Namespace, netip.AddrPortFrom(loopback, 5353)); err != nil {
			t.Errorf("the host at 127.0.0.1: %v", err)
		}
		h.Docker("rm", "-f", "dns")
		if got, err := askUDP(t, plain.Namespace, netip.AddrPortFrom(h.Primary, 5353)); err == nil {
			t.Errorf("after its container a port still answers %q", got)
		}
	})
	t.Run("who has a port is told", func(t *testing.T) {
		h := vm.In(t)
		run := func(arg ...string) []string {
			return append(append([]string{"run", "--rm", "--network", "azure"}, arg...), "busybox", "true")
		}
		h.Refused(run("-p", "8080:90"), "8080/tcp", "published to "+h.Address("web").String())
		h.Docker("run", "-d", "--init", "--name", "holder", "--network", "host", "busybox", "httpd", "-f", "-p", "9000")
		test.Eventually(t, "somebody listens", 10*time.Second, func() bool {
			_, err := h.Try("sh", "-c", "ss -tln | grep -q :9000")
			return err == nil
		})
		h.Refused(run("-p", "9000:90"), "9000/tcp", "the host itself listens")
		h.Refused(run("-p", "10.9.9.9:90:90"), "10.9.9.9 is not an address of this host")
		h.Docker("rm", "-f", "holder")
		h.Docker("run", "-d", "--init", "--name", "docker0", "-p", "8082:80", "busybox", "sleep", "1000")
		h.Refused(run("-p", "8082:90"), "8082/tcp")
		h.Docker("rm", "-f", "docker0")
		publishes(h, ":8080->80/tcp", ":8081->80/tcp", ":8083->80/tcp")
	})
	t.Run("who comes later is told, and takes nothing", func(t *testing.T) {
		h := vm.In(t)
		h.Refused([]string{"run", "--rm", "-p", "8080:80", "busybox", "true"}, "address already in use")
		h.Refused([]string{"run", "--rm", "-p", "8081:80/udp", "-p", "8081:80", "busybox", "true"}, "address already in use")
		if out, err := h.Try("busybox", "nc", "-l", "-p", "8081", "-w", "1"); err == nil || !strings.Contains(err.Error()+out, "in use") {
			t.Errorf("a program of the host listens at a published port: %s %v", out, err)
		}
		for _, port := range []int{8080, 8081} {
			for _, from := range []test.Place{test.OnHost(plain), test.OnHost(h)} {
				if got, err := from.Try(who(h.Primary, port)...); err != nil || got != from.Addr.String() {
					t.Errorf("%s fetches from port %d and is seen as %q: %v", from.Name, port, got, err)
				}
			}
		}
		publishes(h, ":8080->80/tcp", ":8081->80/tcp", ":8083->80/tcp")
	})
	t.Run("it outlives a flushed ruleset and a dead plugin", func(t *testing.T) {
		h := vm.In(t)
		h.Must("nft", "flush", "ruleset")
		test.Eventually(t, "the port is reached again", 35*time.Second, func() bool {
			_, err := test.OnHost(plain).Try(who(h.Primary, 8080)...)
			return err == nil
		})
		h.Docker("plugin", "disable", "-f", test.Plugin)
		for _, port := range []int{8080, 8081, 8083} {
			if _, err := test.OnHost(plain).Try(who(h.Primary, port)...); err != nil {
				t.Errorf("port %d: %v", port, err)
			}
		}
		h.Docker("plugin", "enable", test.Plugin)
	})
	t.Run("a port ends with its container, and is free for the next", func(t *testing.T) {
		h := vm.In(t)
		h.Docker("restart", "-t", "0", "web", "lone")
		publishes(h, ":8080->80/tcp", ":8081->80/tcp", ":8083->80/tcp")
		for _, port := range []int{8080, 8083} {
			if got, err := internetFetches(t, vnet, fmt.Sprintf("http://%s:%d/cgi-bin/who", h.Public, port)); err != nil {
				t.Errorf("after a restart, port %d: %q %v", port, got, err)
			}
		}
		h.Docker("rm", "-f", "web", "bare", "lone")
		publishes(h)
		if _, err := test.OnHost(plain).Try(who(h.Primary, 8080)...); err == nil {
			t.Error("a port answers without its container")
		}
		h.Container("azure", "web", test.Server, "-p", "8080:80")
		if _, err := test.OnHost(plain).Try(who(h.Primary, 8080)...); err != nil {
			t.Error(err)
		}
		h.Docker("rm", "-f", "web")
	})
	t.Run("ranges, one address, a port of our choice, UDP", func(t *testing.T) {
		h := vm.In(t)
		h.Container("azure", "many", test.Server, "-p", "7000-7002:80-82", "-p", "127.0.0.1:7100:80", "-p", h.Primary.String()+":7101:80", "-p", "80", "-p", "7200:53/udp")
		got := published(h)
		chosen := regexp.MustCompile(`^:(\d{5})->80/tcp$`)
		i := slices.IndexFunc(got, chosen.MatchString)
		if i < 0 {
			t.Fatalf("no port was chosen: %v", got)
		}
		var free int
		fmt.Sscan(chosen.FindStringSubmatch(got[i])[1], &free)
		if diff := cmp.Diff([]string{h.Primary.String() + ":7101->80/tcp", "127.0.0.1:7100->80/tcp", ":7000->80/tcp", ":7001->81/tcp", ":7002->82/tcp", ":7200->53/udp"}, slices.Delete(slices.Clone(got), i, i+1)); diff != "" {
			t.Errorf("published (-want +got):\n%s", diff)
		}
		for _, c := range []struct {
			from test.Place
			to   netip.Addr
			port int
			want bool
		}{
			{test.OnHost(plain), h.Primary, 7000, true}, {test.OnHost(plain), h.Primary, free, true}, {test.OnHost(plain), h.Primary, 7101, true},
			{test.OnHost(plain), h.Primary, 7100, false}, {test.OnHost(h), loopback, 7100, true}, {test.OnHost(h), loopback, 7101, false},
		} {
			if _, err := c.from.Try(who(c.to, c.port)...); (err == nil) != c.want {
				t.Errorf("%s reaches %s:%d: %v, want %v", c.from.Name, c.to, c.port, err, c.want)
			}
		}
		h.Docker("rm", "-f", "many")
	})
	t.Run("nothing is left", func(t *testing.T) {
		h := vm.In(t)
		h.Docker("rm", "-f", "other", "nat")
		h.Empty()
	})
	test.NothingDropped(t, vnet, vm.Primary)
}
