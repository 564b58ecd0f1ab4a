// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"azurevnet/test/random"
)

// The steps of a history: calls of ours, what runtimes do beside them, and reboots. Each says in the model what follows.

// owners are those of five containers, of CNI and of Docker.
var owners = []string{"cni/net/c0/eth0", "cni/net/c1/eth0", "cni/net/c2/eth0", "docker/d0", "docker/d1"}

// spaceOf returns the name of the network namespace of an owner's container.
func spaceOf(owner string) string {
	return strings.Split(owner+"/", "/")[map[bool]int{true: 1, false: 2}[owner[0] == 'd']]
}

// space makes the network namespace of an owner's container, if there is none.
func (h *history) space(owner string) string {
	name := spaceOf(owner)
	if !h.spaces[name] {
		h.netns(name)
		h.spaces[name] = true
	}
	return name
}

// The policies and ports that endpoints ask for.
var (
	somePolicies = map[string]Policy{"default": {SNAT: true}, "snat=off": {}, "internal": {Internal: true},
		"metadata=off": {SNAT: true, NoMetadata: true}, "direct": {SNAT: true, Direct: prefixes("203.0.113.0/24")}}
	somePorts = map[string][]PublishedPort{"none": nil, "8080": {{Proto: "tcp", HostPort: 8080, Port: 80}},
		"127.0.0.1:8080": {{Proto: "tcp", HostPort: 8080, HostAddr: loopback, Port: 80}},
		"8081 and 5353":  {{Proto: "tcp", HostPort: 8081, Port: 80}, {Proto: "udp", HostPort: 5353, Port: 53}}}
)

// wish draws an endpoint, and the number of its NIC.
func (h *history) wish() (e Endpoint, nic int, mode Mode) {
	place := random.Evenly(0, 1, 2, 3, 4).Draw(h.t, "address") // three of the first NIC, two of the second
	nic = place / 3
	is := h.NICs()[nic]
	e = Endpoint{
		Owner: random.Evenly(owners...).Draw(h.t, "owner"), NIC: is.MAC, Addr: netip.PrefixFrom(is.Secondaries[place%3], is.Prefix.Bits()), Gateway: is.Gateway,
		Policy: somePolicies[random.Evenly("default", "snat=off", "internal", "metadata=off", "direct").Draw(h.t, "policy")],
		Ports:  slices.Clone(somePorts[random.Evenly("none", "none", "8080", "127.0.0.1:8080", "8081 and 5353").Draw(h.t, "ports")]),
	}
	if strings.HasPrefix(e.Owner, "docker/") {
		e.Lease = "docker/p"
		for i := range e.Ports {
			e.Ports[i].Idle = true
		}
	} else {
		e.Pod, e.IfName = "shop/web", "eth0"
		e.Netns = fmt.Sprintf("/proc/%d/root/run/netns/%s", h.PidOne(), h.space(e.Owner))
	}
	return e, nic, random.Evenly(Modes...).Draw(h.t, "mode")
}

// prepare makes the call of Ensure that precedes each attach, and notes whether it did a round. On a host that somebody
// harmed it may fail.
func (h *history) prepare(nic int, mode Mode) (bridge string, ok bool) {
	spec := h.specOf(nic, mode)
	spec.Subnet = h.NICs()[nic].Prefix
	var b Bridge
	var err error
	steps := h.steps(func() { b, err = h.ensure(spec) })
	if err != nil && !h.harmed {
		h.t.Fatalf("ensure: %v", err)
	}
	if err == nil && slices.ContainsFunc(steps, func(s string) bool { return s == "ask" || strings.HasPrefix(s, "mend: ") }) {
		h.heal()
	}
	return b.Name, err == nil
}

func (h *history) attachAndDie() {
	h.attachUntil(random.Evenly("elements", "link", "port", "route", "namespace", "flows", "alias", "ports").Draw(h.t, "step"))
}

// attachUntil attaches an endpoint. If a step is given, the call dies before it.
func (h *history) attachUntil(step string) {
	e, nic, mode := h.wish()
	bridge, ok := h.prepare(nic, mode)
	if !ok || h.harmed && h.addrHolder(e) != "" { // the pool lends no address that somebody holds
		return
	}
	e.Bridge = bridge
	want := h.refusal(e)
	if !errors.Is(want, ErrAttached) {
		delete(h.endpoints, e.Owner) // one that no container has is made anew
	}
	var err error
	attach := func() { _, err = h.host.attach(e) }
	died := false
	if step == "" {
		attach()
	} else {
		died = h.crash(step, attach)
		h.left = h.left || died
	}
	right := want == nil && err == nil || errors.Is(want, ErrAttached) && errors.Is(err, ErrAttached) || isInUse(want) && isInUse(err)
	if died {
		right = want == nil
	}
	if !right && !(h.harmed && err != nil) {
		h.t.Fatalf("attach %+v, harmed: %v, died at %q: %v: got %v, want %v", e, h.harmed, step, died, err, want)
	}
	if !died && err == nil {
		h.endpoints[e.Owner] = &attached{Endpoint: e, asked: e.Ports, inContainer: e.Netns != ""}
	}
}

// end detaches an owner's endpoint, if there is one.
func (h *history) end(owner string) {
	if err := h.detach(owner); err != nil {
		h.t.Fatalf("detach %s: %v", owner, err)
	}
	if h.endpoints[owner] != nil && h.lost { // it may have been the last one that told its policy, whose chain a round deletes
		h.left = true
	}
	delete(h.endpoints, owner)
}

// detachAndDie has a detach die before a step. Until the alias is cleared, the endpoint is there still.
func (h *history) detachAndDie() {
	e := h.some(func(*attached) bool { return true })
	if e == nil || !h.recorded { // of ports that neither host.json nor the table has, nobody knows
		return
	}
	step := random.Evenly("detach elements", "detach routes", "detach flows", "detach ports", "detach alias", "detach link").Draw(h.t, "step")
	var err error
	if !h.crash(step, func() { err = h.detach(e.Owner) }) {
		h.t.Fatalf("a detach of %s did not come to %q: %v", e.Owner, step, err)
	}
	switch step {
	case "detach link":
		delete(h.endpoints, e.Owner)
	case "detach alias":
		e.Ports = nil
	}
	e.bare, h.left = true, true
}

// join moves the container end of an endpoint of Docker's into its container, as the engine does.
func (h *history) join() {
	e := h.some(func(e *attached) bool { return e.isDocker() && !e.inContainer })
	if e == nil {
		return
	}
	_, peer := linkNames(e.Owner)
	in := "ip -n " + h.space(e.Owner)
	h.sh(strings.Join([]string{"set -e", "ip link set " + peer + " netns " + spaceOf(e.Owner), in + " link set " + peer + " name eth0 up",
		in + " addr add " + e.Addr.String() + " dev eth0 noprefixroute", in + " route add " + e.Gateway.String() + " dev eth0", in + " route add default via " + e.Gateway.String()}, "\n"))
	e.inContainer = true
}

// publish makes the ports of an endpoint of Docker's lead to it, or takes that back.
func (h *history) publish() {
	e := h.some(func(e *attached) bool { return e.isDocker() && !e.bare })
	if e == nil {
		return
	}
	var wishes []PublishedPort
	if random.Evenly("publish", "take back").Draw(h.t, "do") == "publish" {
		wishes = with(e.asked, false)
	}
	holder := h.portHolder(e.Owner, wishes)
	got, err := h.host.publish(e.Owner, wishes...)
	if holder != "" {
		if !isInUse(err) {
			h.t.Fatalf("publish %v of %s: %v, %v, and %s has one", wishes, e.Owner, got, err, holder)
		}
		return
	}
	if err != nil || len(got) != len(wishes) {
		h.t.Fatalf("publish %v of %s: %v, %v", wishes, e.Owner, got, err)
	}
	if len(wishes) > 0 {
		e.Ports = wishes
	} else {
		e.Ports = with(e.Ports, true)
	}
	h.recorded = h.recorded || len(e.asked) > 0
}

// with returns the ports as idle ones, or as ports that lead to a container.
func with(ports []PublishedPort, idle bool) (all []PublishedPort) {
	for _, p := range ports {
		p.Idle = idle
		all = append(all, p)
	}
	return all
}

// endNamespace ends a container, and its namespace with it, before anybody detaches it. The link is deleted first: on a busy
// machine, the kernel takes many seconds to end a namespace, and its links with it.
func (h *history) endNamespace() {
	e := h.some(func(e *attached) bool { return e.inContainer })
	if e == nil {
		return
	}
	name := spaceOf(e.Owner)
	h.ip("-n "+name+" link del eth0", "netns del "+name)
	delete(h.spaces, name)
	delete(h.endpoints, e.Owner)
	h.left = true
}

// bootSometimes boots the VM, which takes as long as ten other steps.
func (h *history) bootSometimes() {
	if run := random.Evenly("no boot", "no boot", "no boot", "gone", "on a disk").Draw(h.t, "run"); run != "no boot" {
		h.boot(run)
	}
}

// boot boots the VM. Its /run is gone, or lies on a disk. Then host.json is of another boot.
func (h *history) boot(run string) {
	if err := errors.Join(h.PowerCut(), h.Boot()); err != nil {
		h.t.Fatal(err)
	}
	if run == "gone" {
		if err := os.RemoveAll(h.path()); err != nil {
			h.t.Fatal(err)
		}
	} else {
		h.try("sed -i 's/\"boot\":\"[^\"]*\"/\"boot\":\"another\"/' " + h.path("host.json"))
	}
	clear(h.endpoints)
	clear(h.spaces)
	h.lost = false
	h.heal()
}
