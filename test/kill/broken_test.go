// Copyright (c) The azure-vnet authors. MIT licence.

package kill

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// breakage is a mistake of the product: text of a file, and what stands there instead.
type breakage struct {
	file     string
	old, new []string
}

// inPlace has state written in two pieces to where it is read.
var inPlace = breakage{"internal/statefile/statefile.go",
	[]string{`tmp := path + ".tmp"`, `_, err := f.Write(body)`},
	[]string{`tmp := path`, `_, err := f.Write(body[:len(body)/2]); if err == nil { _, err = f.Write(body[len(body)/2:]) }`}}

// leaseFirst has a DEL and a GC release addresses before their links are gone.
var leaseFirst = breakage{"cmd/azure-vnet/del.go",
	[]string{`	leased := map[string][]netip.Addr{}`},
	[]string{`	_ = l.EndLeases(ctx, owners...); leased := map[string][]netip.Addr{}`}}

// build builds azure-vnet with a mistake.
func (b breakage) build(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	source := filepath.Join(test.Top, b.file)
	text, err := os.ReadFile(source)
	if err != nil {
		t.Fatal(err)
	}
	broken := string(text)
	for i, old := range b.old {
		if strings.Count(broken, old) != 1 {
			t.Fatalf("%s has not %q once: give the mistake another place", b.file, old)
		}
		broken = strings.Replace(broken, old, b.new[i], 1)
	}
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{source: filepath.Join(dir, "broken.go")}})
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"broken.go": broken, "overlay.json": string(overlay)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-overlay", filepath.Join(dir, "overlay.json"), "-o", dir+"/", "azurevnet/cmd/azure-vnet")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	return dir
}

// TestKilledMistakesAreFound: the matrix fails for a program with a mistake, and for a host that does not answer.
func TestKilledMistakesAreFound(t *testing.T) {
	t.Parallel()
	n := newNode(t, vnetsim.VMConfig{Secondaries: 4})
	n.Netns("keeper", "pod")
	n.calls("ADD", "keeper", n.conf(0, 0, nil))
	t.Run("a host that is silent for a while", func(t *testing.T) {
		before := n.probes.last()
		n.Must("sh", "-c", "iptables -I INPUT -p icmp -j DROP; sleep 0.3; iptables -D INPUT 1")
		if lost := n.probes.lost(before); lost < 2 {
			t.Errorf("%d probes were lost", lost)
		}
	})
	conf := n.conf(0, 1, nil)
	for _, c := range []struct {
		what    string
		mistake breakage
		history func(n node) history
	}{
		{"state that is written in place", inPlace, func(n node) history { return n.adding(conf) }},
		{"an address that is released before its link is gone", leaseFirst, func(n node) history { return n.deleting(conf) }},
	} {
		t.Run(c.what, func(t *testing.T) {
			n := n.in(t)
			n.Dir = c.mistake.build(t)
			h := c.history(n)
			h.heal, h.pods = n.heal, []string{"pod"}
			faults := h.faults(t, n.Host, n.probes, 1, 1) // up to the step that the mistake is at
			if len(faults) == 0 {
				t.Error("the matrix finds nothing wrong")
			}
			t.Log(faults)
		})
	}
}
