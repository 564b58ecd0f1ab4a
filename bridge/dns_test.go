// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"azurevnet/internal/vnetsim"

	"github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"
)

// startBus starts a real system bus under h's /run, open to all.
func (h *host) startBus() *dbus.Conn {
	h.t.Helper()
	dir := filepath.Join(h.cfg.Run, "dbus")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		h.t.Fatal(err)
	}
	address := "unix:path=" + filepath.Join(dir, "system_bus_socket")
	config := filepath.Join(h.t.TempDir(), "bus.conf")
	text := `<busconfig><type>system</type><listen>` + address + `</listen><policy context="default">
		<allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/><allow send_type="method_return"/><allow send_type="signal"/></policy></busconfig>`
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		h.t.Fatal(err)
	}
	cmd := exec.Command("dbus-daemon", "--config-file="+config, "--nofork", "--print-address")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		h.t.Fatalf("start a bus (apt-get install dbus-daemon): %v", err)
	}
	h.t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		h.t.Fatal(err)
	}
	conn, err := dbus.Connect(address)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { conn.Close() })
	return conn
}

// fakeResolved has the part of systemd-resolved's bus that we use.
type fakeResolved struct {
	conn  *dbus.Conn
	mu    sync.Mutex
	links map[int32]linkDNS
}

type fakeLink struct {
	of    *fakeResolved
	index int32
}

func (f *fakeResolved) GetLink(index int32) (dbus.ObjectPath, *dbus.Error) {
	path := dbus.ObjectPath(fmt.Sprintf("/org/freedesktop/resolve1/link/_%d", index))
	if err := f.conn.Export(fakeLink{f, index}, path, "org.freedesktop.DBus.Properties"); err != nil {
		return "", dbus.MakeFailedError(err)
	}
	return path, nil
}

func (l fakeLink) GetAll(string) (map[string]dbus.Variant, *dbus.Error) {
	l.of.mu.Lock()
	defer l.of.mu.Unlock()
	d := l.of.links[l.index]
	return map[string]dbus.Variant{
		"DNS": dbus.MakeVariant(append([]dnsServer{}, d.Servers...)), "Domains": dbus.MakeVariant(append([]dnsDomain{}, d.Domains...)),
		"DefaultRoute": dbus.MakeVariant(d.DefaultRoute), "LLMNR": dbus.MakeVariant("yes"),
	}, nil
}

func (f *fakeResolved) set(index int32, change func(*linkDNS)) *dbus.Error {
	f.mu.Lock()
	defer f.mu.Unlock()
	d := f.links[index]
	change(&d)
	f.links[index] = d
	return nil
}

func (f *fakeResolved) SetLinkDNS(index int32, servers []dnsServer) *dbus.Error {
	return f.set(index, func(d *linkDNS) { d.Servers = servers })
}

func (f *fakeResolved) SetLinkDomains(index int32, domains []dnsDomain) *dbus.Error {
	return f.set(index, func(d *linkDNS) { d.Domains = domains })
}

func (f *fakeResolved) SetLinkDefaultRoute(index int32, yes bool) *dbus.Error {
	return f.set(index, func(d *linkDNS) { d.DefaultRoute = yes })
}

func (f *fakeResolved) of(index int32) linkDNS {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.links[index]
}

// What systemd-resolved knows of eth0 it knows of azure0 after the move, and
// again when it has forgotten; a bus without it, and none, hinder nothing.
func TestDNSFollowsTheHost(t *testing.T) {
	_, hosts := newHosts(t, vnetsim.VMConfig{})
	h := hosts[0]
	index := func(name string) int32 {
		i, err := strconv.Atoi(strings.TrimSpace(h.run("cat", "/sys/class/net/"+name+"/ifindex")))
		if err != nil {
			t.Fatal(err)
		}
		return int32(i)
	}
	conn := h.startBus()
	if _, err := h.ensure(h.spec()); err != nil {
		t.Fatalf("on a bus without systemd-resolved: %v", err)
	}
	if err := h.remove("azure0"); err != nil {
		t.Fatal(err)
	}

	want := linkDNS{
		Servers:      []dnsServer{{2, []byte{168, 63, 129, 16}}, {10, append([]byte{0xfd}, make([]byte, 15)...)}},
		Domains:      []dnsDomain{{"internal.cloudapp.net", false}, {".", true}},
		DefaultRoute: true,
	}
	fake := &fakeResolved{conn: conn, links: map[int32]linkDNS{index("eth0"): want}}
	if err := conn.Export(fake, "/org/freedesktop/resolve1", resolved+".Manager"); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.RequestName(resolved, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := h.ensure(h.spec()); err != nil {
		t.Fatal(err)
	}
	azure0 := index("azure0")
	check := func(what string, link int32) {
		t.Helper()
		if diff := cmp.Diff(want, fake.of(link)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
	}
	check("DNS of azure0", azure0)
	fake.set(azure0, func(d *linkDNS) { *d = linkDNS{} })
	fake.set(index("eth0"), func(d *linkDNS) { *d = linkDNS{} })
	if mended := strings.Join(h.reconcile(), "\n"); !strings.Contains(mended, "systemd-resolved knew no DNS servers of azure0") {
		t.Errorf("systemd-resolved restarted, and mended was %q", mended)
	}
	check("DNS of azure0 after resolved restarted", azure0)
	if mended := h.reconcile(); len(mended) != 0 {
		t.Errorf("mended again: %q", mended)
	}
	if err := h.remove("azure0"); err != nil {
		t.Fatal(err)
	}
	check("DNS of eth0", index("eth0"))
}
