"""Counts of what the kernel lost before this process could see it.

Both are cheap, synchronous looks at the namespace of the calling process, for a status or a
scrape: neither depends on how many links, routes or peers there are.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tundp.errors import PlatformError

_SNMP: Final = Path("/proc/self/net/snmp")

# linux/rtnetlink.h, linux/if_link.h
_RTM_GETSTATS: Final = 94
_NLM_F_REQUEST: Final = 1
_NLMSG_ERROR: Final = 2
_IFLA_STATS_LINK_64: Final = 1
_HEADER: Final = struct.Struct("=IHHII")
_IF_STATS: Final = struct.Struct("=BxxxII")
"""struct if_stats_msg: family, ifindex, filter_mask."""
_ATTRIBUTE: Final = struct.Struct("=HH")
_STATS64: Final = struct.Struct("=8Q")
"""struct rtnl_link_stats64 begins: rx and tx packets, bytes, errors, dropped."""
_ANSWER_LEN: Final = 4096


@dataclass(frozen=True, slots=True)
class TxCounts:
    """What the kernel counts of the packets it routed into a device, since the device was made."""

    packets: int
    """Taken by the device; of a TUN: read by who holds its descriptor."""
    dropped: int
    """Not taken; of a TUN: its queue was full."""


def tx_counts(index: int) -> TxCounts:
    """Ask the kernel for a link's counters (RTM_GETSTATS, kernel 4.7). PlatformError if gone."""
    body = _IF_STATS.pack(socket.AF_UNSPEC, index, 1 << (_IFLA_STATS_LINK_64 - 1))
    request = _HEADER.pack(_HEADER.size + len(body), _RTM_GETSTATS, _NLM_F_REQUEST, 1, 0) + body
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
            # The kernel answers while it takes the request: there is nothing to wait for.
            sock.sendto(request, (0, 0))
            answer = sock.recv(_ANSWER_LEN)
    except OSError as error:
        raise PlatformError(f"counters of link {index}: {error.strerror}", error.errno) from None
    if _HEADER.unpack_from(answer)[1] == _NLMSG_ERROR:
        code = -struct.unpack_from("=i", answer, _HEADER.size)[0]
        raise PlatformError(f"counters of link {index}: refused by the kernel ({code})", code)
    at = _HEADER.size + _IF_STATS.size
    while at + _ATTRIBUTE.size <= len(answer):
        length, kind = _ATTRIBUTE.unpack_from(answer, at)
        if kind == _IFLA_STATS_LINK_64:
            stats = _STATS64.unpack_from(answer, at + _ATTRIBUTE.size)
            return TxCounts(packets=stats[1], dropped=stats[7])
        at += max(length + 3 & ~3, _ATTRIBUTE.size)
    raise PlatformError(f"counters of link {index}: the kernel's answer has none")


@dataclass(frozen=True, slots=True, kw_only=True)
class UdpErrors:
    """UDP datagrams a network namespace lost on receipt, over IPv4 (RFC 4113, udpInErrors)."""

    all: int = 0
    """InErrors: for whatever reason, those below and full socket buffers included."""
    checksum: int = 0
    """InCsumErrors."""

    def since(self, base: UdpErrors) -> UdpErrors:
        """What came to these counts since they were `base`."""
        return UdpErrors(all=self.all - base.all, checksum=self.checksum - base.checksum)


def udp_errors() -> UdpErrors:
    """Read the namespace's counters; zeros where /proc is not to be read."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        rows = [line.split() for line in _SNMP.read_text(encoding="ascii").splitlines()]
        names, values = (row for row in rows if row[0] == "Udp:")
        found = dict(zip(names[1:], map(int, values[1:]), strict=True))
    return UdpErrors(all=found.get("InErrors", 0), checksum=found.get("InCsumErrors", 0))
