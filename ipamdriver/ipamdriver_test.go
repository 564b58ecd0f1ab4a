// Copyright (c) The azure-vnet authors. MIT licence.

package ipamdriver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/google/go-cmp/cmp"

	"azurevnet/pool"
)

const twoNICs = `{"Interfaces":[
 {"MacAddress":"000D3A047598","IsPrimary":true,"IPSubnets":[{"Prefix":"10.240.0.0/16","IPAddresses":[
  {"Address":"10.240.0.4","IsPrimary":true},{"Address":"10.240.0.5"},{"Address":"10.240.0.6"},{"Address":"10.240.1.7"}]}]},
 {"MacAddress":"000D3A047599","IPSubnets":[{"Prefix":"10.241.0.0/16","IPAddresses":[
  {"Address":"10.241.0.4","IsPrimary":true},{"Address":"10.241.0.5"}]}]}`

// ofThisMachine is an entry of the list: a list without any NIC of the machine is not believed.
func ofThisMachine() string {
	mac := ""
	all, _ := net.Interfaces() // none: then every list is believed
	for _, i := range all {
		if len(i.HardwareAddr) == 6 && i.Flags&net.FlagLoopback == 0 {
			mac = i.HardwareAddr.String()
		}
	}
	return `,{"MacAddress":"` + mac + `","IPSubnets":[{"Prefix":"10.99.0.0/16","IPAddresses":[{"Address":"10.99.0.4","IsPrimary":true}]}]}]}`
}

// world is a driver over a real pool, and links that a test puts there.
type world struct {
	*Driver
	pool     *pool.Pool
	links    map[netip.Addr]string
	warnings []string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "interfaces.json")
	if err := os.WriteFile(file, []byte(twoNICs+ofThisMachine()), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := pool.New(pool.Config{Dir: filepath.Join(dir, "state"), Source: file})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{pool: p, links: map[netip.Addr]string{}}
	w.Driver = New(Config{
		Pool: p,
		FindNIC: func(_ context.Context, name string) (string, error) {
			if name != "eth1" {
				return "", errors.New("no such NIC")
			}
			return "00:0d:3a:04:75:99", nil
		},
		FindLink: func(_ context.Context, a netip.Addr) (string, error) { return w.links[a], nil },
		Warn:     func(text string) { w.warnings = append(w.warnings, text) },
	})
	return w
}

func (w *world) request(t *testing.T, r ipam.RequestPoolRequest) poolID {
	t.Helper()
	got, err := w.RequestPool(t.Context(), &r)
	if err != nil {
		t.Fatal(err)
	}
	id, err := parsePoolID(got.PoolID)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// address asks for one; "" is any.
func (w *world) address(ctx context.Context, id poolID, addr string) (string, error) {
	got, err := w.RequestAddress(ctx, &ipam.RequestAddressRequest{PoolID: id.String(), Address: addr})
	if err != nil {
		return "", err
	}
	return got.Address, nil
}

// lent lists the leases: address and owner.
func (w *world) lent(t *testing.T) []string {
	t.Helper()
	status, err := w.pool.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	all := []string{}
	for addr, lease := range status.Leases {
		all = append(all, addr.String()+" "+lease.Owner)
	}
	slices.Sort(all)
	return all
}

func TestOneAddressSpaceForBothScopes(t *testing.T) {
	got, err := newWorld(t).GetDefaultAddressSpaces(t.Context())
	if err != nil || got.LocalDefaultAddressSpace == "" || got.LocalDefaultAddressSpace != got.GlobalDefaultAddressSpace {
		t.Errorf("%+v, %v: engines from 27 choose a subnet only where both have one name", got, err)
	}
}

func TestRequestPool(t *testing.T) {
	for _, c := range []struct {
		name    string
		request ipam.RequestPoolRequest
		want    string // PoolID without its serial
		err     string // part of it
	}{
		{"--subnet", ipam.RequestPoolRequest{AddressSpace: AddressSpace, Pool: "10.240.0.0/16"}, "000d3a047598-10.240.0.0_16--", ""},
		{"--subnet of another NIC", ipam.RequestPoolRequest{Pool: "10.241.0.0/16"}, "000d3a047599-10.241.0.0_16--", ""},
		{"no --subnet", ipam.RequestPoolRequest{}, "000d3a047598-10.240.0.0_16--", ""},
		{"no --subnet, another NIC", ipam.RequestPoolRequest{Options: map[string]string{"master": "eth1"}}, "000d3a047599-10.241.0.0_16--", ""},
		{"--ip-range", ipam.RequestPoolRequest{Pool: "10.240.0.0/16", SubPool: "10.240.1.0/24"}, "000d3a047598-10.240.0.0_16-10.240.1.0_24-", ""},

		{"a part of the subnet", ipam.RequestPoolRequest{Pool: "10.240.0.0/24"}, "", "10.240.0.0/16"},
		{"a foreign subnet", ipam.RequestPoolRequest{Pool: "172.17.0.0/16"}, "", "10.240.0.0/16"},
		{"host bits", ipam.RequestPoolRequest{Pool: "10.240.0.4/16"}, "", "--subnet 10.240.0.4/16 has host bits set: write 10.240.0.0/16"},
		{"no CIDR", ipam.RequestPoolRequest{Pool: "azure"}, "", `--subnet "azure" is not a CIDR such as 10.240.0.0/16`},
		{"IPv6", ipam.RequestPoolRequest{Pool: "fd00::/64"}, "", "IPv6 is not served yet"},
		{"--ipv6", ipam.RequestPoolRequest{V6: true}, "", "IPv6 is not served yet"},
		{"a foreign address space", ipam.RequestPoolRequest{AddressSpace: "LocalDefault", Pool: "10.240.0.0/16"}, "", `address space "LocalDefault" is not this driver's`},
		{"--ip-range outside", ipam.RequestPoolRequest{Pool: "10.240.0.0/16", SubPool: "10.241.0.0/24"}, "", "--ip-range 10.241.0.0/24 lies outside --subnet 10.240.0.0/16"},
		{"--ip-range alone", ipam.RequestPoolRequest{SubPool: "10.240.1.0/24"}, "", "--ip-range needs --subnet"},
		{"a subnet of another NIC than master", ipam.RequestPoolRequest{Pool: "10.240.0.0/16", Options: map[string]string{"master": "eth1"}}, "", "10.241.0.0/16"},
		{"an unknown master", ipam.RequestPoolRequest{Options: map[string]string{"master": "eth9"}}, "", "--ipam-opt master=eth9: no such NIC"},
		{"an unknown option", ipam.RequestPoolRequest{Options: map[string]string{"color": "red"}}, "", `unknown --ipam-opt "color"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := newWorld(t).RequestPool(t.Context(), &c.request)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("error %v, want one with %q", err, c.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			id, err := parsePoolID(got.PoolID)
			if err != nil {
				t.Fatal(err)
			}
			want := &ipam.RequestPoolResponse{
				PoolID: c.want + id.serial, Pool: id.prefix.String(),
				Data: map[string]string{"com.docker.network.gateway": fmt.Sprintf("%s/%d", id.prefix.Addr().Next(), id.prefix.Bits())},
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestAnEngineThatAsksForEverIsToldToPassTheSubnet(t *testing.T) {
	w := newWorld(t)
	first := w.request(t, ipam.RequestPoolRequest{})
	_, err := w.RequestPool(t.Context(), &ipam.RequestPoolRequest{})
	if err == nil || !strings.Contains(err.Error(), "pass --subnet 10.240.0.0/16") {
		t.Fatalf("the second request: %v", err)
	}
	if err := w.ReleasePool(t.Context(), &ipam.ReleasePoolRequest{PoolID: first.String()}); err != nil {
		t.Fatal(err)
	}
	w.request(t, ipam.RequestPoolRequest{}) // the next command starts anew

	w.NetworkMade(first.prefix, first.mac) // a newer engine made a network of it
	w.request(t, ipam.RequestPoolRequest{})
}

func TestAddresses(t *testing.T) {
	w := newWorld(t)
	id := w.request(t, ipam.RequestPoolRequest{Pool: "10.240.0.0/16"})
	for _, c := range []struct{ name, addr, want, err string }{
		{"--ip", "10.240.0.6", "10.240.0.6/16", ""},
		{"--ip in use", "10.240.0.6", "", "10.240.0.6"},
		{"--ip outside", "10.250.0.6", "", "it lies outside the network's subnet 10.240.0.0/16"},
		{"--ip of the gateway", "10.240.0.1", "", "it is the subnet's gateway, which is Azure's"},
		{"the VM's own, which is not lent", "10.240.0.4", "10.240.0.4/16", ""},
		{"an --aux-address of another VM, which is not lent", "10.240.0.200", "10.240.0.200/16", ""},
		{"no address", "web", "", `"web" is not an address`},
		{"any", "", "10.240.0.5/16", ""},
		{"any, and one more", "", "10.240.1.7/16", ""},
		{"none left", "", "", "10.240.0.0/16"},
	} {
		got, err := w.address(t.Context(), id, c.addr)
		if got != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %q, %v; want %q, %q", c.name, got, err, c.want, c.err)
		}
	}
	owner := id.owner()
	want := []string{"10.240.0.5 " + owner, "10.240.0.6 " + owner, "10.240.1.7 " + owner}
	if diff := cmp.Diff(want, w.lent(t)); diff != "" {
		t.Error(diff)
	}
}

// An engine puts "IpamDriver.RequestAddress: " before the error, and a pool id tells its user nothing.
func TestErrorsDoNotNameThePool(t *testing.T) {
	w := newWorld(t)
	id := w.request(t, ipam.RequestPoolRequest{Pool: "10.240.0.0/16"})
	for range 3 {
		if _, err := w.address(t.Context(), id, ""); err != nil {
			t.Fatal(err)
		}
	}
	_, err := w.address(t.Context(), id, "")
	if !errors.Is(err, pool.ErrExhausted) || !strings.HasPrefix(err.Error(), "no free address: NIC ") || strings.Contains(err.Error(), id.serial) {
		t.Errorf("a full NIC is refused with: %v", err)
	}
}

func TestAnAddressRangeBoundsTheChoice(t *testing.T) {
	w := newWorld(t)
	id := w.request(t, ipam.RequestPoolRequest{Pool: "10.240.0.0/16", SubPool: "10.240.1.0/24"})
	if got, err := w.address(t.Context(), id, ""); got != "10.240.1.7/16" {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := w.address(t.Context(), id, ""); err == nil {
		t.Errorf("%q out of a range that is used up", got)
	}
}

func TestARangeWithoutAnIpconfigIsWarnedOf(t *testing.T) {
	w := newWorld(t)
	w.request(t, ipam.RequestPoolRequest{Pool: "10.240.0.0/16", SubPool: "10.240.1.0/24"})
	if len(w.warnings) > 0 {
		t.Errorf("a range with an ipconfig: %v", w.warnings)
	}
	w.request(t, ipam.RequestPoolRequest{Pool: "10.240.0.0/16", SubPool: "10.240.2.0/24"})
	if len(w.warnings) != 1 || !strings.Contains(w.warnings[0], "--ip-range 10.240.2.0/24: NIC 00:0d:3a:04:75:98 has no ipconfig in it") {
		t.Errorf("a range without: %v", w.warnings)
	}
}

func TestTheGatewayIsAzuresAndHeldByNobody(t *testing.T) {
	w := newWorld(t)
	id := w.request(t, ipam.RequestPoolRequest{Pool: "10.240.0.0/16"})
	gateway := map[string]string{"RequestAddressType": "com.docker.network.gateway"}
	for _, addr := range []string{"", "10.240.0.1"} {
		got, err := w.RequestAddress(t.Context(), &ipam.RequestAddressRequest{PoolID: id.String(), Address: addr, Options: gateway})
		if err != nil || got.Address != "10.240.0.1/16" {
			t.Errorf("gateway %q: %v, %v", addr, got, err)
		}
	}
	if _, err := w.RequestAddress(t.Context(), &ipam.RequestAddressRequest{PoolID: id.String(), Address: "10.240.0.5", Options: gateway}); err == nil {
		t.Error("another gateway than Azure's")
	}
	if err := w.ReleaseAddress(t.Context(), &ipam.ReleaseAddressRequest{PoolID: id.String(), Address: "10.240.0.1"}); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{}, w.lent(t)); diff != "" {
		t.Error(diff)
	}
}

func TestAReleaseFreesOnlyWhatItsOwnPoolHoldsAndNoLinkHas(t *testing.T) {
	w := newWorld(t)
	one := w.request(t, ipam.RequestPoolRequest{Pool: "10.240.0.0/16"})
	two := w.request(t, ipam.RequestPoolRequest{Pool: "10.240.0.0/16"})
	for id, addr := range map[poolID]string{one: "10.240.0.5", two: "10.240.0.6"} {
		if _, err := w.address(t.Context(), id, addr); err != nil {
			t.Fatal(err)
		}
	}
	release := func(id poolID, addr string) error {
		return w.ReleaseAddress(t.Context(), &ipam.ReleaseAddressRequest{PoolID: id.String(), Address: addr})
	}
	w.links[netip.MustParseAddr("10.240.0.6")] = "azvba9876543210"
	if err := release(one, "10.240.0.6"); err != nil {
		t.Errorf("a late release of what another's container has now is success: %v", err)
	}
	w.links[netip.MustParseAddr("10.240.0.5")] = "azv0123456789a"
	if err := release(one, "10.240.0.5"); err == nil || !strings.Contains(err.Error(), "azv0123456789a") {
		t.Errorf("an address that a link holds: %v", err)
	}
	if err := w.ReleasePool(t.Context(), &ipam.ReleasePoolRequest{PoolID: one.String()}); err == nil {
		t.Error("a pool with an address that a link holds")
	}
	if diff := cmp.Diff([]string{"10.240.0.5 " + one.owner(), "10.240.0.6 " + two.owner()}, w.lent(t)); diff != "" {
		t.Fatal(diff)
	}
	clear(w.links)
	for range 2 { // twice is success
		if err := release(one, "10.240.0.5"); err != nil {
			t.Error(err)
		}
		if err := w.ReleasePool(t.Context(), &ipam.ReleasePoolRequest{PoolID: two.String()}); err != nil {
			t.Error(err)
		}
	}
	if diff := cmp.Diff([]string{}, w.lent(t)); diff != "" {
		t.Error(diff)
	}
}

func TestPoolAndNetworkAreOfOneNIC(t *testing.T) {
	w := newWorld(t)
	subnet := netip.MustParsePrefix("10.240.0.0/16")
	if err := w.CheckNIC(subnet, "00:0d:3a:ff:ff:ff"); err != nil {
		t.Errorf("of a pool of before the restart nothing is known: %v", err)
	}
	id := w.request(t, ipam.RequestPoolRequest{Pool: "10.240.0.0/16"})
	if err := w.CheckNIC(subnet, id.mac); err != nil {
		t.Error(err)
	}
	if err := w.CheckNIC(subnet, "00:0d:3a:ff:ff:ff"); err == nil || !strings.Contains(err.Error(), "--ipam-opt master= and -o master=") {
		t.Errorf("another NIC in the same subnet: %v", err)
	}
	if err := w.ReleasePool(t.Context(), &ipam.ReleasePoolRequest{PoolID: id.String()}); err != nil {
		t.Fatal(err)
	}
	if err := w.CheckNIC(subnet, "00:0d:3a:ff:ff:ff"); err != nil {
		t.Errorf("the pool is gone: %v", err)
	}
}

// A pool that agreed is its network's, and says nothing of the next one's.
func TestAPoolThatAgreedIsUsedUp(t *testing.T) {
	w := newWorld(t)
	subnet, other := netip.MustParsePrefix("10.240.0.0/16"), "00:0d:3a:ff:ff:ff"
	id := w.request(t, ipam.RequestPoolRequest{Pool: "10.240.0.0/16"})
	w.NetworkMade(subnet, id.mac)
	w.request(t, ipam.RequestPoolRequest{Pool: "10.240.0.0/16"})
	w.NetworkMade(subnet, other) // a network whose pool was requested before a restart
	if err := w.CheckNIC(subnet, other); err == nil {
		t.Error("a pool of one NIC, a master of another")
	}
	w.NetworkMade(subnet, id.mac)
	if err := w.CheckNIC(subnet, other); err != nil {
		t.Errorf("both pools are in use: %v", err)
	}
}

func TestALateReleaseTakesNothingFromTheNextContainer(t *testing.T) {
	w := newWorld(t)
	id := w.request(t, ipam.RequestPoolRequest{Pool: "10.240.0.0/16"})
	addr := netip.MustParseAddr("10.240.0.5")
	if _, err := w.address(t.Context(), id, addr.String()); err != nil {
		t.Fatal(err)
	}
	w.cfg.FindLink = func(ctx context.Context, _ netip.Addr) (string, error) {
		_, err := w.pool.Release(ctx, id.owner(), addr)
		if err == nil {
			_, err = w.address(ctx, id, addr.String()) // of the same network
		}
		return "", err
	}
	if err := w.ReleaseAddress(t.Context(), &ipam.ReleaseAddressRequest{PoolID: id.String(), Address: addr.String()}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"10.240.0.5 " + id.owner()}, w.lent(t)); diff != "" {
		t.Error(diff)
	}
}

func TestNoAddressIsLentBeforeAuxiliaryOnesAreHeld(t *testing.T) {
	w := newWorld(t)
	id := w.request(t, ipam.RequestPoolRequest{Pool: "10.240.0.0/16"})
	w.cfg.HoldAux = func(context.Context) error { return errors.New("not yet") }
	if got, err := w.address(t.Context(), id, ""); err == nil {
		t.Errorf("%s is lent", got)
	}
	if _, err := w.address(t.Context(), id, "10.240.0.6"); err != nil {
		t.Errorf("one that is asked for by name: %v", err)
	}
}

func TestAPoolWorksWithoutEverBeingRequested(t *testing.T) {
	id := newWorld(t).request(t, ipam.RequestPoolRequest{Pool: "10.240.0.0/16"})
	if got, err := newWorld(t).address(t.Context(), id, ""); err != nil || got != "10.240.0.5/16" {
		t.Errorf("after a reboot: %q, %v", got, err)
	}
}
