"""C and Python split and merge alike: same bytes, same drop reason, same misses."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.packets import (
    ACK,
    DF,
    MF,
    PSH,
    ROUTER_ALERT,
    TIMESTAMPS,
    finished,
    headers_len,
    ipv4,
    prefix_sums,
    pseudo,
    slow_sum,
    stored,
    super_packet,
    tcp,
    udp,
    with_header_checksum,
    with_ttl,
)
from tundp.engine.native import library, twins
from tundp.wire import ip
from tundp.wire import segment as wire_segment
from tundp.wire.coalesce import MAX_ITEMS, Coalescer, Miss, Written
from tundp.wire.drop import DropReason
from tundp.wire.vnet import VnetHeader

SETTINGS = settings(max_examples=300, deadline=None)

_native = library.require()
ffi, lib = _native.ffi, _native.lib


def vnet_for(packet: bytes, gso_size: int, /, **fields: Any) -> VnetHeader:
    start = (packet[0] & 15) * 4
    gso_type, offset = (1, 16) if packet[9] == 6 else (5, 6)
    return VnetHeader(1, gso_type, 0, gso_size, start, offset)._replace(**fields)


def assert_same_segments(header: VnetHeader, packet: bytes) -> list[bytes] | DropReason:
    cut = wire_segment.segment(header, memoryview(packet))
    expected = cut if isinstance(cut, DropReason) else [bytes(one) for one in cut]
    assert twins.segment(header, packet) == expected
    lowered = expected
    if not isinstance(expected, DropReason) and header.kind != 0:
        if packet[8] == 0:
            return expected  # nobody lowers that
        lowered = [with_ttl(one, one[8] - 1) for one in expected]
    assert twins.segment(header, packet, lowers_ttl=True) == lowered
    return expected


def assert_same_writes(packets: list[bytes], **how: Any) -> tuple[list[Written], list[int]]:
    merger = Coalescer(**how)
    for packet in packets:
        merger.add(packet)
    merger.flush()
    written, misses = twins.coalesce(packets, **how)
    assert written == merger.written
    assert misses == merger.misses
    return written, misses


# Sums


def test_there_is_a_variant_for_every_cpu() -> None:
    names = twins.sums_variants()
    assert names[-1] == "portable"
    assert len(set(names)) == len(names)


VARIANTS = pytest.mark.parametrize("variant", range(len(twins.sums_variants())))
LENGTHS = range(2101)


@VARIANTS
def test_sums_of_every_length_at_every_alignment(variant: int) -> None:
    noise = random.Random(variant).randbytes(LENGTHS.stop + 8)
    for offset in range(8):
        sums = prefix_sums(noise[offset:])
        view = memoryview(noise)[offset:]
        for length in LENGTHS:
            data = view[:length]
            assert twins.variant_sum(variant, data) == sums[length], (offset, length)
            assert twins.variant_copy(variant, data) == (bytes(data), sums[length]), (
                offset,
                length,
            )


@VARIANTS
@pytest.mark.parametrize("byte", [0x00, 0x01, 0x80, 0xFF])
def test_sums_of_one_byte_repeated(variant: int, byte: int) -> None:
    data = memoryview(bytes((byte,)) * 65535)
    for length in (*range(300), 1447, 1448, 9000, 32768, 65534, 65535):
        expected = slow_sum(data[:length])
        assert twins.variant_sum(variant, data[:length]) == expected
        assert twins.variant_copy(variant, data[:length]) == (bytes(data[:length]), expected)


@VARIANTS
@pytest.mark.parametrize("length", [65533, 65534, 65535])
def test_sums_of_the_longest(variant: int, length: int) -> None:
    data = random.Random(length).randbytes(length)
    assert twins.variant_sum(variant, data) == slow_sum(data)
    assert twins.variant_copy(variant, data) == (data, slow_sum(data))


@VARIANTS
def test_one_bit_anywhere_is_in_the_sum(variant: int) -> None:
    for length in (1, 2, 3, 63, 64, 65, 127, 129, 191, 260):
        for at in range(length):
            data = bytearray(length)
            data[at] = 1
            expected = 1 if at % 2 else 0x100
            assert twins.variant_sum(variant, data) == expected, (length, at)
            assert twins.variant_copy(variant, data) == (bytes(data), expected), (length, at)


@VARIANTS
@pytest.mark.parametrize("offset", range(8))
def test_a_copy_stays_between_its_ends(variant: int, offset: int) -> None:
    data = random.Random(offset).randbytes(700)
    for length in (*range(260), 511, 512, 513, 700):
        out = bytearray(b"\xa5" * (offset + length + 64))
        room = ffi.from_buffer("uint8_t[]", out) + offset
        lib.tundp_sums_run(variant, room, ffi.from_buffer("uint8_t[]", data), length)
        assert out == b"\xa5" * offset + data[:length] + b"\xa5" * 64, length


# Splitting


DATA = random.Random(7).randbytes(66_000)
TCP_WHOLE, UDP_WHOLE = tcp(DATA[:2500]), udp(DATA[:2500])
MOST_FIELDS: dict[str, Any] = {
    "tos": 0x2E,
    "ttl": 7,
    "ident": 0xFFFE,
    "ip_options": ROUTER_ALERT,
}

WHOLES = {
    "tcp": TCP_WHOLE,
    "udp": UDP_WHOLE,
    "tcp with all": tcp(
        DATA[:2501],
        0xFFFFFC00,
        0xFF,
        b"\x01" * 40,
        ack=0x01020304,
        window=0xABCD,
        urgent=5,
        reserved=0xF,
        **MOST_FIELDS,
    ),
    "udp with all": udp(DATA[:2501], **MOST_FIELDS),
    "both headers as long as can be": tcp(
        DATA[:99], 5, 0xFF, b"\x01" * 40, ip_options=b"\x01" * 40
    ),
    "no payload": tcp(b""),
    "no payload, udp": udp(b""),
    "one byte": tcp(b"x"),
    "ttl 0": tcp(DATA[:100], ttl=0),
    "ttl 1": udp(DATA[:100], ttl=1),
    "evil bit": tcp(DATA[:100], frag=0x8000),
    "longest tcp": tcp(DATA[:65495], 0xFFFFFF00),
    "longest udp": udp(DATA[:65507]),
    "all ones": udp(b"\xff" * 65507),
    "all zeros": tcp(bytes(5000), 0, 0),
}


@pytest.mark.parametrize("whole", WHOLES.values(), ids=WHOLES)
@pytest.mark.parametrize("gso_size", [7, 99, 100, 1448, 1449, 32767, 65535])
def test_super_packets(whole: bytes, gso_size: int) -> None:
    for packet in (super_packet(whole), whole + b"behind"):
        made = assert_same_segments(vnet_for(whole, gso_size), packet)
        assert not isinstance(made, DropReason)
        payload_len = len(whole) - headers_len(whole)
        assert len(made) == max(1, -(-payload_len // gso_size))


@pytest.mark.parametrize("whole", [tcp(DATA[:3000]), udp(DATA[:3001])], ids=["tcp", "udp"])
def test_a_tiny_mss(whole: bytes) -> None:
    for gso_size in (1, 2, 3):
        made = assert_same_segments(vnet_for(whole, gso_size), super_packet(whole))
        assert not isinstance(made, DropReason)
        assert len(made) >= 1000


@pytest.mark.parametrize("make", [tcp, udp])
def test_every_length_and_size(make: Callable[..., Any]) -> None:
    for length in range(140):
        whole = make(DATA[length : 2 * length])
        for gso_size in (1, 63, 64, 65, 128):
            assert_same_segments(vnet_for(whole, gso_size), super_packet(whole))


@pytest.mark.parametrize("make", [tcp, udp])
def test_every_ttl(make: Callable[..., Any]) -> None:
    for ttl in range(256):
        whole = make(DATA[:150], ttl=ttl, ident=0xFFFF)
        assert_same_segments(vnet_for(whole, 100), super_packet(whole))


def test_every_tcp_flag() -> None:
    for flags in range(256):
        for gso_size in (50, 100, 150):
            whole = tcp(DATA[:150], 7, flags)
            assert_same_segments(vnet_for(whole, gso_size), super_packet(whole))


@pytest.mark.parametrize("make", [tcp, udp])
def test_every_checksum(make: Callable[..., Any]) -> None:
    # 65536 datagrams of two bytes: among them one whose checksum computes as zero.
    words = b"".join(word.to_bytes(2, "big") for word in range(1 << 16))
    seen = set()
    for at in range(0, len(words), 40_000):
        chunk = words[at : at + 40_000]
        # With these ports a TCP sequence number of 0 meets a checksum of 0 on its way.
        whole = tcp(chunk, 0, sport=1, dport=2, ack=7) if make is tcp else udp(chunk)
        made = assert_same_segments(vnet_for(whole, 2), super_packet(whole))
        assert not isinstance(made, DropReason)
        start = 36 if make is tcp else 26
        seen |= {one[start : start + 2] for one in made}
    assert len(seen) > 40_000
    assert (b"\x00\x00" in seen, b"\xff\xff" in seen) == (make is tcp, make is udp)


@pytest.mark.parametrize("gso_type", range(256))
def test_every_type(gso_type: int) -> None:
    for whole in (TCP_WHOLE, UDP_WHOLE, TCP_WHOLE[:100], b"\x60" + bytes(80), b""):
        for described in (TCP_WHOLE, UDP_WHOLE):
            assert_same_segments(vnet_for(described, 1000, gso_type=gso_type), whole)


@pytest.mark.parametrize(
    "fields",
    [
        {"flags": 0},
        {"flags": 2},
        {"flags": 0xFF},
        {"gso_size": 0},
        {"csum_start": 0},
        {"csum_start": 19},
        {"csum_start": 24},
        {"csum_start": 0xFFFF},
        {"csum_offset": 0},
        {"csum_offset": 6},
        {"csum_offset": 16},
        {"csum_offset": 17},
        {"csum_offset": 0xFFFF},
        {"csum_start": 0xFFFF, "csum_offset": 0xFFFF},
        {"hdr_len": 0xFFFF},
        {"gso_type": 0},
        {"gso_type": 0, "csum_start": 0xFFF0, "csum_offset": 0x20},
        {"gso_type": 0, "csum_start": 0, "csum_offset": len(TCP_WHOLE) - 2},
        {"gso_type": 0, "csum_start": 0, "csum_offset": len(TCP_WHOLE) - 1},
        {"gso_type": 0, "csum_start": len(TCP_WHOLE) - 2, "csum_offset": 0},
        {"gso_type": 0, "csum_start": len(TCP_WHOLE), "csum_offset": 0},
    ],
    ids=str,
)
def test_vnet_headers_that_lie(fields: dict[str, int]) -> None:
    for whole in (TCP_WHOLE, UDP_WHOLE, *(tcp(b"1", frag=frag) for frag in (MF, 1, 0x1FFF))):
        assert_same_segments(vnet_for(whole, 1000, **fields), whole)


@pytest.mark.parametrize("start", [0, 1, 20, 33])
def test_a_plain_checksum_on_every_offset(start: int) -> None:
    for length in (60, 61, 200):
        for offset in range(length - start + 2):
            for seed in (0, 0x1234, 0xFFFF):
                packet = bytearray(DATA[:length])
                packet[start + offset : start + offset + 2] = seed.to_bytes(2, "big")
                assert_same_segments(VnetHeader(1, 0, 0, 0, start, offset), bytes(packet[:length]))


@pytest.mark.parametrize("offset", [6, 16])
def test_a_plain_checksum_of_every_value(offset: int) -> None:
    header = VnetHeader(1, 0, 0, 0, 4, offset)
    packet = bytearray(24)
    for word in range(0, 1 << 16, 7):
        packet[10:12] = word.to_bytes(2, "big")
        packet[4 + offset : 6 + offset] = (~word & 0xFFFF).to_bytes(2, "big")
        assert_same_segments(header, bytes(packet))
    assert_same_segments(header, bytes(24))


@pytest.mark.parametrize("length", [65533, 65534, 65535])
def test_the_longest_plain_packet(length: int) -> None:
    for offset in (0, 6, 16, length - 22, length - 21):
        assert_same_segments(VnetHeader(1, 0, 0, 0, 20, offset), DATA[:length])


@pytest.mark.parametrize(
    "whole", [tcp(DATA[:70], options=TIMESTAMPS), udp(DATA[:70])], ids=["tcp", "udp"]
)
def test_every_byte_of_the_headers_damaged(whole: bytes) -> None:
    header = vnet_for(whole, 30)
    for at in range(60):
        for bit in range(8):
            damaged = bytearray(super_packet(whole))
            damaged[at] ^= 1 << bit
            assert_same_segments(header, bytes(damaged))
            assert_same_segments(header, with_header_checksum(damaged))


@pytest.mark.parametrize(
    "whole", [tcp(DATA[:30], options=TIMESTAMPS), udp(DATA[:30])], ids=["tcp", "udp"]
)
def test_every_cut(whole: bytes) -> None:
    header = vnet_for(whole, 10)
    for length in range(len(whole) + 1):
        assert_same_segments(header, whole[:length])
        assert_same_segments(header._replace(gso_type=0), whole[:length])
        if length >= 20:
            short = whole[:2] + length.to_bytes(2, "big") + whole[4:length]
            assert_same_segments(header, with_header_checksum(short))
            assert_same_segments(header, with_header_checksum(short) + whole[length:])


VNET_HEADERS = st.builds(
    VnetHeader,
    st.sampled_from([0, 1, 1, 1]) | st.integers(0, 255),
    st.sampled_from([0, 1, 4, 5, 0x80, 0x81, 0x85]) | st.integers(0, 255),
    st.integers(0, 0xFFFF),
    st.integers(0, 64) | st.integers(0, 0xFFFF),
    st.sampled_from([0, 20, 20, 24, 60]) | st.integers(0, 0xFFFF),
    st.sampled_from([0, 6, 6, 16, 16]) | st.integers(0, 0xFFFF),
)


@SETTINGS
@given(VNET_HEADERS, st.binary(max_size=150))
def test_any_vnet_header_on_any_bytes(header: VnetHeader, data: bytes) -> None:
    assert_same_segments(header, data)


@st.composite
def reads(draw: st.DrawFn) -> tuple[VnetHeader, bytes]:
    """A good super-packet, then a few bytes of it or of its vnet header changed."""
    fields: dict[str, Any] = {
        "tos": draw(st.integers(0, 255)),
        "ident": draw(st.integers(0, 0xFFFF)),
        "frag": draw(st.sampled_from([DF, 0, 0x8000, 0xC000])),
        "ttl": draw(st.integers(0, 255)),
        "ip_options": draw(st.sampled_from([b"", b"", ROUTER_ALERT, b"\x01" * 40])),
    }
    gso_size = draw(st.integers(1, 40) | st.integers(1, 65535))
    payload = draw(st.binary(max_size=200)) * draw(st.sampled_from([1, 1, 20]))
    if draw(st.booleans()):
        options = draw(st.sampled_from([b"", TIMESTAMPS, b"\x01" * 40]))
        seq, flags = draw(st.integers(0, 0xFFFFFFFF)), draw(st.integers(0, 255))
        whole = tcp(payload, seq, flags, options, **fields)
    else:
        whole = udp(payload, **fields)
    header = vnet_for(whole, gso_size)
    data = bytearray(super_packet(whole))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    if draw(st.integers(0, 3)):
        data = bytearray(with_header_checksum(data))
    if draw(st.integers(0, 9)) == 0:
        field = draw(st.sampled_from(VnetHeader._fields))
        header = header._replace(
            **{field: draw(st.integers(0, 255) if "type" in field else st.integers(0, 80))}
        )
    return header, bytes(data) + draw(st.sampled_from([b"", b"", b"behind"]))


@SETTINGS
@given(reads())
def test_any_super_packet_and_what_is_nearly_one(read: tuple[VnetHeader, bytes]) -> None:
    assert_same_segments(*read)


# Merging


def stream(count: int, size: int, *, start: int = 0, **fields: Any) -> list[bytes]:
    return [
        tcp(DATA[n * size :][:size], (start + n * size) & 0xFFFFFFFF, **fields)
        for n in range(count)
    ]


def datagrams(count: int, size: int, **fields: Any) -> list[bytes]:
    return [udp(DATA[n * size :][:size], **fields) for n in range(count)]


ONE, TWO, THREE = stream(3, 100)
U1, U2, U3 = datagrams(3, 100)
BATCHES = {
    "nothing": [],
    "tcp": [ONE, TWO, THREE],
    "udp": [U1, U2, U3],
    "mixed": [ONE, U1, TWO, U2, U3, THREE],
    "push": [ONE, tcp(DATA[100:200], 100, ACK | PSH), THREE],
    "push first": [tcp(DATA[:100], 0, ACK | PSH), TWO],
    "push, bad checksum": [ONE, stored(tcp(DATA[100:200], 100, ACK | PSH), 7), THREE],
    "short": [ONE, tcp(DATA[100:199], 100), tcp(DATA[199:299], 199)],
    "short udp": [U1, udp(b"x"), udp(b"x")],
    "longer": [ONE, tcp(DATA[100:201], 100), U1, udp(DATA[:101])],
    "sequence": [TWO, ONE, THREE, ONE],
    "sequence wraps": stream(9, 100, start=0xFFFFFF00),
    "bad checksum": [ONE, stored(TWO, 7), THREE, U1, stored(U2, 7), U3],
    "bad checksum first": [stored(ONE, 7), TWO, THREE, stored(U1, 7), U2, U3],
    "no checksum": [U1, stored(U2, 0), U3, stored(ONE, 0)],
    "partial checksum": [ONE, super_packet(TWO), super_packet(ONE)],
    "differs and bad checksum": [ONE, stored(tcp(DATA[:100], 100, ttl=9), 7)],
    "ids without df": [
        udp(DATA[:9], ident=n & 0xFFFF, frag=0) for n in (65534, 65535, 65536, 3, 4, 4, 6)
    ],
    "ids with df": [udp(DATA[:9], ident=n) for n in (65534, 65535, 0, 3, 4, 4, 6)],
    "pure acks": [ONE, tcp(b"", 100), TWO, tcp(b"", 200), tcp(b"", 200)],
    "empty datagrams": [U1, udp(b""), U2, udp(b"")],
    "icmp": [ONE, ipv4(DATA[:50], 1), TWO],
    "fragments": [ONE, U1, tcp(DATA[:80], frag=MF), TWO, udp(DATA[:80], frag=10), U2],
    "ip options": [ONE, U1, tcp(DATA[:80], ip_options=ROUTER_ALERT), TWO, U2],
    "no headers": [ONE, ipv4(b"", 6), TWO, U1, ipv4(b"", 17), ipv4(U1[20:27], 17), U2],
    "data offsets": [
        ipv4(ONE[20:32] + bytes((words << 4,)) + ONE[33:60], 6) for words in range(16)
    ],
    "udp lengths": [U1, *(udp(DATA[:9], length=n) for n in (0, 7, 16, 17, 18, 65535)), U2],
    "64 tcp": stream(64, 10),
    "129 tcp": stream(129, 10),
    "129 udp": datagrams(129, 10),
    "full tcp": [*stream(5, 13102)[:4], tcp(DATA[52408:65495], 52408)],
    "full tcp and one byte": [*stream(4, 13102), tcp(DATA[52408:65496], 52408)],
    "full udp": [*datagrams(4, 13102), udp(DATA[52408:65507])],
    "full udp and one byte": [*datagrams(4, 13102), udp(DATA[52408:65508])],
    "the longest": [tcp(DATA[:65495], 0), tcp(b"x", 65495), udp(DATA[:65507]), udp(b"x")],
    "nine flows": [
        tcp(DATA[:9], 9 * n, sport=port) for n in range(2) for port in range(MAX_ITEMS + 1)
    ],
    "eight flows": [
        packet
        for n in range(3)
        for port in range(4)
        for packet in (tcp(DATA[:9], 9 * n, sport=port), udp(DATA[:9], sport=port))
    ],
    "eight flows and a bad ninth": [
        *(tcp(DATA[:9], 0, sport=port) for port in range(8)),
        stored(tcp(DATA[:9], 0, sport=99), 7),
        tcp(DATA[:9], 0, ACK | PSH, sport=98),
        *(tcp(DATA[:9], 9, sport=port) for port in range(8)),
    ],
    "a place in the middle": [
        *(tcp(DATA[:9], 0, sport=port) for port in range(8)),
        tcp(DATA[:3], 9, sport=3),
        *(tcp(DATA[:9], 9, sport=port) for port in (9, 3, 7, 4, 2, 10)),
    ],
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("how", [{}, {"is_tcp_on": False}, {"is_udp_on": False}], ids=str)
def test_batches(batch: list[Any | bytes], how: dict[str, Any]) -> None:
    written, _ = assert_same_writes(batch, **how)
    assert sum(one.count for one in written) == len(batch)


def test_the_batches_provoke_every_miss() -> None:
    found = [0] * len(Miss)
    for batch in BATCHES.values():
        found = [a + b for a, b in zip(found, assert_same_writes(batch)[1], strict=True)]
    found[Miss.OFF] = 1
    found[Miss.TCP_FLAGS] = 1  # see the next test
    assert all(found)


def test_every_tcp_flag_in_a_stream() -> None:
    for flags in range(256):
        assert_same_writes([ONE, tcp(DATA[100:200], 100, flags), THREE])
        assert_same_writes([tcp(DATA[:100], 0, flags), tcp(DATA[100:200], 100, flags)])
        assert_same_writes([ONE, tcp(b"", 100, flags), TWO])
    for reserved in range(16):
        assert_same_writes([ONE, tcp(DATA[100:200], 100, reserved=reserved), THREE])


@pytest.mark.parametrize("most", [0, 1, 2, 63, 64, 128, 0xFFFF])
def test_how_many_datagrams(most: int) -> None:
    for count in (1, 2, 3, 64, 65, 130):
        assert_same_writes(datagrams(count, 10), max_udp_segments=most)
    assert_same_writes(stream(130, 10), max_udp_segments=most)


def test_every_size() -> None:
    for size in range(1, 150):
        assert_same_writes([*stream(3, size), *datagrams(3, size)])
        for other in (1, size - 1, size + 1):
            if other:
                assert_same_writes([tcp(DATA[:size], 0), tcp(DATA[:other], size)])
                assert_same_writes([udp(DATA[:size]), udp(DATA[:other])])


def test_every_checksum_in_the_field() -> None:
    for value in range(0, 1 << 16, 11):
        assert_same_writes([ONE, stored(TWO, value)])
    for packet in (TWO, U2):
        right = int.from_bytes(packet[36:38] if packet is TWO else packet[26:28], "big")
        for value in (0, 1, right - 1, right, right + 1, ~right & 0xFFFF, 0xFFFE, 0xFFFF):
            assert_same_writes([ONE, U1, stored(packet, value), THREE, U3])


def test_both_forms_of_a_zero_checksum() -> None:
    # Where the sum of the rest is ffff, a stored 0 and a stored ffff are both right.
    base = slow_sum(tcp(b"\x00\x00", 0)[20:36] + b"\x00\x00" + tcp(b"\x00\x00", 0)[38:])
    word = ~slow_sum(struct.pack("!HH", base, pseudo(tcp(b"\x00\x00", 0)))) & 0xFFFF
    first = tcp(word.to_bytes(2, "big"), 0)
    assert first[36:38] == b"\x00\x00"
    for value in (0, 0xFFFF):
        written, _ = assert_same_writes([stored(first, value), tcp(b"ab", 2)])
        assert [one.count for one in written] == [2]


@pytest.mark.parametrize("make", [tcp, udp])
def test_every_byte_of_the_second_packet_damaged(make: Callable[..., Any]) -> None:
    later = [{"seq": 30 * n, "options": TIMESTAMPS} for n in range(3)] if make is tcp else [{}] * 3
    one, two, three = (make(DATA[30 * n :][:30], **later[n]) for n in range(3))
    for at in range(1, 70 if make is tcp else 40):
        for bit in range(8):
            damaged = bytearray(two)
            damaged[at] ^= 1 << bit
            packet = with_header_checksum(damaged)
            header = ip.parse(memoryview(packet))
            if isinstance(header, DropReason) or header.total_len != len(packet):
                continue
            assert_same_writes([one, packet, three])
            assert_same_writes([one, finished(packet), three])


ODDITIES = [
    "size",
    "empty",
    "ident",
    "tos",
    "ttl",
    "frag",
    "options",
    "sequence",
    "flags",
    "reserved",
    "ack",
    "window",
    "urgent",
    "tcp-options",
    "checksum",
    "bare",
    "icmp",
    "udp-length",
    "push",
]


def random_packet(rng: random.Random, state: dict[Any, Any]) -> bytes:
    """Mostly the next packet of one of the flows, with now and then one thing about it odd."""
    ip_proto = rng.choice((6, 6, 17))
    sport = rng.randrange(1, state["flows"] + 1)
    seq, ident = state.setdefault((ip_proto, sport), (rng.getrandbits(32), rng.getrandbits(16)))
    odd = rng.choice(ODDITIES) if rng.random() < state["odd"] else ""
    size = state["size"]
    if odd == "size":
        size = rng.randrange(1, 2 * size + 1)
    if odd == "empty":
        size = 0
    fields = {"frag": state["frag"], "ident": ident & 0xFFFF, "sport": sport}
    if odd == "ident":
        fields["ident"] = rng.getrandbits(16)
    if odd in ("tos", "ttl"):
        fields[odd] = rng.choice((1, 2))
    if odd == "frag":
        fields["frag"] = rng.choice((0, DF, 0x8000, MF, 5, 0x6000))
    if odd == "options":
        fields["ip_options"] = ROUTER_ALERT
    payload = rng.randbytes(size)
    state[ip_proto, sport] = (seq + size, ident + 1)
    if ip_proto == 6:
        flags = ACK
        if odd == "flags":
            flags = rng.getrandbits(8)
        if odd == "push":
            flags |= PSH
        if odd in ("reserved", "ack", "window", "urgent"):
            fields[odd] = rng.choice((1, 2))
        if odd == "sequence":
            seq += rng.choice((-1, 1, size, -size, 1 << 31))
        options = TIMESTAMPS if state["options"] != (odd == "tcp-options") else b""
        packet = tcp(payload, seq & 0xFFFFFFFF, flags, options, **fields)
    else:
        if odd == "udp-length":
            fields["length"] = rng.randrange(0, 20)
        packet = udp(payload, **fields)
    if odd == "checksum":
        packet = stored(packet, rng.choice((0, 1, 0xFFFF)))
    if odd == "bare":
        packet = ipv4(packet[20 : rng.randrange(20, len(packet) + 1)], ip_proto)
    if odd == "icmp":
        packet = ipv4(payload, rng.choice((1, 50, 255)))
    return packet


@pytest.mark.parametrize("seed", range(12))
def test_long_random_batches(seed: int) -> None:
    rng = random.Random(seed)
    found = [0] * len(Miss)
    most = 0
    for _ in range(10):
        state = {
            "flows": rng.choice((1, 2, 4, 8, 12)),
            "odd": rng.choice((0, 0.02, 0.1, 0.5)),
            "size": rng.choice((1, 5, 64, 1400)),
            "frag": rng.choice((DF, DF, 0)),
            "options": rng.random() < 0.5,
        }
        packets = [random_packet(rng, state) for _ in range(rng.randrange(150))]
        written, misses = assert_same_writes(
            packets,
            is_tcp_on=rng.random() < 0.9,
            is_udp_on=rng.random() < 0.9,
            max_udp_segments=rng.choice((64, 64, 128, 2)),
        )
        found = [a + b for a, b in zip(found, misses, strict=True)]
        most = max([most, *(one.count for one in written)])
    assert sum(found)
    assert most > 2, "random, but not without any order"


@st.composite
def accepted(draw: st.DrawFn) -> bytes:
    """Any packet ip.parse accepts, exactly total length bytes, often one that may join."""
    seq = draw(st.sampled_from([0, 5, 10, 15]))
    payload = draw(st.sampled_from([b"fives", b"four", b"sixsix", b""]))
    data = bytearray(
        tcp(payload, seq, draw(st.sampled_from([ACK, ACK | PSH])))
        if draw(st.booleans())
        else udp(payload)
    )
    if draw(st.integers(0, 3)) == 0:
        data[draw(st.integers(1, len(data) - 1))] = draw(st.integers(0, 255))
    if draw(st.integers(0, 9)) == 0:
        data += draw(st.binary(max_size=30))
    if draw(st.integers(0, 9)) == 0:
        del data[draw(st.integers(20, len(data))) :]
    data[2:4] = len(data).to_bytes(2, "big")
    if data[6] & 0x1F:
        data[6] &= 0xE0
    return with_header_checksum(data)


@SETTINGS
@given(st.lists(accepted(), max_size=12))
def test_any_packets(packets: list[bytes]) -> None:
    for packet in packets:
        assert not isinstance(ip.parse(memoryview(packet)), DropReason)
    assert_same_writes(packets)


@pytest.mark.parametrize("whole", WHOLES.values(), ids=WHOLES)
def test_there_and_back(whole: bytes) -> None:
    made = assert_same_segments(vnet_for(whole, 1448), super_packet(whole))
    assert not isinstance(made, DropReason)
    written, _ = assert_same_writes(made)
    back: list[bytes] = []
    for one in written:
        again = assert_same_segments(one.header, one.packet)
        assert not isinstance(again, DropReason)
        back += again
    if whole[6] & 0x40 or len(made) == 1:
        assert [packet[12:] for packet in back] == [packet[12:] for packet in made]
    else:
        assert back == made


def test_numbers_of_misses_are_one() -> None:
    for miss in Miss:
        assert getattr(lib, f"TUNDP_MISS_{miss.name}") == miss
    assert len(Miss) == lib.TUNDP_MISS_COUNT
