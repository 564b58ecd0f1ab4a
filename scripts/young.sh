#!/bin/sh
# young.sh: run a command with a boot clock that stands at one second.
# Copyright (c) The azure-vnet authors. MIT licence.
#
#   go test -exec "$PWD/scripts/young.sh" ./pool
#
# The command sees a machine that has just booted: CLOCK_BOOTTIME and /proc/uptime
# are those of a new time namespace. Then AZURE_VNET_YOUNG is "yes". If this machine
# cannot do that, the command runs with the machine's own clock, and
# AZURE_VNET_YOUNG gives the reason.
set -eu

# The kernel counts the offset from the first time namespace, and not from the
# one that this script may run in.
offset=$(awk -v age=1 '
	FILENAME == "/proc/self/timens_offsets" && $1 == "boottime" { own = $2 }
	FILENAME == "/proc/uptime" { print own + age - int($1) }
' /proc/self/timens_offsets /proc/uptime 2>/dev/null) || offset=
if [ -z "$offset" ]; then
	reason='this kernel has no time namespaces'
elif ! reason=$(unshare --time --fork --boottime="$offset" true 2>&1); then
	reason="no time namespace can be made: $reason"
else
	# QUIT, which go test sends to a test that hangs, makes Go print its stacks.
	AZURE_VNET_YOUNG=yes exec unshare --time --fork --kill-child=QUIT --boottime="$offset" "$@"
fi
AZURE_VNET_YOUNG=$reason exec "$@"
