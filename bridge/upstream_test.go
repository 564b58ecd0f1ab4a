// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
)

// The names that Azure's own azure-vnet gives to host ends, as seen: of the pod default.old in transparent mode, and
// of the container 0123456789abcdef of the network azure in bridge mode.
const upstreamPodLink, upstreamContainerLink = "azv0a60ad12f1d", "azv5c95bee9efa"

// upstreamPod makes a pod with the n-th secondary address as Azure's own azure-vnet does in transparent mode.
func (h *host) upstreamPod(n int, link string) *container {
	h.t.Helper()
	c := &container{h, "up" + link[3:], h.NICs()[0], h.Secondaries()[n]}
	h.sh(strings.NewReplacer("LINK", link, "POD", c.name, "ADDR", c.addr.String()).Replace(`set -e
ip netns add POD; ip -n POD link set lo up
ip link add LINK address aa:aa:aa:aa:aa:aa type veth peer name eth0 netns POD
ip link set LINK up; echo 1 >/proc/sys/net/ipv4/conf/LINK/proxy_arp
ip -n POD addr add ADDR/32 dev eth0; ip -n POD link set eth0 up
ip -n POD route add 169.254.1.1 dev eth0 proto static scope link; ip -n POD route add default via 169.254.1.1
ip -n POD neigh add 169.254.1.1 lladdr aa:aa:aa:aa:aa:aa dev eth0 nud permanent
ip route add ADDR dev LINK proto static; echo 1 >/proc/sys/net/ipv4/ip_forward`))
	return c
}

// netns is the path of c's namespace as this process sees it.
func (c *container) netns() string {
	return fmt.Sprintf("/proc/%d/root/run/netns/%s", c.PidOne(), c.name)
}

// A pod that Azure's own azure-vnet runs keeps its link, its route, its address and its traffic while containers of
// ours come and go, and when all of ours is removed.
func TestUpstreamsPodKeepsItsNetwork(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 3}, vnetsim.VMConfig{Secondaries: 1})
		h, far := hosts[0], hosts[1]
		pod := h.upstreamPod(0, upstreamPodLink).answer()
		const picture = "ip -d link show " + upstreamPodLink + "; ip addr show " + upstreamPodLink + "; ip route show dev " + upstreamPodLink +
			"; ip neigh show nud permanent dev " + upstreamPodLink + "; grep -r . /proc/sys/net/ipv4/conf/" + upstreamPodLink
		before := h.sh(picture)
		// Of this host's containers the pod sees the host's address: its link is no NIC, so they are masqueraded.
		works := func(when string, ours map[*container]netip.Addr) {
			t.Helper()
			c := &checks{t: t}
			c.reaches(pod.place(), h.Primary, far.Primary)
			c.reaches(h.place(), pod.addr, far.Primary)
			c.reaches(far.place(), pod.addr)
			c.sees(far.Primary, far.place(), pod.addr, tcpPort, udpPort)
			for o, seen := range ours {
				c.reaches(pod.place(), o.addr)
				c.sees(seen, o.place(), pod.addr, tcpPort, udpPort)
			}
			c.wait.Wait()
			checkSame(t, when, before, h.sh(picture))
		}
		works("before", nil)
		for _, h := range hosts {
			h.mustEnsure(h.spec(mode))
		}
		works("prepared", nil)
		near, away := h.running(1, mode, Policy{SNAT: true}), far.running(0, mode, Policy{SNAT: true})
		both := map[*container]netip.Addr{near: h.Primary, away: away.addr}
		works("with containers", both)
		thief := h.container(2)
		e := thief.endpoint(mode, Policy{SNAT: true})
		e.Addr = netip.PrefixFrom(pod.addr, 16)
		if _, err := h.attach(e); err == nil || !strings.Contains(err.Error(), "a route to "+pod.addr.String()+" is there that is not ours") {
			t.Errorf("its address is taken: %v", err)
		}
		if mended := h.reconcile(); len(mended) > 0 {
			t.Errorf("mended %q", mended)
		}
		h.whole("beside the pod")
		works("after a round", both)
		h.mustDetach(near.endpoint(mode, Policy{}).Owner)
		delete(both, near)
		works("when ours has ended", both)
		if err := h.removeAll(); err != nil {
			t.Fatal(err)
		}
		works("when all of ours is removed", both)
		checkFabric(t, v, pod.addr, h.Primary)
	})
}

// The names are those that were seen on a host of Azure's own azure-vnet.
func TestUpstreamsNames(t *testing.T) {
	t.Parallel()
	byID, byPod := UpstreamContainer{Network: "azure", ContainerID: "0123456789abcdef", IfName: "eth0", PodNamespace: "default", PodName: "old"}.hostEnds()
	if byID != upstreamContainerLink || byPod != upstreamPodLink {
		t.Errorf("names are %s and %s, want %s and %s", byID, byPod, upstreamContainerLink, upstreamPodLink)
	}
	if _, byPod := (UpstreamContainer{Network: "azure", ContainerID: "0123456789abcdef", IfName: "eth0"}).hostEnds(); byPod != "" {
		t.Errorf("without a pod the name is %q", byPod)
	}
}

// The link that Azure's own azure-vnet gave to a container is removed for that container alone, with its route. The link
// of the pod's next container stays, and so does a link of anybody else that has such a name.
func TestRemoveUpstreamLink(t *testing.T) {
	t.Parallel()
	pod := UpstreamContainer{Network: "azure", ContainerID: "fedcba9876543210", IfName: "eth0", PodNamespace: "default", PodName: "old"}
	byID := UpstreamContainer{Network: "azure", ContainerID: "0123456789abcdef", IfName: "eth0"}
	with := func(c UpstreamContainer, change func(*UpstreamContainer)) UpstreamContainer { change(&c); return c }
	inOneMode(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
		h := hosts[0]
		h.mustEnsure(h.spec(mode))
		ours := h.running(0, mode, Policy{SNAT: true}) // a later container of the same pod
		other := h.upstreamPod(1, "azv00000000001")
		own := h.kernelState()
		for name, tt := range map[string]struct {
			link    string
			make    string // instead of a pod; LINK and POD are its names
			c       UpstreamContainer
			netns   string // POD, OURS, OTHER, or a path
			removes bool
		}{
			"a pod's link, for its container":                    {link: upstreamPodLink, c: pod, netns: "POD", removes: true},
			"a pod's link, for the pod's next container":         {link: upstreamPodLink, c: pod, netns: "OURS"},
			"a pod's link, for another pod's container":          {link: upstreamPodLink, c: pod, netns: "OTHER"},
			"a pod's link, and no namespace told":                {link: upstreamPodLink, c: pod},
			"a pod's link, and a namespace that is gone":         {link: upstreamPodLink, c: pod, netns: "/nowhere"},
			"a pod's link, and a namespace that is a file":       {link: upstreamPodLink, c: pod, netns: "/etc/passwd"},
			"a pod's link, and the host's own namespace":         {link: upstreamPodLink, c: pod, netns: "HOST"},
			"a pod's link, for another interface":                {link: upstreamPodLink, c: with(pod, func(c *UpstreamContainer) { c.IfName = "eth1" }), netns: "POD"},
			"a pod's link, and no pod told":                      {link: upstreamPodLink, c: with(pod, func(c *UpstreamContainer) { c.PodName = "" }), netns: "POD"},
			"a pod's link, of another namespace's pod":           {link: upstreamPodLink, c: with(pod, func(c *UpstreamContainer) { c.PodNamespace = "kube-system" }), netns: "POD"},
			"a container's link, for it":                         {link: upstreamContainerLink, c: byID, netns: "POD", removes: true},
			"a container's link, and no namespace told":          {link: upstreamContainerLink, c: byID, removes: true},
			"a container's link, and a namespace that is gone":   {link: upstreamContainerLink, c: byID, netns: "/nowhere", removes: true},
			"a container's link, and another's namespace":        {link: upstreamContainerLink, c: byID, netns: "OTHER"},
			"a container's link, for another network":            {link: upstreamContainerLink, c: with(byID, func(c *UpstreamContainer) { c.Network = "other" }), netns: "POD"},
			"a container's link, by the beginning of its id":     {link: upstreamContainerLink, c: with(byID, func(c *UpstreamContainer) { c.ContainerID = "01234567" }), netns: "POD"},
			"a pod's link that somebody put an alias on":         {link: upstreamPodLink, make: "ip link set LINK alias mine", c: pod, netns: "POD"},
			"a link of ours, half made, with a container's name": {link: upstreamContainerLink, make: "ip link set LINK group 16863", c: byID},
			"a bridge with a container's name":                   {link: upstreamContainerLink, make: "ip link del LINK; ip link add LINK type bridge", c: byID},
		} {
			t.Run(name, func(t *testing.T) {
				c := h.upstreamPod(2, tt.link)
				defer h.sh("ip link del " + tt.link + " 2>/dev/null; ip netns del " + c.name)
				if tt.make != "" {
					h.sh(strings.NewReplacer("LINK", tt.link, "POD", c.name).Replace(tt.make))
				}
				h.sh("conntrack -I -p udp -s " + c.addr.String() + " -d 8.8.8.8 --sport 5353 --dport 53 --timeout 100 2>/dev/null; true")
				tt.c.Netns = tt.netns
				switch tt.netns {
				case "POD":
					tt.c.Netns = c.netns()
				case "OURS":
					tt.c.Netns = ours.netns()
				case "OTHER":
					tt.c.Netns = other.netns()
				case "HOST":
					tt.c.Netns = fmt.Sprintf("/proc/%d/ns/net", h.PidOne())
				}
				links := h.sh("ip -o link | cut -d ' ' -f 2")
				for _, want := range []string{map[bool]string{true: tt.link}[tt.removes], ""} { // and a repeat is success
					var got string
					if err := h.Do(func() (err error) { got, err = h.RemoveUpstreamLink(t.Context(), tt.c); return err }); err != nil || got != want {
						t.Errorf("removed %q, %v; want %q", got, err, want)
					}
				}
				if !tt.removes {
					checkSame(t, "links", links, h.sh("ip -o link | cut -d ' ' -f 2"))
					return
				}
				if left := h.sh("ip route show " + c.addr.String() + "; ip -o link | grep " + tt.link + "; conntrack -L 2>/dev/null | grep -wF " + c.addr.String() + "; true"); left != "" {
					t.Errorf("left: %s", left)
				}
			})
		}
		checkSame(t, "ours", own, h.kernelState())
		c := &checks{t: t}
		c.reaches(hosts[1].place(), ours.addr, other.addr)
		c.wait.Wait()
		checkFabric(t, v, ours.addr, other.addr)
	})
}

// Only DEL removes what Azure's own azure-vnet attached: no round does, nor does what it calls broken.
func TestReconcileLeavesUpstreamsLinks(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 3})
		h := hosts[0]
		pod := h.upstreamPod(0, upstreamPodLink)
		h.upstreamPod(1, upstreamContainerLink)
		h.mustEnsure(h.spec(mode))
		h.running(2, mode, Policy{SNAT: true})
		const picture = "ip -o link | cut -d ' ' -f 2; ip route show proto static"
		links := h.sh(picture)
		if mended := h.reconcile(); len(mended) > 0 {
			t.Errorf("mended %q", mended)
		}
		h.whole("beside them")
		checkSame(t, "links and routes", links, h.sh(picture))
		if !pod.pings(h.Primary) {
			t.Error("the pod is cut off")
		}
	})
}

// upstreamRulesOf2018 are the rules that the bridge mode of Azure's own azure-vnet leaves in ebtables.
const upstreamRulesOf2018 = `-A PREROUTING -p ARP --arp-op Request --arp-ip-dst HOST -j arpreply --arpreply-mac NIC
-A PREROUTING -p ARP -i eth0 --arp-op Reply -j dnat --to-dst ff:ff:ff:ff:ff:ff --dnat-target ACCEPT
-A PREROUTING -p ARP --arp-op Request --arp-ip-dst POD -j arpreply --arpreply-mac 42:21:c2:04:c7:cd
-A PREROUTING -p IPv4 -i eth0 --ip-dst POD -j dnat --to-dst 42:21:c2:04:c7:cd --dnat-target ACCEPT
-A POSTROUTING -s Unicast -o eth0 -j snat --to-src NIC --snat-arp --snat-target ACCEPT`

// Rules that Azure's own azure-vnet left in ebtables are named, also before the first container, with the commands
// that delete them. These delete nothing else. Nobody but a person deletes them, and containers do without.
func TestUpstreamsRulesAreNamed(t *testing.T) {
	t.Parallel()
	inOneMode(t, func(t *testing.T, mode Mode) {
		v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
		h := hosts[0]
		const others = "-i vnet0 -j DROP"
		h.sh("ebtables-nft -t nat -A PREROUTING " + others + "; ebtables-nft -t nat -A PREROUTING -p ARP --arp-ip-dst 192.0.2.7 -j DROP")
		h.whole("with rules of others alone")
		theirs := h.sh("ebtables-nft -t nat -L")
		h.sh(strings.NewReplacer("\n", "; ", "-A ", "ebtables-nft -t nat -A ", "HOST", h.Primary.String(), "POD", h.Secondaries()[0].String(), "NIC", h.MAC).Replace(upstreamRulesOf2018))
		all := h.sh("ebtables-nft -t nat -L")
		named := func(when string) (commands []string) {
			t.Helper()
			wrong := h.broken()
			if len(wrong) != 1 || !strings.Contains(wrong[0], "ebtables has rules of others for eth0") {
				t.Fatalf("%s: broken: %q", when, wrong)
			}
			_, remedy, _ := strings.Cut(wrong[0], "runs any more: ")
			return strings.Split(remedy, "; ")
		}
		if got := named("before the first container"); len(got) != 5 {
			t.Errorf("the commands are %q", got)
		}
		h.mustEnsure(h.spec(mode))
		ours := h.running(1, mode, Policy{SNAT: true})
		if mended := h.reconcile(); len(mended) > 0 {
			t.Errorf("mended %q", mended)
		}
		if got := h.sh("ebtables-nft -t nat -L"); got != all {
			t.Errorf("the rules were\n%s\nand are\n%s", all, got)
		}
		c := &checks{t: t}
		c.reaches(ours.place(), h.Primary, hosts[1].Primary, vnetsim.InternetAddr)
		c.reaches(hosts[1].place(), ours.addr)
		c.wait.Wait()
		h.sh("set -e; " + strings.Join(named("with a container"), "; "))
		h.whole("with the remedy")
		if got := h.sh("ebtables-nft -t nat -L"); got != theirs {
			t.Errorf("with the remedy, the rules of others were\n%s\nand are\n%s", theirs, got)
		}
		checkFabric(t, v, ours.addr)
	})
}

// An azure0 that Azure's own azure-vnet left, without the NIC in it, keeps containers away in bridge mode alone. The
// remedy is to delete it where nobody can rely on it, and works; else it is a reboot.
func TestUpstreamsEmptyBridge(t *testing.T) {
	t.Parallel()
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
	h := hosts[0]
	const drain, remedy = "drain this VM and reboot it without whatever makes azure0", "ip link del azure0"
	says := func(when, want, not string) {
		t.Helper()
		_, err := h.ensure(h.spec(ModeBridge))
		_, nameErr := h.bridgeNameFor(h.spec(ModeBridge))
		texts := append([]string{fmt.Sprint(err), fmt.Sprint(nameErr)}, h.broken()...)
		if len(texts) != 3 {
			t.Errorf("%s: broken: %q", when, texts[2:])
		}
		for _, text := range texts {
			if !strings.Contains(text, "azure0 is a bridge that is not ours") || !strings.Contains(text, want) || strings.Contains(text, not) {
				t.Errorf("%s: %q, want %q and not %q", when, text, want, not)
			}
		}
	}
	h.ip("link add azure0 type bridge", "addr add 192.168.7.1/24 dev azure0")
	says("with an address", drain, remedy)
	h.ip("addr del 192.168.7.1/24 dev azure0")
	pod := h.upstreamPod(0, upstreamContainerLink)
	h.ip("link set " + upstreamContainerLink + " master azure0")
	says("with a pod", drain, remedy)
	h.sh("ip netns del " + pod.name)
	for h.try("ip link show " + upstreamContainerLink) { // the kernel removes it with the namespace, a little later
		time.Sleep(20 * time.Millisecond)
	}
	says("empty", remedy, drain)
	h.mustEnsure(h.spec(ModeTransparent))
	if h.sh("ip -o link show azure0") == "" {
		t.Error("azure0 was removed")
	}
	h.sh(remedy)
	if b := h.mustEnsure(h.spec(ModeBridge)); b.Name != "azure0" {
		t.Errorf("the bridge is %+v", b)
	}
	h.whole("with the remedy")
}

func (h *host) bridgeNameFor(s Spec) (name string, err error) {
	err = h.Do(func() (err error) { name, err = h.BridgeName(h.t.Context(), s); return err })
	return name, err
}
