"""Hostile packets: at the overlay's port, at the underlay, and into the TUN device.

At the port they come from a stranger, in a peer's name (forged outer source), and from a pod
behind a peer. Headers are made by tests/packets.py, which knows nothing of tundp.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Final

from bench.hostile.common import HONEST, Score, deck
from tests import packets as build
from tundp.lab.lab import Host

PORT: Final = 8285
FRAME_LEN: Final = 1472
SUPER_LEN: Final = 65507
PACKET_VNET_HDR: Final = 15
UDP_SEGMENT: Final = 103
ETH_IP, ETH_ARP = 0x0800, 0x0806
MARTIANS: Final = (
    *("0.0.0.0", "127.0.0.1", "127.255.255.255", "224.0.0.1", "239.255.255.250", "240.0.0.1"),
    *("255.255.255.255", "169.254.169.254", "10.5.255.255", "10.5.0.0", "192.0.2.255"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One node as the attackers know it."""

    number: int
    host: Host
    public_ip: str
    mac: bytes
    tun_address: str
    pod_address: str
    pod: Host


@dataclass(slots=True)
class World:
    """Who is attacked, and the stranger's host."""

    targets: list[Target]
    stranger: Host
    stranger_mac: bytes
    stranger_ip: str = "192.0.2.66"
    addresses: list[str] = field(default_factory=list)


class Inner:
    """Makes the payload of a datagram to the overlay's port, one method a kind."""

    def __init__(self, rng: random.Random, world: World) -> None:
        self.rng = rng
        self.world = world

    def good(self) -> bytes:
        """A packet from one pod to another, as real ones are."""
        rng = self.rng
        one, two = rng.sample(self.world.targets, 2)
        fields: build.IpFields = {
            "source": rng.choice((one.pod_address, one.tun_address, self.anywhere())),
            "destination": rng.choice((two.pod_address, two.tun_address, two.pod_address)),
            "frag": rng.choice((0, build.DF)),
        }
        payload = rng.randbytes(rng.choice((0, 1, 8, 64, 576, 1300, 1400)))
        kind = rng.randrange(4)
        if kind == 0:
            return build.icmp_echo(payload, kind=rng.choice((0, 8)), **fields)
        sport, dport = rng.randrange(65536), rng.randrange(65536)
        if kind == 1:
            seq, flags = rng.getrandbits(32), rng.randrange(256)
            return build.tcp(payload, seq, flags, sport=sport, dport=dport, **fields)
        return build.udp(payload, sport=sport, dport=dport, **fields)

    def anywhere(self) -> str:
        """Any address, those of the lab more often."""
        if self.rng.random() < 0.5:
            return self.rng.choice(self.world.addresses)
        return str(IPv4Address(self.rng.getrandbits(32)))

    def mutated(self) -> bytes:
        """Some bits of a good packet flipped, half the time with the header sum right again."""
        data = bytearray(self.good())
        for _ in range(self.rng.randrange(1, 9)):
            data[self.rng.randrange(min(len(data), 64))] ^= 1 << self.rng.randrange(8)
        return build.with_header_checksum(data) if self.rng.random() < 0.5 else bytes(data)

    def field(self, at: int, form: str, value: int) -> bytes:
        """A good packet with one header field replaced."""
        data = bytearray(self.good())
        struct.pack_into(form, data, at, value)
        return build.with_header_checksum(data)

    def lengths(self) -> bytes:
        """IHL or total length that disagrees with the datagram."""
        if self.rng.random() < 0.3:
            return self.field(0, "!B", 0x40 | self.rng.randrange(16))
        return self.field(
            2, "!H", self.rng.choice((0, 1, 19, 20, 21, 65535, self.rng.getrandbits(16)))
        )

    def truncated(self) -> bytes:
        """The first bytes of a good packet, or more than all of it."""
        data = self.good()
        if self.rng.random() < 0.3:
            return data + self.rng.randbytes(self.rng.randrange(1, 60))
        return data[: self.rng.randrange(len(data))]

    def fragment(self) -> bytes:
        """Flags and offsets of every kind: overlapping, beyond 64 KB, reserved bit."""
        return self.field(6, "!H", self.rng.getrandbits(16))

    def last_ttl(self) -> bytes:
        """TTL 0 or 1."""
        return self.field(8, "!B", self.rng.randrange(2))

    def options(self) -> bytes:
        """IPv4 options: source routes, broken lengths, random bytes."""
        count = self.rng.randrange(1, 11) * 4
        kind = self.rng.choice((b"\x83\x07\x04", b"\x89\x0b\x04", b"\x07\x27\x04", b"\x44\x28\x05"))
        body = (kind + self.rng.randbytes(40))[:count]
        target = self.rng.choice(self.world.targets)
        return build.udp(
            self.rng.randbytes(32),
            ip_options=body,
            ttl=self.rng.choice((1, 64)),
            frag=0,
            source=self.anywhere(),
            destination=target.pod_address,
        )

    def nested(self) -> bytes:
        """A datagram for the overlay's port inside the overlay, up to forty deep."""
        data = self.good()[:200]
        for _ in range(self.rng.choice((1, 1, 2, 40))):
            target = self.rng.choice(self.world.targets)
            to = self.rng.choice((target.public_ip, target.pod_address, target.tun_address))
            data = build.udp(data, dport=PORT, source=self.anywhere(), destination=to)
        return data[:FRAME_LEN]

    def martian(self) -> bytes:
        """Source, destination or both an address no packet may have."""
        at = self.rng.choice((12, 16))
        return self.field(at, "!I", int(IPv4Address(self.rng.choice(MARTIANS))))

    def icmp_error(self) -> bytes:
        """An inner ICMP error about a packet that may never have been sent."""
        target = self.rng.choice(self.world.targets)
        return icmp_message(
            self.rng, self.good(), source=self.anywhere(), destination=target.pod_address
        )

    def noise(self) -> bytes:
        """Random bytes."""
        return self.rng.randbytes(self.rng.choice((1, 2, 19, 20, 28, 600, FRAME_LEN)))

    def empty(self) -> bytes:
        """No byte at all."""
        return b""

    def biggest(self) -> bytes:
        """As long as a datagram can be; a good header before it half the time."""
        data = self.rng.randbytes(SUPER_LEN - 20)
        if self.rng.random() < 0.5:
            return data
        target = self.rng.choice(self.world.targets)
        return build.ipv4(data, 17, source=self.anywhere(), destination=target.pod_address)


INNER: Final = (
    *("good", "mutated", "lengths", "truncated", "fragment", "last_ttl", "options", "nested"),
    *("martian", "icmp_error", "noise", "empty", "biggest"),
)


def icmp_message(rng: random.Random, about: bytes, *, source: str, destination: str) -> bytes:
    """An ICMP error that quotes `about`: unreachable, fragmentation needed, redirect and others."""
    kind, code = rng.choice(
        (
            (3, 0),
            (3, 1),
            (3, 3),
            (3, 4),
            (3, 4),
            (3, 13),
            (4, 0),
            (5, 0),
            (5, 1),
            (11, 0),
            (11, 1),
            (12, 0),
        )
    )
    rest = struct.pack("!HH", 0, rng.choice((0, 1, 68, 552, 576, 1280, 1499, 1500)))
    if kind == 5:
        rest = IPv4Address("192.0.2.66").packed
    body = struct.pack("!BBH", kind, code, 0) + rest + about[: rng.choice((8, 28, 28, 548))]
    value = build.internet_checksum(body)
    return build.ipv4(
        body[:2] + value.to_bytes(2, "big") + body[4:], 1, source=source, destination=destination
    )


class Packets:
    """The packet attackers, one task each."""

    def __init__(self, score: Score, world: World) -> None:
        self.score = score
        self.world = world
        self._stack = contextlib.ExitStack()

    async def open(self) -> None:
        """Sockets in the stranger's namespace, the pods' and the nodes'."""
        stranger = self.world.stranger
        self.udp = self._own(await stranger.socket(socket.SOCK_DGRAM))
        self.frames = self._own(await stranger.call(_packet_socket, "eth0"))
        self.pods = [
            self._own(await each.pod.socket(socket.SOCK_RAW, socket.IPPROTO_RAW))
            for each in self.world.targets
        ]
        self.pod_udp = [
            self._own(await each.pod.socket(socket.SOCK_DGRAM)) for each in self.world.targets
        ]
        self.pod_frames = [
            self._own(await each.pod.call(_packet_socket, "eth0")) for each in self.world.targets
        ]
        self.tuns = [
            self._own(await each.host.call(_packet_socket, None)) for each in self.world.targets
        ]
        self.super_tuns = [
            self._own(await each.host.call(_packet_socket, None)) for each in self.world.targets
        ]
        for sock in self.super_tuns:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            sock.setsockopt(263, PACKET_VNET_HDR, 1)

    def close(self) -> None:
        """Close all sockets."""
        self._stack.close()

    def _own(self, sock: socket.socket) -> socket.socket:
        sock.setblocking(False)
        return self._stack.enter_context(sock)

    def _send(self, who: str, send: Callable[[], object]) -> None:
        try:
            send()
            self.score.packets[who] += 1
        except (OSError, OverflowError):
            self.score.refused[who] += 1

    async def at_the_port(self) -> None:
        """Datagrams to every node's port, singly, in bursts and in floods."""
        rng = self.score.rng("port")
        inner, kinds = Inner(rng, self.world), deck(rng, INNER)
        senders = deck(rng, ("stranger", "peer", "pod"))
        while True:
            kind, sender = next(kinds), next(senders)
            count = rng.choice((1, 5, 20, 20, 400 if kind != "biggest" else 40))
            for target in self.world.targets:
                self.score.done["port", f"{kind} from a {sender}"] += count
                await asyncio.to_thread(self._burst, inner, kind, sender, target, count)
            await asyncio.sleep(rng.uniform(0.02, 0.15))

    def _burst(self, inner: Inner, kind: str, sender: str, target: Target, count: int) -> None:
        make = getattr(inner, kind)
        made = [make() for _ in range(min(count, 20))]
        to = (target.public_ip, PORT)
        for number in range(count):
            data = made[number % len(made)]
            if sender == "stranger" or (sender == "peer" and len(data) > FRAME_LEN):
                self._send("stranger", lambda data=data: self.udp.sendto(data, to))  # type: ignore[misc]
            elif sender == "pod":
                index = self.world.targets.index(inner.rng.choice(self.world.targets))
                sock = self.pod_udp[index]
                self._send("pod", lambda data=data, sock=sock: sock.sendto(data, to))  # type: ignore[misc]
            else:
                peer = inner.rng.choice([each for each in self.world.targets if each != target])
                outer = build.udp(
                    data,
                    sport=inner.rng.choice((PORT, PORT, 53)),
                    dport=PORT,
                    frag=0,
                    source=peer.public_ip,
                    destination=target.public_ip,
                )
                self._frame(target.mac, ETH_IP, outer)

    def _frame(self, mac: bytes, ethertype: int, data: bytes) -> None:
        frame = mac + self.world.stranger_mac + ethertype.to_bytes(2, "big") + data
        self._send("underlay", lambda: self.frames.send(frame[:1514]))

    async def at_the_underlay(self) -> None:
        """Forged ICMP about the nodes' own datagrams, ARP noise, frames of no known kind."""
        rng = self.score.rng("underlay")
        inner = Inner(rng, self.world)
        kinds = deck(rng, ("icmp", "icmp", "arp", "ethertype", "outer"))
        while True:
            kind = next(kinds)
            for target in self.world.targets:
                self.score.done["underlay", kind] += 10
                for _ in range(10):
                    self._underlay(rng, inner, kind, target)
            await asyncio.sleep(rng.uniform(0.05, 0.3))

    def _underlay(self, rng: random.Random, inner: Inner, kind: str, target: Target) -> None:
        if kind == "icmp":
            peer = rng.choice([each for each in self.world.targets if each != target])
            about = build.udp(
                inner.good(),
                sport=PORT,
                dport=PORT,
                source=target.public_ip,
                destination=peer.public_ip,
            )
            source = rng.choice((peer.public_ip, "192.0.2.254", "192.0.2.66"))
            data = icmp_message(rng, about, source=source, destination=target.public_ip)
            self._frame(target.mac, ETH_IP, data)
        elif kind == "arp":
            # Never in a node's own name: nothing above ARP can withstand that.
            sender = f"192.0.2.{rng.randrange(100, 250)}"
            head = struct.pack("!HHBBH", 1, ETH_IP, rng.choice((6, 6, 255)), 4, rng.randrange(10))
            ends = rng.randbytes(6) + IPv4Address(sender).packed
            about_ip = IPv4Address(rng.choice((sender, target.public_ip))).packed
            arp = head + ends + bytes(6) + about_ip
            mac = rng.choice((target.mac, b"\xff" * 6))
            self._frame(mac, ETH_ARP, arp[: rng.choice((28, 28, 9))])
        elif kind == "ethertype":
            self._frame(target.mac, rng.getrandbits(16) | 0x0600, rng.randbytes(100))
        else:
            outer = bytearray(
                build.udp(
                    inner.good()[:1400],
                    dport=PORT,
                    frag=0,
                    source=inner.anywhere(),
                    destination=target.public_ip,
                )
            )
            for _ in range(3):
                outer[rng.randrange(28)] ^= 1 << rng.randrange(8)
            self._frame(target.mac, ETH_IP, bytes(outer))

    async def into_the_tun(self) -> None:
        """What pods and the node itself put into the device."""
        rng = self.score.rng("tun")
        inner = Inner(rng, self.world)
        kinds = deck(
            rng, ("from pod", "ipv6", "version", "broken", "monster", "segments", "pod frame")
        )
        while True:
            kind = next(kinds)
            for index in range(len(self.world.targets)):
                if kind == "monster" and index < HONEST:
                    continue  # one of gso_size 1 fills the device's queue by itself
                self.score.done["tun", kind] += 10
                await asyncio.to_thread(self._into, rng, inner, kind, index)
            await asyncio.sleep(rng.uniform(0.03, 0.2))

    def _into(self, rng: random.Random, inner: Inner, kind: str, index: int) -> None:
        for _ in range(10):
            make = getattr(
                inner, rng.choice(("good", "options", "last_ttl", "martian", "fragment"))
            )
            other = rng.choice(self.world.targets)
            to = (other.pod_address, rng.randrange(1, 65536))
            if kind == "from pod":
                data = make()
                address = str(IPv4Address(data[16:20])) if len(data) >= 20 else to[0]
                self._send(kind, lambda: self.pods[index].sendto(data, (address, 0)))  # noqa: B023
            elif kind == "segments":
                self._segments(rng, index, to)
            elif kind == "monster":
                data = virtio(rng) + (inner.good() + rng.randbytes(rng.choice((0, 5000, 60_000))))
                self._tun(kind, self.super_tuns[index], data[:65_000], ETH_IP)
            elif kind == "pod frame":
                target = self.world.targets[index]
                head = b"\xff" * 6 + rng.randbytes(6)
                frame = (
                    head + rng.choice((0x0800, 0x86DD, 0x0806)).to_bytes(2, "big") + inner.mutated()
                )
                self._send(kind, lambda: self.pod_frames[index].send(frame[:1480]))  # noqa: B023
                del target
            else:
                data = self._odd(rng, inner, kind)
                ethertype = 0x86DD if kind == "ipv6" else ETH_IP
                self._tun(kind, self.tuns[index], data, ethertype)

    def _odd(self, rng: random.Random, inner: Inner, kind: str) -> bytes:
        if kind == "ipv6":
            length = rng.randrange(100)
            head = struct.pack("!IHBB", 0x60000000, length, rng.choice((0, 6, 17, 58)), 64)
            return head + rng.randbytes(32) + rng.randbytes(length)
        if kind == "version":
            return bytes((rng.randrange(256),)) + inner.good()[1:]
        make = getattr(inner, rng.choice(("lengths", "truncated", "noise", "mutated")))
        data: bytes = make()
        return data or b"\x45"

    def _tun(self, kind: str, sock: socket.socket, data: bytes, ethertype: int) -> None:
        self._send(kind, lambda: sock.sendto(data, ("flannel0", ethertype)))

    def _segments(self, rng: random.Random, index: int, to: tuple[str, int]) -> None:
        size = rng.choice((1, 7, 500, 1400, 1444))
        data = rng.randbytes(min(60_000, size * rng.randrange(1, 64)))
        option = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("H", size))]
        self._send("segments", lambda: self.pod_udp[index].sendmsg([data], option, 0, to))


def virtio(rng: random.Random) -> bytes:
    """A virtio_net_hdr (uapi/linux/virtio_net.h) of any content, often one the kernel takes."""
    flags = rng.choice((0, 1, 1, 2))
    kind = rng.choice((0, 1, 1, 5, 5, 3, 4, 0x81, 255))
    return struct.pack(
        "<BBHHHH",
        flags,
        kind,
        rng.choice((0, 20, 28, 40, 54)),
        rng.choice((1, 8, 100, 536, 1400, 1432, 65535)),
        rng.choice((20, 20, 0, 60)),
        rng.choice((6, 16, 16, 0)),
    )


def _packet_socket(device: str | None) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    if device is not None:
        sock.bind((device, 0))
    return sock
