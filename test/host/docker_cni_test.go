// Copyright (c) The azure-vnet authors. MIT licence.

package host

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// tomorrow is what a later release may add to what lies on a host, as edits of
// today's source: a field of a lease, one of host.json and a key of an alias.
var tomorrow = map[string][2]string{
	"pool/state.go":   {"type record struct {\n\tLease\n", "type record struct {\n\tLease\n\tZone string `json:\"zone\"`\n"},
	"pool/lease.go":   {"record{Lease: l}", "record{Lease: l, Zone: \"z1\"}"},
	"bridge/state.go": {"type hostState struct {\n", "type hostState struct {\n\tZone string `json:\"zone,omitempty\"`\n"},
	"bridge/host.go":  {"\treturn unlock, nil\n", "\th.updateState(ctx, who, func(s *hostState) error { s.Zone = \"z1\"; return nil })\n\treturn unlock, nil\n"},
	"bridge/alias.go": {`" net=" + a.policy`, `" zone=z1 net=" + a.policy`},
}

// laterCNI builds the CNI plugin of tomorrow.
func laterCNI(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	overlay := struct{ Replace map[string]string }{map[string]string{}}
	for file, edit := range tomorrow {
		file = filepath.Join(test.Top, file)
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Count(string(text), edit[0]) != 1 {
			t.Fatalf("%s does not have once: %s", file, edit[0])
		}
		later := filepath.Join(dir, filepath.Base(filepath.Dir(file))+"-"+filepath.Base(file))
		if err := os.WriteFile(later, []byte(strings.Replace(string(text), edit[0], edit[1], 1)), 0o644); err != nil {
			t.Fatal(err)
		}
		overlay.Replace[file] = later
	}
	text, err := json.Marshal(overlay)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "overlay.json"), text, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-overlay", filepath.Join(dir, "overlay.json"), "-ldflags", "-X main.version=v99.0.0", "-o", dir+"/", "azurevnet/cmd/azure-vnet")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build tomorrow's CNI plugin: %v\n%s", err, out)
	}
	return dir
}

// short tells an error that only says that all addresses are held.
func short(err error) bool { return strings.Contains(err.Error(), "no free address") }

// TestDockerAndCNIOfTwoReleasesOnOneVM: operations at random from both sides,
// who want more addresses than there are. Pods come and go by today's CNI plugin
// and by tomorrow's, containers by today's Docker plugin. make test does over a
// hundred of them, and make soak 1,700.
func TestDockerAndCNIOfTwoReleasesOnOneVM(t *testing.T) {
	t.Parallel()
	const secondaries, dockerSides, cniSides = 8, 2, 3
	dockerOps, cniOps := 12, 30
	if test.Soaking {
		dockerOps, cniOps = 250, 400
	}
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: secondaries}, vnetsim.VMConfig{})
	h, plain := vms[0], test.OnHost(vms[1])
	h.WithPlugin()
	today := test.OnNode(h)
	later := today
	later.Dir = laterCNI(t)
	later.CNI = libcni.NewCNIConfigWithCacheDir([]string{later.Dir}, t.TempDir(), later.Exec())
	releases := []test.Node{later, today}
	n := later
	h.Network("azure")
	l := n.List("1.1.0", "azure", test.Azure())
	lists := []*libcni.NetworkConfigList{l, n.List("1.1.0", "azure", test.Azure(`"mode":"transparent"`))}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)

	who := test.NewHolders(t)
	var all sync.WaitGroup
	come := func(number, ops int, stay bool, s *side) {
		all.Go(func() {
			dice := rand.New(rand.NewPCG(seed, uint64(number)))
			for range ops {
				name, err := s.one(dice)
				if err != nil && !short(err) {
					t.Errorf("%s: %v", name, err)
				}
				if addr, ok := s.has[name]; ok && dice.IntN(4) == 0 && !plain.Host.Pings(addr) {
					t.Errorf("%s is not reached at %s", name, addr)
				}
			}
			if stay {
				return
			}
			if err := s.allGo(); err != nil {
				t.Error(err)
			}
		})
	}
	for i := range dockerSides {
		come(i, dockerOps, false, dockerSide(h, fmt.Sprintf("d%d", i), who, true))
	}
	for i := range cniSides {
		come(100+i, cniOps, true, cniSide(releases[i%2], lists[i%2], fmt.Sprintf("n%d", i), who))
	}
	all.Wait()
	t.Logf("FIGURE storms: %d operations", dockerSides*dockerOps+cniSides*cniOps)
	t.Logf("addresses were taken %v times", who.Taken)
	if who.Taken["d"] < dockerSides*dockerOps/5 || who.Taken["n"] < cniSides*cniOps/5 {
		t.Errorf("addresses were taken %v times: too few to show anything", who.Taken)
	}

	var file struct {
		Leases map[string]struct{ Owner, Zone string }
	}
	if err := json.Unmarshal([]byte(h.Must("cat", "/run/azure-vnet/leases.json")), &file); err != nil {
		t.Fatal(err)
	}
	pods := 0
	for addr, lease := range file.Leases {
		if strings.HasPrefix(lease.Owner, "cni/") {
			if pods++; lease.Zone != "z1" && !strings.HasPrefix(lease.Owner, "cni/azure/n1-") {
				t.Errorf("today's plugin lost what tomorrow's wrote of %s", addr)
			}
		}
	}
	left := 0
	for _, name := range who.By {
		if strings.HasPrefix(name, "n") {
			left++
		}
	}
	if pods != left || len(file.Leases) != left {
		t.Errorf("%d leases, %d of pods, and %d pods stand", len(file.Leases), pods, left)
	}
	used := slices.Collect(maps.Keys(who.By))
	for addr, name := range who.By {
		if _, err := plain.Try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
			t.Errorf("%s is not reached at %s: %v", name, addr, err)
		}
		n.Del(l, &libcni.RuntimeConf{ContainerID: name, NetNS: "/run/netns/" + name, IfName: "eth0"})
	}
	if !strings.Contains(h.Must("cat", "/run/azure-vnet/host.json"), `"zone":"z1"`) {
		t.Error("today's plugin lost what tomorrow's wrote in host.json")
	}
	n.Bare()
	test.NothingDropped(t, vnet, used...)
}
