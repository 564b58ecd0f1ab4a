// Copyright (c) The azure-vnet authors. MIT licence.

package host

import (
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
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
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
	vm, other := vms[0], vms[1]
	vm.Must("sh", "-c", withFirewalld)
	vm.WithPlugin()
	vm.Network("azure")
	vm.Network("alone", "mode=transparent")
	containers := []test.Place{
		test.InContainer(vm, "web", vm.Container("azure", "web", test.Server)),
		test.InContainer(vm, "alone", vm.Container("alone", "alone", test.Server)),
	}
	works := func(when string) {
		t.Helper()
		for _, c := range containers {
			test.Eventually(t, when+": "+c.Name+" reaches the internet and is reached", 5*time.Second, func() bool {
				_, out := c.Try("timeout", "2", "wget", "-q", "-O", "-", "http://203.0.113.10/")
				_, in := test.OnHost(other).Try("timeout", "2", "busybox", "wget", "-q", "-O", "-", "http://"+c.Addr.String()+"/cgi-bin/who")
				return out == nil && in == nil
			})
		}
		// The engine puts it there when it hears of the reload, as we do.
		test.Eventually(t, when+": docker0 is in the zone docker", 10*time.Second, func() bool {
			zone, _ := vm.Try("firewall-cmd", "--get-zone-of-interface=docker0")
			return zone == "docker"
		})
	}
	works("at first")
	vm.Must("firewall-cmd", "--reload")
	works("after a reload")
	test.NothingDropped(t, vnet, containers[0].Addr, containers[1].Addr)
}
