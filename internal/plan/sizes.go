// Copyright (c) The azure-vnet authors. MIT licence.

package plan

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
)

// Limits of Azure and of the engines.
const (
	firstFree      = 4      // the number of the first address of a subnet that is not reserved
	reserved       = 5      // addresses of a subnet: the first four and the last
	mostInVNet     = 65_536 // private addresses
	mostPods       = 250    // --max-pods
	mostOfNode     = 256    // addresses of a NIC
	defaultMaxPods = 30     // --max-pods
	longestPrefix  = 29     // of a subnet
	spareOfMasters = 10     // static addresses that the engines keep free beside several masters
)

// Cluster is what Size plans. It has at least one node.
type Cluster struct {
	Subnet      netip.Prefix // of IPv4, from /29 up; nodes and pods share it
	Masters     Nodes        // Count 0: the subnet has none
	Pools       []Nodes      // the agent pools
	FirstStatic netip.Addr   // the first master's address; zero: it is not known, or Azure chooses it
}

// Nodes are the masters, or the nodes of one agent pool.
type Nodes struct {
	Name    string `json:"name"`
	Count   int    `json:"count"`
	PerNode int    `json:"perNode"` // addresses, at least 1: the node's own and those of its pods

	elsewhere bool // they are in another subnet than the masters
}

// Sizes are numbers of addresses, if nothing else is said.
type Sizes struct {
	Subnet       netip.Prefix `json:"subnet"`
	Default      bool         `json:"subnetIsDefault"`      // the definition does not say the subnet
	Nodes        []Nodes      `json:"nodes"`                // the masters first, if the subnet has any
	LoadBalancer int          `json:"loadBalancer"`         // 1 with more than one master
	Spare        int          `json:"spare"`                // 10 with more than one master
	Needed       int          `json:"needed"`               // by all of these
	Available    int          `json:"available"`            // in the subnet, without the five that Azure reserves
	Left         int          `json:"left"`                 // negative: they do not fit
	MoreNodes    int          `json:"moreNodes"`            // nodes for which addresses are left; of the largest kind
	Upgrade      int          `json:"upgrade"`              // needed beside Needed while an upgrade runs: one more node
	FirstStatic  netip.Addr   `json:"firstStatic,omitzero"` // the masters'; zero: none, or not known
	LastStatic   netip.Addr   `json:"lastStatic,omitzero"`  // with the load balancer's and the spare ones
	LastDynamic  netip.Addr   `json:"lastDynamic,omitzero"` // of those that Azure gives out from .4 on; zero: as FirstStatic
	MoreAtOnce   int          `json:"moreNodesAtOnce"`      // those of MoreNodes that can be deployed together with the masters

	largest Nodes // of the agent pools; of the masters if there is no pool
}

// sizesOf counts the addresses of a cluster.
func sizesOf(c Cluster) *Sizes {
	s := &Sizes{Subnet: c.Subnet, Nodes: slices.Clone(c.Pools), largest: c.Masters, Available: 1<<(32-c.Subnet.Bits()) - reserved}
	if c.Masters.Count > 0 {
		s.Nodes = slices.Insert(s.Nodes, 0, c.Masters)
	}
	if c.Masters.Count > 1 {
		s.LoadBalancer, s.Spare = 1, spareOfMasters
	}
	s.Needed = s.LoadBalancer + s.Spare
	dynamic := c.Masters.Count * (c.Masters.PerNode - 1)
	for _, n := range s.Nodes {
		s.Needed += n.Count * n.PerNode
	}
	for i, n := range c.Pools {
		if i == 0 || n.PerNode > s.largest.PerNode {
			s.largest = n
		}
		if !n.elsewhere {
			dynamic += n.Count * n.PerNode
		}
	}
	s.Left = s.Available - s.Needed
	s.Upgrade = s.largest.PerNode
	s.MoreNodes = max(0, min(s.Left, mostInVNet-s.Needed)/s.largest.PerNode)
	s.MoreAtOnce = s.MoreNodes
	if c.FirstStatic.IsValid() {
		s.FirstStatic = c.FirstStatic
		s.LastStatic = addressAt(c.FirstStatic, c.Masters.Count+s.LoadBalancer+s.Spare-1)
		s.LastDynamic = addressAt(c.Subnet.Addr(), firstFree+dynamic-1)
		s.MoreAtOnce = max(0, min(s.MoreNodes, (distance(s.LastDynamic, s.FirstStatic)-1)/s.largest.PerNode))
	}
	return s
}

// checkSizes notes what does not fit.
func (r *report) checkSizes(at *value, s *Sizes) {
	lower := "lower the number of nodes or --max-pods"
	switch {
	case s.Needed > mostInVNet:
		r.add(at, Finding{kind: noFit, Remedy: lower,
			Problem: fmt.Sprintf("%s addresses are needed, and a VNet has at most %s", thousands(s.Needed), thousands(mostInVNet))})
	case s.Left < 0:
		r.add(at, Finding{kind: noFit, Remedy: fmt.Sprintf("make the subnet a /%d or larger, or %s", prefixFor(s.Needed+s.Upgrade), lower),
			Problem: fmt.Sprintf("%s addresses are needed, and %s has %s", thousands(s.Needed), s.Subnet, thousands(s.Available))})
	case s.Left < s.Upgrade:
		r.warn(at, fmt.Sprintf("an upgrade needs %d addresses for one more node, and %d are left", s.Upgrade, s.Left),
			fmt.Sprintf("make the subnet a /%d or larger, or %s", prefixFor(s.Needed+s.Upgrade), lower))
	}
}

// prefixFor returns the length of the smallest subnet in which so many addresses are available.
func prefixFor(needed int) int {
	bits := longestPrefix
	for bits > 0 && 1<<(32-bits)-reserved < needed {
		bits--
	}
	return bits
}

// addressAt returns the address that is n behind another one. The last address of all stands for those behind it.
func addressAt(from netip.Addr, n int) netip.Addr {
	var four [4]byte
	binary.BigEndian.PutUint32(four[:], uint32(min(number(from)+int64(n), 1<<32-1)))
	return netip.AddrFrom4(four)
}

// distance returns how far b is behind a.
func distance(a, b netip.Addr) int { return int(number(b) - number(a)) }

func number(a netip.Addr) int64 {
	four := a.As4()
	return int64(binary.BigEndian.Uint32(four[:]))
}
