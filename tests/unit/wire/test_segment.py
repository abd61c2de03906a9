"""What one read of the TUN stands for. The packets expected are built here, field by field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.packet import Raw

from tests.packets import (
    ACK,
    CWR,
    DF,
    ECE,
    FIN,
    MF,
    PSH,
    ROUTER_ALERT,
    RST,
    SYN,
    TIMESTAMPS,
    URG,
    checksum_at,
    counted,
    finished,
    ipv4,
    pseudo,
    slow_sum,
    stored,
    super_packet,
    tcp,
    udp,
)
from tundp.wire import segment as wire_segment
from tundp.wire import vnet
from tundp.wire.drop import DropReason
from tundp.wire.vnet import VnetHeader


def vnet_for(packet: bytes, gso_size: int, /, **fields: Any) -> VnetHeader:
    start = (packet[0] & 15) * 4
    gso_type, offset = (1, 16) if packet[9] == 6 else (5, 6)
    return VnetHeader(1, gso_type, 0, gso_size, start, offset)._replace(**fields)


def cut(packet: bytes, gso_size: int, **fields: Any) -> list[bytes]:
    """A finished packet, cut as if it had come from a TUN as a super-packet."""
    made = cut_raw(super_packet(packet), vnet_for(packet, gso_size, **fields))
    assert not isinstance(made, DropReason), made
    return made


def cut_raw(packet: bytes, header: VnetHeader) -> list[bytes] | DropReason:
    made = wire_segment.segment(header, memoryview(packet))
    return made if isinstance(made, DropReason) else [bytes(one) for one in made]


def test_a_tcp_super_packet_field_by_field() -> None:
    data = counted(2500)
    same: dict[str, Any] = {
        "tos": 0x2E,
        "ttl": 7,
        "ack": 0x01020304,
        "window": 0xABCD,
        "urgent": 0x0102,
        "options": TIMESTAMPS,
    }
    flags = FIN | PSH | ACK | ECE | CWR
    whole = tcp(data, seq=0xFFFFFC00, ident=0xFFFF, flags=flags, **same)
    assert cut(whole, 1000, gso_type=0x81) == [
        tcp(data[:1000], seq=0xFFFFFC00, ident=0xFFFF, flags=ACK | ECE | CWR, **same),
        tcp(data[1000:2000], seq=0xFFFFFFE8, ident=0, flags=ACK | ECE, **same),
        tcp(data[2000:], seq=0x000003D0, ident=1, flags=FIN | PSH | ACK | ECE, **same),
    ]


def test_a_udp_super_packet_field_by_field() -> None:
    data = counted(2500)
    same: dict[str, Any] = {"tos": 0xB8, "ttl": 255, "frag": 0}
    assert cut(udp(data, ident=0xFFFE, **same), 1000) == [
        udp(data[:1000], ident=0xFFFE, **same),
        udp(data[1000:2000], ident=0xFFFF, **same),
        udp(data[2000:], ident=0, **same),
    ]


def test_scapy_makes_the_same_packets() -> None:
    data = counted(3000)
    network: dict[str, Any] = {
        "src": "192.0.2.1",
        "dst": "198.51.100.2",
        "tos": 3,
        "ttl": 9,
        "flags": "DF",
    }
    for whole, made in (
        (
            IP(id=7, **network) / TCP(seq=5, ack=9, flags="PA", window=77) / Raw(data),
            [
                IP(id=7, **network) / TCP(seq=5, ack=9, flags="A", window=77) / data[:1448],
                IP(id=8, **network) / TCP(seq=1453, ack=9, flags="A", window=77) / data[1448:2896],
                IP(id=9, **network) / TCP(seq=2901, ack=9, flags="PA", window=77) / data[2896:],
            ],
        ),
        (
            IP(id=7, **network) / UDP(sport=4, dport=5) / Raw(data),
            [
                IP(id=7, **network) / UDP(sport=4, dport=5) / data[:1448],
                IP(id=8, **network) / UDP(sport=4, dport=5) / data[1448:2896],
                IP(id=9, **network) / UDP(sport=4, dport=5) / data[2896:],
            ],
        ),
    ):
        assert cut(bytes(whole), 1448) == [bytes(one) for one in made]


@pytest.mark.parametrize(
    ("flag", "kept"),
    [
        (FIN, "001"),
        (PSH, "001"),
        (CWR, "100"),
        (ECE, "111"),
        (ACK, "111"),
        (URG, "111"),
        (SYN, "111"),
        (RST, "111"),
    ],
)
def test_which_packets_keep_a_flag(flag: int, kept: str) -> None:
    made = cut(tcp(counted(300), flags=flag), 100)
    assert [one[33] for one in made] == [flag if bit == "1" else 0 for bit in kept]
    assert [one[33] for one in cut(tcp(counted(200), flags=flag), 200)] == [flag], "one packet"
    made = cut(tcp(counted(200), flags=0xFF), 100)
    assert [one[33] for one in made] == [0xFF & ~FIN & ~PSH, 0xFF & ~CWR], "two packets"


@pytest.mark.parametrize(
    "fields",
    [
        {"tos": 0xFF},
        {"ttl": 1},
        {"ttl": 0},
        {"frag": 0},
        {"frag": DF},
        {"frag": 0x8000 | DF},
        {"ip_options": ROUTER_ALERT},
        {"ip_options": b"\x01" * 40},
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [tcp, udp])
def test_ip_fields_are_copied(make: Callable[..., Any], fields: dict[str, Any]) -> None:
    data = counted(250)
    later = [{"seq": 1100}, {"seq": 1200}] if make is tcp else [{}, {}]
    assert cut(make(data, **fields), 100) == [
        make(data[:100], ident=0x1234, **fields),
        make(data[100:200], ident=0x1235, **fields, **later[0]),
        make(data[200:], ident=0x1236, **fields, **later[1]),
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"ack": 0},
        {"ack": 0xFFFFFFFF},
        {"window": 0},
        {"window": 0xFFFF},
        {"urgent": 0xFFFF},
        {"options": TIMESTAMPS},
        {"options": b"\x01" * 40},
        {"options": b"\x01" * 40, "ip_options": b"\x01" * 40},
    ],
    ids=str,
)
def test_tcp_fields_are_copied(fields: dict[str, Any]) -> None:
    data = counted(250)
    assert cut(tcp(data, **fields), 125) == [
        tcp(data[:125], **fields),
        tcp(data[125:], ident=0x1235, seq=1125, **fields),
    ]


def test_reserved_tcp_bits_are_copied() -> None:
    def accurate_ecn(packet: bytes) -> bytes:
        return finished(packet[:32] + bytes((packet[32] | 1,)) + packet[33:])

    data = counted(20)
    assert cut(accurate_ecn(tcp(data)), 10) == [
        accurate_ecn(tcp(data[:10])),
        accurate_ecn(tcp(data[10:], ident=0x1235, seq=1010)),
    ]


@pytest.mark.parametrize("make", [tcp, udp])
@pytest.mark.parametrize("gso_size", [1, 2, 3, 7, 999, 1000, 1001, 65535])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 999, 1000, 1001, 2000])
def test_every_byte_once_and_in_order(make: Callable[..., Any], gso_size: int, length: int) -> None:
    data = counted(length)
    made = cut(make(data), gso_size)
    header_len = 40 if make is tcp else 28
    assert b"".join(one[header_len:] for one in made) == data
    sizes = [len(one) - header_len for one in made]
    assert sizes[:-1] == [gso_size] * (len(made) - 1), "only the last may be shorter"
    assert len(made) == max(1, -(-length // gso_size)), "no empty packet behind the last"
    for number, one in enumerate(made):
        seq = {"seq": 1000 + number * gso_size} if make is tcp else {}
        part = data[number * gso_size :][:gso_size]
        assert one == make(part, ident=0x1234 + number, **seq), number


@pytest.mark.parametrize("make", [tcp, udp])
def test_nothing_to_cut_is_one_finished_packet(make: Callable[..., Any]) -> None:
    for length in (0, 1, 100):
        whole = make(counted(length))
        assert cut(whole, 100) == [whole]


def test_the_largest_super_packet() -> None:
    data = counted(65495)
    made = cut(tcp(data, seq=0xFFFF8000), 1448)
    assert len(made) == 46
    for number, one in enumerate(made):
        seq = (0xFFFF8000 + number * 1448) % (1 << 32)
        part = data[number * 1448 :][:1448]
        assert one == tcp(part, seq=seq, ident=0x1234 + number)


def test_a_tiny_mss_gives_thousands() -> None:
    # wireguard-go loses the tail of these; no 64 or 128 bounds what a sender may ask for.
    data = counted(16001)
    made = cut(tcp(data, flags=PSH | ACK, ident=0xFF00), 4)
    assert len(made) == 4001
    for number in (0, 1, 255, 256, 1023, 1024, 3999):
        ident = 0xFF00 + number & 0xFFFF
        part = data[number * 4 :][:4]
        assert made[number] == tcp(part, seq=1000 + number * 4, ident=ident)
    assert made[4000] == tcp(data[-1:], seq=17000, ident=0x0EA0, flags=PSH | ACK)


def test_the_offset_of_a_late_packet_is_not_signed() -> None:
    made = cut(tcp(counted(60000), seq=0xFFFFFFFF), 40000)
    assert [one[24:28] for one in made] == [b"\xff\xff\xff\xff", (39999).to_bytes(4, "big")]


def payload_for(make: Any, wanted: int) -> bytes:
    """Two bytes that make the checksum computed come out as `wanted`."""
    base = slow_sum(stored(make(b"\x00\x00"), 0)[20:]) + pseudo(make(b"\x00\x00"))
    for word in range(1 << 16):
        total = base + word
        while total > 0xFFFF:
            total = (total & 0xFFFF) + (total >> 16)
        if ~total & 0xFFFF == wanted:
            return word.to_bytes(2, "big")
    raise AssertionError(wanted)


@pytest.mark.parametrize(("make", "value"), [(tcp, 0), (udp, 0xFFFF)])
def test_a_computed_checksum_of_zero(make: Callable[..., Any], value: int) -> None:
    first = payload_for(make, 0)
    made = cut(make(first + b"\x01\x02"), 2)
    at = checksum_at(made[0])
    assert made[0][at : at + 2] == value.to_bytes(2, "big")
    assert made[0] == make(first)


@pytest.mark.parametrize("left", [0, 0xFFFF, 0x1234])
@pytest.mark.parametrize("make", [tcp, udp])
def test_what_is_in_the_checksum_field_of_a_super_packet_does_not_count(
    make: Callable[..., Any], left: int
) -> None:
    whole = make(counted(150))
    expected = cut(whole, 100)
    assert cut_raw(stored(whole, left), vnet_for(whole, 100)) == expected


@pytest.mark.parametrize("wrong", [0, 8, 0xFFFF])
def test_a_udp_length_that_lies_is_written_afresh(wrong: int) -> None:
    whole = udp(counted(150))
    lying = whole[:24] + wrong.to_bytes(2, "big") + whole[26:]
    assert cut_raw(lying, vnet_for(whole, 100)) == cut(whole, 100)


@pytest.mark.parametrize("hdr_len", [0, 1, 20, 40, 1000, 0xFFFF])
@pytest.mark.parametrize("make", [tcp, udp])
def test_hdr_len_is_never_believed(make: Callable[..., Any], hdr_len: int) -> None:
    whole = make(counted(250))
    assert cut(whole, 100, hdr_len=hdr_len) == cut(whole, 100)
    plain = VnetHeader(hdr_len=hdr_len)
    assert cut_raw(whole, plain) == [whole]


def test_the_ecn_qualifier_changes_nothing() -> None:
    whole = tcp(counted(250), flags=ACK | CWR)
    assert len(cut(whole, 100)) == 3
    assert cut(whole, 100, gso_type=0x81) == cut(whole, 100, gso_type=0x01)


@pytest.mark.parametrize("flags", [3, 0xFF])
def test_other_vnet_flags_do_not_change_the_segments(flags: int) -> None:
    whole = tcp(counted(250))
    assert cut(whole, 100, flags=flags) == cut(whole, 100)


@pytest.mark.parametrize("make", [tcp, udp])
def test_bytes_behind_the_total_length_are_not_payload(make: Callable[..., Any]) -> None:
    whole = make(counted(250))
    expected = cut(whole, 100)
    assert cut_raw(super_packet(whole) + b"trailing" * 30, vnet_for(whole, 100)) == expected


def test_the_read_is_left_alone_and_shared_with_nobody() -> None:
    buffer = bytearray(super_packet(tcp(counted(250))))
    before = bytes(buffer)
    header = vnet_for(before, 100)
    made = wire_segment.segment(header, memoryview(buffer))
    assert not isinstance(made, DropReason)
    expected = [bytes(one) for one in made]
    for one in made:
        one[0] ^= 0xFF
        assert buffer == before
    buffer[:] = bytes(len(buffer))
    assert [one[1:] for one in made] == [one[1:] for one in expected]


TCP_WHOLE, UDP_WHOLE = tcp(counted(250)), udp(counted(250))


def with_data_offset(words: int) -> bytes:
    return TCP_WHOLE[:32] + bytes((words << 4,)) + TCP_WHOLE[33:]


LIES = [
    (TCP_WHOLE, {"gso_type": 2}, "no such type"),
    (TCP_WHOLE, {"gso_type": 0x80}, "a qualifier of nothing"),
    (UDP_WHOLE, {"gso_type": 3}, "legacy UFO"),
    (TCP_WHOLE, {"gso_type": 0x41}, "a qualifier nobody knows"),
    (TCP_WHOLE, {"gso_type": 0xFF}, "not even the ECN bit makes it one"),
    (TCP_WHOLE, {"gso_type": 4}, "an IPv6 type on an IPv4 packet"),
    (TCP_WHOLE, {"gso_type": 0x84}, "and with ECN"),
    (UDP_WHOLE, {"gso_type": 4}, "even on UDP, which is not it either"),
    (UDP_WHOLE, {"gso_type": 1}, "a TCP type on UDP"),
    (UDP_WHOLE, {"gso_type": 1, "csum_offset": 16}, "even with TCP's offset"),
    (TCP_WHOLE, {"gso_type": 5}, "a UDP type on TCP"),
    (TCP_WHOLE, {"gso_type": 5, "csum_offset": 6}, "even with UDP's offset"),
    (ipv4(TCP_WHOLE[20:], 1), {"gso_type": 1, "csum_offset": 16}, "ICMP is neither"),
    (TCP_WHOLE, {"flags": 0}, "a super-packet's checksum is never finished"),
    (TCP_WHOLE, {"flags": 2}, "DATA_VALID is not NEEDS_CSUM"),
    (TCP_WHOLE, {"gso_size": 0}, "it would never end"),
    (UDP_WHOLE, {"gso_size": 0}, "it would never end"),
    (TCP_WHOLE, {"csum_start": 0}, "not where the transport header is"),
    (TCP_WHOLE, {"csum_start": 24}, "not where the transport header is"),
    (tcp(b"12", ip_options=ROUTER_ALERT), {"csum_start": 20}, "IP options come before it"),
    (TCP_WHOLE, {"csum_start": 0xFFFF}, "outside"),
    (TCP_WHOLE, {"csum_offset": 6}, "UDP's offset on TCP"),
    (TCP_WHOLE, {"csum_offset": 0xFFFF}, "outside"),
    (UDP_WHOLE, {"csum_offset": 16}, "TCP's offset on UDP"),
    (UDP_WHOLE, {"csum_offset": 7}, "one beside it"),
    (tcp(counted(250), frag=MF), {}, "a fragment has no segments"),
    (tcp(counted(250), frag=1), {}, "nor has a later one"),
    (udp(counted(250), frag=0x1000), {}, "nor has one far behind"),
    (ipv4(TCP_WHOLE[20:39], 6), {}, "half a TCP header"),
    (ipv4(TCP_WHOLE[20:32], 6), {}, "a TCP header that ends before its data offset"),
    (ipv4(b"", 6), {}, "no TCP header"),
    (ipv4(UDP_WHOLE[20:27], 17), {}, "half a UDP header"),
    (ipv4(b"", 17), {}, "no UDP header"),
    (with_data_offset(0), {}, "a TCP header of nothing"),
    (with_data_offset(2), {}, "a TCP header as short as UDP's"),
    (with_data_offset(4), {}, "a TCP header below its minimum"),
    (ipv4(tcp(b"", options=b"\x01" * 8)[20:47], 6), {}, "options reach past the packet"),
]


@pytest.mark.parametrize(("packet", "fields", "breaks"), LIES, ids=[row[2] for row in LIES])
def test_vnet_headers_that_do_not_describe_the_packet(
    packet: bytes, fields: dict[str, Any], breaks: str
) -> None:
    header = vnet_for(packet, 100, **fields)
    assert cut_raw(packet, header) is DropReason.BAD_VNET_HEADER, breaks


def test_bytes_behind_the_packet_do_not_complete_its_headers() -> None:
    short = ipv4(TCP_WHOLE[20:39], 6)
    assert cut_raw(short + bytes(100), vnet_for(short, 100)) is DropReason.BAD_VNET_HEADER
    short = ipv4(UDP_WHOLE[20:27], 17)
    assert cut_raw(short + bytes(100), vnet_for(short, 100)) is DropReason.BAD_VNET_HEADER


def test_headers_that_just_fit() -> None:
    for whole in (tcp(b"", options=b"\x01" * 40), tcp(b""), udp(b"")):
        assert cut(whole, 1) == [whole]


def damaged(at: int, value: int) -> bytes:
    return TCP_WHOLE[:at] + bytes((value,)) + TCP_WHOLE[at + 1 :]


@pytest.mark.parametrize("gso_type", [1, 4, 5, 0x81])
@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (b"", DropReason.TOO_SHORT),
        (TCP_WHOLE[:19], DropReason.TOO_SHORT),
        (damaged(0, 0x65), DropReason.NOT_IPV4),
        (b"\x60" + bytes(79), DropReason.NOT_IPV4),
        (damaged(0, 0x44), DropReason.BAD_HEADER_LENGTH),
        (b"\x4f" + TCP_WHOLE[1:59], DropReason.BAD_HEADER_LENGTH),
        (TCP_WHOLE[:-1], DropReason.BAD_TOTAL_LENGTH),
        (TCP_WHOLE[:2] + b"\x00\x13" + TCP_WHOLE[4:], DropReason.BAD_TOTAL_LENGTH),
        (tcp(counted(250), frag=0x1FFF), DropReason.BAD_TOTAL_LENGTH),
        (damaged(8, 63), DropReason.BAD_HEADER_CHECKSUM),
        (damaged(10, TCP_WHOLE[10] ^ 1), DropReason.BAD_HEADER_CHECKSUM),
    ],
    ids=lambda value: str(len(value)) if isinstance(value, bytes) else value.name,
)
def test_super_packets_that_are_no_packets(
    packet: bytes, reason: DropReason, gso_type: int
) -> None:
    assert cut_raw(packet, vnet_for(TCP_WHOLE, 100, gso_type=gso_type)) is reason
    bad = VnetHeader(gso_type=gso_type)
    assert cut_raw(packet, bad) is reason, "what the packet is comes before what is said of it"
    assert cut_raw(packet, VnetHeader(gso_type=2)) is DropReason.BAD_VNET_HEADER


@pytest.mark.parametrize("flags", [0, 2, 0xFE])
@pytest.mark.parametrize(
    "packet",
    [b"", b"\x00", b"\x60" + bytes(50), TCP_WHOLE, stored(UDP_WHOLE, 7), TCP_WHOLE + b"behind"],
    ids=len,
)
def test_a_plain_packet_comes_back_whatever_it_is(packet: bytes, flags: int) -> None:
    header = VnetHeader(flags, vnet.GSO_NONE, 0xFFFF, 100, 0xFFFF, 0xFFFF)
    assert cut_raw(packet, header) == [packet]


@pytest.mark.parametrize("length", [0, 1, 2, 7, 100, 1401, 65485])
@pytest.mark.parametrize("fields", [{}, {"ip_options": ROUTER_ALERT}], ids=["20", "24"])
@pytest.mark.parametrize("make", [tcp, udp])
@pytest.mark.parametrize("gso_size", [0, 1, 65535])
def test_a_plain_packet_gets_its_checksum(
    make: Callable[..., Any], length: int, fields: dict[str, Any], gso_size: int
) -> None:
    whole = make(counted(length), **fields)
    header = vnet_for(whole, gso_size, gso_type=vnet.GSO_NONE)
    assert cut_raw(super_packet(whole), header) == [whole]


@pytest.mark.parametrize("make", [tcp, udp])
def test_the_checksum_of_a_plain_packet_begins_with_what_lies_in_the_field(
    make: Callable[..., Any],
) -> None:
    # The kernel's seed is the pseudo-header's sum, but it is the kernel's: a partial sum of
    # whatever else it wants counted.
    whole = make(counted(99))
    header = vnet_for(whole, 0, gso_type=0)
    for seed in (0, 1, 0xFFFF, 0xABCD):
        expected = ~slow_sum(seed.to_bytes(2, "big") + stored(whole, 0)[20:]) & 0xFFFF
        assert cut_raw(stored(whole, seed), header) == [stored(whole, expected)]


def test_a_plain_checksum_of_zero() -> None:
    for make, value in ((tcp, 0), (udp, 0xFFFF)):
        whole = make(payload_for(make, 0))
        header = vnet_for(whole, 0, gso_type=0)
        assert cut_raw(super_packet(whole), header) == [stored(whole, value)]


@pytest.mark.parametrize(
    ("length", "start", "offset", "is_inside"),
    [
        (60, 20, 38, True),
        (60, 20, 39, False),
        (60, 58, 0, True),
        (60, 59, 0, False),
        (60, 0, 58, True),
        (60, 0, 59, False),
        (60, 60, 0, False),
        (60, 61, 0xFFFF, False),
        (60, 0xFFFF, 0xFFFF, False),
        (60, 0xFFF0, 0x0020, False),  # 0x10 in 16 bits
        (2, 0, 0, True),
        (1, 0, 0, False),
        (0, 0, 0, False),
    ],
)
def test_a_plain_checksum_field_lies_inside_the_packet(
    length: int, start: int, offset: int, is_inside: bool
) -> None:
    data = counted(length)
    made = cut_raw(data, VnetHeader(1, 0, 0, 0, start, offset))
    if not is_inside:
        assert made is DropReason.BAD_VNET_HEADER
        return
    at = start + offset
    blank = data[:at] + b"\x00\x00" + data[at + 2 :]
    value = ~slow_sum(data[at : at + 2] + blank[start:]) & 0xFFFF
    assert made == [data[:at] + value.to_bytes(2, "big") + data[at + 2 :]]


@pytest.mark.parametrize("offset", [1, 5, 7, 15, 17])
@pytest.mark.parametrize("start", [0, 3, 20])
def test_a_plain_checksum_field_on_any_offset(start: int, offset: int) -> None:
    data = counted(77)
    at = start + offset
    blank = data[:at] + b"\x00\x00" + data[at + 2 :]
    value = ~slow_sum(data[at : at + 2] + blank[start:]) & 0xFFFF
    expected = data[:at] + value.to_bytes(2, "big") + data[at + 2 :]
    assert cut_raw(data, VnetHeader(1, 0, 0, 0, start, offset)) == [expected]
