"""Which packets become one write, what that write looks like, and why the others stay alone."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from tests.packets import (
    ACK,
    CWR,
    DESTINATION,
    DF,
    ECE,
    FIN,
    MF,
    PSH,
    ROUTER_ALERT,
    RST,
    SOURCE,
    SYN,
    TIMESTAMPS,
    URG,
    counted,
    ipv4,
    slow_sum,
    stored,
    super_packet,
    tcp,
    udp,
)
from tundp.wire.coalesce import MAX_ITEMS, Coalescer, Miss, Written
from tundp.wire.vnet import VnetHeader


def alone(packet: bytes) -> Written:
    return Written(VnetHeader(), packet, 1)


def joined(packet: bytes, gso_size: int, count: int) -> Written:
    """`packet`: all of them as one, finished, which it will not be."""
    if packet[9] == 6:
        hdr_len = 20 + (packet[32] >> 4) * 4
        header = VnetHeader(1, 1, hdr_len, gso_size, 20, 16)
    else:
        header = VnetHeader(1, 5, 28, gso_size, 20, 6)
    return Written(header, super_packet(packet), count)


def merge(
    *packets: bytes | bytearray | memoryview, **settings: Any
) -> tuple[list[Written], dict[Miss, int]]:
    """One batch: what is written, and the misses there were."""
    merger = Coalescer(**settings)
    for packet in packets:
        merger.add(packet)
    merger.flush()
    assert sum(one.count for one in merger.written) == len(packets)
    return merger.written, {miss: n for miss, n in zip(Miss, merger.misses, strict=True) if n}


DATA = counted(300)
ONE, TWO, THREE = tcp(DATA[:100]), tcp(DATA[100:200], 1100), tcp(DATA[200:], 1200)
U1, U2, U3 = udp(DATA[:100]), udp(DATA[100:200]), udp(DATA[200:])
ICMP = ipv4(b"\x08\x00\xf7\xff\x00\x00\x00\x00", 1)


def test_nothing_in_nothing_out() -> None:
    assert merge() == ([], {})


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("packet", [ONE, U1, ICMP], ids=["tcp", "udp", "icmp"])
def test_one_packet_is_written_as_it_came(
    packet: bytes, kind: type[bytearray] | type[bytes] | type[memoryview]
) -> None:
    written, _ = merge(kind(packet))
    assert written == [alone(packet)]
    assert type(written[0].packet) is bytes


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_tcp_segments_become_one(kind: type[bytearray] | type[bytes] | type[memoryview]) -> None:
    assert merge(kind(ONE), kind(TWO), kind(THREE)) == ([joined(tcp(DATA), 100, 3)], {})


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_udp_datagrams_become_one(kind: type[bytearray] | type[bytes] | type[memoryview]) -> None:
    assert merge(kind(U1), kind(U2), kind(U3)) == ([joined(udp(DATA), 100, 3)], {})


def test_a_merged_tcp_packet_field_by_field() -> None:
    same: dict[str, Any] = {
        "tos": 0x2E,
        "ttl": 7,
        "ack": 0x01020304,
        "window": 0xABCD,
        "urgent": 0x0102,
        "options": TIMESTAMPS,
        "frag": 0x8000,
    }
    (one,), misses = merge(
        tcp(DATA[:99], 0xFFFFFFF0, ACK | ECE, ident=0xFFFF, **same),
        tcp(DATA[99:198], 0xFFFFFFF0 + 99 - (1 << 32), ACK | ECE, ident=0, **same),
        tcp(DATA[198:201], 0xFFFFFFF0 + 198 - (1 << 32), ACK | ECE | PSH, ident=1, **same),
    )
    assert misses == {}
    assert one.count == 3
    assert one.header == VnetHeader(
        flags=1, gso_type=1, hdr_len=52, gso_size=99, csum_start=20, csum_offset=16
    )
    packet = one.packet
    assert len(packet) == 20 + 32 + 201
    assert struct.unpack("!BBHHHBB", packet[:10]) == (0x45, 0x2E, 253, 0xFFFF, 0x8000, 7, 6)
    assert slow_sum(packet[:20]) == 0xFFFF
    assert packet[12:20] == bytes.fromhex("c0000201c6336402")
    assert struct.unpack("!HHIIBBH", packet[20:36]) == (
        5201,
        443,
        0xFFFFFFF0,
        0x01020304,
        0x80,
        ACK | ECE | PSH,
        0xABCD,
    )
    # 192.0.2.1 + 198.51.100.2 + protocol 6 + the 233 bytes of TCP, folded, not inverted.
    assert packet[36:38] == struct.pack("!H", (0xC000 + 0x0201 + 0xC633 + 0x6402 + 6 + 233) % 65535)
    assert packet[38:40] == b"\x01\x02"
    assert packet[40:52] == TIMESTAMPS
    assert packet[52:] == DATA[:201]


def test_a_merged_udp_packet_field_by_field() -> None:
    same: dict[str, Any] = {"tos": 1, "ttl": 9, "frag": 0}
    (one,), misses = merge(
        udp(DATA[:7], ident=8, **same),
        udp(DATA[7:14], ident=9, **same),
        udp(DATA[14:15], ident=10, **same),
    )
    assert misses == {}
    assert one.count == 3
    assert one.header == VnetHeader(
        flags=1, gso_type=5, hdr_len=28, gso_size=7, csum_start=20, csum_offset=6
    )
    packet = one.packet
    assert struct.unpack("!BBHHHBB", packet[:10]) == (0x45, 1, 43, 8, 0, 9, 17)
    assert slow_sum(packet[:20]) == 0xFFFF
    seed = (0xC000 + 0x0201 + 0xC633 + 0x6402 + 17 + 23) % 65535
    assert struct.unpack("!HHHH", packet[20:28]) == (5201, 443, 23, seed)
    assert packet[28:] == DATA[:15]


def test_two_packets_are_enough() -> None:
    assert merge(ONE, TWO) == ([joined(tcp(DATA[:200]), 100, 2)], {})
    assert merge(U1, U2) == ([joined(udp(DATA[:200]), 100, 2)], {})


@pytest.mark.parametrize("size", [1, 2, 3, 1447, 1448, 32747])
def test_payloads_of_every_size(size: int) -> None:
    data = counted(2 * size)
    first, second = tcp(data[:size], 0), tcp(data[size:], size)
    assert merge(first, second) == ([joined(tcp(data, 0), size, 2)], {})
    first, second = udp(data[:size]), udp(data[size:])
    assert merge(first, second) == ([joined(udp(data), size, 2)], {})


@pytest.mark.parametrize("seq", [0xFFFFFFFF - lead for lead in (0, 99, 100, 101, 199, 200, 299)])
def test_sequence_numbers_wrap_anywhere(seq: int) -> None:
    packets = [tcp(DATA[n * 100 :][:100], seq + n * 100 & 0xFFFFFFFF) for n in range(3)]
    assert merge(*packets) == ([joined(tcp(DATA, seq), 100, 3)], {})


# What ends a super-packet without being a miss


def test_push_ends_a_merged_packet() -> None:
    pushed = tcp(DATA[100:200], 1100, ACK | PSH)
    assert merge(ONE, pushed, THREE) == (
        [joined(tcp(DATA[:200], flags=ACK | PSH), 100, 2), alone(THREE)],
        {},
    )


def test_a_pushed_packet_begins_none() -> None:
    first = tcp(DATA[:100], flags=ACK | PSH)
    assert merge(first, TWO, THREE) == ([alone(first), joined(tcp(DATA[100:], 1100), 100, 2)], {})
    second = tcp(DATA[100:200], 1100, ACK | PSH)
    assert merge(first, second) == ([alone(first), alone(second)], {})


def test_a_pushed_packet_does_not_wait() -> None:
    merger = Coalescer()
    merger.add(tcp(DATA, flags=ACK | PSH))
    assert len(merger.written) == 1


def test_a_short_segment_ends_a_merged_packet() -> None:
    short, after = tcp(DATA[100:199], 1100), tcp(DATA[199:299], 1199)
    assert merge(ONE, short, after) == ([joined(tcp(DATA[:199]), 100, 2), alone(after)], {})
    short, after = udp(DATA[100:199]), udp(DATA[199:200])
    assert merge(U1, short, after) == ([joined(udp(DATA[:199]), 100, 2), alone(after)], {})


@pytest.mark.parametrize("ender", [tcp(DATA[100:150], 1100), tcp(DATA[100:200], 1100, ACK | PSH)])
def test_what_ended_is_written_at_once(ender: bytes) -> None:
    merger = Coalescer()
    merger.add(ONE)
    assert merger.written == []
    merger.add(ender)
    assert [one.count for one in merger.written] == [2]


def test_a_batch_ends_at_flush() -> None:
    merger = Coalescer()
    merger.add(ONE)
    merger.flush()
    assert merger.written == [alone(ONE)]
    merger.add(TWO)
    merger.flush()
    assert merger.written == [alone(ONE), alone(TWO)]
    merger.flush()
    assert merger.written == [alone(ONE), alone(TWO)], "nothing twice"
    assert sum(merger.misses) == 0


@pytest.mark.parametrize("kind", [lambda buffer: buffer, memoryview], ids=["bytearray", "view"])
@pytest.mark.parametrize("make", [tcp, udp])
def test_the_callers_buffer_is_only_borrowed(
    make: Callable[..., Any], kind: Callable[..., Any] | type[memoryview]
) -> None:
    merger = Coalescer()
    buffer = bytearray(len(make(DATA[:100])))
    for number in range(2):
        packet = make(DATA[number * 100 :][:100], **({"seq": number * 100} if make is tcp else {}))
        buffer[:] = packet
        merger.add(kind(buffer))
        assert buffer == packet
    buffer[:] = bytes(len(buffer))
    merger.flush()
    whole = tcp(DATA[:200], 0) if make is tcp else udp(DATA[:200])
    assert merger.written == [joined(whole, 100, 2)]


# Misses, each on its own

MISSES = [
    (Miss.NOT_TRANSPORT, [ICMP], "ICMP"),
    (Miss.NOT_TRANSPORT, [ipv4(b"", 50)], "ESP, and nothing in it"),
    (Miss.NOT_TRANSPORT, [ipv4(b"x" * 40, 1, ip_options=ROUTER_ALERT)], "ICMP with options"),
    (Miss.FRAGMENT, [tcp(DATA, frag=MF)], "a first fragment"),
    (Miss.FRAGMENT, [udp(DATA, frag=1)], "a later fragment"),
    (Miss.FRAGMENT, [udp(DATA, frag=0x1000)], "the high bit of the offset"),
    (Miss.FRAGMENT, [ipv4(b"12345678", 1, frag=MF)], "a fragment of ICMP"),
    (Miss.FRAGMENT, [tcp(DATA, frag=MF, ip_options=ROUTER_ALERT)], "a fragment with options"),
    (Miss.IP_OPTIONS, [tcp(DATA, ip_options=ROUTER_ALERT)], "TCP behind IP options"),
    (Miss.IP_OPTIONS, [udp(DATA, ip_options=ROUTER_ALERT)], "UDP behind IP options"),
    (Miss.BAD_TRANSPORT, [ipv4(b"", 6)], "no TCP header"),
    (Miss.BAD_TRANSPORT, [ipv4(ONE[20:39], 6)], "half a TCP header"),
    (Miss.BAD_TRANSPORT, [ipv4(ONE[20:32] + b"\x40" + ONE[33:], 6)], "data offset below 5"),
    (Miss.BAD_TRANSPORT, [ipv4(ONE[20:32] + b"\xf0" + ONE[33:79], 6)], "options do not fit"),
    (Miss.BAD_TRANSPORT, [ipv4(b"", 17)], "no UDP header"),
    (Miss.BAD_TRANSPORT, [ipv4(U1[20:27], 17)], "half a UDP header"),
    (Miss.BAD_TRANSPORT, [udp(DATA, length=307)], "UDP shorter than its packet"),
    (Miss.BAD_TRANSPORT, [udp(DATA, length=309)], "UDP longer than its packet"),
    (Miss.BAD_TRANSPORT, [udp(DATA, length=0)], "UDP of length 0"),
    *((Miss.TCP_FLAGS, [tcp(DATA, flags=ACK | f)], hex(f)) for f in (FIN, SYN, RST, URG, CWR)),
    (Miss.TCP_FLAGS, [tcp(DATA, flags=0)], "no ACK"),
    (Miss.TCP_FLAGS, [tcp(DATA, flags=PSH)], "PSH without ACK"),
    (Miss.TCP_FLAGS, [tcp(DATA, flags=0xFF)], "a Christmas tree"),
    *((Miss.TCP_FLAGS, [tcp(DATA, reserved=bit)], f"reserved {bit}") for bit in (1, 2, 4, 8)),
    (Miss.TCP_FLAGS, [tcp(b"", flags=SYN)], "flags before payload"),
    (Miss.NO_PAYLOAD, [tcp(b"")], "a pure ACK"),
    (Miss.NO_PAYLOAD, [tcp(b"", flags=ACK | PSH | ECE)], "a pure ACK, pushed"),
    (Miss.NO_PAYLOAD, [tcp(b"", options=TIMESTAMPS)], "a pure ACK with options"),
    (Miss.NO_PAYLOAD, [udp(b"")], "an empty datagram"),
    (Miss.NO_PAYLOAD, [stored(udp(b""), 0)], "an empty datagram without a checksum"),
    (Miss.NO_CHECKSUM, [stored(U1, 0)], "UDP without a checksum"),
    (Miss.BAD_CHECKSUM, [stored(ONE, 0x1234)], "TCP with a wrong one"),
    (Miss.BAD_CHECKSUM, [stored(ONE, 0)], "TCP without a checksum has a wrong one"),
    (Miss.BAD_CHECKSUM, [stored(tcp(DATA, flags=ACK | PSH), 0x1234)], "PSH and a wrong one"),
    (Miss.BAD_CHECKSUM, [stored(U1, 0x1234)], "UDP with a wrong one"),
    (Miss.BAD_CHECKSUM, [super_packet(ONE)], "a partial one"),
    (Miss.BAD_CHECKSUM, [ONE[:-1] + b"x"], "damaged data"),
    (Miss.HEADER_DIFFERS, [ONE, tcp(DATA[100:200], 1100, ttl=63)], "TTL"),
    (Miss.SIZE, [ONE, tcp(DATA[100:201], 1100)], "TCP, one byte longer"),
    (Miss.SIZE, [U1, udp(DATA[100:201])], "UDP, one byte longer"),
    (Miss.SEQUENCE, [ONE, THREE], "a segment lost"),
    (Miss.SEQUENCE, [ONE, ONE], "a segment twice"),
    (Miss.SEQUENCE, [TWO, ONE], "segments in reverse"),
    (Miss.SEQUENCE, [ONE, tcp(DATA[100:200], 1099)], "an overlap"),
    (Miss.SEQUENCE, [ONE, tcp(DATA[100:200], (1 << 31) + 1100)], "half the space away"),
]


@pytest.mark.parametrize(("miss", "packets", "what"), MISSES, ids=[row[2] for row in MISSES])
def test_a_miss_is_counted_once_and_changes_nothing(
    miss: Miss, packets: list[bytes], what: str
) -> None:
    assert merge(*packets) == ([alone(packet) for packet in packets], {miss: 1})


def test_every_miss_is_provoked() -> None:
    elsewhere = {Miss.OFF, Miss.FULL}
    assert {miss for miss, _, _ in MISSES} | elsewhere == set(Miss)


def test_numbers_and_names_of_misses() -> None:
    assert [miss.value for miss in Miss] == list(range(13))
    assert Miss.NOT_TRANSPORT.label == "not_transport"


def test_switched_off() -> None:
    assert merge(ONE, TWO, is_tcp_on=False) == ([alone(ONE), alone(TWO)], {Miss.OFF: 2})
    assert merge(U1, U2, is_udp_on=False) == ([alone(U1), alone(U2)], {Miss.OFF: 2})
    whole = [joined(tcp(DATA[:200]), 100, 2)]
    assert merge(ONE, TWO, is_udp_on=False) == (whole, {})
    assert merge(U1, U2, is_tcp_on=False) == ([joined(udp(DATA[:200]), 100, 2)], {})
    both = {"is_tcp_on": False, "is_udp_on": False}
    assert merge(ONE, U1, ICMP, **both)[1] == {Miss.OFF: 2, Miss.NOT_TRANSPORT: 1}


@pytest.mark.parametrize(
    "packet",
    [tcp(b""), ipv4(b"", 6), stored(ONE, 7), tcp(DATA, flags=SYN)],
    ids=["pure ack", "no header", "bad checksum", "syn"],
)
def test_coalescing_switched_off_counts_no_other_miss(packet: bytes) -> None:
    assert merge(packet, is_tcp_on=False) == ([alone(packet)], {Miss.OFF: 1})


# Header fields that must be the same

DIFFERENCES = [
    {"tos": 0x04},
    {"tos": 0x01},  # ECN
    {"ttl": 63},
    {"frag": 0, "ident": 0x1235},
    {"frag": 0x8000 | DF},
]
TCP_DIFFERENCES = [
    {"ack": 0x0A0B0C0E},
    {"ack": 0x8A0B0C0D},
    {"window": 513},
    {"window": 512 + 256},
    {"urgent": 1},
    {"urgent": 256},
    {"flags": ACK | ECE},
    {"options": TIMESTAMPS},
]


@pytest.mark.parametrize("difference", [*DIFFERENCES, *TCP_DIFFERENCES], ids=str)
def test_tcp_headers_that_differ(difference: dict[str, Any]) -> None:
    second = tcp(DATA[100:200], **{"seq": 1100, **difference})
    expected = [alone(ONE), alone(second)]
    assert merge(ONE, second) == (expected, {Miss.HEADER_DIFFERS: 1})
    third = tcp(DATA[200:], **{"seq": 1200, **difference, "ident": 0x1236})
    whole = tcp(DATA[100:], **{"seq": 1100, **difference})
    expected = [alone(ONE), joined(whole, 100, 2)]
    assert merge(ONE, second, third) == (expected, {Miss.HEADER_DIFFERS: 1}), "a new one began"


@pytest.mark.parametrize("difference", DIFFERENCES, ids=str)
def test_udp_headers_that_differ(difference: dict[str, Any]) -> None:
    second = udp(DATA[100:200], **difference)
    assert merge(U1, second) == ([alone(U1), alone(second)], {Miss.HEADER_DIFFERS: 1})
    third = udp(DATA[200:], **{**difference, "ident": 0x1236})
    expected = [alone(U1), joined(udp(DATA[100:], **difference), 100, 2)]
    assert merge(U1, second, third) == (expected, {Miss.HEADER_DIFFERS: 1}), "a new one began"


@pytest.mark.parametrize("at", range(12))
def test_every_byte_of_tcp_options_counts(at: int) -> None:
    other = TIMESTAMPS[:at] + bytes((TIMESTAMPS[at] ^ 1,)) + TIMESTAMPS[at + 1 :]
    first = tcp(DATA[:100], options=TIMESTAMPS)
    second = tcp(DATA[100:200], 1100, options=other)
    assert merge(first, second) == ([alone(first), alone(second)], {Miss.HEADER_DIFFERS: 1})


def test_ece_goes_and_comes_with_all() -> None:
    first, second = tcp(DATA[:100], flags=ACK | ECE), tcp(DATA[100:200], 1100, ACK | ECE)
    assert merge(first, second) == ([joined(tcp(DATA[:200], flags=ACK | ECE), 100, 2)], {})
    assert merge(first, TWO) == ([alone(first), alone(TWO)], {Miss.HEADER_DIFFERS: 1})


@pytest.mark.parametrize(
    ("packets", "why"),
    [
        ([ONE, tcp(DATA[:101], 7, ttl=3)], Miss.HEADER_DIFFERS),
        ([ONE, tcp(DATA[:101], 7)], Miss.SIZE),
        ([ONE, tcp(DATA[:100], 7)], Miss.SEQUENCE),
    ],
)
def test_the_first_reason_is_the_one_counted(packets: list[bytes], why: Miss) -> None:
    assert merge(*packets)[1] == {why: 1}


# Identification: what DF makes of it (RFC 6864)


@pytest.mark.parametrize("idents", [(7, 8, 9), (7, 7, 7), (0, 0, 0), (9, 500, 3)])
@pytest.mark.parametrize("make", [tcp, udp])
def test_with_df_any_identification_joins(
    make: Callable[..., Any], idents: tuple[int, int, int]
) -> None:
    seqs = [{"seq": seq} for seq in (1000, 1100, 1200)] if make is tcp else [{}] * 3
    packets = [
        make(DATA[n * 100 :][:100], ident=ident, **seqs[n]) for n, ident in enumerate(idents)
    ]
    assert merge(*packets) == ([joined(make(DATA, ident=idents[0]), 100, 3)], {})


@pytest.mark.parametrize("idents", [(7, 8, 9), (0xFFFE, 0xFFFF, 0), (0xFFFF, 0, 1)])
@pytest.mark.parametrize("make", [tcp, udp])
def test_without_df_the_next_identification_joins(
    make: Callable[..., Any], idents: tuple[int, int, int]
) -> None:
    seqs = [{"seq": seq} for seq in (1000, 1100, 1200)] if make is tcp else [{}] * 3
    packets = [
        make(DATA[n * 100 :][:100], ident=ident, frag=0, **seqs[n])
        for n, ident in enumerate(idents)
    ]
    assert merge(*packets) == ([joined(make(DATA, ident=idents[0], frag=0), 100, 3)], {})


@pytest.mark.parametrize("ident", [6, 7, 9, 8 + 256, 0])
@pytest.mark.parametrize("make", [tcp, udp])
def test_without_df_no_other_identification_joins(make: Callable[..., Any], ident: int) -> None:
    later = {"seq": 1100} if make is tcp else {}
    first = make(DATA[:100], ident=7, frag=0)
    second = make(DATA[100:200], ident=ident, frag=0, **later)
    assert merge(first, second) == ([alone(first), alone(second)], {Miss.SEQUENCE: 1})


def test_without_df_the_third_follows_the_second() -> None:
    packets = [udp(DATA[:100], ident=ident, frag=0) for ident in (7, 8, 8)]
    whole = udp(DATA[:100] * 2, ident=7, frag=0)
    assert merge(*packets) == ([joined(whole, 100, 2), alone(packets[2])], {Miss.SEQUENCE: 1})


# Full


def stream(count: int, size: int, make: Any = tcp) -> tuple[list[bytes], bytes]:
    data = counted(count * size)
    seqs = [{"seq": n * size} for n in range(count)] if make is tcp else [{}] * count
    return [make(data[n * size :][:size], **seqs[n]) for n in range(count)], data


def test_64_tcp_segments_and_no_more() -> None:
    packets, data = stream(129, 10)
    assert merge(*packets[:64]) == ([joined(tcp(data[:640], 0), 10, 64)], {})
    assert merge(*packets) == (
        [
            joined(tcp(data[:640], 0), 10, 64),
            joined(tcp(data[640:1280], 640), 10, 64),
            alone(packets[128]),
        ],
        {Miss.FULL: 2},
    )


@pytest.mark.parametrize("most", [1, 2, 64, 128])
def test_udp_datagrams_as_many_as_the_kernel_takes(most: int) -> None:
    packets, data = stream(most + 1, 10, udp)
    first = joined(udp(data[: most * 10]), 10, most) if most > 1 else alone(packets[0])
    expected = [first, alone(packets[most])]
    assert merge(*packets, max_udp_segments=most) == (expected, {Miss.FULL: 1})
    assert merge(*packets[:most], max_udp_segments=most) == ([first], {})


def test_udps_limit_is_64_unless_told_and_not_tcps() -> None:
    packets, _ = stream(65, 10, udp)
    assert [one.count for one in merge(*packets)[0]] == [64, 1]
    packets, _ = stream(65, 10)
    assert [one.count for one in merge(*packets, max_udp_segments=3)[0]] == [64, 1]
    assert [one.count for one in merge(*packets, max_udp_segments=128)[0]] == [64, 1]


@pytest.mark.parametrize(("make", "room"), [(tcp, 65495), (udp, 65507)])
def test_65535_bytes_and_no_more(make: Callable[..., Any], room: int) -> None:
    size = 13102
    packets, data = stream(6, size, make)
    last = {"seq": 4 * size} if make is tcp else {}
    begin = {"seq": 0} if make is tcp else {}
    fits = make(data[4 * size : room], **last)
    whole = make(data[:room], **begin)
    assert len(whole) == 65535
    assert merge(*packets[:4], fits) == ([joined(whole, size, 5)], {})
    beyond = make(data[4 * size : room + 1], **last)
    expected = [joined(make(data[: 4 * size], **begin), size, 4), alone(beyond)]
    assert merge(*packets[:4], beyond) == (expected, {Miss.FULL: 1})


def test_a_packet_of_65535_bytes_has_room_for_none() -> None:
    whole = tcp(counted(65495), 0)
    more = tcp(b"x", 65495)
    assert merge(whole, more) == ([alone(whole), alone(more)], {Miss.FULL: 1})


# Flows


KEY_DIFFERENCES = [
    {"sport": 5202},
    {"dport": 444},
    {"source": SOURCE + 1},
    {"destination": DESTINATION + 1},
]


@pytest.mark.parametrize("difference", KEY_DIFFERENCES, ids=str)
def test_flows_do_not_mix_and_do_not_disturb(difference: dict[str, Any]) -> None:
    other = [
        tcp(DATA[:100], **difference),
        tcp(DATA[100:200], 1100, **difference),
        tcp(DATA[200:], 1200, **difference),
    ]
    expected = [joined(tcp(DATA), 100, 3), joined(tcp(DATA, **difference), 100, 3)]
    assert merge(ONE, other[0], TWO, other[1], other[2], THREE) == (expected, {})
    other = [udp(DATA[:100], **difference), udp(DATA[100:200], **difference)]
    expected = [joined(udp(DATA[:200]), 100, 2), joined(udp(DATA[:200], **difference), 100, 2)]
    assert merge(U1, other[0], U2, other[1]) == (expected, {})


def test_the_two_directions_are_two_flows() -> None:
    back: dict[str, Any] = {
        "sport": 443,
        "dport": 5201,
        "source": DESTINATION,
        "destination": SOURCE,
    }
    answer = tcp(DATA[:100], **back)
    expected = [joined(tcp(DATA[:200]), 100, 2), alone(answer)]
    assert merge(ONE, answer, TWO) == (expected, {})


def test_tcp_and_udp_with_the_same_ports_are_two_flows() -> None:
    expected = [joined(tcp(DATA[:200]), 100, 2), joined(udp(DATA[:200]), 100, 2)]
    assert merge(ONE, U1, TWO, U2) == (expected, {})


def test_the_ninth_flow_sends_the_oldest_on_its_way() -> None:
    firsts = [tcp(DATA[:100], sport=port) for port in range(MAX_ITEMS + 1)]
    merger = Coalescer()
    for packet in firsts[:MAX_ITEMS]:
        merger.add(packet)
    assert merger.written == []
    merger.add(firsts[MAX_ITEMS])
    assert merger.written == [alone(firsts[0])]
    for port in range(1, MAX_ITEMS + 1):
        merger.add(tcp(DATA[100:200], 1100, sport=port))
    merger.flush()
    assert merger.written[1:] == [
        joined(tcp(DATA[:200], sport=port), 100, 2) for port in range(1, MAX_ITEMS + 1)
    ]
    assert sum(merger.misses) == 0


def test_eight_flows() -> None:
    assert MAX_ITEMS == 8


def test_the_oldest_is_the_one_that_began_first() -> None:
    merger = Coalescer()
    for port in range(MAX_ITEMS):
        merger.add(tcp(DATA[:100], sport=port))
    merger.add(tcp(DATA[100:200], 1100, sport=0))
    merger.add(tcp(DATA[:100], sport=99))
    assert merger.written == [joined(tcp(DATA[:200], sport=0), 100, 2)]


def test_a_merged_packet_that_ended_makes_room_for_another_flow() -> None:
    merger = Coalescer()
    for port in range(MAX_ITEMS):
        merger.add(tcp(DATA[:100], sport=port))
    merger.add(tcp(DATA[100:150], 1100, sport=3))
    assert [one.count for one in merger.written] == [2]
    merger.add(tcp(DATA[:100], sport=99))
    assert len(merger.written) == 1
    merger.flush()
    ports = [int.from_bytes(one.packet[20:22], "big") for one in merger.written]
    assert ports == [3, 0, 1, 2, 4, 5, 6, 7, 99]


def test_a_packet_that_cannot_begin_one_evicts_none() -> None:
    merger = Coalescer()
    for port in range(MAX_ITEMS):
        merger.add(tcp(DATA[:100], sport=port))
    strangers = [
        tcp(DATA[:100], flags=ACK | PSH, sport=99),
        stored(tcp(DATA[:100], sport=99), 7),
        tcp(b"", sport=99),
        tcp(DATA, flags=SYN, sport=99),
        stored(udp(DATA), 0),
        udp(DATA, length=9),
        ICMP,
    ]
    for packet in strangers:
        merger.add(packet)
    assert merger.written == [alone(packet) for packet in strangers]


# Order


ODD = {
    "pure ack": tcp(b"", 1100),
    "syn": tcp(DATA[:100], 1100, SYN | ACK),
    "fin": tcp(DATA[100:200], 1100, FIN | ACK),
    "rst": tcp(b"", 1100, RST),
    "urg": tcp(DATA[100:200], 1100, URG | ACK),
    "cwr": tcp(DATA[100:200], 1100, CWR | ACK),
    "accurate ecn": tcp(DATA[100:200], 1100, reserved=1),
    "bad checksum": stored(TWO, 0x1234),
    "bad checksum, pushed": stored(tcp(DATA[100:200], 1100, ACK | PSH), 0x1234),
    "fragment": tcp(DATA[100:200], 1100, frag=MF),
    "ip options": tcp(DATA[100:200], 1100, ip_options=ROUTER_ALERT),
    "no header": ipv4(b"", 6),
    "data offset": ipv4(ONE[20:32] + b"\x10" + ONE[33:], 6),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_tcp_keeps_its_order_round(odd: bytes) -> None:
    two, three = tcp(DATA[100:200], 1100), tcp(DATA[200:], 1200)
    written, misses = merge(ONE, two, odd, three, odd)
    assert written == [joined(tcp(DATA[:200]), 100, 2), alone(odd), alone(three), alone(odd)]
    assert set(misses.values()) == {2}, "each time the same"
    assert merge(odd, ONE, two)[0] == [alone(odd), joined(tcp(DATA[:200]), 100, 2)]


ODD_UDP = {
    "empty": udp(b""),
    "no checksum": stored(U2, 0),
    "bad checksum": stored(U2, 0x1234),
    "length": udp(DATA[100:200], length=107),
    "fragment": udp(DATA[100:200], frag=1),
    "ip options": udp(DATA[100:200], ip_options=ROUTER_ALERT),
    "no header": ipv4(U1[20:27], 17),
}


@pytest.mark.parametrize("odd", ODD_UDP.values(), ids=ODD_UDP)
def test_udp_keeps_its_order_round(odd: bytes) -> None:
    written, misses = merge(U1, U2, odd, U3, odd)
    assert written == [joined(udp(DATA[:200]), 100, 2), alone(odd), alone(U3), alone(odd)]
    assert sum(misses.values()) == 2


@pytest.mark.parametrize(
    "odd",
    [
        tcp(DATA, frag=MF, source=1),
        ipv4(b"12345678", 1, frag=1),
        udp(DATA, ip_options=ROUTER_ALERT, source=1),
        ipv4(b"", 6, source=1),
        ipv4(b"", 17, source=1),
        ipv4(ONE[20:32] + b"\x40" + ONE[33:], 6, source=1),
    ],
    ids=["fragment", "icmp fragment", "options", "no tcp", "no udp", "data offset"],
)
def test_a_packet_whose_flow_cannot_be_told_goes_behind_all(odd: bytes) -> None:
    written, misses = merge(ONE, U1, odd, TWO, U2)
    assert written == [alone(ONE), alone(U1), alone(odd), alone(TWO), alone(U2)]
    assert sum(misses.values()) == 1


@pytest.mark.parametrize(
    "odd",
    [
        ICMP,
        ipv4(DATA, 50, ip_options=ROUTER_ALERT),
        tcp(b"", sport=9),
        tcp(b"", flags=SYN, sport=9),
        stored(tcp(DATA, sport=9), 7),
        stored(udp(DATA, sport=9), 0),
        udp(DATA, sport=9, length=8),
    ],
    ids=["icmp", "esp", "ack", "syn", "bad checksum", "no checksum", "udp length"],
)
def test_a_packet_of_another_flow_disturbs_none(odd: bytes) -> None:
    expected = [alone(odd), joined(tcp(DATA[:200]), 100, 2), joined(udp(DATA[:200]), 100, 2)]
    assert merge(ONE, U1, odd, TWO, U2)[0] == expected


def test_coalescing_udp_switched_off_leaves_tcp_flows_whole() -> None:
    expected = [alone(U1), alone(U2), joined(tcp(DATA[:200]), 100, 2)]
    assert merge(ONE, U1, TWO, U2, is_udp_on=False) == (expected, {Miss.OFF: 2})


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (stored(tcp(DATA[100:200], 1100, ttl=3), 7), Miss.HEADER_DIFFERS),
        (stored(tcp(DATA[100:201], 1100), 7), Miss.SIZE),
        (stored(tcp(DATA[100:200], 1099), 7), Miss.SEQUENCE),
    ],
)
def test_a_wrong_checksum_that_would_not_have_joined_either(second: bytes, why: Miss) -> None:
    # Two things are wrong with it, both are said; the item before it is closed once.
    expected = [joined(tcp(DATA[:200]), 100, 2), alone(second)]
    assert merge(ONE, TWO, second) == (expected, {why: 1, Miss.BAD_CHECKSUM: 1})


def test_retransmission_between_segments() -> None:
    four = tcp(counted(400)[300:], 1300)
    written, misses = merge(ONE, TWO, ONE, THREE, four)
    assert written == [
        joined(tcp(DATA[:200]), 100, 2),
        alone(ONE),
        joined(tcp(counted(400)[200:], 1200), 100, 2),
    ]
    assert misses == {Miss.SEQUENCE: 2}


def test_udp_checksum_of_all_ones_stands_for_zero() -> None:
    # A datagram whose sum comes out as zero carries ffff, and joins like any other.
    for word in range(1 << 16):
        first = udp(word.to_bytes(2, "big")) if word else U1
        if first[26:28] == b"\xff\xff":
            break
    else:
        raise AssertionError("no such datagram")
    second = udp(b"ab")
    whole = udp(word.to_bytes(2, "big") + b"ab")
    assert merge(first, second) == ([joined(whole, 2, 2)], {})
