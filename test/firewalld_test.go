// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
)

// withFirewalld starts a firewalld with a bus of its own, in which eth0 is in the zone public by name.
const withFirewalld = `mount -t tmpfs tmpfs /var/log && mkdir -p /run/dbus /etc/firewalld/zones && dbus-daemon --system --fork
sed 's,</zone>,<interface name="eth0"/></zone>,' /usr/lib/firewalld/zones/public.xml >/etc/firewalld/zones/public.xml
firewalld --nofork --nopid </dev/null >/run/firewalld.log 2>&1 &
for i in $(seq 300); do
	dbus-send --system --print-reply --dest=org.fedoraproject.FirewallD1 /org/fedoraproject/FirewallD1 org.fedoraproject.FirewallD1.getDefaultZone >/dev/null 2>&1 && exit
	sleep 0.1
done
cat /run/firewalld.log >&2; exit 1`

// The managed plugin, which has no capability but CAP_NET_ADMIN and the host's bus only below /host/run, keeps its
// containers in touch under firewalld. It hears of a reload, which makes firewalld forget what was told at run time.
// The network of Docker's own keeps its zone.
func TestDockerWithFirewalld(t *testing.T) {
	t.Parallel()
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
	vm, other := vms[0], vms[1]
	vm.must("sh", "-c", withFirewalld)
	vm.withPlugin()
	vm.network("azure")
	vm.network("alone", "mode=transparent")
	containers := []place{
		inContainer(vm, "web", vm.container("azure", "web", server)),
		inContainer(vm, "alone", vm.container("alone", "alone", server)),
	}
	works := func(when string) {
		t.Helper()
		for _, c := range containers {
			eventually(t, when+": "+c.name+" reaches the internet and is reached", 5*time.Second, func() bool {
				_, out := c.try("timeout", "2", "wget", "-q", "-O", "-", "http://203.0.113.10/")
				_, in := onHost(other).try("timeout", "2", "busybox", "wget", "-q", "-O", "-", "http://"+c.addr.String()+"/cgi-bin/who")
				return out == nil && in == nil
			})
		}
		if zones := vm.must("firewall-cmd", "--get-zone-of-interface=docker0"); zones != "docker" {
			t.Errorf("%s: docker0 is in the zone %q", when, zones)
		}
	}
	works("at first")
	vm.must("firewall-cmd", "--reload")
	works("after a reload")
	clean(t, vnet, containers[0].addr, containers[1].addr)
}
