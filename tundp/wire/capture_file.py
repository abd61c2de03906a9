"""Packets of a capture file: the reader of pcap and pcapng, both byte orders, from any stream.

draft-ietf-opsawg-pcap (magics of microseconds and nanoseconds) and draft-ietf-opsawg-pcapng
(sections, Interface Description, Enhanced, Simple and obsolete Packet Blocks; other blocks are
passed over by their length). What a file says of itself is checked before it is used, and no length
in it makes more than BLOCK_MAX bytes be held. The writer is tundp/wire/pcapng.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

BLOCK_MAX: Final = 1 << 24
"""Bytes of one block or packet, at most: what libpcap allows. A longer one is no capture's."""
INTERFACES_MAX: Final = 4096
"""Interfaces of one section, at most."""

LINKTYPE_ETHERNET: Final = 1
LINKTYPE_RAW: Final = 101
LINKTYPE_LINUX_SLL: Final = 113
LINKTYPE_IPV4: Final = 228
LINKTYPE_LINUX_SLL2: Final = 276

_NS: Final = 1_000_000_000
_PCAP: Final = {
    bytes.fromhex("d4c3b2a1"): ("<", 1000),
    bytes.fromhex("a1b2c3d4"): (">", 1000),
    bytes.fromhex("4d3cb2a1"): ("<", 1),
    bytes.fromhex("a1b23c4d"): (">", 1),
}
"""Magic of a classic file to its byte order and the nanoseconds in a unit of its fraction."""
_SECTION: Final = bytes.fromhex("0a0d0d0a")
_ORDERS: Final = {bytes.fromhex("4d3c2b1a"): "<", bytes.fromhex("1a2b3c4d"): ">"}
_OTHERS: Final = {
    bytes.fromhex("1f8b"): "is compressed: gunzip it first",
    bytes.fromhex("28b52ffd"): "is compressed: unzstd it first",
    bytes.fromhex("04224d18"): "is compressed: unlz4 it first",
    bytes.fromhex("34cdb2a1"): "is a pcap file of the modified format: convert it with editcap",
    bytes.fromhex("a1b2cd34"): "is a pcap file of the modified format: convert it with editcap",
}
_INTERFACE, _OBSOLETE_PACKET, _SIMPLE_PACKET, _ENHANCED_PACKET = 1, 2, 3, 6
_MINIMAL: Final = {_INTERFACE: 8, _OBSOLETE_PACKET: 20, _SIMPLE_PACKET: 4, _ENHANCED_PACKET: 20}
"""Block type to the bytes of its fixed fields."""
_COMMENT, _IF_NAME, _IF_TSRESOL, _IF_TSOFFSET = 1, 2, 9, 14
_FLAGS, _DROPCOUNT, _PACKETID = 2, 4, 5


class CaptureFormatError(ValueError):
    """A capture file cannot be read on; the message names the byte where, and what is wrong."""

    def __init__(self, offset: int, what: str) -> None:
        super().__init__(f"byte {offset}: {what}")
        self.offset = offset


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedPacket:
    """One packet of a capture file, and what the file says of it."""

    number: int
    """From 1, as Wireshark counts."""
    time_ns: int | None
    """Since 1970, in nanoseconds; None where the file has no times (Simple Packet Block)."""
    linktype: int
    """What `data` begins with: a number of the LINKTYPE_ registry."""
    data: bytes
    original_len: int
    """Bytes the packet had; more than `data` has if it was cut by a snapshot length."""
    interface: str = ""
    """if_name; empty for a file without names."""
    packet_id: int | None = None
    """epb_packetid."""
    flags: int = 0
    """epb_flags: the lowest two bits are 1 for inbound, 2 for outbound."""
    drop_count: int | None = None
    """epb_dropcount: packets lost between this one and the one before it on its interface."""
    comments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Interface:
    linktype: int
    snaplen: int
    name: str = ""
    units_per_s: int = 1_000_000
    offset_s: int = 0


@dataclass(slots=True)
class _Input:
    """A stream that knows its place."""

    read: Callable[[int], bytes]
    offset: int = 0

    def take(self, count: int) -> bytes:
        """`count` bytes, fewer at the end of the stream. Pipes give them in pieces."""
        parts = []
        missing = count
        while missing:
            part = self.read(missing)
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        self.offset += count - missing
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def exactly(self, count: int, what: str) -> bytes:
        """`count` bytes. CaptureFormatError if the stream ends before."""
        start = self.offset
        data = self.take(count)
        if len(data) < count:
            raise CaptureFormatError(
                start, f"the file ends after {len(data)} of the {count} bytes of {what}"
            )
        return data


def read_capture(read: Callable[[int], bytes]) -> Iterator[CapturedPacket]:
    """The packets of a pcap or pcapng file, in its order; one packet at a time is held.

    read: as a binary file's: at most so many bytes, none at the end. Packets before a fault are
    given; at the fault CaptureFormatError is raised, also if the file ends within a packet.
    """
    source = _Input(read)
    magic = source.take(4)
    if not magic:
        raise CaptureFormatError(0, "the file is empty")
    if magic == _SECTION:
        yield from _read_pcapng(source)
    elif magic in _PCAP:
        yield from _read_pcap(source, *_PCAP[magic])
    else:
        for start, what in _OTHERS.items():
            if magic.startswith(start):
                raise CaptureFormatError(0, f"the file {what}")
        raise CaptureFormatError(0, f"the file is neither pcap nor pcapng: {magic.hex(' ')}")


def _read_pcap(source: _Input, order: str, unit_ns: int) -> Iterator[CapturedPacket]:
    head = source.exactly(20, "the file header")
    major, minor, _, _, _, network = struct.unpack(f"{order}HHiIII", head)
    if (major, minor) != (2, 4):
        raise CaptureFormatError(4, f"pcap version {major}.{minor}, where 2.4 is known")
    linktype = network & 0xFFFF  # above are the bits of a frame check sequence's length
    record = struct.Struct(f"{order}IIII")
    number = 0
    while head := source.take(record.size):
        start = source.offset - len(head)
        if len(head) < record.size:
            raise CaptureFormatError(start, "the file ends within a packet's header")
        seconds, fraction, captured, original = record.unpack(head)
        if captured > BLOCK_MAX:
            raise CaptureFormatError(start, f"a packet of {captured} bytes, above {BLOCK_MAX}")
        number += 1
        yield CapturedPacket(
            number=number,
            time_ns=seconds * _NS + fraction * unit_ns,
            linktype=linktype,
            data=source.exactly(captured, f"packet {number}"),
            original_len=max(original, captured),
        )


@dataclass(slots=True)
class _Section:
    """What blocks of one section mean: its byte order and interfaces."""

    order: str
    interfaces: list[_Interface] = field(default_factory=list)

    def numbers(self, form: str, body: bytes) -> tuple[int, ...]:
        """Fields at the start of a block's body."""
        return struct.unpack_from(self.order + form, body)


def _read_pcapng(source: _Input) -> Iterator[CapturedPacket]:
    """The first block's type has been read."""
    kind_bytes = _SECTION
    section = _Section("<")
    number = 0
    while kind_bytes:
        start = source.offset - len(kind_bytes)
        if len(kind_bytes) < 4:
            raise CaptureFormatError(start, "the file ends within a block's header")
        if kind_bytes == _SECTION:
            section = _begin_section(source, start)
        else:
            (kind,) = section.numbers("I", kind_bytes)
            body = _read_body(source, section, start, kind)
            if kind == _INTERFACE:
                if len(section.interfaces) == INTERFACES_MAX:
                    raise CaptureFormatError(start, f"more than {INTERFACES_MAX} interfaces")
                section.interfaces.append(_interface(section, body, start))
            elif kind in _MINIMAL:
                number += 1
                yield _packet(section, kind, body, start, number)
        kind_bytes = source.take(4)


def _begin_section(source: _Input, start: int) -> _Section:
    """Read a Section Header Block behind its type."""
    length_bytes = source.exactly(4, "a section's length")
    magic = source.exactly(4, "a section's byte order")
    if magic not in _ORDERS:
        raise CaptureFormatError(start + 8, f"a byte order magic of {magic.hex(' ')}")
    section = _Section(_ORDERS[magic])
    (length,) = section.numbers("I", length_bytes)
    _check_length(length, 28, start)
    body = source.exactly(length - 16, "a section header")
    major, minor = section.numbers("HH", body)
    if major != 1:
        raise CaptureFormatError(start, f"pcapng version {major}.{minor}, where 1 is known")
    _check_trailer(source, section, length, start)
    return section


def _read_body(source: _Input, section: _Section, start: int, kind: int) -> bytes:
    """What a block holds between its two lengths."""
    (length,) = section.numbers("I", source.exactly(4, "a block's length"))
    _check_length(length, 12 + _MINIMAL.get(kind, 0), start)
    body = source.exactly(length - 12, f"a block of type {kind}")
    _check_trailer(source, section, length, start)
    return body


def _check_length(length: int, least: int, start: int) -> None:
    if not least <= length <= BLOCK_MAX or length % 4:
        raise CaptureFormatError(
            start, f"a block length of {length}: no multiple of 4 from {least} to {BLOCK_MAX}"
        )


def _check_trailer(source: _Input, section: _Section, length: int, start: int) -> None:
    (again,) = section.numbers("I", source.exactly(4, "a block's second length"))
    if again != length:
        raise CaptureFormatError(start, f"a block's lengths differ: {length} and {again}")


def _interface(section: _Section, body: bytes, start: int) -> _Interface:
    linktype, _, snaplen = section.numbers("HHI", body)
    name, units_per_s, offset_s = "", 1_000_000, 0
    for code, value in _options(section, body, 8, start):
        if code == _IF_NAME:
            name = _text(value)
        elif code == _IF_TSRESOL and value:
            exponent = value[0] & 0x7F
            units_per_s = 2**exponent if value[0] & 0x80 else 10**exponent
        elif code == _IF_TSOFFSET and len(value) == 8:
            (offset_s,) = section.numbers("q", value)
    return _Interface(linktype, snaplen, name, units_per_s, offset_s)


def _packet(section: _Section, kind: int, body: bytes, start: int, number: int) -> CapturedPacket:
    if kind == _SIMPLE_PACKET:
        return _simple_packet(section, body, start, number)
    if kind == _ENHANCED_PACKET:
        index, high, low, captured, original = section.numbers("IIIII", body)
    else:
        index, _, high, low, captured, original = section.numbers("HHIIII", body)
    interface = _named(section, index, start)
    if captured > len(body) - 20:
        raise CaptureFormatError(
            start, f"a packet of {captured} bytes in a block with {len(body) - 20} of them"
        )
    comments = []
    flags, drop_count, packet_id = 0, None, None
    for code, value in _options(section, body, 20 + captured + -captured % 4, start):
        if code == _COMMENT:
            comments.append(_text(value))
        elif code == _FLAGS and len(value) == 4:
            (flags,) = section.numbers("I", value)
        elif kind == _ENHANCED_PACKET and code == _DROPCOUNT and len(value) == 8:
            (drop_count,) = section.numbers("Q", value)
        elif kind == _ENHANCED_PACKET and code == _PACKETID and len(value) == 8:
            (packet_id,) = section.numbers("Q", value)
    units = high << 32 | low
    return CapturedPacket(
        number=number,
        time_ns=interface.offset_s * _NS + units * _NS // interface.units_per_s,
        linktype=interface.linktype,
        data=body[20 : 20 + captured],
        original_len=max(original, captured),
        interface=interface.name,
        packet_id=packet_id,
        flags=flags,
        drop_count=drop_count,
        comments=tuple(comments),
    )


def _simple_packet(section: _Section, body: bytes, start: int, number: int) -> CapturedPacket:
    """A packet of the first interface, without time; its length is known from that of the block."""
    interface = _named(section, 0, start)
    (original,) = section.numbers("I", body)
    captured = min(original, interface.snaplen or original)
    if captured > len(body) - 4:
        raise CaptureFormatError(
            start, f"a packet of {captured} bytes in a block with {len(body) - 4} of them"
        )
    return CapturedPacket(
        number=number,
        time_ns=None,
        linktype=interface.linktype,
        data=body[4 : 4 + captured],
        original_len=original,
        interface=interface.name,
    )


def _named(section: _Section, index: int, start: int) -> _Interface:
    if index >= len(section.interfaces):
        raise CaptureFormatError(
            start, f"a packet of interface {index}, of {len(section.interfaces)} described before"
        )
    return section.interfaces[index]


def _options(section: _Section, body: bytes, at: int, start: int) -> Iterator[tuple[int, bytes]]:
    """Code and value of each option of a block, from `at` on."""
    while at + 4 <= len(body):
        code, length = section.numbers("HH", body[at : at + 4])
        if code == 0:
            return
        at += 4
        if length > len(body) - at:
            raise CaptureFormatError(start, f"option {code} of {length} bytes, past its block")
        yield code, body[at : at + length]
        at += length + -length % 4


def _text(value: bytes) -> str:
    """UTF-8, whatever is wrong in it replaced."""
    return value.rstrip(b"\0").decode(errors="replace")
