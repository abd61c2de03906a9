#!/bin/sh
# Installs the Debian packages named in setup/apt.txt that are missing; silent when none is.
#
#   setup/apt.sh build|demo|test|fuzz|cross
#
# A line of apt.txt is: the stage it is first needed for, the package, the version it is
# pinned to (a glob, so that Debian's security updates of that version still come).
set -eu
cd "$(dirname "$0")/.."

case "$1" in
build) stages="build" ;;
demo) stages="build demo" ;;
test) stages="build demo test" ;;
fuzz) stages="build fuzz" ;;
cross) stages="build cross" ;;
*) echo "usage: $0 build|demo|test|fuzz|cross" >&2; exit 2 ;;
esac

missing=""
for stage in $stages; do
	while read -r at package version _; do
		[ "$at" = "$stage" ] || continue
		dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed ||
			missing="$missing $package=$version"
	done < setup/apt.txt
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" != 0 ]; then
	echo "These Debian packages are missing, and installing them needs root:$missing" >&2
	exit 1
fi
echo "apt:$missing"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
install() { apt-get install -y -qq --no-install-recommends "$@" > "$log" 2>&1; }

# shellcheck disable=SC2086
if ! install $missing; then
	apt-get update -qq > "$log" 2>&1 || { cat "$log" >&2; exit 1; }
	if ! install $missing; then
		echo "Not all of them in the pinned versions (another Debian release?): taking what there is." >&2
		install $(printf '%s\n' $missing | sed 's/=.*//') || { cat "$log" >&2; exit 1; }
	fi
fi
