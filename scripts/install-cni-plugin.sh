#!/bin/sh
# install-cni-plugin.sh: install the CNI plugins that give pods addresses of the Azure virtual network.
# Copyright (c) The azure-vnet authors. MIT licence.
#
#   install-cni-plugin.sh [options] [<version> | <archive.tgz> | <directory> | --from-plugin]
#
#   (nothing)       the latest release
#   <version>       this release, such as v1.0.0
#   <archive.tgz>   a local archive, with the release's SHA256SUMS beside it
#   <directory>     the files in a directory, such as build/cni, where make cni puts them
#   --from-plugin   the files that the managed Docker plugin azure-vnet:latest carries
#   --uninstall     removes the files, and azure-vnet's bridges, routes and rules
#   --root <dir>    works on another file system, such as that of an image
#
#   RELEASES=<url>  the site of the releases; default: https://github.com/azure-vnet/azure-vnet/releases
#
# It needs a POSIX shell and, for a release, curl or wget. It needs no other file.
#
# It uses the directories that containerd or CRI-O are configured with (k3s and
# RKE2 too), else /opt/cni/bin and /etc/cni/net.d. Run it again to repair and to
# upgrade. It prepares all files beside their places, where a failure harms
# nothing, and then renames all of them. A file that another package wrote over
# one of its files belongs to that package: it is kept, and uninstall leaves it.
set -euf
umask 022

releases=${RELEASES:-https://github.com/azure-vnet/azure-vnet/releases}
plugin=azure-vnet:latest
programs="azure-vnet-ipam loopback portmap azure-vnet" # what calls others comes last
conflist=10-azure.conflist
state=/var/lib/azure-vnet
timer=azure-vnet-reconcile
wants=/etc/systemd/system/timers.target.wants
modules=/etc/modules-load.d/azure-vnet.conf # earlier releases needed br_netfilter, and put this there
tab=$(printf '\t')

say() { echo "install-cni-plugin.sh: $*"; }
warn() { echo "install-cni-plugin.sh: warning: $*" >&2; }
die() { echo "install-cni-plugin.sh: $*" >&2; exit 1; }

root=
scratch=
list=     # what was installed: lines <sha256>  <place>
staged=   # lines <place>, in the order in which they get there
renaming= # yes: some of them are there
made=     # directories that were made, deepest last
leaving=  # yes: the conflists are aside, for uninstall
running=  # yes: this is the system that runs

# --- where things are -------------------------------------------------------------

# setting prints the first value of a key in sections of TOML files, ours to read in
# part only: a string, or the first of a list that may go over lines. The files'
# names are on stdin.
setting() { # <section ends with> <key>
	while IFS= read -r file; do
		[ ! -f "$file" ] || awk -v section="$1" -v key="$2" -v quoted="\"[^\"]+\"|'[^']+'" '
			/^[ \t]*#/ { next }
			/^[ \t]*\[.*\][ \t]*$/ { inside = ($0 ~ section); next }
			!inside { next }
			$0 ~ "^[ \t]*" key "[ \t]*=" { sub(/^[^=]*=/, ""); within = 1 }
			!within { next }
			match($0, quoted) { print substr($0, RSTART + 1, RLENGTH - 2); exit }
			/\]/ || !/\[|^[ \t]*$/ { within = 0 }
		' "$file"
	done | tail -n 1 # a later file overrides
}

# matching prints the files of a pattern, for set -f. A blank in it parts nothing.
matching() { (set +f; IFS=; for file in $1; do [ ! -f "$file" ] || printf '%s\n' "$file"; done); }

# runtimes prints a line of <bin>, a tab and <net.d> for each runtime that is there.
runtimes() {
	for dir in /etc/containerd /var/lib/rancher/k3s/agent/etc/containerd /var/lib/rancher/rke2/agent/etc/containerd; do
		[ -d "$root$dir" ] || continue
		files=$(printf '%s\n' "$root$dir/config.toml" && matching "$root$dir/conf.d/*.toml")
		bin=$(printf '%s\n' "$files" | setting 'cni[]]' 'bin_dirs?')
		conf=$(printf '%s\n' "$files" | setting 'cni[]]' conf_dir)
		case $dir in
		*/k3s/*) k3s ;;
		esac
		printf '%s\t%s\n' "${bin:-/opt/cni/bin}" "${conf:-/etc/cni/net.d}"
	done
	if [ -d "$root/etc/crio" ]; then
		files=$(printf '%s\n' "$root/etc/crio/crio.conf" && matching "$root/etc/crio/crio.conf.d/*")
		bin=$(printf '%s\n' "$files" | setting 'crio[.]network[]]' 'plugin_dirs?')
		conf=$(printf '%s\n' "$files" | setting 'crio[.]network[]]' network_dir)
		printf '%s\t%s\n' "${bin:-/opt/cni/bin}" "${conf:-/etc/cni/net.d}"
	fi
}

# k3s has its own directories where its configuration does not say; that of its
# programs outlives an upgrade of k3s in newer releases only.
k3s() {
	conf=${conf:-/var/lib/rancher/k3s/agent/etc/cni/net.d}
	[ -z "$bin" ] || return 0
	bin=/var/lib/rancher/k3s/data/cni
	[ -d "$root$bin" ] || bin=/var/lib/rancher/k3s/data/current/bin
}

# unmanaged refuses a node of AKS: AKS replaces nodes, and their CNI with them.
unmanaged() {
	for file in /etc/default/kubelet /etc/systemd/system/kubelet.service /etc/kubernetes/azure.json; do
		[ ! -f "$root$file" ] || ! grep -qE 'kubernetes\.azure\.com/(node-image-version|mode|nodepool-type)=|kubernetes\.azure\.com/cluster=MC_|"resourceGroup": *"MC_' "$root$file" ||
			die "this is a node of AKS ($file says so), which brings its own CNI and replaces what is changed: azure-vnet is for clusters of your own; nothing was changed"
	done
	! grep -qsE '^aks-.*(vmss[0-9a-z]{6}|-[0-9]+-[0-9]+)$' "$root/etc/hostname" ||
		die "this is a node of AKS (by its host name), which brings its own CNI and replaces what is changed: azure-vnet is for clusters of your own; nothing was changed"
}

# untaken refuses a host whose NIC is in a bridge that is no bridge of this release: of
# an earlier build, or of somebody else's azure-vnet. Its containers would be cut off.
untaken() {
	for port in $(set +f; echo /sys/class/net/*); do
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

# --- the files --------------------------------------------------------------------

fetch() { # <url> <file>
	if command -v curl >/dev/null; then
		curl -fsSL --connect-timeout 20 --retry 2 -o "$2" "$1" || die "cannot fetch $1"
	elif command -v wget >/dev/null; then
		wget -q -T 20 -O "$2" "$1" || die "cannot fetch $1"
	else
		die "neither curl nor wget is here to fetch $1"
	fi
}

# verify compares a file with the line for it in SHA256SUMS.
verify() { # <file> <SHA256SUMS>
	name=$(basename "$1")
	want=$(sed -n "s/^\([0-9a-f]\{64\}\) [ *]$(echo "$name" | sed 's/\./\\./g')\$/\1/p" "$2" | head -n 1)
	[ -n "$want" ] || die "$2 has no line for $name"
	[ "$(sha256sum <"$1" | cut -d ' ' -f 1)" = "$want" ] || die "the checksum of $name is not that of SHA256SUMS: it is damaged, or not what was released"
}

architecture() {
	case $(uname -m) in
	x86_64 | amd64) echo amd64 ;;
	aarch64 | arm64) echo arm64 ;;
	*) die "there is no release for $(uname -m)" ;;
	esac
}

# get leaves the files of the package in $scratch/new.
get() { # <what>
	new=$scratch/new
	mkdir "$new"
	arch=$(architecture)
	case $1 in
	--from-plugin)
		id=$(docker plugin inspect -f '{{.Id}}' $plugin 2>/dev/null) || die "there is no Docker plugin $plugin"
		at=$(docker info -f '{{.DockerRootDir}}')/plugins/$id/rootfs/cni
		[ -d "$at" ] || die "the plugin $plugin carries no CNI files (in $at): upgrade it"
		copy "$at"
		;;
	*.tgz)
		[ -f "$1" ] || die "there is no file $1"
		[ -f "$(dirname "$1")/SHA256SUMS" ] || die "SHA256SUMS of the release must lie beside $1"
		verify "$1" "$(dirname "$1")/SHA256SUMS"
		tar -xzf "$1" -C "$new" || die "$1 cannot be unpacked"
		;;
	*/*) [ -d "$1" ] || die "there is no directory $1" && copy "$1" ;;
	*)
		from=$releases/latest/download
		[ -z "$1" ] || from=$releases/download/$1
		fetch "$from/SHA256SUMS" "$scratch/SHA256SUMS"
		archive=$(sed -n "s/^[0-9a-f]* [ *]\(azure-vnet-cni-linux-$arch-[A-Za-z0-9._-]*\.tgz\)\$/\1/p" "$scratch/SHA256SUMS" | head -n 1)
		[ -n "$archive" ] || die "$from/SHA256SUMS names no archive for linux-$arch"
		fetch "$from/$archive" "$scratch/$archive"
		verify "$scratch/$archive" "$scratch/SHA256SUMS"
		tar -xzf "$scratch/$archive" -C "$new" || die "$archive cannot be unpacked"
		;;
	esac
	for file in $programs $conflist; do
		[ -f "$new/$file" ] || die "the package has no $file"
	done
}

copy() { # <directory>
	for file in $programs $conflist; do
		cp "$1/$file" "$new/$file" || die "$1 is not the CNI package: make cni builds it"
	done
}

# --- putting them there -----------------------------------------------------------

# stage writes stdin to a place of its own beside where it will be.
stage() { # <mode> <path>
	make_dir "$(dirname "$2")"
	[ ! -d "$root$2" ] || die "$2 is a directory, and has to be a file; nothing was changed"
	if ! is_staged "$2"; then # else two runtimes have one directory
		staged="$staged$2
"
	fi
	if ! cat >"$root$2.azure-vnet-new" || ! chmod "$1" "$root$2.azure-vnet-new"; then
		die "$2 cannot be written; nothing was changed"
	fi
}

is_staged() { printf %s "$staged" | grep -qxF "$1"; }

make_dir() { # <path>
	[ ! -d "$root$1" ] || return 0
	make_dir "$(dirname "$1")"
	mkdir "$root$1" || die "$1 cannot be made; nothing was changed"
	made="$made$1
"
}

# ours tells whether a file is as this script installed it. changed: it was
# installed by it, and is another now.
ours() { [ -f "$root$1" ] && recorded "$1" | grep -qx "$(sum "$1")"; }
changed() { [ -f "$root$1" ] && [ -n "$(recorded "$1")" ] && ! ours "$1"; }
recorded() { [ ! -f "$list" ] || while read -r sum path; do [ "$path" != "$1" ] || echo "$sum"; done <"$list"; }
sum() { sha256sum <"$root$1" | cut -d ' ' -f 1; }

# others tells whether somebody else put a file there: nobody edits a program, but
# a package of programs replaces it.
others() {
	[ -f "$root$1" ] && ! ours "$1" || return 1
	case $1 in
	*/azure-vnet | */azure-vnet-ipam | */portmap | */loopback) ;;
	"$state"/*) return 1 ;;
	*) [ -z "$(recorded "$1")" ] ;;
	esac
}

# speaks tells whether a plugin that is there knows what our conflist may ask of it.
speaks() { [ -x "$1" ] && echo '{"cniVersion":"1.1.0"}' | CNI_COMMAND=VERSION "$1" 2>/dev/null | grep -q '"1\.1\.0"'; }

# warn_of_chained names the other plugins of the conflist that are missing, or do not speak a CNI
# version of the conflist. Such a plugin cannot tell its state. The node is then NotReady, and the
# runtime does not name the plugin.
warn_of_chained() { # <bin> <conflist>
	text=$(tr -d ' \t\n\r' <"$root$2")
	versions=$(printf '%s\n' "$text" | grep -oE '"cniVersions?":("[^"]*"|\[[^]]*\])' | grep -oE '[0-9]+(\.[0-9]+)+' | sort -u) || versions=
	printf '%s\n' "$text" | grep -oE '"type":"[^"/]*"' | cut -d '"' -f 4 | sort -u | while IFS= read -r type; do
		case $type in
		azure-vnet | azure-vnet-ipam) continue ;;
		esac
		if [ ! -x "$root$1/$type" ]; then
			warn "$2 names the plugin $type, and there is no $1/$type: no container starts until it is there"
			continue
		fi
		spoken=$(echo '{"cniVersion":"1.1.0"}' | CNI_COMMAND=VERSION "$root$1/$type" 2>/dev/null | tr -d ' \t\n\r' |
			grep -oE '"supportedVersions":\[[^]]*\]' | grep -oE '[0-9]+(\.[0-9]+)+') || continue # of another architecture, as in an image
		for version_asked in $versions; do
			printf '%s\n' "$spoken" | grep -qxF "$version_asked" ||
				warn "$2 asks the plugin $type for CNI $version_asked, which $1/$type does not speak: it speaks $(echo "$spoken" | tr '\n' ' '| sed 's/ $//'). A runtime that takes that version finds the node not ready, and does not name the plugin. Install a newer $type, or remove \"$version_asked\" from the file's cniVersions"
		done
	done
}

# put_package stages programs and conflist for one runtime.
put_package() { # <bin> <net.d>
	for file in $programs; do
		case $file in
		portmap | loopback) # also others'
			ours "$1/$file" || ! speaks "$root$1/$file" || continue ;;
		esac
		stage 755 "$1/$file" <"$new/$file"
	done
	# There, for programs may not run in a temporary directory.
	[ -z "$running" ] || version=$("$1/azure-vnet.azure-vnet-new" version) ||
		die "the package's azure-vnet does not run in $1: is it for another architecture, or is that mounted noexec? Nothing was changed"
	if changed "$2/$conflist"; then
		say "$2/$conflist was edited, and stays as it is"
	else
		stage 644 "$2/$conflist" <"$new/$conflist"
	fi
}

# alone refuses where a runtime would not take our conflist: it takes the first.
alone() { # <net.d>
	first=$({ echo "$root$1/$conflist" && matching "$root$1/*.conf" && matching "$root$1/*.conflist" && matching "$root$1/*.json"; } |
		sed 's|.*/||' | LC_ALL=C sort | head -n 1)
	[ "$first" = $conflist ] ||
		die "$1/$first comes before $conflist, and a runtime takes the first: remove it, or rename it to what sorts later, and run this again; nothing was changed"
}

put_host_files() {
	[ ! -d "$root/etc/cloud/cloud.cfg.d" ] || stage 644 /etc/cloud/cloud.cfg.d/90-azure-vnet.cfg <<-'YAML'
		# From azure-vnet: containers hold the secondary addresses, so the host must not.
		datasource:
		  Azure:
		    apply_network_config_for_secondary_ips: false
	YAML
	[ -d "$root/etc/systemd" ] || { say "there is no systemd: what breaks is healed when the next container starts"; return 0; }
	stage 644 /etc/systemd/system/$timer.service <<-UNIT
		[Unit]
		Description=Make the network of azure-vnet's containers as it should be

		[Service]
		Type=oneshot
		ExecStart="$1/azure-vnet" reconcile
	UNIT
	stage 644 /etc/systemd/system/$timer.timer <<-UNIT
		[Unit]
		Description=Look after the network of azure-vnet's containers

		[Timer]
		OnActiveSec=30s
		OnUnitActiveSec=30s
		AccuracySec=5s

		[Install]
		WantedBy=timers.target
	UNIT
	make_dir "$wants"
}

# record stages what uninstall will need: a sum for each file, and the directories
# that were made. A file that is ours has the sum of before too, for a crash may
# come before the new one is in its place.
record() {
	{
		printf %s "$staged" | while IFS= read -r path; do
			echo "$(sum "$path.azure-vnet-new")  $path"
			! ours "$path" || echo "$(sum "$path")  $path"
		done
		# What is not staged now, as in a directory of before, is still ours.
		[ ! -f "$list" ] || while read -r sum path; do
			is_staged "$path" || others "$path" || echo "$sum  $path"
		done <"$list"
	} | awk '!seen[$0]++' >"$scratch/installed"
	make_dir $state
	{ cat "$root$state/cni.made" 2>/dev/null || true; printf %s "$made"; } >"$scratch/made"
	# First: what a crash leaves, uninstall and the next run know of.
	staged="$state/cni.made
$state/cni.installed
$staged"
	stage 644 $state/cni.made <"$scratch/made"
	stage 644 $state/cni.installed <"$scratch/installed"
}

# commit renames all that is staged, or nothing: a signal waits, and undo puts the
# old files back. What others had there is kept beside.
commit() {
	trap '' INT TERM HUP
	printf %s "$staged" >"$scratch/staged"
	while IFS= read -r path; do
		at=$root$path
		rm -f "$at.azure-vnet-old"
		[ ! -f "$at" ] || cp -pP "$at" "$at.azure-vnet-old" || die "$path cannot be kept aside; nothing was changed"
		! others "$path" || [ "$(sum "$path")" = "$(sum "$path.azure-vnet-new")" ] || echo "$path"
	done <"$scratch/staged" >"$scratch/others"
	renaming=yes
	while IFS= read -r path; do
		at=$root$path
		! grep -qxF "$path" "$scratch/others" || mv -f "$at.azure-vnet-old" "$at.before-azure-vnet" || die "$path cannot be kept aside; nothing was changed"
		mv -f "$at.azure-vnet-new" "$at" || die "$path cannot be replaced; nothing was changed"
	done <"$scratch/staged"
	renaming=
	while IFS= read -r path; do rm -f "$root$path.azure-vnet-old"; done <"$scratch/staged"
	staged=
	made=
}

# undo takes back what is half done.
undo() {
	status=$?
	trap '' INT TERM HUP
	set +e
	printf %s "$staged" | while IFS= read -r path; do
		at=$root$path
		if [ -n "$renaming" ]; then
			if [ -f "$at.azure-vnet-old" ]; then
				mv -f "$at.azure-vnet-old" "$at"
			elif grep -qxF "$path" "$scratch/others"; then
				mv -f "$at.before-azure-vnet" "$at"
			else
				rm -f "$at"
			fi
		fi
		rm -f "$at.azure-vnet-new" "$at.azure-vnet-old"
	done
	printf %s "$made" | reversed | while IFS= read -r dir; do rmdir "$root$dir" 2>/dev/null; done
	[ -z "$leaving" ] || stay
	[ -z "$scratch" ] || rm -rf "$scratch"
	exit "$status"
}

reversed() { sed '1!G;h;$!d'; }

start_timer() {
	[ ! -d "$root/etc/systemd" ] || ln -sf ../$timer.timer "$root$wants/$timer.timer" # as systemctl enable does
	if [ -n "$running" ] && [ -d /run/systemd/system ]; then
		{ systemctl daemon-reload && systemctl restart $timer.timer; } ||
			die "azure-vnet is installed, but its timer does not start: systemctl status $timer.timer says why"
	fi
}

install() { # <what>
	unmanaged
	[ -z "$running" ] || untaken
	dirs=$(runtimes | sed "s|/*$tab|$tab|; s|/*\$||" | sort -u)
	dirs=${dirs:-/opt/cni/bin$tab/etc/cni/net.d}
	get "$1"
	printf '%s\n' "$dirs" >"$scratch/dirs"
	aside '' .leaving # of an uninstall that was killed
	while IFS=$tab read -r bin conf; do
		alone "$conf"
		put_package "$bin" "$conf"
	done <"$scratch/dirs"
	put_host_files "${dirs%%"$tab"*}"
	record
	commit
	! ours $modules || rm -f "$root$modules"
	start_timer
	while IFS=$tab read -r bin conf; do
		say "azure-vnet${version:+ $version} is in $bin and $conf"
		warn_of_chained "$bin" "$conf/$conflist"
	done <"$scratch/dirs"
}

# --- and away again ---------------------------------------------------------------

uninstall() {
	[ -f "$list" ] || { say "nothing is installed"; return 0; }
	program=$(installed azure-vnet | while IFS= read -r path; do
		! ours "$path" || [ ! -x "$root$path" ] || { printf '%s\n' "$path"; break; }
	done)
	if [ -n "$running" ]; then
		clear_host
	fi
	trap '' INT TERM HUP # what is begun is finished
	rm -f "$root$wants/$timer.timer"
	installed '[^/]*' | while IFS= read -r path; do
		case $path in
		*/90-azure-vnet.cfg) [ -z "${with_plugin:-}" ] || continue ;;
		esac
		if others "$path" || of_another "$path"; then
			say "$path is not what was installed, and stays"
			rm -f "$root$path.before-azure-vnet" # they would have replaced that too
			continue
		fi
		rm -f "$root$path" "$root$path.leaving"
		[ ! -f "$root$path.before-azure-vnet" ] || mv -f "$root$path.before-azure-vnet" "$root$path"
	done
	reversed <"$root$state/cni.made" >"$scratch/made"
	rm -f "$list" "$root$state/cni.made"
	while IFS= read -r dir; do rmdir "$root$dir" 2>/dev/null || true; done <"$scratch/made"
	[ -z "$running" ] || [ ! -d /run/systemd/system ] || systemctl daemon-reload || true
	say "azure-vnet is removed"
}

# installed prints the places of what was installed by a name, each once.
installed() { # <regular expression>
	[ ! -f "$list" ] || sed -n "s|^[0-9a-f]*  \(/.*/$1\)\$|\1|p" "$list" | awk '!seen[$0]++'
}

# of_another tells whether a conflist goes with an azure-vnet that replaced ours,
# and not with ours, edited.
of_another() { [ -z "${program:-}" ] && [ "${1##*/}" = $conflist ] && changed "$1"; }

# clear_host removes the bridge and all else that was made of the host's network,
# unless the managed plugin uses it. No pod comes meanwhile: the conflists are aside.
clear_host() {
	leaving=yes
	[ ! -d /run/systemd/system ] || systemctl stop $timer.timer $timer.service || true
	aside .leaving ''
	if [ "$(docker plugin inspect -f '{{.Enabled}}' $plugin 2>/dev/null)" = true ]; then
		with_plugin=yes
		say "the Docker plugin $plugin is enabled: the network that it uses stays"
	elif [ -n "$program" ]; then
		"$program" uninstall || die "nothing was removed: drain the node, or remove the containers that are named, and run this again"
	elif [ -d /run/azure-vnet ] || [ -d /sys/class/net/azure0 ]; then
		die "azure-vnet, which removes its bridge and rules from the host, is at no place where it was installed, or another is there: install it again, then uninstall it; nothing was removed"
	fi
	trap '' INT TERM HUP
	leaving=
	docker image prune -af --filter label=azure-vnet.role=holder >/dev/null 2>&1 || true # docker-run.sh's
	rm -f /var/log/azure-vnet.log /var/log/azure-vnet.log.1
}

# stay is for an uninstall that comes to nothing.
stay() {
	aside '' .leaving
	[ ! -d /run/systemd/system ] || systemctl start $timer.timer || true
}

# aside renames the conflists, but for one that is of another azure-vnet.
aside() { # <to suffix> <from suffix>
	installed $conflist | while IFS= read -r path; do
		[ ! -f "$root$path$2" ] || of_another "$path" || mv -f "$root$path$2" "$root$path$1"
	done
}

word=install what=
while [ $# -gt 0 ]; do
	case $1 in
	--uninstall) word=uninstall ;;
	--from-plugin) what=$1 ;;
	--root)
		[ -d "${2:-}" ] || die "--root wants a directory"
		root=$(cd "$2" && pwd)
		shift
		;;
	-h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;;
	-*) die "unknown option $1: see --help" ;;
	*)
		[ -z "$what" ] || die "one of $what and $1, not both"
		what=$1
		;;
	esac
	shift
done
[ "$(id -u)" = 0 ] || die "root is needed: use sudo"
[ "$root" != / ] || root=
[ -n "$root" ] || running=yes
list=$root$state/cni.installed
trap undo EXIT
trap "trap '' INT TERM HUP; exit 130" INT
trap "trap '' INT TERM HUP; exit 143" TERM
trap "trap '' INT TERM HUP; exit 129" HUP
scratch=$(mktemp -d)
if [ $word = install ]; then install "$what"; else uninstall; fi
