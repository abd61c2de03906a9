"""Builds and checks IPv4 packets for the tests, independently of tundp.

Nothing here imports tundp: what the tests expect must not come from the code they judge. Sums
are added word by word as RFC 1071 section 4.1 does it, headers packed from RFC 791, 768, 792
and 9293; `tests/unit/test_packets.py` holds all of it against scapy.

Numbers are in host byte order, packets are `bytes` that begin with the IPv4 header. Addresses
are integers or dotted text.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address
from typing import TypedDict, Unpack

FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))
DF, MF = 0x4000, 0x2000
PROTO_ICMP, PROTO_TCP, PROTO_UDP = 1, 6, 17

TIMESTAMPS = bytes.fromhex("0101080a0000000700000008")
"""TCP option: two no-operations, then RFC 7323 timestamps."""
ROUTER_ALERT = b"\x94\x04\x00\x00"
"""IPv4 option 148 (RFC 2113): copied into every fragment."""

SOURCE, DESTINATION = 0xC0000201, 0xC6336402  # 192.0.2.1 and 198.51.100.2
SOURCE_PORT, DESTINATION_PORT = 5201, 443


class IpFields(TypedDict, total=False):
    """What `ipv4` and the builders above it may be told about the IPv4 header."""

    tos: int
    ident: int
    frag: int
    ttl: int
    ip_options: bytes
    source: int | str
    destination: int | str


def slow_sum(data: bytes | bytearray | memoryview) -> int:
    """The ones' complement sum of `data`, 16-bit words, the carry folded back at every step."""
    data = bytes(data) + b"\x00" * (len(data) % 2)
    total = 0
    for (word,) in struct.iter_unpack("!H", data):
        total += word
        total = (total & 0xFFFF) + (total >> 16)
    return total


def prefix_sums(data: bytes) -> list[int]:
    """`slow_sum(data[:n])` for every n from 0 to the length of `data`, in one pass."""
    sums, even, odd = [], 0, 0
    for at, byte in enumerate(data):
        if at % 2 == 0:
            sums.append(even)
            odd = even + (byte << 8)
            odd = (odd & 0xFFFF) + (odd >> 16)
        else:
            sums.append(odd)
            even = odd + byte
            even = (even & 0xFFFF) + (even >> 16)
    sums.append(odd if len(data) % 2 else even)
    return sums


def internet_checksum(data: bytes | bytearray | memoryview) -> int:
    """The Internet checksum of `data`: the complement of its sum."""
    return ~slow_sum(data) & 0xFFFF


def address(value: int | str) -> int:
    """An IPv4 address as a number."""
    return int(IPv4Address(value))


def ipv4(
    body: bytes,
    ip_proto: int,
    *,
    tos: int = 0,
    ident: int = 0x1234,
    frag: int = DF,
    ttl: int = 64,
    ip_options: bytes = b"",
    source: int | str = SOURCE,
    destination: int | str = DESTINATION,
) -> bytes:
    """An IPv4 packet (RFC 791) around `body`, with its lengths and header checksum right.

    `frag` holds the flags and the fragment offset; `ip_options` a multiple of 4 bytes.
    """
    length = 20 + len(ip_options)
    head = struct.pack(
        "!BBHHHBBHII",
        0x40 | length // 4,
        tos,
        length + len(body),
        ident,
        frag,
        ttl,
        ip_proto,
        0,
        address(source),
        address(destination),
    )
    return with_header_checksum(head + ip_options + body)


def tcp(
    payload: bytes,
    seq: int = 1000,
    flags: int = ACK,
    options: bytes = b"",
    *,
    sport: int = SOURCE_PORT,
    dport: int = DESTINATION_PORT,
    ack: int = 0x0A0B0C0D,
    reserved: int = 0,
    window: int = 512,
    urgent: int = 0,
    **fields: Unpack[IpFields],
) -> bytes:
    """An IPv4 packet with one TCP segment (RFC 9293), all checksums right."""
    words = 5 + len(options) // 4
    head = struct.pack(
        "!HHIIBBHHH", sport, dport, seq, ack, words << 4 | reserved, flags, window, 0, urgent
    )
    return finished(ipv4(head + options + payload, PROTO_TCP, **fields))


def udp(
    payload: bytes,
    *,
    sport: int = SOURCE_PORT,
    dport: int = DESTINATION_PORT,
    length: int | None = None,
    **fields: Unpack[IpFields],
) -> bytes:
    """An IPv4 packet with one UDP datagram (RFC 768); `length` overrides UDP's own length."""
    head = struct.pack("!HHHH", sport, dport, 8 + len(payload) if length is None else length, 0)
    return finished(ipv4(head + payload, PROTO_UDP, **fields))


def icmp_echo(
    payload: bytes, *, kind: int = 8, echo_id: int = 1, seq: int = 1, **fields: Unpack[IpFields]
) -> bytes:
    """An IPv4 packet with an ICMP echo request, or with `kind` 0 a reply (RFC 792)."""
    message = struct.pack("!BBHHH", kind, 0, 0, echo_id, seq) + payload
    value = internet_checksum(message)
    return ipv4(message[:2] + value.to_bytes(2, "big") + message[4:], PROTO_ICMP, **fields)


def with_header_checksum(packet: bytes | bytearray) -> bytes:
    """The packet with its IPv4 checksum right, for as much of a header as there is."""
    fixed = bytearray(packet)
    length = min(header_len(fixed), len(fixed))
    if length >= 12:
        fixed[10:12] = b"\x00\x00"
        fixed[10:12] = internet_checksum(fixed[:length]).to_bytes(2, "big")
    return bytes(fixed)


def header_len(packet: bytes | bytearray) -> int:
    """Bytes of the IPv4 header, by its own length field."""
    return (packet[0] & 15) * 4


def headers_len(packet: bytes) -> int:
    """Bytes of the IPv4 header and the TCP or UDP header behind it."""
    start = header_len(packet)
    return start + ((packet[start + 12] >> 4) * 4 if packet[9] == PROTO_TCP else 8)


def checksum_at(packet: bytes) -> int:
    """Offset of the TCP or UDP checksum field in the packet."""
    return header_len(packet) + (16 if packet[9] == PROTO_TCP else 6)


def pseudo(packet: bytes) -> int:
    """The sum of the pseudo-header (RFC 768, RFC 9293 section 3.1)."""
    start = header_len(packet)
    return slow_sum(packet[12:20] + struct.pack("!BBH", 0, packet[9], len(packet) - start))


def stored(packet: bytes, value: int) -> bytes:
    """The packet with `value` in its TCP or UDP checksum field, if it reaches that far."""
    at = checksum_at(packet)
    if at + 2 > len(packet):
        return packet
    return packet[:at] + value.to_bytes(2, "big") + packet[at + 2 :]


def finished(packet: bytes) -> bytes:
    """The packet with its TCP or UDP checksum right; UDP's 0 is written as 0xFFFF (RFC 768)."""
    blank = stored(packet, 0)[header_len(packet) :]
    value = internet_checksum(pseudo(packet).to_bytes(2, "big") + blank)
    return stored(packet, 0xFFFF if value == 0 and packet[9] == PROTO_UDP else value)


def super_packet(packet: bytes) -> bytes:
    """The packet as a TUN hands over a super-packet: the pseudo-header's sum as checksum.

    That is CHECKSUM_PARTIAL of linux/skbuff.h: whoever segments it finishes the sum.
    """
    return stored(packet, pseudo(packet))


def with_ttl(packet: bytes, ttl: int) -> bytes:
    """The packet with another TTL, and its header checksum made anew."""
    return with_header_checksum(packet[:8] + bytes((ttl,)) + packet[9:])


def is_sound(packet: bytes) -> bool:
    """Whether every length and checksum of an unfragmented TCP or UDP packet is right."""
    start = header_len(packet)
    udp_len = int.from_bytes(packet[start + 4 : start + 6], "big")
    return (
        int.from_bytes(packet[2:4], "big") == len(packet)
        and slow_sum(packet[:start]) == 0xFFFF
        and slow_sum(pseudo(packet).to_bytes(2, "big") + packet[start:]) == 0xFFFF
        and (packet[9] == PROTO_TCP or udp_len == len(packet) - start)
    )


def counted(length: int) -> bytes:
    """Bytes in which every shift shows: 16-bit numbers one after the other."""
    return b"".join(struct.pack("!H", n * 257 & 0xFFFF) for n in range(length // 2 + 1))[:length]
