"""The Internet checksum against a slow sum written from RFC 1071, and flannel's TTL vectors."""

from __future__ import annotations

import random
import struct

import pytest

from tests.packets import slow_sum
from tundp.wire import checksum


def test_rfc_1071_example() -> None:
    # Section 3: 00 01 f2 03 f4 f5 f6 f7 sums to ddf2, so the checksum is its complement.
    data = bytes.fromhex("0001f203f4f5f6f7")
    assert checksum.ones_complement_sum(data) == 0xDDF2
    assert checksum.checksum(data) == 0x220D


def test_known_ipv4_header() -> None:
    # A header seen on many a wire; the checksum field zeroed.
    header = bytes.fromhex("4500003c1c4640004006 0000 c0000201 c6336402".replace(" ", ""))
    value = checksum.checksum(header)
    assert value == ~slow_sum(header) & 0xFFFF
    whole = header[:10] + value.to_bytes(2, "big") + header[12:]
    assert checksum.is_valid(whole)
    assert not checksum.is_valid(whole[:-1] + b"\x03")


@pytest.mark.parametrize("length", range(201))
def test_every_length_against_the_slow_sum(length: int) -> None:
    rng = random.Random(length)
    samples = [rng.randbytes(length) for _ in range(5)]
    samples += [bytes(length), b"\xff" * length, (b"\xff\xfe\x00\x01" * 51)[:length]]
    for data in samples:
        assert checksum.ones_complement_sum(data) == slow_sum(data), data.hex()
        assert checksum.checksum(data) == ~slow_sum(data) & 0xFFFF


@pytest.mark.parametrize(
    ("hexes", "expected", "breaks"),
    [
        ("", 0x0000, "no data is zero, not minus zero"),
        ("0000", 0x0000, "all zero keeps the zero that only all-zero data has"),
        ("ffff", 0xFFFF, "a non-zero buffer never sums to plain zero"),
        ("ffffffff", 0xFFFF, "minus zero twice is minus zero"),
        ("fffe0001", 0xFFFF, "congruent to zero is written as ffff"),
        ("ffff0001", 0x0001, "the carry comes back at the low end"),
        ("01", 0x0100, "an odd byte is the high half of its word"),
        ("0001ff", 0xFF01, "the pad goes behind the data, not before"),
    ],
)
def test_representations_of_zero_and_odd_lengths(hexes: str, expected: int, breaks: str) -> None:
    data = bytes.fromhex(hexes)
    assert slow_sum(data) == expected, breaks
    assert checksum.ones_complement_sum(data) == expected, breaks


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_takes_any_bytes(kind: type[bytearray] | type[bytes] | type[memoryview]) -> None:
    assert checksum.ones_complement_sum(kind(b"\x12\x34\x56")) == 0x6834


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (0xFE00, 0xFF00),
        (0xFEFF, 0x0000),
        (0xFF00, 0x0001),
        (0xFF12, 0x0013),
        (0xFFFF, 0x0100),
    ],
)
def test_flannels_ttl_vectors(before: int, after: int) -> None:
    assert checksum.after_ttl_decrement(before) == after


@pytest.mark.parametrize("ttl", [1, 64, 255])
def test_incremental_equals_full_for_every_checksum(ttl: int) -> None:
    # The filler stands for the rest of the header, and runs over all it can sum to.
    # 0x4500, the first word of every plain header, keeps the sum from being zero.
    word = ttl << 8 | 17
    seen = set()
    for filler in range(0x10000):
        before = ~slow_sum(struct.pack("!HHH", 0x4500, word, filler)) & 0xFFFF
        full = ~slow_sum(struct.pack("!HHH", 0x4500, word - 0x100, filler)) & 0xFFFF
        assert checksum.after_ttl_decrement(before) == full, hex(before)
        seen.add(before)
    assert seen == set(range(0xFFFF))


def test_incremental_for_each_of_the_65535_reachable_checksums() -> None:
    # 0xFFFF is not reachable: it would need a header that sums to zero.
    for before in range(0xFFFF):
        rest = ~before & 0xFFFF  # what header without checksum sums to; never 0
        lowered = slow_sum(struct.pack("!HH", rest, 0xFEFF))  # minus 0x0100
        full = ~lowered & 0xFFFF
        assert checksum.after_ttl_decrement(before) == full, hex(before)


def test_a_wrong_checksum_stays_wrong() -> None:
    header = bytearray.fromhex("4500001400000000 40 11 0000 c0000201 c6336402".replace(" ", ""))
    right = checksum.checksum(header)
    for error in (1, 0x100, 0x7FFF):
        wrong = (right + error) & 0xFFFF
        header[8] = 0x3F
        header[10:12] = checksum.after_ttl_decrement(wrong).to_bytes(2, "big")
        assert not checksum.is_valid(header), hex(error)
