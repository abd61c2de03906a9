"""The tests' own packet builder against scapy: two authors, the same bytes."""

from __future__ import annotations

import random
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption
from scapy.packet import Packet, Raw
from scapy.utils import checksum as scapys_checksum

from tests import packets

IP_FIELDS = [
    {},
    {"tos": 0xB8, "ident": 0xFFFE, "ttl": 1},
    {"frag": packets.MF | 185, "source": "10.5.1.2", "destination": "10.5.2.3"},
    {"frag": 0, "ip_options": packets.ROUTER_ALERT},
]


def by_scapy(layer: Packet, payload: bytes, fields: dict[str, Any]) -> bytes:
    given: dict[str, Any] = {
        "tos": 0,
        "ident": 0x1234,
        "frag": packets.DF,
        "ttl": 64,
        "ip_options": b"",
    }
    given |= {"source": "192.0.2.1", "destination": "198.51.100.2"} | fields
    options = [IPOption(given["ip_options"])] if given["ip_options"] else []
    head = IP(
        src=given["source"],
        dst=given["destination"],
        tos=given["tos"],
        id=given["ident"],
        flags=given["frag"] >> 13,
        frag=given["frag"] & 0x1FFF,
        ttl=given["ttl"],
        options=options,
    )
    return bytes(head / layer / Raw(payload))


@pytest.mark.parametrize("payload", [b"", b"x", bytes(range(200))], ids=len)
@pytest.mark.parametrize("fields", IP_FIELDS, ids=lambda fields: ",".join(fields) or "plain")
class TestAgainstScapy:
    def test_tcp(self, payload: bytes, fields: dict[str, Any]) -> None:
        mine = packets.tcp(
            payload,
            7,
            packets.SYN | packets.ECE,
            packets.TIMESTAMPS,
            ack=9,
            window=77,
            urgent=3,
            **fields,
        )
        layer = TCP(sport=5201, dport=443, seq=7, flags="SE", ack=9, window=77, urgptr=3)
        layer.options = [("NOP", None), ("NOP", None), ("Timestamp", (7, 8))]
        assert mine == by_scapy(layer, payload, fields)
        assert packets.headers_len(mine) == len(mine) - len(payload)

    def test_udp(self, payload: bytes, fields: dict[str, Any]) -> None:
        mine = packets.udp(payload, sport=1, dport=0xFFFF, **fields)
        assert mine == by_scapy(UDP(sport=1, dport=0xFFFF), payload, fields)
        assert packets.headers_len(mine) == len(mine) - len(payload)

    def test_icmp_echo(self, payload: bytes, fields: dict[str, Any]) -> None:
        mine = packets.icmp_echo(payload, kind=0, seq=3, **fields)
        assert mine == by_scapy(ICMP(type=0, id=1, seq=3), payload, fields)


@pytest.mark.parametrize("length", [*range(70), 1447, 1448, 65535])
def test_checksum_is_scapys(length: int) -> None:
    data = random.Random(length).randbytes(length)
    assert packets.internet_checksum(data) == scapys_checksum(data)
    if length < 2000:
        assert packets.prefix_sums(data) == [packets.slow_sum(data[:n]) for n in range(length + 1)]


def test_a_udp_checksum_of_zero_is_sent_as_ones() -> None:
    # The word that brings the sum to all ones, found by its own complement (RFC 768).
    word = packets.udp(b"\x00\x00")[26:28]
    assert packets.udp(word)[26:28] == b"\xff\xff"
    assert packets.is_sound(packets.udp(word))


def test_what_a_tun_hands_over_needs_only_the_rest_added() -> None:
    whole = packets.tcp(b"payload")
    partial = packets.super_packet(whole)
    assert packets.stored(partial, packets.internet_checksum(partial[20:])) == whole


@pytest.mark.parametrize("at", [2, 3, 8, 10, 16, 24, 26, 30])
def test_damage_is_not_sound(at: int) -> None:
    packet = bytearray(packets.udp(b"four"))
    assert packets.is_sound(bytes(packet))
    packet[at] ^= 1
    assert not packets.is_sound(bytes(packet))


def test_another_ttl_needs_another_header_checksum() -> None:
    assert packets.with_ttl(packets.tcp(b"", ttl=64), 9) == packets.tcp(b"", ttl=9)
