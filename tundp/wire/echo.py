"""ICMP echo requests of a given size, and the replies to them (RFC 792, 1122 3.2.2.6).

A reply carries the request's data, so a cookie in the data that nobody can guess shows that this
one request arrived, which was sent whole or not at all. The length of the reply shows nothing more:
a host on the way back may have fragmented it, and its first fragment has the cookie.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from tundp.wire import checksum, ip

TYPE_REPLY: Final = 0
TYPE_REQUEST: Final = 8
COOKIE_LEN: Final = 16
_HEADER: Final = struct.Struct("!BBHHH")
HEAD_LEN: Final = _HEADER.size + COOKIE_LEN
"""Bytes of an ICMP message up to the end of the cookie."""
MIN_REQUEST_LEN: Final = ip.MIN_HEADER_LEN + HEAD_LEN
_TTL: Final = 64


class EchoReply(NamedTuple):
    """What came back."""

    source: int
    """IPv4 address, host order."""
    identifier: int
    cookie: bytes


def build_request(
    packet_len: int, *, source: int, destination: int, identifier: int, cookie: bytes
) -> bytes:
    """An IPv4 packet of `packet_len` bytes, at least MIN_REQUEST_LEN; addresses in host order.

    DF is clear: what a host on the way back fragments arrives as well.
    """
    if len(cookie) != COOKIE_LEN or packet_len < MIN_REQUEST_LEN:
        raise ValueError(f"an echo request of {packet_len} bytes with {len(cookie)} of cookie")
    data = cookie + bytes(packet_len - MIN_REQUEST_LEN)
    blank = _HEADER.pack(TYPE_REQUEST, 0, 0, identifier, 0) + data
    body = _HEADER.pack(TYPE_REQUEST, 0, checksum.checksum(blank), identifier, 0) + data
    header = ip.build_header(
        payload_len=len(body),
        source=source,
        destination=destination,
        ip_proto=ip.PROTO_ICMP,
        ttl=_TTL,
    )
    return header + body


def is_reply(message: memoryview, identifier: int | None) -> bool:
    """Whether an ICMP message, at least HEAD_LEN bytes, is an echo reply with this identifier."""
    kind, code, _, found, _ = _HEADER.unpack_from(message)
    return (kind, code) == (TYPE_REPLY, 0) and found == identifier


def read_reply(packet: bytes) -> EchoReply | None:
    """Decode the head of an IPv4 packet, up to the cookie; None if it is no echo reply's."""
    if len(packet) < MIN_REQUEST_LEN:
        return None
    start = (packet[0] & 0x0F) * 4
    if start < ip.MIN_HEADER_LEN or len(packet) < start + HEAD_LEN:
        return None
    kind, code, _, identifier, _ = _HEADER.unpack_from(packet, start)
    if (kind, code) != (TYPE_REPLY, 0):
        return None
    data = start + _HEADER.size
    return EchoReply(
        source=int.from_bytes(packet[12:16], "big"),
        identifier=identifier,
        cookie=packet[data : data + COOKIE_LEN],
    )
