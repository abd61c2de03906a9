"""Inner packets that tunnels of public bug reports lost or changed: docs/tried-cases.md."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

import pytest

from tests.nodes import MakeOverlay, answers, counters
from tests.packets import (
    ACK,
    CWR,
    DF,
    ECE,
    FIN,
    MF,
    PROTO_UDP,
    PSH,
    ROUTER_ALERT,
    RST,
    SYN,
    TIMESTAMPS,
    URG,
    internet_checksum,
    ipv4,
    tcp,
    udp,
)
from tests.wait import until
from tundp.lab.lab import Host

ETH_P_IP = 0x0800
SO_OOBINLINE = 10
IPPROTO_MPTCP = 262
PROTO_IPIP, PROTO_IPV6, PROTO_GRE, PROTO_ESP, PROTO_SCTP = 4, 41, 47, 50, 132
HOPS = 4
"""A packet from pod to pod loses this much of its TTL: two kernels and both daemons."""

pytestmark = pytest.mark.parametrize("engine", ["reference", "gso"])


def no_sum(packet: bytes) -> bytes:
    """The same UDP datagram without a checksum (RFC 768: zero)."""
    return packet[:26] + b"\x00\x00" + packet[28:]


def odd_packets(source: str, destination: str) -> dict[str, bytes]:
    """Valid packets that a tunnel has no reason to change, by what is odd about them."""
    ends: Any = {"source": source, "destination": destination}
    body = os.urandom(64)
    inner = udp(b"within", source="203.0.113.1", destination="203.0.113.2")

    fragments = udp(b"f" * 72, ident=77, frag=MF, **ends)
    return {
        "empty datagram": udp(b"", ident=1, **ends),
        "datagram without checksum": no_sum(udp(body, ident=2, **ends)),
        "DSCP and ECN CE": udp(body, ident=3, tos=0xBB, **ends),
        "ECT(1)": udp(body, ident=4, tos=0x01, **ends),
        "router alert": udp(body, ident=5, ip_options=ROUTER_ALERT, **ends),
        "no-operation options": udp(body, ident=6, ip_options=b"\x01" * 8, **ends),
        "most options": udp(body, ident=7, ip_options=b"\x01" * 40, **ends),
        "SCTP": ipv4(os.urandom(32), PROTO_SCTP, ident=8, **ends),
        "ESP": ipv4(os.urandom(61), PROTO_ESP, ident=9, **ends),
        "GRE": ipv4(b"\0\0\x08\0" + inner, PROTO_GRE, ident=10, **ends),
        "IP in IP": ipv4(inner, PROTO_IPIP, ident=11, **ends),
        "IPv6 in IPv4": ipv4(b"\x60" + bytes(39), PROTO_IPV6, ident=12, **ends),
        "protocol 253": ipv4(body, 253, ident=13, **ends),
        "no payload at all": ipv4(b"", 253, ident=14, **ends),
        "reserved flag": ipv4(body, 253, ident=15, frag=0x8000, **ends),
        "first fragment": fragments,
        "last fragment, alone": ipv4(body, PROTO_UDP, ident=79, frag=10, **ends),
        "fragment with DF": ipv4(body, PROTO_UDP, ident=80, frag=DF | MF | 3, **ends),
        "fragment at the end of 64 KB": ipv4(b"1234567", PROTO_UDP, ident=81, frag=0x1FFB, **ends),
        "UDP of a wrong length": udp(body, ident=82, length=40, **ends),
        "UDP with a wrong sum": udp(body, ident=83, **ends)[:-1] + b"\x00",
        "ICMP timestamp": ipv4(
            _icmp(13, struct.pack("!HHIII", 7, 1, 1, 0, 0)), 1, ident=84, **ends
        ),
        "ICMP redirect": ipv4(_icmp(5, bytes(4) + inner[:28]), 1, ident=85, **ends),
        "TCP urgent": tcp(body, 1000, ACK | URG, urgent=10, ident=20, **ends),
        "TCP CWR": tcp(body, 2000, ACK | CWR, ident=21, **ends),
        "TCP SYN ECE CWR with data": tcp(body, 3000, SYN | ECE | CWR, ident=22, **ends),
        "TCP without flags": tcp(b"", 4000, 0, ident=23, **ends),
        "TCP all flags": tcp(body, 5000, 0xFF, ident=24, **ends),
        "TCP RST with data": tcp(body, 6000, RST | ACK, ident=25, **ends),
        "TCP FIN PSH timestamps": tcp(body, 7000, FIN | PSH | ACK, TIMESTAMPS, ident=26, **ends),
        "TCP AccECN bit": tcp(body, 8000, ACK, reserved=1, ident=27, **ends),
        "TCP reserved bits": tcp(body, 9000, ACK, reserved=6, ident=28, **ends),
        "TCP zero window": tcp(b"", 10000, ACK, window=0, ident=29, **ends),
        "TCP keepalive of a byte": tcp(b"\0", 10999, ACK, ident=30, **ends),
        "TCP most options": tcp(body, 12000, ACK, b"\x01" * 40, ident=31, **ends),
        "TCP with a wrong sum": tcp(body, 13000, ACK, ident=32, **ends)[:-1] + b"\x00",
        "record route with a full list": udp(
            body, ident=33, ip_options=b"\x07\x03\x04\x00", **ends
        ),
    }


def _icmp(kind: int, rest: bytes) -> bytes:
    blank = bytes([kind, 0, 0, 0]) + rest
    return bytes([kind, 0]) + internet_checksum(blank).to_bytes(2, "big") + rest


def as_it_must_arrive(packet: bytes, hops: int) -> bytes:
    """The packet after so many routers: TTL and header checksum, nothing else."""
    length = (packet[0] & 15) * 4
    head = bytearray(packet[:length])
    head[8] -= hops
    head[10:12] = b"\x00\x00"
    head[10:12] = internet_checksum(head).to_bytes(2, "big")
    return bytes(head) + packet[length:]


class Capture:
    """IPv4 packets that arrive on a host's eth0."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.seen: list[bytes] = []

    @classmethod
    async def on(cls, host: Host) -> Capture:
        def opened() -> socket.socket:
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP))
            sock.bind(("eth0", ETH_P_IP))
            sock.setblocking(False)
            return sock

        return cls(await host.call(opened))

    def holds(self, packet: bytes) -> bool:
        while True:
            try:
                data, origin = self._sock.recvfrom(1 << 16)
            except BlockingIOError:
                return packet in self.seen
            if origin[2] != socket.PACKET_OUTGOING:
                self.seen.append(data)

    def close(self) -> None:
        self._sock.close()


async def send_raw(host: Host, packets: Sequence[bytes]) -> None:
    sock = await host.socket(socket.SOCK_RAW, socket.IPPROTO_RAW)
    with sock:
        for packet in packets:
            destination = socket.inet_ntoa(packet[16:20])
            sock.sendto(packet, (destination, 0))


async def test_odd_packets_arrive_as_they_were_sent(make_overlay: MakeOverlay) -> None:
    async with make_overlay(pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        # Neighbours are resolved first: the kernel queues few packets for an unknown one.
        await until(lambda: answers(one.pod, two.pod_address))
        capture = await Capture.on(two.pod)
        try:
            for what, packet in odd_packets(one.pod_address, two.pod_address).items():
                await send_raw(one.pod, [packet])
                wanted = as_it_must_arrive(packet, HOPS)
                await until(lambda wanted=wanted: capture.holds(wanted), what, deadline_s=3)
        finally:
            capture.close()
        for node in (one, two):
            assert (await counters(node))["conserved"]
