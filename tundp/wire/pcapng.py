"""Blocks of a pcapng file (draft-ietf-opsawg-pcapng), as bytes; and an outer datagram made again.

A file is a section header, an interface block for each interface before the first packet of it,
packets, names and, at the end, statistics. All in little-endian order, times in nanoseconds since
1970 (if_tsresol 9), every interface of LINKTYPE_IPV4: libpcap refuses a file whose interfaces
differ in link type or snapshot length. The reader is tundp/wire/capture_file.py.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import Final

from tundp.wire import ip, overhead, transport
from tundp.wire.capture_file import LINKTYPE_IPV4

COMMENT_MAX: Final = 1024
"""Characters of a comment; an option has room for 65,535 bytes."""
NAME_MAX: Final = 255
"""Characters of a name of an address."""

_SECTION: Final = 0x0A0D0D0A
_INTERFACE, _NAMES, _STATISTICS, _PACKET = 1, 4, 5, 6
_COMMENT: Final = 1
_SHB_HARDWARE, _SHB_OS, _SHB_USERAPPL = 2, 3, 4
_IF_NAME, _IF_DESCRIPTION, _IF_TSRESOL = 2, 3, 9
_EPB_FLAGS, _EPB_DROPCOUNT, _EPB_PACKETID = 2, 4, 5
_ISB_STARTTIME, _ISB_ENDTIME, _ISB_IFDROP = 2, 3, 5
_ISB_FILTERACCEPT, _ISB_OSDROP, _ISB_USRDELIV = 6, 7, 8
_NRB_IPV4: Final = 1

_FIELD: Final = struct.Struct("<HH")
_EDGE: Final = struct.Struct("<I")
_HEAD: Final = struct.Struct("<II")
_PACKET_HEAD: Final = struct.Struct("<IIIII")
_U64: Final = struct.Struct("<Q")
_TIME: Final = struct.Struct("<II")
_UDP: Final = struct.Struct("!HHHH")
_END: Final = bytes(4)


class Way(IntEnum):
    """The direction bits of epb_flags, as the daemon sees them."""

    UNKNOWN = 0
    INBOUND = 1
    OUTBOUND = 2


def section_header(
    *, hardware: str = "", os: str = "", program: str = "", comments: Iterable[str] = ()
) -> bytes:
    """A Section Header Block of unknown length: where and with what the capture was made."""
    options = b"".join(map(_comment, comments))
    for code, text in ((_SHB_HARDWARE, hardware), (_SHB_OS, os), (_SHB_USERAPPL, program)):
        if text:
            options += _option(code, text.encode(errors="replace")[:0xFFFF])
    body = struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1)
    return _block(_SECTION, body, options)


def interface_block(name: str, *, snaplen: int, description: str = "") -> bytes:
    """An Interface Description Block; its number is that of interface blocks before it.

    snaplen: bytes of a packet that are kept at most; 0 for all.
    """
    options = _option(_IF_NAME, name.encode())
    if description:
        options += _option(_IF_DESCRIPTION, description.encode())
    options += _option(_IF_TSRESOL, b"\x09")
    return _block(_INTERFACE, struct.pack("<HHI", LINKTYPE_IPV4, 0, snaplen), options)


def packet_block(
    interface: int,
    time_ns: int,
    data: bytes | bytearray | memoryview,
    original_len: int,
    *,
    way: Way = Way.UNKNOWN,
    packet_id: int | None = None,
    drop_count: int = 0,
    comments: Iterable[str] = (),
) -> bytes:
    """An Enhanced Packet Block.

    interface: number of its interface block. time_ns: nanoseconds since 1970. data: from the IPv4
    header on. original_len: bytes of the packet, of which data may be the first part. drop_count:
    packets that were lost since the one before on this interface.
    """
    options = b"".join(map(_comment, comments))
    if way:
        options += _option(_EPB_FLAGS, _EDGE.pack(way))
    if drop_count:
        options += _option(_EPB_DROPCOUNT, _U64.pack(drop_count))
    if packet_id is not None:
        options += _option(_EPB_PACKETID, _U64.pack(packet_id))
    captured = len(data)
    head = _PACKET_HEAD.pack(
        interface, time_ns >> 32 & 0xFFFFFFFF, time_ns & 0xFFFFFFFF, captured, original_len
    )
    return _block(_PACKET, b"".join((head, data, bytes(-captured % 4))), options)


def names_block(names: Iterable[tuple[int, str]]) -> bytes:
    """A Name Resolution Block: IPv4 address (host order) and its name, for each."""
    records = []
    for address, name in names:
        text = name.encode("ascii", "replace")[:NAME_MAX] + b"\0"
        value = address.to_bytes(4, "big") + text
        records.append(_option(_NRB_IPV4, value))
    return _block(_NAMES, b"".join(records) + _END, b"")


def statistics_block(
    interface: int,
    *,
    start_ns: int,
    end_ns: int,
    accepted: int,
    delivered: int,
    dropped: int | None = None,
    os_dropped: int | None = None,
    comments: Iterable[str] = (),
) -> bytes:
    """An Interface Statistics Block, for the end of a section.

    accepted: packets that passed the filter there (isb_filteraccept). delivered: packets in the
    file (isb_usrdeliv). dropped, os_dropped: isb_ifdrop and isb_osdrop; None if they are not known.
    """
    options = b"".join(map(_comment, comments))
    options += _option(_ISB_STARTTIME, _time(start_ns)) + _option(_ISB_ENDTIME, _time(end_ns))
    for code, count in (
        (_ISB_IFDROP, dropped),
        (_ISB_FILTERACCEPT, accepted),
        (_ISB_OSDROP, os_dropped),
        (_ISB_USRDELIV, delivered),
    ):
        if count is not None:
            options += _option(code, _U64.pack(count))
    return _block(_STATISTICS, _EDGE.pack(interface) + _time(end_ns), options)


def outer_datagram(
    packet: bytes | bytearray | memoryview,
    original_len: int,
    *,
    source: int,
    destination: int,
    source_port: int,
    destination_port: int,
) -> bytes:
    """The outer datagram around an inner packet, made again from what is known of it.

    packet: the inner packet, or its first part; original_len: its whole length, in bytes. Addresses
    in host order. TTL, TOS, IP ID and DF are not known and 0; so is the UDP checksum, which then
    counts as not used (RFC 768). The header checksum is right. A length above 65,535, which no
    datagram has, is 0, as in a super-packet before segmentation.
    """
    datagram_len = overhead.OUTER_UDP_LEN + original_len
    if datagram_len > ip.MAX_PACKET_LEN - overhead.OUTER_IPV4_LEN:
        datagram_len = 0
    header = bytearray(
        ip.build_header(
            payload_len=datagram_len,
            source=source,
            destination=destination,
            ip_proto=transport.PROTO_UDP,
            ttl=0,
        )
    )
    if not datagram_len:
        header[2:4] = bytes(2)
        ip.store_checksum(header, ip.MIN_HEADER_LEN)
    udp = _UDP.pack(source_port, destination_port, datagram_len, 0)
    return b"".join((header, udp, packet))


def _block(kind: int, body: bytes, options: bytes) -> bytes:
    if options:
        options += _END
    length = 12 + len(body) + len(options)
    return b"".join((_HEAD.pack(kind, length), body, options, _EDGE.pack(length)))


def _option(code: int, value: bytes) -> bytes:
    return b"".join((_FIELD.pack(code, len(value)), value, bytes(-len(value) % 4)))


def _comment(text: str) -> bytes:
    return _option(_COMMENT, text[:COMMENT_MAX].encode(errors="replace"))


def _time(time_ns: int) -> bytes:
    return _TIME.pack(time_ns >> 32 & 0xFFFFFFFF, time_ns & 0xFFFFFFFF)
