// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"azurevnet/bridge/internal/ruleset"
	"azurevnet/internal/vnetsim"
	"azurevnet/test/random"
)

// Containers of two runtimes come and go on two NICs and in both modes. Calls die anywhere. People change and delete links,
// aliases, rules and files, and the VM boots. In any order of these, the kernel has exactly what the model has after a
// round, no address and no port has two holders, and each container is reached.
func TestAnyOrderOfCalls(t *testing.T) {
	t.Parallel()
	v, hosts := newHosts(t, vnetsim.VMConfig{Secondaries: 3, NICs: []vnetsim.NICConfig{{Subnet: secondSubnet, Secondaries: 2}}})
	clean := false // the VM is as it was at its boot
	random.Check(t, 3, false, func(rt *rapid.T) {
		h := &history{host: hosts[0], t: rt, model: model{endpoints: map[string]*attached{}, recorded: true}, spaces: map[string]bool{}}
		if !clean {
			h.boot("gone")
		}
		clean = false
		h.run()
		h.reconcile()
		h.ping()
		h.endAll()
		clean = true
	})
	checkFabric(t, v)
}

// history is one random history of a VM, and the model.
type history struct {
	*host
	model
	t      *rapid.T
	spaces map[string]bool // network namespaces of containers, by name
}

// actions are all that may happen.
func (h *history) actions() []random.Action {
	return []random.Action{
		random.Act(8, "attach", func() { h.attachUntil("") }),
		random.Act(3, "an attach dies", h.attachAndDie),
		random.Act(3, "detach", func() { h.end(random.Evenly(owners...).Draw(h.t, "owner")) }),
		random.Act(2, "a detach dies", h.detachAndDie),
		random.Act(3, "Docker moves a link", h.join),
		random.Act(4, "Docker publishes", h.publish),
		random.Act(1, "a container ends", h.endNamespace),
		random.Act(1, "a link is deleted", h.deleteHostEnd),
		random.Act(3, "a round", h.reconcile),
		random.Act(2, "somebody harms the host", h.harmHost),
		random.Act(5, "somebody harms a link", h.harmLink),
		random.Act(1, "an alias is removed", h.removeAlias),
		random.Act(1, "an alias is changed", h.changeAlias),
		random.Act(1, "host.json is lost", h.loseHostFile),
		random.Act(1, "a link of others has our name", h.otherLink),
		random.Act(1, "a link of others has our alias", h.otherAlias),
		random.Act(1, "the VM boots", h.bootSometimes),
	}
}

// run does random actions. What is attached is as the model says after each.
func (h *history) run() { random.Run(h.t, 40, h.actions(), h.compareLinks) }

// compareLinks compares what is attached with the model. It holds at any time: nobody but the runtimes, and who changes
// an alias, decides on what is attached.
func (h *history) compareLinks() {
	var got, want []string
	line := func(owner string, addr netip.Prefix, nic, bridge, link string, in bool) string {
		return fmt.Sprintf("%s has %s of %s by %s in %q, in a container: %v", owner, addr, nic, link, bridge, in)
	}
	for _, a := range h.attachments() {
		got = append(got, line(a.Owner, a.Addr, a.NIC, a.Bridge, a.Link, a.InContainer))
	}
	for owner, e := range h.endpoints {
		want = append(want, line(owner, e.Addr, e.NIC, e.Bridge, hostEndOf(owner), e.inContainer))
	}
	slices.Sort(got)
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		h.t.Fatalf("attached (-want +got):\n%s", diff)
	}
}

func (h *history) attachments() (all []Attachment) {
	if err := h.Do(func() (err error) { all, err = h.Attachments(h.t.Context()); return err }); err != nil {
		h.t.Fatal(err)
	}
	return all
}

// reconcile does a round, after which everything is as the model says, and another one, which finds nothing. The first
// one finds nothing either, unless there is a reason.
func (h *history) reconcile() {
	reason := h.harmed || h.left
	if !reason {
		h.compareKernel("without a round")
	}
	var mended, again, wrong []string
	err := h.Do(func() (err error) {
		if mended, err = h.Reconcile(h.t.Context()); err != nil {
			return err
		}
		if again, err = h.Reconcile(h.t.Context()); err != nil {
			return err
		}
		wrong, err = h.Broken(h.t.Context())
		return err
	})
	if err != nil || len(again) > 0 || len(mended) > 0 && !reason {
		h.t.Fatalf("a round: %v; mended %q, and again %q; a reason: %v", err, mended, again, reason)
	}
	h.heal()
	h.compareLinks()
	if h.isForgotten() {
		h.left = true
		return
	}
	if slices.Sort(wrong); !slices.EqualFunc(wrong, h.complaints(), strings.HasPrefix) {
		h.t.Fatalf("after a round, broken: %q, want %q", wrong, h.complaints())
	}
	h.compareKernel(fmt.Sprintf("after a round, which mended %q", mended))
	h.comparePorts()
	if e := h.some(func(e *attached) bool { return len(e.asked) == 0 || len(e.Ports) > 0 }); e != nil {
		if err := h.Do(func() error { return h.Check(h.t.Context(), e.Owner) }); err != nil {
			h.t.Fatalf("after a round: %v", err)
		}
	}
}

// compareKernel compares what the kernel has of endpoints with the model.
func (h *history) compareKernel(when string) {
	want, nics := []string{}, h.NICs()
	for _, e := range h.endpoints {
		n := e.nicNumber(nics)
		want = append(want, e.facts(nics[n].Name, n > 0)...)
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, h.kernel()); diff != "" {
		h.t.Fatalf("%s, the kernel has (-want +got):\n%s", when, diff)
	}
}

// isForgotten reports whether host.json was lost while no link of ours stood. Then nothing tells a round that something
// was asked of the host, and rules of nobody wait for the next Ensure.
func (h *history) isForgotten() bool {
	used := true
	if err := h.Do(func() (err error) { used, err = h.inUse(); return err }); err != nil {
		h.t.Fatal(err)
	}
	return !used && len(h.endpoints) == 0
}

// comparePorts compares what host.json says of ports.
func (h *history) comparePorts() {
	got, want := map[string][]PublishedPort{}, map[string][]PublishedPort{}
	err := h.Do(func() error {
		s, err := h.readState()
		if err == nil {
			got = s.Ports
		}
		return err
	})
	for owner, e := range h.endpoints {
		if len(e.Ports) > 0 {
			want[hostEndOf(owner)] = e.Ports
		}
	}
	sorted := func(all map[string][]PublishedPort) (lines []string) {
		for link, ports := range all {
			for _, p := range ports {
				lines = append(lines, fmt.Sprintf("%s: %s idle: %v", link, p, p.Idle))
			}
		}
		slices.Sort(lines)
		return lines
	}
	if diff := cmp.Diff(sorted(want), sorted(got)); err != nil || diff != "" {
		h.t.Fatalf("ports in host.json: %v (-want +got):\n%s", err, diff)
	}
}

// kernel lists what the kernel has of endpoints, one fact on a line, sorted.
func (h *history) kernel() []string {
	all := []string{}
	fact := func(format string, args ...any) { all = append(all, fmt.Sprintf(format, args...)) }
	err := h.Do(func() error {
		v, err := h.readView()
		if err != nil {
			return err
		}
		for _, l := range v.links {
			a := l.Attrs()
			if ours := a.Group == ruleset.GroupBridge || a.Group == ruleset.GroupTransparent; l.Type() != "bridge" && (ours || strings.HasPrefix(a.Name, hostPrefix)) {
				fact("link %s in %s, group %d, %s", a.Name, map[bool]string{true: "nothing", false: v.nameOf(a.MasterIndex)}[a.MasterIndex == 0], a.Group,
					map[bool]string{true: "up", false: "down"}[a.Flags&net.FlagUp != 0])
			}
		}
		for _, r := range v.ourRoutes {
			if to := prefixOf(r.Dst); to.IsSingleIP() {
				fact("route to %s by %s in %d", to.Addr(), v.nameOf(r.LinkIndex), r.Table)
			}
		}
		for _, n := range v.neighbours {
			if n.Protocol == ourProtocol {
				fact("neighbour %s is %s by %s", n.Addr, n.MAC, v.nameOf(n.Link))
			}
		}
		for _, f := range v.forwardingEntries {
			if strings.HasPrefix(f.MAC.String(), "02:42:") { // the others are of the host ends and the bridge
				fact("forwarding of %s to %s", f.MAC, v.nameOf(f.Port))
			}
		}
		rules := map[string]bool{}
		for _, r := range v.ourRoutingRules {
			if strings.HasPrefix(r.IifName, hostPrefix) {
				rules[r.IifName] = true
			}
		}
		for link := range rules {
			fact("routing rules for %s", link)
		}
		all = append(all, elementsIn(command("nft", "list", "ruleset"))...)
		return nil
	})
	if err != nil {
		h.t.Fatal(err)
	}
	slices.Sort(all)
	return all
}

var (
	tableLine = regexp.MustCompile(`^table (\w+) (\w+) \{`)
	setLine   = regexp.MustCompile(`^\t(?:set|map) (\w+) \{`)
	ofHost    = regexp.MustCompile(`^(nics|links|guarded|direct_\w+)$`) // sets that have no endpoint's elements
)

// elementsIn lists the elements of endpoints in what nft prints: the family and the set, then the element.
func elementsIn(listing string) (all []string) {
	family, set, inside := "", "", false
	for line := range strings.Lines(sortElements(listing)) {
		line = strings.TrimRight(line, "\n")
		if m := tableLine.FindStringSubmatch(line); m != nil {
			family = map[bool]string{true: m[1]}[m[2] == ruleset.Name]
		} else if m := setLine.FindStringSubmatch(line); m != nil {
			set = m[1]
		} else if strings.HasSuffix(line, "elements = {") {
			inside = true
		} else if inside {
			element, last := strings.CutSuffix(strings.Trim(line, "\t,"), " }")
			inside = !last
			if family != "" && !ofHost.MatchString(set) {
				all = append(all, family+" "+set+": "+element)
			}
		}
	}
	return all
}

// ping has each container ask the host by its NIC's own address, and the host each container. An internal container
// of the second NIC has no route to the address that the host asks with.
func (h *history) ping() {
	for owner, e := range h.endpoints {
		is := h.NICs()[e.nicNumber(h.NICs())]
		if e.inContainer && !(h.PingsFrom(spaceOf(owner), is.Primary) && (e.Policy.Internal || h.Pings(e.Addr.Addr()))) {
			h.t.Fatalf("%s (%s) does not reach its host, or is not reached", owner, e.Addr)
		}
	}
}

// endAll ends all containers and removes all that is ours. Nothing is left.
func (h *history) endAll() {
	for _, owner := range slices.Sorted(maps.Keys(h.endpoints)) {
		h.end(owner)
	}
	h.reconcile()
	if err := h.removeAll(); err != nil {
		h.t.Fatal(err)
	}
	for name := range h.spaces {
		h.sh("ip netns del " + name)
	}
	h.try("ip link del br9")
}

// some draws an endpoint. It is nil if none is wanted.
func (h *history) some(want func(*attached) bool) *attached {
	var all []string
	for _, owner := range slices.Sorted(maps.Keys(h.endpoints)) {
		if want(h.endpoints[owner]) {
			all = append(all, owner)
		}
	}
	if len(all) == 0 {
		return nil
	}
	return h.endpoints[random.Evenly(all...).Draw(h.t, "endpoint")]
}

// isInUse reports whether an error is an InUseError.
func isInUse(err error) bool {
	var used *InUseError
	return errors.As(err, &used)
}
