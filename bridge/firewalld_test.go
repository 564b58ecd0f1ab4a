// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
)

// walled is a VM with a firewalld, with a container of each mode, and those that they talk with.
type walled struct {
	*host
	v          *vnetsim.VNet
	containers []*container // of mode bridge, then transparent
	far        *container   // on another VM
	told       watching
}

// newWalled starts a firewalld whose zone public has eth0 by name and lets ssh in, and then attaches the containers.
func newWalled(t *testing.T) *walled {
	v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 3}, vnetsim.VMConfig{Secondaries: 1})
	w := &walled{host: hosts[0], v: v}
	w.Host = New(Config{Run: fmt.Sprintf("/proc/%d/root/run", w.PidOne())}) // where its bus is
	w.sh(`mount -t tmpfs tmpfs /var/log && mkdir -p /run/dbus /etc/firewalld/zones && dbus-daemon --system --fork
sed 's,</zone>,<interface name="eth0"/></zone>,' /usr/lib/firewalld/zones/public.xml >/etc/firewalld/zones/public.xml`)
	w.startFirewalld()
	for i, mode := range Modes {
		w.mustEnsure(w.spec(mode))
		c := w.running(i, mode, Policy{SNAT: true})
		c.place().serve(t, c.name, ":8080")
		w.containers = append(w.containers, c)
	}
	hosts[1].mustEnsure(hosts[1].spec(ModeBridge))
	w.far = hosts[1].running(0, ModeBridge, Policy{SNAT: true})
	w.far.place().serve(t, "far", ":8080")
	w.place().serve(t, "ssh", ":22")
	w.place().serve(t, "closed", ":8000")
	internet(v).serve(t, "internet", vnetsim.InternetAddr.String()+":8000")
	w.told = w.watch()
	return w
}

// startFirewalld returns when it answers.
func (w *walled) startFirewalld() {
	w.t.Helper()
	w.sh(`firewalld --nofork --nopid </dev/null >/run/firewalld.log 2>&1 & echo $! >/run/firewalld.pid
for i in $(seq 300); do ` + dbus("zone.getInterfaces", "public") + ` 2>&1 && exit; sleep 0.1; done
cat /run/firewalld.log >&2; exit 1`)
}

// paths are what firewalld lets pass, beside what it always does.
type paths struct {
	open    bool // between containers and all others
	in      bool // from others to containers
	among   bool // from container to container
	trusted bool // from others to every port of the host
}

var allPaths = paths{open: true, in: true, among: true}

// checkPaths demands that these paths are open, and no others. The host's ports are never more open to containers than to
// the NIC in a zone that trusts nobody.
func (w *walled) checkPaths(t *testing.T, are paths) {
	t.Helper()
	all := &checks{t: t}
	defer all.wait.Wait()
	expect := func(from place, to netip.Addr, port int, open bool, server, client string) {
		want := answers{server: client}
		if !open {
			want = nil
		}
		all.expectAnswers(from, fmt.Sprintf("tcp/%s:%d", to, port), want)
	}
	host := w.Primary
	for i, c := range w.containers {
		other := w.containers[1-i]
		expect(c.place(), w.far.addr, 8080, are.open, "far", c.addr.String())
		expect(c.place(), vnetsim.InternetAddr, 8000, are.open, "internet", w.Public.String())
		expect(c.place(), other.addr, 8080, are.among, other.name, c.addr.String())
		expect(w.far.place(), c.addr, 8080, are.in, c.name, w.far.addr.String())
		expect(w.far.host.place(), c.addr, 8080, are.in, c.name, w.far.Primary.String())
		expect(w.place(), c.addr, 8080, true, c.name, host.String())
		expect(c.place(), host, 22, true, "ssh", c.addr.String())
		expect(c.place(), host, 8000, false, "", "")
	}
	expect(w.far.place(), host, 22, true, "ssh", w.far.addr.String())
	expect(w.far.place(), host, 8000, are.trusted, "closed", w.far.addr.String())
}

// dbus is a line of the shell that calls a method of firewalld's as firewall-cmd does, which takes much longer to start.
func dbus(method string, words ...string) string {
	return "dbus-send --system --print-reply --dest=org.fedoraproject.FirewallD1 /org/fedoraproject/FirewallD1 org.fedoraproject.FirewallD1." +
		method + " string:" + strings.Join(words, " string:") + " >/dev/null"
}

// zones are firewalld's at run time, or for good.
func (w *walled) zones(permanent bool) string {
	w.t.Helper()
	if permanent {
		return w.sh("cd /etc/firewalld && find . -type f | sort | xargs sha256sum")
	}
	return w.sh("firewall-cmd --list-all-zones")
}

// zoneOf matches what firewalld's rules say of a link's zone.
var zoneOf = regexp.MustCompile(`iifname "(az\S+)" goto filter_FWD_(\w+)`)

// checkZone demands that the zone has our links, or that none has.
func (w *walled) checkZone(t *testing.T, zone string) {
	t.Helper()
	got := map[string]string{}
	for _, m := range zoneOf.FindAllStringSubmatch(w.sh("nft list chain inet firewalld filter_FORWARD_ZONES"), -1) {
		got[m[1]] = m[2]
	}
	want := map[string]string{"azure0": zone, "azv*": zone}
	if zone == "" {
		want = map[string]string{}
	}
	if !maps.Equal(got, want) {
		t.Errorf("our links are in the zones %v, want %v", got, want)
	}
}

// remedy is a command of status, for now.
var remedy = regexp.MustCompile(`firewall-cmd --zone=[^;]*`)

// change makes a change of the administrator's, waits until Watch tells of it, and then reconciles, as the plugin does. It
// returns how long that took.
func (w *walled) change(t *testing.T, line string) time.Duration {
	t.Helper()
	w.told.drain()
	w.sh(line)
	begun := time.Now()
	if !w.told.within(5 * time.Second) {
		t.Error("Watch does not tell")
	}
	w.reconcile()
	return time.Since(begun)
}

// hang stops a process while f runs, and demands that all is well when it goes on.
func (w *walled) hang(t *testing.T, pid string, f func()) {
	t.Helper()
	w.sh("kill -STOP " + pid)
	func() {
		defer w.sh("kill -CONT " + pid)
		f()
	}()
	w.whole("when it goes on")
}

// Under a real firewalld, our links join the zone that the NIC is in by name, and where that cannot be, nothing is changed and
// status says what to do. The host's ports are never more open than the NIC's zone has them, and what firewalld has for good
// is untouched.
func TestFirewalld(t *testing.T) {
	t.Parallel()
	w := newWalled(t)
	forGood := w.zones(true)
	t.Run("the NIC in a zone by name", func(t *testing.T) {
		w.checkZone(t, "public")
		w.whole("joined")
		w.checkPaths(t, allPaths)
	})
	t.Run("reload", func(t *testing.T) {
		if took := w.change(t, "firewall-cmd --reload"); took > 4*time.Second { // on a machine that other tests use too
			t.Errorf("%v after the reload", took)
		}
		w.whole("after a reload")
		w.checkPaths(t, allPaths)
	})
	for _, test := range []struct {
		name   string
		change string // of the administrator
		names  string
		paths  paths
		remedy string // instead of the one that status gives
	}{
		{name: "no forwarding within the zone", change: "firewall-cmd --zone=public --remove-forward", names: "the firewalld zone public of eth0 forwards nothing within itself"},
		{name: "the NIC in the zone by default only", change: dbus("zone.removeInterface", "public", "eth0"), names: "eth0 is in the firewalld zone public by default only"},
		{name: "the NIC in trusted", change: dbus("zone.changeZoneOfInterface", "trusted", "eth0"), names: "every port of the host would be open to them", paths: paths{in: true, trusted: true}, remedy: dbus("zone.changeZoneOfInterface", "public", "eth0")},
	} {
		t.Run(test.name, func(t *testing.T) {
			w.change(t, test.change)
			w.checkZone(t, "")
			w.checkPaths(t, test.paths)
			wrong := w.broken()
			if len(wrong) != 2 || !strings.Contains(wrong[0], test.names) || !strings.Contains(wrong[1], test.names) {
				t.Fatalf("broken: %q, and not twice %q", wrong, test.names)
			}
			if mended := w.reconcile(); len(mended) > 0 {
				t.Errorf("mended %q", mended)
			}
			w.change(t, cmp.Or(test.remedy, remedy.FindString(wrong[0])))
			w.checkZone(t, "public")
			w.checkPaths(t, allPaths)
			w.whole("with the remedy")
		})
	}
	t.Run("the NIC moves to another zone", func(t *testing.T) {
		for _, zone := range []string{"internal", "public"} {
			w.change(t, dbus("zone.changeZoneOfInterface", zone, "eth0"))
			w.checkZone(t, zone)
			w.whole("in the zone " + zone)
			w.checkPaths(t, allPaths)
		}
	})
	t.Run("a zone of the administrator's choice", func(t *testing.T) {
		w.change(t, dbus("zone.changeZoneOfInterface", "internal", "azure0")+" && "+dbus("zone.changeZoneOfInterface", "internal", "azv+"))
		w.checkZone(t, "internal")
		w.whole("in a zone of the administrator's choice")
		w.checkPaths(t, paths{among: true})
		w.change(t, dbus("zone.removeInterface", "internal", "azure0")+" && "+dbus("zone.removeInterface", "internal", "azv+"))
		w.checkZone(t, "public")
	})
	t.Run("a zone that masquerades", func(t *testing.T) {
		w.sh("firewall-cmd --zone=public --add-masquerade")
		w.reconcile()
		w.checkZone(t, "public")
		wrong := w.broken()
		if len(wrong) != 1 || !strings.Contains(wrong[0], "masquerades") {
			t.Fatalf("broken: %q", wrong)
		}
		w.sh(remedy.FindString(wrong[0]))
		w.whole("with the remedy")
		w.forgetFlows()
		w.checkPaths(t, allPaths)
	})
	t.Run("restart", func(t *testing.T) {
		w.told.drain()
		w.sh("kill -9 $(cat /run/firewalld.pid)")
		w.told.drain()
		if wrong := w.broken(); len(wrong) != 1 || !strings.Contains(wrong[0], "its rules stand, and it does not run") {
			t.Errorf("killed: broken: %q", wrong) // another error would tell that the bus tried to start it
		}
		w.sh("nft delete table inet firewalld") // one that was killed adds its rules to those that stand
		w.told.drain()
		w.startFirewalld()
		for end := time.Now().Add(10 * time.Second); len(w.reconcile()) == 0; {
			if !w.told.within(time.Until(end)) {
				t.Fatal("Watch does not tell")
			}
		}
		w.checkZone(t, "public")
		w.checkPaths(t, allPaths)
	})
	t.Run("firewalld hangs", func(t *testing.T) {
		if !soaking {
			t.Skip("takes long: make soak")
		}
		w.hang(t, "$(cat /run/firewalld.pid)", func() {
			w.ip("link set azure0 mtu 1300")
			begun := time.Now()
			mended := w.reconcile()
			if took := time.Since(begun); len(mended) == 0 || took > 8*time.Second {
				t.Errorf("in %v mended %q", took, mended)
			}
			begun = time.Now()
			c := w.container(2)
			w.mustEnsure(w.spec(ModeBridge))
			w.mustAttach(c.endpoint(ModeBridge, Policy{SNAT: true}))
			if took := time.Since(begun); took > 2*time.Second {
				t.Errorf("a container was attached in %v", took)
			}
			if !c.pings(w.far.addr) {
				t.Error("it is cut off")
			}
			w.mustDetach(c.endpoint(ModeBridge, Policy{}).Owner)
		})
	})
	t.Run("the bus hangs", func(t *testing.T) {
		if !soaking {
			t.Skip("takes long: make soak")
		}
		w.hang(t, "$(cat /run/dbus/pid)", func() {
			if wrong := w.broken(); len(wrong) != 1 || !strings.Contains(wrong[0], "gave no answer within 2s") {
				t.Errorf("broken: %q", wrong)
			}
		})
	})
	t.Run("killed before it joins or after it left", func(t *testing.T) {
		if !soaking {
			t.Skip("takes long: make soak")
		}
		round := func() { _ = w.Do(func() error { _, err := w.Reconcile(t.Context()); return err }) }
		w.sh(dbus("zone.removeInterface", "public", "azure0"))
		if !w.crash("join", round) {
			t.Error("no link joins")
		}
		w.reconcile()
		w.checkZone(t, "public")
		w.sh(dbus("zone.removeInterface", "public", "eth0"))
		if !w.crash("forget zone", round) {
			t.Error("no zone is forgotten")
		}
		w.reconcile()
		w.checkZone(t, "")
		w.sh(dbus("zone.addInterface", "public", "azure0")) // somebody's now
		w.sh(dbus("zone.addInterface", "public", "azv+"))
		w.reconcile()
		w.checkZone(t, "public")
		w.sh(dbus("zone.removeInterface", "public", "azure0") + "; " + dbus("zone.removeInterface", "public", "azv+") + "; " + dbus("zone.addInterface", "public", "eth0"))
		w.reconcile()
		w.checkZone(t, "public")
	})
	checkSame(t, "what firewalld has for good", forGood, w.zones(true))
	t.Run("the remedy for good", func(t *testing.T) {
		w.change(t, "firewall-cmd --permanent --zone=public --remove-interface=eth0 && firewall-cmd --reload")
		w.checkZone(t, "")
		_, command, _ := strings.Cut(w.broken()[0], "; ")
		w.change(t, command+" && firewall-cmd --reload")
		w.checkZone(t, "public")
		w.whole("with the remedy")
	})
	t.Run("the back-end iptables", func(t *testing.T) {
		for _, backend := range []string{"iptables", "nftables"} {
			w.sh("kill $(cat /run/firewalld.pid); while kill -0 $(cat /run/firewalld.pid) 2>/dev/null; do sleep 0.05; done; sed -i s/^FirewallBackend=.*/FirewallBackend=" + backend + "/ /etc/firewalld/firewalld.conf")
			w.startFirewalld()
			w.reconcile()
			w.whole("with " + backend)
			w.checkPaths(t, allPaths)
		}
	})
	forGood = w.zones(true)
	t.Run("uninstall", func(t *testing.T) {
		before := w.zones(false)
		w.sh(dbus("zone.changeZoneOfInterface", "internal", "azv+")) // and so the administrator's
		w.reconcile()
		for i, mode := range Modes {
			w.mustDetach(w.containers[i].endpoint(mode, Policy{}).Owner)
		}
		if err := w.removeAll(); err != nil {
			t.Fatal(err)
		}
		if got := w.zones(false); strings.Contains(got, "azure0") || !strings.Contains(got, "azv+") {
			t.Errorf("after uninstall:\n%s", got)
		}
		w.sh(dbus("zone.removeInterface", "internal", "azv+"))
		checkSame(t, "the zones", strings.NewReplacer(" azure0", "", " azv+", "").Replace(before), w.zones(false))
	})
	checkSame(t, "what firewalld has for good, after uninstall", forGood, w.zones(true))
	checkFabric(t, w.v, w.containers[0].addr, w.containers[1].addr, w.far.addr, w.Primary)
}
