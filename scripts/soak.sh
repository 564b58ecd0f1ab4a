#!/bin/sh
# soak.sh: run the long tests: random crashes, and fuzzing.
# Copyright (c) The azure-vnet authors. MIT licence.
#
#   SOAK=10m      how long the random crashes go on
#   FUZZ=30s      how long each fuzz target runs
#   SOAK_SEED=N   repeats the random crashes of an earlier run
set -eu
cd "$(dirname "$0")/.."
go=$(command -v go || echo /usr/local/go/bin/go)

SOAK=${SOAK:-10m} "$go" test -count=1 -timeout 24h -v -run 'TestSoak|TestTwentyBoots|TestEveryRestart|TestThePluginIsKilled|TestKilled|TestDockerAndCNI|TestDockerRun|TestADiskThatHangs|TestEveryArchitecture|TestDockerfile|TestDockerUpgrade|TestRecorded' ./test/...
SOAK=${SOAK:-10m} "$go" test -count=1 -timeout 24h ./bridge/... ./pool
for dir in $("$go" list -f '{{.Dir}}' ./...); do
	# shellcheck disable=SC2013 # a name is one word
	for target in $(grep -ho '^func Fuzz[A-Za-z0-9_]*' "$dir"/*_test.go 2>/dev/null | sed 's/^func //'); do
		echo "soak.sh: $target in $dir"
		"$go" test -run '^$' -fuzz "^$target\$" -fuzztime "${FUZZ:-30s}" -fuzzminimizetime 5x "$dir"
	done
done
