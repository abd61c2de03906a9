#!/bin/sh
# Puts an etcd binary into .tools/bin unless one is installed; silent when there is one.
#
# Debian's etcd-server is unpacked rather than installed: installing it would start an
# etcd on this machine, listening on 2379, that nobody asked for. The demo and the tests
# each start a private one. Where it cannot be had the demo uses the lease file instead.
set -eu
cd "$(dirname "$0")/.."
version='3.4.*'

if command -v etcd > /dev/null 2>&1 || [ -x .tools/bin/etcd ]; then
	exit 0
fi
echo "apt: etcd-server=$version (unpacked into .tools, not installed)"
work=$(mktemp -d)
chmod 755 "$work"
trap 'rm -rf "$work"' EXIT
download() { (cd "$work" && apt-get download -qq "etcd-server=$version") > "$work/log" 2>&1; }

if ! download; then
	apt-get update -qq > "$work/log" 2>&1 || true
	if ! download; then
		echo "etcd-server $version cannot be had:" >&2
		sed 's/^/    /' "$work/log" >&2
		exit "${ETCD_REQUIRED:-0}"
	fi
fi
dpkg -x "$work"/etcd-server_*.deb "$work/root"
mkdir -p .tools/bin
mv "$work/root/usr/bin/etcd" .tools/bin/etcd
