#!/bin/sh
# dist.sh: build the CNI package.
# Copyright (c) The azure-vnet authors. MIT licence.
#
#   dist.sh content <version> <architecture> <directory>   its files
#   dist.sh archives <version> <directory> [architecture…] its archives, and SHA256SUMS
#
# The same source and the same Go give the same bytes, on every machine and at any time.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
go=$(command -v go || echo /usr/local/go/bin/go)
files="10-azure.conflist azure-vnet azure-vnet-ipam azure-vnetctl loopback portmap" # sorted
export LC_ALL=C

build() { # <architecture> <file> <package> <variable=value>
	CGO_ENABLED=0 GOOS=linux GOARCH=$1 "$go" build -C "$here" -trimpath -buildvcs=false -ldflags "-s -w -X $4" -o "$2" "$3"
}

content() { # <version> <architecture> <directory>
	mkdir -p "$3"
	dir=$(cd "$3" && pwd)
	plugins=github.com/containernetworking/plugins
	release=$("$go" list -C "$here" -m -f '{{.Version}}' $plugins)
	build "$2" "$dir/azure-vnet" ./cmd/azure-vnet "main.version=$1"
	build "$2" "$dir/azure-vnet-ipam" ./cmd/azure-vnet-ipam "main.version=$1"
	build "$2" "$dir/azure-vnetctl" ./cmd/azure-vnetctl "main.version=$1"
	build "$2" "$dir/portmap" $plugins/plugins/meta/portmap "$plugins/pkg/utils/buildversion.BuildVersion=$release"
	build "$2" "$dir/loopback" $plugins/plugins/main/loopback "$plugins/pkg/utils/buildversion.BuildVersion=$release"
	cp "$here/cni/10-azure.conflist" "$dir/"
	(cd "$dir" && chmod 755 azure-vnet azure-vnet-ipam azure-vnetctl portmap loopback && chmod 644 10-azure.conflist)
}

archives() { # <version> <directory> [architecture…]
	version=$1 to=$2
	shift 2
	[ $# -gt 0 ] || set -- amd64 arm64
	mkdir -p "$to"
	scratch=$(mktemp -d)
	trap 'rm -rf "$scratch"' EXIT
	trap 'exit 130' INT TERM
	rm -f "$to"/azure-vnet-cni-linux-*.tgz "$to/SHA256SUMS" # of another version
	for arch in "$@"; do
		content "$version" "$arch" "$scratch/$arch"
		# shellcheck disable=SC2086 # a list of words
		tar -C "$scratch/$arch" --format=ustar --mtime=@0 --owner=0 --group=0 --numeric-owner -cf "$scratch/tar" $files
		gzip -n <"$scratch/tar" >"$to/azure-vnet-cni-linux-$arch-$version.tgz"
	done
	(cd "$to" && sha256sum azure-vnet-cni-linux-*.tgz >SHA256SUMS && cat SHA256SUMS)
}

word=$1
shift
case $1 in
*[!A-Za-z0-9._-]* | '') echo "dist.sh: a version has letters, digits, dots and dashes: make dist VERSION=v1.0.0" >&2; exit 2 ;;
esac
case $word in
content | archives) "$word" "$@" ;;
*) echo "dist.sh: unknown word $word" >&2; exit 2 ;;
esac
