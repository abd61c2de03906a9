#!/bin/sh
# Builds .tools/debian, the bare Debian root in which tests/systemd types the commands of
# README.md and docs/install.md; silent when it is there.
#
# It is Debian's base system as the installer leaves it (debootstrap), with nothing of what
# the documents install. In /srv/packages and /srv/wheels are the files that apt and pip would
# download, at the versions of this day, so that the test needs no network. It is built again
# when this file, the packages or setup/requirements.txt change.
set -eu
cd "$(dirname "$0")/.."
suite=bookworm
mirror=http://deb.debian.org/debian
root=$PWD/.tools/debian
# What the documents and `make demo` install, beside setup/apt.txt.
packages="git make python3 python3-pip python3-venv gcc libc6-dev python3-dev iptables nftables etcd-client"
packages="$packages $(awk '$1 == "build" || $1 == "demo" { print $2 }' setup/apt.txt)"

stamp=$( (echo "$packages"; cat setup/debian.sh setup/requirements.txt) | sha256sum)
[ "$(cat "$root/srv/stamp" 2> /dev/null)" != "$stamp" ] || exit 0
echo "debootstrap: a bare Debian $suite in .tools/debian, a minute or two"
rm -rf "$root.new"
mkdir -p "$root.new/srv/packages" "$root.new/srv/wheels"
log=$(mktemp)
# The network is needed for this only; names are resolved, and servers trusted, as out here.
finish() {
	rm -f "$root.new/etc/resolv.conf" "$root.new/srv/ca.crt"
	rm -f "$log"
}
trap finish EXIT
# in_root DIRECTORY COMMAND...: nothing of this machine's environment reaches it.
in_root() {
	env -i DEBIAN_FRONTEND=noninteractive LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin \
		PIP_CERT=/srv/ca.crt chroot "$@" > "$log" 2>&1 || {
		tail -20 "$log" | sed 's/^/    /' >&2
		echo "setup/debian.sh: failed: $*" >&2
		exit 1
	}
}

debootstrap "$suite" "$root.new" "$mirror" > "$log" 2>&1 || {
	tail -20 "$log" >&2
	echo "setup/debian.sh: debootstrap failed; it needs the network once" >&2
	exit 1
}
cp --dereference /etc/resolv.conf "$root.new/etc/resolv.conf"
cp --dereference /etc/ssl/certs/ca-certificates.crt "$root.new/srv/ca.crt"

# pip's files are fetched by a pip of this very Debian, in a copy that is thrown away with
# the packages it needs: the root itself stays bare.
in_root "$root.new" apt-get update -qq
# shellcheck disable=SC2086
in_root "$root.new" apt-get install -qq -y --download-only $packages etcd-server
cp "$root.new"/var/cache/apt/archives/*.deb "$root.new/srv/packages/"
copy=$(mktemp -d "$PWD/.tools/wheels.XXXXXX")
trap 'rm -rf "$copy"; finish' EXIT
cp -a "$root.new/." "$copy/"
cp setup/requirements.txt "$copy/srv/"
in_root "$copy" apt-get install -qq -y gcc libc6-dev python3-dev python3-venv
in_root "$copy" python3 -m venv /srv/venv
in_root "$copy" /srv/venv/bin/pip download --quiet --dest /srv/wheels \
	--requirement /srv/requirements.txt wheel
cp "$copy"/srv/wheels/* "$root.new/srv/wheels/"

# From here on apt knows one source: /srv/packages.
for deb in "$root.new"/srv/packages/*.deb; do
	dpkg-deb --field "$deb"
	printf 'Filename: ./%s\nSize: %s\nSHA256: %s\n\n' "${deb##*/}" \
		"$(stat -c %s "$deb")" "$(sha256sum "$deb" | cut -d ' ' -f 1)"
done > "$root.new/srv/packages/Packages"
echo 'deb [trusted=yes] file:/srv/packages ./' > "$root.new/etc/apt/sources.list"
rm -rf "$root.new"/var/cache/apt/archives/*.deb "$root.new"/var/lib/apt/lists/*
in_root "$root.new" apt-get update -qq
finish
printf '%s\n' "$stamp" > "$root.new/srv/stamp"
rm -rf "$root"
mv "$root.new" "$root"
