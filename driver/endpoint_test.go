// Copyright (c) The azure-vnet authors. MIT licence.

package driver

import (
	"net/netip"
	"testing"

	"github.com/docker/go-plugins-helpers/network"
	"github.com/google/go-cmp/cmp"
)

func TestRoutesByGateway(t *testing.T) {
	connected := func(dst string) *network.StaticRoute { return &network.StaticRoute{Destination: dst, RouteType: 1} }
	via := func(dst, gateway string) *network.StaticRoute {
		return &network.StaticRoute{Destination: dst, RouteType: 0, NextHop: gateway}
	}
	for _, c := range []struct {
		subnet, gateway string
		want            []*network.StaticRoute
	}{
		{"10.0.0.0/16", "10.0.0.1", []*network.StaticRoute{connected("10.0.0.1/32"), via("10.0.0.0/17", "10.0.0.1"), via("10.0.128.0/17", "10.0.0.1")}},
		{"10.0.0.0/8", "10.0.0.1", []*network.StaticRoute{connected("10.0.0.1/32"), via("10.0.0.0/9", "10.0.0.1"), via("10.128.0.0/9", "10.0.0.1")}},
		{"10.1.2.0/24", "10.1.2.1", []*network.StaticRoute{connected("10.1.2.1/32"), via("10.1.2.0/25", "10.1.2.1"), via("10.1.2.128/25", "10.1.2.1")}},
		{"10.1.2.40/29", "10.1.2.41", []*network.StaticRoute{connected("10.1.2.41/32"), via("10.1.2.40/30", "10.1.2.41"), via("10.1.2.44/30", "10.1.2.41")}},
		{"10.1.2.4/30", "10.1.2.5", []*network.StaticRoute{connected("10.1.2.5/32"), via("10.1.2.4/31", "10.1.2.5"), via("10.1.2.6/31", "10.1.2.5")}},
		{"10.1.2.4/31", "10.1.2.5", []*network.StaticRoute{connected("10.1.2.5/32")}},
		{"10.1.2.4/32", "10.1.2.5", []*network.StaticRoute{connected("10.1.2.5/32")}},
		{"0.0.0.0/0", "0.0.0.1", []*network.StaticRoute{connected("0.0.0.1/32"), via("0.0.0.0/1", "0.0.0.1"), via("128.0.0.0/1", "0.0.0.1")}},
	} {
		got := routesByGateway(netip.MustParsePrefix(c.subnet), netip.MustParseAddr(c.gateway))
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s by %s:\n%s", c.subnet, c.gateway, diff)
		}
	}
}
