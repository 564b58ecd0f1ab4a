#!/bin/sh
# test.sh: run all tests but the long ones, with one summary and one exit status.
# Copyright (c) The azure-vnet authors. MIT licence.
#
# Arguments are passed on to go test: scripts/test.sh -run TestReadme ./test/docker
set -eu
cd "$(dirname "$0")/.."
go=$(command -v go || echo /usr/local/go/bin/go)

# These are how make build compiles, so what it compiled is not compiled again.
GOFLAGS="$("$go" env GOFLAGS) -trimpath"
export CGO_ENABLED=0 GOFLAGS
unformatted=$("$go" list -f '{{.Dir}}' ./... | xargs "$(dirname "$("$go" env GOROOT)/bin/go")/gofmt" -l)
[ -z "$unformatted" ] || { echo "test.sh: gofmt would change:" "$unformatted" >&2; exit 1; }
"$go" vet ./...
"$go" tool staticcheck ./...
# These packages need no Linux kernel, so they compile everywhere.
GOOS=windows "$go" vet ./pool ./internal/cni ./internal/plan ./internal/statefile

# Each package's tests begin on a machine that booted a second ago.
run="$go test -json -exec '$PWD/scripts/young.sh' -timeout 40m"
# A process of the race detector sleeps a second before it ends, and tests start many.
race="env CGO_ENABLED=1 GORACE=atexit_sleep_ms=0 $run -race"
if [ $# -gt 0 ]; then
	set -- "$race $(printf " '%s'" "$@")"
else
	# The race detector watches the packages whose goroutines share memory. Those of bridge share the kernel. They take
	# most of the time, so make soak watches them. The tests below test/ start the product as users do, built without it.
	# Two cores are busy with few tests at once. The longest packages begin first.
	watched=$("$go" list ./... | grep -v '/bridge\|/vnetsim\|/test' | tr '\n' ' ')
	# The watched ones wait for more than half of their time, so they run beside the others. Lines of two streams must not mix.
	mkdir -p build
	set -- "status=0; $race -parallel 6 $watched >build/race.json & race=\$!
		$run -parallel 3 ./test/docker ./test/host ./bridge/... ./internal/vnetsim/... ./test/... || status=1
		wait \$race || status=1; cat build/race.json; exit \$status"
fi
exec "$go" tool gotestsum --format pkgname-and-test-fails --format-hide-empty-pkg --raw-command -- sh -c "$1"
