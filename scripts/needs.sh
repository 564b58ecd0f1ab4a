#!/bin/sh
# needs.sh: install the packages that the tests and the demo use, where they are missing.
# Copyright (c) The azure-vnet authors. MIT licence.
#
# For Debian and Ubuntu only. A container engine that is installed stays as it is.
# No daemon is started on this machine: the tests run their own daemons, in
# namespaces of their own.
set -eu

[ "$(id -u)" = 0 ] || { echo "needs.sh: root is needed, for packages and network namespaces: use sudo" >&2; exit 1; }

missing=
need() { # command package
	command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
need ip iproute2
need nft nftables
need iptables-nft iptables
need nsenter util-linux
need busybox busybox-static
need conntrack conntrack
need ps procps
need gcc "gcc libc6-dev" # for go test -race
need dbus-daemon dbus
need wg-quick wireguard-tools
need wireguard-go wireguard-go
need firewall-cmd firewalld
need ufw ufw
need dockerd docker.io
need docker docker.io
need containerd containerd
need runc runc
need podman podman
need debootstrap debootstrap
need docker-compose docker-compose
need docker-registry docker-registry
need dpkg-deb dpkg
need curl curl
need dash dash
need shellcheck shellcheck
need systemd-analyze systemd # to verify units; it starts nothing here
need update-ca-certificates ca-certificates
[ -n "$missing" ] || exit 0

command -v apt-get >/dev/null 2>&1 || {
	echo "needs.sh: these packages are missing and there is no apt-get to install them:$missing" >&2
	exit 1
}

policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
	trap 'rm -f "$policy"' EXIT INT TERM
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod +x "$policy"
fi
echo "needs.sh: installing$missing" >&2
apt-get -qq update
# shellcheck disable=SC2086 # a list of words
DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $missing >/dev/null
# The tests run a firewalld of their own. One that was not there before is not to begin with the next boot.
case $missing in
*firewalld*) systemctl -q disable firewalld 2>/dev/null || true ;;
esac
# Since Debian 13 the client is a package of its own.
command -v docker >/dev/null 2>&1 || DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends docker-cli >/dev/null
