// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
)

// catchAll runs systemd-networkd with a file that matches every link, as images of the field have one: it gives each
// link the host's address. RUN is the host's /run. A read-only /sys tells networkd that there is no udev to wait for.
const catchAll = `mkdir -p /run/systemd /etc/systemd/network && mount -t tmpfs none /run/systemd && mount -t tmpfs none /etc/systemd/network
mkdir -p RUN/systemd/network /run/systemd/network /run/systemd/netif && chown systemd-network: /run/systemd/netif && mount --bind RUN/systemd/network /run/systemd/network
printf '[Match]\nType=ether\n[Network]\nAddress=HOST/16\nLinkLocalAddressing=no\n' >/etc/systemd/network/99-all.network
mount --bind /sys /sys && mount -o remount,ro,bind /sys && exec /lib/systemd/systemd-networkd`

// withNetworkd starts systemd-networkd on the host, until the test ends, and waits until it has read the links.
func (h *host) withNetworkd(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := h.Command(ctx, "unshare", "-m", "sh", "-euc", strings.NewReplacer("RUN", h.cfg.Run, "HOST", h.Primary.String()).Replace(catchAll))
	cmd.Env = append(os.Environ(), "SYSTEMD_LOG_TARGET=console")
	stderr, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait()
	})
	ready := make(chan string, 1)
	go func() {
		var said strings.Builder
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			fmt.Fprintln(&said, lines.Text())
			if strings.Contains(lines.Text(), "Enumeration completed") {
				ready <- ""
			}
		}
		ready <- said.String()
	}()
	select {
	case said := <-ready:
		if said != "" {
			t.Fatalf("systemd-networkd ended:\n%s", said)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("systemd-networkd does not start")
	}
}

// rounds does what the plugin does: a round for each time that Watch tells, until it tells no more.
func (h *host) rounds(told watching) (mended string) {
	h.t.Helper()
	for range 20 {
		if !told.within(time.Second) {
			return mended
		}
		mended += strings.Join(h.reconcile(), "\n")
	}
	h.t.Errorf("rounds have no end: %s", mended)
	return mended
}

// systemd-networkd with a file for every link deletes rules that it did not make, and gives links the host's address.
// Started after us, it leaves our links alone, as our drop-in tells it. Where it ran before, it has not read the
// drop-in. In both cases all of ours is back at the event that tells of it, for every container that comes, and
// nobody's rounds go on for ever. Uninstall removes the drop-in.
func TestNetworkdWithACatchAll(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/lib/systemd/systemd-networkd"); err != nil {
		t.Skip("needs systemd-networkd")
	}
	inOneMode(t, func(t *testing.T, mode Mode) {
		for _, before := range []bool{true, false} {
			t.Run(fmt.Sprintf("running before us: %v", before), func(t *testing.T) {
				t.Parallel()
				v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{})
				h, peer := hosts[0], hosts[1]
				told := h.watch()
				if before {
					h.withNetworkd(t)
				}
				h.mustEnsure(h.spec(mode))
				if !before {
					h.withNetworkd(t)
				}
				for n := range 2 {
					c := h.running(n, mode, Policy{SNAT: true})
					link, _ := linkNames(c.endpoint(mode, Policy{}).Owner)
					mended := h.rounds(told)
					if addressed := strings.Contains(mended, link+" has the address "+h.Primary.String()+"/16"); addressed != before {
						t.Errorf("rounds mended %q", mended)
					}
					h.whole("after the rounds")
					checks := &checks{t: t}
					checks.reaches(c.place(), h.Primary, peer.Primary)
					checks.reaches(peer.place(), c.addr, h.Primary)
					checks.wait.Wait()
					h.mustDetach(c.endpoint(mode, Policy{}).Owner)
				}
				checkFabric(t, v)
				if err := h.removeAll(); err != nil {
					t.Error(err)
				}
				if left := h.sh("find " + h.cfg.Run + " -name '*azure-vnet*'; ip rule | grep 168; ip addr | grep az || true"); left != "" {
					t.Errorf("uninstall left %s", left)
				}
			})
		}
	})
}

// Uninstall removes the drop-ins for systemd-networkd and for NetworkManager, and nothing that others put beside.
func TestUninstallRemovesDropIns(t *testing.T) {
	t.Parallel()
	_, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 1})
	h := hosts[0]
	h.sh("mkdir -p " + h.cfg.Run + "/NetworkManager/conf.d " + h.cfg.Run + "/systemd/network; touch " + h.cfg.Run + "/NetworkManager/conf.d/other.conf " + h.cfg.Run + "/systemd/network/other.network")
	files := func() string { return h.sh("cd " + h.cfg.Run + " && find NetworkManager systemd -type f | sort") }
	before := files()
	h.mustEnsure(h.spec(ModeBridge))
	for _, name := range []string{networkdDropIn, networkManagerDropIn} {
		text, err := os.ReadFile(filepath.Join(h.cfg.Run, name))
		if err != nil || !strings.Contains(string(text), "azure*") || !strings.Contains(string(text), "azv*") {
			t.Errorf("%s: %q %v", name, text, err)
		}
	}
	h.sh("touch " + filepath.Join(h.cfg.Run, networkdDropIn) + ".tmp-1") // as a killed writer leaves it
	if err := h.removeAll(); err != nil {
		t.Error(err)
	}
	checkSame(t, "files", before, files())
}
