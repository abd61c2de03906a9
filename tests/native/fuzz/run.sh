#!/bin/sh
# Fuzzes the C sources, target by target: `make fuzz`.
#
#   run.sh [SECONDS [TARGET...]]
#
# SECONDS are a target's. With clang libFuzzer looks for inputs, guided by coverage. Without,
# gcc's build only mutates the seeds: it gets four times as long, and is still the weaker one.
# FUZZ_COMPILER=gcc or clang chooses; FUZZ_SOURCES are C sources other than native/src.
# Crashes are left in the current directory, as crash-*; inputs found on the way are not kept.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
seconds=${1:-60}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- fuzz_encapsulate fuzz_decapsulate fuzz_fragment fuzz_segment \
	fuzz_coalesce fuzz_fib fuzz_filter fuzz_engine

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

# clang without its runtime libraries has no libFuzzer: only linking shows.
has_libfuzzer() {
	echo 'int LLVMFuzzerTestOneInput(const char *d, unsigned long n); int LLVMFuzzerTestOneInput(const char *d, unsigned long n) { return d && n ? 0 : 0; }' |
		clang -fsanitize=fuzzer,address,undefined -x c - -o "$work/probe" 2> /dev/null
}

if [ -z "${FUZZ_COMPILER:-}" ]; then
	if has_libfuzzer; then FUZZ_COMPILER=clang; else FUZZ_COMPILER=gcc; fi
fi
case $FUZZ_COMPILER in
clang) echo "fuzz: clang's libFuzzer, $seconds s a target" ;;
*)
	seconds=$((seconds * 4))
	echo "fuzz: $FUZZ_COMPILER and driver.c (no libFuzzer: clang and libclang-rt-14-dev have it), $seconds s a target"
	;;
esac

# One seed a run, and said: a driver's run can be had again.
seed=${FUZZ_SEED:-$(date +%s)}
sh "$here/build.sh" "$FUZZ_COMPILER" "${FUZZ_SOURCES:-$here/../../../native/src}" "$work" "$@"
failed=""
for target in "$@"; do
	mkdir -p "$work/found/$target"
	if [ "$FUZZ_COMPILER" = clang ]; then
		"$work/$target" -max_total_time="$seconds" -timeout=20 -seed="$seed" -max_len=8192 \
			-artifact_prefix="crash-$target-" -print_final_stats=1 \
			"$work/found/$target" "$here/corpus/$target" > "$work/log" 2>&1 || {
			cat "$work/log" >&2
			failed="$failed $target"
			continue
		}
		sed -n "s/^#\([0-9]*\).*DONE *cov: \([0-9]*\).*corp: \([0-9]*\).*/$target: \1 runs, \2 edges, \3 inputs, seed $seed/p" "$work/log"
	else
		"$work/$target" -seconds "$seconds" -seed "$seed" "$here/corpus/$target" || failed="$failed $target"
	fi
done
[ -z "$failed" ] || {
	echo "fuzz: found something:$failed" >&2
	exit 1
}
