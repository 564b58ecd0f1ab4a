// Copyright (c) The azure-vnet authors. MIT licence.

package host

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// upstreamPod makes a pod of the namespace default with that address, as Azure's own azure-vnet does in transparent
// mode. link is the name that it gives to the host end.
func upstreamPod(n test.Node, name, link string, addr netip.Addr) *libcni.RuntimeConf {
	n.T.Helper()
	n.Must("sh", "-euc", strings.NewReplacer("LINK", link, "POD", name, "ADDR", addr.String()).Replace(`
		ip netns add POD; ip -n POD link set lo up
		ip link add LINK address aa:aa:aa:aa:aa:aa type veth peer name eth0 netns POD
		ip link set LINK up; sysctl -q -w net.ipv4.conf.LINK.proxy_arp=1 net.ipv4.ip_forward=1
		ip -n POD addr add ADDR/16 dev eth0 noprefixroute; ip -n POD link set eth0 up
		ip -n POD route add 169.254.1.1 dev eth0 proto static scope link; ip -n POD route add default via 169.254.1.1
		ip -n POD neigh add 169.254.1.1 lladdr aa:aa:aa:aa:aa:aa dev eth0 nud permanent
		ip route add ADDR dev LINK proto static`))
	return &libcni.RuntimeConf{ContainerID: name + "0123456789abcdef", NetNS: "/run/netns/" + name, IfName: "eth0", Args: [][2]string{
		{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "default"}, {"K8S_POD_NAME", name}}}
}

// On a node where Azure's own azure-vnet ran, its pods keep link, route, address and traffic until their runtime calls
// DEL, which removes that very pod's. Then the address is lent.
func TestCNIBesideAzuresOwnPlugin(t *testing.T) {
	for _, mode := range []string{"bridge", "transparent"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
			n, plain := test.OnNode(vms[0].In(t)), test.OnHost(vms[1].In(t))
			const oldLink, twinLink = "azv0a60ad12f1d", "azv0d7763386da" // of default.old and default.web-0
			old, web := n.Secondaries()[0], n.Secondaries()[1]
			oldPod := upstreamPod(n, "old", oldLink, old)
			upstreamPod(n, "web-0", twinLink, web)
			picture := func() string {
				return n.Must("sh", "-c", "ip -d -o link | grep -E '"+oldLink+"|"+twinLink+"' | sed 's/link-netns.*promisc/promisc/'; ip route show proto static; sysctl -a -r 'net.ipv4.conf.("+oldLink+"|"+twinLink+")' 2>/dev/null")
			}
			before := picture()
			end := pingOn(vms[1].In(t), web)
			works := func(when string) {
				t.Helper()
				reaches(t, test.InPod(n, "old", old), plain.Addr)
				reaches(t, plain, web)
				if diff := cmp.Diff(before, picture()); diff != "" {
					t.Errorf("%s (- before, + now):\n%s", when, diff)
				}
			}
			works("before")
			l := n.List("1.1.0", "azure", test.Azure(`"mode":"`+mode+`"`))
			n.Must("sh", "-c", "! "+n.Dir+"/azure-vnet status | grep broken")
			var used []netip.Addr
			for _, id := range []string{"one", "two"} {
				addr, _ := n.Add(l, n.Pod(id))
				if addr == old || addr == web {
					t.Errorf("%s has %s, which a pod of Azure's own plugin has", id, addr)
				}
				used = append(used, addr)
				reaches(t, test.InPod(n, id, addr), old)
				reaches(t, test.InPod(n, "web-0", web), addr)
				reaches(t, test.InPod(n, id, addr), plain.Addr)
			}
			const whose = " by a route, and no lease tells of it: it is a container's of another plugin"
			if _, _, err := n.TryAdd(l, n.Pod("more")); !test.Says(err, 11, "1 the NIC's own, 2 held, 2 of other containers ("+old.String()+" is led to "+oldLink+whose) {
				t.Errorf("with no other address: %v", err)
			}
			byName := n.List("1.1.0", "azure", strings.Replace(test.Azure(`"mode":"`+mode+`"`), `"azure-vnet-ipam"`, `"azure-vnet-ipam","ipAddress":"`+web.String()+`"`, 1))
			if _, _, err := n.TryAdd(byName, n.Pod("named")); !test.Says(err, 101, web.String()+" is led to "+twinLink+whose) {
				t.Errorf("asked for by name: %v", err)
			}
			if out := n.Must(n.Dir+"/azure-vnet", "status"); !regexp.MustCompile(old.String() + ` +nobody: another plugin's container has it +` + oldLink).MatchString(out) {
				t.Errorf("status says\n%s", out)
			}
			n.Must(n.Dir+"/azure-vnet", "reconcile")
			works("with containers, and after a round")

			// The pod web-0 comes again, as a StatefulSet's does, while its old container is there, and its ADD fails.
			n.Must("ip", "netns", "add", "again")
			for _, again := range []string{"/run/netns/again", "", "/run/netns/gone"} {
				rt := &libcni.RuntimeConf{ContainerID: "again", NetNS: again, IfName: "eth0", Args: [][2]string{{"K8S_POD_NAMESPACE", "default"}, {"K8S_POD_NAME", "web-0"}}}
				n.Del(l, rt)
			}
			valid := &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: "one", IfName: "eth0"}, {ContainerID: "two", IfName: "eth0"}}}
			if err := n.CNI.GCNetworkList(t.Context(), l, valid); err != nil {
				t.Errorf("GC: %v", err)
			}
			works("after DELs of another container of a pod, and GC")

			n.Del(l, oldPod)
			if left := n.Must("sh", "-c", "ip -o link | grep "+oldLink+"; ip route show "+old.String()+"; true"); left != "" {
				t.Errorf("after its DEL there is\n%s", left)
			}
			if got := n.Must("ip", "-n", "old", "-o", "link"); strings.Contains(got, "eth0") {
				t.Errorf("after its DEL the pod has\n%s", got)
			}
			n.Del(l, oldPod)
			reaches(t, plain, web)
			rt := &libcni.RuntimeConf{ContainerID: "more", NetNS: "/run/netns/more", IfName: "eth0"}
			if addr, _ := n.Add(l, rt); addr != old {
				t.Errorf("the next pod has %s, want %s", addr, old)
			}
			reaches(t, test.InPod(n, "more", old), plain.Addr)

			for _, id := range []string{"one", "two", "more"} {
				n.Del(l, &libcni.RuntimeConf{ContainerID: id, NetNS: "/run/netns/" + id, IfName: "eth0"})
			}
			n.Must(n.Dir+"/azure-vnet", "uninstall")
			reaches(t, test.InPod(n, "web-0", web), plain.Addr)
			time.Sleep(time.Second) // a few pings more
			end()
			if left := n.Must("sh", "-c", "ip -o link | grep -oE '(azure0|azv[0-9a-f]{11})' | grep -v "+twinLink+" || true"); left != "" {
				t.Errorf("uninstall left %s", left)
			}
			test.NothingDropped(t, vnet, append(used, old, web)...)
		})
	}
}

// A node whose addresses are all those of pods of Azure's own azure-vnet is full, and not broken: STATUS succeeds.
func TestANodeThatIsFullOfOthersPodsIsReady(t *testing.T) {
	t.Parallel()
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 1})
	n := test.OnNode(vms[0])
	upstreamPod(n, "old", "azv0a60ad12f1d", n.Secondaries()[0])
	l := n.List("1.1.0", "azure", test.Azure())
	if err := n.CNI.GetStatusNetworkList(t.Context(), l); err != nil {
		t.Errorf("STATUS: %v", err)
	}
	if _, _, err := n.TryAdd(l, n.Pod("new")); !test.Says(err, types.ErrTryAgainLater, "1 of other containers") {
		t.Errorf("ADD: %v", err)
	}
}

// upstreamBridge makes azure0 as the bridge mode of Azure's own azure-vnet does: the NIC is a port of it, and has no
// address any more.
const upstreamBridge = `
	ip link add azure0 type bridge mcast_snooping 0; sysctl -q -w net.ipv6.conf.azure0.disable_ipv6=1; ip link set azure0 address $(cat /sys/class/net/eth0/address); ip link set azure0 up
	addr=$(ip -4 -br addr show eth0 | tr -s ' ' | cut -d ' ' -f 3); gateway=$(ip route show default | cut -d ' ' -f 3)
	ip route > /run/routes; ip addr del $addr dev eth0; ip link set eth0 master azure0; ip addr add $addr dev azure0
	ip route add default via $gateway dev azure0
	ip route add 168.63.129.16 via $gateway dev azure0 2>/dev/null || true; ip route add 169.254.169.254 via $gateway dev azure0 2>/dev/null || true`

// A node whose NIC is in the azure0 of Azure's own azure-vnet is not touched: both installers refuse before they change
// anything, STATUS and ADD fail with code 50, status says broken, and each says what to do without cutting off anybody.
// An azure0 that was left empty is refused in the same way, and its remedy works.
func TestCNIOnTheBridgeOfAzuresOwnPlugin(t *testing.T) {
	present, archive := presentBuild(t)
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
	plain := test.OnHost(vms[2])
	const script = "scripts/install-cni-plugin.sh"
	refused := func(n test.Node, l *libcni.NetworkConfigList, words string) {
		t.Helper()
		tool := n.Dir + "/azure-vnet"
		n.Try(tool, "status") // the sources are asked, so neighbours are known
		n.Must("sh", "-euc", `mkdir -p /run/shim && printf '#!/bin/sh\necho "$@" >>/run/docker.calls\n' >/run/shim/docker && chmod +x /run/shim/docker`)
		before, files := picture(n.Host, false), disk(n.Host)
		rt := n.Pod("refused")
		if _, _, err := n.TryAdd(l, rt); !test.Says(err, types.ErrPluginNotAvailable, words) {
			t.Errorf("ADD: %v", err)
		}
		n.Del(l, rt)
		n.Must("ip", "netns", "del", "refused")
		if err := n.CNI.GetStatusNetworkList(t.Context(), l); !test.Says(err, types.ErrPluginNotAvailable, words) {
			t.Errorf("STATUS: %v", err)
		}
		if out, err := n.Try("sh", "-c", tool+" status 2>&1 || echo failed"); !strings.Contains(out, "broken: ") || !strings.Contains(out, words) || !strings.Contains(out, "failed") {
			t.Errorf("status: %v\n%s", err, out)
		}
		fails(n.Host, 1, words, nil, script, archive)
		fails(n.Host, 1, words, nil, "scripts/plugin.sh", "install", "/nowhere", "/nowhere", "/nowhere") // make install
		if calls := n.Must("cat", "/run/docker.calls"); calls != "version" {
			t.Errorf("make install had the engine do %q", calls)
		}
		n.Must("rm", "-r", "/run/docker.calls", "/run/shim")
		same(n.Host, "after the refusals", before, picture(n.Host, false), regexp.MustCompile(mayChange.String()+"| /run/shim/"))
		if diff := cmp.Diff(files, disk(n.Host)); diff != "" {
			t.Errorf("the installer changed files (- before, + after):\n%s", diff)
		}
	}
	t.Run("with the NIC", func(t *testing.T) {
		h := vms[0].In(t)
		ownOpt(h)
		h.Must("sh", "-euc", upstreamBridge)
		n := nodeWith(h, present, t.TempDir())
		end := pingOn(vms[2].In(t), h.Primary)
		for _, mode := range []string{"bridge", "transparent"} {
			refused(n, n.List("1.1.0", "azure", test.Azure(`"mode":"`+mode+`","bridge":"azure0"`)),
				"the NIC is a port of a bridge: eth0 is in azure0, a bridge that is not ours, such as an older azure-vnet's. Nothing was changed. Drain this VM and reboot it without whatever makes azure0")
		}
		time.Sleep(time.Second) // a few pings more
		end()
	})
	t.Run("without the NIC", func(t *testing.T) {
		h := vms[1].In(t)
		ownOpt(h)
		h.Must("ip", "link", "add", "azure0", "type", "bridge")
		n := nodeWith(h, present, t.TempDir())
		l := n.List("1.1.0", "azure", test.Azure(`"bridge":"azure0"`))
		const words = "azure0 is a bridge that is not ours. Nothing was changed. It has no port and no address, such as one that an older azure-vnet left behind: ip link del azure0"
		refused(n, l, words)
		h.Must("ip", "link", "del", "azure0")
		runInstaller(h, nil, archive)
		addr, _ := n.Add(l, n.Pod("served"))
		reaches(t, plain, addr)
		n.Del(l, &libcni.RuntimeConf{ContainerID: "served", NetNS: "/run/netns/served", IfName: "eth0"})
	})
	test.NothingDropped(t, vnet)
}

// Somebody edits leases.json so that a lease is missing while its pod runs: an ADD takes another address, and the next
// round leases that one again to its pod.
func TestALeaseIsTakenOutOfTheFile(t *testing.T) {
	for _, mode := range []string{"bridge", "transparent"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
			n, plain := test.OnNode(vms[0].In(t)), test.OnHost(vms[1].In(t))
			l := n.List("1.1.0", "azure", test.Azure(`"mode":"`+mode+`"`))
			lost, _ := n.Add(l, n.Pod("lost"))
			var file map[string]any
			if err := json.Unmarshal([]byte(n.Must("cat", "/run/azure-vnet/leases.json")), &file); err != nil {
				t.Fatal(err)
			}
			delete(file["leases"].(map[string]any), lost.String())
			body, err := json.Marshal(file)
			if err != nil {
				t.Fatal(err)
			}
			n.Must("sh", "-c", "cat >/run/azure-vnet/leases.json <<'END'\n"+string(body)+"\nEND")
			other, _ := n.Add(l, n.Pod("other"))
			if other == lost {
				t.Fatalf("%s is lent twice", lost)
			}
			if _, _, err := n.TryAdd(l, n.Pod("more")); !test.Says(err, 11, lost.String()+" is led to ") {
				t.Errorf("with no other address: %v", err)
			}
			want := fmt.Sprintf("leased again: %s, which cni/azure/lost/eth0 (pod default/lost) has", lost)
			if out := n.Must(n.Dir+"/azure-vnet", "reconcile"); !strings.Contains(out, want) {
				t.Errorf("reconcile says %q, and not %q", out, want)
			}
			if out := n.Must(n.Dir+"/azure-vnet", "reconcile"); out != "" {
				t.Errorf("a second round says %q", out)
			}
			if s := n.Holds(); !slices.Equal(s.Leases, []string{lost.String(), other.String()}) {
				t.Errorf("%+v is held", s)
			}
			for id, addr := range map[string]netip.Addr{"lost": lost, "other": other} {
				reaches(t, plain, addr)
				n.Del(l, &libcni.RuntimeConf{ContainerID: id, NetNS: "/run/netns/" + id, IfName: "eth0"})
			}
			n.Bare()
			test.NothingDropped(t, vnet, lost, other)
		})
	}
}

// A list as it is in the field is understood, and one of another VM replaces nothing.
func TestListsAsTheyAreInTheField(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
	n := test.OnNode(vms[0])
	own := n.Secondaries()
	list := func(mac string, addrs ...string) {
		t.Helper()
		body := "\ufeff" + `{"Interfaces":[{"MacAddress":"` + mac + `","IsPrimary":true,"IPSubnets":[{"Prefix":" 10.240.0.0 / 16 ","IPAddresses":[{"Address":"` + n.Primary.String() + `","IsPrimary":true}`
		for _, a := range addrs {
			body += `,{"Address":" ` + a + `"}`
		}
		n.Must("sh", "-c", "cat >/run/nics.json <<'END'\n"+body+"]}]}]}\nEND")
	}
	list(n.MAC, "10.240.0.0", "10.240.0.1", "10.240.0.2", "10.240.0.3", "10.240.255.255", own[0].String(), own[1].String())
	l := n.List("1.1.0", "azure", `{"type":"azure-vnet","ipam":{"type":"azure-vnet-ipam","environment":"/run/nics.json","queryInterval":"1"}}`)
	if got, _ := n.Add(l, n.Pod("one")); got != own[0] {
		t.Errorf("lent %s, want %s", got, own[0])
	}
	list("000D3AFFFFFF", "10.240.9.9")
	n.Must("sed", "-i", `s/"at":-\?[0-9]*/"at":-60000000000/g`, "/run/azure-vnet/leases.json") // older than the interval
	if got, _ := n.Add(l, n.Pod("two")); got != own[1] {
		t.Errorf("lent %s, want %s", got, own[1])
	}
	const says51 = "it lists no NIC of this VM, but 00:0d:3a:ff:ff:ff"
	if _, _, err := n.TryAdd(l, n.Pod("three")); !test.Says(err, 11, says51) {
		t.Errorf("ADD: %v", err)
	}
	for _, id := range []string{"one", "two"} {
		reaches(t, test.OnHost(vms[1]), own[map[string]int{"one": 0, "two": 1}[id]])
		n.Del(l, &libcni.RuntimeConf{ContainerID: id, NetNS: "/run/netns/" + id, IfName: "eth0"})
	}
	n.Bare()
	test.NothingDropped(t, vnet, own...)
}
