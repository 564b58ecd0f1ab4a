// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
)

func TestRefusalsSayWhatToDo(t *testing.T) {
	_, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
	h := vms[0]
	h.withPlugin("COOL_DOWN=0s")
	create := func(arg ...string) []string {
		return append(append([]string{"network", "create", "-d", plugin}, arg...), "net")
	}
	azure := func(arg ...string) []string {
		return create(append([]string{"--ipam-driver", plugin, "--subnet", "10.240.0.0/16"}, arg...)...)
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
		{"a part of the subnet", create("--ipam-driver", plugin, "--subnet", "10.240.1.0/24"), []string{"10.240.0.0/16"}},
		{"a subnet that is not ours", create("--ipam-driver", plugin, "--subnet", "192.168.7.0/24"), []string{"10.240.0.0/16"}},
		{"no subnet", create("--ipam-driver", plugin), []string{"--subnet 10.240.0.0/16"}},
		{"another IPAM", create("--subnet", "10.240.0.0/16"), []string{"--ipam-driver"}},
		{"an unknown IPAM option", azure("--ipam-opt", "x=y"), []string{"master"}},
	} {
		t.Run(bad.name, func(t *testing.T) {
			start := time.Now()
			h.in(t).refused(bad.arg, bad.want...)
			if took := time.Since(start); took > 20*time.Second {
				t.Errorf("it took %v", took)
			}
		})
	}
	if out := h.must("ip", "-br", "link"); strings.Contains(out, "azure0") {
		t.Errorf("what was refused left a bridge:\n%s", out)
	}

	h.network("azure")
	run := func(arg ...string) []string {
		return append(append([]string{"run", "--rm", "--network", "azure"}, arg...), "busybox", "true")
	}
	free := h.Secondaries()[1].String()
	h.container("azure", "holder", "sleep 1000", "--ip", h.Secondaries()[0].String())
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
		t.Run(bad.name, func(t *testing.T) { h.in(t).refused(bad.arg, bad.want...) })
	}
	t.Run("an empty pool", func(t *testing.T) {
		h := h.in(t)
		h.container("azure", "last", "sleep 1000", "--ip", free)
		h.refused(run(), "2 ", "az network nic ip-config create")
		h.docker("rm", "-f", "last", "holder")
		h.empty()
	})
	t.Run("damaged networks.json", func(t *testing.T) {
		h := h.in(t)
		h.container("azure", "goes", "sleep 1000")
		h.must("sh", "-euc", "cd /var/lib/docker/plugins/*/propagated-mount; cp networks.json /run/copy; head -c 40 /run/copy >networks.json")
		_, err := h.try(client, run()...)
		where := regexp.MustCompile(`on the host it is (.*/networks\.json)`).FindStringSubmatch(fmt.Sprint(err))
		if where == nil {
			t.Fatalf("no path in the error: %v", err)
		}
		h.docker("rm", "-f", "goes")
		h.must("sh", "-euc", "cp /run/copy "+where[1])
		h.empty() // the container went meanwhile
		h.docker(run()...)
	})
	t.Run("a VM without secondary addresses", func(t *testing.T) {
		h := vms[1].in(t)
		h.withPlugin()
		h.network("azure")
		h.refused(run(), "az network nic ip-config create")
	})
}

func TestAddressesThatTheHostHolds(t *testing.T) {
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 2, HoldSecondaries: true}, vnetsim.VMConfig{})
	h := vms[0]
	h.withPlugin()
	h.network("azure")
	h.refused([]string{"run", "--rm", "--network", "azure", "busybox", "true"}, "cloud-init", "docker plugin set azure-vnet:latest RECLAIM=on &&")
	h.docker("plugin", "disable", "-f", plugin)
	h.docker("plugin", "set", plugin, "RECLAIM=on")
	h.docker("plugin", "enable", plugin)
	var addr netip.Addr
	eventually(t, "the host gives its secondary addresses up", 35*time.Second, func() bool {
		_, err := h.try(client, "run", "-d", "--init", "--network", "azure", "--name", "cc", "busybox", "sleep", "1000")
		if err != nil {
			h.try(client, "rm", "-f", "cc")
			return false
		}
		addr = h.address("cc")
		return true
	})
	if _, err := onHost(vms[1]).try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
		t.Errorf("the container is not reached: %v", err)
	}
	clean(t, vnet, addr)
}
