#!/bin/sh
# soak.sh: run all tests, each in its whole form, and then fuzz each parser.
# Copyright (c) The azure-vnet authors. MIT licence.
#
#   soak.sh                 runs all, and prints a table of what was done
#   soak.sh summary [log]   prints the table of an earlier run again
#
#   SOAK=10m      how long each storm goes on
#   FUZZ=30s      how long each fuzz target runs
#   SOAK_SEED=N   repeats the random crashes of an earlier run
#
# A step that fails does not stop the others. The table names it, and the exit status is 1. The output is also in
# build/soak.log.
#
# A test logs how much it did in one form: "FIGURE storms: 12 kills, 3 boots". The table adds up the numbers of each
# unit.
set -eu
cd "$(dirname "$0")/.."
go=$(command -v go || echo /usr/local/go/bin/go)
log=build/soak.log

# step runs a command. Its output goes to the log too.
step() { # <name> <command>...
	name=$1
	shift
	echo "soak.sh: $name"
	"$@" 2>&1 || echo "soak.sh: FAILED: $name"
}

soak() {
	echo "soak.sh: ABOUT command: make soak SOAK=$SOAK FUZZ=$FUZZ"
	echo "soak.sh: ABOUT commit: $(git describe --always --dirty 2>/dev/null || echo unknown)"
	echo "soak.sh: ABOUT kernel: $(uname -srm)"
	echo "soak.sh: ABOUT system: $(sed -n 's/^PRETTY_NAME="*\([^"]*\)"*$/\1/p' /etc/os-release)"
	echo "soak.sh: ABOUT CPUs: $(nproc)"
	echo "soak.sh: ABOUT date: $(date -u +%Y-%m-%d)"
	began=$(date +%s)
	step "race detector" env GORACE=atexit_sleep_ms=0 SOAK= "$go" test -race -count=1 -timeout 48h ./bridge/... ./internal/vnetsim/...
	# shellcheck disable=SC2046 # a list of words
	step "tests of the packages" "$go" test -count=1 -timeout 48h -v $("$go" list ./... | grep -v /test)
	step "tests of the programs" "$go" test -count=1 -timeout 48h -v -parallel 2 ./test/...
	for dir in $("$go" list -f '{{.Dir}}' ./...); do
		# shellcheck disable=SC2013 # a name is one word
		for target in $(grep -ho '^func Fuzz[A-Za-z0-9_]*' "$dir"/*_test.go 2>/dev/null | sed 's/^func //'); do
			step "fuzz target $target in ${dir#"$PWD"/}" "$go" test -run '^$' -fuzz "^$target\$" -fuzztime "$FUZZ" -fuzzminimizetime 5x "$dir"
		done
	done
	echo "soak.sh: ABOUT minutes: $((($(date +%s) - began) / 60))"
}

# summary prints a log's figures as a table. It fails if a step failed, or if the log has no end.
summary() { # <log>
	awk '
		function add(proof, counts,    part, n, i, unit) {
			n = split(counts, part, ", ")
			for (i = 1; i <= n; i++) {
				unit = part[i]
				sub(/^[0-9]+ /, "", unit)
				if (!((proof, unit) in sum))
					units[proof] = units[proof] (units[proof] == "" ? "" : ", ") unit
				sum[proof, unit] += part[i]
			}
			if (!(proof in known)) {
				known[proof] = 1
				order[++proofs] = proof
			}
		}
		function row(what, figure) { print "| " what " | " figure " |" }
		sub(/^soak.sh: ABOUT /, "") {
			what = $0
			sub(/: .*/, "", what)
			about[++abouts] = what
			value[what] = substr($0, length(what) + 3)
		}
		sub(/^soak.sh: FAILED: /, "") { failed = failed (failed == "" ? "" : "; ") $0 }
		/^soak.sh: fuzz target / { target = $4 " " $6 }
		/^fuzz: elapsed: / && match($0, /execs: [0-9]+/) { execs[target] = substr($0, RSTART + 7, RLENGTH - 7) }
		/^--- PASS: Test/ { passed++ }
		/^--- SKIP: Test/ { skipped++ }
		/^--- FAIL: Test/ { broken++ }
		sub(/^.*: FIGURE /, "") {
			proof = $0
			sub(/: .*/, "", proof)
			add(proof, substr($0, length(proof) + 3))
		}
		END {
			if (!("minutes" in value)) failed = failed (failed == "" ? "" : "; ") "the run did not end"
			print "| what | figure |"
			print "|---|---|"
			for (i = 1; i <= abouts; i++) row(about[i], value[about[i]])
			row("tests", passed + 0 " passed, " broken + 0 " failed, " skipped + 0 " skipped")
			for (i = 1; i <= proofs; i++) {
				text = ""
				n = split(units[order[i]], unit, ", ")
				for (j = 1; j <= n; j++) text = text (j > 1 ? ", " : "") sprintf("%.0f ", sum[order[i], unit[j]]) unit[j]
				row(order[i], text)
			}
			for (target in execs) {
				targets++
				all += execs[target]
			}
			row("fuzzing", sprintf("%d targets, %.0f executions", targets, all))
			row("failed", failed == "" ? "nothing" : failed)
			exit failed != ""
		}
	' "$1"
}

case ${1:-} in
summary) summary "${2:-$log}" ;;
'')
	SOAK=${SOAK:-10m} FUZZ=${FUZZ:-30s}
	export SOAK
	mkdir -p build
	soak | tee "$log"
	echo
	summary "$log"
	;;
*) echo "soak.sh: unknown word $1: summary, or none to run all" >&2; exit 2 ;;
esac
