"""TCP and UDP headers, as segmentation and coalescing need them: offsets, flags, checksums.

RFC 9293 (TCP), RFC 768 (UDP). Offsets are from the start of the transport header.
Native twin: native/src/transport.h.
"""

from __future__ import annotations

from typing import Final

from tundp.wire import checksum

PROTO_TCP: Final = 6
PROTO_UDP: Final = 17

TCP_MIN_HEADER_LEN: Final = 20
TCP_SEQ_OFF: Final = 4
TCP_ACK_OFF: Final = 8
TCP_DATA_OFF: Final = 12
TCP_FLAGS_OFF: Final = 13
TCP_WINDOW_OFF: Final = 14
TCP_CHECKSUM_OFF: Final = 16
TCP_URGENT_OFF: Final = 18

FIN: Final = 0x01
PSH: Final = 0x08
ACK: Final = 0x10
ECE: Final = 0x40
CWR: Final = 0x80

UDP_HEADER_LEN: Final = 8
UDP_LEN_OFF: Final = 4
UDP_CHECKSUM_OFF: Final = 6

HEADERS_MAX: Final = 120
"""IPv4 and TCP headers with all their options, 60 bytes each."""


def pseudo_sum(packet: bytes | bytearray | memoryview, transport_len: int) -> int:
    """One's-complement sum of the IPv4 pseudo-header (RFC 9293 section 3.1), folded.

    packet: begins with its IPv4 header. transport_len: bytes, transport header included.
    """
    return checksum.ones_complement_sum(
        bytes(packet[12:20]) + bytes((0, packet[9])) + transport_len.to_bytes(2, "big")
    )


def tcp_header_len(segment: bytes | bytearray | memoryview) -> int:
    """Header length from the data offset field, 0 to 60 bytes; `segment` has the minimal header."""
    return (segment[TCP_DATA_OFF] >> 4) * 4


def checksum_off(ip_proto: int) -> int:
    """Where the checksum is."""
    return TCP_CHECKSUM_OFF if ip_proto == PROTO_TCP else UDP_CHECKSUM_OFF


def is_valid(packet: bytes | bytearray | memoryview, header_len: int) -> bool:
    """Whether the transport checksum of a whole IPv4 packet is right.

    header_len: of the IPv4 header. A UDP checksum of 0 means there is none: not asked here.
    """
    transport = bytes(packet[header_len:])
    pseudo = pseudo_sum(packet, len(transport))
    return checksum.ones_complement_sum(pseudo.to_bytes(2, "big") + transport) == checksum.ONES


def finish(packet: bytearray, start: int, field: int, seed: int) -> None:
    """Store the checksum over packet[start:], whose sum so far is `seed`, at `field`.

    UDP (its field is 6 bytes behind the start) stores a sum of 0 as 0xFFFF (RFC 768).
    """
    packet[field : field + 2] = b"\0\0"
    value = checksum.checksum(seed.to_bytes(2, "big") + packet[start:])
    if value == 0 and field - start == UDP_CHECKSUM_OFF:
        value = checksum.ONES
    packet[field : field + 2] = value.to_bytes(2, "big")
