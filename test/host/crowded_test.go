// Copyright (c) The azure-vnet authors. MIT licence.

package host

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// crowd is what lives on a host besides azure-vnet: firewalld, Docker's own bridge with a published port, an
// administrator's rule for it, a VPN of WireGuard's, kube-proxy's rules and a running pod of the former azure-vnet.
type crowd struct {
	test.Host            // the crowded one
	peer      test.Host  // another VM: it ends the VPN, and serves what kube-proxy leads to
	old       netip.Addr // of the former plugin's pod
	ways      []way
}

// way is one that others rely on, or that an administrator has closed.
type way struct {
	name string
	from test.Place
	ask  []string
}

// behindVPN is an address that the peer has behind the tunnel.
const behindVPN = "10.50.0.1"

func newCrowd(h, peer test.Host) *crowd {
	h.T.Helper()
	c := &crowd{Host: h, peer: peer, old: h.Secondaries()[len(h.Secondaries())-1]}
	h.Must("sh", "-c", withFirewalld)
	h.WithEngine() // which reloads firewalld
	h.Must("sh", "-c", "firewall-cmd --zone=public --add-port=9998/tcp --add-port=9999/tcp && firewall-cmd --zone=public --add-interface=azv0a60ad12f1d --add-interface=wg0")
	h.Docker("run", "-d", "--init", "--name", "theirs", "-p", "8088:80", "-p", "8089:80", "busybox", "sh", "-c", "echo theirs >/index.html; httpd -f -p 80 -h /")
	h.Must("iptables", "-I", "DOCKER-USER", "-i", "eth0", "-p", "tcp", "-m", "conntrack", "--ctorigdstport", "8089", "-j", "DROP")
	c.wireGuard()
	c.kubeProxy()
	c.formerPod()
	web := func(h test.Host, port string) {
		h.Must("sh", "-c", "mkdir -p /run/www && echo "+h.Name+" >/run/www/index.html && busybox httpd -p "+port+" -h /run/www")
	}
	web(h, "9999")
	h.Must("iptables", "-A", "INPUT", "-i", "eth0", "-p", "tcp", "--dport", "9999", "-j", "DROP")
	web(h, "9998")
	web(peer, "8080")
	theirs, pod := test.InContainer(h, "theirs", netip.Addr{}), test.Place{Name: "the former pod", Addr: c.old, Prefix: []string{"ip", "netns", "exec", "old", "busybox"}, Host: h}
	here, there := test.OnHost(h), test.OnHost(peer)
	for _, from := range []test.Place{here, theirs, there, pod} {
		for to, url := range map[string]string{
			"the internet":          "http://203.0.113.10/",
			"another VM":            "http://" + peer.Primary.String() + ":8080/",
			"behind the VPN":        "http://" + behindVPN + ":8080/",
			"a service":             "http://10.96.1.1/",
			"a node port":           "http://" + h.Primary.String() + ":31000/",
			"a published port":      "http://" + h.Primary.String() + ":8088/",
			"a port of DOCKER-USER": "http://" + h.Primary.String() + ":8089/",
			"an open port":          "http://" + h.Primary.String() + ":9998/",
			"a closed port":         "http://" + h.Primary.String() + ":9999/",
			"the former pod":        "http://" + c.old.String() + "/",
		} {
			c.ways = append(c.ways, way{from.Name + " to " + to, from, []string{"timeout", "3", "wget", "-q", "-O", "-", url}})
		}
	}
	return c
}

// wireGuard connects the host to the peer's site by the real wireguard-go.
func (c *crowd) wireGuard() {
	key := func() (private, public string) {
		private = c.Must("wg", "genkey")
		return private, c.Must("sh", "-c", "echo "+private+" | wg pubkey")
	}
	private, public := key()
	peersPrivate, peersPublic := key()
	for h, conf := range map[test.Host]string{
		c.peer: fmt.Sprintf("[Interface]\nPrivateKey = %s\nAddress = 10.8.0.1/24\nListenPort = 51820\n[Peer]\nPublicKey = %s\nAllowedIPs = 10.8.0.2/32\n", peersPrivate, public),
		c.Host: fmt.Sprintf("[Interface]\nPrivateKey = %s\nAddress = 10.8.0.2/24\n[Peer]\nPublicKey = %s\nAllowedIPs = 10.8.0.0/24, 10.50.0.0/16\nEndpoint = %s:51820\n", private, peersPublic, c.peer.Primary),
	} {
		file := filepath.Join(c.T.TempDir(), "wg0.conf")
		if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
			c.T.Fatal(err)
		}
		h.Must("sh", "-c", "WG_QUICK_USERSPACE_IMPLEMENTATION=wireguard-go wg-quick up "+file+" 2>&1")
	}
	c.peer.Must("ip", "addr", "add", behindVPN+"/32", "dev", "lo")
}

// kubeProxy loads what a real kube-proxy wrote, with the peer as the endpoint of every service.
func (c *crowd) kubeProxy() {
	text, err := os.ReadFile(filepath.Join(test.Top, "bridge", "testdata", "kube-proxy", "iptables-save.txt"))
	if err != nil {
		c.T.Fatal(err)
	}
	simulated := regexp.MustCompile(`\b10\.240\.0\.(20|21|30|5)\b`).ReplaceAllString(string(text), c.peer.Primary.String())
	simulated = regexp.MustCompile(`\b10\.240\.0\.4\b`).ReplaceAllString(simulated, c.Primary.String())
	file := filepath.Join(c.T.TempDir(), "kube-proxy")
	if err := os.WriteFile(file, []byte(simulated), 0o600); err != nil {
		c.T.Fatal(err)
	}
	c.Must("iptables-restore", "--noflush", file)
}

// formerPod makes a pod as the former azure-vnet leaves one: a link named as ours are and without an alias, and a
// route to its address.
func (c *crowd) formerPod() {
	c.Must("sh", "-euc", strings.NewReplacer("ADDR", c.old.String()).Replace(`
		ip netns add old
		ip link add azv0a60ad12f1d type veth peer name eth0 netns old
		ip link set azv0a60ad12f1d up address aa:aa:aa:aa:aa:aa
		echo 1 >/proc/sys/net/ipv4/conf/azv0a60ad12f1d/proxy_arp
		ip route add ADDR dev azv0a60ad12f1d proto static
		ip -n old addr add ADDR/32 dev eth0
		ip -n old link set eth0 up
		ip -n old link set lo up
		ip -n old route add 169.254.1.1 dev eth0 proto static scope link
		ip -n old route add default via 169.254.1.1
		ip -n old neigh add 169.254.1.1 lladdr aa:aa:aa:aa:aa:aa dev eth0 nud permanent
		iptables -I FORWARD -i azv0a60ad12f1d -j ACCEPT; iptables -I FORWARD -o azv0a60ad12f1d -j ACCEPT
		mkdir -p /run/old; echo former >/run/old/index.html
		ip netns exec old busybox httpd -p 80 -h /run/old`))
}

// answers tries all paths, and says what came of each.
func (c *crowd) answers() map[string]string {
	all, mu, wait := map[string]string{}, sync.Mutex{}, sync.WaitGroup{}
	for _, p := range c.ways {
		wait.Go(func() {
			out, err := p.from.Try(p.ask...)
			if err != nil {
				out = "no answer"
			}
			mu.Lock()
			defer mu.Unlock()
			all[p.name] = out
		})
	}
	wait.Wait()
	return all
}

// inZones matches firewalld's own rules about our links, which are in its zones while they stand.
var inZones = regexp.MustCompile(`^[io]ifname "az(ure0|v\*)" (accept$|goto \w+_public$)`)

// TestAHostThatIsFullOfOthers: every path of everybody else is what it was, open or closed, when azure-vnet comes,
// while its containers run, and when it is gone again. Its containers reach what the host reaches.
func TestAHostThatIsFullOfOthers(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 3}, vnetsim.VMConfig{})
	c := newCrowd(vms[0], vms[1])
	before, others := c.answers(), picture(c.Host, true)
	for _, open := range []string{"theirs to the internet", "vm2 to a published port", "vm1 to behind the VPN", "vm1 to a service", "vm2 to a node port", "vm2 to the former pod", "the former pod to another VM"} {
		if before[open] == "no answer" {
			t.Fatalf("the host is not as crowded as it should be: %s: %v", open, before)
		}
	}
	for _, closed := range []string{"vm2 to a port of DOCKER-USER", "vm2 to a closed port"} {
		if before[closed] != "no answer" {
			t.Fatalf("%s is open: %v", closed, before)
		}
	}
	sameAnswers := func(when string) {
		t.Helper()
		if diff := cmp.Diff(before, c.answers()); diff != "" {
			t.Errorf("%s (- before, + now):\n%s", when, diff)
		}
	}
	c.EnablePlugin()
	c.Network("azure")
	c.Network("alone", "mode=transparent")
	sameAnswers("with networks")
	var used []netip.Addr
	for _, network := range []string{"azure", "alone"} {
		ours := test.InContainer(c.Host, network, c.Container(network, network, "echo ours >/index.html; httpd -f -p 80 -h /", "-p", "80"))
		used = append(used, ours.Addr)
		for to, url := range map[string]string{
			"another VM": "http://" + c.peer.Primary.String() + ":8080/", "behind the VPN": "http://" + behindVPN + ":8080/",
			"a service": "http://10.96.1.1/", "the internet": "http://203.0.113.10/", "the former pod": "http://" + c.old.String() + "/",
			"a published port": "http://" + c.Primary.String() + ":8088/", "the host": "http://" + c.Primary.String() + ":9998/",
		} {
			if _, err := ours.Try("timeout", "5", "wget", "-q", "-O", "-", url); err != nil {
				t.Errorf("%s does not reach %s: %v", network, to, err)
			}
		}
		if out, err := test.OnHost(c.peer).Try("timeout", "5", "wget", "-q", "-O", "-", "http://"+ours.Addr.String()+"/"); out != "ours" {
			t.Errorf("another VM does not reach %s: %q, %v", network, out, err)
		}
	}
	sameAnswers("with containers")
	same(c.Host, "with containers", others, picture(c.Host, true), inZones)
	c.Docker("rm", "-f", "azure", "alone")
	c.Docker("network", "rm", "azure", "alone")
	c.Docker("plugin", "disable", test.Plugin)
	c.Must(test.PluginBinary, "uninstall")
	sameAnswers("after uninstall")
	same(c.Host, "after uninstall", others, picture(c.Host, true), nil)
	test.NothingDropped(t, vnet, append(used, c.old)...)
}
