// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// What a link says of its endpoint is read back as it was, and an owner too long
// for it by its hash.
func TestAliasIsReadBack(t *testing.T) {
	t.Parallel()
	long, longer := strings.Repeat("o", 120), strings.Repeat("l", 255)
	for i, test := range []struct{ owner, lease, wantOwner, wantLease string }{
		{"docker/e1", "docker/e1", "docker/e1", "docker/e1"},
		{"docker/e1", "docker/10.240.0.0/16", "docker/e1", "docker/10.240.0.0/16"},
		{"a=b", "sha256:1", "a=b", "sha256:1"},
		{long, "docker/p", long, "docker/p"},
		{longer, longer, hashed(longer), hashed(longer)},
		{longer, long, hashed(longer), hashed(long)},
		{longer, "docker/p", hashed(longer), "docker/p"},
		{"docker/e1", longer, "sha256:" + hashed("docker/e1")[7:], hashed(longer)},
	} {
		a := alias{
			addr: netip.MustParsePrefix("255.255.255.254/32"), mac: mustMAC("02:42:0a:f0:00:07"),
			nic: "00:0d:3a:04:00:01", bridge: "azure-of-15-chr", policy: "0badcafe", owner: test.owner, lease: test.lease, ports: i,
		}
		if i%2 == 1 {
			a.bridge, a.mac = "", MACFor(a.addr.Addr())
		}
		text := a.String()
		if len(text) > aliasMax {
			t.Errorf("%d bytes: %s", len(text), text)
		}
		got, ok := parseAlias(text)
		want := a
		want.owner, want.lease = test.wantOwner, test.wantLease
		if diff := cmp.Diff(fmt.Sprint(want, true), fmt.Sprint(got, ok)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", text, diff)
		}
	}
}

// A pod's name stands in the alias where there is room. It never costs the owner its place.
func TestAliasNamesThePodWhereThereIsRoom(t *testing.T) {
	t.Parallel()
	owner := "cni/azure/" + strings.Repeat("5", 64) + "/eth0"
	for _, test := range []struct{ pod, want string }{
		{"", ""},
		{"shop/web-7d4b9c6f5d-x2x8k", "shop/web-7d4b9c6f5d-x2x8k"},
		{strings.Repeat("n", 63) + "/" + strings.Repeat("p", 253), ""},
	} {
		a := alias{addr: netip.MustParsePrefix("10.240.0.7/16"), mac: MACFor(netip.MustParseAddr("10.240.0.7")), nic: "00:0d:3a:04:00:01", bridge: "azure0",
			policy: "0badcafe", owner: owner, lease: owner, pod: test.pod}
		got, ok := parseAlias(a.String())
		if !ok || len(a.String()) > aliasMax || got.owner != owner || got.pod != test.want {
			t.Errorf("%s is read as %+v", a, got)
		}
	}
}

var foreignAliases = []string{
	"", " ", "azv2", "azv1 addr=10.0.0.1/8 mac=02:00:00:00:00:01 br=b net=n owner=o", "azv2 bridge 00:0d:3a:00:00:01",
	"azv2 addr= mac= nic= br= net= owner=", "azv2 addr=10.0.0.1 nic=n net=n owner=o", "azv2 addr=10.0.0.1/8 net=n owner=o",
	"azv2 addr=fd00::1/64 nic=n net=n owner=o", "azv2 addr=10.0.0.1/8 mac=02:00:00:00:00:01:02:03 nic=n net=n owner=o",
	"azv2 addr=10.0.0.1/8 nic=n net=n", "azv2 addr=10.0.0.1/99 mac=x nic=n net=n owner=o", "azv2 addr=10.0.0.1/8 nic=n net=n owner=o ports=many",
}

// Aliases that others gave their links say nothing to us.
func TestForeignAliasIsIgnored(t *testing.T) {
	t.Parallel()
	for _, s := range foreignAliases {
		if a, ok := parseAlias(s); ok {
			t.Errorf("%q is read as %v", s, a)
		}
	}
}

// What is understood is written so that it is understood again, as the same.
func FuzzParseAlias(f *testing.F) {
	for _, s := range foreignAliases {
		f.Add(s)
	}
	f.Add("azv2 addr=10.240.0.7/16 mac=02:00:0a:f0:00:07 nic=00:0d:3a:04:00:01 br=azure0 net=0badcafe owner=docker/e lease=docker/p ports=2 later=thing")
	f.Add("azv2 addr=10.240.0.7/16 nic=00:0d:3a:04:00:01 net=0badcafe owner=cni/n/c/e pod=shop/web")
	f.Fuzz(func(t *testing.T, s string) {
		a, ok := parseAlias(s)
		if !ok || len(s) > aliasMax {
			return
		}
		text := a.String()
		b, ok := parseAlias(text)
		if !ok || b.String() != text {
			t.Errorf("%q is read as %v, written as %q and read as %v, %v", s, a, text, b, ok)
		}
	})
}

// Two owners' links have two names, which fit the kernel's limit.
func TestLinkNames(t *testing.T) {
	t.Parallel()
	host, peer := linkNames("docker/e1")
	if host[:3] != "azv" || peer != "azc"+host[3:] || len(host) != 14 {
		t.Errorf("got %s and %s", host, peer)
	}
	if other, _ := linkNames("docker/e2"); other == host {
		t.Errorf("two owners both have %s", host)
	}
}

// The MACs that we choose are of one interface, are made by hand, and are no NIC's.
func TestMACs(t *testing.T) {
	t.Parallel()
	addr := netip.MustParseAddr("10.240.0.7")
	nic := mustMAC("00:0d:3a:04:00:01")
	for _, mac := range []net.HardwareAddr{MACFor(addr), hostMAC(addr), bridgeMAC(nic), bridgeMAC(bridgeMAC(nic))} {
		if mac[0]&1 != 0 || mac[0]&2 == 0 || mac.String() == nic.String() {
			t.Errorf("%s", mac)
		}
	}
	if bridgeMAC(bridgeMAC(nic)).String() == bridgeMAC(nic).String() {
		t.Error("a bridge has the MAC of its NIC, which was made by hand")
	}
}
