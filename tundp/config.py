"""Flags and environment to one frozen Config. Every default and every check lives here.

Flags are read as Go's flag package reads them, because flannel's users write them so:
`-f v`, `-f=v` and the same with two dashes are equal, and a boolean takes its value
only with `=`. Where this differs on purpose: an unknown flag or a stray argument is an
error (flannel exits with 0, or ignores the rest), and so is a bad environment variable
(flannel turns it into 0).
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final

from tundp.errors import ConfigError
from tundp.wire import ip
from tundp.wire.encap import SourceCheck

LEASE_TTL_S: Final = 86400
TUN_NAME_MAX: Final = 15
"""IFNAMSIZ - 1 (linux/if.h)."""
MARGIN_MAX_MIN: Final = 1439
FILE_STORE: Final = "file:"
ETCD_STORE: Final = "etcd"
LOOPS: Final = ("auto", "uvloop", "asyncio")
ENGINES: Final = ("auto", "gso", "mmsg", "simple", "reference")
OFFLOADS: Final = ("tun-tso", "tun-uso", "udp-segment", "udp-gro", "tcp-coalesce", "udp-coalesce")
LAYOUTS: Final = ("shared", "split")
WORKERS_MAX: Final = 64
SPIN_MAX_US: Final = 1000

_INT: Final = re.compile(r"[+-]?[0-9a-zA-Z_]+", re.ASCII)
_GO_OCTAL: Final = re.compile(r"([+-]?)0([0-7_]+)", re.ASCII)
_TUN_NAME: Final = re.compile(r"[A-Za-z0-9_.-]*(%d)?[A-Za-z0-9_.-]*", re.ASCII)
_TRUE: Final = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_FALSE: Final = frozenset({"0", "f", "F", "false", "FALSE", "False"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One flag: its name without dashes, how its text becomes a value, and its help."""

    name: str
    parse: Callable[[str], Any]
    default: Any
    metavar: str
    help: str
    is_repeatable: bool = False
    is_secret: bool = False
    is_flannels: bool = True

    @property
    def is_boolean(self) -> bool:
        """Boolean flags take a value only with `=`."""
        return self.parse is parse_bool

    @property
    def variable(self) -> str:
        """The environment variable that stands in for the flag."""
        prefix = "FLANNELD_" if self.is_flannels else "TUNDP_"
        return prefix + self.name.upper().replace("-", "_")

    @property
    def field(self) -> str:
        """The attribute of Config."""
        return self.name.replace("-", "_")


def parse_bool(text: str) -> bool:
    """Go's strconv.ParseBool."""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError("is not true or false")


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


def _parse_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _parse_endpoints(text: str) -> tuple[str, ...]:
    if "@" in text:
        raise ValueError(
            "has a user or password in a URL; use --etcd-username and FLANNELD_ETCD_PASSWORD,"
            " which are never logged"
        )
    return _parse_list(text)


def _parse_address(text: str) -> IPv4Address | None:
    if not text:
        return None
    try:
        address = IPv4Address(text)
    except ValueError:
        raise ValueError("is not an IPv4 address (invalid public IP address)") from None
    if not ip.is_single_host(int(address)):
        raise ValueError("is no address of a host: peers could not send to it")
    return address


def _parse_margin(text: str) -> int:
    minutes = parse_int(text)
    if not 1 <= minutes <= MARGIN_MAX_MIN:
        raise ValueError(
            f"is out of range: minutes from 1 to {MARGIN_MAX_MIN}, since a lease lasts 24 hours"
        )
    return minutes


def _parse_lease_ttl(text: str) -> int:
    seconds = parse_int(text)
    if seconds < 1:
        raise ValueError("is out of range: seconds, at least 1")
    return seconds


def _parse_store(text: str) -> str:
    if text == ETCD_STORE or (text.startswith(FILE_STORE) and len(text) > len(FILE_STORE)):
        return text
    raise ValueError("is neither etcd nor file:PATH")


def _parse_tun_name(text: str) -> str:
    length = len(text.replace("%d", "0"))
    if not 1 <= length <= TUN_NAME_MAX or text in (".", "..") or not _TUN_NAME.fullmatch(text):
        raise ValueError(
            f"is not an interface name: 1 to {TUN_NAME_MAX} letters, digits, and ._- with at"
            " most one %d"
        )
    return text


def _parse_offloads(text: str) -> tuple[str, ...]:
    names = _parse_list(text)
    if unknown := sorted(set(names) - set(OFFLOADS)):
        raise ValueError(f"has {unknown[0]!r}, which is not one of {', '.join(OFFLOADS)}")
    return names


def _parse_workers(text: str) -> int:
    count = parse_int(text)
    if not 1 <= count <= WORKERS_MAX:
        raise ValueError(f"is out of range: 1 to {WORKERS_MAX}")
    return count


def _parse_cpus(text: str) -> tuple[int, ...]:
    numbers = tuple(parse_int(part) for part in _parse_list(text))
    if missing := sorted(set(numbers) - os.sched_getaffinity(0)):
        raise ValueError(f"has CPU {missing[0]}, which this process may not use")
    return numbers


def _parse_spin(text: str) -> int:
    microseconds = parse_int(text)
    if not 0 <= microseconds <= SPIN_MAX_US:
        raise ValueError(f"is out of range: microseconds, 0 to {SPIN_MAX_US}")
    return microseconds


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"is not one of {', '.join(choices)}")
        return text

    return parse


OPTIONS: Final[tuple[Option, ...]] = (
    Option(
        name="etcd-endpoints",
        parse=_parse_endpoints,
        default=("http://127.0.0.1:4001", "http://127.0.0.1:2379"),
        metavar="URL,...",
        help="etcd servers, tried in turn",
    ),
    Option(
        name="etcd-prefix",
        parse=str,
        default="/coreos.com/network",
        metavar="PATH",
        help="where in etcd the network config and the leases are",
    ),
    Option(
        name="etcd-username", parse=str, default="", metavar="NAME", help="user for etcd's auth"
    ),
    Option(
        name="etcd-password",
        parse=str,
        default="",
        metavar="TEXT",
        help="password for etcd's auth; better given as FLANNELD_ETCD_PASSWORD",
        is_secret=True,
    ),
    Option(
        name="etcd-cafile",
        parse=str,
        default="",
        metavar="FILE",
        help="CA that signed etcd's certificate",
    ),
    Option(
        name="etcd-certfile",
        parse=str,
        default="",
        metavar="FILE",
        help="client certificate for etcd",
    ),
    Option(
        name="etcd-keyfile", parse=str, default="", metavar="FILE", help="key of --etcd-certfile"
    ),
    Option(
        name="iface",
        parse=str,
        default=(),
        metavar="NAME|IP",
        help="interface to the other nodes; repeatable, the first that fits is taken"
        " (default: the one of --public-ip, else of the default route)",
        is_repeatable=True,
    ),
    Option(
        name="public-ip",
        parse=_parse_address,
        default=None,
        metavar="IP",
        help="address other nodes send to, when it is not the interface's own (NAT)",
    ),
    Option(
        name="subnet-file",
        parse=Path,
        default=Path("/run/flannel/subnet.env"),
        metavar="FILE",
        help="where to write this node's subnet and MTU for Docker and CNI",
    ),
    Option(
        name="subnet-lease-renew-margin",
        parse=_parse_margin,
        default=60,
        metavar="MINUTES",
        help="renew the lease so long before it expires",
    ),
    Option(
        name="v",
        parse=parse_int,
        default=0,
        metavar="LEVEL",
        help="log more: 1 adds per-packet errors and renewals",
    ),
    Option(
        name="help",
        parse=parse_bool,
        default=False,
        metavar="",
        help="print this and exit; also -h",
    ),
    Option(
        name="version",
        parse=parse_bool,
        default=False,
        metavar="",
        help="print the version and exit",
    ),
    Option(
        name="store",
        parse=_parse_store,
        default=ETCD_STORE,
        metavar="etcd|file:PATH",
        help="where leases live; a file serves all network namespaces of one machine,"
        " and leases written by hand",
        is_flannels=False,
    ),
    Option(
        name="engine",
        parse=_one_of(*ENGINES),
        default="auto",
        metavar="|".join(ENGINES),
        help="what moves the packets; auto takes the best there is",
        is_flannels=False,
    ),
    Option(
        name="disable-offloads",
        parse=_parse_offloads,
        default=(),
        metavar="NAME,...",
        help="what engine gso shall do without, of " + ", ".join(OFFLOADS),
        is_flannels=False,
    ),
    Option(
        name="workers",
        parse=_parse_workers,
        default=1,
        metavar="N",
        help="queues of the TUN and sockets of the underlay; a peer's datagrams stay with one"
        " of them, so more than one pays with several busy peers and more than 2 cores",
        is_flannels=False,
    ),
    Option(
        name="layout",
        parse=_one_of(*LAYOUTS),
        default="shared",
        metavar="|".join(LAYOUTS),
        help="one thread per worker for both directions, or one for each",
        is_flannels=False,
    ),
    Option(
        name="cpus",
        parse=_parse_cpus,
        default=(),
        metavar="N,...",
        help="bind the packet threads to these CPUs, in turn (default: the scheduler's choice)",
        is_flannels=False,
    ),
    Option(
        name="spin",
        parse=_parse_spin,
        default=50,
        metavar="MICROSECONDS",
        help="between requests and answers, poll at most so long for the next packet before"
        " sleeping, and only while that pays; 0 never",
        is_flannels=False,
    ),
    Option(
        name="loop",
        parse=_one_of(*LOOPS),
        default="auto",
        metavar="|".join(LOOPS),
        help="event loop; auto is uvloop where it is installed",
        is_flannels=False,
    ),
    Option(
        name="source-check",
        parse=_one_of(*(check.value for check in SourceCheck)),
        default=SourceCheck.COUNT.value,
        metavar="off|count|enforce",
        help="packets whose sender does not hold the lease of their inner source:"
        " let pass, let pass and count, or drop",
        is_flannels=False,
    ),
    Option(
        name="tun-name",
        parse=_parse_tun_name,
        default="flannel%d",
        metavar="NAME",
        help="TUN device; %%d becomes the lowest free number",
        is_flannels=False,
    ),
    Option(
        name="lease-ttl",
        parse=_parse_lease_ttl,
        default=LEASE_TTL_S,
        metavar="SECONDS",
        help="how long a lease lasts without renewal; flannel's is 24 hours",
        is_flannels=False,
    ),
    Option(
        name="admin-socket",
        parse=Path,
        default=Path("/run/tundp/admin.sock"),
        metavar="FILE",
        help="unix socket that `tundp status` asks",
        is_flannels=False,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One daemon's settings, checked. Field names are the flags' with underscores."""

    etcd_endpoints: tuple[str, ...]
    etcd_prefix: str
    etcd_username: str
    etcd_password: str
    etcd_cafile: str
    etcd_certfile: str
    etcd_keyfile: str
    iface: tuple[str, ...]
    public_ip: IPv4Address | None
    subnet_file: Path
    subnet_lease_renew_margin: int
    v: int
    help: bool
    version: bool
    store: str
    engine: str
    disable_offloads: tuple[str, ...]
    workers: int
    layout: str
    cpus: tuple[int, ...]
    spin: int
    loop: str
    source_check: str
    tun_name: str
    lease_ttl: int
    admin_socket: Path

    @property
    def store_path(self) -> Path | None:
        """The lease file of a file store, None for etcd."""
        if not self.store.startswith(FILE_STORE):
            return None
        return Path(self.store.removeprefix(FILE_STORE))

    def describe(self) -> str:
        """The settings that differ from the defaults, passwords blanked, for the log."""
        shown = []
        for option in OPTIONS:
            value = getattr(self, option.field)
            if value != option.default:
                text = "***" if option.is_secret else _show(value)
                shown.append(f"{option.name}={text}")
        return " ".join(shown) or "all defaults"


_NO_VARIABLE: Final = frozenset({"help", "version"})
"""FLANNELD_VERSION has no effect in flannel either: images set it."""


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """`FLANNELD_*` and `TUNDP_*` variables that are set and mean nothing here."""
    known = {option.variable for option in OPTIONS}
    return sorted(
        name
        for name, text in environment.items()
        if text and name.startswith(("FLANNELD_", "TUNDP_")) and name not in known
    )


def load_config(arguments: Sequence[str], environment: Mapping[str, str]) -> Config:
    """Flags over environment over defaults; ConfigError names the flag or variable."""
    given = _parse_arguments(arguments, OPTIONS)
    values: dict[str, Any] = {}
    for option in OPTIONS:
        if option.name in given:
            values[option.field] = given[option.name]
            continue
        text = "" if option.name in _NO_VARIABLE else environment.get(option.variable, "")
        if text:
            value = _convert(option, text, option.variable)
            values[option.field] = (value,) if option.is_repeatable else value
        else:
            values[option.field] = option.default
    config = Config(**values)
    if not (config.help or config.version):
        _check(config)
    return config


def _check(config: Config) -> None:
    if bool(config.etcd_certfile) != bool(config.etcd_keyfile):
        missing = "--etcd-keyfile" if config.etcd_certfile else "--etcd-certfile"
        raise ConfigError(f"{missing} is missing: a client certificate needs both files")
    if bool(config.etcd_username) != bool(config.etcd_password):
        missing = "--etcd-password" if config.etcd_username else "--etcd-username"
        raise ConfigError(f"{missing} is missing: etcd's auth needs both")
    if not config.etcd_endpoints:
        raise ConfigError("--etcd-endpoints is empty: give at least one URL")


def _parse_arguments(arguments: Sequence[str], options: Sequence[Option]) -> dict[str, Any]:
    by_name = {option.name: option for option in options}
    values: dict[str, Any] = {}
    queue = list(arguments)
    while queue:
        flag = queue.pop(0)
        if flag == "--":
            if queue:
                raise ConfigError(
                    f"unexpected argument {queue[0]!r} after --: only flags are taken"
                )
            break
        name, text = _split(flag)
        option = by_name.get(name)
        if option is None:
            raise ConfigError(_unknown(flag, name, by_name))
        if text is None:
            if option.is_boolean:
                text = "true"
            elif queue:
                text = queue.pop(0)
            else:
                raise ConfigError(f"flag needs an argument: --{name} {option.metavar}")
        value = _convert(option, text, f"--{name}")
        values[name] = (*values.get(name, ()), value) if option.is_repeatable else value
    return values


def _split(flag: str) -> tuple[str, str | None]:
    """The flag's name and the text after `=`, as Go splits them."""
    if not flag.startswith("-") or flag == "-":
        raise ConfigError(
            f"unexpected argument {flag!r}: only flags are taken; did a flag before it"
            " lose its value, or a boolean want `=`?"
        )
    body = flag[2:] if flag.startswith("--") else flag[1:]
    name, equals, text = body.partition("=")
    if not name or name.startswith("-"):
        raise ConfigError(f"bad flag syntax: {flag.partition('=')[0]}")
    return "help" if name == "h" else name, text if equals else None


def _unknown(flag: str, name: str, known: Mapping[str, Option]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean --{close[0]}?" if close else "tundp run --help lists them"
    return f"unknown flag {flag.partition('=')[0]}: {hint}"


def _convert(option: Option, text: str, origin: str) -> Any:
    try:
        return option.parse(text)
    except ValueError as error:
        shown = "***" if option.is_secret or "@" in text else repr(text)
        raise ConfigError(f"{origin} {shown} {error}") from None


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return str(value)
