#!/bin/sh
# fresh.sh: run the demo and the tests on a machine that has only Go, git and make.
# Copyright (c) The azure-vnet authors. MIT licence.
#
# It makes the root of a bare Debian with debootstrap, clones the committed
# project there, and runs `make demo` and `make test` in it. Inside, of this
# machine's files only a copy of Go, and its settings for names and certificates,
# are there. The mounts are in a mount namespace, which ends with the script.
#
#   FRESH_TARGETS="demo test"   the targets to make
#   FRESH_MIRROR=URL            Debian mirror; default: the first of this machine
set -eu

[ "$(id -u)" = 0 ] || { echo "fresh.sh: root is needed: use sudo" >&2; exit 1; }
top=$(cd "$(dirname "$0")/.." && pwd)
go=$(command -v go || echo /usr/local/go/bin/go) # sudo may not find it
targets=${FRESH_TARGETS:-demo test}
command -v debootstrap >/dev/null || { apt-get -qq update && apt-get -qq install -y debootstrap >/dev/null; }
mirror=${FRESH_MIRROR:-$(sed -n 's/^URIs: *//p; s/^deb \(\[.*\] \)\?\(http[^ ]*\).*/\2/p' \
	/etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null | head -n 1)}
case $mirror in *ubuntu*) mirror= ;; esac # which has no Debian
mirror=${mirror:-http://deb.debian.org/debian}

root=$(mktemp -d /var/tmp/azure-vnet-fresh.XXXXXX)
chmod 755 "$root" # it becomes /, which all users of a machine may enter
cleanup() {
	[ -z "$(findmnt -rno TARGET | grep "^$root" || true)" ] || { echo "fresh.sh: $root is still in use" >&2; return; }
	rm -rf --one-file-system "$root"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

echo "fresh.sh: a bare Debian in $root"
debootstrap --variant=minbase --include=git,make,ca-certificates bookworm "$root" "$mirror" >"$root.log" 2>&1 || {
	tail -n 20 "$root.log" >&2
	exit 1
}
rm -f "$root.log"
cp -a "$("$go" env GOROOT)" "$root/usr/local/go"
# Names, proxies and certificates of the place, so that apt and Go reach what they reach here.
cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
git clone -q --no-hardlinks "$top" "$root/root/azure-vnet"

cat >"$root/root/run" <<INSIDE
set -eu
cd /root/azure-vnet
for target in $targets; do
	echo "fresh.sh: make \$target"
	make "\$target"
done
INSIDE

# pivot_root and not chroot: runc refuses to start a container from a chroot.
# shellcheck disable=SC2016 # expanded inside
unshare --mount --pid --fork --kill-child --propagation private sh -eu -c '
	root=$1
	mount --bind "$root" "$root"
	mount -t proc proc "$root/proc"
	mount --rbind /sys "$root/sys"
	mount --rbind /dev "$root/dev"
	mount -t tmpfs tmpfs "$root/run"
	mkdir "$root/.old"
	cd "$root"
	pivot_root . .old
	umount -l /.old
	rmdir /.old
	exec env -i HOME=/root TERM=dumb PATH=/usr/local/go/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
		GOPROXY="$2" GOSUMDB="$3" GOFLAGS="$4" SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
		sh /root/run
' sh "$root" "$("$go" env GOPROXY)" "$("$go" env GOSUMDB)" "$("$go" env GOFLAGS)"
echo "fresh.sh: done: $targets"
