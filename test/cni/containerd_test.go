// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// podImage is what pods run: a static busybox.
const podImage = "docker.io/library/pod:latest"

// imageArchive is that image as docker save writes it.
func imageArchive(t *testing.T) []byte {
	t.Helper()
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	pack := func(files map[string][]byte, mode int64) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for name, content := range files {
			if err := w.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: int64(len(content)), Typeflag: tar.TypeReg}); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(content); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	marshal := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	layer := pack(map[string][]byte{"bin/busybox": program, "bin/sh": program}, 0o755)
	sum := sha256.Sum256(layer)
	return pack(map[string][]byte{
		"layer.tar": layer,
		"config.json": marshal(map[string]any{"architecture": "amd64", "os": "linux",
			"config": map[string]any{"Entrypoint": []string{"/bin/busybox", "sleep", "100000"}, "Env": []string{"PATH=/bin"}},
			"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + hex.EncodeToString(sum[:])}}}),
		"manifest.json": marshal([]any{map[string]any{"Config": "config.json", "RepoTags": []string{podImage}, "Layers": []string{"layer.tar"}}}),
	}, 0o644)
}

// kubelet is a client of a node's containerd.
type kubelet struct {
	test.Node
	cri cri.RuntimeServiceClient
}

// withContainerd starts containerd with its CRI plugin, in its usual places.
func withContainerd(n test.Node, conflist string) kubelet {
	n.T.Helper()
	config := fmt.Sprintf(`version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = %q
`, podImage, n.Dir)
	root := fmt.Sprintf("/proc/%d/root", n.PidOne())
	write := func(path string, content []byte) {
		n.T.Helper()
		if err := os.WriteFile(filepath.Join(root, path), content, 0o644); err != nil {
			n.T.Fatal(err)
		}
	}
	n.Must("mkdir", "-p", "/etc/containerd", "/etc/cni/net.d")
	write("/run/containerd.toml", []byte(config))
	write("/run/pod.tar", imageArchive(n.T))
	writeConflist(n, conflist)
	daemon := n.Command(context.Background(), "sh", "-c", `for f in /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/*/cgroup.procs; do echo 0 >$f; done 2>/dev/null
		exec containerd --config /run/containerd.toml >/run/containerd.log 2>&1`)
	if err := daemon.Start(); err != nil {
		n.T.Fatal(err)
	}
	n.T.Cleanup(func() {
		if n.T.Failed() {
			log, _ := n.Try("tail", "-n", "40", "/run/containerd.log")
			n.T.Logf("%s: containerd says:\n%s", n.Name, log)
		}
		_ = daemon.Process.Kill()
		_ = daemon.Wait()
	})
	conn, err := grpc.NewClient("passthrough:containerd", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", root+"/run/containerd/containerd.sock")
		}))
	if err != nil {
		n.T.Fatal(err)
	}
	n.T.Cleanup(func() { conn.Close() })
	k := kubelet{n, cri.NewRuntimeServiceClient(conn)}
	test.Eventually(n.T, "containerd is ready", 30*time.Second, k.ready)
	n.Must("ctr", "-n", "k8s.io", "images", "import", "--snapshotter", "native", "/run/pod.tar")
	return k
}

// ready is what kubelet asks to call its node so.
func (k kubelet) ready() bool {
	ctx, cancel := context.WithTimeout(k.T.Context(), 5*time.Second)
	defer cancel()
	r, err := k.cri.Status(ctx, &cri.StatusRequest{})
	if err != nil {
		return false
	}
	for _, c := range r.Status.Conditions {
		if !c.Status {
			return false
		}
	}
	return true
}

// writeConflist puts a configuration where runtimes look for it.
func writeConflist(n test.Node, text string) {
	n.T.Helper()
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/root/etc/cni/net.d/10-azure.conflist", n.PidOne()), []byte(text), 0o644); err != nil {
		n.T.Fatal(err)
	}
}

// sandbox is the configuration of a pod.
func sandbox(name string, hostPort int32) *cri.PodSandboxConfig {
	config := &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: name, Namespace: "default", Uid: name + "-uid"}, Hostname: name,
		DnsConfig: &cri.DNSConfig{Servers: []string{"10.0.0.10"}}, Linux: &cri.LinuxPodSandboxConfig{}, LogDirectory: "/run/pods",
	}
	if hostPort != 0 {
		config.PortMappings = []*cri.PortMapping{{Protocol: cri.Protocol_TCP, ContainerPort: 80, HostPort: hostPort}}
	}
	return config
}

// run starts a pod with a web server, as kubelet does, and returns its address.
func (k kubelet) run(name string, hostPort int32) (id string, addr netip.Addr) {
	k.T.Helper()
	ctx, cancel := context.WithTimeout(k.T.Context(), time.Minute)
	defer cancel()
	config := sandbox(name, hostPort)
	sandbox, err := k.cri.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config})
	if err != nil {
		k.T.Fatal(err)
	}
	container, err := k.cri.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: sandbox.PodSandboxId, SandboxConfig: config,
		Config: &cri.ContainerConfig{Metadata: &cri.ContainerMetadata{Name: "web"}, Image: &cri.ImageSpec{Image: podImage}, LogPath: "web.log", Linux: &cri.LinuxContainerConfig{},
			Command: []string{"/bin/sh", "-c", "busybox mkdir -p /www/cgi-bin; busybox printf '#!/bin/sh\\necho; echo $REMOTE_ADDR\\n' >/www/cgi-bin/who; busybox chmod +x /www/cgi-bin/who; exec busybox httpd -f -p 0.0.0.0:80 -h /www"}}})
	if err != nil {
		k.T.Fatal(err)
	}
	if _, err := k.cri.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: container.ContainerId}); err != nil {
		k.T.Fatal(err)
	}
	status, err := k.cri.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: sandbox.PodSandboxId})
	if err != nil {
		k.T.Fatal(err)
	}
	if addr, err = netip.ParseAddr(status.Status.Network.Ip); err != nil {
		k.T.Fatal(err)
	}
	return sandbox.PodSandboxId, addr
}

func (k kubelet) remove(id string) {
	k.T.Helper()
	if _, err := k.cri.StopPodSandbox(k.T.Context(), &cri.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		k.T.Error(err)
	}
	if _, err := k.cri.RemovePodSandbox(k.T.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		k.T.Error(err)
	}
}

// inner is a place in a pod that containerd runs.
func (k kubelet) inner(name, id string, addr netip.Addr) test.Place {
	k.T.Helper()
	r, err := k.cri.PodSandboxStatus(k.T.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: id, Verbose: true})
	if err != nil {
		k.T.Fatal(err)
	}
	var info struct{ Pid int }
	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil {
		k.T.Fatal(err)
	}
	return test.Place{Name: name, Addr: addr, Prefix: []string{"nsenter", fmt.Sprintf("--net=/proc/%d/ns/net", info.Pid), "busybox"}, Host: k.Host}
}

// traces are what pods have on the node beyond our own: namespaces, libcni's
// results, and the chains of portmap.
func (k kubelet) traces() string {
	k.T.Helper()
	return k.Must("sh", "-c", "ls /run/netns; find /var/lib/cni -type f -size +0; iptables-save | grep -E 'CNI-DN-|CNI-[0-9a-f]{24}' || true")
}

func TestContainerdRunsPods(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("containerd"); err != nil && os.Geteuid() == 0 {
		t.Fatalf("%v: scripts/needs.sh installs it", err)
	}
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 6}, vnetsim.VMConfig{Secondaries: 1}, vnetsim.VMConfig{})
	one, two := withContainerd(test.OnNode(vms[0]), documented), withContainerd(test.OnNode(vms[1]), documented)
	plain := test.OnHost(vms[2])
	var used []netip.Addr
	for _, with := range []struct{ name, conflist string }{{"the documented configuration", documented}, {"the shipped one", string(shipped(t).Bytes)}} {
		t.Run(with.name, func(t *testing.T) {
			one, two := kubelet{one.Node.In(t), one.cri}, kubelet{two.Node.In(t), two.cri}
			writeConflist(one.Node, with.conflist)
			writeConflist(two.Node, with.conflist)
			test.Eventually(t, "the nodes are ready", 20*time.Second, func() bool { return one.ready() && two.ready() })
			idA, a := one.run("a", 8080)
			idB, b := two.run("b", 0)
			used = append(used, a, b)
			podA, podB := one.inner("a", idA, a), two.inner("b", idB, b)
			for _, from := range []test.Place{podA, podB, test.OnHost(vms[0]), test.OnHost(vms[1]), plain} {
				for _, to := range []test.Place{podA, podB} {
					got, err := from.Try(test.Fetch(fmt.Sprintf("http://%s/cgi-bin/who", to.Addr))...)
					if err != nil || got != from.Addr.String() {
						t.Errorf("%s fetches from %s and is seen as %q, want %s: %v", from.Name, to.Name, got, from.Addr, err)
					}
				}
			}
			for _, from := range []test.Place{podB, plain, test.OnHost(vms[0])} {
				if _, err := from.Try(test.Fetch(fmt.Sprintf("http://%s:8080/cgi-bin/who", one.Primary))...); err != nil {
					t.Errorf("%s does not reach the host port: %v", from.Name, err)
				}
			}
			for _, from := range []test.Place{podA, podB} {
				for _, to := range vms {
					if _, err := from.Try("ping", "-c", "1", "-W", "3", to.Primary.String()); err != nil {
						t.Errorf("%s does not ping %s: %v", from.Name, to.Name, err)
					}
				}
			}
			// kubelet has this text in the pod's events.
			_, err := two.cri.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: sandbox("more", 0)})
			for _, says := range []string{"azure-vnet", "no free address", two.MAC, "1 held", "az network nic ip-config create"} {
				if err == nil || !strings.Contains(err.Error(), says) {
					t.Errorf("of one pod too many CRI does not say %q: %v", says, err)
				}
			}
			if s := two.Holds(); len(s.Leases) != 1 || len(s.Attachments) != 1 {
				t.Errorf("one pod too many leaves %+v", s)
			}
			if has := one.traces(); strings.Count(has, "\n") < 3 || !strings.Contains(has, "/var/lib/cni/") || !strings.Contains(has, "CNI-DN-") {
				t.Errorf("of a running pod there is only\n%s", has)
			}
			one.remove(idA)
			two.remove(idB)
			for _, k := range []kubelet{one, two} {
				k.Bare()
				if left := k.traces(); left != "" {
					t.Errorf("%s still has\n%s", k.Name, left)
				}
			}
			if _, err := plain.Try(test.Fetch(fmt.Sprintf("http://%s:8080/", one.Primary))...); err == nil {
				t.Error("the host port outlives its pod")
			}
		})
	}
	test.NothingDropped(t, vnet, used...)
}
