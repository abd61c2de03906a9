"""Capture files built here byte by byte, in both byte orders, and read back; and broken ones."""

from __future__ import annotations

import io
import struct

import pytest

from tundp.wire.capture_file import CapturedPacket, CaptureFormatError, read_capture

ORDERS = ["<", ">"]
PACKET = bytes(range(0x45, 0x45 + 21))
TIME_NS = 1_700_000_000_123_456_789


def read(data: bytes) -> list[CapturedPacket]:
    return list(read_capture(io.BytesIO(data).read))


def fault(data: bytes) -> tuple[list[CapturedPacket], str]:
    """What is read before the fault, and its text."""
    found: list[CapturedPacket] = []
    with pytest.raises(CaptureFormatError) as caught:
        found.extend(read_capture(io.BytesIO(data).read))
    return found, str(caught.value)


def packets_before_fault(data: bytes) -> int:
    number = 0
    packets = read_capture(io.BytesIO(data).read)
    with pytest.raises(CaptureFormatError):
        for each in packets:
            number = each.number
    return number


def pcap(order: str, *records: bytes, magic: int = 0xA1B2C3D4, network: int = 228) -> bytes:
    return struct.pack(f"{order}IHHiIII", magic, 2, 4, 0, 0, 262144, network) + b"".join(records)


def record(order: str, data: bytes, fraction: int, original: int | None = None) -> bytes:
    length = len(data) if original is None else original
    return struct.pack(f"{order}IIII", 1_700_000_000, fraction, len(data), length) + data


def block(order: str, kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    length = struct.pack(f"{order}I", 12 + len(body))
    return struct.pack(f"{order}I", kind) + length + body + length


def section(order: str, version: int = 1) -> bytes:
    return block(order, 0x0A0D0D0A, struct.pack(f"{order}IHHq", 0x1A2B3C4D, version, 0, -1))


def option(order: str, code: int, value: bytes) -> bytes:
    return struct.pack(f"{order}HH", code, len(value)) + value + bytes(-len(value) % 4)


def interface(
    order: str, name: str = "", *, linktype: int = 228, snaplen: int = 0, more: bytes = b""
) -> bytes:
    options = option(order, 2, name.encode()) if name else b""
    return block(order, 1, struct.pack(f"{order}HHI", linktype, 0, snaplen) + options + more)


def enhanced(
    order: str,
    index: int,
    units: int,
    data: bytes,
    *,
    original: int | None = None,
    options: bytes = b"",
) -> bytes:
    length = len(data) if original is None else original
    head = struct.pack(f"{order}IIIII", index, units >> 32, units & 0xFFFFFFFF, len(data), length)
    return block(order, 6, head + data + bytes(-len(data) % 4) + options)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("magic", "fraction"), [(0xA1B2C3D4, 123456), (0xA1B23C4D, 123456000)])
def test_a_classic_file(order: str, magic: int, fraction: int) -> None:
    data = pcap(
        order,
        record(order, PACKET, fraction),
        record(order, PACKET[:5], 0, 21),
        magic=magic,
        network=0x24000001,
    )
    assert read(data) == [
        CapturedPacket(
            number=1, time_ns=1_700_000_000_123_456_000, linktype=1, data=PACKET, original_len=21
        ),
        CapturedPacket(
            number=2,
            time_ns=1_700_000_000_000_000_000,
            linktype=1,
            data=PACKET[:5],
            original_len=21,
        ),
    ]


@pytest.mark.parametrize("order", ORDERS)
def test_every_kind_of_packet_block(order: str) -> None:
    times = option(order, 9, b"\x09")
    options = (
        option(order, 1, "first ↯".encode())
        + option(order, 1, b"second")
        + option(order, 2, struct.pack(f"{order}I", 2))
        + option(order, 4, struct.pack(f"{order}Q", 9))
        + option(order, 5, struct.pack(f"{order}Q", 1 << 60))
        + option(order, 0x8001, b"unknown")
        + option(order, 0, b"")
        + option(order, 1, b"behind the end")
    )
    obsolete = struct.pack(f"{order}HHIIII", 1, 0xFFFF, 0, 4_000_000, len(PACKET), 30) + PACKET
    data = b"".join(
        (
            section(order),
            block(order, 0x0BAD, b"unknown to everybody"),
            interface(order, "one", more=times, snaplen=8),
            interface(order, linktype=1),
            enhanced(order, 0, TIME_NS, PACKET, original=90, options=options),
            block(order, 4, bytes(8)),
            block(order, 2, obsolete),
            block(order, 3, struct.pack(f"{order}I", len(PACKET)) + PACKET[:8]),
            block(order, 5, bytes(12)),
        )
    )
    assert read(data) == [
        CapturedPacket(
            number=1,
            time_ns=TIME_NS,
            linktype=228,
            data=PACKET,
            original_len=90,
            interface="one",
            packet_id=1 << 60,
            flags=2,
            drop_count=9,
            comments=("first ↯", "second"),
        ),
        CapturedPacket(number=2, time_ns=4_000_000_000, linktype=1, data=PACKET, original_len=30),
        CapturedPacket(
            number=3, time_ns=None, linktype=228, data=PACKET[:8], original_len=21, interface="one"
        ),
    ]


@pytest.mark.parametrize(
    ("resolution", "units", "time_ns"),
    [
        (b"", 5, 5000),
        (b"\x03", 5, 5_000_000),
        (b"\x8a", 512, 500_000_000),
        (b"\x0c", 7000, 7),
        (b"\xff", 5, 0),
        (b"\x7f", 5, 0),
        (b"\x00", 5, 5_000_000_000),
    ],
    ids=["default", "ms", "2^-10", "ps", "2^-127", "10^-127", "s"],
)
def test_resolutions_of_time(resolution: bytes, units: int, time_ns: int) -> None:
    more = option("<", 9, resolution) if resolution else b""
    data = section("<") + interface("<", more=more) + enhanced("<", 0, units, PACKET)
    assert read(data)[0].time_ns == time_ns


def test_an_offset_of_time_may_lead_before_1970() -> None:
    more = option("<", 14, struct.pack("<q", -2))
    data = section("<") + interface("<", more=more) + enhanced("<", 0, 5, PACKET)
    assert read(data)[0].time_ns == -2_000_000_000 + 5000


def test_sections_of_both_orders_have_interfaces_of_their_own() -> None:
    one = section("<") + interface("<", "little") + enhanced("<", 0, 1, PACKET)
    two = section(">") + interface(">", "big") + enhanced(">", 0, 1, PACKET)
    assert [each.interface for each in read(one + two)] == ["little", "big"]
    assert fault(one + section(">") + enhanced(">", 0, 1, PACKET))[1].endswith(
        "a packet of interface 0, of 0 described before"
    )


def test_a_pipe_gives_pieces() -> None:
    data = section("<") + interface("<") + enhanced("<", 0, 1, PACKET)
    stream = io.BytesIO(data)
    assert len(list(read_capture(lambda count: stream.read(min(count, 3))))) == 1


GOOD = section("<") + interface("<") + enhanced("<", 0, 1, PACKET)
END = len(GOOD)


def with_length(length: int) -> bytes:
    return GOOD + struct.pack("<II", 6, length) + bytes(64)


@pytest.mark.parametrize(
    ("data", "before", "text"),
    [
        (b"", 0, "byte 0: the file is empty"),
        (b"GET / HTTP/1.1", 0, "byte 0: the file is neither pcap nor pcapng: 47 45 54 20"),
        (b"\x1f\x8b\x08\x00", 0, "byte 0: the file is compressed: gunzip it first"),
        (bytes.fromhex("34cdb2a1"), 0, "byte 0: the file is a pcap file of the modified format"),
        (pcap("<")[:23], 0, "byte 4: the file ends after 19 of the 20 bytes of the file header"),
        (pcap("<", record("<", PACKET, 0)) + b"123", 1, "the file ends within a packet's header"),
        (pcap("<", record("<", PACKET, 0))[:-1], 0, "ends after 20 of the 21 bytes of packet 1"),
        (pcap("<", struct.pack("<IIII", 0, 0, 1 << 31, 1)), 0, "a packet of 2147483648 bytes"),
        (pcap("<")[:4] + b"\x09" + pcap("<")[5:], 0, "byte 4: pcap version 9.4, where 2.4"),
        (GOOD + b"\x06\x00", 1, f"byte {END}: the file ends within a block's header"),
        (with_length(0), 1, f"byte {END}: a block length of 0: no multiple of 4 from 32 to"),
        (with_length(28), 1, f"byte {END}: a block length of 28: no"),
        (with_length(33), 1, f"byte {END}: a block length of 33: no"),
        (with_length(0xFFFFFFFC), 1, f"byte {END}: a block length of 4294967292: no"),
        (with_length(64), 1, f"byte {END}: a block's lengths differ: 64 and 0"),
        (with_length(80), 1, "the file ends after 64 of the 68 bytes of a block of type 6"),
        (GOOD + GOOD[:8] + b"oops" + GOOD[12:], 1, f"byte {END + 8}: a byte order magic of 6f 6f"),
        (section("<", 2), 0, "byte 0: pcapng version 2.0, where 1 is known"),
        (GOOD + enhanced("<", 1, 0, PACKET), 1, "a packet of interface 1, of 1 described before"),
        (GOOD + block("<", 6, struct.pack("<IIIII", 0, 0, 0, 99, 99) + PACKET), 1,
         f"byte {END}: a packet of 99 bytes in a block with 24 of them"),
        (GOOD + block("<", 3, struct.pack("<I", 99) + PACKET), 1, "a packet of 99 bytes in a"),
        (GOOD + enhanced("<", 0, 0, b"", options=struct.pack("<HH", 1, 9) + bytes(4)), 1,
         f"byte {END}: option 1 of 9 bytes, past its block"),
        (section("<") + block("<", 3, bytes(4)), 0, "a packet of interface 0, of 0 described"),
        (section("<") + interface("<") * 4097, 0, "more than 4096 interfaces"),
    ],
)  # fmt: skip
def test_what_is_broken_is_named_with_its_place(data: bytes, before: int, text: str) -> None:
    assert text in fault(data)[1]
    assert packets_before_fault(data) == before
