// Copyright (c) The azure-vnet authors. MIT licence.

package test

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
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/docker/go-plugins-helpers/network"
	"github.com/google/go-cmp/cmp"

	"azurevnet/internal/vnetsim"
)

// formerCommit is the last commit whose build moves the NIC into azure0.
const formerCommit = "7f651bb476cc3e83a11092e86d8b91e6704ad2d4"

// takenWords are what every refusal says on a host where a former build runs.
const takenWords = "the NIC is a port of a bridge: eth0 is in azure0, where an earlier build of azure-vnet put it. " +
	"Nothing was changed, and the containers that run keep their network. Drain this VM. Then run that build's own uninstall; or disable that build (docker plugin disable -f azure-vnet:latest, or remove its conflist) and reboot"

var errNoHistory = errors.New("git does not know the former build here")

// former is a directory with the sources of the former build, made once for all tests of this run.
// Its build/ has what make rootfs puts there: azure-vnet-plugin, cni/ and plugin/.
var former = sync.OnceValues(func() (string, error) {
	if out, err := exec.Command("git", "-C", top, "cat-file", "-e", formerCommit+"^{commit}").CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %w: %s", errNoHistory, err, bytes.TrimSpace(out))
	}
	if err := built(); err != nil { // which fetches the packages of iptables
		return "", err
	}
	dir := filepath.Join(cniTemp, "former")
	out, err := exec.Command("sh", "-euc", `mkdir "$1"
git -C "$0" archive "$2" | tar -x -C "$1"
cd "$1"
make -s build VERSION=former
scripts/dist.sh content former "$3" build/cni
scripts/rootfs.sh build/azure-vnet-plugin build/cni build/plugin/rootfs "$0/build/packages" "$3"
cp config.json build/plugin/`, top, dir, formerCommit, runtime.GOARCH).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build %.12s: %w\n%s", formerCommit, err, out)
	}
	return dir, nil
})

func formerBuild(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make namespaces: sudo make test")
	}
	dir, err := former()
	if errors.Is(err, errNoHistory) {
		t.Skipf("needs the history as far as %.12s: %v", formerCommit, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// fromTop names a file as seen from the root of the checkout, for host.script.
func fromTop(t *testing.T, path string) string {
	t.Helper()
	rel, err := filepath.Rel(top, path)
	if err != nil {
		t.Fatal(err)
	}
	return rel
}

// pingOn pings an address fifty times a second until end is called, which fails the test if a
// ping was lost.
func (h host) pingOn(to netip.Addr) (end func()) {
	h.t.Helper()
	cmd := h.Command(context.Background(), "sh", "-c", "busybox ping -i 0.02 $0 & read line; kill -INT $!; wait", to.String())
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	stdin, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		h.t.Fatal(err)
	}
	ended := false
	end = func() {
		h.t.Helper()
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
			h.t.Errorf("pings from %s to %s: %d sent, %d came back:\n%s", h.Name, to, sent, back, tail(out.String()))
		}
	}
	h.t.Cleanup(end)
	return end
}

func tail(s string) string { return s[max(0, len(s)-600):] }

// leases are who holds which address, by leases.json.
func (h host) leases() map[string]string {
	h.t.Helper()
	var file struct {
		Leases map[string]struct{ Owner string }
	}
	if err := json.Unmarshal([]byte(h.must("cat", "/run/azure-vnet/leases.json")), &file); err != nil {
		h.t.Fatal(err)
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

func (h host) footprint() footprint {
	h.t.Helper()
	return footprint{h.picture(false), h.leases()}
}

// mayChange are files of tests, locks, leases.json, which also has what the sources said, and
// those with the settings and the directory of the plugin that started last.
var mayChange = regexp.MustCompile(` /run/(alone/|tmp/|azure-vnet/(leases\.json(\.ask)?|(plugin|data)\.json|.*\.lock)$)`)

// unchanged says that the present build changed nothing of a host that is a former build's.
func (h host) unchanged(before footprint) {
	h.t.Helper()
	h.same("asked by the present build", before.picture, h.picture(false), mayChange)
	if diff := cmp.Diff(before.leases, h.leases()); diff != "" {
		h.t.Errorf("the present build changed leases (- before, + after):\n%s", diff)
	}
}

// disk is the checksum of each file that an installer or a plugin may write on the disk.
func (h host) disk(more ...string) string {
	h.t.Helper()
	const script = `find /opt /etc /var/lib/azure-vnet "$@" ! -name '*.lock' -printf '%p %m %l\n' -type f -exec sha256sum {} + 2>/dev/null | sort`
	return h.must("sh", append([]string{"-c", script, "sh"}, more...)...)
}

// taken says that the NIC is in azure0, as a former build has it.
func (h host) taken() {
	h.t.Helper()
	if out := h.must("ip", "-o", "link", "show", "eth0"); !strings.Contains(out, "master azure0") {
		h.t.Fatalf("the former build did not move the NIC, so this proves nothing: %s", out)
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
func reaches(t *testing.T, from place, to netip.Addr) {
	t.Helper()
	if _, err := from.try("ping", "-c", "1", "-W", "3", to.String()); err != nil {
		t.Errorf("%s does not reach %s: %v", from.name, to, err)
	}
}

// nodeWith is a node with the CNI plugins of a directory. Its runtime keeps results in cache.
func nodeWith(h host, dir, cache string) node {
	n := node{host: h, dir: dir}
	n.cni = libcni.NewCNIConfigWithCacheDir([]string{dir}, cache, n.exec())
	return n
}

// presentBuild is a directory with the CNI package of this checkout, and an archive of it.
func presentBuild(t *testing.T) (dir, archive string) {
	t.Helper()
	if err := built(); err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(t.TempDir(), "cni")
	archive = dir + "-linux.tgz"
	mustOutput(t, "sh", "-euc", `cp -R "$1" "$2" && tar -C "$2" -czf "$3" . && cd "$(dirname "$3")" && sha256sum "$(basename "$3")" >SHA256SUMS`,
		"sh", filepath.Join(top, "build", "cni"), dir, archive)
	return dir, archive
}

// TestCNIUpgradeFromAFormerBuild walks docs/kubernetes.md, "From a build that moved the NIC".
func TestCNIUpgradeFromAFormerBuild(t *testing.T) {
	dir := formerBuild(t)
	present, archive := presentBuild(t)
	t.Parallel()
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	plain := vms[2]
	const script = "scripts/install-cni-plugin.sh"
	formerScript, formerCNI := fromTop(t, filepath.Join(dir, script)), filepath.Join(dir, "build", "cni")
	// begin has the former build run two containers on a node.
	begin := func(t *testing.T, h host, cache string) (was, is node, l *libcni.NetworkConfigList, addrs []netip.Addr) {
		t.Helper()
		h.ownOpt()
		if got, said := h.script(nil, formerScript, formerCNI); got.Status != 0 {
			t.Fatalf("install the former build: %+v\n%s", got, said)
		}
		was, is = nodeWith(h, formerCNI, cache), nodeWith(h, present, cache)
		var err error
		if l, err = libcni.NetworkConfFromBytes([]byte(h.must("cat", "/etc/cni/net.d/10-azure.conflist"))); err != nil {
			t.Fatal(err)
		}
		for _, id := range []string{"old0", "old1"} {
			addr, _ := was.add(l, was.pod(id))
			addrs = append(addrs, addr)
		}
		h.taken()
		return was, is, l, addrs
	}
	transparent := func(n node) *libcni.NetworkConfigList {
		return n.list("1.1.0", "azure", azure(`"mode":"transparent"`))
	}
	// bothModes says that the present build attaches as ever.
	bothModes := func(t *testing.T, n node, l *libcni.NetworkConfigList) (addrs []netip.Addr) {
		t.Helper()
		for id, l := range map[string]*libcni.NetworkConfigList{"new0": l, "new1": transparent(n)} {
			addr, _ := n.add(l, n.pod(id))
			reaches(t, onHost(plain), addr)
			reaches(t, inPod(n, id, addr), plain.Primary)
			addrs = append(addrs, addr)
		}
		if out := n.must("ip", "-o", "link", "show", "eth0"); strings.Contains(out, "master") {
			t.Errorf("the NIC is still in a bridge: %s", out)
		}
		return addrs
	}

	t.Run("without a reboot", func(t *testing.T) {
		h := vms[0].in(t)
		address := func() string { return h.must("sh", "-c", "ip -4 -br addr show eth0; ip route | grep eth0") }
		untouched := address()
		was, is, l, addrs := begin(t, h, t.TempDir())
		ends := []func(){plain.in(t).pingOn(addrs[0]), plain.in(t).pingOn(addrs[1]), h.pingOn(plain.Primary)}
		tool := is.dir + "/azure-vnet"
		h.try(tool, "status") // the sources are asked, so neighbours are known
		h.leasesAged()        // a lease that no link shows is as old as one that leaked
		before, files := h.footprint(), h.disk()

		for what, l := range map[string]*libcni.NetworkConfigList{"ADD": l, "ADD with mode transparent": transparent(is)} {
			rt := is.pod(strings.ReplaceAll(what, " ", "-"))
			if _, _, err := is.tryAdd(l, rt); !says(err, types.ErrPluginNotAvailable, takenWords) {
				t.Errorf("%s: %v", what, err)
			}
			is.del(l, rt) // as a runtime does after a failure
		}
		if err := is.cni.GetStatusNetworkList(t.Context(), l); !says(err, types.ErrPluginNotAvailable, takenWords) {
			t.Errorf("STATUS: %v", err)
		}
		for _, word := range []string{"status", "reconcile", "uninstall"} {
			out, err := h.try(tool, word)
			saysTaken(t, "azure-vnet "+word, out, err)
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 1 {
				t.Errorf("azure-vnet %s ends with %v, want the status 1", word, err)
			}
		}
		if out := h.must("sh", "-c", tool+" status || true"); !strings.Contains(out, "broken: "+takenWords) {
			t.Errorf("azure-vnet status says\n%s", out)
		}
		valid := &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: "old0", IfName: "eth0"}, {ContainerID: "old1", IfName: "eth0"}}}
		if err := is.cni.GCNetworkList(t.Context(), l, valid); err != nil {
			t.Errorf("GC: %v", err)
		}
		is.del(l, &libcni.RuntimeConf{ContainerID: "unknown", IfName: "eth0"})
		h.fails(1, takenWords, nil, script, archive)
		h.unchanged(before)
		if diff := cmp.Diff(files, h.disk()); diff != "" {
			t.Errorf("the installer changed files (- before, + after):\n%s", diff)
		}
		for _, end := range ends {
			end()
		}

		// Drained: what the runtime calls is what is installed.
		was.del(l, &libcni.RuntimeConf{ContainerID: "old0", NetNS: "/run/netns/old0", IfName: "eth0"})
		was.del(l, &libcni.RuntimeConf{ContainerID: "old1", NetNS: "/run/netns/old1", IfName: "eth0"})
		h.install(nil, "--uninstall")
		if diff := cmp.Diff(untouched, address()); diff != "" {
			t.Errorf("the former uninstall left the NIC with (- before, + after):\n%s", diff)
		}
		h.install(nil, archive)
		bothModes(t, is, l)
	})

	t.Run("with a reboot", func(t *testing.T) {
		h, cache := vms[1].in(t), t.TempDir()
		_, is, l, had := begin(t, h, cache)
		h.must("rm", "/etc/cni/net.d/10-azure.conflist") // so that no pod of the next boot brings the former build back
		if err := h.PowerCut(); err != nil {
			t.Fatal(err)
		}
		if err := h.Boot(); err != nil {
			t.Fatal(err)
		}
		h.must("sh", "-c", "mount -t tmpfs tmpfs /opt && mount -t tmpfs tmpfs /var/log")
		h.install(nil, archive)
		now := bothModes(t, is, l)
		if !slices.ContainsFunc(now, func(addr netip.Addr) bool { return slices.Contains(had, addr) }) {
			t.Errorf("%v are none of %v, which the containers of before had: then late DELs prove nothing", now, had)
		}
		before := is.holds()
		for _, id := range []string{"old0", "old1"} {
			rt := &libcni.RuntimeConf{ContainerID: id, IfName: "eth0"}
			if prev, err := is.cni.GetNetworkListCachedResult(l, rt); err != nil || prev == nil {
				t.Errorf("libcni kept no result of %s: %v", id, err)
			}
			for range 2 { // the second time without it
				is.del(l, rt)
			}
		}
		if after := is.holds(); len(after.Leases) != 2 || !slices.Equal(before.Leases, after.Leases) || !slices.Equal(before.Attachments, after.Attachments) {
			t.Errorf("late DELs: held were %+v, and now %+v", before, after)
		}
		for _, addr := range now {
			reaches(t, onHost(plain), addr)
		}
	})
	clean(t, vnet)
}

// TestDockerUpgradeFromAFormerBuild walks docs/docker.md, "From a build that moved the NIC".
func TestDockerUpgradeFromAFormerBuild(t *testing.T) {
	if !soaking {
		t.Skip("takes two minutes: make soak")
	}
	dir := formerBuild(t)
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	h, plain := vms[0], vms[1]
	const prefix = "/var/lib/prefix" // on the VM's disk
	// make install is this, after make rootfs.
	install := func(h host, checkout string) (string, error) {
		build := filepath.Join(checkout, "build")
		return h.try(filepath.Join(checkout, "scripts", "plugin.sh"), "install", build+"/plugin", build+"/azure-vnet-plugin", prefix)
	}
	mustInstall := func(h host, checkout string) {
		h.t.Helper()
		if out, err := install(h, checkout); err != nil {
			h.t.Fatalf("%v\n%s", err, out)
		}
	}
	tool := filepath.Join(top, "build", "azure-vnet-plugin")
	works := func(h host, name string) {
		h.t.Helper()
		addr := h.address(name)
		reaches(h.t, onHost(plain), addr)
		reaches(h.t, inContainer(h, name, addr), plain.Primary)
		// By the gateway alone, as this release leads its containers.
		route := h.docker("exec", name, "ip", "route", "get", plain.Primary.String())
		if !strings.Contains(route, "via "+h.Gateway.String()) {
			h.t.Errorf("%s goes to its subnet by %q, want by the gateway %s", name, route, h.Gateway)
		}
		if out := h.must("ip", "-o", "link", "show", "eth0"); strings.Contains(out, "master") {
			h.t.Errorf("the NIC is still in a bridge: %s", out)
		}
	}
	h.withEngine()
	mustInstall(h, dir)
	h.network("azure", "snat=off")
	end := plain.pingOn(h.container("azure", "old", "sleep 100000"))
	h.taken()

	data := h.must("sh", "-c", "ls -d /var/lib/docker/plugins/*/propagated-mount")
	everything := func() string { return h.disk(data, prefix) + h.docker("plugin", "inspect", plugin) }
	files := everything()
	out, err := install(h, top)
	saysTaken(t, "make install", out, err)
	if diff := cmp.Diff(files, everything()); diff != "" {
		t.Errorf("make install changed something (- before, + after):\n%s", diff)
	}

	h.docker("plugin", "disable", "-f", plugin)
	h.leasesAged() // a lease that no link shows is as old as one that leaked
	before, files := h.footprint(), everything()
	for _, word := range []string{"status", "uninstall"} {
		out, err := h.try(tool, word)
		saysTaken(t, "azure-vnet-plugin "+word, out, err)
	}
	if out := h.must("sh", "-c", tool+" status || true"); !strings.Contains(out, "broken: "+takenWords) {
		t.Errorf("azure-vnet-plugin status says\n%s", out)
	}
	startsOnAFormerHost(h, data)
	h.unchanged(before)
	if diff := cmp.Diff(files, everything()); diff != "" {
		t.Errorf("the present build changed files (- before, + after):\n%s", diff)
	}
	h.docker("plugin", "enable", plugin) // the former build goes on where it was
	end()

	t.Run("with a reboot", func(t *testing.T) {
		h := h.in(t)
		h.docker("stop", "-t", "0", "old")
		h.docker("plugin", "disable", "-f", plugin)
		networks := h.must("sh", "-c", "cat "+data+"/networks.json && sync")
		if err := h.PowerCut(); err != nil {
			t.Fatal(err)
		}
		if err := h.Boot(); err != nil {
			t.Fatal(err)
		}
		h.startEngine()
		mustInstall(h, top)
		h.docker("start", "old")
		works(h, "old")
		h.container("azure", "new", "sleep 100000")
		works(h, "new")
		if diff := cmp.Diff(networks, h.must("sh", "-c", "cat /var/lib/docker/plugins/*/propagated-mount/networks.json")); diff != "" {
			t.Errorf("networks.json of the former build (- before, + after):\n%s", diff)
		}
	})
	t.Run("back to the former build, and without a reboot", func(t *testing.T) {
		h := h.in(t)
		h.docker("rm", "-f", "old", "new")
		h.docker("network", "rm", "azure")
		h.must(filepath.Join(top, "scripts", "plugin.sh"), "uninstall", tool, prefix)
		mustInstall(h, dir)
		h.network("azure")
		h.container("azure", "old", "sleep 100000")
		h.taken()

		h.docker("rm", "-f", "old")
		h.docker("network", "rm", "azure")
		h.docker("plugin", "disable", "-f", plugin)
		h.must(prefix+"/sbin/azure-vnet-plugin", "uninstall")
		mustInstall(h, top)
		h.network("azure")
		h.container("azure", "new", "sleep 100000")
		works(h, "new")
	})
	clean(t, vnet)
}

// startsOnAFormerHost starts the present plugin, as no engine's, beside a former build's networks and
// containers, and ends it. It listens and says why it does nothing.
func startsOnAFormerHost(h host, data string) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), 30*time.Second)
	defer cancel()
	cmd := h.Command(ctx, filepath.Join(top, "build", "azure-vnet-plugin"), "-run", "/run", "-data", data, "-socket", "/run/upg.sock")
	log, err := os.Create(filepath.Join(h.t.TempDir(), "log"))
	if err != nil {
		h.t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	said := func() string { text, _ := os.ReadFile(log.Name()); return string(text) }
	defer func() {
		h.must("sh", "-c", "kill $(busybox pidof azure-vnet-plugin)")
		if err := cmd.Wait(); err != nil {
			h.t.Errorf("the plugin ends with %v:\n%s", err, said())
		}
	}()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", fmt.Sprintf("/proc/%d/root/run/upg.sock", h.PidOne()))
	}}}
	call := func(method string, request, answer any) (refused string) {
		h.t.Helper()
		body, err := json.Marshal(request)
		if err != nil {
			h.t.Fatal(err)
		}
		r, err := client.Post("http://plugin/"+method, "application/json", bytes.NewReader(body))
		if err != nil {
			h.t.Fatalf("%s: %v\n%s", method, err, said())
		}
		defer r.Body.Close()
		text, err := io.ReadAll(r.Body)
		if err != nil {
			h.t.Fatal(err)
		}
		if r.StatusCode == http.StatusOK {
			if err := json.Unmarshal(text, answer); err != nil {
				h.t.Fatal(err)
			}
			return ""
		}
		var told struct{ Err string }
		if err := json.Unmarshal(text, &told); err != nil {
			h.t.Fatalf("%s: %s", method, text)
		}
		return told.Err
	}
	eventually(h.t, "the plugin listens and names the NIC", 10*time.Second, func() bool {
		return strings.Contains(said(), "azure-vnet listens") && strings.Contains(said(), takenWords)
	})
	eventually(h.t, "the networks are looked at", 10*time.Second, func() bool { return strings.Contains(said(), "msg=ready") })

	var none struct{}
	subnet, gateway := h.Prefix.String(), fmt.Sprintf("%s/%d", h.Gateway, h.Prefix.Bits())
	var p ipam.RequestPoolResponse
	if refused := call("IpamDriver.RequestPool", ipam.RequestPoolRequest{AddressSpace: "azure-vnet", Pool: subnet}, &p); refused != "" {
		h.t.Fatalf("RequestPool: %s", refused)
	}
	if refused := call("NetworkDriver.CreateNetwork", network.CreateNetworkRequest{
		NetworkID: strings.Repeat("9", 64), Options: map[string]any{"com.docker.network.generic": map[string]any{}},
		IPv4Data: []*network.IPAMData{{AddressSpace: "azure-vnet", Pool: subnet, Gateway: gateway}},
	}, &none); !strings.Contains(refused, takenWords) {
		h.t.Errorf("CreateNetwork says %q", refused)
	}
	var a ipam.RequestAddressResponse
	if refused := call("IpamDriver.RequestAddress", ipam.RequestAddressRequest{PoolID: p.PoolID}, &a); refused != "" {
		h.t.Fatalf("RequestAddress: %s", refused)
	}
	if refused := call("NetworkDriver.CreateEndpoint", network.CreateEndpointRequest{
		NetworkID: h.docker("network", "inspect", "-f", "{{.Id}}", "azure"), EndpointID: strings.Repeat("8", 64), Interface: &network.EndpointInterface{Address: a.Address},
	}, &none); !strings.Contains(refused, takenWords) {
		h.t.Errorf("CreateEndpoint says %q", refused)
	}
	addr, _, _ := strings.Cut(a.Address, "/")
	if refused := call("IpamDriver.ReleaseAddress", ipam.ReleaseAddressRequest{PoolID: p.PoolID, Address: addr}, &none); refused != "" {
		h.t.Errorf("ReleaseAddress: %s", refused)
	}
}
