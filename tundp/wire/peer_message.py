"""Messages between tundp nodes: questions about a node, and their answers. Version 1.

A message is an inner packet between the TUN addresses of two nodes, IP protocol 253 (RFC 3692,
for experiments), carried over the underlay as any packet is. A kernel that knows no such protocol
answers protocol unreachable (RFC 792: type 3, code 2), and quotes at least 8 bytes of the message:
hence the nonce comes first. All numbers are big-endian.

    u64 nonce      random; of an answer that of its question
    4   "tund"
    u8  version
    u8  kind       Kind; bit 7 is set in an answer
    u16 length     bytes of the body that follow; what is behind them is padding

wire/peer_bodies.py has the bodies.

**An answer and the ICMP error of the answering node's kernel about the question are together not
longer than the question**, outer headers included (`answer_max`). So a question is padded with
zeros, and no peer makes a node send more than it received.
"""

from __future__ import annotations

import struct
from enum import IntEnum, unique
from typing import Final, NamedTuple

from tundp.wire import ip, overhead

IP_PROTO: Final = 253
"""RFC 3692 section 2.1: use for experimentation and testing."""
VERSION: Final = 1
MAGIC: Final = b"tund"
PACKET_MAX: Final = 1500
"""Bytes of the longest message, headers included."""
QUESTION_LEN: Final = 1200
"""Bytes of a question, headers included, where the TUN's MTU allows it."""

_HEADER: Final = struct.Struct("!Q4sBBH")
_IS_ANSWER: Final = 0x80
_NONCE_LEN: Final = 8
_ICMP_LEN: Final = 8
_ICMP_MAX: Final = 576
"""Bytes of the longest ICMP error (RFC 1812 4.3.2.3; net/ipv4/icmp.c, icmp_send)."""
_UNREACHABLE: Final = b"\x03\x02"
_TTL: Final = 64

HEAD_LEN: Final = ip.MIN_HEADER_LEN + _HEADER.size
"""Bytes before the body of a message we build."""


@unique
class Kind(IntEnum):
    """What is asked."""

    HELLO = 1
    REACH = 2
    TRACE_START = 3
    TRACE_NEXT = 4
    TRACE_STOP = 5
    REFUSED = 127


class Malformed(ValueError):  # noqa: N818  (as in tundp.errors)
    """Bytes that are no message, or a body that is not what its kind says."""


class Message(NamedTuple):
    """A message whose header is right; its body is not read yet."""

    nonce: int
    version: int
    kind: int
    is_answer: bool
    body: bytes


class Arrived(NamedTuple):
    """What an engine handed over."""

    source: int
    """Inner source, host order."""
    destination: int
    header_len: int
    """Bytes of its IPv4 header."""
    length: int
    """Bytes of the inner packet; of an ICMP error those that were handed over."""
    refused_nonce: int | None
    """The nonce of the question that a kernel refused (protocol unreachable)."""
    message: Message | None


# Packets


def answer_max(question_len: int, header_len: int = ip.MIN_HEADER_LEN) -> int:
    """Bytes of the longest inner packet that may answer one of `question_len` bytes; below 1: none.

    The kernel quotes the question in its protocol unreachable, in a datagram of its own.
    header_len: of the question; the kernel repeats its options in the error (net/ipv4/icmp.c).
    """
    refusal = min(question_len + _ICMP_LEN + header_len, _ICMP_MAX)
    return question_len - refusal - overhead.OVERHEAD


def build(
    message: Message, *, source: int, destination: int, packet_len: int = 0, ident: int = 0
) -> bytes:
    """An inner packet around a message, padded with zeros to `packet_len` bytes; host order."""
    head = _HEADER.pack(
        message.nonce,
        MAGIC,
        message.version,
        message.kind | (_IS_ANSWER if message.is_answer else 0),
        len(message.body),
    )
    payload = (head + message.body).ljust(packet_len - ip.MIN_HEADER_LEN, b"\0")
    header = ip.build_header(
        payload_len=len(payload),
        source=source,
        destination=destination,
        ip_proto=IP_PROTO,
        ttl=_TTL,
        identification=ident,
    )
    return header + payload


def read(packet: bytes) -> Arrived:
    """What an engine handed over: a message, or the head of a protocol unreachable. Malformed."""
    if len(packet) < ip.MIN_HEADER_LEN or packet[0] >> 4 != 4:
        raise Malformed("no IPv4 packet")
    header = ip.read(packet)
    start = header.header_len
    if not ip.MIN_HEADER_LEN <= start <= len(packet):
        raise Malformed("a broken IPv4 header")
    nonce, message = None, None
    if header.ip_proto == ip.PROTO_ICMP:
        nonce = _refused_nonce(packet[start:])
    elif header.ip_proto == IP_PROTO:
        message = _message(packet[start : max(start, header.total_len)])
    else:
        raise Malformed(f"IP protocol {header.ip_proto}")
    return Arrived(header.source, header.destination, start, len(packet), nonce, message)


def _refused_nonce(icmp: bytes) -> int:
    quoted = icmp[_ICMP_LEN:]
    if icmp[:2] != _UNREACHABLE or len(quoted) < ip.MIN_HEADER_LEN or quoted[9] != IP_PROTO:
        raise Malformed("no protocol unreachable about a message")
    start = (quoted[0] & 0x0F) * 4
    nonce = quoted[start : start + _NONCE_LEN]
    if quoted[0] >> 4 != 4 or start < ip.MIN_HEADER_LEN or len(nonce) < _NONCE_LEN:
        raise Malformed("a protocol unreachable that quotes no nonce")
    return int.from_bytes(nonce, "big")


def _message(payload: bytes) -> Message:
    if len(payload) < _HEADER.size:
        raise Malformed(f"a message of {len(payload)} bytes")
    nonce, magic, version, kind, length = _HEADER.unpack_from(payload)
    if magic != MAGIC:
        raise Malformed("not ours: the magic is another")
    if length > len(payload) - _HEADER.size:
        raise Malformed(f"a body of {length} bytes in {len(payload) - _HEADER.size}")
    body = payload[_HEADER.size : _HEADER.size + length]
    return Message(nonce, version, kind & ~_IS_ANSWER, bool(kind & _IS_ANSWER), body)
