// Copyright (c) The azure-vnet authors. MIT licence.

package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/docker/go-plugins-helpers/network"
	"github.com/google/go-cmp/cmp"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// takenWords are what every refusal says on a host where a former build runs.
const takenWords = "the NIC is a port of a bridge: eth0 is in azure0, where an earlier build of azure-vnet put it. " +
	"Nothing was changed, and the containers that run keep their network. Drain this VM. Then run that build's own uninstall; or disable that build (docker plugin disable -f azure-vnet:latest, or remove its conflist) and reboot"

func formerBuild(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make namespaces: sudo make test")
	}
	dir, err := test.BuildFormer()
	if errors.Is(err, test.ErrNoHistory) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// fromTop names a file as seen from the root of the checkout, for host.script.
func fromTop(t *testing.T, path string) string {
	t.Helper()
	rel, err := filepath.Rel(test.Top, path)
	if err != nil {
		t.Fatal(err)
	}
	return rel
}

// pingOn pings an address fifty times a second until end is called, which fails the test if a
// ping was lost.
func pingOn(h test.Host, to netip.Addr) (end func()) {
	h.T.Helper()
	cmd := h.Command(context.Background(), "sh", "-c", "busybox ping -i 0.02 $0 & read line; kill -INT $!; wait", to.String())
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	stdin, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		h.T.Fatal(err)
	}
	ended := false
	end = func() {
		h.T.Helper()
		if ended {
			return
		}
		ended = true
		stdin.Close()
		cmd.Wait()
		said := regexp.MustCompile(`(\d+) packets transmitted, (\d+) packets received`).FindStringSubmatch(out.String())
		var sent, back int
		if said != nil {
			fmt.Sscan(said[1]+" "+said[2], &sent, &back)
		}
		if sent < 5 || sent-back > 1 { // the last one may be on its way
			h.T.Errorf("pings from %s to %s: %d sent, %d came back:\n%s", h.Name, to, sent, back, tail(out.String()))
		}
	}
	h.T.Cleanup(end)
	return end
}

func tail(s string) string { return s[max(0, len(s)-600):] }

// leases are who holds which address, by leases.json.
func leases(h test.Host) map[string]string {
	h.T.Helper()
	var file struct {
		Leases map[string]struct{ Owner string }
	}
	if err := json.Unmarshal([]byte(h.Must("cat", "/run/azure-vnet/leases.json")), &file); err != nil {
		h.T.Fatal(err)
	}
	held := map[string]string{}
	for addr, l := range file.Leases {
		held[addr] = l.Owner
	}
	return held
}

// footprint is all that a build of azure-vnet makes of a host.
type footprint struct {
	picture map[string][]string
	leases  map[string]string
}

func footprintOf(h test.Host) footprint {
	h.T.Helper()
	return footprint{picture(h, false), leases(h)}
}

// mayChange are files of tests, locks, leases.json, which also has what the sources said, and
// those with the settings and the directory of the plugin that started last.
var mayChange = regexp.MustCompile(` /run/(alone/|tmp/|azure-vnet/(leases\.json(\.ask)?|(plugin|data)\.json|.*\.lock)$)`)

// unchanged says that the present build changed nothing of a host that is a former build's.
func unchanged(h test.Host, before footprint) {
	h.T.Helper()
	same(h, "asked by the present build", before.picture, picture(h, false), mayChange)
	if diff := cmp.Diff(before.leases, leases(h)); diff != "" {
		h.T.Errorf("the present build changed leases (- before, + after):\n%s", diff)
	}
}

// disk is the checksum of each file that an installer or a plugin may write on the disk.
func disk(h test.Host, more ...string) string {
	h.T.Helper()
	const script = `find /opt /etc /var/lib/azure-vnet "$@" ! -name '*.lock' -printf '%p %m %l\n' -type f -exec sha256sum {} + 2>/dev/null | sort`
	return h.Must("sh", append([]string{"-c", script, "sh"}, more...)...)
}

// taken says that the NIC is in azure0, as a former build has it.
func taken(h test.Host) {
	h.T.Helper()
	if out := h.Must("ip", "-o", "link", "show", "eth0"); !strings.Contains(out, "master azure0") {
		h.T.Fatalf("the former build did not move the NIC, so this proves nothing: %s", out)
	}
}

// saysTaken says that a command failed, and told why.
func saysTaken(t *testing.T, what, out string, err error) {
	t.Helper()
	if err == nil || !strings.Contains(out+err.Error(), takenWords) {
		t.Errorf("%s does not end with the words of a NIC that is taken: %v\n%s", what, err, out)
	}
}

// reaches says that a ping from the place comes back.
func reaches(t *testing.T, from test.Place, to netip.Addr) {
	t.Helper()
	if _, err := from.Try("ping", "-c", "1", "-W", "3", to.String()); err != nil {
		t.Errorf("%s does not reach %s: %v", from.Name, to, err)
	}
}

// nodeWith is a node with the CNI plugins of a directory. Its runtime keeps results in cache.
func nodeWith(h test.Host, dir, cache string) test.Node {
	n := test.Node{Host: h, Dir: dir}
	n.CNI = libcni.NewCNIConfigWithCacheDir([]string{dir}, cache, n.Exec())
	return n
}

// presentBuild is a directory with the CNI package of this checkout, and an archive of it.
func presentBuild(t *testing.T) (dir, archive string) {
	t.Helper()
	if _, err := test.BuildPlugin(); err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(t.TempDir(), "cni")
	archive = dir + "-linux.tgz"
	test.MustOutput(t, "sh", "-euc", `cp -R "$1" "$2" && tar -C "$2" -czf "$3" . && cd "$(dirname "$3")" && sha256sum "$(basename "$3")" >SHA256SUMS`,
		"sh", filepath.Join(test.Top, "build", "cni"), dir, archive)
	return dir, archive
}

// TestCNIUpgradeFromAFormerBuild walks docs/kubernetes.md, "From a build that moved the NIC".
func TestCNIUpgradeFromAFormerBuild(t *testing.T) {
	dir := formerBuild(t)
	present, archive := presentBuild(t)
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	plain := vms[2]
	const script = "scripts/install-cni-plugin.sh"
	formerScript, formerCNI := fromTop(t, filepath.Join(dir, script)), filepath.Join(dir, "build", "cni")
	// begin has the former build run two containers on a node.
	begin := func(t *testing.T, h test.Host, cache string) (was, is test.Node, l *libcni.NetworkConfigList, addrs []netip.Addr) {
		t.Helper()
		ownOpt(h)
		if got, said := runScript(h, nil, formerScript, formerCNI); got.Status != 0 {
			t.Fatalf("install the former build: %+v\n%s", got, said)
		}
		was, is = nodeWith(h, formerCNI, cache), nodeWith(h, present, cache)
		var err error
		if l, err = libcni.NetworkConfFromBytes([]byte(h.Must("cat", "/etc/cni/net.d/10-azure.conflist"))); err != nil {
			t.Fatal(err)
		}
		for _, id := range []string{"old0", "old1"} {
			addr, _ := was.Add(l, was.Pod(id))
			addrs = append(addrs, addr)
		}
		taken(h)
		return was, is, l, addrs
	}
	transparent := func(n test.Node) *libcni.NetworkConfigList {
		return n.List("1.1.0", "azure", test.Azure(`"mode":"transparent"`))
	}
	// bothModes says that the present build attaches as ever.
	bothModes := func(t *testing.T, n test.Node, l *libcni.NetworkConfigList) (addrs []netip.Addr) {
		t.Helper()
		for id, l := range map[string]*libcni.NetworkConfigList{"new0": l, "new1": transparent(n)} {
			addr, _ := n.Add(l, n.Pod(id))
			reaches(t, test.OnHost(plain), addr)
			reaches(t, test.InPod(n, id, addr), plain.Primary)
			addrs = append(addrs, addr)
		}
		if out := n.Must("ip", "-o", "link", "show", "eth0"); strings.Contains(out, "master") {
			t.Errorf("the NIC is still in a bridge: %s", out)
		}
		return addrs
	}

	t.Run("without a reboot", func(t *testing.T) {
		h := vms[0].In(t)
		address := func() string { return h.Must("sh", "-c", "ip -4 -br addr show eth0; ip route | grep eth0") }
		untouched := address()
		was, is, l, addrs := begin(t, h, t.TempDir())
		ends := []func(){pingOn(plain.In(t), addrs[0]), pingOn(plain.In(t), addrs[1]), pingOn(h, plain.Primary)}
		tool := is.Dir + "/azure-vnet"
		h.Try(tool, "status") // the sources are asked, so neighbours are known
		h.LeasesAged()        // a lease that no link shows is as old as one that leaked
		before, files := footprintOf(h), disk(h)

		for what, l := range map[string]*libcni.NetworkConfigList{"ADD": l, "ADD with mode transparent": transparent(is)} {
			rt := is.Pod(strings.ReplaceAll(what, " ", "-"))
			if _, _, err := is.TryAdd(l, rt); !test.Says(err, types.ErrPluginNotAvailable, takenWords) {
				t.Errorf("%s: %v", what, err)
			}
			is.Del(l, rt) // as a runtime does after a failure
		}
		if err := is.CNI.GetStatusNetworkList(t.Context(), l); !test.Says(err, types.ErrPluginNotAvailable, takenWords) {
			t.Errorf("STATUS: %v", err)
		}
		for _, word := range []string{"status", "reconcile", "uninstall"} {
			out, err := h.Try(tool, word)
			saysTaken(t, "azure-vnet "+word, out, err)
			var exit *vnetsim.ExitError
			if !errors.As(err, &exit) || exit.Status != 1 {
				t.Errorf("azure-vnet %s ends with %v, want the status 1", word, err)
			}
		}
		if out := h.Must("sh", "-c", tool+" status || true"); !strings.Contains(out, "broken: "+takenWords) {
			t.Errorf("azure-vnet status says\n%s", out)
		}
		valid := &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: "old0", IfName: "eth0"}, {ContainerID: "old1", IfName: "eth0"}}}
		if err := is.CNI.GCNetworkList(t.Context(), l, valid); err != nil {
			t.Errorf("GC: %v", err)
		}
		is.Del(l, &libcni.RuntimeConf{ContainerID: "unknown", IfName: "eth0"})
		fails(h, 1, takenWords, nil, script, archive)
		unchanged(h, before)
		if diff := cmp.Diff(files, disk(h)); diff != "" {
			t.Errorf("the installer changed files (- before, + after):\n%s", diff)
		}
		for _, end := range ends {
			end()
		}

		// Drained: what the runtime calls is what is installed.
		was.Del(l, &libcni.RuntimeConf{ContainerID: "old0", NetNS: "/run/netns/old0", IfName: "eth0"})
		was.Del(l, &libcni.RuntimeConf{ContainerID: "old1", NetNS: "/run/netns/old1", IfName: "eth0"})
		runInstaller(h, nil, "--uninstall")
		if diff := cmp.Diff(untouched, address()); diff != "" {
			t.Errorf("the former uninstall left the NIC with (- before, + after):\n%s", diff)
		}
		runInstaller(h, nil, archive)
		bothModes(t, is, l)
	})

	t.Run("with a reboot", func(t *testing.T) {
		h, cache := vms[1].In(t), t.TempDir()
		_, is, l, had := begin(t, h, cache)
		h.Must("rm", "/etc/cni/net.d/10-azure.conflist") // so that no pod of the next boot brings the former build back
		if err := h.PowerCut(); err != nil {
			t.Fatal(err)
		}
		if err := h.Boot(); err != nil {
			t.Fatal(err)
		}
		h.Must("sh", "-c", "mount -t tmpfs tmpfs /opt && mount -t tmpfs tmpfs /var/log")
		runInstaller(h, nil, archive)
		now := bothModes(t, is, l)
		if !slices.ContainsFunc(now, func(addr netip.Addr) bool { return slices.Contains(had, addr) }) {
			t.Errorf("%v are none of %v, which the containers of before had: then late DELs prove nothing", now, had)
		}
		before := is.Holds()
		for _, id := range []string{"old0", "old1"} {
			rt := &libcni.RuntimeConf{ContainerID: id, IfName: "eth0"}
			if prev, err := is.CNI.GetNetworkListCachedResult(l, rt); err != nil || prev == nil {
				t.Errorf("libcni kept no result of %s: %v", id, err)
			}
			for range 2 { // the second time without it
				is.Del(l, rt)
			}
		}
		if after := is.Holds(); len(after.Leases) != 2 || !slices.Equal(before.Leases, after.Leases) || !slices.Equal(before.Attachments, after.Attachments) {
			t.Errorf("late DELs: held were %+v, and now %+v", before, after)
		}
		for _, addr := range now {
			reaches(t, test.OnHost(plain), addr)
		}
	})
	test.NothingDropped(t, vnet)
}

// TestDockerUpgradeFromAFormerBuild walks docs/docker.md, "From a build that moved the NIC".
func TestDockerUpgradeFromAFormerBuild(t *testing.T) {
	if !test.Soaking {
		t.Skip("takes two minutes: make soak")
	}
	dir := formerBuild(t)
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	h, plain := vms[0], vms[1]
	const prefix = "/var/lib/prefix" // on the VM's disk
	// make install is this, after make rootfs.
	install := func(h test.Host, checkout string) (string, error) {
		build := filepath.Join(checkout, "build")
		return h.Try(filepath.Join(checkout, "scripts", "plugin.sh"), "install", build+"/plugin", build+"/azure-vnet-plugin", prefix)
	}
	mustInstall := func(h test.Host, checkout string) {
		h.T.Helper()
		if out, err := install(h, checkout); err != nil {
			h.T.Fatalf("%v\n%s", err, out)
		}
	}
	tool := test.PluginBinary
	works := func(h test.Host, name string) {
		h.T.Helper()
		addr := h.Address(name)
		reaches(h.T, test.OnHost(plain), addr)
		reaches(h.T, test.InContainer(h, name, addr), plain.Primary)
		// By the gateway alone, as this release leads its containers.
		route := h.Docker("exec", name, "ip", "route", "get", plain.Primary.String())
		if !strings.Contains(route, "via "+h.Gateway.String()) {
			h.T.Errorf("%s goes to its subnet by %q, want by the gateway %s", name, route, h.Gateway)
		}
		if out := h.Must("ip", "-o", "link", "show", "eth0"); strings.Contains(out, "master") {
			h.T.Errorf("the NIC is still in a bridge: %s", out)
		}
	}
	h.WithEngine()
	mustInstall(h, dir)
	h.Network("azure", "snat=off")
	end := pingOn(plain, h.Container("azure", "old", "sleep 100000"))
	taken(h)

	data := h.Must("sh", "-c", "ls -d /var/lib/docker/plugins/*/propagated-mount")
	everything := func() string { return disk(h, data, prefix) + h.Docker("plugin", "inspect", test.Plugin) }
	files := everything()
	out, err := install(h, test.Top)
	saysTaken(t, "make install", out, err)
	if diff := cmp.Diff(files, everything()); diff != "" {
		t.Errorf("make install changed something (- before, + after):\n%s", diff)
	}

	h.Docker("plugin", "disable", "-f", test.Plugin)
	h.LeasesAged() // a lease that no link shows is as old as one that leaked
	before, files := footprintOf(h), everything()
	for _, word := range []string{"status", "uninstall"} {
		out, err := h.Try(tool, word)
		saysTaken(t, "azure-vnet-plugin "+word, out, err)
	}
	if out := h.Must("sh", "-c", tool+" status || true"); !strings.Contains(out, "broken: "+takenWords) {
		t.Errorf("azure-vnet-plugin status says\n%s", out)
	}
	startsOnAFormerHost(h, data)
	unchanged(h, before)
	if diff := cmp.Diff(files, everything()); diff != "" {
		t.Errorf("the present build changed files (- before, + after):\n%s", diff)
	}
	h.Docker("plugin", "enable", test.Plugin) // the former build goes on where it was
	end()

	t.Run("with a reboot", func(t *testing.T) {
		h := h.In(t)
		h.Docker("stop", "-t", "0", "old")
		h.Docker("plugin", "disable", "-f", test.Plugin)
		networks := h.Must("sh", "-c", "cat "+data+"/networks.json && sync")
		if err := h.PowerCut(); err != nil {
			t.Fatal(err)
		}
		if err := h.Boot(); err != nil {
			t.Fatal(err)
		}
		h.StartEngine()
		mustInstall(h, test.Top)
		h.Docker("start", "old")
		works(h, "old")
		h.Container("azure", "new", "sleep 100000")
		works(h, "new")
		if diff := cmp.Diff(networks, h.Must("sh", "-c", "cat /var/lib/docker/plugins/*/propagated-mount/networks.json")); diff != "" {
			t.Errorf("networks.json of the former build (- before, + after):\n%s", diff)
		}
	})
	t.Run("back to the former build, and without a reboot", func(t *testing.T) {
		h := h.In(t)
		h.Docker("rm", "-f", "old", "new")
		h.Docker("network", "rm", "azure")
		h.Must(filepath.Join(test.Top, "scripts", "plugin.sh"), "uninstall", tool, prefix)
		mustInstall(h, dir)
		h.Network("azure")
		h.Container("azure", "old", "sleep 100000")
		taken(h)

		h.Docker("rm", "-f", "old")
		h.Docker("network", "rm", "azure")
		h.Docker("plugin", "disable", "-f", test.Plugin)
		h.Must(prefix+"/sbin/azure-vnet-plugin", "uninstall")
		mustInstall(h, test.Top)
		h.Network("azure")
		h.Container("azure", "new", "sleep 100000")
		works(h, "new")
	})
	test.NothingDropped(t, vnet)
}

// startsOnAFormerHost starts the present plugin, as no engine's, beside a former build's networks and
// containers, and ends it. It listens and says why it does nothing.
func startsOnAFormerHost(h test.Host, data string) {
	h.T.Helper()
	ctx, cancel := context.WithTimeout(h.T.Context(), 30*time.Second)
	defer cancel()
	cmd := h.Command(ctx, test.PluginBinary, "-run", "/run", "-data", data, "-socket", "/run/upg.sock")
	log, err := os.Create(filepath.Join(h.T.TempDir(), "log"))
	if err != nil {
		h.T.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		h.T.Fatal(err)
	}
	said := func() string { text, _ := os.ReadFile(log.Name()); return string(text) }
	defer func() {
		h.Must("sh", "-c", "kill $(busybox pidof azure-vnet-plugin)")
		if err := cmd.Wait(); err != nil {
			h.T.Errorf("the plugin ends with %v:\n%s", err, said())
		}
	}()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", fmt.Sprintf("/proc/%d/root/run/upg.sock", h.PidOne()))
	}}}
	call := func(method string, request, answer any) (refused string) {
		h.T.Helper()
		body, err := json.Marshal(request)
		if err != nil {
			h.T.Fatal(err)
		}
		r, err := client.Post("http://plugin/"+method, "application/json", bytes.NewReader(body))
		if err != nil {
			h.T.Fatalf("%s: %v\n%s", method, err, said())
		}
		defer r.Body.Close()
		text, err := io.ReadAll(r.Body)
		if err != nil {
			h.T.Fatal(err)
		}
		if r.StatusCode == http.StatusOK {
			if err := json.Unmarshal(text, answer); err != nil {
				h.T.Fatal(err)
			}
			return ""
		}
		var told struct{ Err string }
		if err := json.Unmarshal(text, &told); err != nil {
			h.T.Fatalf("%s: %s", method, text)
		}
		return told.Err
	}
	test.Eventually(h.T, "the plugin listens and names the NIC", 10*time.Second, func() bool {
		return strings.Contains(said(), "azure-vnet listens") && strings.Contains(said(), takenWords)
	})
	test.Eventually(h.T, "the networks are looked at", 10*time.Second, func() bool { return strings.Contains(said(), "msg=ready") })

	var none struct{}
	subnet, gateway := h.Prefix.String(), fmt.Sprintf("%s/%d", h.Gateway, h.Prefix.Bits())
	var p ipam.RequestPoolResponse
	if refused := call("IpamDriver.RequestPool", ipam.RequestPoolRequest{AddressSpace: "azure-vnet", Pool: subnet}, &p); refused != "" {
		h.T.Fatalf("RequestPool: %s", refused)
	}
	if refused := call("NetworkDriver.CreateNetwork", network.CreateNetworkRequest{
		NetworkID: strings.Repeat("9", 64), Options: map[string]any{"com.docker.network.generic": map[string]any{}},
		IPv4Data: []*network.IPAMData{{AddressSpace: "azure-vnet", Pool: subnet, Gateway: gateway}},
	}, &none); !strings.Contains(refused, takenWords) {
		h.T.Errorf("CreateNetwork says %q", refused)
	}
	var a ipam.RequestAddressResponse
	if refused := call("IpamDriver.RequestAddress", ipam.RequestAddressRequest{PoolID: p.PoolID}, &a); refused != "" {
		h.T.Fatalf("RequestAddress: %s", refused)
	}
	if refused := call("NetworkDriver.CreateEndpoint", network.CreateEndpointRequest{
		NetworkID: h.Docker("network", "inspect", "-f", "{{.Id}}", "azure"), EndpointID: strings.Repeat("8", 64), Interface: &network.EndpointInterface{Address: a.Address},
	}, &none); !strings.Contains(refused, takenWords) {
		h.T.Errorf("CreateEndpoint says %q", refused)
	}
	addr, _, _ := strings.Cut(a.Address, "/")
	if refused := call("IpamDriver.ReleaseAddress", ipam.ReleaseAddressRequest{PoolID: p.PoolID, Address: addr}, &none); refused != "" {
		h.T.Errorf("ReleaseAddress: %s", refused)
	}
}
