"""Reading, patching and building IPv4 headers."""

from __future__ import annotations

from typing import Any

import pytest
from scapy.layers.inet import IP, UDP
from scapy.packet import Raw

from tests.packets import with_header_checksum
from tundp.wire import ip
from tundp.wire.drop import DropReason

SOURCE = 0x0A050202
DESTINATION = 0x0A050303


def packet(payload: bytes = b"payload!", **fields: Any) -> bytearray:
    """A packet by scapy, so with lengths and a checksum that are not ours."""
    return bytearray(bytes(IP(src="10.5.2.2", dst="10.5.3.3", proto=17, **fields) / Raw(payload)))


def resum(data: bytearray) -> bytearray:
    """Give the header as it stands a right checksum."""
    data[:] = with_header_checksum(data)
    return data


def test_every_field_is_read_in_host_order() -> None:
    header = ip.parse(
        memoryview(packet(tos=0xB8, id=0x1234, flags="DF", frag=0, ttl=61, chksum=None))
    )
    assert not isinstance(header, DropReason)
    assert header.version_ihl == 0x45
    assert header.tos == 0xB8
    assert header.total_len == 28
    assert header.identification == 0x1234
    assert header.flags_offset == 0x4000
    assert header.ttl == 61
    assert header.ip_proto == 17
    assert header.source == SOURCE
    assert header.destination == DESTINATION
    assert header.header_len == 20
    assert header.dont_fragment
    assert header.fragment_offset == 0


def test_flags_and_offset_do_not_mix() -> None:
    header = ip.parse(memoryview(packet(flags="MF", frag=0x1FFC)))
    assert not isinstance(header, DropReason)
    assert header.fragment_offset == 0x1FFC
    assert not header.dont_fragment


def mutated(at: int, value: int, *, payload: bytes = b"payload!", fix: bool = True) -> bytearray:
    data = packet(payload)
    data[at] = value
    return resum(data) if fix and (data[0] & 15) * 4 <= len(data) else data


@pytest.mark.parametrize(
    ("data", "expected", "breaks"),
    [
        (b"", DropReason.TOO_SHORT, "an empty datagram is legal UDP"),
        (b"\x45", DropReason.TOO_SHORT, "a keepalive byte"),
        (bytes(packet()[:19]), DropReason.TOO_SHORT, "one byte less than a header"),
        (b"\x60" + bytes(39), DropReason.NOT_IPV4, "IPv6, which flannel corrupts"),
        (b"\x00" + bytes(19), DropReason.NOT_IPV4, "version 0"),
        (b"\xf5" + bytes(19), DropReason.NOT_IPV4, "version 15"),
        (mutated(0, 0x44), DropReason.BAD_HEADER_LENGTH, "IHL 4 is below the fixed part"),
        (mutated(0, 0x40), DropReason.BAD_HEADER_LENGTH, "IHL 0"),
        (mutated(0, 0x48), DropReason.BAD_HEADER_LENGTH, "options past the 28 bytes there are"),
        (mutated(3, 19), DropReason.BAD_TOTAL_LENGTH, "total length below the header"),
        (mutated(3, 0), DropReason.BAD_TOTAL_LENGTH, "total length 0, as TSO leaves it"),
        (mutated(3, 29), DropReason.BAD_TOTAL_LENGTH, "one byte more than arrived"),
        (mutated(2, 0xFF), DropReason.BAD_TOTAL_LENGTH, "the high byte counts too"),
        (
            packet(frag=0x1FFF),
            DropReason.BAD_TOTAL_LENGTH,
            "a fragment reaching past 65535: the ping of death",
        ),
        (mutated(8, 63, fix=False), DropReason.BAD_HEADER_CHECKSUM, "TTL changed, sum not"),
        (mutated(11, 0, fix=False), DropReason.BAD_HEADER_CHECKSUM, "the sum itself damaged"),
    ],
)
def test_what_is_not_carried(data: bytearray | bytes, expected: DropReason, breaks: str) -> None:
    assert ip.parse(memoryview(data)) is expected, breaks


@pytest.mark.parametrize(
    ("data", "total_len", "breaks"),
    [
        (packet(b""), 20, "exactly 20 bytes is a packet"),
        (packet(b"1234567", frag=0x1FFC), 27, "a fragment ending at byte 65531"),
        (packet(b"12345678901", frag=0x1FFC), 31, "a fragment ending at byte 65535, the last"),
        (packet() + b"trailing", 28, "bytes behind the total length are the caller's to cut"),
        (packet(ttl=0), 28, "the TTL is no business of the parser"),
        (mutated(0, 0x47), 28, "IHL reaching to the very end of the packet"),
    ],
)
def test_what_is_carried(data: bytearray, total_len: int, breaks: str) -> None:
    header = ip.parse(memoryview(data))
    assert not isinstance(header, DropReason), breaks
    assert header.total_len == total_len


def test_order_of_checks() -> None:
    # Version before IHL before total length before checksum: the first names the drop.
    everything_wrong = bytearray(b"\x62" + bytes(18) + b"\x01")
    assert ip.parse(memoryview(everything_wrong)) is DropReason.NOT_IPV4
    everything_wrong[0] = 0x42
    assert ip.parse(memoryview(everything_wrong)) is DropReason.BAD_HEADER_LENGTH
    everything_wrong[0] = 0x45
    assert ip.parse(memoryview(everything_wrong)) is DropReason.BAD_TOTAL_LENGTH
    everything_wrong[3] = 20
    assert ip.parse(memoryview(everything_wrong)) is DropReason.BAD_HEADER_CHECKSUM


def test_options_are_part_of_the_checksum() -> None:
    header = ip.build_header(
        payload_len=0,
        source=SOURCE,
        destination=DESTINATION,
        ip_proto=17,
        ttl=9,
        options=b"\x94\x04\x00\x00",
    )
    assert not isinstance(ip.parse(memoryview(header)), DropReason)
    damaged = header[:-1] + b"\x01"
    assert ip.parse(memoryview(damaged)) is DropReason.BAD_HEADER_CHECKSUM


@pytest.mark.parametrize("ttl", [1, 2, 64, 128, 255])
def test_decrement_ttl_touches_only_ttl_and_checksum(ttl: int) -> None:
    data = packet(ttl=ttl)
    before = bytes(data)
    header = ip.parse(memoryview(data))
    assert not isinstance(header, DropReason)
    ip.decrement_ttl(memoryview(data), header)
    assert data[8] == ttl - 1
    assert data[:8] == before[:8]
    assert data[9:10] == before[9:10]
    assert data[12:] == before[12:]
    assert bytes(data) == bytes(packet(ttl=ttl - 1))


@pytest.mark.parametrize("options", [b"", b"\x94\x04\x00\x00", b"\x01" * 40])
def test_build_header_is_what_scapy_builds(options: bytes) -> None:
    header = ip.build_header(
        payload_len=8,
        source=SOURCE,
        destination=DESTINATION,
        ip_proto=17,
        ttl=64,
        tos=0x10,
        identification=0xBEEF,
        flags_offset=0x2003,
        options=options,
    )
    assert len(header) == 20 + len(options)
    seen = IP(header + b"payload!")
    assert (seen.ihl, seen.len) == (5 + len(options) // 4, 28 + len(options))
    assert (seen.src, seen.dst, seen.proto) == ("10.5.2.2", "10.5.3.3", 17)
    assert (seen.ttl, seen.tos, seen.id) == (64, 0x10, 0xBEEF)
    assert (str(seen.flags), seen.frag) == ("MF", 3)
    stored = seen.chksum
    del seen.chksum
    assert IP(bytes(seen)).chksum == stored


def test_parse_reads_a_scapy_udp_packet() -> None:
    data = bytes(IP(src="10.5.2.2", dst="10.5.3.3") / UDP(sport=1, dport=2) / Raw(b"x"))
    header = ip.parse(memoryview(data))
    assert not isinstance(header, DropReason)
    assert (header.ip_proto, header.total_len) == (17, 29)
