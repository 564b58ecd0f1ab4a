// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
)

const plugin = "azure-vnet:latest"

// top is the root of the checkout.
var top = func() string {
	dir, err := filepath.Abs("..")
	if err != nil {
		panic(err)
	}
	return dir
}()

// soaking says that make soak runs the tests: all cases of many that are alike.
var soaking = os.Getenv("SOAK") != ""

// built makes build/plugin once for all tests of this run.
var built = sync.OnceValue(func() error {
	out, err := exec.Command("make", "-C", top, "rootfs").CombinedOutput()
	if err != nil {
		return fmt.Errorf("make rootfs: %w\n%s", err, out)
	}
	return nil
})

// host is a VM with what tests ask of it. Its methods end the test on failure.
type host struct {
	*vnetsim.VM
	t *testing.T
}

// newVNet starts a VNet with VMs, which the end of the test removes.
func newVNet(t *testing.T, vms ...vnetsim.VMConfig) (*vnetsim.VNet, []host) {
	t.Helper()
	return newVNetOf(t, vnetsim.Config{}, vms...)
}

// newVNetOf is newVNet with another subnet.
func newVNetOf(t *testing.T, cfg vnetsim.Config, vms ...vnetsim.VMConfig) (*vnetsim.VNet, []host) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make namespaces: sudo make test")
	}
	vnet, err := vnetsim.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := vnet.Close(); err != nil {
			t.Errorf("close the vnet: %v", err)
		}
	})
	var hosts []host
	for _, vm := range vms {
		vm, err := vnet.AddVM(vm)
		if err != nil {
			t.Fatal(err)
		}
		h := host{vm, t}
		hosts = append(hosts, h)
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("%s: dockerd says:\n%s", vm.Name, vm.DockerLog())
			}
		})
	}
	return vnet, hosts
}

// in is the host, failing a subtest instead.
func (h host) in(t *testing.T) host { return host{h.VM, t} }

// try runs a command in the VM.
func (h host) try(name string, arg ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	out, err := h.Run(ctx, name, arg...)
	return strings.TrimSpace(out), err
}

// must runs a command in the VM that succeeds.
func (h host) must(name string, arg ...string) string {
	h.t.Helper()
	out, err := h.try(name, arg...)
	if err != nil {
		h.t.Fatal(err)
	}
	return out
}

// client is the docker command that belongs to the engine of the same package; a
// newer one refuses options that an older engine does have.
var client = func() string {
	if _, err := os.Stat("/usr/bin/docker"); err == nil {
		return "/usr/bin/docker"
	}
	return "docker"
}()

// docker runs a docker command that succeeds.
func (h host) docker(arg ...string) string {
	h.t.Helper()
	return h.must(client, arg...)
}

// refused runs a docker command that fails with an error that says all of want.
func (h host) refused(arg []string, want ...string) {
	h.t.Helper()
	out, err := h.try(client, arg...)
	if err == nil {
		h.t.Errorf("docker %s: it succeeded: %s", strings.Join(arg, " "), out)
		return
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			h.t.Errorf("docker %s: the error does not say %q: %v", strings.Join(arg, " "), w, err)
		}
	}
}

// withEngine starts a dockerd with the busybox image.
func (h host) withEngine(arg ...string) {
	h.t.Helper()
	h.startEngine(arg...)
	if err := h.ImportBusybox(h.t.Context()); err != nil {
		h.t.Fatal(err)
	}
}

func (h host) startEngine(arg ...string) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), time.Minute)
	defer cancel()
	if err := h.StartDocker(ctx, arg...); err != nil {
		h.t.Fatal(err)
	}
}

// withPlugin starts a dockerd with the plugin enabled; settings are KEY=value.
func (h host) withPlugin(settings ...string) {
	h.t.Helper()
	h.withEngine()
	h.enablePlugin(settings...)
}

// enablePlugin gives the plugin to the engine.
func (h host) enablePlugin(settings ...string) {
	h.t.Helper()
	if err := built(); err != nil {
		h.t.Fatal(err)
	}
	h.docker("plugin", "create", plugin, filepath.Join(top, "build", "plugin"))
	if len(settings) > 0 {
		h.docker(append([]string{"plugin", "set", plugin}, settings...)...)
	}
	h.docker("plugin", "enable", plugin)
}

// network makes a network of the VM's subnet.
func (h host) network(name string, option ...string) {
	h.t.Helper()
	arg := []string{"network", "create", "-d", plugin, "--ipam-driver", plugin, "--subnet", h.Prefix.String()}
	for _, o := range option {
		arg = append(arg, "-o", o)
	}
	h.docker(append(arg, name)...)
}

// container runs busybox in the background and returns its address.
func (h host) container(network, name, command string, arg ...string) netip.Addr {
	h.t.Helper()
	all := append([]string{"run", "-d", "--init", "--network", network, "--name", name}, arg...)
	h.docker(append(all, "busybox", "sh", "-c", command)...)
	return h.address(name)
}

// address is a running container's.
func (h host) address(container string) netip.Addr {
	h.t.Helper()
	out := h.docker("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", container)
	addr, err := netip.ParseAddr(out)
	if err != nil {
		h.t.Fatalf("%s on %s has no address: %v", container, h.Name, err)
	}
	return addr
}

// state is what a VM holds of containers: nothing of it may outlive them.
type state struct {
	Leases      []string // addresses
	Attachments []string // host veths
}

// state asks azure-vnet-plugin status.
func (h host) state() state {
	h.t.Helper()
	var report struct {
		Pool struct {
			Leases map[string]struct{ Owner string } // by address
		}
		Attachments []struct{ Link string }
	}
	if err := json.Unmarshal([]byte(h.must("sh", "-c", filepath.Join(top, "build", "azure-vnet-plugin")+" status -json || true")), &report); err != nil {
		h.t.Fatal(err)
	}
	var s state
	s.Leases = slices.Sorted(maps.Keys(report.Pool.Leases))
	for _, a := range report.Attachments {
		s.Attachments = append(s.Attachments, a.Link)
	}
	return s
}

// veth is a name of one of ours, or of its peer.
var veth = regexp.MustCompile(`az[vc][0-9a-f]{11}`)

// empty says that no lease and no link is left, nor anything that the kernel held
// for a container.
func (h host) empty() {
	h.t.Helper()
	if s := h.state(); len(s.Leases)+len(s.Attachments) > 0 {
		h.t.Errorf("%s still holds %+v", h.Name, s)
	}
	h.forgotten()
}

// ofContainers lists what azure-vnet keeps in the kernel for containers: 168 is the
// protocol number of its routes and neighbour entries.
const ofContainers = `ip -o link
for family in bridge arp ip; do nft list table $family azure_vnet 2>/dev/null; done
ip route show table all proto 168
ip neigh show nud permanent proto 168
ip -d rule | grep "proto 168" || true`

var anAddress = regexp.MustCompile(`\d+\.\d+\.\d+\.\d+`)

// forgotten says that the kernel holds no link, and no entry of a table, a set, a map or
// a rule, for a container of a NIC of this VM.
func (h host) forgotten() {
	h.t.Helper()
	out := h.must("sh", "-c", ofContainers)
	if found := veth.FindAllString(out, -1); len(found) > 0 {
		h.t.Errorf("%s still has %s:\n%s", h.Name, slices.Compact(found), out)
	}
	for _, nic := range h.NICs() {
		for _, found := range anAddress.FindAllString(out, -1) {
			if addr, err := netip.ParseAddr(found); err == nil && slices.Contains(nic.Secondaries, addr) {
				h.t.Errorf("%s still has something of %s:\n%s", h.Name, addr, out)
				return
			}
		}
	}
}

// holders say who has which address, and when two do.
type holders struct {
	t     *testing.T
	mu    sync.Mutex
	by    map[netip.Addr]string // guarded by mu
	taken map[string]int        // guarded by mu: how often, by the first letter of the holder
}

func newHolders(t *testing.T) *holders {
	return &holders{t: t, by: map[netip.Addr]string{}, taken: map[string]int{}}
}

// take notes an address when its holder has it.
func (h *holders) take(addr netip.Addr, who string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if other := h.by[addr]; other != "" {
		h.t.Errorf("%s is lent to %s while %s has it", addr, who, other)
	}
	h.by[addr] = who
	h.taken[who[:1]]++
}

// give forgets one just before its holder gives it back.
func (h *holders) give(addr netip.Addr) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.by, addr)
}

// eventually polls until ok, for as long as a thing that heals may take.
func eventually(t *testing.T, what string, within time.Duration, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(within); !ok(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", within, what)
		}
	}
}

// clean says that the fabric dropped nothing, and that it carried something from each
// of the addresses.
func clean(t *testing.T, vnet *vnetsim.VNet, used ...netip.Addr) {
	t.Helper()
	v, err := vnet.Violations()
	if err != nil {
		t.Fatal(err)
	}
	if len(v) > 0 {
		t.Errorf("the fabric dropped frames that break Azure's rules: %v", v)
	}
	accepted, err := vnet.Accepted()
	if err != nil {
		t.Fatal(err)
	}
	for _, addr := range used {
		if accepted[addr] == 0 {
			t.Errorf("the fabric carried nothing from %s: its rules were not tried", addr)
		}
	}
}
