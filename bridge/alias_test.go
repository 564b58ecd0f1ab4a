// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// What a link says of its endpoint is read back as it was, and an owner too long
// for it by its hash.
func TestAliasIsReadBack(t *testing.T) {
	long, longer := strings.Repeat("o", 120), strings.Repeat("l", 255)
	for _, test := range []struct{ owner, lease, wantOwner, wantLease string }{
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
			bridge: "azure-of-15-chr", policy: "0badcafe", owner: test.owner, lease: test.lease,
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

var foreignAliases = []string{
	"", " ", "azv1", "azv2 addr=10.0.0.1/8 mac=02:00:00:00:00:01 br=b net=n owner=o", "azv1 bridge eth0 00:0d:3a:00:00:01",
	"azv1 addr= mac= br= net= owner=", "azv1 addr=10.0.0.1 mac=02:00:00:00:00:01 br=b net=n owner=o",
	"azv1 addr=fd00::1/64 mac=02:00:00:00:00:01 br=b net=n owner=o", "azv1 addr=10.0.0.1/8 mac=02:00:00:00:00:01:02:03 br=b net=n owner=o",
	"azv1 addr=10.0.0.1/8 mac=02:00:00:00:00:01 br=b net=n", "azv1 addr=10.0.0.1/99 mac=x br=b net=n owner=o",
}

// Aliases that others gave their links say nothing to us.
func TestForeignAliasIsIgnored(t *testing.T) {
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
	f.Add("azv1 addr=10.240.0.7/16 mac=02:42:0a:f0:00:07 br=azure0 net=0badcafe owner=docker/e lease=docker/p later=thing")
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
	host, peer := linkNames("docker/e1")
	if host[:3] != "azv" || peer != "azc"+host[3:] || len(host) != 14 {
		t.Errorf("got %s and %s", host, peer)
	}
	if other, _ := linkNames("docker/e2"); other == host {
		t.Errorf("two owners both have %s", host)
	}
}
