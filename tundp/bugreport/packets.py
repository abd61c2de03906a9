"""Packets as a report may hold them: headers only, and with pseudonyms for addresses if asked for.

The payload behind the transport header is cut off. An ICMP error keeps the headers it quotes.
"""

from __future__ import annotations

import struct
from typing import Final

from tundp.bugreport.pseudonyms import Pseudonyms
from tundp.wire import checksum, icmp, ip, transport

_ICMP_LEN: Final = 8
_REDIRECT: Final = 5
_QUOTING: Final = frozenset({icmp.TYPE_DEST_UNREACHABLE, 4, _REDIRECT, icmp.TYPE_TIME_EXCEEDED, 12})
"""ICMP types that quote the packet they are about (RFC 792)."""
_NOP: Final = 1
_ADDRESSES: Final = struct.Struct("!II")
_ADDRESSES_AT: Final = 12
_CHECKSUM_AT: Final = {transport.PROTO_TCP: 16, transport.PROTO_UDP: 6, ip.PROTO_ICMP: 2}
"""Where a transport header has its checksum."""


def headers_len(packet: bytes | bytearray) -> int:
    """How many of a packet's first bytes are headers, from the IPv4 header on.

    Of what is no IPv4 packet, none.
    """
    start = _ip_header_len(packet)
    if not start:
        return 0
    rest = packet[start:]
    if int.from_bytes(packet[6:8], "big") & ip.OFFSET_MASK:
        return start
    kind = packet[9]
    if kind == transport.PROTO_TCP:
        offset = (rest[12] >> 4) * 4 if len(rest) > 12 else transport.TCP_MIN_HEADER_LEN
        return min(len(packet), start + max(offset, transport.TCP_MIN_HEADER_LEN))
    if kind == transport.PROTO_UDP:
        return min(len(packet), start + transport.UDP_HEADER_LEN)
    if kind == ip.PROTO_ICMP:
        length = start + _ICMP_LEN
        if rest and rest[0] in _QUOTING:
            length += min(headers_len(packet[length:]), ip.MIN_HEADER_LEN + 40 + _ICMP_LEN)
        return min(len(packet), length)
    return start


def headers_of(packet: bytes | bytearray) -> bytes:
    """A packet without its payload."""
    return bytes(packet[: headers_len(packet)])


def renamed(packet: bytes, pseudonyms: Pseudonyms) -> bytes:
    """Headers of an IPv4 packet with pseudonyms for its addresses.

    packet: from the IPv4 header on, without payload. A header checksum that was right is right
    again, a wrong one stays wrong. Checksums of TCP, UDP and of ICMP errors cover what is not here:
    they are 0. Options, which may hold addresses, become no-operations.
    """
    changed = bytearray(packet)
    _rename(changed, 0, pseudonyms)
    return bytes(changed)


def _rename(packet: bytearray, at: int, pseudonyms: Pseudonyms) -> None:
    """Rename the packet that begins at `at`, and what it quotes, in place."""
    whole = packet[at:]
    header_len = _ip_header_len(whole)
    if not header_len:
        return
    header = whole[:header_len]
    was_right = checksum.is_valid(bytes(header))
    source, destination = _ADDRESSES.unpack_from(header, _ADDRESSES_AT)
    _ADDRESSES.pack_into(
        header, _ADDRESSES_AT, pseudonyms.ipv4(source), pseudonyms.ipv4(destination)
    )
    header[ip.MIN_HEADER_LEN :] = bytes([_NOP]) * (header_len - ip.MIN_HEADER_LEN)
    ip.store_checksum(header, header_len)
    if not was_right:
        header[10] ^= 0xFF
    packet[at : at + header_len] = header
    if int.from_bytes(header[6:8], "big") & ip.OFFSET_MASK:
        return
    _rename_transport(packet, at + header_len, header[9], pseudonyms)


def _rename_transport(packet: bytearray, at: int, kind: int, pseudonyms: Pseudonyms) -> None:
    if kind == ip.PROTO_ICMP:
        if len(packet) <= at or packet[at] not in _QUOTING:
            return  # no address in it
        if packet[at] == _REDIRECT and len(packet) >= at + _ICMP_LEN:
            gateway = int.from_bytes(packet[at + 4 : at + 8], "big")
            packet[at + 4 : at + 8] = pseudonyms.ipv4(gateway).to_bytes(4, "big")
        _rename(packet, at + _ICMP_LEN, pseudonyms)
    place = _CHECKSUM_AT.get(kind)
    if place is not None and len(packet) >= at + place + 2:
        packet[at + place : at + place + 2] = bytes(2)


def _ip_header_len(packet: bytes | bytearray) -> int:
    """Bytes of an IPv4 header; 0 if there is no whole one."""
    if len(packet) < ip.MIN_HEADER_LEN or packet[0] >> 4 != 4:
        return 0
    length = (packet[0] & 0x0F) * 4
    return length if ip.MIN_HEADER_LEN <= length <= len(packet) else 0
