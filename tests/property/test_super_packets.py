"""Split and merged, merged and split: the same packets again; any bytes: no exception."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.packets import (
    ACK,
    CWR,
    DF,
    ECE,
    FIN,
    MF,
    PSH,
    ROUTER_ALERT,
    TIMESTAMPS,
    finished,
    header_len,
    headers_len,
    ipv4,
    is_sound,
    pseudo,
    slow_sum,
    stored,
    tcp,
    udp,
)
from tundp.wire import ip, segment
from tundp.wire.coalesce import Coalescer, Written
from tundp.wire.drop import DropReason
from tundp.wire.vnet import VnetHeader

SETTINGS = settings(max_examples=120, deadline=None)


def merge(packets: list[bytes], **how: Any) -> Coalescer:
    merger = Coalescer(**how)
    for packet in packets:
        merger.add(packet)
    merger.flush()
    return merger


def cut(one: Written) -> list[bytes]:
    made = segment.segment(one.header, memoryview(one.packet))
    assert not isinstance(made, DropReason)
    return [bytes(packet) for packet in made]


OPTIONS = st.sampled_from([b"", TIMESTAMPS, b"\x01" * 40])
FIELDS = st.fixed_dictionaries(
    {
        "tos": st.integers(0, 255),
        "ident": st.integers(0, 0xFFFF) | st.just(0xFFFF),
        "frag": st.sampled_from([DF, 0, 0x8000, 0x8000 | DF]),
        "ttl": st.integers(0, 255),
    }
)


@st.composite
def super_packets(
    draw: st.DrawFn, *, flags: int = 0xFF, ip_options: bool = True, segments: int = 200
) -> tuple[VnetHeader, bytes]:
    """A vnet header and the super-packet behind it, as a TUN hands them over."""
    gso_size = draw(st.integers(1, 40) | st.integers(1, 1500))
    length = draw(st.integers(0, min(65_000, gso_size * segments)))
    payload = draw(st.binary(min_size=7, max_size=7)) * (length // 7 + 1)
    fields: dict[str, Any] = dict(draw(FIELDS))
    if ip_options:
        fields["ip_options"] = draw(st.sampled_from([b"", b"", ROUTER_ALERT, b"\x01" * 40]))
    if draw(st.booleans()):
        seq = draw(st.integers(0, 0xFFFFFFFF) | st.integers(0xFFFF0000, 0xFFFFFFFF))
        bits = draw(st.integers(0, 255)) & flags | (0 if flags == 0xFF else ACK)
        whole = tcp(payload[:length], seq, bits, draw(OPTIONS), **fields)
        kind, offset = draw(st.sampled_from([1, 0x81])), 16
    else:
        whole, kind, offset = udp(payload[:length], **fields), 5, 6
    header = VnetHeader(1, kind, draw(st.integers(0, 0xFFFF)), gso_size, header_len(whole), offset)
    return header, stored(whole, pseudo(whole))


@SETTINGS
@given(super_packets())
def test_each_packet_is_sound_and_the_payload_is_whole(pair: tuple[VnetHeader, bytes]) -> None:
    header, packet = pair
    made = cut(Written(header, packet, 1))
    length = headers_len(packet)
    assert all(is_sound(one) for one in made)
    assert all(headers_len(one) == length for one in made)
    assert b"".join(one[length:] for one in made) == packet[length:]
    assert {len(one) - length for one in made[:-1]} <= {header.gso_size}
    assert len(made[-1]) - length <= header.gso_size
    start = header_len(packet)
    for number, one in enumerate(made):
        ident = int.from_bytes(packet[4:6], "big") + number
        assert int.from_bytes(one[4:6], "big") == ident & 0xFFFF
        same = [0, 1, *range(6, 10), *range(12, start + 4)]
        if packet[9] == 6:
            seq = int.from_bytes(packet[start + 4 : start + 8], "big") + number * header.gso_size
            assert int.from_bytes(one[start + 4 : start + 8], "big") == seq & 0xFFFFFFFF
            gone = (0 if one is made[-1] else FIN | PSH) | (CWR if number else 0)
            assert one[start + 13] == packet[start + 13] & ~gone
            same += [*range(start + 8, start + 13), start + 14, start + 15]
            same += range(start + 18, length)
        assert all(one[at] == packet[at] for at in same)


@SETTINGS
@given(super_packets(flags=ACK | PSH | ECE, ip_options=False, segments=64))
def test_split_then_merged_is_the_super_packet_again(pair: tuple[VnetHeader, bytes]) -> None:
    header, packet = pair
    made = cut(Written(header, packet, 1))
    merger = merge(made)
    if len(made) == 1:
        assert merger.written == [Written(VnetHeader(), finished(packet), 1)]
        return
    said = header._replace(gso_type=header.kind, hdr_len=headers_len(packet))
    assert merger.written == [Written(said, packet, len(made))]
    assert sum(merger.misses) == 0


@st.composite
def streams(draw: st.DrawFn) -> list[bytes]:
    """Packets of a few flows, most of them the next of theirs, some of them anything."""
    made: list[bytes] = []
    state: dict[tuple[int, int], list[int]] = {}
    frag = draw(st.sampled_from([DF, DF, 0]))
    usual = draw(st.integers(1, 9))
    for _ in range(draw(st.integers(0, 40))):
        ip_proto = draw(st.sampled_from([6, 6, 17]))
        sport = draw(st.integers(1, 2) | st.integers(1, 12))
        seq, ident = state.setdefault((ip_proto, sport), [0xFFFFFFE0, 0xFFF0])
        odd = draw(st.sampled_from(["no"] * 20 + ODDITIES))
        size = draw(st.integers(0, 10)) if odd == "size" else usual
        payload = (len(made) % 251 + 1).to_bytes(1, "big") * size
        fields: dict[str, Any] = {"frag": frag, "ident": ident & 0xFFFF, "sport": sport}
        if odd == "ident":
            fields["ident"] = draw(st.integers(0, 0xFFFF))
        if odd == "field":
            fields |= draw(
                st.sampled_from([{"tos": 3}, {"ttl": 9}, {"frag": 0}, {"frag": MF}, {"frag": 9}])
            )
        if odd == "ip options":
            fields["ip_options"] = ROUTER_ALERT
        if odd == "seq":
            seq += draw(st.integers(-20, 20))
        flags = ACK | (draw(st.integers(0, 255)) if odd == "flags" else 0)
        if ip_proto == 6:
            packet = tcp(
                payload,
                seq & 0xFFFFFFFF,
                flags,
                draw(OPTIONS) if odd == "options" else b"",
                **fields,
            )
        else:
            packet = udp(payload, **fields)
        if odd == "checksum" and len(packet) >= 40:
            packet = stored(packet, draw(st.sampled_from([0, 1, 0xFFFF])))
        if odd == "icmp":
            packet = ipv4(payload, 1, source=sport)
        if odd == "short":
            packet = ipv4(packet[20 : draw(st.integers(20, len(packet)))], ip_proto)
        made.append(packet)
        state[ip_proto, sport] = [seq + size, ident + 1]
    return made


ODDITIES = [
    "size",
    "ident",
    "field",
    "ip options",
    "seq",
    "flags",
    "options",
    "checksum",
    "icmp",
    "short",
]


def flow(packet: bytes) -> bytes:
    """What order is kept within: the ports, too, if they can be told."""
    frag = int.from_bytes(packet[6:8], "big")
    if frag & 0x3FFF or packet[0] != 0x45 or packet[9] not in (6, 17) or len(packet) < 24:
        return b"none"
    return packet[9:10] + packet[12:24]


def without_atomic_ident(packet: bytes) -> bytes:
    """With DF the identification means nothing (RFC 6864), nor does the sum over it."""
    if packet[6] & 0x40:
        return packet[:4] + b"\x00\x00" + packet[6:10] + b"\x00\x00" + packet[12:]
    return packet


@SETTINGS
@given(
    packets=streams(),
    is_tcp_on=st.sampled_from([True, True, True, False]),
    is_udp_on=st.sampled_from([True, True, True, False]),
    most=st.sampled_from([64, 2, 3, 128]),
)
def test_merged_then_split_is_every_flow_as_it_was(
    packets: list[bytes], is_tcp_on: bool, is_udp_on: bool, most: int
) -> None:
    merger = merge(packets, is_tcp_on=is_tcp_on, is_udp_on=is_udp_on, max_udp_segments=most)
    assert sum(one.count for one in merger.written) == len(packets), "nothing lost"
    back = []
    for one in merger.written:
        made = cut(one)
        assert len(made) == one.count
        assert (one.header == VnetHeader()) is (one.count == 1)
        assert one.count <= (64 if one.packet[9] == 6 else most)
        if one.count == 1:
            assert made[0] in packets, "written alone is written as it came"
        back += made
    sent: dict[bytes, list[bytes]] = {}
    got: dict[bytes, list[bytes]] = {}
    for packet in packets:
        sent.setdefault(flow(packet), []).append(without_atomic_ident(packet))
    for packet in back:
        got.setdefault(flow(packet), []).append(without_atomic_ident(packet))
    if b"none" in sent:
        # ICMP passes by, it is not in order with the rest of those without a flow.
        assert sorted(got.pop(b"none")) == sorted(sent.pop(b"none"))
    assert got == sent


@SETTINGS
@given(streams())
def test_a_packet_whose_flow_cannot_be_told_overtakes_none(packets: list[bytes]) -> None:
    written = merge(packets).written
    for number, packet in enumerate(packets):
        frag = int.from_bytes(packet[6:8], "big")
        if frag & 0x3FFF == 0 and (packet[0] == 0x45 or packet[9] == 1):
            continue
        before = packets[:number].count(packet)
        seen = 0
        for one in written:
            if one.packet == packet:
                before -= 1
            if before < 0:
                break
            seen += one.count
        assert seen == number, "what came before it is written before it, and no more"


@SETTINGS
@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.booleans(), st.randoms())
def test_up_to_eight_undisturbed_flows_are_one_write_each(
    lengths: list[int], is_tcp: bool, rng: random.Random
) -> None:
    queues = {
        sport: [
            tcp(b"seven..", 7 * n, ACK, sport=sport)
            if is_tcp
            else udp(b"seven..", sport=sport, frag=0, ident=n)
            for n in range(length)
        ]
        for sport, length in enumerate(lengths)
    }
    order = [sport for sport, length in enumerate(lengths) for _ in range(length)]
    rng.shuffle(order)
    merger = merge([queues[sport].pop(0) for sport in order])
    sports = [int.from_bytes(one.packet[20:22], "big") for one in merger.written]
    assert sports == list(dict.fromkeys(order)), "the oldest first"
    assert [one.count for one in merger.written] == [lengths[sport] for sport in sports]
    assert sum(merger.misses) == 0


@SETTINGS
@given(streams(), st.integers(0, 40))
def test_batches_are_independent(packets: list[bytes], at: int) -> None:
    merger = Coalescer()
    for batch in (packets[:at], packets[at:]):
        for packet in batch:
            merger.add(packet)
        merger.flush()
    first, second = merge(packets[:at]), merge(packets[at:])
    assert merger.written == first.written + second.written
    assert merger.misses == [a + b for a, b in zip(first.misses, second.misses, strict=True)]


VNET_HEADERS = st.builds(
    VnetHeader,
    st.sampled_from([0, 1, 1, 1]) | st.integers(0, 255),
    st.sampled_from([0, 1, 4, 5, 0x80, 0x81, 0x85]) | st.integers(0, 255),
    st.integers(0, 0xFFFF),
    st.integers(0, 64) | st.integers(0, 0xFFFF),
    st.sampled_from([0, 20, 20, 24, 60]) | st.integers(0, 0xFFFF),
    st.sampled_from([0, 6, 6, 16, 16]) | st.integers(0, 0xFFFF),
)
SUPER_BYTES = super_packets(segments=20).map(lambda pair: pair[1])


@st.composite
def damaged(draw: st.DrawFn, packets: st.SearchStrategy[bytes] = SUPER_BYTES) -> bytes:
    """A good packet with a few bytes changed, its IPv4 checksum mostly right again."""
    data = bytearray(draw(packets))
    for _ in range(draw(st.integers(0, 3))):
        data[draw(st.integers(0, min(len(data), 60) - 1))] = draw(st.integers(0, 255))
    if draw(st.integers(0, 4)):
        length = min(header_len(data), len(data))
        data[10:12] = b"\x00\x00"
        data[10:12] = (~slow_sum(bytes(data[:length])) & 0xFFFF).to_bytes(2, "big")
    return bytes(data[: draw(st.just(len(data)) | st.integers(0, len(data)))])


@SETTINGS
@given(VNET_HEADERS, st.binary(max_size=120) | damaged() | SUPER_BYTES)
def test_no_vnet_header_on_no_bytes_raises(header: VnetHeader, data: bytes) -> None:
    made = segment.segment(header, memoryview(data))
    if isinstance(made, DropReason):
        assert made is DropReason.BAD_VNET_HEADER or made <= DropReason.BAD_HEADER_CHECKSUM
        assert header.kind != 0 or made is DropReason.BAD_VNET_HEADER
        return
    assert made
    if header.kind == 0:
        assert [len(one) for one in made] == [len(data)]
        return
    parsed = ip.parse(memoryview(data))
    assert not isinstance(parsed, DropReason)
    assert all(is_sound(bytes(one)) for one in made)
    length = headers_len(data)
    assert b"".join(one[length:] for one in made) == data[length : parsed.total_len]


@st.composite
def carried(draw: st.DrawFn) -> bytes:
    """Any packet ip.parse accepts, exactly total length bytes."""
    base = draw(damaged(streams().filter(bool).map(lambda made: made[-1])) | damaged())
    length = draw(st.sampled_from([20, 20, 20, 24, 60]))
    data = bytearray(base.ljust(length, b"\x00"))
    data[0] = 0x40 + length // 4
    data[2:4] = len(data).to_bytes(2, "big")
    if (int.from_bytes(data[6:8], "big") & 0x1FFF) * 8 + len(data) > 0xFFFF:
        data[6:8] = b"\x00\x00"
    data[10:12] = b"\x00\x00"
    data[10:12] = (~slow_sum(bytes(data[:length])) & 0xFFFF).to_bytes(2, "big")
    return bytes(data)


@settings(SETTINGS, max_examples=60)
@given(st.lists(carried(), max_size=6))
def test_no_packet_that_parses_raises_or_is_lost(packets: list[bytes]) -> None:
    for packet in packets:
        assert not isinstance(ip.parse(memoryview(packet)), DropReason)
    merger = merge(packets)
    assert sum(one.count for one in merger.written) == len(packets)
    for one in merger.written:
        assert len(cut(one)) == one.count
        assert one.count > 1 or one.packet in packets
