#!/bin/sh
# The C sources for other machines: `make cross`. Each is compiled with all warnings as errors
# and the C test run under qemu's user mode: aarch64 for its vector unit, s390x for its byte
# order. Linked statically, so that qemu needs nothing of the other machine's. The engines are
# compiled, not run.
#
#   cross.sh [ARCHITECTURE...]
set -eu
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- aarch64 s390x

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

try() {
	compiler=$1-linux-gnu-gcc
	emulator=qemu-$1-static
	for tool in "$compiler" "$emulator"; do
		command -v "$tool" > /dev/null || {
			echo "$tool is missing"
			return 1
		}
	done
	# -O3 as it is installed; the threads are the engines' test, for its compilation.
	for test in test_native test_threads; do
		"$compiler" -std=c11 -D_GNU_SOURCE -Wall -Wextra -Wconversion -Wshadow -Werror -O3 \
			-static -pthread -Inative/include -o "$work/$1-$test" native/src/*.c \
			"tests/native/$test.c" || return 1
	done
	timeout 300 "$emulator" "$work/$1-test_native"
}

failed=0
for machine in "$@"; do
	if try "$machine" > "$work/log" 2>&1; then
		echo "$machine: compiled without a warning, test_native passes"
	else
		echo "$machine: FAILED"
		sed 's/^/    /' "$work/log"
		failed=1
	fi
done
exit $failed
