// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"

	"azurevnet/internal/dump"
	"azurevnet/internal/statefile"
	"azurevnet/internal/vnetsim"
)

// Soaking says that make soak runs the tests: all cases of many that are alike.
var Soaking = os.Getenv("SOAK") != ""

// SoakTime is how long the tests of make soak go on that do things at random, such as 10m; 0: make test runs the tests.
var SoakTime, _ = time.ParseDuration(os.Getenv("SOAK"))

// Host is a VM with what tests ask of it. Its methods end the test on failure.
type Host struct {
	*vnetsim.VM
	T *testing.T
}

// NewVNet starts a VNet with VMs, which the end of the test removes.
func NewVNet(t *testing.T, vms ...vnetsim.VMConfig) (*vnetsim.VNet, []Host) {
	t.Helper()
	return NewVNetOf(t, vnetsim.Config{}, vms...)
}

// NewVNetOf is NewVNet with another subnet.
func NewVNetOf(t *testing.T, cfg vnetsim.Config, vms ...vnetsim.VMConfig) (*vnetsim.VNet, []Host) {
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
	var hosts []Host
	for _, vm := range vms {
		vm, err := vnet.AddVM(vm)
		if err != nil {
			t.Fatal(err)
		}
		h := Host{vm, t}
		hosts = append(hosts, h)
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("%s: dockerd says:\n%s", vm.Name, vm.DockerLog())
			}
		})
	}
	return vnet, hosts
}

// In is the host, failing a subtest instead.
func (h Host) In(t *testing.T) Host { return Host{h.VM, t} }

// Try runs a command in the VM.
func (h Host) Try(name string, arg ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	out, err := h.Run(ctx, name, arg...)
	return strings.TrimSpace(out), err
}

// Must runs a command in the VM that succeeds.
func (h Host) Must(name string, arg ...string) string {
	h.T.Helper()
	out, err := h.Try(name, arg...)
	if err != nil {
		h.T.Fatal(err)
	}
	return out
}

// Client is the docker command that belongs to the engine of the same package; a
// newer one refuses options that an older engine does have.
var Client = func() string {
	if _, err := os.Stat("/usr/bin/docker"); err == nil {
		return "/usr/bin/docker"
	}
	return "docker"
}()

// Docker runs a docker command that succeeds.
func (h Host) Docker(arg ...string) string {
	h.T.Helper()
	return h.Must(Client, arg...)
}

// Refused runs a docker command that fails with an error that says all of want.
func (h Host) Refused(arg []string, want ...string) {
	h.T.Helper()
	out, err := h.Try(Client, arg...)
	if err == nil {
		h.T.Errorf("docker %s: it succeeded: %s", strings.Join(arg, " "), out)
		return
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			h.T.Errorf("docker %s: the error does not say %q: %v", strings.Join(arg, " "), w, err)
		}
	}
}

// WithEngine starts a dockerd with the busybox image.
func (h Host) WithEngine(arg ...string) {
	h.T.Helper()
	h.StartEngine(arg...)
	if err := h.ImportBusybox(h.T.Context()); err != nil {
		h.T.Fatal(err)
	}
}

// StartEngine starts a dockerd that has nothing.
func (h Host) StartEngine(arg ...string) {
	h.T.Helper()
	ctx, cancel := context.WithTimeout(h.T.Context(), time.Minute)
	defer cancel()
	if err := h.StartDocker(ctx, arg...); err != nil {
		h.T.Fatal(err)
	}
}

// WithPlugin starts a dockerd that has the busybox image, with the plugin enabled; settings are KEY=value.
func (h Host) WithPlugin(settings ...string) {
	h.T.Helper()
	disk, err := engineDisk()
	if err == nil {
		err = output(exec.Command("cp", "-a", disk+"/.", fmt.Sprintf("/proc/%d/root/var/lib/docker", h.PidOne())))
	}
	if err != nil {
		h.T.Fatal(err)
	}
	h.StartEngine()
	h.enable(settings)
}

// EnablePlugin gives the plugin to the engine, and enables it.
func (h Host) EnablePlugin(settings ...string) {
	h.T.Helper()
	if _, err := BuildPlugin(); err != nil {
		h.T.Fatal(err)
	}
	h.Docker("plugin", "create", Plugin, filepath.Join(Top, "build", "plugin"))
	h.enable(settings)
}

func (h Host) enable(settings []string) {
	h.T.Helper()
	if len(settings) > 0 {
		h.Docker(append([]string{"plugin", "set", Plugin}, settings...)...)
	}
	h.Docker("plugin", "enable", Plugin)
}

// Network makes a network of the VM's subnet.
func (h Host) Network(name string, option ...string) {
	h.T.Helper()
	arg := []string{"network", "create", "-d", Plugin, "--ipam-driver", Plugin, "--subnet", h.Prefix.String()}
	for _, o := range option {
		arg = append(arg, "-o", o)
	}
	h.Docker(append(arg, name)...)
}

// Container runs busybox in the background and returns its address.
func (h Host) Container(network, name, command string, arg ...string) netip.Addr {
	h.T.Helper()
	all := append([]string{"run", "-d", "--init", "--network", network, "--name", name}, arg...)
	h.Docker(append(all, "busybox", "sh", "-c", command)...)
	return h.Address(name)
}

// state is what a VM holds of containers: nothing of it may outlive them.
type state struct {
	Leases      []string // addresses
	Attachments []string // host veths
}

// State asks azure-vnet-plugin status.
func (h Host) State() state {
	h.T.Helper()
	var report struct {
		Pool struct {
			Leases map[string]struct{ Owner string } // by address
		}
		Attachments []struct{ Link string }
	}
	if err := json.Unmarshal([]byte(h.Must("sh", "-c", PluginBinary+" status -json || true")), &report); err != nil {
		h.T.Fatal(err)
	}
	var s state
	s.Leases = slices.Sorted(maps.Keys(report.Pool.Leases))
	for _, a := range report.Attachments {
		s.Attachments = append(s.Attachments, a.Link)
	}
	return s
}

// Veth is a name of one of ours, or of its peer.
var Veth = regexp.MustCompile(`az[vc][0-9a-f]{11}`)

// Empty says that no lease and no link is left, nor anything that the kernel held
// for a container.
func (h Host) Empty() {
	h.T.Helper()
	if s := h.State(); len(s.Leases)+len(s.Attachments) > 0 {
		h.T.Errorf("%s still holds %+v", h.Name, s)
	}
	h.Forgotten()
}

// ofContainers lists what azure-vnet keeps in the kernel for containers: 168 is the
// protocol number of its routes and neighbour entries.
const ofContainers = `ip -o link
for family in bridge arp ip; do nft list table $family azure_vnet 2>/dev/null; done
ip route show table all proto 168
ip neigh show nud permanent proto 168
ip -d rule | grep "proto 168" || true`

var anAddress = regexp.MustCompile(`\d+\.\d+\.\d+\.\d+`)

// Forgotten says that the kernel holds no link, and no entry of a table, a set, a map or
// a rule, for a container of a NIC of this VM.
func (h Host) Forgotten() {
	h.T.Helper()
	out := h.Must("sh", "-c", ofContainers)
	if found := Veth.FindAllString(out, -1); len(found) > 0 {
		h.T.Errorf("%s still has %s:\n%s", h.Name, slices.Compact(found), out)
	}
	for _, nic := range h.NICs() {
		for _, found := range anAddress.FindAllString(out, -1) {
			if addr, err := netip.ParseAddr(found); err == nil && slices.Contains(nic.Secondaries, addr) {
				h.T.Errorf("%s still has something of %s:\n%s", h.Name, addr, out)
				return
			}
		}
	}
}

// Eventually polls until ok, for as long as a thing that heals may take.
func Eventually(t *testing.T, what string, within time.Duration, ok func() bool) {
	t.Helper()
	pause := 50 * time.Millisecond
	for deadline := time.Now().Add(within); !ok(); time.Sleep(pause) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", within, what)
		}
		pause = min(pause*3/2, time.Second) // who asks takes CPU time from what is awaited
	}
}

// NothingDropped says that the fabric dropped nothing, and that it carried something from each
// of the addresses.
func NothingDropped(t *testing.T, vnet *vnetsim.VNet, used ...netip.Addr) {
	t.Helper()
	if err := vnet.Proved(used...); err != nil {
		t.Error(err)
	}
}

// Serve starts server on the VM itself.
func (h Host) Serve() {
	h.T.Helper()
	h.Must("sh", "-c", strings.NewReplacer("/www", "/run/www", "exec httpd -f", "busybox httpd").Replace(Server))
}

// Lent lists the addresses that the VM lends, by its file.
func (h Host) Lent() []string {
	h.T.Helper()
	var file struct{ Leases map[string]any }
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/run/azure-vnet/leases.json", h.PidOne()))
	if errors.Is(err, os.ErrNotExist) {
		return []string{}
	}
	if err == nil {
		err = json.Unmarshal(text, &file)
	}
	if err != nil {
		h.T.Fatal(err)
	}
	return append([]string{}, slices.Sorted(maps.Keys(file.Leases))...)
}

// ContainerLinks lists the links in the VM that lead to containers.
func (h Host) ContainerLinks() []string {
	h.T.Helper()
	names := []string{}
	err := h.Do(func() error {
		links, err := dump.Whole(netlink.LinkList)
		for _, l := range links {
			if Veth.MatchString(l.Attrs().Name) {
				names = append(names, l.Attrs().Name)
			}
		}
		return err
	})
	if err != nil {
		h.T.Fatal(err)
	}
	slices.Sort(names)
	return names
}

// Traces lists the lines of the VM's kernel that name one of the words: rules and
// sets, routes of every table, permanent neighbours and forwarding entries.
func (h Host) Traces(words ...string) []string {
	h.T.Helper()
	found := []string{}
	if len(words) == 0 {
		return found
	}
	for i, w := range words {
		words[i] = regexp.QuoteMeta(w)
	}
	// An address is not part of a longer one, and may stand before a prefix length.
	of := regexp.MustCompile(`(^|[^0-9a-z.])(` + strings.Join(words, "|") + `)($|[^0-9a-z.])`)
	all := h.Must("sh", "-c", `nft list ruleset; ip route show table all; ip rule; ip neigh show nud permanent; bridge fdb show`)
	for line := range strings.Lines(all) {
		if of.MatchString(line) {
			found = append(found, strings.TrimSpace(line))
		}
	}
	return found
}

// LeasesAged makes every lease look older than the grace that a leak is given.
func (h Host) LeasesAged() {
	h.T.Helper()
	type file struct {
		Leases map[string]*struct {
			Since time.Duration `json:"since"`
		} `json:"leases"`
	}
	path := fmt.Sprintf("/proc/%d/root/run/azure-vnet/leases.json", h.PidOne())
	err := statefile.Update(h.T.Context(), path, "a test", func(f *file) error {
		for _, l := range f.Leases {
			l.Since -= 10 * time.Minute
		}
		return nil
	})
	if err != nil {
		h.T.Fatal(err)
	}
}

// Says tells whether err is of a plugin, with that code and text.
func Says(err error, code uint, text string) bool {
	var told *types.Error
	return errors.As(err, &told) && told.Code == code && strings.Contains(told.Error(), text)
}
