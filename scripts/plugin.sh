#!/bin/sh
# plugin.sh: create, install, push or uninstall the managed plugin in this machine's engine.
# Copyright (c) The azure-vnet authors. MIT licence.
#
#   plugin.sh create <plugin>                    makes azure-vnet:latest, disabled
#   plugin.sh install <plugin> <binary> <prefix> the same, and enables it; installs the tool and the cloud-init drop-in
#   plugin.sh push <plugin> <host:port/name:tag> pushes it to a registry, through the engine
#   plugin.sh uninstall <binary> <prefix>        removes everything that install made
#
# <plugin> is a directory with config.json and rootfs/. A plugin that exists
# already is replaced, and keeps its networks and settings.
set -eu

name=azure-vnet:latest
drop_in=/etc/cloud/cloud.cfg.d/90-azure-vnet.cfg
cni_installed=/var/lib/azure-vnet/cni.installed # the CNI package's installer writes it

die() { echo "plugin.sh: $*" >&2; exit 1; }
engine() { docker version >/dev/null 2>&1 || die "no engine answers docker version: is it running, and are you root?"; }
id() { docker plugin inspect -f '{{.Id}}' $name 2>/dev/null; }
# where the engine keeps the plugin's networks.json; docker plugin rm removes it
data() { echo "$(docker info -f '{{.DockerRootDir}}')/plugins/$1/propagated-mount"; }

# untaken refuses a host whose NIC is in a bridge that is no bridge of this release: of
# an earlier build, or of somebody else's azure-vnet. Its containers would be cut off.
untaken() {
	for port in /sys/class/net/*; do
		nic=${port##*/}
		case $nic in
		azv*) continue ;; # a container's
		esac
		[ -d "$port/master/bridge" ] || continue
		bridge=$(basename "$(readlink -f "$port/master")")
		case $bridge:$(cat "$port/master/ifalias") in
		*:"azv2 bridge"*) ;; # this release's, which has no NIC
		*:"azv1 bridge"*)
			die "the NIC is a port of a bridge: $nic is in $bridge, where an earlier build of azure-vnet put it. Nothing was changed, and the containers that run keep their network. Drain this VM. Then run that build's own uninstall; or disable that build (docker plugin disable -f azure-vnet:latest, or remove its conflist) and reboot" ;;
		azure*)
			die "the NIC is a port of a bridge: $nic is in $bridge, a bridge that is not ours, such as an older azure-vnet's. Nothing was changed. Drain this VM and reboot it without whatever makes $bridge" ;;
		esac
	done
	no_namesake
}

# no_namesake refuses a host on which an older azure-vnet left its bridge, whose name
# ours would have.
no_namesake() {
	azure0=/sys/class/net/azure0
	[ -d $azure0/bridge ] || return 0
	case $(cat $azure0/netdev_group):$(cat $azure0/ifalias) in
	16862:* | *:"azv1 bridge"* | *:"azv2 bridge"*) return 0 ;; # ours, or of an earlier build of ours
	esac
	refusal="the bridge's name is another link's: azure0 is a bridge that is not ours. Nothing was changed."
	[ -z "$(ls $azure0/brif)$(ip -4 -o addr show dev azure0)" ] ||
		die "$refusal It has ports or addresses: drain this VM and reboot it without whatever makes azure0"
	die "$refusal It has no port and no address, such as one that an older azure-vnet left behind: ip link del azure0"
}

create() { # <plugin>
	if ! old=$(id); then
		docker plugin create $name "$1" >/dev/null
		return
	fi
	[ "$(docker plugin inspect -f '{{.Enabled}}' $name)" = false ] || die "$name is enabled: docker plugin disable -f $name, or make install"
	settings=$(docker plugin inspect -f '{{range .Settings.Env}}{{println .}}{{end}}' $name | grep -E '^(LOG_LEVEL|SOURCE|QUERY_URL|COOL_DOWN|RECLAIM)=' || true)
	saved=$(mktemp -d)
	[ ! -d "$(data "$old")" ] || cp -a "$(data "$old")/." "$saved/"
	# The networks are nowhere else meanwhile. The engine's client would catch a
	# signal that it is born to ignore, so it gets none.
	trap '' INT TERM HUP
	if ! {
		setsid docker plugin rm -f $name >/dev/null && # networks of its hold it
			setsid docker plugin create $name "$1" >/dev/null &&
			new=$(data "$(id)") && mkdir -p "$new" && cp -a "$saved/." "$new/"
	}; then
		die "not done: the networks of the plugin that was replaced are in $saved, and belong into ${new:-the propagated-mount of the new one}"
	fi
	rm -rf "$saved"
	trap - INT TERM HUP
	# shellcheck disable=SC2086 # no value has spaces
	[ -z "$settings" ] || docker plugin set $name $settings
}

install() { # <plugin> <binary> <prefix>
	untaken
	# Before anything is changed: /usr/local is read-only on some systems, such as Flatcar.
	staged=$3/sbin/.azure-vnet-plugin.new
	{ mkdir -p "$3/sbin" && cp "$2" "$staged"; } ||
		die "the tool azure-vnet-plugin cannot be put into $3/sbin. Nothing was changed. Name a directory that can be written: make install PREFIX=/opt/azure-vnet"
	if [ -d "$(dirname $drop_in)" ] && ! [ -w "$(dirname $drop_in)" ]; then
		rm -f "$staged"
		die "$(dirname $drop_in) cannot be written, and cloud-init's drop-in belongs there. Nothing was changed."
	fi
	if [ "$(docker plugin inspect -f '{{.Enabled}}' $name 2>/dev/null)" = true ]; then
		trap 'docker plugin enable $name >/dev/null 2>&1 || true' EXIT # whatever fails from here on
		docker plugin disable -f $name >/dev/null                      # containers keep their network meanwhile
	fi
	create "$1"
	if [ -d "$(dirname $drop_in)" ]; then
		cat >$drop_in <<-'YAML'
			# From azure-vnet: containers hold the secondary addresses, so the host must not.
			datasource:
			  Azure:
			    apply_network_config_for_secondary_ips: false
		YAML
	fi
	mv "$staged" "$3/sbin/azure-vnet-plugin"
	docker plugin enable $name >/dev/null
	echo "$name is enabled"
}

push() { # <plugin> <reference>
	docker plugin rm "$2" >/dev/null 2>&1 || true # of a push that was broken off; one that is installed, it leaves
	docker plugin create "$2" "$1" >/dev/null
	docker plugin push "$2" || { docker plugin rm "$2" >/dev/null; die "$2 is not pushed"; }
	docker plugin rm "$2" >/dev/null
}

uninstall() { # <binary> <prefix>
	tool=$2/sbin/azure-vnet-plugin
	[ -x "$tool" ] || tool=$1
	networks=$(docker network ls -q --filter driver=$name)
	# shellcheck disable=SC2086 # a list of words
	[ -z "$networks" ] || die "these networks use it, remove them first: docker network rm" $networks
	was=$(docker plugin inspect -f '{{.Enabled}}' $name 2>/dev/null || true)
	docker plugin disable -f $name >/dev/null 2>&1 || true # it is disabled already, or not there
	if [ -e "$cni_installed" ]; then
		echo "the CNI package stays, and with it the network that it uses: install-cni-plugin.sh --uninstall"
	else
		kept=/var/lib/azure-vnet # without the plugin there is no networks.json to be sought
		! now=$(id) || kept=$(data "$now")
		[ ! -x "$tool" ] || "$tool" uninstall -data "$kept" || {
			[ "$was" != true ] || docker plugin enable $name >/dev/null
			die "nothing was removed"
		}
		rm -f "$drop_in"
	fi
	! id >/dev/null || docker plugin rm -f $name >/dev/null
	rm -f "$2/sbin/azure-vnet-plugin"
}

word=$1
shift
engine
case $word in
create) create "$@" && echo "$name is there: docker plugin enable $name" ;;
install) install "$@" ;;
push) push "$@" ;;
uninstall) uninstall "$@" ;;
*) die "unknown word $word" ;;
esac
