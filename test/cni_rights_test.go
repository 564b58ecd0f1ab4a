// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"strings"
	"testing"

	"azurevnet/internal/vnetsim"
)

// lacks is a way to start the plugins so that ADD lacks something, and the words that each plugin says then. A plugin that
// does not need what is lacking says nothing.
type lacks struct{ name, as, main, ipam string }

const (
	noRight  = "without CAP_NET_ADMIN over the host's network"
	noNIC    = "must run in the host's own network namespace"
	plain    = "run the container runtime as root of the host"
	noState  = "give it a file system that can be written to and has room"
	stateDir = "the state in /run/azure-vnet cannot be written"
)

// TestSTATUSFailsWhereADDWouldForWantOfARight starts the plugins as rootless podman does, as a plain user, and where the
// state cannot be written. STATUS says what is missing and what to do, with code 50. ADD fails too, and nothing is held after
// it. Where ADD succeeds, so does STATUS.
func TestSTATUSFailsWhereADDWouldForWantOfARight(t *testing.T) {
	t.Parallel()
	_, vms := newVNet(t, vnetsim.VMConfig{Secondaries: 3}, vnetsim.VMConfig{Secondaries: 3})
	for i, host := range []string{"on a host that was never used", "on a host that has a container"} {
		t.Run(host, func(t *testing.T) {
			n := onNode(vms[i].in(t))
			if i > 0 {
				n.add(n.list("1.1.0", "azure", azure()), n.pod("there"))
			}
			n.must("ip", "netns", "add", "pod")
			n.must("sh", "-c", "mkdir -p /run/rights && cp $0/azure-vnet* /run/rights && chmod 755 /run /run/rights", n.dir)
			for _, c := range []lacks{
				{"root of the host", "", "", ""},
				{"a user namespace", "unshare -Ur", noRight, ""},
				{"a user namespace with a network of its own", "unshare -Urn", noNIC, ""},
				{"a network of its own", "unshare -n", noNIC, ""},
				{"a plain user", "setpriv --reuid 65534 --regid 65534 --clear-groups", plain, plain},
				{"a user namespace of a plain user", "setpriv --reuid 65534 --regid 65534 --clear-groups unshare -Ur", plain, plain},
				{"root without CAP_NET_ADMIN", "setpriv --inh-caps=-net_admin --bounding-set=-net_admin", noRight, ""},
				{"a read-only state", `unshare -m sh -c 'mkdir -p /run/azure-vnet && mount --bind /run/azure-vnet /run/azure-vnet && mount -o remount,bind,ro /run/azure-vnet && exec "$@"' sh`, noState, noState},
				{"a full state", `unshare -m sh -c 'mkdir -p /run/azure-vnet && mount -t tmpfs -o size=8k tmpfs /run/azure-vnet && mkdir /run/azure-vnet/calls; cat /dev/zero 2>/dev/null >/run/azure-vnet/full; exec "$@"' sh`, noState, noState},
			} {
				t.Run(c.name, func(t *testing.T) { c.check(n.in(t)) })
			}
		})
	}
}

func (c lacks) check(n node) {
	n.t.Helper()
	conf := stdin("1.1.0", "azure", azure(), nil)
	before := n.holds()
	for plugin, words := range map[string]string{"azure-vnet": c.main, "azure-vnet-ipam": c.ipam} {
		const as = "/run/rights/as"
		n.must("sh", "-c", `printf '#!/bin/sh\nexec %s /run/rights/%s\n' "$0" "$1" >"$2" && chmod 755 "$2"`, c.as, plugin, as)
		out, _, err := n.plugin(n.t.Context(), as, conf, n.environ("STATUS", "", ""))
		if (err == nil) != (words == "") || err != nil && !says(err, 50, words) {
			n.t.Errorf("%s STATUS: %s %v", plugin, out, err)
		}
		if words != "" && words != noRight && words != noNIC && !strings.Contains(err.Error(), stateDir) {
			n.t.Errorf("%s STATUS does not name the directory: %v", plugin, err)
		}
		out, _, bad := n.plugin(n.t.Context(), as, conf, n.environ("ADD", "pod", "/run/netns/pod"))
		if (bad == nil) != (err == nil) {
			n.t.Errorf("%s STATUS says %v, and ADD says %s %v", plugin, err, out, bad)
		}
		if words == noRight && !says(bad, 50, words) {
			n.t.Errorf("%s ADD: %s %v", plugin, out, bad)
		}
		if out, _, err := n.plugin(n.t.Context(), "/run/rights/"+plugin, conf, n.environ("DEL", "pod", "/run/netns/pod")); err != nil {
			n.t.Errorf("%s DEL: %s %v", plugin, out, err)
		}
	}
	if after := n.holds(); len(after.Leases) != len(before.Leases) || len(after.Attachments) != len(before.Attachments) {
		n.t.Errorf("it held %+v, and holds %+v", before, after)
	}
	if left, err := n.try("sh", "-c", "ls /run/azure-vnet/calls/*-status"); err == nil {
		n.t.Errorf("STATUS left %s", left)
	}
}
