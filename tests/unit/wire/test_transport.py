"""Pseudo-header, transport checksums and header lengths; sums by a slow sum and by scapy."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.packet import Raw

from tests.packets import slow_sum
from tundp.wire import transport


def by_scapy(transport_header: TCP | UDP, payload: bytes = b"", **fields: Any) -> bytes:
    return bytes(IP(src="10.5.1.2", dst="10.5.2.3", **fields) / transport_header / Raw(payload))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("transport_len", [0, 8, 20, 1001, 0x00FF, 0xFF00, 65515])
@pytest.mark.parametrize("ip_proto", [6, 17])
def test_pseudo_sum(
    kind: type[bytearray] | type[bytes] | type[memoryview], transport_len: int, ip_proto: int
) -> None:
    source, destination = 0xC0000201, 0xFFFEFDFC
    head = struct.pack("!BBHHHBBHII", 0x45, 9, 9, 9, 9, 9, ip_proto, 9, source, destination)
    expected = slow_sum(struct.pack("!IIBBH", source, destination, 0, ip_proto, transport_len))
    assert transport.pseudo_sum(kind(head + b"what follows"), transport_len) == expected


def test_pseudo_sum_added_up_by_hand() -> None:
    # c000 + 0201 + c633 + 6402 + 0011 + 0010 = 1ec57, and the carry comes back.
    head = bytes(9) + b"\x11" + bytes(2) + bytes.fromhex("c0000201 c6336402".replace(" ", ""))
    assert transport.pseudo_sum(head, 16) == 0xEC58


@pytest.mark.parametrize("words", range(16))
@pytest.mark.parametrize("reserved", [0, 1, 0xF])
def test_tcp_header_len_is_the_high_nibble(words: int, reserved: int) -> None:
    segment = bytearray(20)
    segment[12] = words << 4 | reserved
    assert transport.tcp_header_len(segment) == words * 4
    assert transport.tcp_header_len(memoryview(segment)) == words * 4


def test_numbers_are_the_rfcs() -> None:
    header = TCP(sport=1, dport=2, seq=0x01020304, ack=0x05060708, window=0x090A, urgptr=0x0B0C)
    header.chksum = 0x0D0E
    raw = bytes(header)
    assert raw[transport.TCP_SEQ_OFF :][:4] == b"\x01\x02\x03\x04"
    assert raw[transport.TCP_ACK_OFF :][:4] == b"\x05\x06\x07\x08"
    assert raw[transport.TCP_DATA_OFF] == 0x50
    assert raw[transport.TCP_WINDOW_OFF :][:2] == b"\x09\x0a"
    assert raw[transport.TCP_URGENT_OFF :][:2] == b"\x0b\x0c"
    assert raw[transport.TCP_CHECKSUM_OFF :][:2] == b"\x0d\x0e"
    assert transport.checksum_off(6) == 16
    for name, letter in (("FIN", "F"), ("PSH", "P"), ("ACK", "A"), ("ECE", "E"), ("CWR", "C")):
        flags = bytes(TCP(flags=letter))[transport.TCP_FLAGS_OFF]
        assert getattr(transport, name) == flags, name
    raw = bytes(UDP(len=0x0102, chksum=0x0304))
    assert raw[transport.UDP_LEN_OFF :][:2] == b"\x01\x02"
    assert raw[transport.UDP_CHECKSUM_OFF :][:2] == b"\x03\x04"
    assert transport.checksum_off(17) == 6
    assert (transport.PROTO_TCP, transport.PROTO_UDP) == (6, 17)
    assert len(raw) == transport.UDP_HEADER_LEN
    assert len(bytes(TCP())) == transport.TCP_MIN_HEADER_LEN


PACKETS = [
    by_scapy(TCP(sport=1, dport=2, seq=3, flags="A"), b"payload"),
    by_scapy(TCP(sport=1, dport=2, options=[("Timestamp", (7, 8))]), b"payload!"),
    by_scapy(TCP(), b""),
    by_scapy(UDP(sport=1, dport=2), b"odd"),
    by_scapy(UDP(), b""),
    by_scapy(UDP(sport=1, dport=2), b"\xff" * 1400),
]


@pytest.mark.parametrize("packet", PACKETS, ids=lambda packet: f"{packet[9]}:{len(packet)}")
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_scapys_checksums_are_valid(
    packet: bytes, kind: type[bytearray] | type[bytes] | type[memoryview]
) -> None:
    assert transport.is_valid(kind(packet), 20)


@pytest.mark.parametrize("packet", PACKETS[:4], ids=lambda packet: f"{packet[9]}:{len(packet)}")
def test_no_damage_passes(packet: bytes) -> None:
    seen = [9, *range(12, len(packet))]  # protocol, addresses, and all behind the IPv4 header
    for at in seen:
        damaged = bytearray(packet)
        damaged[at] ^= 0x10
        assert not transport.is_valid(damaged, 20), at


def test_the_length_is_part_of_the_sum() -> None:
    # Two zero bytes more change nothing but the pseudo-header's length.
    assert not transport.is_valid(PACKETS[0] + b"\x00\x00", 20)


def test_the_transport_header_begins_behind_ip_options() -> None:
    inner = bytes(UDP(sport=1, dport=2, len=12, chksum=0)) + b"data"
    packet = bytearray(by_scapy(UDP(sport=1, dport=2), b"data"))[:20] + b"\x01" * 4 + inner
    whole = struct.pack("!4s4sBBH", packet[12:16], packet[16:20], 0, 17, 12) + inner
    packet[30:32] = (~slow_sum(whole) & 0xFFFF).to_bytes(2, "big")
    assert transport.is_valid(packet, 24)
    assert not transport.is_valid(packet, 20)


@pytest.mark.parametrize("length", [8, 9, 20, 21, 1400])
@pytest.mark.parametrize("offset", [6, 16])
@pytest.mark.parametrize("before", [b"\x00\x00", b"\xff\xff", b"\x12\x34"], ids=bytes.hex)
def test_finish_makes_seed_and_data_sum_to_ones(length: int, offset: int, before: bytes) -> None:
    start, seed = 11, 0xBEEF
    packet = bytearray(n * 37 + 5 & 0xFF for n in range(start + length + offset))
    field = start + offset
    packet[field : field + 2] = before
    expected = bytearray(packet)
    expected[field : field + 2] = b"\x00\x00"
    value = ~slow_sum(seed.to_bytes(2, "big") + bytes(expected[start:])) & 0xFFFF
    expected[field : field + 2] = value.to_bytes(2, "big")
    transport.finish(packet, start, field, seed)
    assert packet == expected, "what is in the field does not count, nothing else is touched"


@pytest.mark.parametrize(
    ("offset", "stored", "breaks"),
    [
        (6, 0xFFFF, "UDP's 0 would say there is no checksum (RFC 768)"),
        (16, 0x0000, "TCP's 0 is a checksum like any other"),
        (4, 0x0000, "any other field is not UDP's"),
    ],
)
def test_a_checksum_of_zero(offset: int, stored: int, breaks: str) -> None:
    packet = bytearray(20)
    packet[2:4] = b"\x12\x34"
    transport.finish(packet, 0, offset, 0xEDCB)  # 1234 + edcb = ffff
    assert int.from_bytes(packet[offset : offset + 2], "big") == stored, breaks


def test_all_zeros_sum_to_zero_not_to_ones() -> None:
    packet = bytearray(18)
    transport.finish(packet, 0, 16, 0)
    assert packet[16:] == b"\xff\xff"
