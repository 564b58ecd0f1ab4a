// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"azurevnet/bridge"
	"azurevnet/driver"
	"azurevnet/ipamdriver"
	"azurevnet/pool"
)

// FuzzBodies calls every method with any body, on a namespace without a NIC and
// a pool of two addresses: nothing panics, and no body makes a link or a file.
func FuzzBodies(f *testing.F) {
	if os.Getenv(inside) == "" {
		f.Skip("needs root, to make namespaces")
	}
	for _, body := range []string{
		``, `{}`, `null`, `[]`, `{"NetworkID":""}`, `{"NetworkID":"../../etc","EndpointID":"a b"}`,
		`{"PoolID":"000d3a047598-10.240.0.0_16--0123456789ab","Address":"10.240.0.5"}`,
		`{"PoolID":"000d3a047598-10.240.0.0_16-10.240.1.0_24-0123456789ab","Options":{"RequestAddressType":"com.docker.network.gateway"}}`,
		`{"AddressSpace":"azure-vnet","Pool":"10.240.0.0/16","SubPool":"10.240.1.0/24","Options":{"master":"lo"}}`,
		`{"NetworkID":"a1","Options":{"com.docker.network.generic":{"mtu":7}}}`,
		`{"NetworkID":"a1","IPv4Data":[null]}`,
		`{"NetworkID":"a1","IPv4Data":[{"AddressSpace":"azure-vnet","Pool":"10.240.0.0/16","Gateway":"10.240.0.1/16","AuxAddresses":{"a":7}}]}`,
		`{"NetworkID":"a1","EndpointID":"b2","Interface":null}`,
		`{"NetworkID":"a1","EndpointID":"b2","Interface":{"Address":"10.240.0.5/16","MacAddress":"02:42:0a:f0:00:05"},"Options":{"com.docker.network.portmap":{}}}`,
	} {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		file := dir + "/interfaces.json"
		if err := os.WriteFile(file, fmt.Appendf(nil, oneSubnet, `{"Address":"10.240.0.4","IsPrimary":true},{"Address":"10.240.0.5"},{"Address":"10.240.1.6"}`), 0o600); err != nil {
			t.Fatal(err)
		}
		addresses, err := pool.New(pool.Config{Dir: dir + "/run/azure-vnet", Source: file})
		if err != nil {
			t.Fatal(err)
		}
		host := bridge.New(bridge.Config{Run: dir + "/run"})
		ipam := ipamdriver.New(ipamdriver.Config{
			Pool: addresses,
			FindNIC: func(ctx context.Context, name string) (string, error) {
				_, mac, err := host.NIC(ctx, name)
				return mac, err
			},
			FindLink: func(ctx context.Context, addr netip.Addr) (string, error) { return findLink(ctx, host, addr) },
		})
		networks := driver.New(driver.Config{Dir: dir + "/data", Host: host, Pool: addresses, AddressSpace: ipamdriver.AddressSpace})
		all := methods(networks, ipam)
		names := []string{}
		for name := range all {
			names = append(names, name)
		}
		slices.Sort(names)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		for _, name := range names {
			if _, err := all[name].call(ctx, bytes.Clone(body)); err == nil && len(body) == 0 && !all[name].bodiless {
				t.Errorf("%s takes an empty body", name)
			}
		}
		if left := endpoints(t); len(left) > 0 {
			t.Errorf("%q made %v", body, left)
		}
		kept, err := driver.ReadNetworks(dir + "/data")
		if err != nil || len(kept.Networks) > 0 {
			t.Errorf("%q: networks %v, %v", body, kept.Networks, err)
		}
	})
}
