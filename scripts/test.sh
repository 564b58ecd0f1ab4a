#!/bin/sh
# test.sh: the whole proof. One summary, one exit status.
# Copyright (c) The azure-vnet authors. MIT licence.
#
# Words are passed to go test: scripts/test.sh -run TestReadme ./test
set -eu
cd "$(dirname "$0")/.."
go=$(command -v go || echo /usr/local/go/bin/go)

unformatted=$("$go" list -f '{{.Dir}}' ./... | xargs "$(dirname "$("$go" env GOROOT)/bin/go")/gofmt" -l)
[ -z "$unformatted" ] || { echo "test.sh: gofmt would change:" "$unformatted" >&2; exit 1; }
"$go" vet ./...
"$go" tool staticcheck ./...
# ./test takes as long as all others together, so it begins first.
[ $# -gt 0 ] || set -- ./test ./...
# Each package's tests begin on a machine that booted a second ago.
# The tests that may run beside others wait more than they work.
exec "$go" tool gotestsum --format pkgname-and-test-fails --format-hide-empty-pkg -- \
	-exec "'$PWD/scripts/young.sh'" -race -timeout 40m -parallel 4 "$@"
