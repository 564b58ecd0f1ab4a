// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// withNginx makes an image by that name, since there is no registry here.
func withNginx(h test.Host) {
	h.T.Helper()
	h.Docker("run", "--name", "made", "busybox", "sh", "-c", "mkdir -p /www && echo hello >/www/index.html")
	h.Docker("commit", "--change", `CMD ["httpd","-f","-p","80","-h","/www"]`, "made", "nginx")
	h.Docker("rm", "made")
}

// shell runs a script in the VM, in a directory, with more in its environment.
func shell(h test.Host, dir, script string, env ...string) string {
	h.T.Helper()
	cmd := h.Command(h.T.Context(), "sh", "-euc", "cd "+dir+"\n"+script)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		h.T.Fatalf("%s: %v\n%s", script, err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestComposeExample(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 3}, vnetsim.VMConfig{})
	h, plain := vms[0], test.OnHost(vms[1])
	h.WithPlugin()
	withNginx(h)
	web := h.Secondaries()[2]
	compose := func(arg string) string {
		t.Helper()
		return shell(h, filepath.Join(test.Top, "examples"), "docker-compose --ansi never "+arg, "SUBNET="+h.Prefix.String(), "WEB="+web.String(), "RANGE="+netip.PrefixFrom(h.Secondaries()[0], 31).Masked().String())
	}
	compose("up -d")
	changes := []string{"up -d", "restart -t 0", "up -d --force-recreate -t 0"}
	if !test.Soaking {
		changes = changes[2:]
	}
	for _, again := range changes {
		for _, at := range []string{web.String(), h.Primary.String() + ":8080"} {
			test.Eventually(t, "the example's web server answers at "+at, 10*time.Second, func() bool {
				got, err := plain.Try(test.Fetch("http://" + at + "/")...)
				return err == nil && got == "hello"
			})
		}
		test.Eventually(t, "the worker finds web by name", 10*time.Second, func() bool {
			worker := strings.Fields(compose("ps -q worker"))[0]
			_, err := test.InContainer(h, worker, netip.Addr{}).Try(test.Fetch("http://web/")...)
			return err == nil
		})
		holds(h, 2)
		compose(again)
	}
	compose("down -t 0")
	h.Empty()
	if out := h.Docker("network", "ls", "-q", "--filter", "driver="+test.Plugin); out != "" {
		t.Errorf("down leaves network %s", out)
	}
	test.NothingDropped(t, vnet, web)
}

// TestSwarmServiceOverTwoVMs: a service's tasks have addresses of the VM that
// they run on. The network of swarm's is made of one of each node.
func TestSwarmServiceOverTwoVMs(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	manager, worker, plain := vms[0], vms[1], test.OnHost(vms[2])
	for _, h := range []test.Host{manager, worker} {
		h.WithPlugin()
		withNginx(h)
		h.Docker("network", "create", "--config-only", "--subnet", h.Prefix.String(), "--ipam-driver", test.Plugin, "azure-config")
	}
	manager.Docker("swarm", "init", "--advertise-addr", manager.Primary.String())
	worker.Docker("swarm", "join", "--token", manager.Docker("swarm", "join-token", "-q", "worker"), manager.Primary.String()+":2377")
	manager.Docker("network", "create", "--scope", "swarm", "-d", test.Plugin, "--config-from", "azure-config", "azure")
	manager.Docker("service", "create", "--detach", "--name", "web", "--network", "azure", "--endpoint-mode", "dnsrr",
		"--replicas", "4", "--placement-pref", "spread=node.id", "--no-resolve-image", "--init", "nginx")
	var tasks []netip.Addr
	for _, h := range []test.Host{manager, worker} {
		var ids []string
		test.Eventually(t, "two tasks run on "+h.Name, 60*time.Second, func() bool {
			ids = strings.Fields(h.Docker("ps", "-q"))
			return len(ids) == 2
		})
		for _, id := range ids {
			addr := h.Address(id)
			tasks = append(tasks, addr)
			if got, err := plain.Try(test.Fetch("http://" + addr.String() + "/")...); err != nil || got != "hello" {
				t.Errorf("a task on %s at %s answers %q: %v", h.Name, addr, got, err)
			}
		}
	}
	for _, h := range []test.Host{manager, worker} {
		for _, id := range strings.Fields(h.Docker("ps", "-q")) {
			test.Eventually(t, "a task on "+h.Name+" finds all by the service's name", 20*time.Second, func() bool {
				out, err := h.Try(test.Client, "exec", id, "nslookup", "web")
				return err == nil && !slices.ContainsFunc(tasks, func(a netip.Addr) bool { return !slices.Contains(strings.Fields(out), a.String()) })
			})
		}
	}
	manager.Docker("service", "rm", "web")
	for _, h := range []test.Host{manager, worker} {
		holds(h, 0)
	}
	test.NothingDropped(t, vnet, tasks...)
}
