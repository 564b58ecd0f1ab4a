// Copyright (c) The azure-vnet authors. MIT licence.

package host

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// withSystemctl makes the VM look as if systemd ran there. Before a call of
// systemctl is written down, a line of sh is evaluated, with $1 its first word.
func withSystemctl(h test.Host, meddle string) {
	h.T.Helper()
	h.Must("sh", "-c", `mkdir -p /run/systemd/system /run/shim && printf '%s\n' '#!/bin/sh' "$0" 'echo "$*" >>/run/systemctl' >/run/shim/systemctl &&
		chmod +x /run/shim/systemctl && : >/run/systemctl`, meddle)
}

// told is what systemctl was called with since it was asked last.
func told(h test.Host) []string {
	h.T.Helper()
	return strings.Split(h.Must("sh", "-c", "cat /run/systemctl && : >/run/systemctl"), "\n")
}

func TestInstallerOnARunningSystem(t *testing.T) {
	t.Parallel()
	dir, err := release()
	if err != nil {
		t.Fatal(err)
	}
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2})
	h := vms[0]
	ownOpt(h)
	h.Must("sh", "-c", "rm -rf /etc/cloud /var/lib/azure-vnet /etc/systemd/system/azure-vnet* && mkdir -p /etc/systemd/system /run/noexec && mount -t tmpfs -o noexec tmpfs /run/noexec")
	const everything = "find /opt /etc/cni /etc/modules-load.d /etc/systemd/system /var/lib/azure-vnet 2>/dev/null | sort; ip -br addr show eth0"
	before := h.Must("sh", "-c", everything)
	withSystemctl(h, "")
	script, archive := "scripts/install-cni-plugin.sh", filepath.Join(dir, archive())
	start := []string{"daemon-reload", "restart azure-vnet-reconcile.timer"}
	stop := "stop azure-vnet-reconcile.timer azure-vnet-reconcile.service"

	for range 2 { // and an upgrade
		runInstaller(h, []string{"TMPDIR=/run/noexec"}, archive) // where nothing runs
		if diff := cmp.Diff(start, told(h)); diff != "" {
			t.Errorf("installed, systemctl is called with\n%s", diff)
		}
	}
	installed := h.Must("sh", "-c", everything)

	t.Run("systemd finds no fault in the units", func(t *testing.T) {
		h := h.In(t)
		out := h.Must("sh", "-c", "cd /etc/systemd/system && systemd-analyze verify azure-vnet-reconcile.timer azure-vnet-reconcile.service 2>&1")
		if out != "" {
			t.Errorf("systemd-analyze verify says\n%s", out)
		}
		if got := h.Must("readlink", "-f", "/etc/systemd/system/timers.target.wants/azure-vnet-reconcile.timer"); got != "/etc/systemd/system/azure-vnet-reconcile.timer" {
			t.Errorf("the timer that starts with the boot is %s", got)
		}
	})
	t.Run("a timer that does not start is told", func(t *testing.T) {
		h := h.In(t)
		withSystemctl(h, "[ $1 != restart ] || exit 1")
		fails(h, 1, "its timer does not start", nil, script, archive)
		withSystemctl(h, "")
	})
	t.Run("an uninstall that comes to nothing leaves a node that works", func(t *testing.T) {
		h := h.In(t)
		for meddle, status := range map[string]int{"kill -INT $PPID": 130, "kill -TERM $PPID": 143, "kill -HUP $PPID": 129} {
			withSystemctl(h, "[ $1 != stop ] || "+meddle)
			got, said := runScript(h, nil, script, "--uninstall")
			if got.Status != status {
				t.Errorf("%s: %+v: %s", meddle, got, said)
			}
			if diff := cmp.Diff([]string{stop, "start azure-vnet-reconcile.timer"}, told(h)); diff != "" {
				t.Errorf("%s: systemctl is called with\n%s", meddle, diff)
			}
			if diff := cmp.Diff(installed, h.Must("sh", "-c", everything)); diff != "" {
				t.Errorf("%s:\n%s", meddle, diff)
			}
		}
		withSystemctl(h, "")
		h.Must("sh", "-c", "mv /opt/cni/bin/azure-vnet /run/program && mkdir /run/azure-vnet")
		fails(h, 1, "install it again", nil, script, "--uninstall")
		h.Must("sh", "-c", "mv /run/program /opt/cni/bin/azure-vnet && rmdir /run/azure-vnet")
		if diff := cmp.Diff(installed, h.Must("sh", "-c", everything)); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("interrupted while the NIC is given back, it goes on or is as it was", func(t *testing.T) {
		if !test.Soaking {
			t.Skip("takes long: make soak")
		}
		h := h.In(t)
		h.Must("ip", "netns", "add", "pod")
		run := func() {
			h.Must("sh", "-euc", `for word in attach detach; do /opt/cni/bin/azure-vnet $word /etc/cni/net.d/10-azure.conflist pod /run/netns/pod; done`)
		}
		for _, after := range []string{"0", "0.01", "0.03", "0.06", "0.1"} {
			run()
			// It asks for the managed plugin before it gives the NIC back.
			h.Must("sh", "-c", `printf '#!/bin/sh\n[ $1 != plugin ] || (busybox sleep %s; kill -INT 0) >/dev/null 2>&1 &\nexit 1\n' $0 >/run/shim/docker && chmod +x /run/shim/docker`, after)
			got, said := runScript(h, []string{"/usr/bin/setsid", "env", "--default-signal=INT"}, script, "--uninstall")
			h.Must("rm", "/run/shim/docker")
			switch got.Status {
			case 0:
				if diff := cmp.Diff(before, h.Must("sh", "-c", everything)); diff != "" {
					t.Errorf("after %s s it is uninstalled, but for\n%s", after, diff)
				}
				runInstaller(h, nil, archive)
			case 130:
				h.Must("test", "-f", "/etc/cni/net.d/10-azure.conflist")
			default:
				t.Errorf("after %s s: %+v\n%s", after, got, said)
			}
			t.Logf("after %s s: status %d", after, got.Status)
		}
		run()
	})
	t.Run("uninstalled, the timer is stopped and gone", func(t *testing.T) {
		h := h.In(t)
		// An uninstall that was killed has removed the program after all that the program made. So the whole one comes first.
		for _, between := range []string{"true", "rm /opt/cni/bin/azure-vnet"} {
			runInstaller(h, nil, archive)
			h.Must("sh", "-c", between)
			told(h)
			runInstaller(h, nil, "--uninstall")
			if diff := cmp.Diff([]string{stop, "daemon-reload"}, told(h)); diff != "" {
				t.Errorf("%s: systemctl is called with\n%s", between, diff)
			}
			if diff := cmp.Diff(before, h.Must("sh", "-c", everything)); diff != "" {
				t.Errorf("%s:\n%s", between, diff)
			}
		}
	})
	t.Run("another azure-vnet that took its place stays", func(t *testing.T) {
		if !test.Soaking {
			t.Skip("takes long: make soak")
		}
		h := h.In(t)
		runInstaller(h, nil, archive)
		h.Must("sh", "-c", "echo another >/opt/cni/bin/azure-vnet && echo another >/etc/cni/net.d/10-azure.conflist")
		runInstaller(h, nil, "--uninstall")
		h.Must("sh", "-c", `[ "$(cat /opt/cni/bin/azure-vnet /etc/cni/net.d/10-azure.conflist)" = "another
another" ]`)
	})
}
