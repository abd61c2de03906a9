"""The ten bytes before a packet, spelled out by hand from linux/virtio_net.h."""

from __future__ import annotations

import sys

import pytest

from tundp.wire import vnet
from tundp.wire.vnet import VnetHeader


def by_hand(flags: int, gso_type: int, *shorts: int) -> bytes:
    """Two bytes and four integers as this machine stores them."""
    return bytes((flags, gso_type)) + b"".join(n.to_bytes(2, sys.byteorder) for n in shorts)


FIELDS = [
    (0, 0, 0, 0, 0, 0),
    (1, 1, 52, 1448, 20, 16),
    (1, 5, 28, 1472, 20, 6),
    (2, 0, 0, 0, 0, 0),
    (0xFF, 0x81, 0x0102, 0x0304, 0x0506, 0x0708),
    (0xFF, 0xFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF),
]


@pytest.mark.parametrize("fields", FIELDS)
def test_layout(fields: tuple[int, ...]) -> None:
    assert len(by_hand(*fields)) == vnet.LEN == 10
    assert vnet.parse(by_hand(*fields)) == VnetHeader(*fields)
    assert VnetHeader(*fields).pack() == by_hand(*fields)


def test_every_name_is_at_its_place() -> None:
    header = vnet.parse(by_hand(3, 0x85, 0x1122, 0x3344, 0x5566, 0x7788))
    assert header.flags == 3
    assert header.gso_type == 0x85
    assert header.hdr_len == 0x1122
    assert header.gso_size == 0x3344
    assert header.csum_start == 0x5566
    assert header.csum_offset == 0x7788


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_what_follows_is_the_packet(kind: type[bytearray] | type[bytes] | type[memoryview]) -> None:
    data = kind(by_hand(1, 5, 28, 1200, 20, 6) + b"\x45 and so on")
    assert vnet.parse(data) == VnetHeader(1, 5, 28, 1200, 20, 6)


def test_a_finished_packet_has_ten_zeros_before_it() -> None:
    assert VnetHeader().pack() == bytes(10)
    assert vnet.parse(bytes(10)) == VnetHeader()


@pytest.mark.parametrize(
    ("flags", "expected", "breaks"),
    [
        (0, False, "nothing said"),
        (1, True, "NEEDS_CSUM"),
        (2, False, "DATA_VALID says the opposite"),
        (3, True, "a second flag does not hide it"),
        (0xFE, False, "no other bit means it"),
    ],
)
def test_needs_checksum(flags: int, expected: bool, breaks: str) -> None:
    assert VnetHeader(flags=flags).needs_checksum is expected, breaks


@pytest.mark.parametrize(
    ("gso_type", "kind"),
    [(0, 0), (0x80, 0), (1, 1), (0x81, 1), (0x84, 4), (5, 5), (3, 3), (0x43, 0x43), (0xFF, 0x7F)],
)
def test_kind_is_the_type_without_the_ecn_bit_and_nothing_else(gso_type: int, kind: int) -> None:
    assert VnetHeader(gso_type=gso_type).kind == kind


def test_numbers_are_the_kernels() -> None:
    # include/uapi/linux/virtio_net.h
    assert vnet.NEEDS_CSUM == 1
    assert (vnet.GSO_NONE, vnet.GSO_TCPV4, vnet.GSO_TCPV6, vnet.GSO_UDP_L4) == (0, 1, 4, 5)
    assert vnet.GSO_ECN == 0x80
