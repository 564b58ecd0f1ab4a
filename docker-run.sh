#!/bin/sh
# docker-run.sh: run a Docker container with its own address of the Azure virtual network.
# Copyright (c) The azure-vnet authors. MIT licence.
#
#   docker-run.sh <container-name> <container-namespace> <image> [command…]
#
# It needs no other file. It prints the container's address to stdout, and nothing else.
# docker-del.sh <container-name> <container-namespace> removes the container.
#
# If the managed plugin azure-vnet:latest is enabled, the container joins the
# network "azure". The script makes this network if it is missing. Other containers
# find the container there as <container-name>.<container-namespace>.
#
# If not, the script uses the CNI package (install-cni-plugin.sh). A small container
# holds the network namespace. The whole conflist runs on it, and then the image
# joins it. The network outlives docker restart. It does not outlive a reboot or a
# restart of the engine: then run docker-del.sh and this script again.
#
# A command that ends within a second has failed: the script shows its last lines,
# and removes the container.
#
#   DOCKER_RUN_ARGS='-e KEY=value -v /a:/b'   further options of docker run, separated by blanks
#
# Exit status. After a failure nothing is left behind, with one exception: a holder
# whose address CNI did not take back. docker-del.sh removes it.
#   0 it runs              3 the name is taken         6 the command does not start, or ended at once
#   1 the engine failed    4 there is no such image    7 no engine answers, or neither plugin nor CNI
#   2 wrong usage          5 no network or no address  128+n ended by signal n, such as 130 by Ctrl-C
set -euf

plugin=azure-vnet:latest
network=azure
holder_image=azure-vnet-holder:latest
installed=/var/lib/azure-vnet/cni.installed # what install-cni-plugin.sh put where

say() { echo "docker-run.sh: $*" >&2 || true; } # a terminal that hung up must not stop cleanup
die() { status=$1; shift; say "$*"; exit "$status"; }

# reason prints the cause from the output of a command that failed. It leaves out the container's id, log lines, and
# the names of the programs that passed the error on.
reason() { # <text>
	printf '%s\n' "$1" | sed -E '/^[0-9a-f]{64}$/d; /^WARNING: /d; /^(See|Run) .docker run --help/d; /^$/d
		s/^(docker|azure-vnet): //; s/^Error response from daemon: //; s/^failed to set up container networking: //
		s/^failed to create endpoint [^ ]+ on network [^ ]+: //; s/^(Ipam|Network)Driver\.[A-Za-z]+: //
		s/^plugin type="[^"]*" failed \([a-z]+\): //; s/^lease for [^ ]+: //; s/^.*unable to start container process: //
		s/\.$//; /^time=/d'
}

# whole runs a command that no signal of the terminal can cut in two: what it
# began, the engine would go on with, and nobody would know of it. Use it in
# $(…), whose shell then ignores the signals too. A session of its own, for the
# engine's client and azure-vnet would catch a signal that they are born to ignore.
whole() {
	trap '' INT TERM HUP
	setsid "$@"
}

run=      # labels what this run makes; empty: nothing yet
pulling=  # process that pulls
attached= # holder that CNI was run on
netns=
tarball=  # of the holder's image, while that is made

cleanup() {
	status=$?
	trap '' INT TERM HUP
	trap - EXIT
	set +e
	[ -z "$pulling" ] || kill "$pulling" 2>/dev/null
	[ -z "$tarball" ] || rm -f "$tarball"
	[ "$status" != 0 ] || exit 0
	if [ -n "$run" ]; then
		# The container before the network it uses, the network before its holder.
		remove container
		if [ -z "$attached" ] || whole "$cni" detach "$conflist" "$attached" "$netns" >&2; then
			remove holder
		else
			say "the address is still lent, and $name.holder stays for it: docker-del.sh $name $namespace"
		fi
		for id in $(whole docker network ls -q --filter "label=azure-vnet.run=$run"); do
			whole docker network rm "$id" >/dev/null 2>&1 # another run uses it by now
		done
		# Unless another holder uses it: one that does not start must not meet the next run.
		[ -z "${cni:-}" ] || whole docker image prune -af --filter label=azure-vnet.role=holder >/dev/null 2>&1
	fi
	exit "$status"
}

remove() { # <role>
	ids=$(whole docker ps -aq --no-trunc --filter "label=azure-vnet.run=$run" --filter "label=azure-vnet.role=$1") ||
		say "the engine does not tell what is left: docker-del.sh $name $namespace"
	for id in $ids; do
		whole docker rm -fv "$id" >/dev/null || say "the container $id is not removed: docker rm -f $id"
	done
}

# free ends the script where a container has that very name.
free() { # <container>
	[ -n "$(docker ps -aq --filter "name=^/$(echo "$1" | sed 's/\./\\./g')\$")" ] || return 0
	remedy=$(docker container inspect -f '{{with .Config.Labels}}{{with index . "azure-vnet.namespace"}}docker-del.sh {{index $.Config.Labels "azure-vnet.name"}} {{.}}{{end}}{{end}}' "$1" || true)
	die 3 "the name $1 is taken: ${remedy:-docker rm $1}"
}

pull() {
	docker image inspect "$image" >/dev/null 2>&1 && return
	say "pulling $image"
	docker pull "$image" >&2 &
	pulling=$!
	wait "$pulling" || die 4 "there is no image $image here, and it cannot be pulled"
	pulling=
}

managed() { [ "$(docker plugin inspect -f '{{.Enabled}}' $plugin 2>/dev/null)" = true ]; }

# ensure_network makes the network of the plugin. An engine before 27 wants to
# be told the subnet: the plugin's error names it.
ensure_network() {
	driver=$(docker network inspect -f '{{.Driver}}' $network 2>/dev/null || true)
	case $driver in
	"$plugin") return ;;
	'') ;;
	*) die 5 "there is a network $network that is not $plugin's but $driver's: remove it or give it another name" ;;
	esac
	subnet=
	while ! out=$(create_network); do
		[ "$(docker network inspect -f '{{.Driver}}' $network 2>/dev/null)" != "$plugin" ] || return 0 # another run was faster
		again=$(echo "$out" | sed -n 's|.*pass --subnet \([0-9.]*/[0-9]*\).*|\1|p' | head -n 1)
		case $subnet,$again in
		,?*) subnet=$again ;;
		*) die 5 "$(reason "$out"): the network $network is not made" ;;
		esac
	done
}

create_network() {
	whole docker network create -d $plugin --ipam-driver $plugin --label "azure-vnet.run=$run" ${subnet:+--subnet "$subnet"} $network 2>&1
}

# start runs the container with further options before those of DOCKER_RUN_ARGS.
start() {
	# shellcheck disable=SC2086 # a list of words
	whole docker run -d --name "$name" --label azure-vnet.role=container $labels "$@" 2>&1
}

# find_cni finds the CNI package, where its installer or a hand put it.
find_cni() {
	[ "$(id -u)" = 0 ] || die 7 "the plugin $plugin is not enabled, and running CNI needs root: use sudo"
	cni=$(recorded -x azure-vnet)
	conflist=$(recorded -f 10-azure.conflist)
	cni=${cni:-/opt/cni/bin/azure-vnet}
	conflist=${conflist:-/etc/cni/net.d/10-azure.conflist}
	if [ ! -x "$cni" ] || [ ! -f "$conflist" ]; then
		die 7 "neither the plugin nor the CNI package is there: docker plugin enable $plugin, or install-cni-plugin.sh"
	fi
}

# recorded prints the first place of a file that was installed and is there
# still: an upgrade of an old k3s takes a directory away.
recorded() { # -x | -f <file>
	sed -n "s|^[0-9a-f]*  \(/.*/$2\)\$|\1|p" $installed 2>/dev/null | while IFS= read -r path; do
		! test "$1" "$path" || { echo "$path"; break; }
	done
}

# hold starts the container that keeps the network, of an image that is the CNI
# binary and nothing else: a registry may be out of reach.
hold() {
	free "$name.holder"
	until
		docker image inspect $holder_image >/dev/null 2>&1 || make_holder_image
		# shellcheck disable=SC2086 # a list of words
		holder=$(whole docker run -d --pull never --name "$name.holder" --hostname "$name" --network none --label azure-vnet.role=holder $labels $holder_image 2>&1)
	do
		case $holder in
		*"o such image"*) continue ;; # it was the last holder's, which was removed meanwhile
		*"is already in use by container"*) free "$name.holder" ;; # another run was faster
		esac
		die 1 "$(reason "$holder"): the holder of the network does not start"
	done
	holder=$(printf '%s\n' "$holder" | sed -n '/^[0-9a-f]\{64\}$/p') # the client may say more, before and after the id
	pid=$(docker inspect -f '{{.State.Pid}}' "$holder")
	[ "$pid" != 0 ] || die 1 "the holder of the network ended at once: $(docker logs "$holder" 2>&1 | tail -n 3)"
	netns=/proc/$pid/ns/net
}

# make_holder_image imports a file that is whole: of a pipe that breaks, the
# engine would make an image that starts nothing, for this run and all others.
make_holder_image() {
	tarball=$(whole mktemp)
	tar -C "$(dirname "$cni")" -cf "$tarball" azure-vnet || die 1 "the image of the holder cannot be made in $tarball"
	out=$(whole docker import --change 'ENTRYPOINT ["/azure-vnet","hold"]' --change 'LABEL azure-vnet.role=holder' - $holder_image <"$tarball" 2>&1) ||
		die 1 "$(reason "$out"): the image of the holder is not made"
	rm -f "$tarball"
	tarball=
}

# failed ends with the status that a failed docker run means.
failed() { # <status> <text>
	case $1:$2 in
	126:* | 127:*) die 6 "$(reason "$2"): the command does not start" ;;
	*"is already in use by container"*) free "$name" ;;
	*IpamDriver* | *NetworkDriver*) die 5 "$(reason "$2")" ;;
	esac
	die 1 "$(reason "$2")"
}

[ $# -ge 3 ] || die 2 "a name, a namespace and an image are needed: docker-run.sh <container-name> <container-namespace> <image> [command…]"
name=$1 namespace=$2 image=$3
shift 3
for word in "$name" "$namespace"; do
	case $word in
	[!A-Za-z0-9]* | *[!A-Za-z0-9_.-]* | '') die 2 "${word:-''} is not a name that Docker takes: it begins with a letter or digit, and has letters, digits, dots, dashes and underscores" ;;
	esac
done
case $image in
-* | '') die 2 "${image:-''} is not the name of an image: options of docker run go into DOCKER_RUN_ARGS" ;;
esac
command -v docker >/dev/null || die 7 "there is no docker command"
# A second signal finds the first one's work protected from its start.
trap "trap '' INT TERM HUP; exit 130" INT
trap "trap '' INT TERM HUP; exit 143" TERM
trap "trap '' INT TERM HUP; exit 129" HUP
trap cleanup EXIT
docker version >/dev/null 2>&1 || die 7 "no engine answers docker version: is it running, and are you root?"
free "$name"
managed || find_cni
pull

run=$(cat /proc/sys/kernel/random/uuid)
labels="--label azure-vnet.run=$run --label azure-vnet.name=$name --label azure-vnet.namespace=$namespace"
# shellcheck disable=SC2086 # options of docker run
if [ -z "${cni:-}" ]; then
	ensure_network
	out=$(start --network $network --network-alias "$name.$namespace" ${DOCKER_RUN_ARGS:-} "$image" "$@") || failed $? "$out"
	address=$(docker inspect -f "{{with index .NetworkSettings.Networks \"$network\"}}{{.IPAddress}}{{end}}" "$name" 2>/dev/null) || address= # --rm, and it ended
else
	hold
	attached=$holder
	out=$(whole "$cni" attach -name "$name" -namespace "$namespace" "$conflist" "$holder" "$netns" 2>&1) || die 5 "$(reason "$out"): the container gets no address"
	address=$(printf '%s\n' "$out" | tail -n 1)
	out=$(start --network "container:$holder" ${DOCKER_RUN_ARGS:-} "$image" "$@") || failed $? "$out"
fi
sleep 1
if [ "$(docker inspect -f '{{.State.Running}} {{.State.Restarting}}' "$name" 2>/dev/null)" != "true false" ]; then
	! docker inspect "$name" >/dev/null 2>&1 || docker logs --tail 10 "$name" >&2 2>&1 || true # --rm took them
	die 6 "the command ended at once$(docker inspect -f ', with status {{.State.ExitCode}}' "$name" 2>/dev/null)"
fi
[ -n "$address" ] || die 5 "the container is not on the network $network: is there a --network in DOCKER_RUN_ARGS?"
echo "$address"
