// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
)

// withNginx makes an image by that name, since there is no registry here.
func (h host) withNginx() {
	h.t.Helper()
	h.docker("run", "--name", "made", "busybox", "sh", "-c", "mkdir -p /www && echo hello >/www/index.html")
	h.docker("commit", "--change", `CMD ["httpd","-f","-p","80","-h","/www"]`, "made", "nginx")
	h.docker("rm", "made")
}

// shell runs a script in the VM, in a directory, with more in its environment.
func (h host) shell(dir, script string, env ...string) string {
	h.t.Helper()
	cmd := h.Command(h.t.Context(), "sh", "-euc", "cd "+dir+"\n"+script)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		h.t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestComposeExample(t *testing.T) {
	t.Parallel()
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 3}, vnetsim.VMConfig{})
	h, plain := vms[0], onHost(vms[1])
	h.withPlugin()
	h.withNginx()
	web := h.Secondaries()[2]
	compose := func(arg string) string {
		t.Helper()
		return h.shell(filepath.Join(top, "examples"), "docker-compose --ansi never "+arg, "SUBNET="+h.Prefix.String(), "WEB="+web.String(), "RANGE="+netip.PrefixFrom(h.Secondaries()[0], 31).Masked().String())
	}
	compose("up -d")
	for _, again := range []string{"up -d", "restart -t 0", "up -d --force-recreate -t 0"} {
		for _, at := range []string{web.String(), h.Primary.String() + ":8080"} {
			eventually(t, "the example's web server answers at "+at, 10*time.Second, func() bool {
				got, err := plain.try(fetch("http://" + at + "/")...)
				return err == nil && got == "hello"
			})
		}
		eventually(t, "the worker finds web by name", 10*time.Second, func() bool {
			worker := strings.Fields(compose("ps -q worker"))[0]
			_, err := inContainer(h, worker, netip.Addr{}).try(fetch("http://web/")...)
			return err == nil
		})
		h.holds(2)
		compose(again)
	}
	compose("down -t 0")
	h.empty()
	if out := h.docker("network", "ls", "-q", "--filter", "driver="+plugin); out != "" {
		t.Errorf("down leaves network %s", out)
	}
	clean(t, vnet, web)
}

// TestSwarmServiceOverTwoVMs: a service's tasks have addresses of the VM that
// they run on. The network of swarm's is made of one of each node.
func TestSwarmServiceOverTwoVMs(t *testing.T) {
	t.Parallel()
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{Secondaries: 4}, vnetsim.VMConfig{})
	manager, worker, plain := vms[0], vms[1], onHost(vms[2])
	for _, h := range []host{manager, worker} {
		h.withPlugin()
		h.withNginx()
		h.docker("network", "create", "--config-only", "--subnet", h.Prefix.String(), "--ipam-driver", plugin, "azure-config")
	}
	manager.docker("swarm", "init", "--advertise-addr", manager.Primary.String())
	worker.docker("swarm", "join", "--token", manager.docker("swarm", "join-token", "-q", "worker"), manager.Primary.String()+":2377")
	manager.docker("network", "create", "--scope", "swarm", "-d", plugin, "--config-from", "azure-config", "azure")
	manager.docker("service", "create", "--detach", "--name", "web", "--network", "azure", "--endpoint-mode", "dnsrr",
		"--replicas", "4", "--placement-pref", "spread=node.id", "--no-resolve-image", "--init", "nginx")
	var tasks []netip.Addr
	for _, h := range []host{manager, worker} {
		var ids []string
		eventually(t, "two tasks run on "+h.Name, 60*time.Second, func() bool {
			ids = strings.Fields(h.docker("ps", "-q"))
			return len(ids) == 2
		})
		for _, id := range ids {
			addr := h.address(id)
			tasks = append(tasks, addr)
			if got, err := plain.try(fetch("http://" + addr.String() + "/")...); err != nil || got != "hello" {
				t.Errorf("a task on %s at %s answers %q: %v", h.Name, addr, got, err)
			}
		}
	}
	for _, h := range []host{manager, worker} {
		for _, id := range strings.Fields(h.docker("ps", "-q")) {
			eventually(t, "a task on "+h.Name+" finds all by the service's name", 20*time.Second, func() bool {
				out, err := h.try(client, "exec", id, "nslookup", "web")
				return err == nil && !slices.ContainsFunc(tasks, func(a netip.Addr) bool { return !slices.Contains(strings.Fields(out), a.String()) })
			})
		}
	}
	manager.docker("service", "rm", "web")
	for _, h := range []host{manager, worker} {
		h.holds(0)
	}
	clean(t, vnet, tasks...)
}
