// Copyright (c) The azure-vnet authors. MIT licence.

package host

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
	"azurevnet/test"
)

// ended is how a script ended.
type ended struct {
	Out    string // stdout, with the newline
	Status int
}

// runScript runs one of the project's, copied to a place where it is alone, and
// returns how it ended and what it said on stderr. env is KEY=value words.
func runScript(h test.Host, env []string, name string, arg ...string) (ended, string) {
	h.T.Helper()
	ctx, cancel := context.WithTimeout(h.T.Context(), 90*time.Second)
	defer cancel()
	h.Must("mkdir", "-p", "/run/alone", "/run/tmp")
	// By another name first: who runs it already must not find it open for writing.
	h.Must("sh", "-euc", "cp $0 /run/alone/new.$$; mv /run/alone/new.$$ /run/alone/$1", filepath.Join(test.Top, name), filepath.Base(name))
	// The engine's own client first: a newer one is not always understood.
	words := append([]string{"PATH=/run/shim:/usr/bin:/usr/sbin:/bin:/sbin", "TMPDIR=/run/tmp"}, env...)
	words = append(words, "/run/alone/"+filepath.Base(name))
	cmd := h.Command(ctx, "env", append(words, arg...)...)
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		h.T.Fatal(err)
	}
	return ended{out.String(), cmd.ProcessState.ExitCode()}, said.String()
}

// fails runs a script that ends with a status, prints nothing on stdout and
// says why on stderr.
func fails(h test.Host, status int, why string, env []string, name string, arg ...string) {
	h.T.Helper()
	got, said := runScript(h, env, name, arg...)
	if diff := cmp.Diff(ended{"", status}, got); diff != "" || !strings.Contains(said, why) {
		h.T.Errorf("%s %s: want status %d and %q:\n%s%s", name, strings.Join(arg, " "), status, why, diff, said)
	}
}

// runs runs docker-run.sh with success and returns the address.
func runs(h test.Host, env []string, arg ...string) netip.Addr {
	h.T.Helper()
	got, said := runScript(h, env, "docker-run.sh", arg...)
	addr, err := netip.ParseAddr(strings.TrimSuffix(got.Out, "\n"))
	if err != nil || got.Status != 0 {
		h.T.Fatalf("docker-run.sh %s: %+v\n%s", strings.Join(arg, " "), got, said)
	}
	return addr
}

// left is all that a failed docker-run.sh could leave behind.
func left(h test.Host) string {
	h.T.Helper()
	s := h.State()
	return strings.Join([]string{
		h.Docker("ps", "-aq"), h.Docker("network", "ls", "-q", "--filter", "driver="+test.Plugin), h.Docker("images", "-aq"),
		strings.Join(s.Leases, " "), strings.Join(s.Attachments, " "), h.Must("sh", "-c", "mkdir -p /run/tmp && ls /run/tmp"),
	}, "|")
}

// meddled runs docker-run.sh by a shell, and evaluates a line of sh before each command that the script calls. The
// line has these variables: $n is the number of the call, $command is its name, "$@" are its arguments. $group is the
// process group of the script. A terminal would send Ctrl-C to this group.
func meddled(h test.Host, shell, line string, env []string, arg ...string) (ended, string) {
	h.T.Helper()
	h.Must("sh", "-c", `mkdir -p /run/shim
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
[ $command != docker ] || exec `+test.Client+` "$@"
exec $command "$@"
END
printf '#!/bin/sh\necho $$ >/run/group\nexec "$@"\n' >/run/shim/leader
chmod +x /run/shim/docker /run/shim/leader
for command in setsid tar sleep; do ln -sf docker /run/shim/$command; done`)
	defer h.Must("rm", "-r", "/run/shim")
	// A test that runs in the background may have had SIGINT ignored for it.
	words := append(env, "COUNTED=", "MEDDLE="+line, "/usr/bin/setsid", "env", "--default-signal=INT", "/run/shim/leader")
	return runScript(h, append(words, strings.Fields(shell)...), "docker-run.sh", arg...)
}

// stopped stops docker-run.sh at each step, or at each of a stride, in some way
// that ends it with a status, and nothing may be left behind. A container that
// comes up nevertheless is the end of the steps, and is removed.
func stopped(h test.Host, shell, how string, status, first, stride int) {
	h.T.Helper()
	if !test.Soaking {
		first, stride = first+5, stride+11
	}
	before := left(h)
	for n := first; ; n += stride {
		got, said := meddled(h, shell, fmt.Sprintf("[ $n != %d ] || %s", n, how), nil, "web", "shop", "busybox", "sleep", "1000")
		if got.Status == 0 {
			if n < 12 {
				h.T.Errorf("%s: it ended well at step %d", shell, n)
			}
			deleteContainer(h, "web", "shop")
			h.T.Logf("%s, %s: came up at step %d", shell, how, n)
			return
		}
		if diff := cmp.Diff(ended{"", status}, got); diff != "" {
			h.T.Errorf("%s: %s at step %d: %s%s", shell, how, n, diff, said)
		}
		if diff := cmp.Diff(before, left(h)); diff != "" {
			h.T.Fatalf("%s: %s at step %d leaves behind:\n%s%s", shell, how, n, diff, said)
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
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
	h, plain := vms[0], test.OnHost(vms[1])
	h.WithPlugin("COOL_DOWN=0s")

	t.Run("stopped at any step, it leaves nothing behind", func(t *testing.T) {
		h := h.In(t)
		stops := []func(){ // each begins without the network
			func() { stopped(h, "sh", forever, 130, 1, 1) },
			func() { stopped(h, "bash", once, 130, 2, 5) },
			func() { stopped(h, "busybox sh", killed, 143, 4, 5) },
		}
		if !test.Soaking {
			stops = stops[:1]
		}
		for _, stop := range stops {
			stop()
			h.Docker("network", "rm", "azure")
		}
	})
	var addr netip.Addr
	t.Run("the address is had, printed alone, and reached", func(t *testing.T) {
		h := h.In(t)
		addr = runs(h, []string{"DOCKER_RUN_ARGS=--init -e COLOUR=red"}, "web", "shop", "busybox", "sh", "-c", test.Server)
		if got := h.Address("web"); got != addr {
			t.Errorf("it printed %s, and docker inspect says %s", addr, got)
		}
		if _, err := plain.Try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
			t.Errorf("not reached: %v", err)
		}
		labels := h.Docker("inspect", "-f", `{{index .Config.Labels "azure-vnet.name"}} {{index .Config.Labels "azure-vnet.namespace"}} {{.Config.Env}}`, "web")
		if !strings.Contains(labels, "web shop") || !strings.Contains(labels, "COLOUR=red") {
			t.Errorf("labels and environment are %s", labels)
		}
	})
	t.Run("others find it by name and namespace", func(t *testing.T) {
		h := h.In(t)
		other := test.InContainer(h, "other", runs(h, nil, "other", "shop", "busybox", "sleep", "1000"))
		if got, err := other.Try(test.Fetch("http://web.shop/cgi-bin/who")...); err != nil || got != other.Addr.String() {
			t.Errorf("web.shop sees %q, want %s: %v", got, other.Addr, err)
		}
	})
	// Not at the end too: who was talked to and is removed gets frames that nobody takes.
	test.NothingDropped(t, vnet, addr)
	t.Run("what fails says why, by its status too, and leaves nothing behind", func(t *testing.T) {
		h := h.In(t)
		before := left(h)
		run := "docker-run.sh"
		fails(h, 5, "docker-run.sh: no free address: NIC", nil, run, "third", "shop", "busybox", "sleep", "1000")
		fails(h, 3, "docker-run.sh: the name web is taken: docker-del.sh web shop", nil, run, "web", "other", "busybox", "sleep", "1000")
		fails(h, 4, "docker-run.sh: there is no image 127.0.0.1:1/none", nil, run, "new", "shop", "127.0.0.1:1/none")
		fails(h, 2, "docker-run.sh: a name, a namespace and an image are needed", nil, run, "new", "shop")
		fails(h, 2, "docker-run.sh: ../shop is not a name", nil, run, "new", "../shop", "busybox")
		fails(h, 2, "docker-run.sh: new\nshop is not a name", nil, run, "new\nshop", "shop", "busybox")
		fails(h, 2, "docker-run.sh: --privileged is not the name of an image", nil, run, "new", "shop", "--privileged", "busybox")
		fails(h, 2, "docker-run.sh: '' is not the name of an image", nil, run, "new", "shop", "")
		fails(h, 7, "docker-run.sh: no engine answers", []string{"DOCKER_HOST=unix:///run/none"}, run, "new", "shop", "busybox")
		fails(h, 7, "no engine", []string{"DOCKER_HOST=unix:///run/none"}, "scripts/docker-del.sh", "new", "shop")
		if diff := cmp.Diff(before, left(h)); diff != "" {
			t.Errorf("something is left behind:\n%s", diff)
		}
		deleteContainer(h, "other", "shop")
		before = left(h)
		fails(h, 6, "that is all\n", nil, run, "job", "shop", "busybox", "echo", "that is all")
		fails(h, 1, "docker-run.sh: unknown flag: --no-such-flag\n", []string{"DOCKER_RUN_ARGS=--no-such-flag"}, run, "job", "shop", "busybox", "sleep", "9")
		if test.Soaking {
			fails(h, 6, `docker-run.sh: exec: "no-such-command": executable file not found`, nil, run, "job", "shop", "busybox", "no-such-command")
			fails(h, 6, "docker-run.sh: the command ended at once", []string{"DOCKER_RUN_ARGS=--rm"}, run, "job", "shop", "busybox", "true")
			fails(h, 5, "docker-run.sh: publish port 80: SCTP", []string{"DOCKER_RUN_ARGS=-p 80:80/sctp"}, run, "job", "shop", "busybox", "sleep", "9")
		}
		if diff := cmp.Diff(before, left(h)); diff != "" {
			t.Errorf("something is left behind:\n%s", diff)
		}
	})
	t.Run("removed, nothing is left, and once more is success", func(t *testing.T) {
		h := h.In(t)
		deleteContainer(h, "web", "shop")
		deleteContainer(h, "web", "shop")
		h.Empty()
	})
	t.Run("a plugin that makes no network says why", func(t *testing.T) {
		h := h.In(t)
		set := func(level string) {
			h.Docker("plugin", "disable", "-f", test.Plugin)
			h.Docker("plugin", "set", test.Plugin, "LOG_LEVEL="+level)
			h.Docker("plugin", "enable", test.Plugin)
		}
		h.Docker("network", "rm", "azure")
		set("loud")
		fails(h, 5, "docker-run.sh: wrong settings of the plugin: LOG_LEVEL=loud", nil, "docker-run.sh", "web", "shop", "busybox")
		set("info")
		runs(h, nil, "web", "shop", "busybox", "sleep", "1000")
		deleteContainer(h, "web", "shop")
	})
	t.Run("the plugin brings the CNI package, and keeps its network when that goes", func(t *testing.T) {
		h := h.In(t)
		ownOpt(h)
		runInstaller(h, nil, "--from-plugin")
		h.Must("/opt/cni/bin/azure-vnet", "version")
		if out := runInstaller(h, nil, "--uninstall"); !strings.Contains(out, "stays") {
			t.Errorf("the installer says %q", out)
		}
		h.Must("ip", "link", "show", "azure0")
	})
}

// deleteContainer runs docker-del.sh with success.
func deleteContainer(h test.Host, name, namespace string) {
	h.T.Helper()
	if got, said := runScript(h, nil, "scripts/docker-del.sh", name, namespace); got != (ended{}) {
		h.T.Errorf("docker-del.sh %s %s: %+v\n%s", name, namespace, got, said)
	}
}

func TestDockerRunByCNI(t *testing.T) {
	t.Parallel() // it mostly waits
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
	h, plain := vms[0], test.OnHost(vms[1])
	h.WithEngine()
	ownOpt(h)
	h.Must("mkdir", "-p", "/etc/cloud/cloud.cfg.d")
	run, install := "docker-run.sh", "scripts/install-cni-plugin.sh"
	fails(h, 7, "docker-run.sh: neither", nil, run, "web", "shop", "busybox", "sleep", "1000")
	host := h.Must("sh", "-c", "ip -br addr show eth0; ip route; ls -d /etc/cni /etc/cloud/cloud.cfg.d/* /var/lib/azure-vnet 2>&1 || true")

	site := "RELEASES=" + serveReleases(h)
	fails(h, 1, "cannot fetch", []string{site}, install, "v0.0.0")
	if out := runInstaller(h, []string{site}); !strings.Contains(out, "azure-vnet v1.0.0 is in /opt/cni/bin and /etc/cni/net.d") {
		t.Errorf("the installer says %q", out)
	}
	runInstaller(h, []string{site}, "v1.0.0")
	nothing := left(h)
	broken := "tar -cf - -T /dev/null | " + test.Client + ` import --change 'ENTRYPOINT ["/none"]' --change 'LABEL azure-vnet.role=holder' - azure-vnet-holder:latest`
	tidy := func(t *testing.T) {
		t.Helper()
		test.Eventually(t, "nothing is left", 5*time.Second, func() bool { return left(h.In(t)) == nothing })
	}

	t.Run("stopped at any step, it leaves nothing behind", func(t *testing.T) {
		h := h.In(t)
		stopped(h, "bash", once, 130, 1, 6)
		if test.Soaking {
			stopped(h, "sh", forever, 130, 1, 1)
			stopped(h, "busybox sh", killed, 143, 3, 6)
			stopped(h, "sh", hungUp, 129, 5, 6)
		}
	})
	t.Run("a registry that never answers is waited for no longer than the user does", func(t *testing.T) {
		h := h.In(t)
		var silent net.Listener // the kernel accepts for it
		if err := h.Do(func() (err error) { silent, err = net.Listen("tcp", "127.0.0.1:5999"); return err }); err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
		image := fmt.Sprintf("127.0.0.1:5999/never-%d", os.Getpid())
		for shell, how := range map[string]string{"sh": once, "bash": forever, "busybox sh": killed} {
			status := map[string]int{once: 130, forever: 130, killed: 143}[how]
			begin := time.Now()
			got, said := meddled(h, shell, `[ "$1" != pull ] || { (busybox sleep 0.3; `+how+`) & }`, nil, "web", "shop", image)
			if diff := cmp.Diff(ended{"", status}, got); diff != "" || time.Since(begin) > 10*time.Second {
				t.Errorf("%s: after %v: %s%s", shell, time.Since(begin), diff, said)
			}
			test.Eventually(t, "nothing pulls", 5*time.Second, func() bool { return h.Must("sh", "-c", "busybox pgrep -f 'docker pull "+image+"' || true") == "" })
		}
		tidy(t)
	})
	t.Run("what DEL does not take back is kept for docker-del.sh", func(t *testing.T) {
		if !test.Soaking {
			t.Skip("takes long: make soak")
		}
		h := h.In(t)
		got, said := meddled(h, "sh", `case "$*" in *role=container*) mv /opt/cni/bin/portmap /run/portmap; `+forever+` esac`, nil, "web", "shop", "busybox", "sleep", "1000")
		if got.Status != 130 || !strings.Contains(said, "docker-del.sh web shop") {
			t.Errorf("%+v\n%s", got, said)
		}
		fails(h, 1, "still lent", nil, "scripts/docker-del.sh", "web", "shop")
		fails(h, 3, "docker-del.sh web shop", nil, run, "web", "other", "busybox", "sleep", "1000")
		h.Must("mv", "/run/portmap", "/opt/cni/bin/portmap")
		deleteContainer(h, "web", "shop")
		tidy(t)
	})
	t.Run("an image of the holder that is broken is no later run's", func(t *testing.T) {
		if !test.Soaking {
			t.Skip("takes long: make soak")
		}
		h := h.In(t)
		got, said := meddled(h, "sh", `[ $command != tar ] || exit 1`, nil, "web", "shop", "busybox", "sleep", "1000")
		if got.Status != 1 || !strings.Contains(said, "image of the holder") {
			t.Errorf("%+v\n%s", got, said)
		}
		tidy(t)
		h.Must("sh", "-c", broken)
		fails(h, 1, `docker-run.sh: exec: "/none"`, nil, run, "web", "shop", "busybox", "sleep", "1000")
		tidy(t)
		// Another's end may remove the image just before the holder starts.
		got, said = meddled(h, "sh", `case "$*" in *"--pull never"*) [ -e /run/removed ] || `+test.Client+` image rm azure-vnet-holder >/run/removed ;; esac`, nil, "web", "shop", "busybox", "sleep", "1000")
		if removed := h.Must("cat", "/run/removed"); got.Status != 0 || !strings.Contains(removed, "Untagged") {
			t.Errorf("%s: %+v\n%s", removed, got, said)
		}
		deleteContainer(h, "web", "shop")
		tidy(t)
	})
	t.Run("two that begin at once share the image, and remove it at last", func(t *testing.T) {
		if !test.Soaking {
			t.Skip("takes long: make soak")
		}
		h := h.In(t)
		var both sync.WaitGroup
		for _, name := range []string{"one", "two"} {
			both.Go(func() {
				if got, said := runScript(h, nil, run, name, "shop", "busybox", "sleep", "1000"); got.Status != 0 {
					t.Errorf("%s: %+v\n%s", name, got, said)
				}
			})
		}
		both.Wait()
		deleteContainer(h, "one", "shop")
		deleteContainer(h, "two", "shop")
		tidy(t)
	})
	t.Run("the network is there before the first instruction, and after docker restart", func(t *testing.T) {
		h := h.In(t)
		addr := runs(h, []string{"DOCKER_RUN_ARGS=-e COLOUR=red"}, "web", "shop", "busybox", "sh", "-c",
			"ip -4 -o addr show eth0; ping -c 1 -W 3 "+plain.Addr.String()+" && sleep 1000")
		for range 2 {
			test.Eventually(t, "the first instruction had the network", 5*time.Second, func() bool {
				log := h.Docker("logs", "web")
				return strings.Contains(log, addr.String()+"/16") && strings.Contains(log, "1 packets received")
			})
			if _, err := plain.Try("ping", "-c", "1", "-W", "3", addr.String()); err != nil {
				t.Errorf("%s is not reached: %v", addr, err)
			}
			if got := h.Docker("exec", "web", "sh", "-c", "hostname; echo $COLOUR"); got != "web\nred" {
				t.Errorf("host name and environment are %q", got)
			}
			h.Docker("restart", "-t", "0", "web")
		}
		pod := h.Must("cat", "/var/log/azure-vnet.log")
		if !strings.Contains(pod, "shop/web") {
			t.Errorf("the pod's name is not known to CNI:\n%s", pod)
		}
	})
	t.Run("what fails says why, by its status too, and leaves nothing behind", func(t *testing.T) {
		h := h.In(t)
		before := left(h)
		fails(h, 6, `docker-run.sh: exec: "no-such-command": executable file not found`, nil, run, "job", "shop", "busybox", "no-such-command")
		if test.Soaking { // TestDockerRunWithThePlugin has the others
			fails(h, 3, "docker-run.sh: the name web is taken: docker-del.sh web shop", nil, run, "web", "other", "busybox", "sleep", "1000")
			fails(h, 4, "docker-run.sh: there is no image 127.0.0.1:1/none", nil, run, "new", "shop", "127.0.0.1:1/none")
			fails(h, 6, "that is all\n", nil, run, "job", "shop", "busybox", "echo", "that is all")
			fails(h, 6, "docker-run.sh: the command ended at once", []string{"DOCKER_RUN_ARGS=--rm"}, run, "job", "shop", "busybox", "true")
		}
		runs(h, nil, "other", "shop", "busybox", "sleep", "1000")
		fails(h, 5, "docker-run.sh: no free address: NIC", nil, run, "third", "shop", "busybox", "sleep", "1000")
		deleteContainer(h, "other", "shop")
		if diff := cmp.Diff(before, left(h)); diff != "" {
			t.Errorf("something is left behind:\n%s", diff)
		}
	})
	t.Run("a directory that an upgrade took away is passed over", func(t *testing.T) {
		if !test.Soaking {
			t.Skip("takes long: make soak")
		}
		h := h.In(t)
		sum := strings.Repeat("0", 64)
		h.Must("sed", "-i", "1i "+sum+"  /gone/azure-vnet\\n"+sum+"  /gone/10-azure.conflist", "/var/lib/azure-vnet/cni.installed")
		runs(h, nil, "other", "shop", "busybox", "sleep", "1000")
		h.Docker("rm", "-f", "other")
		fails(h, 3, "docker-del.sh other shop", nil, run, "other", "shop", "busybox", "sleep", "1000")
		deleteContainer(h, "other", "shop")
	})
	t.Run("the timer's command mends", func(t *testing.T) {
		h := h.In(t)
		addr := h.Must(test.Client, "exec", "web", "sh", "-c", "ip -4 -o addr show eth0 | sed 's/.*inet //; s|/.*||'")
		h.Must("nft", "delete", "table", "bridge", "azure_vnet")
		h.Must("sh", "-c", `eval "$(sed -n 's/^ExecStart=//p' /etc/systemd/system/azure-vnet-reconcile.service)"`)
		if _, err := plain.Try("ping", "-c", "1", "-W", "3", addr); err != nil {
			t.Errorf("%s is not reached: %v", addr, err)
		}
	})
	t.Run("the CNI package is not removed from under a container", func(t *testing.T) {
		h := h.In(t)
		fails(h, 1, "nothing was removed", nil, install, "--uninstall")
		h.Must("test", "-f", "/etc/cni/net.d/10-azure.conflist")
		h.Must("test", "-x", "/opt/cni/bin/azure-vnet")
	})
	t.Run("removed, though its holder died, nothing is left, and once more is success", func(t *testing.T) {
		h := h.In(t)
		h.Docker("kill", "web.holder")
		deleteContainer(h, "web", "shop")
		deleteContainer(h, "web", "shop")
		tidy(t)
		h.Empty()
	})
	t.Run("uninstalled, the host is as it was", func(t *testing.T) {
		h := h.In(t)
		h.Must("sh", "-c", broken)
		runInstaller(h, nil, "--uninstall")
		if image := h.Docker("images", "-q", "azure-vnet-holder"); image != "" {
			t.Errorf("uninstall left the image %s", image)
		}
		after := h.Must("sh", "-c", "ip -br addr show eth0; ip route; ls -d /etc/cni /etc/cloud/cloud.cfg.d/* /var/lib/azure-vnet 2>&1 || true")
		if diff := cmp.Diff(host, after); diff != "" {
			t.Error(diff)
		}
		if out := h.Must("sh", "-c", "find /opt /run /var/log /etc/systemd | grep -v -e ^/run/site -e ^/run/alone | grep -e azure-vnet -e cni || true"); out != "" {
			t.Errorf("uninstall left\n%s", out)
		}
	})
	t.Run("README and docs/kubernetes.md work as they are written", func(t *testing.T) {
		h := h.In(t)
		// A web server by the name that they use; there is no registry here.
		h.Docker("run", "--name", "made", "busybox", "true")
		h.Docker("commit", "--change", `CMD ["httpd","-f","-p","80"]`, "made", "nginx")
		h.Docker("rm", "made")
		done := map[string]bool{}
		for _, doc := range []string{"README.md", "docs/kubernetes.md"} {
			found := test.Blocks(t, doc)
			for _, lines := range append(found["run: node"], found["run: node, last"]...) {
				if done[lines] {
					continue
				}
				done[lines] = true
				cmd := h.Command(t.Context(), "sh", "-euc", "cd "+test.Top+"\n"+lines)
				cmd.Env = test.AsUser(t, os.Environ())
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
		h.Must("sh", "-c", "! test -e /run/azure-vnet")
	})
	test.NothingDropped(t, vnet)
}
