// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// inWords runs a docker command that fails with an error that says all of want and none of not.
func inWords(h test.Host, arg, want []string, not ...string) {
	h.T.Helper()
	_, err := h.Try(test.Client, arg...)
	if err == nil {
		h.T.Errorf("docker %s: it succeeded", strings.Join(arg, " "))
		return
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			h.T.Errorf("docker %s: the error does not say %q: %v", strings.Join(arg, " "), w, err)
		}
	}
	for _, n := range not {
		if strings.Contains(err.Error(), n) {
			h.T.Errorf("docker %s: the error says %q: %v", strings.Join(arg, " "), n, err)
		}
	}
}

// TestWhoHoldsIsNamedInDockersWords: an error names the holder of an address, a port or a MAC as docker ps and docker
// network ls do.
func TestWhoHoldsIsNamedInDockersWords(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 6}, vnetsim.VMConfig{})
	h, plain := vms[0], test.OnHost(vms[1])
	h.WithPlugin("COOL_DOWN=0s")
	ours, subnet := h.Secondaries(), h.Prefix.String()
	aux, pod := ours[5], ours[4]
	h.Network("azure")
	createNetwork(h, "second", "--subnet", subnet, "--aux-address", "printer="+aux.String(), "--aux-address", "other="+plain.Addr.String())
	web := h.Container("azure", "web", test.Server, "-p", "8080:80")
	run := func(network string, arg ...string) []string {
		return append(append([]string{"run", "--rm", "--network", network}, arg...), "busybox", "true")
	}
	create := func(arg ...string) []string {
		return append(append([]string{"network", "create", "-d", test.Plugin, "--ipam-driver", test.Plugin, "--subnet", subnet}, arg...), "third")
	}
	// The PoolID, and the owners that leases and links have, are words of ours alone.
	h.Must("sh", "-euc", "echo '"+`{"cniVersion":"1.0.0","name":"pods","type":"bridge","ipam":{"type":"azure-vnet-ipam"}}`+"' | CNI_COMMAND=ADD CNI_CONTAINERID=c0ffee CNI_NETNS=/proc/self/ns/net CNI_IFNAME=eth7 CNI_PATH=/ CNI_ARGS=IP="+pod.String()+" "+test.Top+"/build/cni/azure-vnet-ipam")
	for _, c := range []struct {
		name string
		arg  []string
		want string
	}{
		{"an address of a container", run("azure", "--ip", web.String()), "is held by container web of network azure"},
		{"an address of a container of another network", run("second", "--ip", web.String()), "is held by container web of network azure"},
		{"an address of a container for a network", create("--aux-address", "x="+web.String()), "is held by container web of network azure"},
		{"a port", run("second", "-p", "8080:90"), "(container web of network azure)"},
		{"a range of ports", run("second", "-p", "8080:90", "-p", "8080-8080:91"), "container web of network azure"},
		{"a MAC", run("second", "--mac-address", "02:42:0a:f0:00:05"), "container web of network azure"},
		{"an auxiliary address", run("azure", "--ip", aux.String()), "is auxiliary address printer of network second"},
		{"an auxiliary address of its own network", run("second", "--ip", aux.String()), "is auxiliary address printer of network second"},
		{"an auxiliary address for another network", create("--aux-address", "x="+aux.String()), "is auxiliary address printer of network second"},
		{"an auxiliary address that is another VM's", run("azure", "--ip", plain.Addr.String()), "is auxiliary address other of network second"},
		{"an address of a CNI runtime's container", run("azure", "--ip", pod.String()), "is held by CNI container c0ffee (interface eth7, network pods)"},
		{"an address of a CNI runtime's container, reserved", create("--aux-address", "x="+pod.String()), "is held by CNI container c0ffee (interface eth7, network pods)"},
	} {
		t.Run(c.name, func(t *testing.T) { inWords(h.In(t), c.arg, []string{c.want}, "docker/", "_16-", "cni/") })
	}
	h.Docker("rm", "-f", "web")
	test.NothingDropped(t, vnet)
}

// TestAnAddressThatCannotBeLentSaysWhy: az network nic ip-config create is advised for an address that Azure would give.
func TestAnAddressThatCannotBeLentSaysWhy(t *testing.T) {
	t.Parallel()
	subnet := netip.MustParsePrefix("10.240.0.0/16")
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 1, NICs: []vnetsim.NICConfig{{Subnet: subnet, Secondaries: 1}}})
	h := vms[0]
	h.WithPlugin("COOL_DOWN=0s")
	h.Network("azure")
	other := h.NICs()[1]
	for _, c := range []struct{ name, addr, want string }{
		{"the host's own", h.Primary.String(), "it is the own address of NIC " + h.NICs()[0].MAC},
		{"the host's own, on another NIC", other.Primary.String(), "it is the own address of NIC " + other.MAC},
		{"another NIC's", other.Secondaries[0].String(), "it is an ipconfig of NIC " + other.MAC},
		{"the gateway", "10.240.0.1", "it is the subnet's gateway"},
		{"a reserved one", "10.240.0.2", "Azure reserves it"},
		{"the last reserved one", "10.240.0.3", "Azure reserves it"},
		{"the broadcast address", "10.240.255.255", "as the broadcast address"},
	} {
		t.Run(c.name, func(t *testing.T) {
			inWords(h.In(t), []string{"run", "--rm", "--network", "azure", "--ip", c.addr, "busybox", "true"}, []string{c.addr, c.want}, "az network")
		})
	}
	t.Run("one that Azure would give", func(t *testing.T) {
		inWords(h.In(t), []string{"run", "--rm", "--network", "azure", "--ip", "10.240.77.77", "busybox", "true"},
			[]string{"az network nic ip-config create -g GROUP --nic-name NIC -n NAME --private-ip-address 10.240.77.77", "leave out --ip"})
	})
	h.Empty()
	test.NothingDropped(t, vnet)
}

// TestCreateWarnsOfWhatHelpsNobody: a range without an ipconfig, and an auxiliary address that the host has. Both may be
// meant for later, so the network is made.
func TestCreateWarnsOfWhatHelpsNobody(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2})
	h := vms[0]
	h.WithPlugin()
	subnet := h.Prefix.String()
	createNetwork(h, "well", "--subnet", subnet, "--ip-range", h.Secondaries()[0].String()+"/32", "--aux-address", "other=10.240.9.9")
	if log := h.DockerLog(); strings.Contains(log, "--ip-range") || strings.Contains(log, "--aux-address") {
		t.Errorf("a network that is as it should be is warned of:\n%s", log)
	}
	createNetwork(h, "odd", "--subnet", subnet, "--ip-range", "10.240.9.0/24", "--aux-address", "vm="+h.Primary.String())
	for _, want := range []string{"level=warning msg=\\\"--ip-range 10.240.9.0/24: NIC ", "--aux-address vm=" + h.Primary.String() + " is the own address of NIC "} {
		test.Eventually(t, "the log says "+want, 5*time.Second, func() bool { return strings.Contains(h.DockerLog(), want) })
	}
	h.Docker("network", "rm", "well", "odd")
	h.Empty()
	test.NothingDropped(t, vnet)
}

// TestAContainerOnTwoNetworksOfOneNIC: the engine refuses the second interface, and the container goes on as it was.
func TestAContainerOnTwoNetworksOfOneNIC(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	h, plain := vms[0], test.OnHost(vms[1])
	h.WithPlugin("COOL_DOWN=0s")
	h.Network("azure")
	h.Network("second", "mode=transparent")
	addr := h.Container("azure", "web", test.Server)
	h.Refused([]string{"network", "connect", "second", "web"}, "conflicts with existing route")
	test.Seen(t, plain, addr, plain.Addr)
	holds(h, 1)

	// A stopped container takes the second network, and does not start then.
	h.Docker("create", "--init", "--network", "azure", "--name", "later", "busybox", "sleep", "1000")
	h.Docker("network", "connect", "second", "later")
	h.Refused([]string{"start", "later"}, "conflicts with existing route")
	holds(h, 1)
	h.Docker("network", "disconnect", "second", "later")
	h.Docker("start", "later")
	holds(h, 2)
	h.Docker("rm", "-f", "web", "later")
	h.Empty()
	test.NothingDropped(t, vnet, addr)
}

// TestASwarmNetworkWithoutAConfigurationIsRefused: a manager makes such a network without a subnet and without an
// IpamDriver. The first call of a node comes with its first task.
func TestASwarmNetworkWithoutAConfigurationIsRefused(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2})
	h := vms[0]
	h.WithPlugin()
	h.Docker("swarm", "init", "--advertise-addr", h.Primary.String())
	h.Docker("network", "create", "--config-only", "--subnet", h.Prefix.String(), "half-config")
	for network, option := range map[string][]string{
		"bare": nil, "driver": {"--ipam-driver", test.Plugin, "--subnet", h.Prefix.String()}, "half": {"--config-from", "half-config"},
	} {
		h.Docker(append(append([]string{"network", "create", "--scope", "swarm", "-d", test.Plugin}, option...), network)...)
		h.Docker("service", "create", "--detach", "--name", network, "--network", network, "--endpoint-mode", "dnsrr", "--no-resolve-image", "--restart-condition", "none", "busybox", "true")
	}
	for _, service := range []string{"bare", "driver", "half"} {
		why := ""
		test.Eventually(t, "the error of the task of "+service+" is known", 30*time.Second, func() bool {
			why = h.Docker("service", "ps", "--no-trunc", "--format", "{{.Error}}", service)
			return why != ""
		})
		for _, want := range []string{"swarm network", "--config-from CONFIG", "--ipam-driver " + test.Plugin} {
			if !strings.Contains(why, want) {
				t.Errorf("the task of %s does not say %q: %s", service, want, why)
			}
		}
	}
	h.Docker("service", "rm", "bare", "driver", "half")
	h.Empty()
	test.NothingDropped(t, vnet)
}
