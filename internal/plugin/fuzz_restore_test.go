// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"azurevnet/bridge"
	"azurevnet/driver"
	"azurevnet/internal/dump"
	"azurevnet/ipamdriver"
	"azurevnet/pool"
)

// FuzzRestore restores any networks on a VM, as after a boot. Nothing panics. Each network that fails is named. The
// file stays as it is, the NIC stays as it is, and all that is made are bridges with our mark.
func FuzzRestore(f *testing.F) {
	if os.Getenv(inside) == "" {
		f.Skip("needs root, to make namespaces")
	}
	const good = `"mac":"` + nicMAC + `","primary":true,"prefix":"10.240.0.0/16","gateway":"10.240.0.1","snat":true`
	for _, n := range []string{
		good, good + `,"mode":"transparent"`,
		good + `,"mode":"other","bridge":"../../etc","mtu":-1,"nics":["x",""],"direct":["0.0.0.0/0","10.0.0.0/8"],"noMetadata":true`,
		good + `,"aux":[{"addr":"10.240.0.5","owner":"docker/p"},{"addr":"10.240.0.5","owner":"docker/q"},{"addr":"0.0.0.0","owner":"\n"},{"addr":"192.0.2.1"}]`,
		`"mac":"","prefix":"0.0.0.0/0","internal":true`, `"mac":"00:0d:3a:04:75:99","bridge":"eth0"`,
	} {
		f.Add([]byte(`{"version":1,"networks":{"` + netID + `":{` + n + `},"b":{` + good + `,"bridge":"azure0"}}}`))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(driver.NetworksFile(dir), body, 0o600); err != nil {
			t.Fatal(err)
		}
		known, err := driver.ReadNetworks(dir)
		if err != nil || len(known.Networks) == 0 || len(known.Networks) > 4 {
			return // FuzzNetworks of the package driver has these
		}
		newVM(t, 2)
		addresses, err := pool.New(pool.Config{Dir: dir + "/run/azure-vnet", Source: "/run/interfaces.json"})
		if err != nil {
			t.Fatal(err)
		}
		host := bridge.New(bridge.Config{Run: dir + "/run"})
		d := driver.New(driver.Config{Dir: dir, Host: host, Pool: addresses, AddressSpace: ipamdriver.AddressSpace})
		before := nicAsItIs(t)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if err := d.Restore(ctx); err != nil && !strings.Contains(err.Error(), "restore network ") {
			t.Errorf("no network is named: %v", err)
		}
		_ = d.HoldAllAux(ctx)
		if _, err := d.CollectAux(ctx); err != nil {
			t.Errorf("collect: %v", err)
		}
		if ctx.Err() != nil {
			t.Error("it takes more than 20 s")
		}
		if left, err := os.ReadFile(driver.NetworksFile(dir)); err != nil || string(left) != string(body) {
			t.Errorf("the file was %q and is %q: %v", body, left, err)
		}
		if after := nicAsItIs(t); after != before {
			t.Errorf("the NIC was %+v and is %+v", before, after)
		}
		links, err := dump.Whole(netlink.LinkList)
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range links {
			name, alias := l.Attrs().Name, l.Attrs().Alias
			if name != "lo" && name != "eth0" && name != "fabric" && !strings.HasPrefix(alias, "azv2 bridge ") {
				t.Errorf("%q made the link %s, whose alias is %q", body, name, alias)
			}
		}
	})
}

// nicState is what nobody changes of a NIC.
type nicState struct {
	mac     string
	mtu     int
	master  int
	alias   string
	address int
}

func nicAsItIs(t *testing.T) nicState {
	t.Helper()
	l, err := netlink.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	addrs, err := dump.Whole(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_ALL) })
	if err != nil {
		t.Fatal(err)
	}
	v4 := 0
	for _, a := range addrs {
		if a.IP.To4() != nil {
			v4++
		}
	}
	a := l.Attrs()
	return nicState{a.HardwareAddr.String(), a.MTU, a.MasterIndex, a.Alias, v4}
}
