"""What is known of one packet at one place of its way: the values that filters test.

A broken packet has fewer facts, never wrong ones. Of fewer than 20 bytes, or of a version that is
not 4, nothing is read; an IHL below 5 leaves the addresses, the protocol and the fragment flag;
transport fields are read of first fragments only, and only where they lie before the end of the
packet by total length as well as of the bytes that are there. No checksum is verified.
Native twin: native/src/facts.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, unique
from typing import Final

from tundp.wire import ip
from tundp.wire.drop import DropReason
from tundp.wire.transport import PROTO_TCP, PROTO_UDP, TCP_FLAGS_OFF

PROTO_SCTP: Final = 132
PORT_PROTOCOLS: Final = frozenset({PROTO_TCP, PROTO_UDP, PROTO_SCTP})
"""Protocols whose header begins with a source and a destination port of 16 bits each."""
QUOTING_TYPES: Final = frozenset({3, 4, 5, 11, 12})
"""ICMP errors, which quote the packet they are about behind 8 bytes of header (RFC 792)."""

_PORTS_LEN: Final = 4
_QUOTE_OFF: Final = 8


@unique
class Direction(IntEnum):
    """Which way a packet goes; numbers are those of C's TUNDP_ENCAP and TUNDP_DECAP."""

    ENCAP = 1
    """From the TUN to a peer."""
    DECAP = 2
    """From a peer to the TUN."""


@unique
class Field(IntEnum):
    """A value of 32 bits, by its number in C. Numbers from QUOTED_SOURCE on follow SOURCE's."""

    SOURCE = 0
    """Inner source address, host order."""
    DESTINATION = 1
    PROTOCOL = 2
    """IPv4 protocol number."""
    SOURCE_PORT = 3
    """Of TCP, UDP and SCTP."""
    DESTINATION_PORT = 4
    LENGTH = 5
    """Bytes of the packet as it was read or received: of a super-packet, the whole."""
    TCP_FLAGS = 6
    """Byte 13 of the TCP header: FIN 1, SYN 2, RST 4, PSH 8, ACK 16, URG 32, ECE 64, CWR 128."""
    FRAGMENT = 7
    """1 for a fragment (MF set, or an offset above 0), 0 for a whole packet."""
    OUTER = 8
    """Underlay address of the other node, host order: encap's destination, decap's source."""
    DIRECTION = 9
    REASON = 10
    """Why it was dropped, a DropReason; there only if it was."""
    QUOTED_SOURCE = 11
    """These five: of the packet that an ICMP error quotes."""
    QUOTED_DESTINATION = 12
    QUOTED_PROTOCOL = 13
    QUOTED_SOURCE_PORT = 14
    QUOTED_DESTINATION_PORT = 15


QUOTED: Final = Field.QUOTED_SOURCE - Field.SOURCE
"""What turns the number of a packet's field into that of the packet it quotes."""


@dataclass(frozen=True, slots=True)
class Facts:
    """The fields that are there. A field without a value is absent, which is not 0."""

    values: Mapping[Field, int]


def facts_of(
    packet: memoryview | bytes | bytearray,
    *,
    direction: Direction,
    outer: int | None = None,
    reason: DropReason | None = None,
    length: int | None = None,
) -> Facts:
    """The facts of a packet that begins with its IPv4 header; never raises on any bytes.

    outer: underlay address of the other node, host order; None or 0 while it is not known, as
    before the routing decision. reason: why the packet was dropped; None if it was not.
    length: bytes the packet had, if `packet` is only the first of them.
    """
    values = {Field.LENGTH: len(packet) if length is None else length, Field.DIRECTION: direction}
    if outer:
        values[Field.OUTER] = outer
    if reason is not None:
        values[Field.REASON] = reason
    transport = _header_facts(packet, Field.SOURCE, values)
    if Field.PROTOCOL in values:
        header = ip.read(packet)
        values[Field.FRAGMENT] = int(header.flags_offset & (ip.FLAG_MF | ip.OFFSET_MASK) != 0)
        if header.ip_proto == PROTO_TCP and len(transport) > TCP_FLAGS_OFF:
            values[Field.TCP_FLAGS] = transport[TCP_FLAGS_OFF]
        if header.ip_proto == ip.PROTO_ICMP and transport and transport[0] in QUOTING_TYPES:
            _header_facts(transport[_QUOTE_OFF:], Field.QUOTED_SOURCE, values)
    return Facts(values)


def _header_facts(
    packet: memoryview | bytes | bytearray, first: Field, values: dict[Field, int]
) -> memoryview | bytes | bytearray:
    """Add a packet's addresses, protocol and ports as the fields from `first` on.

    The transport header and what follows, as far as both are there: empty behind the first
    fragment, and if the header does not say where it begins.
    """
    if len(packet) < ip.MIN_HEADER_LEN or packet[0] >> 4 != 4:
        return b""
    header = ip.read(packet)
    values[first] = header.source
    values[Field(first + Field.DESTINATION)] = header.destination
    values[Field(first + Field.PROTOCOL)] = header.ip_proto
    if header.header_len < ip.MIN_HEADER_LEN or header.fragment_offset:
        return b""
    transport = packet[header.header_len : header.total_len]
    if header.ip_proto in PORT_PROTOCOLS and len(transport) >= _PORTS_LEN:
        values[Field(first + Field.SOURCE_PORT)] = int.from_bytes(transport[:2], "big")
        values[Field(first + Field.DESTINATION_PORT)] = int.from_bytes(transport[2:4], "big")
    return transport
