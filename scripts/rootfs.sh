#!/bin/sh
# rootfs.sh: make the plugin's root file system from the binary and Debian packages.
# Copyright (c) The azure-vnet authors. MIT licence.
#
#   rootfs.sh <azure-vnet-plugin> <files of the CNI package> <rootfs> <cache> <architecture>
#
# The CNI package goes to /cni. install-cni-plugin.sh --from-plugin takes it from there.
#
# This needs no registry and no container build. apt-get downloads iptables and
# the packages that it depends on, and dpkg-deb unpacks them. The root file system
# gets only the two back-ends of iptables, their extensions for IPv4 and the
# libraries that they load.
#
# No program of another architecture is run. apt works in <cache>, where the
# packages stay, so the machine's own lists and architectures do not change. The
# first run also puts the files that it needs of the packages into <cache>/rootfs.
# Later runs copy that directory.
set -eu

binary=$1 cni=$2 final=$3 cache=$4 arch=$5
for tool in apt-get apt-cache dpkg-deb; do
	command -v $tool >/dev/null || { echo "rootfs.sh: $tool is missing: build on Debian or Ubuntu, or with the Dockerfile" >&2; exit 1; }
done

apt() { # <command> words...
	command=$1
	shift
	"$command" -qq -o APT::Architecture="$arch" -o APT::Architectures="$arch" -o APT::Sandbox::User=root \
		-o Dir::State="$cache/apt" -o Dir::State::status="$cache/apt/status" -o Dir::Cache="$cache/apt" "$@"
}

fetch() {
	[ ! -e "$cache/complete" ] || return 0
	rm -rf "$cache"
	mkdir -p "$cache/deb" "$cache/tree" "$cache/apt/lists/partial" "$cache/apt/archives/partial"
	touch "$cache/apt/status"
	apt apt-get update
	apt apt-cache show iptables >/dev/null || {
		echo "rootfs.sh: this machine's package sources have no iptables for $arch: build on $arch, or on a distribution whose mirror has it" >&2
		exit 1
	}
	packages=$(apt apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks \
		--no-replaces --no-enhances --no-pre-depends iptables | grep -E '^(iptables|lib)[a-z0-9.+-]*$' | sort -u)
	# shellcheck disable=SC2086 # a list of words
	(cd "$cache/deb" && apt apt-get download $packages)
	for deb in "$cache"/deb/*.deb; do
		dpkg-deb -x "$deb" "$cache/tree"
	done
	rm -rf "$cache/apt"
	touch "$cache/complete"
}

# put <file of the tree, as the loader names it>: copies it to the same place.
put() {
	mkdir -p "$rootfs$(dirname "$1")"
	cp -L "$tree$1" "$rootfs$1"
}

# within the tree, wherever this distribution has it
find_one() { (cd "$tree" && find . -name "$1" \( -type f -o -type l \) | sed 's/^\.//' | sort | head -n 1); }

# named <file of the tree>: the libraries that it names. Names are whole strings of a
# file's string table. One grep looks for all of them: there are many files.
named() {
	for name in $(printf '%s\n' "$names" | LC_ALL=C grep -aozxF -f - "$tree$1" | tr '\0' '\n' | sort -u); do
		for library in $libraries; do
			case $library in
			*/"$name") echo "$library" ;;
			esac
		done
	done
}

# need <file of the tree>: puts the libraries that it names, and those that they name.
need() {
	for library in $(named "$1"); do
		[ -e "$rootfs$library" ] || {
			put "$library"
			[ "${library##*/}" = libc.so.6 ] || need "$library" # it names what it could load, and needs the loader only
		}
	done
}

# choose puts all that comes from the packages into a directory.
choose() { # <directory>
	rootfs=$1.new
	rm -rf "$rootfs"
	mkdir -p "$rootfs/usr/sbin" "$rootfs/run/docker/plugins" "$rootfs/host/run" "$rootfs/host/proc/sys/net" "$rootfs/data" \
		"$rootfs/proc" "$rootfs/sys" "$rootfs/dev" "$rootfs/etc" "$rootfs/tmp"
	extensions=$(dirname "$(find_one libxt_mark.so)")
	loader=$(find_one 'ld-linux*.so.*')
	libraries=$(cd "$tree" && find . -name 'lib*.so.*' ! -path '*/xtables/*' | sed 's/^\.//' | sort)
	names=$(printf '%s\n' "$libraries" | sed 's|.*/||')
	for multi in xtables-legacy-multi xtables-nft-multi; do
		put "/usr/sbin/$multi"
		need "/usr/sbin/$multi"
	done
	# The loader by the name that the binaries hold, which may be a link in the tree.
	interpreter=$(LC_ALL=C grep -aom1 '/lib[0-9a-z]*/ld-linux[-0-9a-z_]*\.so\.[0-9]' "$tree/usr/sbin/xtables-nft-multi")
	mkdir -p "$rootfs$(dirname "$interpreter")"
	cp -L "$tree$loader" "$rootfs$interpreter"
	# All of them: our rules need two, but iptables lists no rule of others whose extension it lacks.
	for extension in $(cd "$tree$extensions" && ls libxt_*.so libipt_*.so); do
		put "$extensions/$extension"
		need "$extensions/$extension"
	done
	ln -s xtables-nft-multi "$rootfs/usr/sbin/iptables-nft"
	ln -s xtables-nft-multi "$rootfs/usr/sbin/iptables"
	ln -s xtables-legacy-multi "$rootfs/usr/sbin/iptables-legacy"
	[ "$arch" != "$(dpkg --print-architecture)" ] || for name in iptables-nft iptables-legacy; do
		chroot "$rootfs" /usr/sbin/$name --version >/dev/null || { echo "rootfs.sh: $name does not start in $rootfs" >&2; exit 1; }
	done
	rm -rf "$1"
	mv "$rootfs" "$1"
}

mkdir -p "$(dirname "$final")" "$(dirname "$cache")"
cache=$(cd "$(dirname "$cache")" && pwd)/$(basename "$cache")
exec 9>"$cache.lock"
flock 9 # two makes at once
fetch
tree=$cache/tree
[ -n "$(find "$cache/rootfs" -maxdepth 0 -newer "$0" 2>/dev/null)" ] || choose "$cache/rootfs"
rm -rf "$final.new"
cp -R -P -p "$cache/rootfs" "$final.new"
cp "$binary" "$final.new/azure-vnet-plugin"
cp -R "$cni" "$final.new/cni"
rm -rf "$final"
mv "$final.new" "$final"
