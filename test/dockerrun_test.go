// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"azurevnet/internal/vnetsim"
)

// ended is how a script ended.
type ended struct {
	Out    string // stdout, with the newline
	Status int
}

// script runs one of the project's, copied to a place where it is alone, and
// returns how it ended and what it said on stderr. env is KEY=value words.
func (h host) script(env []string, name string, arg ...string) (ended, string) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), 90*time.Second)
	defer cancel()
	h.must("mkdir", "-p", "/run/alone", "/run/tmp")
	// By another name first: who runs it already must not find it open for writing.
	h.must("sh", "-euc", "cp $0 /run/alone/new.$$; mv /run/alone/new.$$ /run/alone/$1", filepath.Join(top, name), filepath.Base(name))
	// The engine's own client first: a newer one is not always understood.
	words := append([]string{"PATH=/run/shim:/usr/bin:/usr/sbin:/bin:/sbin", "TMPDIR=/run/tmp"}, env...)
	words = append(words, "/run/alone/"+filepath.Base(name))
	cmd := h.Command(ctx, "env", append(words, arg...)...)
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		h.t.Fatal(err)
	}
	return ended{out.String(), cmd.ProcessState.ExitCode()}, said.String()
}

// fails runs a script that ends with a status, prints nothing on stdout and
// says why on stderr.
func (h host) fails(status int, why string, env []string, name string, arg ...string) {
	h.t.Helper()
	got, said := h.script(env, name, arg...)
	if diff := cmp.Diff(ended{"", status}, got); diff != "" || !strings.Contains(said, why) {
		h.t.Errorf("%s %s: want status %d and %q:\n%s%s", name, strings.Join(arg, " "), status, why, diff, said)
	}
}

// runs runs docker-run.sh with success and returns the address.
func (h host) runs(env []string, arg ...string) netip.Addr {
	h.t.Helper()
	got, said := h.script(env, "docker-run.sh", arg...)
	addr, err := netip.ParseAddr(strings.TrimSuffix(got.Out, "\n"))
	if err != nil || got.Status != 0 {
		h.t.Fatalf("docker-run.sh %s: %+v\n%s", strings.Join(arg, " "), got, said)
	}
	return addr
}

// left is all that a failed docker-run.sh could leave behind.
func (h host) left() string {
	h.t.Helper()
	s := h.state()
	return strings.Join([]string{
		h.docker("ps", "-aq"), h.docker("network", "ls", "-q", "--filter", "driver="+plugin), h.docker("images", "-aq"),
		strings.Join(s.Leases, " "), strings.Join(s.Attachments, " "), h.must("sh", "-c", "mkdir -p /run/tmp && ls /run/tmp"),
	}, "|")
}

// meddled runs docker-run.sh by a shell, and evaluates a line of sh before each
// command that the script calls. There, $n is the number of the call, $command
// its name, "$@" its arguments, and $group the process that runs the script,
// which leads the group that a terminal would send Ctrl-C to.
func (h host) meddled(shell, line string, env []string, arg ...string) (ended, string) {
	h.t.Helper()
	h.must("sh", "-c", `mkdir -p /run/shim
echo 0 >/run/calls
cat >/run/shim/docker <<'END'
#!/bin/sh
command=${0##*/} group=$(/bin/cat /run/group)
if [ -z "$COUNTED" ]; then # else setsid, which calls it, is
	n=$(($(/bin/cat /run/calls) + 1))
	echo $n >/run/calls
	eval "$MEDDLE"
fi
[ $command != setsid ] || export COUNTED=yes
PATH=${PATH#*:}
[ $command != docker ] || exec `+client+` "$@"
exec $command "$@"
END
printf '#!/bin/sh\necho $$ >/run/group\nexec "$@"\n' >/run/shim/leader
chmod +x /run/shim/docker /run/shim/leader
for command in setsid tar sleep; do ln -sf docker /run/shim/$command; done`)
	defer h.must("rm", "-r", "/run/shim")
	// A test that runs in the background may have had SIGINT ignored for it.
	words := append(env, "COUNTED=", "MEDDLE="+line, "/usr/bin/setsid", "env", "--default-signal=INT", "/run/shim/leader")
	return h.script(append(words, strings.Fields(shell)...), "docker-run.sh", arg...)
}

// stopped stops docker-run.sh at each step, or at each of a stride, in some way
// that ends it with a status, and nothing may be left behind. A container that
// comes up nevertheless is the end of the steps, and is removed.
func (h host) stopped(shell, how string, status, first, stride int) {
	h.t.Helper()
	if !soaking {
		stride *= 3
	}
	before := h.left()
	for n := first; ; n += stride {
		got, said := h.meddled(shell, fmt.Sprintf("[ $n != %d ] || %s", n, how), nil, "web", "shop", "busybox", "sleep", "1000")
		if got.Status == 0 {
			if n < 12 {
				h.t.Errorf("%s: it ended well at step %d", shell, n)
			}
			h.delete("web", "shop")
			h.t.Logf("%s, %s: came up at step %d", shell, how, n)
			return
		}
		if diff := cmp.Diff(ended{"", status}, got); diff != "" {
			h.t.Errorf("%s: %s at step %d: %s%s", shell, how, n, diff, said)
		}
		if diff := cmp.Diff(before, h.left()); diff != "" {
			h.t.Fatalf("%s: %s at step %d leaves behind:\n%s%s", shell, how, n, diff, said)
		}
	}
}

const (
	once    = "kill -INT -$group"                                                                                           // Ctrl-C
	forever = "/usr/bin/setsid sh -c \"while kill -INT -$group; do busybox sleep 0.02; done\" >/dev/null 2>&1 </dev/null &" // somebody impatient
	killed  = "kill -TERM $group"
	hungUp  = "kill -HUP -$group"
)

func TestDockerRunWithThePlugin(t *testing.T) {
	t.Parallel() // it mostly waits
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
	h, plain := vms[0], onHost(vms[1])
	h.withPlugin("COOL_DOWN=0s")

	t.Run("stopped at any step, it leaves nothing behind", func(t *testing.T) {
		h := h.in(t)
		for _, stop := range []func(){ // each begins without the network
			func() { h.stopped("sh", forever, 130, 1, 1) },
			func() { h.stopped("bash", once, 130, 2, 5) },
			func() { h.stopped("busybox sh", killed, 143, 4, 5) },
		} {
			stop()
			h.docker("network", "rm", "azure")
		}
	})
	var addr netip.Addr
	t.Run("the address is had, printed alone, and reached", func(t *testing.T) {
		h := h.in(t)
		addr = h.runs([]string{"DOCKER_RUN_ARGS=--init -e COLOUR=red"}, "web", "shop", "busybox", "sh", "-c", server)
		if got := h.address("web"); got != addr {
			t.Errorf("it printed %s, and docker inspect says %s", addr, got)
		}
		if _, err := plain.try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
			t.Errorf("not reached: %v", err)
		}
		labels := h.docker("inspect", "-f", `{{index .Config.Labels "azure-vnet.name"}} {{index .Config.Labels "azure-vnet.namespace"}} {{.Config.Env}}`, "web")
		if !strings.Contains(labels, "web shop") || !strings.Contains(labels, "COLOUR=red") {
			t.Errorf("labels and environment are %s", labels)
		}
	})
	t.Run("others find it by name and namespace", func(t *testing.T) {
		h := h.in(t)
		other := inContainer(h, "other", h.runs(nil, "other", "shop", "busybox", "sleep", "1000"))
		if got, err := other.try(fetch("http://web.shop/cgi-bin/who")...); err != nil || got != other.addr.String() {
			t.Errorf("web.shop sees %q, want %s: %v", got, other.addr, err)
		}
	})
	// Not at the end too: who was talked to and is removed gets frames that nobody takes.
	clean(t, vnet, addr)
	t.Run("what fails says why, by its status too, and leaves nothing behind", func(t *testing.T) {
		h := h.in(t)
		before := h.left()
		run := "docker-run.sh"
		h.fails(5, "docker-run.sh: no free address: NIC", nil, run, "third", "shop", "busybox", "sleep", "1000")
		h.fails(3, "docker-run.sh: the name web is taken: docker-del.sh web shop", nil, run, "web", "other", "busybox", "sleep", "1000")
		h.fails(4, "docker-run.sh: there is no image 127.0.0.1:1/none", nil, run, "new", "shop", "127.0.0.1:1/none")
		h.fails(2, "docker-run.sh: a name, a namespace and an image are needed", nil, run, "new", "shop")
		h.fails(2, "docker-run.sh: ../shop is not a name", nil, run, "new", "../shop", "busybox")
		h.fails(2, "docker-run.sh: new\nshop is not a name", nil, run, "new\nshop", "shop", "busybox")
		h.fails(2, "docker-run.sh: --privileged is not the name of an image", nil, run, "new", "shop", "--privileged", "busybox")
		h.fails(2, "docker-run.sh: '' is not the name of an image", nil, run, "new", "shop", "")
		h.fails(7, "docker-run.sh: no engine answers", []string{"DOCKER_HOST=unix:///run/none"}, run, "new", "shop", "busybox")
		h.fails(7, "no engine", []string{"DOCKER_HOST=unix:///run/none"}, "scripts/docker-del.sh", "new", "shop")
		if diff := cmp.Diff(before, h.left()); diff != "" {
			t.Errorf("something is left behind:\n%s", diff)
		}
		h.delete("other", "shop")
		before = h.left()
		h.fails(6, "that is all\n", nil, run, "job", "shop", "busybox", "echo", "that is all")
		h.fails(6, `docker-run.sh: exec: "no-such-command": executable file not found`, nil, run, "job", "shop", "busybox", "no-such-command")
		h.fails(6, "docker-run.sh: the command ended at once", []string{"DOCKER_RUN_ARGS=--rm"}, run, "job", "shop", "busybox", "true")
		h.fails(1, "docker-run.sh: unknown flag: --no-such-flag\n", []string{"DOCKER_RUN_ARGS=--no-such-flag"}, run, "job", "shop", "busybox", "sleep", "9")
		h.fails(5, "docker-run.sh: publish port 80: SCTP", []string{"DOCKER_RUN_ARGS=-p 80:80/sctp"}, run, "job", "shop", "busybox", "sleep", "9")
		if diff := cmp.Diff(before, h.left()); diff != "" {
			t.Errorf("something is left behind:\n%s", diff)
		}
	})
	t.Run("removed, nothing is left, and once more is success", func(t *testing.T) {
		h := h.in(t)
		h.delete("web", "shop")
		h.delete("web", "shop")
		h.empty()
	})
	t.Run("a plugin that makes no network says why", func(t *testing.T) {
		h := h.in(t)
		set := func(level string) {
			h.docker("plugin", "disable", "-f", plugin)
			h.docker("plugin", "set", plugin, "LOG_LEVEL="+level)
			h.docker("plugin", "enable", plugin)
		}
		h.docker("network", "rm", "azure")
		set("loud")
		h.fails(5, "docker-run.sh: wrong settings of the plugin: LOG_LEVEL=loud", nil, "docker-run.sh", "web", "shop", "busybox")
		set("info")
		h.runs(nil, "web", "shop", "busybox", "sleep", "1000")
		h.delete("web", "shop")
	})
	t.Run("the plugin brings the CNI package, and keeps its network when that goes", func(t *testing.T) {
		h := h.in(t)
		h.ownOpt()
		h.install(nil, "--from-plugin")
		h.must("/opt/cni/bin/azure-vnet", "version")
		if out := h.install(nil, "--uninstall"); !strings.Contains(out, "stays") {
			t.Errorf("the installer says %q", out)
		}
		h.must("ip", "link", "show", "azure0")
	})
}

// delete runs docker-del.sh with success.
func (h host) delete(name, namespace string) {
	h.t.Helper()
	if got, said := h.script(nil, "scripts/docker-del.sh", name, namespace); got != (ended{}) {
		h.t.Errorf("docker-del.sh %s %s: %+v\n%s", name, namespace, got, said)
	}
}

func TestDockerRunByCNI(t *testing.T) {
	t.Parallel() // it mostly waits
	vnet, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
	h, plain := vms[0], onHost(vms[1])
	h.withEngine()
	h.ownOpt()
	h.must("mkdir", "-p", "/etc/cloud/cloud.cfg.d")
	run, install := "docker-run.sh", "scripts/install-cni-plugin.sh"
	h.fails(7, "docker-run.sh: neither", nil, run, "web", "shop", "busybox", "sleep", "1000")
	host := h.must("sh", "-c", "ip -br addr show eth0; ip route; ls -d /etc/cni /etc/cloud/cloud.cfg.d/* /var/lib/azure-vnet 2>&1 || true")

	site := "RELEASES=" + h.serveReleases()
	h.fails(1, "cannot fetch", []string{site}, install, "v0.0.0")
	if out := h.install([]string{site}); !strings.Contains(out, "azure-vnet v1.0.0 is in /opt/cni/bin and /etc/cni/net.d") {
		t.Errorf("the installer says %q", out)
	}
	h.install([]string{site}, "v1.0.0")
	nothing := h.left()
	broken := "tar -cf - -T /dev/null | " + client + ` import --change 'ENTRYPOINT ["/none"]' --change 'LABEL azure-vnet.role=holder' - azure-vnet-holder:latest`
	tidy := func(t *testing.T) {
		t.Helper()
		eventually(t, "nothing is left", 5*time.Second, func() bool { return h.in(t).left() == nothing })
	}

	t.Run("stopped at any step, it leaves nothing behind", func(t *testing.T) {
		h := h.in(t)
		h.stopped("sh", forever, 130, 1, 1)
		h.stopped("bash", once, 130, 1, 6)
		h.stopped("busybox sh", killed, 143, 3, 6)
		h.stopped("sh", hungUp, 129, 5, 6)
	})
	t.Run("a registry that never answers is waited for no longer than the user does", func(t *testing.T) {
		h := h.in(t)
		var silent net.Listener // the kernel accepts for it
		if err := h.Do(func() (err error) { silent, err = net.Listen("tcp", "127.0.0.1:5999"); return err }); err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
		image := fmt.Sprintf("127.0.0.1:5999/never-%d", os.Getpid())
		for shell, how := range map[string]string{"sh": once, "bash": forever, "busybox sh": killed} {
			status := map[string]int{once: 130, forever: 130, killed: 143}[how]
			begin := time.Now()
			got, said := h.meddled(shell, `[ "$1" != pull ] || { (busybox sleep 0.3; `+how+`) & }`, nil, "web", "shop", image)
			if diff := cmp.Diff(ended{"", status}, got); diff != "" || time.Since(begin) > 10*time.Second {
				t.Errorf("%s: after %v: %s%s", shell, time.Since(begin), diff, said)
			}
			eventually(t, "nothing pulls", 5*time.Second, func() bool { return h.must("sh", "-c", "busybox pgrep -f 'docker pull "+image+"' || true") == "" })
		}
		tidy(t)
	})
	t.Run("what DEL does not take back is kept for docker-del.sh", func(t *testing.T) {
		h := h.in(t)
		got, said := h.meddled("sh", `case "$*" in *role=container*) mv /opt/cni/bin/portmap /run/portmap; `+forever+` esac`, nil, "web", "shop", "busybox", "sleep", "1000")
		if got.Status != 130 || !strings.Contains(said, "docker-del.sh web shop") {
			t.Errorf("%+v\n%s", got, said)
		}
		h.fails(1, "still lent", nil, "scripts/docker-del.sh", "web", "shop")
		h.fails(3, "docker-del.sh web shop", nil, run, "web", "other", "busybox", "sleep", "1000")
		h.must("mv", "/run/portmap", "/opt/cni/bin/portmap")
		h.delete("web", "shop")
		tidy(t)
	})
	t.Run("an image of the holder that is broken is no later run's", func(t *testing.T) {
		h := h.in(t)
		got, said := h.meddled("sh", `[ $command != tar ] || exit 1`, nil, "web", "shop", "busybox", "sleep", "1000")
		if got.Status != 1 || !strings.Contains(said, "image of the holder") {
			t.Errorf("%+v\n%s", got, said)
		}
		tidy(t)
		h.must("sh", "-c", broken)
		h.fails(1, `docker-run.sh: exec: "/none"`, nil, run, "web", "shop", "busybox", "sleep", "1000")
		tidy(t)
		// Another's end may remove the image just before the holder starts.
		got, said = h.meddled("sh", `case "$*" in *"--pull never"*) [ -e /run/removed ] || `+client+` image rm azure-vnet-holder >/run/removed ;; esac`, nil, "web", "shop", "busybox", "sleep", "1000")
		if removed := h.must("cat", "/run/removed"); got.Status != 0 || !strings.Contains(removed, "Untagged") {
			t.Errorf("%s: %+v\n%s", removed, got, said)
		}
		h.delete("web", "shop")
		tidy(t)
	})
	t.Run("two that begin at once share the image, and remove it at last", func(t *testing.T) {
		h := h.in(t)
		var both sync.WaitGroup
		for _, name := range []string{"one", "two"} {
			both.Go(func() {
				if got, said := h.script(nil, run, name, "shop", "busybox", "sleep", "1000"); got.Status != 0 {
					t.Errorf("%s: %+v\n%s", name, got, said)
				}
			})
		}
		both.Wait()
		h.delete("one", "shop")
		h.delete("two", "shop")
		tidy(t)
	})
	t.Run("the network is there before the first instruction, and after docker restart", func(t *testing.T) {
		h := h.in(t)
		addr := h.runs([]string{"DOCKER_RUN_ARGS=-e COLOUR=red"}, "web", "shop", "busybox", "sh", "-c",
			"ip -4 -o addr show eth0; ping -c 1 -W 3 "+plain.addr.String()+" && sleep 1000")
		for range 2 {
			eventually(t, "the first instruction had the network", 5*time.Second, func() bool {
				log := h.docker("logs", "web")
				return strings.Contains(log, addr.String()+"/16") && strings.Contains(log, "1 packets received")
			})
			if _, err := plain.try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
				t.Errorf("%s is not reached: %v", addr, err)
			}
			if got := h.docker("exec", "web", "sh", "-c", "hostname; echo $COLOUR"); got != "web\nred" {
				t.Errorf("host name and environment are %q", got)
			}
			h.docker("restart", "-t", "0", "web")
		}
		pod := h.must("cat", "/var/log/azure-vnet.log")
		if !strings.Contains(pod, "shop/web") {
			t.Errorf("the pod's name is not known to CNI:\n%s", pod)
		}
	})
	t.Run("what fails says why, by its status too, and leaves nothing behind", func(t *testing.T) {
		h := h.in(t)
		before := h.left()
		h.fails(3, "docker-run.sh: the name web is taken: docker-del.sh web shop", nil, run, "web", "other", "busybox", "sleep", "1000")
		h.fails(4, "docker-run.sh: there is no image 127.0.0.1:1/none", nil, run, "new", "shop", "127.0.0.1:1/none")
		h.fails(6, "that is all\n", nil, run, "job", "shop", "busybox", "echo", "that is all")
		h.fails(6, `docker-run.sh: exec: "no-such-command": executable file not found`, nil, run, "job", "shop", "busybox", "no-such-command")
		h.fails(6, "docker-run.sh: the command ended at once", []string{"DOCKER_RUN_ARGS=--rm"}, run, "job", "shop", "busybox", "true")
		h.runs(nil, "other", "shop", "busybox", "sleep", "1000")
		h.fails(5, "docker-run.sh: no free address: NIC", nil, run, "third", "shop", "busybox", "sleep", "1000")
		h.delete("other", "shop")
		if diff := cmp.Diff(before, h.left()); diff != "" {
			t.Errorf("something is left behind:\n%s", diff)
		}
	})
	t.Run("a directory that an upgrade took away is passed over", func(t *testing.T) {
		h := h.in(t)
		sum := strings.Repeat("0", 64)
		h.must("sed", "-i", "1i "+sum+"  /gone/azure-vnet\\n"+sum+"  /gone/10-azure.conflist", "/var/lib/azure-vnet/cni.installed")
		h.runs(nil, "other", "shop", "busybox", "sleep", "1000")
		h.docker("rm", "-f", "other")
		h.fails(3, "docker-del.sh other shop", nil, run, "other", "shop", "busybox", "sleep", "1000")
		h.delete("other", "shop")
	})
	t.Run("the timer's command mends", func(t *testing.T) {
		h := h.in(t)
		addr := h.must(client, "exec", "web", "sh", "-c", "ip -4 -o addr show eth0 | sed 's/.*inet //; s|/.*||'")
		h.must("nft", "delete", "table", "bridge", "azure_vnet")
		h.must("sh", "-c", `eval "$(sed -n 's/^ExecStart=//p' /etc/systemd/system/azure-vnet-reconcile.service)"`)
		if _, err := plain.try("ping", "-c", "1", "-W", "3", addr); err != nil {
			t.Errorf("%s is not reached: %v", addr, err)
		}
	})
	t.Run("the CNI package is not removed from under a container", func(t *testing.T) {
		h := h.in(t)
		h.fails(1, "nothing was removed", nil, install, "--uninstall")
		h.must("test", "-f", "/etc/cni/net.d/10-azure.conflist")
		h.must("test", "-x", "/opt/cni/bin/azure-vnet")
	})
	t.Run("removed, though its holder died, nothing is left, and once more is success", func(t *testing.T) {
		h := h.in(t)
		h.docker("kill", "web.holder")
		h.delete("web", "shop")
		h.delete("web", "shop")
		tidy(t)
		h.empty()
	})
	t.Run("uninstalled, the host is as it was", func(t *testing.T) {
		h := h.in(t)
		h.must("sh", "-c", broken)
		h.install(nil, "--uninstall")
		if image := h.docker("images", "-q", "azure-vnet-holder"); image != "" {
			t.Errorf("uninstall left the image %s", image)
		}
		after := h.must("sh", "-c", "ip -br addr show eth0; ip route; ls -d /etc/cni /etc/cloud/cloud.cfg.d/* /var/lib/azure-vnet 2>&1 || true")
		if diff := cmp.Diff(host, after); diff != "" {
			t.Error(diff)
		}
		if out := h.must("sh", "-c", "find /opt /run /var/log /etc/systemd | grep -v -e ^/run/site -e ^/run/alone | grep -e azure-vnet -e cni || true"); out != "" {
			t.Errorf("uninstall left\n%s", out)
		}
	})
	t.Run("README and docs/kubernetes.md work as they are written", func(t *testing.T) {
		h := h.in(t)
		// A web server by the name that they use; there is no registry here.
		h.docker("run", "--name", "made", "busybox", "true")
		h.docker("commit", "--change", `CMD ["httpd","-f","-p","80"]`, "made", "nginx")
		h.docker("rm", "made")
		done := map[string]bool{}
		for _, doc := range []string{"README.md", "docs/kubernetes.md"} {
			found := blocks(t, doc)
			for _, lines := range append(found["run: node"], found["run: node, last"]...) {
				if done[lines] {
					continue
				}
				done[lines] = true
				cmd := h.Command(t.Context(), "sh", "-euc", "cd "+top+"\n"+lines)
				cmd.Env = asUser(t, os.Environ())
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Fatalf("%s\n%v\n%s", lines, err, out)
				}
			}
			for how := range found {
				if doc != "README.md" && !strings.HasPrefix(how, "run: node") && !strings.HasPrefix(how, "read: ") {
					t.Errorf("%s: no test proves blocks marked %q", doc, how)
				}
			}
		}
		h.must("sh", "-c", "! test -e /run/azure-vnet")
	})
	clean(t, vnet)
}
