"""Engines hand the heads of answers to what measures paths over, and nothing else.

left: engine under test, 10.5.1.0 on its TUN -- 192.0.2.1 eth0 ---- eth0 192.0.2.2 right, a socket
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

from tests.echo_replies import COOKIE, ECHO_ID, HEAD_LEN, cases
from tests.engine.test_contract import every_engine
from tests.nodes import PORT, EngineNode, engine_node
from tests.packets import icmp_echo
from tests.routes import peer as peer_of
from tests.wait import until
from tundp.choices import Engine, SourceCheck
from tundp.linux.udp import open_udp

PEER = peer_of("10.5.2.0/24", "192.0.2.2", hop_id=2)
TUN_ADDRESS, POD, OF_PEER = "10.5.1.0", "10.5.1.9", "10.5.2.0"
NODE = ("192.0.2.1", PORT)
UDP_SEGMENT = 103  # linux/udp.h


@dataclass(slots=True, kw_only=True)
class World:
    """The engine's node, who sends to it, and the end of the pair that its replies come to."""

    node: EngineNode
    peer: socket.socket
    heads: socket.socket
    engine_end: socket.socket

    async def until_read(self, count: int) -> None:
        await until(
            lambda: self.node.engine.counters().decap.packets_in == count,
            f"{count} packets from the socket",
        )

    def taken(self) -> list[bytes]:
        """All that was handed over since the last look."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(self.heads.recv(2048))
        return found


@contextlib.asynccontextmanager
async def world(make_lab: Any, engine: Engine) -> AsyncIterator[World]:
    async with make_lab() as lab, contextlib.AsyncExitStack() as stack:
        left, right = await lab.host("left"), await lab.host("right")
        await lab.cable(left, "eth0", right, "eth0")
        await right.configure("eth0", "192.0.2.2/24")
        heads, engine_end = (
            stack.enter_context(each)
            for each in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        )
        node = await stack.enter_async_context(
            engine_node(
                left,
                engine.value,
                1,
                peers=[PEER],
                source_check=SourceCheck.COUNT,
                echo=(engine_end.fileno(), ECHO_ID),
            )
        )
        peer = stack.enter_context(await right.call(open_udp, IPv4Address("192.0.2.2"), PORT))
        node.engine.attach(node.tun)
        yield World(node=node, peer=peer, heads=heads, engine_end=engine_end)


def reply(number: int) -> bytes:
    """An answer whose cookie is its number."""
    cookie = number.to_bytes(len(COOKIE), "big")
    return icmp_echo(
        cookie, kind=0, echo_id=ECHO_ID, frag=0, source=OF_PEER, destination=TUN_ADDRESS
    )


def numbers(heads: list[bytes]) -> list[int]:
    return [int.from_bytes(head[-len(COOKIE) :], "big") for head in heads]


@every_engine
async def test_exactly_the_answers_are_handed_over(make_lab: Any, engine: Engine) -> None:
    table = cases(TUN_ADDRESS, POD, OF_PEER)
    async with world(make_lab, engine) as all_:
        for count, (name, case) in enumerate(table.items(), start=1):
            all_.peer.sendto(case.datagram, NODE)
            await all_.until_read(count)
            await until(
                lambda: (
                    (counted := all_.node.engine.counters()).decap.packets_in
                    == sum((counted.decap.packets_out, counted.decap.dropped))
                ),
                name,
            )
            assert all_.taken() == ([case.head] if case.is_handed_over else []), name
        # Handed over or not, a packet is decided, counted and delivered as any other.
        counted = all_.node.engine.counters()
        dropped = sum(case.is_dropped for case in table.values())
        assert (counted.decap.packets_out, counted.decap.dropped) == (len(table) - dropped, dropped)
        assert counted.as_dict()["conserved"]


@every_engine
async def test_each_packet_of_a_super_packet_is_looked_at(make_lab: Any, engine: Engine) -> None:
    async with world(make_lab, engine) as all_:
        request = icmp_echo(
            bytes(16), kind=8, echo_id=ECHO_ID, frag=0, source=OF_PEER, destination=TUN_ADDRESS
        )
        packets = [request if number % 3 == 0 else reply(number) for number in range(20)]
        size = struct.pack("=H", len(request))
        all_.peer.sendmsg(packets, [(socket.IPPROTO_UDP, UDP_SEGMENT, size)], 0, NODE)
        await all_.until_read(20)
        heads: list[bytes] = []

        def has_all() -> bool:
            heads.extend(all_.taken())
            return len(heads) == 13

        await until(has_all, "13 answers of 20 packets")
        assert numbers(heads) == [number for number in range(20) if number % 3]
        assert {len(head) for head in heads} == {20 + HEAD_LEN}


@every_engine
async def test_a_full_pair_costs_an_answer_and_nothing_else(make_lab: Any, engine: Engine) -> None:
    async with world(make_lab, engine) as all_:
        with contextlib.suppress(BlockingIOError):
            while True:
                all_.engine_end.send(b"full")
        for number in range(100):
            all_.peer.sendto(reply(number), NODE)
        await all_.until_read(100)
        await until(
            lambda: all_.node.engine.counters().decap.packets_out == 100, "100 packets delivered"
        )
        assert set(all_.taken()) == {b"full"}
        all_.peer.sendto(reply(100), NODE)
        await all_.until_read(101)
        heads: list[bytes] = []

        def has_one() -> bool:
            heads.extend(all_.taken())
            return bool(heads)

        await until(has_one, "an answer, now that there is room")
        assert numbers(heads) == [100]


@every_engine
async def test_nobody_at_the_other_end_costs_nothing(make_lab: Any, engine: Engine) -> None:
    async with world(make_lab, engine) as all_:
        all_.heads.close()
        for number in range(10):
            all_.peer.sendto(reply(number), NODE)
        await until(
            lambda: all_.node.engine.counters().decap.packets_out == 10, "10 packets delivered"
        )
        counted = all_.node.engine.counters()
        assert (counted.decap.dropped, counted.errnos) == (0, {})
