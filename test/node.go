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
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

// Node is a VM that runs CNI plugins.
type Node struct {
	Host
	Dir string // of the plugins
	CNI *libcni.CNIConfig
}

// OnNode makes a VM a node. The log is private to it.
func OnNode(h Host) Node {
	h.T.Helper()
	dir, err := buildCNI()
	if err != nil {
		h.T.Fatal(err)
	}
	h.Must("mount", "-t", "tmpfs", "log", "/var/log")
	n := Node{Host: h, Dir: dir}
	n.CNI = libcni.NewCNIConfigWithCacheDir([]string{dir}, h.T.TempDir(), n.Exec())
	return n
}

// Exec is what libcni starts plugins by.
func (n Node) Exec() InVM {
	return InVM{n.Host, &invoke.RawExec{Stderr: os.Stderr}, &version.PluginDecoder{}}
}

// In is the node, failing a subtest instead.
func (n Node) In(t *testing.T) Node { return Node{n.Host.In(t), n.Dir, n.CNI} }

// InVM executes plugins in a VM.
type InVM struct {
	h Host
	*invoke.RawExec
	*version.PluginDecoder
}

// ExecPlugin is what libcni calls.
func (e InVM) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	out, _, err := e.h.Plugin(ctx, path, stdin, environ)
	return out, err
}

// Plugin runs a plugin in the VM. The error is the one it answered.
func (h Host) Plugin(ctx context.Context, path string, stdin []byte, environ []string) (stdout []byte, code int, err error) {
	out, said, err := h.Exec(ctx, environ, stdin, path)
	if err == nil {
		return []byte(out), 0, nil
	}
	var exit *vnetsim.ExitError
	if !errors.As(err, &exit) {
		return nil, -1, err
	}
	var told types.Error
	if json.Unmarshal([]byte(out), &told) == nil && told.Msg != "" {
		return []byte(out), exit.Status, &told
	}
	return []byte(out), exit.Status, fmt.Errorf("%w: %q %q", err, out, said)
}

// List is a network's configuration list.
func (n Node) List(cniVersion, name string, plugins ...string) *libcni.NetworkConfigList {
	n.T.Helper()
	l, err := libcni.NetworkConfFromBytes([]byte(fmt.Sprintf(`{"cniVersion":%q,"name":%q,"plugins":[%s]}`, cniVersion, name, strings.Join(plugins, ","))))
	if err != nil {
		n.T.Fatal(err)
	}
	return l
}

// Azure is our plugin's entry with more keys.
func Azure(more ...string) string {
	return `{"type":"azure-vnet","ipam":{"type":"azure-vnet-ipam"}` + strings.Join(append([]string{""}, more...), ",") + `}`
}

// Netns makes network namespaces whose lo is up, as the loopback plugin has it.
func (n Node) Netns(names ...string) {
	n.T.Helper()
	for _, name := range names {
		if err := n.AddNetns(name); err != nil {
			n.T.Fatal(err)
		}
	}
}

// Pod makes a network namespace for a container of that name.
func (n Node) Pod(id string) *libcni.RuntimeConf {
	n.T.Helper()
	n.Netns(id)
	return &libcni.RuntimeConf{ContainerID: id, NetNS: "/run/netns/" + id, IfName: "eth0", Args: [][2]string{
		{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "default"}, {"K8S_POD_NAME", id}, {"K8S_POD_INFRA_CONTAINER_ID", id}, {"K8S_POD_UID", "u-" + id},
	}}
}

// Add is an ADD that succeeds, and the address it gave.
func (n Node) Add(l *libcni.NetworkConfigList, rt *libcni.RuntimeConf) (netip.Addr, *current.Result) {
	n.T.Helper()
	addr, r, err := n.TryAdd(l, rt)
	if err != nil {
		n.T.Fatal(err)
	}
	return addr, r
}

// TryAdd is an ADD that may fail.
func (n Node) TryAdd(l *libcni.NetworkConfigList, rt *libcni.RuntimeConf) (netip.Addr, *current.Result, error) {
	ctx, cancel := context.WithTimeout(n.T.Context(), time.Minute)
	defer cancel()
	raw, err := n.CNI.AddNetworkList(ctx, l, rt)
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

// Del is a DEL that succeeds.
func (n Node) Del(l *libcni.NetworkConfigList, rt *libcni.RuntimeConf) {
	n.T.Helper()
	if err := n.CNI.DelNetworkList(n.T.Context(), l, rt); err != nil {
		n.T.Error(err)
	}
}

// InPod is a place in a container.
func InPod(n Node, id string, addr netip.Addr) Place {
	return Place{Name: id, Addr: addr, Prefix: []string{"nsenter", "--net=/run/netns/" + id, "busybox"}, Host: n.Host}
}

// Serve has a container answer HTTP on port 80 with the client's address, until
// the VM ends.
func (n Node) Serve(id string) {
	n.T.Helper()
	www := n.Must("mktemp", "-d", "/run/www.XXXXXX")
	n.Must("sh", "-c", `mkdir -p $0/cgi-bin && printf '#!/bin/sh\necho; echo $REMOTE_ADDR\n' >$0/cgi-bin/who && chmod +x $0/cgi-bin/who &&
		nsenter --net=/run/netns/$1 busybox httpd -p 0.0.0.0:80 -h $0`, www, id)
}

// Stdin is the configuration of a single plugin as libcni hands it over.
func Stdin(cniVersion, name, plugin string, more map[string]any) []byte {
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

// Environ is a call's environment.
func (n Node) Environ(verb, id, netns string, more ...string) []string {
	return append([]string{"PATH=" + os.Getenv("PATH"), "CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + id, "CNI_NETNS=" + netns, "CNI_IFNAME=eth0", "CNI_PATH=" + n.Dir}, more...)
}

// Call runs azure-vnet as a runtime does. more are variables that replace others.
func (n Node) Call(verb, id, netns string, conf []byte, more ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(n.T.Context(), time.Minute)
	defer cancel()
	out, _, err := n.Plugin(ctx, filepath.Join(n.Dir, "azure-vnet"), conf, n.Environ(verb, id, netns, more...))
	return out, err
}

// Holds is what the node holds for containers.
func (n Node) Holds() state {
	n.T.Helper()
	var s state
	var file struct {
		Leases map[string]any
	}
	if text, err := n.Try("cat", "/run/azure-vnet/leases.json"); err == nil {
		if err := json.Unmarshal([]byte(text), &file); err != nil {
			n.T.Fatal(err)
		}
	}
	s.Leases = slices.Sorted(maps.Keys(file.Leases))
	s.Attachments = Veth.FindAllString(n.Must("ip", "-o", "link"), -1)
	return s
}

// Bare says that no lease and no link is left, nor anything that the kernel held for a
// container.
func (n Node) Bare() {
	n.T.Helper()
	if s := n.Holds(); len(s.Leases)+len(s.Attachments) > 0 {
		n.T.Errorf("%s still holds %+v", n.Name, s)
	}
	n.Forgotten()
}
