// Copyright (c) The azure-vnet authors. MIT licence.

package plan

import (
	"fmt"
	"strconv"
	"strings"
)

// definition is what checkCluster reads of a definition, beside the places for its faults.
type definition struct {
	Cluster
	config       *value   // orchestratorProfile.kubernetesConfig
	profile      *value   // masterProfile
	poolProfiles []*value // agentPoolProfiles, one for each of Pools
	ownVNet      bool     // the cluster is put into a VNet that exists
	scaleSet     bool     // the masters are in a scale set, and have no static addresses
	isCounted    bool     // the numbers of nodes and of their addresses are known
}

// checkCluster checks the definition of a Kubernetes cluster. It returns nil if the sizes are not known.
func (r *report) checkCluster(properties *value) *Sizes {
	d := &definition{
		config:    properties.get("orchestratorProfile").get("kubernetesConfig"),
		profile:   properties.get("masterProfile"),
		isCounted: true,
	}
	switch pools := properties.get("agentPoolProfiles"); {
	case pools.kind == '[':
		d.poolProfiles = pools.children
	case pools.exists():
		r.fault(pools, "it is no array", "write the pools in brackets, [ ]")
		d.isCounted = false
	}
	d.scaleSet = strings.EqualFold(d.profile.get("availabilityProfile").text, "VirtualMachineScaleSets")
	hasAddresses := r.checkPlugin(d.config)
	r.readNodes(d)
	r.checkSubnetIDs(d)
	if !hasAddresses { // the pods' addresses are of another range, and mean nothing for the subnet
		return nil
	}
	r.readNetwork(d)
	r.checkStatic(d)
	if !d.Subnet.IsValid() || !d.isCounted {
		return nil
	}
	s := sizesOf(d.Cluster)
	subnet := d.config.get("clusterSubnet")
	s.Default = !subnet.exists()
	r.checkSizes(subnet, s)
	r.checkDynamic(d, s)
	return s
}

// readNodes reads and checks the numbers of nodes and of their addresses.
func (r *report) readNodes(d *definition) {
	pods, podsKnown := r.maxPods(d.config)
	if pods == 0 {
		pods = defaultMaxPods
	}
	d.isCounted = d.isCounted && podsKnown
	d.Masters = Nodes{Name: "masters"}
	if d.profile.kind == '{' {
		const remedy = "write 1, 3 or 5"
		at := d.profile.get("count")
		n, ok := r.integer(at, remedy)
		if ok && n != 1 && n != 3 && n != 5 {
			r.fault(at, fmt.Sprintf("the engines make no cluster with %d masters", n), remedy)
		}
		d.isCounted = d.isCounted && n > 0
		d.Masters.Count = max(0, n)
		d.Masters.PerNode = r.perNode(d, d.profile, pods)
	} else {
		r.fault(d.profile, "there is no object masterProfile", "write one, with the count of the masters")
		d.isCounted = false
	}
	for i, pool := range d.poolProfiles {
		const remedy = "write 1 to 100"
		at := pool.get("count")
		n, ok := r.integer(at, remedy)
		if ok && (n < 1 || n > 100) {
			r.fault(at, fmt.Sprintf("the engines make no pool of %s nodes", thousands(n)), remedy+", and make more pools for more nodes")
		}
		d.isCounted = d.isCounted && n > 0
		name := r.textOf(pool.get("name"))
		if name == "" {
			name = fmt.Sprintf("pool %d", i+1)
		}
		d.Pools = append(d.Pools, Nodes{Name: name, Count: max(0, n), PerNode: r.perNode(d, pool, pods)})
		if system := pool.get("osType"); strings.EqualFold(system.text, "Windows") {
			r.warn(system, "this is a hybrid cluster: the nodes of this pool run Windows, which azure-vnet does not serve; "+
				"their addresses are counted", "keep the plugin that the engine installs on these nodes")
		}
	}
}

// perNode reads how many addresses each node of a profile has. The profile may say its pods; otherwise they are as many
// as for the whole cluster.
func (r *report) perNode(d *definition, profile *value, pods int) int {
	own, ok := r.maxPods(profile.get("kubernetesConfig"))
	d.isCounted = d.isCounted && ok
	if own > 0 {
		pods = own
	}
	at := profile.get("ipAddressCount")
	if !at.exists() {
		return 1 + pods
	}
	remedy := fmt.Sprintf("write %d, or delete this key", 1+pods)
	n, ok := r.integer(at, remedy)
	if ok && (n < 1 || n > mostOfNode) {
		r.fault(at, fmt.Sprintf("a node has 1 to %d addresses, and not %s", mostOfNode, thousands(n)), remedy)
		ok = false
	}
	d.isCounted = d.isCounted && ok
	if ok && n < 1+pods {
		r.warn(at, fmt.Sprintf("a node gets addresses for %d pods, and --max-pods is %d", n-1, pods), remedy)
	}
	return n
}

// maxPods reads the pods of a node from a kubernetesConfig. 0: it does not say them. The first releases of ACS-Engine
// had the key maxPods.
func (r *report) maxPods(config *value) (pods int, ok bool) {
	remedy := fmt.Sprintf("write 1 to %d", mostPods)
	at := config.get("kubeletConfig").get("--max-pods")
	if at.exists() {
		if at.kind != '"' {
			r.fault(at, "it is no string", remedy+", in quotes")
			return 0, false
		}
		n, err := strconv.Atoi(at.text)
		if err != nil {
			r.fault(at, "it is no whole number", remedy+", in quotes")
			return 0, false
		}
		pods = n
	} else if at = config.get("maxPods"); !at.exists() {
		return 0, true
	} else if pods, ok = r.integer(at, remedy); !ok {
		return 0, false
	}
	if pods < 1 || pods > mostPods {
		r.fault(at, fmt.Sprintf("a node has 1 to %d pods, and not %s", mostPods, thousands(pods)), remedy)
		return 0, false
	}
	return pods, true
}
