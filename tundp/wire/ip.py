"""IPv4 header: reading it, and the checks a router owes every packet (RFC 791, 1812 5.2.2)."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from tundp.wire import checksum
from tundp.wire.drop import DropReason

MIN_HEADER_LEN: Final = 20
MIN_MTU: Final = 68
"""The smallest MTU an IPv4 link may have (RFC 791, 3.2)."""

MAX_PACKET_LEN: Final = 0xFFFF

PROTO_ICMP: Final = 1

FLAG_DF: Final = 0x4000
FLAG_MF: Final = 0x2000
OFFSET_MASK: Final = 0x1FFF

_HEADER: Final = struct.Struct("!BBHHHBBHII")
_TTL_OFF: Final = 8
_CHECKSUM_OFF: Final = 10


class Ipv4Header(NamedTuple):
    """The fixed 20 bytes, field by field; integers in host order."""

    version_ihl: int
    tos: int
    total_len: int
    identification: int
    flags_offset: int
    ttl: int
    ip_proto: int
    header_checksum: int
    source: int
    destination: int

    @property
    def header_len(self) -> int:
        """Bytes of header, options included: 20 to 60."""
        return (self.version_ihl & 0x0F) * 4

    @property
    def fragment_offset(self) -> int:
        """Offset of this fragment in units of 8 bytes."""
        return self.flags_offset & OFFSET_MASK

    @property
    def dont_fragment(self) -> bool:
        """DF: a router must not fragment this packet."""
        return bool(self.flags_offset & FLAG_DF)


def parse(packet: memoryview) -> Ipv4Header | DropReason:
    """The header of `packet`, or the first reason not to carry it.

    `packet` is one inner packet, no link header. Bytes beyond total length are
    allowed (the caller trims them); fewer are not.
    """
    if len(packet) < MIN_HEADER_LEN:
        return DropReason.TOO_SHORT
    header = Ipv4Header._make(_HEADER.unpack_from(packet))
    if header.version_ihl >> 4 != 4:
        return DropReason.NOT_IPV4
    header_len = (header.version_ihl & 0x0F) * 4
    if header_len < MIN_HEADER_LEN or header_len > len(packet):
        return DropReason.BAD_HEADER_LENGTH
    if header.total_len < header_len or header.total_len > len(packet):
        return DropReason.BAD_TOTAL_LENGTH
    if header.fragment_offset * 8 + header.total_len > MAX_PACKET_LEN:
        # No packet is that long: the "ping of death", and nothing fragments of it can name.
        return DropReason.BAD_TOTAL_LENGTH
    if not checksum.is_valid(packet[:header_len]):
        return DropReason.BAD_HEADER_CHECKSUM
    return header


def is_unicast(address: int) -> bool:
    """Whether an address (host order) is no multicast (224/4) and no limited broadcast address.

    240/4 counts as unicast, as in the kernel (ipv4_is_multicast and ipv4_is_lbcast in
    include/linux/in.h are what ip_route_input_slow refuses; Linux routes 240/4 since 2.6.25).
    """
    return address >> 28 != 0xE and address != 0xFFFFFFFF


def is_single_host(address: int) -> bool:
    """Whether an address (host order) is unicast, and not in 0/8 or 127/8 (RFC 1122 3.2.1.3).

    Linux 5.3 and later takes 0.0.0.1 to 0.255.255.255 for unicast; this does not.
    """
    return is_unicast(address) and address >> 24 not in (0, 127)


def decrement_ttl(packet: memoryview, header: Ipv4Header) -> None:
    """Lower the TTL of `packet` in place and patch its checksum. The TTL must be above 0."""
    packet[_TTL_OFF] = header.ttl - 1
    struct.pack_into(
        "!H", packet, _CHECKSUM_OFF, checksum.after_ttl_decrement(header.header_checksum)
    )


def restore_ttl(packet: bytearray, header: Ipv4Header) -> None:
    """Undo decrement_ttl in place. header: as it now stands in `packet`."""
    packet[_TTL_OFF] = header.ttl + 1
    value = checksum.before_ttl_decrement(header.header_checksum)
    packet[_CHECKSUM_OFF : _CHECKSUM_OFF + 2] = value.to_bytes(2, "big")


def read(packet: memoryview | bytes | bytearray) -> Ipv4Header:
    """The header of a packet that `parse` has accepted before."""
    return Ipv4Header._make(_HEADER.unpack_from(packet))


def store_checksum(packet: bytearray, header_len: int) -> None:
    """Compute the header checksum of `packet` afresh, in place."""
    packet[_CHECKSUM_OFF : _CHECKSUM_OFF + 2] = b"\0\0"
    value = checksum.checksum(packet[:header_len])
    packet[_CHECKSUM_OFF : _CHECKSUM_OFF + 2] = value.to_bytes(2, "big")


def build_header(
    *,
    payload_len: int,
    source: int,
    destination: int,
    ip_proto: int,
    ttl: int,
    tos: int = 0,
    identification: int = 0,
    flags_offset: int = 0,
    options: bytes = b"",
) -> bytes:
    """An IPv4 header with its checksum; `options` must be a multiple of 4 bytes, at most 40."""
    header_len = MIN_HEADER_LEN + len(options)
    fields = (
        0x40 | header_len // 4,
        tos,
        header_len + payload_len,
        identification,
        flags_offset,
        ttl,
        ip_proto,
    )
    blank = _HEADER.pack(*fields, 0, source, destination) + options
    return _HEADER.pack(*fields, checksum.checksum(blank), source, destination) + options
