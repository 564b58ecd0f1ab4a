// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"net"
	"testing"

	"github.com/vishvananda/netlink"
)

// Under accelerated networking a virtual function has its master's MAC, and no
// machine here has one: the list of links is made up.
func TestTheNICIsNotItsVirtualFunction(t *testing.T) {
	mac := net.HardwareAddr{0x00, 0x0d, 0x3a, 0x04, 0x75, 0x98}
	attrs := func(index int, name string, master int) netlink.LinkAttrs {
		return netlink.LinkAttrs{Index: index, Name: name, MasterIndex: master, HardwareAddr: mac}
	}
	device := func(index int, name string, master int) netlink.Link {
		return &netlink.Device{LinkAttrs: attrs(index, name, master)}
	}
	azure0 := &netlink.Bridge{LinkAttrs: attrs(9, "azure0", 0)}
	for _, c := range []struct {
		name  string
		links linkTable
		want  string // "": it cannot be told
	}{
		{"a NIC alone", linkTable{device(2, "eth0", 0)}, "eth0"},
		{"its virtual function comes after it", linkTable{device(2, "eth0", 0), device(3, "enP1s1", 2)}, "eth0"},
		{"and before it", linkTable{device(2, "enP1s1", 3), device(3, "eth0", 0)}, "eth0"},
		{"in a bridge of ours", linkTable{azure0, device(2, "eth0", 9), device(3, "enP1s1", 2)}, "eth0"},
		{"with a VLAN on it", linkTable{device(2, "eth0", 0), &netlink.Vlan{LinkAttrs: attrs(4, "eth0.7", 0)}}, "eth0"},
		{"a container's veth was given its MAC", linkTable{device(2, "eth0", 0), &netlink.Veth{LinkAttrs: attrs(5, "veth1", 0)}}, "eth0"},
		{"a virtual function that has lost its NIC", linkTable{device(3, "enP1s1", 2)}, ""},
		{"two NICs", linkTable{device(2, "eth0", 0), device(3, "eth1", 0)}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := ""
			l, err := c.links.nic(mac)
			if err == nil {
				got = l.Attrs().Name
			}
			if got != c.want {
				t.Errorf("the NIC is %q, want %q: %v", got, c.want, err)
			}
		})
	}
}
