// Copyright (c) The azure-vnet authors. MIT licence.

package plan

import (
	"fmt"
	"net/netip"
	"regexp"
	"strings"
)

// The engines use these defaults if a key is missing.
var (
	defaultSubnet = netip.MustParsePrefix("10.240.0.0/12")
	defaultVNet   = netip.MustParsePrefix("10.0.0.0/8")
)

// hostAgent is an address of Azure itself. A VM whose VNet has it does not reach Azure's host agent, nor its DNS.
var hostAgent = netip.MustParseAddr("168.63.129.16")

// subnetID matches the ARM id of a subnet. Its first part is the VNet's.
var subnetID = regexp.MustCompile(`(?i)^(/subscriptions/[^/]+/resourceGroups/[^/]+/providers/Microsoft\.Network/virtualNetworks/[^/]+)/subnets/[^/]+$`)

// checkSubnetIDs checks the ids of subnets: all nodes are in one VNet, or none names a subnet. It notes which pools are
// in another subnet than the masters.
func (r *report) checkSubnetIDs(d *definition) {
	ofMasters := d.profile.get("vnetSubnetId")
	d.ownVNet = r.textOf(ofMasters) != ""
	vnet := r.vnetOf(ofMasters)
	r.checkVNet(d.profile.get("agentVnetSubnetId"), vnet)
	for i, pool := range d.poolProfiles {
		id := pool.get("vnetSubnetId")
		switch named := r.textOf(id) != ""; {
		case named && !d.ownVNet:
			r.fault(id, "this pool names a subnet, and the masters do not", "name a subnet for the masters and for each pool, or for none")
		case !named && d.ownVNet:
			r.fault(id, "this pool names no subnet, and the masters do", "name a subnet for the masters and for each pool, or for none")
		case named && r.checkVNet(id, vnet) && !strings.EqualFold(id.text, ofMasters.text):
			d.Pools[i].elsewhere = true
			r.warn(id, "this pool is in another subnet than the masters, and the definition does not say its size; "+
				"the pool is counted as if it were in clusterSubnet", "see that its subnet has room for it")
		}
	}
}

// vnetOf returns the VNet of a subnet's id. It is empty if there is no id, or none that can be.
func (r *report) vnetOf(id *value) string {
	if id.text == "" || id.kind != '"' {
		return ""
	}
	m := subnetID.FindStringSubmatch(id.text)
	if m == nil {
		r.fault(id, "this is no id of a subnet",
			"write /subscriptions/X/resourceGroups/X/providers/Microsoft.Network/virtualNetworks/X/subnets/X")
		return ""
	}
	return m[1]
}

// checkVNet notes whether a subnet is in the VNet of the masters' one. An empty VNet is not known.
func (r *report) checkVNet(id *value, vnet string) bool {
	own := r.vnetOf(id)
	if own == "" || vnet == "" {
		return false
	}
	if !strings.EqualFold(own, vnet) {
		r.fault(id, "this subnet is in another VNet than the masters", "choose a subnet of the masters' VNet")
		return false
	}
	return true
}

// readNetwork reads the subnet and the VNet, and checks one against the other.
func (r *report) readNetwork(d *definition) {
	at, of := d.config.get("clusterSubnet"), d.profile.get("vnetCidr")
	subnet, ok := r.prefix(at, defaultSubnet)
	if ok && subnet.Bits() > longestPrefix {
		r.fault(at, fmt.Sprintf("Azure has no subnet as small as %s", subnet), fmt.Sprintf("make it a /%d or larger", longestPrefix))
		ok = false
	}
	if ok {
		d.Subnet = subnet
	}
	vnet, vnetKnown := r.prefix(of, defaultVNet)
	for _, p := range []struct {
		at     *value
		prefix netip.Prefix
	}{{at, subnet}, {of, vnet}} {
		if p.prefix.Contains(hostAgent) {
			r.fault(p.at, fmt.Sprintf("%s contains %s, an address of Azure itself that nodes need", p.prefix, hostAgent), "choose a private range, as in Azure")
		}
	}
	if ok && vnetKnown && !(vnet.Bits() <= subnet.Bits() && vnet.Contains(subnet.Addr())) {
		r.faultOutside(d, at, of, vnet)
	}
}

// faultOutside notes that the subnet is not inside the VNet, at the one of the two that the definition says.
func (r *report) faultOutside(d *definition, at, of *value, vnet netip.Prefix) {
	problem := fmt.Sprintf("the subnet %s is not inside vnetCidr, %s", d.Subnet, vnet)
	switch {
	case !at.exists():
		r.fault(of, fmt.Sprintf("clusterSubnet is missing, and its default %s is not inside %s", d.Subnet, vnet), setSubnet)
	case !of.exists():
		r.fault(at, problem+", its default", "write the VNet's range as masterProfile.vnetCidr")
	default:
		r.fault(at, problem, "correct that one of the two which is not as in Azure")
	}
}

const setSubnet = "write the subnet's range as kubernetesConfig.clusterSubnet"

// prefix reads a range of IPv4. A missing one has a default.
func (r *report) prefix(v *value, byDefault netip.Prefix) (p netip.Prefix, ok bool) {
	text := r.textOf(v)
	if text == "" {
		return byDefault, !v.exists()
	}
	p, err := netip.ParsePrefix(text)
	if err != nil || !p.Addr().Is4() {
		r.fault(v, fmt.Sprintf(`"%s" is no range of IPv4`, printable(text)), "write it as a CIDR, such as "+byDefault.String())
		return p, false
	}
	if p != p.Masked() {
		r.warn(v, fmt.Sprintf("%s has host bits and is read as %s", p, p.Masked()), "write "+p.Masked().String())
	}
	return p.Masked(), true
}

// checkStatic reads the first master's address, and checks the addresses that follow it.
func (r *report) checkStatic(d *definition) {
	at := d.profile.get("firstConsecutiveStaticIP")
	text := r.textOf(at)
	switch {
	case d.scaleSet && text != "" && d.ownVNet:
		r.fault(at, "masters in a scale set have no static addresses", "delete this key")
		return
	case d.scaleSet && text != "":
		r.warn(at, "masters in a scale set have no static addresses, and the engine ignores this one", "delete this key")
		return
	case d.scaleSet, d.profile.kind != '{', at.exists() && at.kind != '"':
		return // nothing is missing, or that is a fault of its own
	case text == "" && d.ownVNet:
		r.fault(at, "it is missing, and a cluster in a VNet of your own needs it", "write the first master's address, near the end of the subnet")
		return
	case text == "":
		r.warn(at, "it is missing, and the engine chooses the masters' addresses", "write the first master's address, near the end of the subnet")
		return
	}
	first, err := netip.ParseAddr(text)
	if err != nil || !first.Is4() {
		r.fault(at, fmt.Sprintf(`"%s" is no address of IPv4`, printable(text)), "write one of the subnet, near its end")
		return
	}
	if d.Subnet.IsValid() {
		r.checkStaticRange(d, at, first)
	}
}

// checkStaticRange checks that the masters' addresses, the load balancer's and the spare ones are in the subnet, and
// that none is reserved. Only then the address counts.
func (r *report) checkStaticRange(d *definition, at *value, first netip.Addr) {
	n := max(1, d.Masters.Count)
	if n > 1 {
		n += 1 + spareOfMasters
	}
	last := addressAt(first, n-1)
	lowest, highest := addressAt(d.Subnet.Addr(), firstFree), addressAt(d.Subnet.Addr(), 1<<(32-d.Subnet.Bits())-2)
	subnet := d.Subnet.String()
	remedy := fmt.Sprintf("write one near the end of the subnet, up to %s", addressAt(lowest, max(0, distance(lowest, highest)-n+1)))
	if !d.config.get("clusterSubnet").exists() {
		subnet += ", the default"
		if d.ownVNet {
			remedy = setSubnet
		}
	}
	run := first.String()
	if n > 1 {
		run = fmt.Sprintf("%s to %s", first, last)
	}
	switch {
	case !d.Subnet.Contains(first), !d.Subnet.Contains(last), distance(first, last) != n-1:
		r.fault(at, fmt.Sprintf("%s is not inside the subnet %s", run, subnet), remedy)
	case first.Less(lowest), highest.Less(last):
		r.fault(at, fmt.Sprintf("%s has addresses of %s that Azure reserves: its first four and its last", run, subnet), remedy)
	default:
		d.FirstStatic = first
	}
}

// checkDynamic checks that the addresses which Azure gives out end before those of the masters. A larger subnet is a
// fault of its own.
func (r *report) checkDynamic(d *definition, s *Sizes) {
	if !s.FirstStatic.IsValid() || s.LastDynamic.Less(s.FirstStatic) || s.Left < 0 {
		return
	}
	last := addressAt(d.Subnet.Addr(), 1<<(32-d.Subnet.Bits())-2)
	best := addressAt(last, -distance(s.FirstStatic, s.LastStatic))
	r.fault(d.profile.get("firstConsecutiveStaticIP"),
		fmt.Sprintf("Azure gives out %s to %s, and may give a node or pod the masters' addresses from here on",
			addressAt(d.Subnet.Addr(), firstFree), s.LastDynamic),
		fmt.Sprintf("write an address behind these, up to %s", best))
}
