// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// atOnce is far more than a refusal takes, and far less than a call that waits for somebody.
const atOnce = 8 * time.Second

const oddPaths = `mkdir -p /run/odd/directory && cd /run/odd && mkfifo fifo && echo text >file && ln -s fifo link-to-fifo && ln -s nowhere dangling && ln -s /proc/self/ns/mnt mount-namespace`

// makeOddPaths makes files of each kind, and a socket, below /run/odd.
func makeOddPaths(n test.Node) {
	n.T.Helper()
	n.Must("sh", "-c", oddPaths)
	l, err := net.Listen("unix", fmt.Sprintf("/proc/%d/root/run/odd/socket", n.PidOne()))
	if err != nil {
		n.T.Fatal(err)
	}
	n.T.Cleanup(func() { l.Close() })
}

// CNI_NETNS may name something that is no network namespace. Every verb that opens it refuses it at once, in both modes.
// No address is lent for it, no other IPAM is asked, and nothing is held.
func TestANamespaceThatIsNoneIsRefusedAtOnce(t *testing.T) {
	t.Parallel()
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2})
	n := test.OnNode(vms[0])
	makeOddPaths(n)
	n.Must("sh", "-c", `mkdir -p /run/noted && printf %s "$0" >/run/noted/noted && chmod +x /run/noted/noted && echo $1 >/run/noted/address`, noted, n.Secondaries()[1].String())
	l := n.List("1.1.0", "azure", test.Azure())
	_, r := n.Add(l, n.Pod("pod"))
	prev := map[string]any{"prevResult": r}
	for path, says := range map[string]string{
		"/run/odd/fifo":            "is not a namespace",
		"/run/odd/link-to-fifo":    "is not a namespace",
		"/run/odd/file":            "is not a namespace",
		"/run/odd/directory":       "is not a namespace",
		"/run/odd/socket":          "socket",
		"/run/odd/dangling":        "no such file",
		"/run/odd/nothing":         "no such file",
		"/dev/zero":                "is not a namespace",
		"/run/odd/mount-namespace": "namespace of another kind",
		"/proc/1/ns/net":           "is the host's own network namespace",
		"/proc/self/ns/net":        "is the host's own network namespace",
	} {
		t.Run(path, func(t *testing.T) {
			n := n.In(t)
			begin := time.Now()
			for name, conf := range map[string][]byte{
				"bridge": test.Stdin("1.1.0", "azure", test.Azure(), nil), "transparent": test.Stdin("1.1.0", "azure", test.Azure(`"mode":"transparent"`), nil),
				"another IPAM": test.Stdin("1.1.0", "azure", `{"type":"azure-vnet","ipam":{"type":"noted"}}`, nil),
			} {
				out, err := n.Call("ADD", "odd", path, conf, "CNI_PATH="+n.Dir+":/run/noted")
				if err == nil || !strings.Contains(err.Error(), says) {
					t.Errorf("ADD, %s: %s %v", name, out, err)
				}
			}
			if out, err := n.Call("CHECK", "pod", path, test.Stdin("1.1.0", "azure", test.Azure(), prev)); err == nil || !strings.Contains(err.Error(), says) {
				t.Errorf("CHECK: %s %v", out, err)
			}
			if out, err := n.Call("DEL", "odd", path, test.Stdin("1.1.0", "azure", test.Azure(), nil)); err != nil {
				t.Errorf("DEL: %s %v", out, err)
			}
			if took := time.Since(begin); took > atOnce {
				t.Errorf("it took %v", took)
			}
			if s := n.Holds(); len(s.Leases) != 1 || len(s.Attachments) != 1 {
				t.Errorf("%+v is held", s)
			}
			if asked, err := n.Try("ls", "/run/noted/ADD"); err == nil {
				t.Errorf("the other IPAM was asked: %s", asked)
			}
		})
	}
	n.Del(l, &libcni.RuntimeConf{ContainerID: "pod", NetNS: "/run/netns/pod", IfName: "eth0"})
	n.Bare()
}

// A configuration that is too long, or whose end never comes, is refused with one document.
func TestAConfigurationWithoutEnd(t *testing.T) {
	t.Parallel()
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 1})
	n := test.OnNode(vms[0])
	long := test.Stdin("1.1.0", "azure", test.Azure(), map[string]any{"more": strings.Repeat("x", 1<<20)})
	for _, plugin := range []string{"azure-vnet", "azure-vnet-ipam"} {
		for _, verb := range []string{"ADD", "DEL", "CHECK", "GC", "STATUS"} {
			out, code, err := n.Plugin(t.Context(), filepath.Join(n.Dir, plugin), long, n.Environ(verb, "long", "/run/netns/long"))
			if code != 1 || !test.Says(err, 7, "longer than 1048576 bytes") || documents(t, out) != 1 {
				t.Errorf("%s %s: exit %d, %s %v", plugin, verb, code, out, err)
			}
		}
	}
	// A list of 5,000 attachments is long, and is read.
	var valid []map[string]string
	for i := range 5000 {
		valid = append(valid, map[string]string{"containerID": fmt.Sprintf("%064d", i), "ifname": "eth0"})
	}
	if out, err := n.Call("GC", "", "", test.Stdin("1.1.0", "azure", test.Azure(), map[string]any{"cni.dev/valid-attachments": valid})); err != nil {
		t.Errorf("GC: %s %v", out, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := n.Command(ctx, filepath.Join(n.Dir, "azure-vnet"))
	cmd.Env = n.Environ("ADD", "endless", "/run/netns/endless")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(in, `{"cniVersion":"1.1.0",`)
	if err := cmd.Wait(); err == nil || ctx.Err() != nil || !strings.Contains(out.String(), "does not end within") || documents(t, out.Bytes()) != 1 {
		t.Errorf("%v %s", err, &out)
	}
	n.Bare()
}

// Files that are none keep neither the words attach and detach waiting, nor an ADD whose source of addresses is a file.
func TestFilesThatAreNoneAreRefusedAtOnce(t *testing.T) {
	t.Parallel()
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 1})
	n := test.OnNode(vms[0])
	makeOddPaths(n)
	n.Must("sh", "-c", "head -c 2000000 /dev/zero >/run/odd/long")
	n.Must("sh", "-c", `ip netns add pod; printf '{"cniVersion":"1.1.0","name":"azure","plugins":[%s]}' "$0" >/run/odd/azure.conflist`, test.Azure())
	begin := time.Now()
	for path, says := range map[string]string{
		"/run/odd/fifo": "is not a file", "/run/odd/link-to-fifo": "is not a file", "/run/odd/directory": "is not a file", "/dev/zero": "is not a file",
		"/run/odd/socket": "open /run/odd/socket", "/run/odd/dangling": "no such file", "/run/odd/long": "has 2000000 bytes", "/run/odd/file": "/run/odd/file",
	} {
		for _, word := range []string{"attach", "detach"} {
			out, err := n.Try(filepath.Join(n.Dir, "azure-vnet"), word, path, "pod", "/run/netns/pod")
			if err == nil || !strings.Contains(err.Error(), says) {
				t.Errorf("%s %s: %s %v", word, path, out, err)
			}
		}
	}
	for path, says := range map[string]string{"/run/odd/fifo": "it is not a file", "/run/odd/directory": "it is not a file", "/dev/zero": "it is not a file"} {
		conf := test.Stdin("1.1.0", "azure", `{"type":"azure-vnet","ipam":{"type":"azure-vnet-ipam","environment":"`+path+`"}}`, nil)
		out, err := n.Call("ADD", "pod", "/run/netns/pod", conf)
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("ADD with the source %s: %s %v", path, out, err)
		}
	}
	for _, netns := range []string{"/run/odd/fifo", "/proc/self/ns/net"} {
		if out, err := n.Try(filepath.Join(n.Dir, "azure-vnet"), "attach", "/run/odd/azure.conflist", "pod", netns); err == nil {
			t.Errorf("attach to %s: %s", netns, out)
		}
	}
	// A log that is a FIFO loses its lines, and holds no call up.
	n.Must("sh", "-c", "rm -f /var/log/azure-vnet.log; mkfifo /var/log/azure-vnet.log")
	if out, err := n.Call("STATUS", "", "", test.Stdin("1.1.0", "azure", test.Azure(`"logLevel":"debug"`), nil)); err != nil {
		t.Errorf("STATUS: %s %v", out, err)
	}
	if took := time.Since(begin); took > 3*atOnce {
		t.Errorf("it took %v", took)
	}
	n.Bare()
}
