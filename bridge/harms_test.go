// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"fmt"
	"slices"
	"strings"

	"azurevnet/internal/statefile"
	"azurevnet/test/random"
)

// The steps of a history that change the host, and not by calls of ours.

// harmHost does one of hostHarms.
func (h *history) harmHost() {
	lines := []string{"nft flush ruleset", "ip link del azure0", "ip neigh flush nud permanent", "ip route flush proto 168", "ip route flush table 16863"}
	for _, harm := range hostHarms {
		if !strings.Contains(harm.line, "iptables") && !strings.Contains(harm.line, "host.json") && !strings.Contains(harm.line, "ip rule flush") {
			lines = append(lines, harm.line)
		}
	}
	h.harm(random.Evenly(lines...).Draw(h.t, "harm"), h.some(func(*attached) bool { return true }))
}

// harmLink does one of bridgeHarms, transparentHarms and settingHarms.
func (h *history) harmLink() {
	e := h.some(func(*attached) bool { return true })
	if e == nil {
		return
	}
	harms, link := transparentHarms, hostEndOf(e.Owner)
	if e.Bridge != "" {
		harms, link = bridgeHarms, e.Bridge
	}
	var lines []string
	for _, harm := range slices.Concat(harms, settingHarms(link)) {
		lines = append(lines, strings.ReplaceAll(harm.line, "azure0", link))
	}
	h.harm(random.Evenly(lines...).Draw(h.t, "harm"), e)
}

// harm does what somebody does by a line of the shell. Where it is not possible, nothing is done.
func (h *history) harm(line string, e *attached) {
	line = strings.ReplaceAll(line, "link add br9 type bridge &&", "link add br9 type bridge;")
	if e != nil {
		other := h.some(func(o *attached) bool { return o != e && o.Bridge == e.Bridge })
		if other == nil && strings.Contains(line, "OTHER") {
			return
		} else if other != nil {
			line = strings.ReplaceAll(line, "OTHER", hostEndOf(other.Owner))
		}
		line = strings.NewReplacer("LINK", hostEndOf(e.Owner), "HW", MACFor(e.Addr.Addr()).String(), "ADDR", e.Addr.Addr().String()).Replace(line)
	} else if strings.Contains(line, "ADDR") {
		return
	}
	if line == "nft flush ruleset" || line == "nft delete table ip azure_vnet" { // the table may be all that has the ports
		if !h.recorded {
			return
		}
		for _, e := range h.endpoints {
			e.bare = true
		}
	}
	h.try(strings.NewReplacer("HOST", h.Primary.String(), "RUN", h.cfg.Run).Replace(line))
	h.harmed = true
}

// deleteHostEnd deletes the link of an endpoint.
func (h *history) deleteHostEnd() {
	if e := h.some(func(*attached) bool { return true }); e != nil {
		h.ip("link del " + hostEndOf(e.Owner))
		delete(h.endpoints, e.Owner)
		h.left = true
	}
}

// removeAlias removes the alias of a link: the link is nobody's then, and the next round deletes it.
func (h *history) removeAlias() {
	e := h.some(func(*attached) bool { return true })
	if e == nil {
		return
	}
	if !h.try("ip link set " + hostEndOf(e.Owner) + " group " + fmt.Sprint(h.alias(e).group()) + " alias ''") { // a link without any mark would not be ours
		h.t.Fatalf("%s is gone", e.Owner)
	}
	delete(h.endpoints, e.Owner)
	h.harmed = true
}

// alias returns what the link of an endpoint says.
func (h *history) alias(e *attached) alias {
	says, err := e.checkedAlias()
	if err != nil {
		h.t.Fatal(err)
	}
	return says
}

// changeAlias writes another text into the alias of a link, which nobody of us changes then, and takes it away or back
// after a round.
func (h *history) changeAlias() {
	e := h.some(func(e *attached) bool { return len(e.asked) == 0 }) // a round forgets the ports of a link that is not ours
	if e == nil {
		return
	}
	link := hostEndOf(e.Owner)
	h.ip("link set " + link + " alias 'the uplink of rack 7'")
	if err := h.Do(func() error { _, err := h.Reconcile(h.t.Context()); return err }); err != nil {
		h.t.Fatalf("a round beside a changed alias: %v", err)
	}
	if err := h.detach(e.Owner); err != nil {
		h.t.Fatalf("detach beside a changed alias: %v", err)
	}
	if !h.try("ip link show " + link) {
		h.t.Fatalf("%s was deleted, whose alias is somebody's", link)
	}
	h.heal()
	if random.Evenly("delete", "restore").Draw(h.t, "then") == "delete" {
		h.ip("link del " + link)
		delete(h.endpoints, e.Owner)
		return
	}
	h.ip("link set " + link + " alias '" + h.alias(e).String() + "'")
	h.harmed = true
}

// loseHostFile removes or damages host.json.
func (h *history) loseHostFile() {
	for _, e := range h.endpoints {
		if e.bare {
			return
		}
	}
	table := random.Evenly("the table", "the table", "no table").Draw(h.t, "with")
	if table == "no table" {
		h.try("nft delete table ip azure_vnet")
	}
	var lines []string
	for _, harm := range hostHarms {
		if strings.Contains(harm.line, "host.json") {
			lines = append(lines, harm.line)
		}
	}
	boot, err := statefile.BootID()
	if err != nil {
		h.t.Fatal(err)
	}
	line := strings.NewReplacer("BOOT", boot, "NIC", h.MAC).Replace(random.Evenly(lines...).Draw(h.t, "harm"))
	h.harm(line, h.some(func(*attached) bool { return true }))
	h.loseFile(table == "the table")
}

// otherLink makes a link of others for a moment, with the name of a host end. No call and no round changes it.
func (h *history) otherLink() {
	e, nic, mode := h.wish()
	name := hostEndOf(e.Owner)
	if h.harmed || h.endpoints[e.Owner] != nil || !h.try("ip link add "+name+" type veth peer name up0") { // as links of Azure's own plugin are
		return // the owner has a link, or a call that died has left one
	}
	h.staysAsItIs(name, func() {
		bridge, _ := h.prepare(nic, mode)
		e.Bridge = bridge
		if _, err := h.host.attach(e); err == nil || !strings.Contains(err.Error(), "is there") && !strings.Contains(err.Error(), "exists that is not ours") && !isInUse(err) {
			h.t.Fatalf("attach beside another's link %s: %v", name, err)
		}
		h.end(e.Owner)
	})
}

// otherAlias makes a link of others for a moment, with the alias of a host end. No round changes it.
func (h *history) otherAlias() {
	if e := h.some(func(*attached) bool { return true }); e != nil {
		h.ip("link add up1 type veth peer name up0", "link set up1 alias '"+h.alias(e).String()+"'")
		h.staysAsItIs("up1", h.compareLinks)
	}
}

// staysAsItIs does something and a round beside a link of others, looks whether the link is as it was, and deletes it.
func (h *history) staysAsItIs(name string, do func()) {
	look := func() string { return passing.ReplaceAllString(h.sh("ip -d link show "+name), "") }
	was := look()
	do()
	if err := h.Do(func() error { _, err := h.Reconcile(h.t.Context()); return err }); err != nil {
		h.t.Fatal(err)
	}
	if is := look(); is != was {
		h.t.Fatalf("another's link was changed: it was %s and is %s", was, is)
	}
	h.ip("link del " + name)
}
