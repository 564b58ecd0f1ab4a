#!/bin/sh
# docker-del.sh: remove a container that docker-run.sh made, and give its address back.
# Copyright (c) The azure-vnet authors. MIT licence.
#
#   docker-del.sh <container-name> <container-namespace>
#
# It needs no other file. It succeeds if there is no such container.
#
# Exit status: 0 it is gone, 1 the engine or CNI failed: run it again, 2 wrong usage, 7 no engine answers
set -euf

installed=/var/lib/azure-vnet/cni.installed # what install-cni-plugin.sh put where

die() { status=$1; shift; echo "docker-del.sh: $*" >&2; exit "$status"; }

# made lists what docker-run.sh made of a role.
made() {
	docker ps -aq --no-trunc --filter "label=azure-vnet.role=$1" \
		--filter "label=azure-vnet.name=$name" --filter "label=azure-vnet.namespace=$namespace"
}

# recorded prints the first place of a file that was installed and is there
# still: an upgrade of an old k3s takes a directory away.
recorded() { # -x | -f <file>
	sed -n "s|^[0-9a-f]*  \(/.*/$2\)\$|\1|p" $installed 2>/dev/null | while IFS= read -r path; do
		! test "$1" "$path" || { echo "$path"; break; }
	done
}

# detach gives the address back; the holder's namespace is there or not. Without
# the CNI package no address is lent: its uninstaller refuses before.
detach() { # <holder>
	cni=$(recorded -x azure-vnet)
	conflist=$(recorded -f 10-azure.conflist)
	cni=${cni:-/opt/cni/bin/azure-vnet}
	[ -f $installed ] || [ -e "$cni" ] || return 0
	[ -x "$cni" ] || die 1 "azure-vnet, which gives the address back, is at no place where it was installed: install-cni-plugin.sh puts it there again"
	pid=$(docker inspect -f '{{.State.Pid}}' "$1")
	netns=
	[ "$pid" = 0 ] || netns=/proc/$pid/ns/net
	"$cni" detach "${conflist:-/etc/cni/net.d/10-azure.conflist}" "$1" "$netns" >&2
}

[ $# -eq 2 ] || die 2 "usage: docker-del.sh <container-name> <container-namespace>"
name=$1 namespace=$2
docker version >/dev/null 2>&1 || die 7 "no engine answers docker version: is it running, and are you root?"
containers=$(made container)
holders=$(made holder)
[ -n "$containers$holders" ] || echo "docker-del.sh: there is no $name in $namespace that docker-run.sh made" >&2
# The container before the network it uses, the network before its holder.
for id in $containers; do
	docker rm -fv "$id" >/dev/null || die 1 "$name is still there"
done
for id in $holders; do
	detach "$id" || die 1 "the address of $name is still lent: run it again"
	docker rm -fv "$id" >/dev/null || die 1 "the holder of $name is still there"
done
# The image goes with the last of them.
[ -z "$holders" ] || docker image prune -af --filter label=azure-vnet.role=holder >/dev/null 2>&1 || true
