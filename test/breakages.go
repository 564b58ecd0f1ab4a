// Copyright (c) The azure-vnet authors. MIT licence.

package test

// Breakages are what somebody may do to the network of a host, as commands of a shell. azure-vnet mends all of it. A
// command succeeds also if a container that comes or goes just then has made or removed what it looks for.
var Breakages = map[string]string{
	"somebody flushes nft":        `nft flush ruleset`,
	"somebody flushes FORWARD":    `iptables -F FORWARD`,
	DeletesBridge:                 `ip link del azure0 || true`,
	"somebody flushes our routes": `ip route flush table all proto 168 || true`,
	"somebody flushes rules":      `ip rule del lookup 16863 || true`,
	"somebody flushes neighbours": `ip neigh flush nud permanent proto 168 || true`,
	"somebody takes a port out":   `for l in /sys/class/net/azure0/brif/*; do ip link set $(basename $l) nomaster; break; done; true`,
	"somebody turns sysctls off":  `sysctl -w net.ipv4.ip_forward=0`,
	"somebody changes eth0's MTU": `ip link set eth0 mtu $(shuf -i 1400-1499 -n 1)`,
}

// DeletesBridge is the one breakage during which a call may fail: it deletes the bridge that the call is about to use.
const DeletesBridge = "somebody deletes azure0"
