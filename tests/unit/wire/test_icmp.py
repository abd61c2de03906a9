"""ICMP errors: flannel's byte for byte, ours by the RFCs; scapy checks sums and fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, UDP, IPOption
from scapy.packet import Raw

from tundp.wire import icmp, ip
from tundp.wire.drop import DropReason

TUNNEL = 0x0A050100  # 10.5.1.0


def offender(payload: bytes = b"x" * 64, **fields: Any) -> bytes:
    given: dict[str, Any] = {"src": "10.5.1.2", "dst": "10.5.9.9", "proto": 17} | fields
    return bytes(IP(**given) / Raw(payload))


def header_of(packet: bytes) -> ip.Ipv4Header:
    header = ip.parse(memoryview(packet))
    assert not isinstance(header, DropReason)
    return header


def unreachable(packet: bytes) -> bytes | None:
    return icmp.net_unreachable(memoryview(packet), header_of(packet), TUNNEL)


def exceeded(packet: bytes) -> bytes | None:
    return icmp.time_exceeded(memoryview(packet), header_of(packet), TUNNEL)


def too_big(packet: bytes, mtu: int = 1400) -> bytes | None:
    return icmp.fragmentation_needed(memoryview(packet), header_of(packet), TUNNEL, mtu=mtu)


def dissect(reply: bytes | None) -> IP:
    """The reply through scapy, both checksums made anew and compared."""
    assert reply is not None
    seen = IP(reply)
    assert seen.len == len(reply)
    again = IP(reply)
    del again.chksum
    del again[ICMP].chksum
    again[ICMP].payload = Raw(bytes(seen[ICMP].payload))
    assert bytes(again) == reply, "a checksum is wrong"
    return seen


def quote_of(seen: IP) -> bytes:
    return bytes(seen[ICMP])[8:]


# Flannel's net unreachable


# 10.5.1.2 -> 10.5.9.9, UDP 1000 -> 53, TTL 64, ID 1, 4 bytes of data.
OFFENDER = bytes.fromhex(
    "45000020 00010000 40115cb8 0a050102 0a050909"  # 20 bytes of IPv4
    "03e80035 000cffff 74657374"  # 8 bytes of UDP, 4 of data
)
NET_UNREACHABLE = bytes.fromhex(
    "4500"  # version 4, IHL 5, TOS 0
    "0038"  # total length 56 = 28 + 20 + 8
    "00000000"  # ID 0, no flags, offset 0
    "0801"  # TTL 8, protocol ICMP
    "9cba"  # header checksum
    "0a050100"  # from the tunnel address
    "0a050102"  # to the inner source
    "0300"  # type 3, code 0
    "f8d6"  # ICMP checksum
    "00000000"  # rest of header 0
    "450000200001000040115cb80a0501020a050909"  # the inner header, its TTL still 64
    "03e80035000cffff"  # and 8 bytes behind it
)


def slow_checksum(data: bytes) -> int:
    total = sum(
        int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big") for at in range(0, len(data), 2)
    )
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def test_the_vector_is_sound() -> None:
    assert slow_checksum(OFFENDER[:20]) == 0
    assert slow_checksum(NET_UNREACHABLE[:20]) == 0
    assert slow_checksum(NET_UNREACHABLE[20:]) == 0


def test_net_unreachable_byte_for_byte() -> None:
    assert unreachable(OFFENDER) == NET_UNREACHABLE


def test_net_unreachable_field_by_field() -> None:
    seen = dissect(unreachable(OFFENDER))
    assert (seen.version, seen.ihl, seen.tos, seen.len) == (4, 5, 0, 56)
    assert (seen.id, int(seen.flags), seen.frag) == (0, 0, 0)
    assert (seen.ttl, seen.proto) == (8, 1)
    assert (seen.src, seen.dst) == ("10.5.1.0", "10.5.1.2")
    assert (seen[ICMP].type, seen[ICMP].code) == (3, 0)
    assert bytes(seen[ICMP])[4:8] == bytes(4)
    assert quote_of(seen) == OFFENDER[:28]


@pytest.mark.parametrize(
    ("options", "payload", "quoted"),
    [
        (0, 64, 28),
        (0, 8, 28),
        (0, 7, 27),
        (0, 1, 21),
        (0, 0, 20),
        (4, 64, 32),
        (36, 64, 64),
        (40, 64, 68),  # IHL 15, which flannel leaves without an answer
        (40, 0, 60),
    ],
)
def test_quote_is_header_and_eight_bytes_but_never_beyond_the_packet(
    options: int, payload: int, quoted: int
) -> None:
    packet = offender(b"p" * payload, options=[IPOption(b"\x01")] * options)
    # The buffer behind the packet holds somebody else's bytes; the caller cuts them off.
    buffer = memoryview(packet + b"SECRET" * 20)
    reply = icmp.net_unreachable(buffer[: len(packet)], header_of(packet), TUNNEL)
    seen = dissect(reply)
    assert quote_of(seen) == packet[:quoted]
    assert seen.len == 28 + quoted


# Ours


def test_time_exceeded() -> None:
    packet = offender(ttl=1)
    seen = dissect(exceeded(packet))
    assert (seen[ICMP].type, seen[ICMP].code) == (11, 0)
    assert bytes(seen[ICMP])[4:8] == bytes(4)
    assert (seen.ttl, seen.tos, seen.proto) == (64, 0xC0, 1)
    assert (seen.src, seen.dst) == ("10.5.1.0", "10.5.1.2")
    assert quote_of(seen) == packet, "the TTL quoted is the one that arrived"


@pytest.mark.parametrize("mtu", [68, 1472, 9000, 65507])
def test_fragmentation_needed_names_the_mtu(mtu: int) -> None:
    packet = offender(flags="DF")
    seen = dissect(too_big(packet, mtu))
    assert (seen[ICMP].type, seen[ICMP].code) == (3, 4)
    # RFC 1191 section 4: 16 bits unused and zero, then the next-hop MTU.
    assert bytes(seen[ICMP])[4:8] == b"\x00\x00" + mtu.to_bytes(2, "big")
    assert (seen.ttl, seen.tos) == (64, 0xC0)
    assert quote_of(seen) == packet


@pytest.mark.parametrize("build", [exceeded, too_big])
@pytest.mark.parametrize(
    ("payload", "total"), [(0, 48), (64, 112), (528, 576), (529, 576), (9000, 576)]
)
def test_ours_quote_as_much_as_fits_576_bytes(
    build: Callable[..., Any], payload: int, total: int
) -> None:
    packet = offender(b"q" * payload)
    seen = dissect(build(packet))
    assert seen.len == total
    assert quote_of(seen) == packet[: total - 28]


# When no answer is allowed


def icmp_offender(icmp_type: int, **fields: Any) -> bytes:
    return bytes(IP(src="10.5.1.2", dst="10.5.9.9", **fields) / ICMP(type=icmp_type) / Raw(b"abcd"))


ANSWERED = [
    (offender(), "plain UDP"),
    (offender(proto=6), "TCP"),
    (offender(proto=132), "a protocol without ports"),
    (offender(flags="MF"), "a first fragment speaks for all"),
    (offender(dst="127.0.0.1"), "a loopback destination is the sender's mistake to hear of"),
    (offender(src="223.255.255.254"), "the last class C"),
    (offender(src="1.0.0.1"), "next to 0/8"),
    (offender(src="126.255.255.255"), "next to 127/8"),
    (offender(src="128.0.0.1"), "next to 127/8"),
    (offender(dst="223.255.255.255"), "the last before multicast"),
    (offender(dst="240.0.0.1"), "class E is unicast"),
    (offender(src="255.255.255.254"), "the last of class E"),
    *((icmp_offender(t), f"ICMP query type {t}") for t in (0, 8, 9, 10, 13, 14, 15, 16, 17, 18)),
    (icmp_offender(8, flags="MF"), "the first fragment of a long ping"),
]
NOT_ANSWERED = [
    *((icmp_offender(t), f"ICMP error type {t}") for t in (3, 4, 5, 11, 12, 1, 40, 42, 255)),
    (offender(b"", proto=1), "ICMP too short to tell"),
    (offender(frag=1), "a later fragment"),
    (offender(frag=0x1FF0), "nearly the last fragment there can be"),
    (offender(frag=185, flags="MF"), "a middle fragment"),
    (icmp_offender(8, frag=5), "a later fragment whose payload only looks like ICMP"),
    (offender(dst="224.0.0.1"), "multicast"),
    (offender(dst="239.255.255.255"), "multicast"),
    (offender(dst="255.255.255.255"), "limited broadcast"),
    (offender(src="0.0.0.0"), "no source at all"),
    (offender(src="0.1.2.3"), "this network"),
    (offender(src="127.0.0.1"), "a loopback source: the answer would go to ourselves"),
    (offender(src="127.255.255.254"), "all of 127/8"),
    (offender(src="224.0.0.1"), "a multicast source multiplies the answer"),
    (offender(src="255.255.255.255"), "a broadcast source does so too"),
]


@pytest.mark.parametrize("build", [unreachable, exceeded, too_big])
@pytest.mark.parametrize(("packet", "breaks"), ANSWERED, ids=[breaks for _, breaks in ANSWERED])
def test_answered(build: Callable[..., Any], packet: bytes, breaks: str) -> None:
    seen = dissect(build(packet))
    assert seen.dst == IP(packet).src, breaks
    assert quote_of(seen).startswith(packet[:20])


@pytest.mark.parametrize("build", [unreachable, exceeded, too_big])
@pytest.mark.parametrize(
    ("packet", "breaks"), NOT_ANSWERED, ids=[breaks for _, breaks in NOT_ANSWERED]
)
def test_not_answered(build: Callable[..., Any], packet: bytes, breaks: str) -> None:
    assert build(packet) is None, breaks


def test_echo_request_into_nowhere_is_answered_unlike_flannel() -> None:
    packet = bytes(IP(src="10.5.1.2", dst="10.5.9.9") / ICMP(type=8, id=7, seq=1))
    seen = dissect(unreachable(packet))
    assert (seen[ICMP].type, seen[ICMP].code) == (3, 0)
    assert quote_of(seen) == packet


def test_an_icmp_error_about_udp_is_never_answered_even_with_options() -> None:
    inner = bytes(IP(src="10.5.9.9", dst="10.5.1.2") / UDP())
    packet = bytes(
        IP(src="10.5.1.2", dst="10.5.9.9", proto=1, options=[IPOption(b"\x01")] * 8)
        / Raw(b"\x03\x01" + bytes(6) + inner)
    )
    assert IP(packet).ihl == 7
    assert unreachable(packet) is None


def test_the_offender_is_untouched() -> None:
    packet = bytearray(offender())
    before = bytes(packet)
    header = ip.parse(memoryview(packet))
    assert not isinstance(header, DropReason)
    for reply in (
        icmp.net_unreachable(memoryview(packet), header, TUNNEL),
        icmp.time_exceeded(memoryview(packet), header, TUNNEL),
        icmp.fragmentation_needed(memoryview(packet), header, TUNNEL, mtu=68),
    ):
        assert reply is not None
    assert bytes(packet) == before
