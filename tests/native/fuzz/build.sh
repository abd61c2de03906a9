#!/bin/sh
# Builds fuzz targets with AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   build.sh gcc|clang SOURCES DIRECTORY TARGET...
#
# SOURCES has the C sources and their headers, usually native/src; the programs, named as
# their targets, come into DIRECTORY. gcc has no libFuzzer: it gets driver.c's main().
set -eu
here=$(cd "$(dirname "$0")" && pwd)
compiler=$1
sources=$2
out=$3
shift 3

mkdir -p "$out/objects"
flags="-std=c11 -D_GNU_SOURCE -Wall -Wextra -Wconversion -Wshadow -Werror -O1 -g
	-fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize=address,undefined"
driver=$here/driver.c
if [ "$compiler" = clang ]; then
	flags="$flags -fsanitize=fuzzer-no-link"
	driver=-fsanitize=fuzzer
fi
compile() {
	# shellcheck disable=SC2086
	"$compiler" $flags "-I$here/../../../native/include" "-I$sources" "$@"
}

# All at once, and any of them may fail.
pids=""
for source in "$sources"/*.c; do
	compile -c -o "$out/objects/$(basename "$source" .c).o" "$source" &
	pids="$pids $!"
done
for pid in $pids; do wait "$pid"; done

pids=""
for target in "$@"; do
	wraps=""
	# The engine's system calls pass through the target's hands.
	if [ "$target" = fuzz_engine ]; then
		for name in epoll_wait sendmmsg sendto write read; do
			wraps="$wraps -Wl,--wrap=$name"
		done
	fi
	# shellcheck disable=SC2086
	compile $wraps -o "$out/$target" "$here/$target.c" "$out"/objects/*.o "$driver" &
	pids="$pids $!"
done
for pid in $pids; do wait "$pid"; done
