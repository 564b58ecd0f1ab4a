// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"strings"
	"testing"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
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
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 3}, vnetsim.VMConfig{Secondaries: 3})
	for i, host := range []string{"on a host that was never used", "on a host that has a container"} {
		t.Run(host, func(t *testing.T) {
			n := test.OnNode(vms[i].In(t))
			if i > 0 {
				n.Add(n.List("1.1.0", "azure", test.Azure()), n.Pod("there"))
			}
			n.Must("ip", "netns", "add", "pod")
			n.Must("sh", "-c", "mkdir -p /run/rights && cp $0/azure-vnet* /run/rights && chmod 755 /run /run/rights", n.Dir)
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
				t.Run(c.name, func(t *testing.T) { c.check(n.In(t)) })
			}
		})
	}
}

func (c lacks) check(n test.Node) {
	n.T.Helper()
	conf := test.Stdin("1.1.0", "azure", test.Azure(), nil)
	before := n.Holds()
	for plugin, words := range map[string]string{"azure-vnet": c.main, "azure-vnet-ipam": c.ipam} {
		const as = "/run/rights/as"
		n.Must("sh", "-c", `printf '#!/bin/sh\nexec %s /run/rights/%s\n' "$0" "$1" >"$2" && chmod 755 "$2"`, c.as, plugin, as)
		out, _, err := n.Plugin(n.T.Context(), as, conf, n.Environ("STATUS", "", ""))
		if (err == nil) != (words == "") || err != nil && !test.Says(err, 50, words) {
			n.T.Errorf("%s STATUS: %s %v", plugin, out, err)
		}
		if words != "" && words != noRight && words != noNIC && !strings.Contains(err.Error(), stateDir) {
			n.T.Errorf("%s STATUS does not name the directory: %v", plugin, err)
		}
		out, _, bad := n.Plugin(n.T.Context(), as, conf, n.Environ("ADD", "pod", "/run/netns/pod"))
		if (bad == nil) != (err == nil) {
			n.T.Errorf("%s STATUS says %v, and ADD says %s %v", plugin, err, out, bad)
		}
		if words == noRight && !test.Says(bad, 50, words) {
			n.T.Errorf("%s ADD: %s %v", plugin, out, bad)
		}
		if out, _, err := n.Plugin(n.T.Context(), "/run/rights/"+plugin, conf, n.Environ("DEL", "pod", "/run/netns/pod")); err != nil {
			n.T.Errorf("%s DEL: %s %v", plugin, out, err)
		}
	}
	if after := n.Holds(); len(after.Leases) != len(before.Leases) || len(after.Attachments) != len(before.Attachments) {
		n.T.Errorf("it held %+v, and holds %+v", before, after)
	}
	if left, err := n.Try("sh", "-c", "ls /run/azure-vnet/calls/*-status"); err == nil {
		n.T.Errorf("STATUS left %s", left)
	}
}
