"""A peer asks as much as it can, and as badly: a real node, raw datagrams of a peer's."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from ipaddress import IPv4Address
from typing import Any

from tests.netns.test_peer_tools import asked, until_readers
from tests.nodes import PORT, MakeOverlay
from tests.packets import ROUTER_ALERT, ipv4
from tests.peer_packets import PROTO_TALK
from tests.wait import until
from tundp.lab.traffic import PingStream, ping
from tundp.linux.udp import open_udp

COUNT = 20_000
OUTER_LEN = 28
KINDS = range(1, 6)


def message(
    rng: random.Random, kind: int, body: bytes, length: int, *, version: int = 1, nonce: int = 0
) -> bytes:
    """The payload of a question, by the layout of wire/peer_message.py, written anew."""
    head = struct.pack("!Q4sBBH", nonce or rng.getrandbits(64), b"tund", version, kind, len(body))
    return (head + body).ljust(length, b"\0")


def hostile(rng: random.Random) -> bytes:
    """The payload of one hostile message."""
    length = rng.choice((0, 16, 40, 80, 200, 600, 620, 700, 1180, 1180, 1180, 1410))
    giant = rng.choice(("(" * 500, "host 10.5.2.3 or " * 50, "\0" * 900, "not " * 200)).encode()
    choice = rng.randrange(8)
    if choice == 0:
        return rng.randbytes(length)
    if choice == 1:
        return message(rng, 3, struct.pack("!HH", 60, len(giant)) + giant, length)
    if choice == 2:
        return message(rng, 3, struct.pack("!HH", rng.choice((0, 1, 60, 65535)), 0), length)
    if choice == 3:
        return message(rng, 4, rng.randbytes(12), length)
    if choice == 4:
        return message(rng, rng.randrange(256), rng.randbytes(rng.randrange(30)), length)
    if choice == 5:
        return message(rng, 1, b"", length, version=rng.randrange(256))
    whole = bytearray(message(rng, rng.choice(KINDS), rng.randbytes(4), max(length, 20)))
    if choice == 6:
        whole[rng.randrange(len(whole))] = rng.randrange(256)
    return bytes(whole)


class Attacker:
    """A peer's endpoint: what it sends, and what comes of it, in bytes on the underlay."""

    def __init__(self, sock: socket.socket, target: str, own: str, tun: str) -> None:
        self._sock, self._target, self._own, self._tun = sock, target, own, tun
        self.sent = self.sent_bytes = self.answers = self.refusals = self.got_bytes = 0
        self.refusal_len = 0

    def send(self, payload: bytes, **fields: Any) -> None:
        packet = ipv4(
            payload, PROTO_TALK, source=self._own, destination=self._tun, **{"frag": 0, **fields}
        )
        with contextlib.suppress(BlockingIOError):
            self._sock.sendto(packet, (self._target, PORT))
            self.sent += 1
            self.sent_bytes += len(packet) + OUTER_LEN

    def receive(self) -> None:
        """Count what the node or its kernel said: messages, and protocol unreachable."""
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = self._sock.recv(65535)
                is_answer = packet[9] == PROTO_TALK
                is_refusal = packet[9] == 1 and packet[20:22] == b"\x03\x02"
                self.answers += is_answer
                self.refusals += is_refusal
                if is_refusal:
                    self.refusal_len = len(packet)
                self.got_bytes += (is_answer or is_refusal) * (len(packet) + OUTER_LEN)


async def test_a_peer_gets_no_more_than_it_sends(make_overlay: MakeOverlay) -> None:
    rng = random.Random(12)
    async with make_overlay(nodes=3) as overlay:
        one, two, three = (overlay.nodes[number] for number in (1, 2, 3))
        await two.stop_daemon()
        raw = await two.host.call(open_udp, IPv4Address(two.public_ip), PORT)
        with raw:
            attacker = Attacker(raw, one.public_ip, two.tunnel_address, one.tunnel_address)
            async with PingStream(three.host, one.tunnel_address, pause_s=0.05) as pings:
                while attacker.sent < COUNT:
                    before = attacker.sent
                    for _ in range(200):
                        options = rng.choice((b"", b"", b"", ROUTER_ALERT * 10))
                        attacker.send(hostile(rng), ip_options=options)
                    attacker.receive()
                    await asyncio.sleep(0.02 if attacker.sent > before else 0.1)
                assert one.daemon.poll() is None

                async def is_measured() -> bool:
                    """Whether the path to node 3 is measured, while the flood goes on."""
                    for _ in range(100):
                        attacker.send(hostile(rng))
                    attacker.receive()
                    await ping(one.host, three.tunnel_address, size=1400, timeout_s=0.1)
                    peers = (await one.status_document())["peers"]
                    (found,) = (each for each in peers if each["public_ip"] == three.public_ip)
                    return bool((found["measuring"] or {}).get("state") == "measured")

                # Whoever behaves is answered meanwhile, and so are pings and what measures paths.
                await until(is_measured, "node 1 to have measured the path to node 3", poll_s=0.1)
                assert (await asked(three, one))["answer"]["implementation"] == "tundp"
                await until(lambda: pings.received > 0, "an answer to a ping")
            attacker.receive()
            assert attacker.answers > 100, vars(attacker)
            assert attacker.refusals > 0, vars(attacker)
            assert attacker.got_bytes <= attacker.sent_bytes, vars(attacker)
            print(f"{attacker.sent} sent, {attacker.sent_bytes} bytes; {attacker.answers} answers")
        # The traces it began are over by themselves, and nothing is left of the rest.
        await until_readers(one, 0)
        document = await one.status_document()
        assert document["counters"]["conserved"]
        assert "Traceback" not in one.log_path.read_text()


async def test_the_kernels_error_is_as_long_as_is_allowed_for(make_overlay: MakeOverlay) -> None:
    """The bound of each answer counts on it: 576 bytes, or the question and the headers before it.

    In one datagram of its own; it repeats the question's options (net/ipv4/icmp.c, icmp_send).
    """
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await two.stop_daemon()
        raw = await two.host.call(open_udp, IPv4Address(two.public_ip), PORT)
        with raw:
            attacker = Attacker(raw, one.public_ip, two.tunnel_address, one.tunnel_address)
            for length, options in (
                (1180, b""),
                (1180, ROUTER_ALERT * 10),
                (400, b""),
                (400, ROUTER_ALERT * 10),
            ):
                attacker.refusal_len = attacker.got_bytes = attacker.sent_bytes = 0

                def is_refused(length: int = length, options: bytes = options) -> bool:
                    """A kernel's rate is one a second after the first few."""
                    attacker.receive()
                    if not attacker.refusal_len:
                        attacker.send(message(random.Random(), 1, b"", length), ip_options=options)
                    return bool(attacker.refusal_len)

                await until(is_refused, "protocol unreachable", poll_s=0.3)
                header_len = 20 + len(options)
                expected = min(header_len + length + header_len + 8, 576)
                assert attacker.refusal_len <= expected, (length, options)
