// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"maps"
	"slices"
)

// cniDir holds our CNI plugins and the reference ones, built once for all tests
// of this run.
var cniDir = sync.OnceValues(func() (string, error) {
	const ref = "github.com/containernetworking/plugins/plugins/"
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", cniTemp+"/",
		"azurevnet/cmd/azure-vnet", "azurevnet/cmd/azure-vnet-ipam",
		"github.com/containernetworking/cni/cnitool",
		ref+"main/bridge", ref+"main/ptp", ref+"main/macvlan", ref+"main/loopback", ref+"ipam/host-local", ref+"meta/portmap", ref+"meta/bandwidth", ref+"meta/tuning")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the CNI plugins: %w\n%s", err, out)
	}
	return cniTemp, nil
})

var cniTemp string

func TestMain(m *testing.M) {
	var err error
	if cniTemp, err = os.MkdirTemp("", "azure-vnet-cni"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(cniTemp)
	os.Exit(code)
}

// node is a VM that runs CNI plugins.
type node struct {
	host
	dir string // of the plugins
	cni *libcni.CNIConfig
}

// onNode makes a VM a node. The log is private to it.
func onNode(h host) node {
	h.t.Helper()
	dir, err := cniDir()
	if err != nil {
		h.t.Fatal(err)
	}
	h.must("mount", "-t", "tmpfs", "log", "/var/log")
	n := node{host: h, dir: dir}
	n.cni = libcni.NewCNIConfigWithCacheDir([]string{dir}, h.t.TempDir(), n.exec())
	return n
}

// exec is what libcni starts plugins by.
func (n node) exec() inVM {
	return inVM{n.host, &invoke.RawExec{Stderr: os.Stderr}, &version.PluginDecoder{}}
}

func (n node) in(t *testing.T) node { return node{n.host.in(t), n.dir, n.cni} }

// inVM executes plugins in a VM.
type inVM struct {
	h host
	*invoke.RawExec
	*version.PluginDecoder
}

func (e inVM) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	out, _, err := e.h.plugin(ctx, path, stdin, environ)
	return out, err
}

// plugin runs a plugin in the VM. The error is the one it answered.
func (h host) plugin(ctx context.Context, path string, stdin []byte, environ []string) (stdout []byte, code int, err error) {
	cmd := h.Command(ctx, path)
	cmd.Env, cmd.Stdin = environ, bytes.NewReader(stdin)
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err = cmd.Run(); err == nil {
		return out.Bytes(), 0, nil
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return nil, -1, err
	}
	var told types.Error
	if json.Unmarshal(out.Bytes(), &told) == nil && told.Msg != "" {
		return out.Bytes(), exit.ExitCode(), &told
	}
	return out.Bytes(), exit.ExitCode(), fmt.Errorf("%w: %q %q", err, out.String(), stderr.String())
}

// list is a network's configuration list.
func (n node) list(cniVersion, name string, plugins ...string) *libcni.NetworkConfigList {
	n.t.Helper()
	l, err := libcni.NetworkConfFromBytes([]byte(fmt.Sprintf(`{"cniVersion":%q,"name":%q,"plugins":[%s]}`, cniVersion, name, strings.Join(plugins, ","))))
	if err != nil {
		n.t.Fatal(err)
	}
	return l
}

// azure is our plugin's entry with more keys.
func azure(more ...string) string {
	return `{"type":"azure-vnet","ipam":{"type":"azure-vnet-ipam"}` + strings.Join(append([]string{""}, more...), ",") + `}`
}

// pod makes a network namespace for a container of that name.
func (n node) pod(id string) *libcni.RuntimeConf {
	n.t.Helper()
	n.must("ip", "netns", "add", id)
	n.must("ip", "-n", id, "link", "set", "lo", "up") // as the loopback plugin does
	return &libcni.RuntimeConf{ContainerID: id, NetNS: "/run/netns/" + id, IfName: "eth0", Args: [][2]string{
		{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "default"}, {"K8S_POD_NAME", id}, {"K8S_POD_INFRA_CONTAINER_ID", id}, {"K8S_POD_UID", "u-" + id},
	}}
}

// add is an ADD that succeeds, and the address it gave.
func (n node) add(l *libcni.NetworkConfigList, rt *libcni.RuntimeConf) (netip.Addr, *current.Result) {
	n.t.Helper()
	addr, r, err := n.tryAdd(l, rt)
	if err != nil {
		n.t.Fatal(err)
	}
	return addr, r
}

func (n node) tryAdd(l *libcni.NetworkConfigList, rt *libcni.RuntimeConf) (netip.Addr, *current.Result, error) {
	ctx, cancel := context.WithTimeout(n.t.Context(), time.Minute)
	defer cancel()
	raw, err := n.cni.AddNetworkList(ctx, l, rt)
	if err != nil {
		return netip.Addr{}, nil, err
	}
	r, err := current.NewResultFromResult(raw)
	if err != nil || len(r.IPs) != 1 {
		return netip.Addr{}, r, fmt.Errorf("result %v: %w", raw, err)
	}
	addr, _ := netip.AddrFromSlice(r.IPs[0].Address.IP)
	return addr.Unmap(), r, nil
}

// del is a DEL that succeeds.
func (n node) del(l *libcni.NetworkConfigList, rt *libcni.RuntimeConf) {
	n.t.Helper()
	if err := n.cni.DelNetworkList(n.t.Context(), l, rt); err != nil {
		n.t.Error(err)
	}
}

// inPod is a place in a container.
func inPod(n node, id string, addr netip.Addr) place {
	return place{id, addr, []string{"nsenter", "--net=/run/netns/" + id, "busybox"}, n.host}
}

// serve has a container answer HTTP on port 80 with the client's address, until
// the VM ends.
func (n node) serve(id string) {
	n.t.Helper()
	www := n.must("mktemp", "-d", "/run/www.XXXXXX")
	n.must("sh", "-c", `mkdir -p $0/cgi-bin && printf '#!/bin/sh\necho; echo $REMOTE_ADDR\n' >$0/cgi-bin/who && chmod +x $0/cgi-bin/who &&
		nsenter --net=/run/netns/$1 busybox httpd -p 0.0.0.0:80 -h $0`, www, id)
}

// stdin is the configuration of a single plugin as libcni hands it over.
func stdin(cniVersion, name, plugin string, more map[string]any) []byte {
	conf := map[string]any{}
	if err := json.Unmarshal([]byte(plugin), &conf); err != nil {
		panic(err)
	}
	conf["cniVersion"], conf["name"] = cniVersion, name
	for k, v := range more {
		conf[k] = v
	}
	b, err := json.Marshal(conf)
	if err != nil {
		panic(err)
	}
	return b
}

// environ is a call's environment.
func (n node) environ(verb, id, netns string, more ...string) []string {
	return append([]string{"PATH=" + os.Getenv("PATH"), "CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + id, "CNI_NETNS=" + netns, "CNI_IFNAME=eth0", "CNI_PATH=" + n.dir}, more...)
}

// call runs azure-vnet as a runtime does. more are variables that replace others.
func (n node) call(verb, id, netns string, conf []byte, more ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(n.t.Context(), time.Minute)
	defer cancel()
	out, _, err := n.plugin(ctx, filepath.Join(n.dir, "azure-vnet"), conf, n.environ(verb, id, netns, more...))
	return out, err
}

// holds is what the node holds for containers.
func (n node) holds() state {
	n.t.Helper()
	var s state
	var file struct {
		Leases map[string]any
	}
	if text, err := n.try("cat", "/run/azure-vnet/leases.json"); err == nil {
		if err := json.Unmarshal([]byte(text), &file); err != nil {
			n.t.Fatal(err)
		}
	}
	s.Leases = slices.Sorted(maps.Keys(file.Leases))
	s.Attachments = veth.FindAllString(n.must("ip", "-o", "link"), -1)
	return s
}

// bare says that no lease and no link is left, nor anything that the kernel held for a
// container.
func (n node) bare() {
	n.t.Helper()
	if s := n.holds(); len(s.Leases)+len(s.Attachments) > 0 {
		n.t.Errorf("%s still holds %+v", n.Name, s)
	}
	n.forgotten()
}
