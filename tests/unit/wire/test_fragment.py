"""Fragmenting an inner packet; scapy reads the pieces, a few lines put them together again."""

from __future__ import annotations

import pytest
from scapy.layers.inet import IP

from tests.packets import ROUTER_ALERT, counted, ipv4
from tundp.wire import fragment, ip
from tundp.wire.drop import DropReason

RECORD_ROUTE = b"\x07\x07\x04\x00\x00\x00\x00"  # option 7: first fragment only
LOOSE_ROUTE = b"\x83\x07\x04\x0a\x05\x01\x01"  # option 131: copied
NOP = b"\x01"
END = b"\x00"


def whole(
    payload: bytes,
    *,
    options: bytes = b"",
    flags_offset: int = 0,
    ttl: int = 63,
    identification: int = 0x7788,
) -> bytes:
    return ipv4(
        payload,
        17,
        ttl=ttl,
        tos=0x2E,
        ident=identification,
        frag=flags_offset,
        ip_options=options,
    )


def cut(packet: bytes, mtu: int) -> list[bytes]:
    header = ip.parse(memoryview(packet))
    assert not isinstance(header, DropReason)
    return fragment.fragment(memoryview(packet), header, mtu)


def reassemble(pieces: list[bytes]) -> tuple[bytes, int]:
    """Payload from the first piece's offset on, and that offset in bytes."""
    seen = [IP(piece) for piece in pieces]
    start = seen[0].frag * 8
    data = bytearray()
    for one in seen:
        assert one.frag * 8 == start + len(data), "a hole or an overlap"
        data += bytes(one.payload)
    return bytes(data), start


@pytest.mark.parametrize(
    ("length", "mtu", "sizes"),
    [
        (1453, 1472, [1468, 25]),  # 1452 fit, but only 1448 is a multiple of 8
        (1472, 1400, [1396, 116]),
        (100, 68, [68, 68, 24]),
        (96, 68, [68, 68]),
        (97, 68, [68, 68, 21]),
        (65515, 65507, [65500, 55]),
        (49, 69, [68, 21]),
        (49, 75, [68, 21]),
        (57, 76, [76, 21]),
    ],
)
def test_sizes(length: int, mtu: int, sizes: list[int]) -> None:
    pieces = cut(whole(counted(length)), mtu)
    assert [len(piece) for piece in pieces] == sizes
    assert [IP(piece).len for piece in pieces] == sizes
    assert reassemble(pieces) == (counted(length), 0)


def test_fields_of_the_pieces() -> None:
    pieces = [IP(piece) for piece in cut(whole(counted(100)), 68)]
    assert [str(piece.flags) for piece in pieces] == ["MF", "MF", ""]
    assert [piece.frag for piece in pieces] == [0, 6, 12]
    for piece in pieces:
        assert (piece.src, piece.dst, piece.proto) == ("192.0.2.1", "198.51.100.2", 17)
        assert (piece.id, piece.tos, piece.ttl) == (0x7788, 0x2E, 63)


def test_checksums_by_scapy() -> None:
    for raw in cut(whole(counted(500), options=ROUTER_ALERT), 120):
        piece = IP(raw)
        stored = piece.chksum
        del piece.chksum
        assert IP(bytes(piece)).chksum == stored


@pytest.mark.parametrize(
    ("flags_offset", "last_flag", "breaks"),
    [
        (ip.FLAG_MF | 3, "MF", "a middle fragment's last piece is not the packet's last"),
        (0x0003, "", "the last fragment's last piece is the packet's last"),
        (ip.FLAG_MF, "MF", "a first fragment goes on with MF"),
    ],
)
def test_a_fragment_is_fragmented_again(flags_offset: int, last_flag: str, breaks: str) -> None:
    payload = counted(104)
    pieces = cut(whole(payload, flags_offset=flags_offset), 68)
    start = (flags_offset & 0x1FFF) * 8
    assert reassemble(pieces) == (payload, start), breaks
    flags = [str(IP(piece).flags) for piece in pieces]
    assert flags == ["MF", "MF", last_flag], breaks


def test_the_highest_offset_a_packet_can_have() -> None:
    # The last 128 bytes of a packet of 65535: offset and flags must not run together.
    payload = counted(111)
    first = (65535 - 20 - 111) // 8
    pieces = cut(whole(payload, flags_offset=first), 68)
    assert reassemble(pieces) == (payload, first * 8)
    assert [str(IP(piece).flags) for piece in pieces] == ["MF", "MF", ""]


def test_first_piece_has_all_options_later_ones_the_copied() -> None:
    options = ROUTER_ALERT + RECORD_ROUTE + LOOSE_ROUTE + NOP + END
    assert len(options) == 20
    pieces = cut(whole(counted(200), options=options), 92)
    assert pieces[0][20:40] == options
    later = ROUTER_ALERT + LOOSE_ROUTE + END
    for piece in pieces[1:]:
        assert piece[0] == 0x48
        assert piece[20:32] == later
    assert reassemble(pieces) == (counted(200), 0)


def test_later_pieces_use_the_room_uncopied_options_leave() -> None:
    pieces = cut(whole(counted(96), options=NOP * 40), 68)
    assert [len(piece) for piece in pieces] == [68, 68, 60]
    assert [IP(piece).ihl for piece in pieces] == [15, 5, 5]
    assert reassemble(pieces) == (counted(96), 0)


@pytest.mark.parametrize(
    ("options", "copied", "breaks"),
    [
        (b"", b"", "no options"),
        (NOP * 4, b"", "padding is not repeated"),
        (ROUTER_ALERT, ROUTER_ALERT, "the copied bit is honoured"),
        (RECORD_ROUTE + END, b"", "and its absence too"),
        (NOP + LOOSE_ROUTE, LOOSE_ROUTE + END, "padded to a whole word"),
        (RECORD_ROUTE + LOOSE_ROUTE + END * 2, LOOSE_ROUTE + END, "one behind an uncopied one"),
        (END + ROUTER_ALERT + END * 3, b"", "nothing behind the end of the list is an option"),
        (b"\x94\x01\x00\x00", b"", "length 1 cannot be: it would loop"),
        (b"\x94\x00\x00\x00", b"", "length 0 cannot be: it would loop"),
        (b"\x94\x05\x00\x00", b"", "an option longer than the header holds"),
        (NOP * 3 + b"\x94", b"", "a type without its length"),
        (ROUTER_ALERT + b"\x83\xff\x04\x00", ROUTER_ALERT, "what was read before stays"),
    ],
)
def test_copied_options(options: bytes, copied: bytes, breaks: str) -> None:
    assert fragment.copied_options(options) == copied, breaks


def test_source_is_left_alone() -> None:
    packet = bytearray(whole(counted(300)))
    before = bytes(packet)
    header = ip.parse(memoryview(packet))
    assert not isinstance(header, DropReason)
    fragment.fragment(memoryview(packet), header, 100)
    assert bytes(packet) == before
