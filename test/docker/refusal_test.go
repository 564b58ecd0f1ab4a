// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

func TestRefusalsSayWhatToDo(t *testing.T) {
	t.Parallel()
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
	h := vms[0]
	h.WithPlugin("COOL_DOWN=0s")
	create := func(arg ...string) []string {
		return append(append([]string{"network", "create", "-d", test.Plugin}, arg...), "net")
	}
	azure := func(arg ...string) []string {
		return create(append([]string{"--ipam-driver", test.Plugin, "--subnet", "10.240.0.0/16"}, arg...)...)
	}
	for _, bad := range []struct {
		name string
		arg  []string
		want []string
	}{
		{"an unknown option", azure("-o", "colour=red"), []string{"colour", "snat", "direct"}},
		{"an unknown mode", azure("-o", "mode=tunnel"), []string{"tunnel", "bridge"}},
		{"a bad switch", azure("-o", "snat=maybe"), []string{"on or off"}},
		{"a bad list", azure("-o", "direct=here"), []string{"direct"}},
		{"a bad MTU", azure("-o", "mtu=9"), []string{"mtu"}},
		{"a NIC that is not there", azure("-o", "master=eth9"), []string{"eth9"}},
		{"a bridge name that is a path", azure("-o", "bridge=../x"), []string{"interface name"}},
		{"a bridge name that is too long", azure("-o", "bridge="+strings.Repeat("x", 200)), []string{"15"}},
		{"--ipv6", azure("--ipv6", "--subnet", "fd00:9::/64"), []string{"IPv6"}},
		{"--internal with an option of what leaves", azure("--internal", "-o", "snat=off"), []string{"--internal", "snat"}},
		{"another gateway", azure("--gateway", "10.240.0.9"), []string{"10.240.0.1"}},
		{"a part of the subnet", create("--ipam-driver", test.Plugin, "--subnet", "10.240.1.0/24"), []string{"10.240.0.0/16"}},
		{"a subnet that is not ours", create("--ipam-driver", test.Plugin, "--subnet", "192.168.7.0/24"), []string{"10.240.0.0/16"}},
		{"no subnet", create("--ipam-driver", test.Plugin), []string{"--subnet 10.240.0.0/16"}},
		{"another IPAM", create("--subnet", "10.240.0.0/16"), []string{"--ipam-driver"}},
		{"an unknown IPAM option", azure("--ipam-opt", "x=y"), []string{"master"}},
	} {
		t.Run(bad.name, func(t *testing.T) {
			start := time.Now()
			h.In(t).Refused(bad.arg, bad.want...)
			if took := time.Since(start); took > 20*time.Second {
				t.Errorf("it took %v", took)
			}
		})
	}
	if out := h.Must("ip", "-br", "link"); strings.Contains(out, "azure0") {
		t.Errorf("what was refused left a bridge:\n%s", out)
	}

	h.Network("azure")
	run := func(arg ...string) []string {
		return append(append([]string{"run", "--rm", "--network", "azure"}, arg...), "busybox", "true")
	}
	free := h.Secondaries()[1].String()
	h.Container("azure", "holder", "sleep 1000", "--ip", h.Secondaries()[0].String())
	for _, bad := range []struct {
		name string
		arg  []string
		want []string
	}{
		{"a published port of SCTP", run("-p", "8080:80/sctp"), []string{"SCTP"}},
		{"an address in use", run("--ip", h.Secondaries()[0].String()), []string{h.Secondaries()[0].String()}},
		{"the gateway", run("--ip", "10.240.0.1"), []string{"gateway"}},
		{"the host's own address", run("--ip", h.Primary.String()), []string{h.Primary.String()}},
		{"an address that Azure did not give", run("--ip", "10.240.77.77"), []string{"10.240.77.77"}},
	} {
		t.Run(bad.name, func(t *testing.T) { h.In(t).Refused(bad.arg, bad.want...) })
	}
	t.Run("an option of an endpoint", func(t *testing.T) {
		h := h.In(t)
		h.Docker("run", "-d", "--init", "--name", "plain", "busybox", "sleep", "1000")
		for option, want := range map[string]string{"com.docker.network.endpoint.ifname=lan0": "is not served: the engine names the interfaces", "qos=high": `unknown --driver-opt "qos"`} {
			h.Refused([]string{"network", "connect", "--driver-opt", option, "azure", "plain"}, want)
		}
		h.Docker("rm", "-f", "plain")
	})
	t.Run("an empty pool", func(t *testing.T) {
		h := h.In(t)
		h.Container("azure", "last", "sleep 1000", "--ip", free)
		h.Refused(run(), "2 ", "az network nic ip-config create")
		h.Docker("rm", "-f", "last", "holder")
		h.Empty()
	})
	t.Run("damaged networks.json", func(t *testing.T) {
		h := h.In(t)
		h.Container("azure", "goes", "sleep 1000")
		h.Must("sh", "-euc", "cd /var/lib/docker/plugins/*/propagated-mount; cp networks.json /run/copy; head -c 40 /run/copy >networks.json")
		_, err := h.Try(test.Client, run()...)
		where := regexp.MustCompile(`on the host it is (.*/networks\.json)`).FindStringSubmatch(fmt.Sprint(err))
		if where == nil {
			t.Fatalf("no path in the error: %v", err)
		}
		h.Docker("rm", "-f", "goes")
		h.Must("sh", "-euc", "cp /run/copy "+where[1])
		h.Empty() // the container went meanwhile
		h.Docker(run()...)
	})
	t.Run("a VM without secondary addresses", func(t *testing.T) {
		h := vms[1].In(t)
		h.WithPlugin()
		h.Network("azure")
		h.Refused(run(), "az network nic ip-config create")
	})
}

func TestAddressesThatTheHostHolds(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2, HoldSecondaries: true}, vnetsim.VMConfig{})
	h := vms[0]
	h.WithPlugin()
	h.Network("azure")
	h.Refused([]string{"run", "--rm", "--network", "azure", "busybox", "true"}, "cloud-init", "docker plugin set azure-vnet:latest RECLAIM=on &&")
	h.Docker("plugin", "disable", "-f", test.Plugin)
	h.Docker("plugin", "set", test.Plugin, "RECLAIM=on")
	h.Docker("plugin", "enable", test.Plugin)
	var addr netip.Addr
	test.Eventually(t, "the host gives its secondary addresses up", 35*time.Second, func() bool {
		_, err := h.Try(test.Client, "run", "-d", "--init", "--network", "azure", "--name", "cc", "busybox", "sleep", "1000")
		if err != nil {
			h.Try(test.Client, "rm", "-f", "cc")
			return false
		}
		addr = h.Address("cc")
		return true
	})
	if _, err := test.OnHost(vms[1]).Try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
		t.Errorf("the container is not reached: %v", err)
	}
	test.NothingDropped(t, vnet, addr)
}
