"""ICMP errors about inner packets (RFC 792, 1191, 1812 4.3).

Each builder takes the offending packet, exactly as it arrived and trimmed to its own
total length, and gives back one whole IPv4 packet, or None where the RFCs forbid an
answer. So nothing beyond the real packet can be quoted.

Net unreachable is byte for byte the one flannel's proxy builds. Two differences in
*when*: flannel stays silent about every ICMP packet, here only about ICMP errors
(RFC 1122 3.2.2), so a ping without a route is answered; and the other suppression rules of
RFC 1122/1812, which flannel lacks, hold.
"""

from __future__ import annotations

import struct
from typing import Final

from tundp.wire import checksum, ip

TYPE_DEST_UNREACHABLE: Final = 3
TYPE_TIME_EXCEEDED: Final = 11
CODE_NET_UNREACHABLE: Final = 0
CODE_PROTOCOL_UNREACHABLE: Final = 2
CODE_FRAGMENTATION_NEEDED: Final = 4
CODE_TTL_EXCEEDED: Final = 0

FLANNEL_TTL: Final = 8
"""TTL of flannel's net unreachable."""
DEFAULT_TTL: Final = 64
"""TTL of the errors flannel does not have (RFC 1700)."""
INTERNETWORK_CONTROL: Final = 0xC0
"""TOS of the errors flannel does not have: precedence 6 (RFC 1812 4.3.2.5)."""
MAX_ERROR_LEN: Final = 576
"""An ICMP error quotes as much as fits this many bytes (RFC 1812 4.3.2.3)."""
FLANNEL_QUOTE_LEN: Final = 8
"""Bytes quoted behind the inner header in flannel's net unreachable (RFC 792)."""

_ICMP_HEADER: Final = struct.Struct("!BBHI")
_QUERY_TYPES: Final = frozenset({0, 8, 9, 10, 13, 14, 15, 16, 17, 18})
"""ICMP types that ask or answer a question (RFC 792, 950, 1256); all others are errors."""


def net_unreachable(offender: memoryview, header: ip.Ipv4Header, tun_address: int) -> bytes | None:
    """Destination unreachable, code 0, with flannel's own field values."""
    if not may_answer(offender, header):
        return None
    return _build(
        offender[: header.header_len + FLANNEL_QUOTE_LEN],
        destination=header.source,
        tun_address=tun_address,
        icmp_type=TYPE_DEST_UNREACHABLE,
        code=CODE_NET_UNREACHABLE,
        ttl=FLANNEL_TTL,
    )


def time_exceeded(offender: memoryview, header: ip.Ipv4Header, tun_address: int) -> bytes | None:
    """Time exceeded in transit, code 0."""
    if not may_answer(offender, header):
        return None
    return _build(
        _long_quote(offender),
        destination=header.source,
        tun_address=tun_address,
        icmp_type=TYPE_TIME_EXCEEDED,
        code=CODE_TTL_EXCEEDED,
        ttl=DEFAULT_TTL,
        tos=INTERNETWORK_CONTROL,
    )


def fragmentation_needed(
    offender: memoryview, header: ip.Ipv4Header, tun_address: int, *, mtu: int
) -> bytes | None:
    """Destination unreachable, code 4, with the next-hop MTU in bytes (RFC 1191 section 4)."""
    if not may_answer(offender, header):
        return None
    return _build(
        _long_quote(offender),
        destination=header.source,
        tun_address=tun_address,
        icmp_type=TYPE_DEST_UNREACHABLE,
        code=CODE_FRAGMENTATION_NEEDED,
        rest=mtu,
        ttl=DEFAULT_TTL,
        tos=INTERNETWORK_CONTROL,
    )


def described(packet: bytes) -> str:
    """Type and code, in words, of an ICMP error that a function above has built."""
    kind, code = packet[ip.MIN_HEADER_LEN], packet[ip.MIN_HEADER_LEN + 1]
    if kind == TYPE_TIME_EXCEEDED:
        return "time exceeded"
    if code == CODE_FRAGMENTATION_NEEDED:
        at = ip.MIN_HEADER_LEN + 6
        return f"fragmentation needed, MTU {int.from_bytes(packet[at : at + 2], 'big')}"
    return "net unreachable"


def may_answer(offender: memoryview, header: ip.Ipv4Header) -> bool:
    """Whether an ICMP error may be sent about this packet (RFC 1122 3.2.2, 1812 4.3.2.7)."""
    if header.fragment_offset:
        return False
    if not ip.is_single_host(header.source) or not ip.is_unicast(header.destination):
        return False
    if header.ip_proto == ip.PROTO_ICMP:
        return len(offender) > header.header_len and offender[header.header_len] in _QUERY_TYPES
    return True


def _long_quote(offender: memoryview) -> memoryview:
    return offender[: MAX_ERROR_LEN - ip.MIN_HEADER_LEN - _ICMP_HEADER.size]


def _build(
    quote: memoryview,
    *,
    destination: int,
    tun_address: int,
    icmp_type: int,
    code: int,
    ttl: int,
    rest: int = 0,
    tos: int = 0,
) -> bytes:
    blank = _ICMP_HEADER.pack(icmp_type, code, 0, rest) + quote
    body = _ICMP_HEADER.pack(icmp_type, code, checksum.checksum(blank), rest) + quote
    header = ip.build_header(
        payload_len=len(body),
        source=tun_address,
        destination=destination,
        ip_proto=ip.PROTO_ICMP,
        ttl=ttl,
        tos=tos,
    )
    return header + body
