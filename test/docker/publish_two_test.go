// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// TestPortsBesideASecondNetwork: a published port leads to its container after every connect, disconnect and restart,
// whichever of its networks comes first and has its default route: Docker's own bridge publishes it then, or we do.
func TestPortsBesideASecondNetwork(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	h, neighbour := vms[0], test.OnHost(vms[1])
	h.WithPlugin()
	h.Network("azure")
	h.Docker("network", "create", "aa") // goes before azure, and zz after it: an engine's order of gateways
	h.Docker("network", "create", "zz")
	const web = "echo from $HOSTNAME >/index.html; httpd -f -p 80 -h /"
	run := func(network, name, port string) {
		h.Docker("run", "-d", "--init", "--network", network, "--name", name, "-h", name, "-p", port+":80", "busybox", "sh", "-c", web)
	}
	// From the internet, because VMs of the container's subnet do not reach the port in each of these steps: see lost.
	reached := func(name, port, when string) {
		t.Helper()
		var out string
		for end := time.Now().Add(10 * time.Second); out != "from "+name && time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
			out, _ = internetFetches(t, vnet, "http://"+h.Public.String()+":"+port+"/")
		}
		if out != "from "+name {
			t.Errorf("%s: port %s leads to %q and not to %s", when, port, out, name)
		}
	}
	atPort := func(name, port string) {
		t.Helper()
		if out, err := neighbour.Try(test.Fetch("http://" + h.Primary.String() + ":" + port + "/")...); out != "from "+name {
			t.Errorf("a VM of the container's subnet does not reach %s at port %s: %q %v", name, port, out, err)
		}
	}
	// A container whose default route is by Docker's bridge answers a VM of its subnet by our link, with the bridge's
	// address. So the VM does not reach the port, as docs/docker.md says. It reaches the container at its own address.
	lost := func(name, port string) {
		t.Helper()
		gateway := h.Docker("network", "inspect", "-f", "{{(index .IPAM.Config 0).Gateway}}", "aa")
		if way := h.Docker("exec", name, "ip", "route"); !strings.Contains(way, "default via "+gateway+" ") {
			t.Errorf("the default route of %s is not Docker's bridge's, %s:\n%s", name, gateway, way)
		}
		if out, err := neighbour.Try("timeout", "2", "busybox", "wget", "-q", "-O", "-", "http://"+h.Primary.String()+":"+port+"/"); err == nil {
			t.Errorf("a VM of the container's subnet reaches port %s, %q: docs/docker.md says that it does not", port, out)
		}
		own := h.Docker("inspect", "-f", "{{.NetworkSettings.Networks.azure.IPAddress}}", name)
		if out, err := neighbour.Try(test.Fetch("http://" + own + "/")...); out != "from "+name {
			t.Errorf("a VM of the container's subnet does not reach %s at its own address %s: %q %v", name, own, out, err)
		}
	}
	run("azure", "first", "8200")
	run("aa", "second", "8201")
	run("zz", "third", "8202")
	reached("first", "8200", "run on azure")
	atPort("first", "8200")
	for _, step := range []struct{ arg, name, port string }{
		{"network connect aa first", "first", "8200"},
		{"restart -t 0 first", "first", "8200"},
		{"network disconnect aa first", "first", "8200"},
		{"network connect zz first", "first", "8200"},
		{"restart -t 0 first", "first", "8200"},
		{"network disconnect azure first", "first", "8200"},
		{"network connect azure first", "first", "8200"},
		{"network connect azure second", "second", "8201"},
		{"restart -t 0 second", "second", "8201"},
		{"network disconnect aa second", "second", "8201"},
		{"restart -t 0 second", "second", "8201"},
		{"network connect azure third", "third", "8202"},
		{"restart -t 0 third", "third", "8202"},
		{"network disconnect zz third", "third", "8202"},
	} {
		h.Docker(strings.Fields(step.arg)...)
		reached(step.name, step.port, step.arg)
		switch step.arg {
		case "network connect azure second":
			lost(step.name, step.port)
		case "network disconnect aa second":
			atPort(step.name, step.port)
		}
	}
	publishes(h, ":8200->80/tcp", ":8201->80/tcp", ":8202->80/tcp")

	// While a container of ours has a port, none of Docker's bridges is given it, also when the plugin was killed.
	taken := func(when string) {
		t.Helper()
		_, err := h.Try(test.Client, "run", "--rm", "-p", "8201:80", "busybox", "true")
		if err == nil || !strings.Contains(err.Error(), "address already in use") {
			t.Errorf("%s: a container of Docker's bridge is given a port of ours: %v", when, err)
		}
		reached("second", "8201", when)
	}
	taken("while it runs")
	killPlugin(h)
	test.Eventually(t, "the plugin holds the port again", 60*time.Second, func() bool {
		time.Sleep(4 * time.Second) // this very container would keep the plugin from the port
		_, err := h.Try(test.Client, "run", "--rm", "-p", "8201:80", "busybox", "true")
		return err != nil
	})
	taken("after the plugin was killed")
	h.Docker("rm", "-f", "first", "second", "third")
	h.Docker("run", "--rm", "-p", "8201:80", "busybox", "true")
	h.Empty()
	test.NothingDropped(t, vnet)
}
