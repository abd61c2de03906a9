"""How the text of a flag, a variable or a file becomes a value.

Parsers raise ValueError with what is wrong, worded to follow the flag and its text.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address
from pathlib import Path
from typing import Final, NamedTuple

from tundp.choices import Offload, StoreKind
from tundp.wire import ip
from tundp.wire.policy import ADMITTED_MAX

LEASE_TTL_S: Final = 86400
TUN_NAME_MAX: Final = 15
"""IFNAMSIZ - 1 (linux/if.h)."""
MARGIN_MAX_MIN: Final = 1439
RESYNC_MAX_S: Final = 86400
WORKERS_MAX: Final = 64
SPIN_MAX_US: Final = 1000
METRICS_PEERS_MAX: Final = 1000

_INT: Final = re.compile(r"[+-]?[0-9a-zA-Z_]+", re.ASCII)
_GO_OCTAL: Final = re.compile(r"([+-]?)0([0-7_]+)", re.ASCII)
_LISTEN: Final = re.compile(
    r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<v4>[0-9.]*)):(?P<port>[0-9]{1,5})", re.ASCII
)
_TUN_NAME: Final = re.compile(r"[A-Za-z0-9_.-]*(%d)?[A-Za-z0-9_.-]*", re.ASCII)


_DURATION: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|)", re.ASCII)
_UNITS: Final = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST_S: Final = 366 * 86400.0


def parse_int(text: str) -> int:
    """Go's strconv.ParseInt(text, 0, 64): 0x, 0o, 0b, and a leading 0 for octal."""
    if _INT.fullmatch(text) is None:
        raise ValueError("is not a whole number")
    octal = _GO_OCTAL.fullmatch(text)
    try:
        value = int("{}0o{}".format(*octal.groups()) if octal else text, 0)
    except ValueError:
        raise ValueError("is not a whole number") from None
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError("is out of range: it does not fit 64 bits")
    return value


def parse_count(text: str) -> int:
    """How many: at least 1."""
    value = parse_int(text)
    if value < 1:
        raise ValueError("is out of range: at least 1")
    return value


def parse_duration(text: str) -> float:
    """Seconds: `30`, `30s`, `1.5m`, `2h`, `500ms`."""
    match = _DURATION.fullmatch(text)
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 0 < seconds <= _LONGEST_S:
        raise ValueError("is no time above zero, such as 30s, 5m or 2h")
    return seconds


def parse_list(text: str) -> tuple[str, ...]:
    """Comma-separated items, blanks around them and empty ones left out."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_endpoints(text: str) -> tuple[str, ...]:
    """URLs of etcd servers, without user or password."""
    if "@" in text:
        raise ValueError(
            "has a user or password in a URL; use --etcd-username and FLANNELD_ETCD_PASSWORD,"
            " which are never logged"
        )
    return parse_list(text)


def parse_address(text: str) -> IPv4Address | None:
    """An IPv4 address of a single host, or None for the empty text."""
    if not text:
        return None
    try:
        address = IPv4Address(text)
    except ValueError:
        raise ValueError("is not an IPv4 address (invalid public IP address)") from None
    if not ip.is_single_host(int(address)):
        raise ValueError("is no address of a host: peers could not send to it")
    return address


def parse_networks(text: str) -> tuple[IPv4Network, ...]:
    """IPv4 networks in CIDR notation, at most ADMITTED_MAX."""
    networks = []
    for part in parse_list(text):
        try:
            networks.append(IPv4Network(part))
        except ValueError:
            raise ValueError(
                f"has {part!r}, which is no IPv4 network with a prefix length and no host bits, as"
                " 203.0.113.0/24"
            ) from None
    if len(networks) > ADMITTED_MAX:
        raise ValueError(f"has {len(networks)} networks, of at most {ADMITTED_MAX}: join them")
    return tuple(networks)


def parse_address6(text: str) -> IPv6Address | None:
    """An IPv6 address, or None for the empty text."""
    if not text:
        return None
    try:
        return IPv6Address(text)
    except ValueError:
        raise ValueError("is not an IPv6 address (invalid public IPv6 address)") from None


def parse_resync(text: str) -> int:
    """Seconds, at least 1, capped at a day."""
    seconds = parse_int(text)
    if seconds < 1:
        raise ValueError("is out of range: seconds, at least 1")
    return min(seconds, RESYNC_MAX_S)


def parse_health_ip(text: str) -> str:
    """An address to listen on; flannel's `localhost` and empty text are taken."""
    if text in ("", "localhost"):
        return "127.0.0.1" if text else "0.0.0.0"
    try:
        return str(ip_address(text))
    except ValueError:
        raise ValueError("is not an IP address to listen on, such as 127.0.0.1") from None


def parse_health_port(text: str) -> int:
    """A TCP port, or 0."""
    port = parse_int(text)
    if not 0 <= port <= 65535:
        raise ValueError("is out of range: a TCP port, 0 for off")
    return port


class Listen(NamedTuple):
    """An address and a TCP port to listen on."""

    ip: str
    port: int

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


def parse_listen(text: str) -> Listen | None:
    """`IP:PORT`, `[IP6]:PORT`, or `:PORT` for this host only; None for the empty text."""
    if not text:
        return None
    wrong = "is not ADDRESS:PORT, such as 127.0.0.1:9285, [::1]:9285 or :9285 (this host only)"
    match = _LISTEN.fullmatch(text)
    if match is None or not 1 <= int(match["port"]) <= 65535:
        raise ValueError(wrong)
    try:
        return Listen(
            str(ip_address(match["v6"] or match["v4"] or "127.0.0.1")), int(match["port"])
        )
    except ValueError:
        raise ValueError(wrong) from None


def parse_file(text: str) -> Path:
    """The path of a file, never empty, and UTF-8: names of sockets and chains follow from it."""
    if not text or "\0" in text:
        raise ValueError("is no path of a file")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is no UTF-8") from None
    return Path(text)


def parse_path(text: str) -> Path | None:
    """A path, or None for the empty text."""
    return Path(text) if text else None


def parse_margin(text: str) -> int:
    """Minutes, less than a lease lasts."""
    minutes = parse_int(text)
    if not 1 <= minutes <= MARGIN_MAX_MIN:
        raise ValueError(
            f"is out of range: minutes from 1 to {MARGIN_MAX_MIN}, since a lease lasts 24 hours"
        )
    return minutes


def parse_lease_ttl(text: str) -> int:
    """Seconds, at least 1."""
    seconds = parse_int(text)
    if seconds < 1:
        raise ValueError("is out of range: seconds, at least 1")
    return seconds


@dataclass(frozen=True, slots=True)
class StoreChoice:
    """Where the leases live."""

    kind: StoreKind = StoreKind.ETCD
    path: Path | None = None
    """The lease file of a file store, None for etcd."""

    def __str__(self) -> str:
        return self.kind.value if self.path is None else f"{self.kind.value}:{self.path}"


def parse_store(text: str) -> StoreChoice:
    """`etcd` or `file:PATH`."""
    kind, colon, path = text.partition(":")
    if text == StoreKind.ETCD.value:
        return StoreChoice()
    if kind == StoreKind.FILE.value and colon and path:
        return StoreChoice(StoreKind.FILE, Path(path))
    raise ValueError("is neither etcd nor file:PATH")


def parse_tun_name(text: str) -> str:
    """An interface name the kernel takes, with at most one %d (dev_valid_name, net/core/dev.c)."""
    length = len(text.replace("%d", "0"))
    if not 1 <= length <= TUN_NAME_MAX or text in (".", "..") or not _TUN_NAME.fullmatch(text):
        raise ValueError(
            f"is not an interface name: 1 to {TUN_NAME_MAX} letters, digits, and ._- with at"
            " most one %d"
        )
    return text


def parse_offloads(text: str) -> tuple[Offload, ...]:
    """Names of offloads."""
    names = parse_list(text)
    known = {each.value: each for each in Offload}
    if unknown := sorted(set(names) - known.keys()):
        raise ValueError(f"has {unknown[0]!r}, which is not one of {', '.join(known)}")
    return tuple(known[name] for name in names)


def parse_workers(text: str) -> int:
    """A number of queues."""
    count = parse_int(text)
    if not 1 <= count <= WORKERS_MAX:
        raise ValueError(f"is out of range: 1 to {WORKERS_MAX}")
    return count


def parse_cpus(text: str) -> tuple[int, ...]:
    """CPU numbers this process may run on."""
    numbers = tuple(parse_int(part) for part in parse_list(text))
    if missing := sorted(set(numbers) - os.sched_getaffinity(0)):
        raise ValueError(f"has CPU {missing[0]}, which this process may not use")
    return numbers


def parse_spin(text: str) -> int:
    """Microseconds, 0 to SPIN_MAX_US."""
    microseconds = parse_int(text)
    if not 0 <= microseconds <= SPIN_MAX_US:
        raise ValueError(f"is out of range: microseconds, 0 to {SPIN_MAX_US}")
    return microseconds


def parse_metrics_peers(text: str) -> int:
    """A number of peers, 0 to METRICS_PEERS_MAX."""
    count = parse_int(text)
    if not 0 <= count <= METRICS_PEERS_MAX:
        raise ValueError(f"is out of range: peers, 0 to {METRICS_PEERS_MAX}")
    return count
