"""Every flag there is: its name, how its text becomes a value, its default and its help.

Flannel's come first, with flannel's names, defaults and syntax; then our own. Parsers
raise ValueError with what is wrong, worded to follow the flag and its value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any, Final

from tundp.wire import ip
from tundp.wire.encap import SourceCheck

LEASE_TTL_S: Final = 86400
TUN_NAME_MAX: Final = 15
"""IFNAMSIZ - 1 (linux/if.h)."""
MARGIN_MAX_MIN: Final = 1439
RESYNC_MAX_S: Final = 86400
FILE_STORE: Final = "file:"
ETCD_STORE: Final = "etcd"
LOOPS: Final = ("auto", "uvloop", "asyncio")
ENGINES: Final = ("auto", "gso", "mmsg", "simple", "reference")
OFFLOADS: Final = ("tun-tso", "tun-uso", "udp-segment", "udp-gro", "tcp-coalesce", "udp-coalesce")
LAYOUTS: Final = ("shared", "split")
ETCD_APIS: Final = ("auto", "v2", "v3", "both")
SUBNET_FILE: Final = Path("/run/flannel/subnet.env")
RUN_DIRECTORY: Final = Path("/run/tundp")
ADMIN_SOCKET: Final = RUN_DIRECTORY / "admin.sock"
WORKERS_MAX: Final = 64
SPIN_MAX_US: Final = 1000

_INT: Final = re.compile(r"[+-]?[0-9a-zA-Z_]+", re.ASCII)
_GO_OCTAL: Final = re.compile(r"([+-]?)0([0-7_]+)", re.ASCII)
_LISTEN: Final = re.compile(
    r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<v4>[0-9.]*)):(?P<port>[0-9]{1,5})", re.ASCII
)
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
    shown_default: str = ""
    """For the help text, where the default is worked out from other flags."""

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
        """The attribute of Settings."""
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


def _parse_address6(text: str) -> IPv6Address | None:
    if not text:
        return None
    try:
        return IPv6Address(text)
    except ValueError:
        raise ValueError("is not an IPv6 address (invalid public IPv6 address)") from None


def _parse_resync(text: str) -> int:
    seconds = parse_int(text)
    if seconds < 1:
        raise ValueError("is out of range: seconds, at least 1")
    return min(seconds, RESYNC_MAX_S)


def _parse_health_ip(text: str) -> str:
    if text in ("", "localhost"):
        return "127.0.0.1" if text else "0.0.0.0"
    try:
        return str(ip_address(text))
    except ValueError:
        raise ValueError("is not an IP address to listen on, such as 127.0.0.1") from None


def _parse_health_port(text: str) -> int:
    port = parse_int(text)
    if not 0 <= port <= 65535:
        raise ValueError("is out of range: a TCP port, 0 for off")
    return port


def _parse_listen(text: str) -> tuple[str, int] | None:
    if not text:
        return None
    wrong = "is not ADDRESS:PORT, such as 127.0.0.1:9285, [::1]:9285 or :9285 (this host only)"
    match = _LISTEN.fullmatch(text)
    if match is None or not 1 <= int(match["port"]) <= 65535:
        raise ValueError(wrong)
    try:
        return str(ip_address(match["v6"] or match["v4"] or "127.0.0.1")), int(match["port"])
    except ValueError:
        raise ValueError(wrong) from None


def _parse_file(text: str) -> Path:
    if not text or "\0" in text:
        raise ValueError("is no path of a file")
    return Path(text)


def parse_path(text: str) -> Path | None:
    """A path, or None for the empty text."""
    return Path(text) if text else None


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
        name="iface-regex",
        parse=str,
        default=(),
        metavar="REGEX",
        help="interface by regular expression on addresses, then on names; repeatable, tried"
        " after every --iface",
        is_repeatable=True,
    ),
    Option(
        name="iface-can-reach",
        parse=_parse_address,
        default=None,
        metavar="IP",
        help="interface the kernel would send to this address from; tried last",
    ),
    Option(
        name="public-ip",
        parse=_parse_address,
        default=None,
        metavar="IP",
        help="address other nodes send to, when it is not the interface's own (NAT)",
    ),
    Option(
        name="public-ipv6",
        parse=_parse_address6,
        default=None,
        metavar="IP6",
        help="IPv6 address to advertise in a dual-stack network; the udp backend sends none",
    ),
    Option(
        name="subnet-file",
        parse=_parse_file,
        default=SUBNET_FILE,
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
        name="ip-masq",
        parse=parse_bool,
        default=False,
        metavar="",
        help="masquerade what leaves the network for elsewhere",
    ),
    Option(
        name="ip-masq-fully-random-disable",
        parse=parse_bool,
        default=False,
        metavar="",
        help="let masquerading keep source ports where it can (no --random-fully)",
    ),
    Option(
        name="iptables-resync",
        parse=_parse_resync,
        default=5,
        metavar="SECONDS",
        help="look after the firewall rules this often, where the kernel does not tell of changes",
    ),
    Option(
        name="iptables-forward-rules",
        parse=parse_bool,
        default=True,
        metavar="",
        help="accept forwarding from and to the network; =false to leave FORWARD alone",
    ),
    Option(
        name="ip-blackhole-route",
        parse=parse_bool,
        default=False,
        metavar="",
        help="blackhole this node's own subnet where no bridge has it",
    ),
    Option(
        name="healthz-ip",
        parse=_parse_health_ip,
        default="0.0.0.0",
        metavar="IP",
        help="address of /healthz and /readyz",
    ),
    Option(
        name="healthz-port",
        parse=_parse_health_port,
        default=0,
        metavar="PORT",
        help="port of /healthz and /readyz, 0 for none; ?verbose names every check",
    ),
    Option(
        name="kube-subnet-mgr",
        parse=parse_bool,
        default=False,
        metavar="",
        help="leases from the Kubernetes API; not yet in tundp",
    ),
    Option(
        name="kube-api-url",
        parse=str,
        default="",
        metavar="URL",
        help="Kubernetes API server; not yet in tundp",
    ),
    Option(
        name="kubeconfig-file",
        parse=str,
        default="",
        metavar="FILE",
        help="kubeconfig; not yet in tundp",
    ),
    Option(
        name="kube-annotation-prefix",
        parse=str,
        default="flannel.alpha.coreos.com",
        metavar="PREFIX",
        help="of node annotations; without effect until there is --kube-subnet-mgr",
    ),
    Option(
        name="net-config-path",
        parse=Path,
        default=Path("/etc/kube-flannel/net-conf.json"),
        metavar="FILE",
        help="network config under Kubernetes; without effect likewise",
    ),
    Option(
        name="set-node-network-unavailable",
        parse=parse_bool,
        default=True,
        metavar="",
        help="clear the node's NetworkUnavailable condition; without effect likewise",
    ),
    Option(
        name="v",
        parse=parse_int,
        default=0,
        metavar="LEVEL",
        help="log more: 1 adds per-packet errors and renewals",
    ),
    Option(
        name="vmodule",
        parse=str,
        default="",
        metavar="LIST",
        help="levels of single loggers, as in tundp.store=1,grpclib=1; secrets stay hidden",
    ),
    Option(
        name="log_backtrace_at",
        parse=str,
        default="",
        metavar="FILE:LINE",
        help="klog's backtraces; accepted, without effect",
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
        name="config",
        parse=parse_path,
        default=None,
        metavar="FILE",
        help='TOML file with any of these flags: ip-masq = true, iface = ["eth0"]',
        is_flannels=False,
    ),
    Option(
        name="etcd-api",
        parse=_one_of(*ETCD_APIS),
        default="auto",
        metavar="|".join(ETCD_APIS),
        help="API of etcd that holds the leases; auto looks where the network config is (both:"
        " v3); both registers this node in either, for a cluster of old and new flannels",
        is_flannels=False,
    ),
    Option(
        name="on-lease-lost",
        parse=_one_of("regain", "exit"),
        default="regain",
        metavar="regain|exit",
        help="when the lease is gone: go on and get the same subnet back, or exit with code 0"
        " as flannel does",
        is_flannels=False,
    ),
    Option(
        name="force-takeover",
        parse=parse_bool,
        default=False,
        metavar="",
        help="take the lease of another node with our PublicIP even while that node answers",
        is_flannels=False,
    ),
    Option(
        name="state-dir",
        parse=parse_path,
        default=Path("/var/lib/tundp"),
        metavar="DIR",
        help="keeps the node id and the last known leases; empty: nothing is kept",
        is_flannels=False,
    ),
    Option(
        name="fallback-route",
        parse=parse_bool,
        default=True,
        metavar="",
        help="an unreachable route under the network's, metric 4096, so that nothing leaks to"
        " the default gateway while the device is away",
        is_flannels=False,
    ),
    Option(
        name="metrics-addr",
        parse=_parse_listen,
        default=None,
        metavar="[IP]:PORT",
        help="serve Prometheus metrics here, :PORT meaning 127.0.0.1 (default: not at all)",
        is_flannels=False,
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
        help="packets whose sender does not hold the lease of their inner source, or whose inner"
        " destination is not this node's: let pass, let pass and count, or drop",
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
        parse=parse_path,
        default=None,
        metavar="FILE",
        help="unix socket that `tundp status` asks",
        is_flannels=False,
        shown_default=f"{ADMIN_SOCKET}; with another --subnet-file, one named after that",
    ),
)
