"""What a daemon with given settings needs after its start, as a plan for tundp.linux.sandbox.

Decided by what is done: which programs tundp.linux.firewall and obstacles run, which files the
stores, the resolver, OpenSSL and Python open later (measured with strace(1)).
"""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import tundp
from tundp.choices import Sandbox, StoreKind
from tundp.errors import PlatformError
from tundp.linux import sandbox
from tundp.linux.sandbox import Holds, Plan, Rule
from tundp.linux.sandbox.landlock import DEVICE, EXECUTE, KEEP, READ, RUN, TRUNCATE, WRITE_FILE
from tundp.linux.sandbox.programs import folders, resolve
from tundp.settings.settings import Settings
from tundp.store.access import parse_endpoints

_log = logging.getLogger(__name__)

PROGRAMS: Final = (
    "nft",
    *(
        f"{name}{back_end}{suffix}"
        for name in ("iptables", "ip6tables")
        for back_end in ("", "-nft", "-legacy")
        for suffix in ("", "-save", "-restore")
    ),
)
"""What tundp.linux.firewall and tundp.linux.obstacles run."""
XTABLES_LOCK: Final = Path("/run/xtables.lock")
"""Of legacy iptables; it makes the file itself where it may write in /run."""

_LIBRARIES: Final = (
    *("/lib", "/lib32", "/lib64", "/libx32", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32"),
    *("/usr/libexec", "/usr/local/lib", "/usr/local/lib64", "/nix/store", "/gnu/store"),
    *("/etc/ld.so.cache", "/etc/ld.so.preload", "/etc/ld-musl-x86_64.path"),
)
_RESOLVER: Final = (
    *("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/host.conf", "/etc/gai.conf"),
    # systemd-resolved, NetworkManager and resolvconf replace the file a link leads to.
    *("/run/systemd/resolve", "/run/NetworkManager", "/run/resolvconf"),
)
_DATA: Final = (
    *("/etc/services", "/etc/protocols", "/etc/networks", "/etc/ethertypes", "/etc/iproute2"),
    *("/etc/machine-id", "/etc/localtime", "/etc/passwd", "/etc/group", "/etc/locale.alias"),
    *("/usr/share/iproute2", "/usr/share/zoneinfo", "/usr/share/locale", "/usr/share/nftables"),
    *("/etc/xtables", "/etc/nftables", "/etc/connlabel.conf"),
    *("/etc/ssl/certs", "/etc/ssl/openssl.cnf", "/etc/crypto-policies", "/etc/pki/ca-trust"),
    # Not all of /etc/pki: /etc/pki/tls/private has the keys of other services.
    *("/etc/pki/tls/certs", "/etc/pki/tls/cert.pem", "/etc/pki/tls/openssl.cnf"),
    *("/usr/share/ca-certificates", "/usr/local/share/ca-certificates", "/usr/share/pki"),
    *("/usr/share/crypto-policies", "/etc/ca-certificates", "/var/lib/ca-certificates"),
    *("/proc", "/sys/class/net", "/sys/devices", "/sys/fs/cgroup", "/run/netns"),
    *("/dev/urandom", "/dev/random", "/dev/zero"),
)
_WIDE: Final = frozenset(
    map(
        Path,
        (
            *("/", "/boot", "/dev", "/dev/shm", "/etc", "/etc/ssl", "/etc/pki"),  # noqa: S108
            *("/etc/pki/tls", "/home", "/media", "/mnt", "/opt", "/proc", "/root", "/run", "/srv"),
            *("/sys", "/tmp", "/usr", "/usr/local", "/var", "/var/lib", "/var/run"),  # noqa: S108
            "/var/tmp",  # noqa: S108
        ),
    )
)
"""Folders with much of others in them."""
_SYSCTLS: Final = ("/proc/sys/net/ipv4/conf", "/proc/sys/net/ipv6/conf")
"""Of the TUN device, which comes and goes: linux/sysctl.py."""


def confine(settings: Settings, leaving: Collection[int] = ()) -> Holds | None:
    """Enter the sandbox as --sandbox says; None if it is off.

    leaving: threads that are about to end, and are in none until then.
    PlatformError: `on`, and something of it does not hold, or these settings leave it open.
    """
    if settings.sandbox is Sandbox.OFF:
        _log.info("--sandbox=off: files, programs and system calls are not restricted")
        return None
    _make_places(settings)
    plan = plan_for(settings)
    if settings.sandbox is Sandbox.ON:
        require(replace(sandbox.foresee(), gaps=plan.gaps))
    holds = sandbox.enter(plan, leaving)
    if settings.sandbox is Sandbox.ON:
        require(holds)
    level = logging.WARNING if holds.missing else logging.INFO
    _log.log(level, "sandbox: %s", holds.evidence)
    return holds


def require(holds: Holds) -> None:
    """Raise PlatformError unless everything holds that a sandbox is made of, without a gap."""
    parts = []
    if holds.missing:
        parts.append(f"{'; '.join(holds.missing)} cannot be refused here")
    if holds.gaps:
        parts.append(f"these settings leave open {'; '.join(holds.gaps)}")
    if parts:
        raise PlatformError(
            f"--sandbox=on: {'; '.join(parts)};"
            " --sandbox=auto starts with what this kernel has and these settings leave"
        )


def plan_for(settings: Settings) -> Plan:
    """What a daemon with these settings needs."""
    programs = resolve(PROGRAMS)
    gaps: list[str] = []
    rules = [
        *(Rule(path, READ) for path in _readable(settings, gaps)),
        *(Rule(path, RUN) for path in programs.files),
        *(Rule(path, KEEP) for path in _writable(settings, gaps)),
        *(Rule(Path(path), READ | WRITE_FILE | TRUNCATE) for path in _SYSCTLS),
        *(Rule(Path(path), DEVICE) for path in ("/dev/net/tun", "/dev/null")),
        Rule(XTABLES_LOCK, READ | WRITE_FILE),
    ]
    if programs.scripts:
        rules += [Rule(path, READ | EXECUTE) for path in folders()]
        gaps.append(
            f"programs, for {', '.join(map(str, programs.scripts))} may run any: it is a script"
        )
    is_abstract = os.environ.get("NOTIFY_SOCKET", "").startswith("@")
    if is_abstract:
        gaps.append("abstract unix sockets, for NOTIFY_SOCKET is one")
    return Plan(rules=tuple(rules), is_abstract_scoped=not is_abstract, gaps=tuple(gaps))


def written_folders(settings: Settings) -> tuple[Path, ...]:
    """The folders a daemon makes, replaces and removes files in."""
    found = [settings.subnet_file.absolute().parent, settings.admin_socket.absolute().parent]
    if settings.state_dir is not None:
        found.append(settings.state_dir.absolute())
    if settings.store.kind is StoreKind.FILE and settings.store.path is not None:
        found.append(settings.store.path.absolute().parent)
    # Where a link leads to is another folder.
    return tuple(dict.fromkeys(real for each in found for real in (each, each.resolve())))


def _writable(settings: Settings, gaps: list[str]) -> Iterator[Path]:
    for folder in written_folders(settings):
        yield folder
        if folder in _WIDE:
            gaps.append(
                f"writing below {folder}, for a file is in it that is replaced (subnet.env, the"
                " admin socket, the lease file, or those of --state-dir)"
            )


def _make_places(settings: Settings) -> None:
    """Make what must be there to be named in a rule; whatever cannot be is reported by its user."""
    for folder in written_folders(settings):
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        os.close(os.open(XTABLES_LOCK, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _readable(settings: Settings, gaps: list[str]) -> Iterator[Path]:
    yield from _python()
    yield from map(Path, (*_LIBRARIES, *_RESOLVER, *_DATA))
    yield from _openssl()
    if settings.config is not None:
        # A password in it is read again when etcd refuses the one before.
        for folder in {settings.config.absolute().parent, settings.config.resolve().parent}:
            yield folder
            if folder in _WIDE:
                gaps.append(f"reading {folder}, for the --config file is in it")
    if settings.store.kind is StoreKind.ETCD:
        names = [each for each in _hosts(settings.etcd_endpoints) if not _is_address(each)]
        if names:
            # /etc/hosts and resolv.conf are replaced by whoever edits them: only the folder lasts.
            yield Path("/etc")
            yield Path("/etc/resolv.conf").resolve().parent
            gaps.append(f"reading /etc, for etcd's endpoints have names ({', '.join(names)})")
        for folder in certificate_folders(settings):
            yield folder
            if folder in _WIDE:
                gaps.append(f"reading {folder}, for a certificate, key or CA of etcd is in it")


def certificate_folders(settings: Settings) -> tuple[Path, ...]:
    """The folders of the TLS files, and of what they are links to: certificates are renewed."""
    files = filter(None, (settings.etcd_cafile, settings.etcd_certfile, settings.etcd_keyfile))
    return tuple(
        dict.fromkeys(
            folder
            for each in map(Path, files)
            for folder in (each.absolute().parent, each.resolve().parent)
        )
    )


def _python() -> Iterator[Path]:
    """The interpreter's tree, the packages, and every library that is loaded already."""
    for name in ("stdlib", "platstdlib", "purelib", "platlib"):
        path = sysconfig.get_path(name)
        if path:
            yield Path(path)
    yield Path(tundp.__file__).parent
    # Without where `python -m tundp` happened to be started.
    yield from (Path(each) for each in sys.path if each not in ("", "/", os.getcwd()))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            words = line.split(maxsplit=5)
            if len(words) == 6 and ".so" in Path(words[5]).name:
                yield Path(words[5])


def _openssl() -> Iterator[Path]:
    places = ssl.get_default_verify_paths()
    for place in (places.cafile, places.capath, os.environ.get("OPENSSL_CONF")):
        if place:
            yield Path(place)


def _hosts(endpoints: Iterable[str]) -> Iterator[str]:
    for each in parse_endpoints(tuple(endpoints)):
        yield each.host.strip("[]")


def _is_address(host: str) -> bool:
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
